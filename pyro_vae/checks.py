"""Messages for input that cannot be right. Nothing here repairs or changes what it checks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Bernoulli, constraints
from torch.utils._pytree import tree_leaves

from pyro_vae.traces import layers

__all__ = [
    "NOT_FINITE_FIX",
    "check_arguments",
    "check_at_least",
    "check_batch",
    "check_data",
    "check_observations",
    "check_values",
    "explained",
    "refuse_subsampling",
    "support_of",
    "support_of_numbers",
]

NOT_FINITE_FIX = (
    "Remove those rows, or put a number there and mark the entries as unobserved with "
    "pyro.poutine.mask."
)


def check_at_least(where: str, name: str, value: int, least: int) -> None:
    """Raises unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{where}: expected an integer {name}, got {type(value).__name__}. "
            f"Pass {name}={least} or more."
        )
    if value < least:
        raise ValueError(
            f"{where}: expected {name} >= {least}, got {value}. Pass {name}={least} or more."
        )


def check_data(where: str, name: str, x: Any, event_shape: tuple[int, ...]) -> None:
    """Raises unless ``x`` is a float tensor of shape ``(batch, *event_shape)`` with rows.

    A length of -1 in ``event_shape`` stands for any. Costs no synchronisation.
    """
    wanted = ("batch", *("any" if n < 0 else n for n in event_shape))
    text = f"({', '.join(map(str, wanted))}{',' if len(wanted) == 1 else ''})"
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{where}: expected {name} to be a tensor of shape {text}, got {type(x).__name__}. "
            f"Convert it with torch.as_tensor({name})."
        )
    fits = x.dim() == len(event_shape) + 1 and all(
        n < 0 or n == actual for n, actual in zip(event_shape, x.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{where}: expected {name} of shape {text}, got {tuple(x.shape)}. "
            "The first dimension runs over the batch, the rest is one datum; use "
            f"{name}.reshape or {name}.unsqueeze(0) for a single datum."
        )
    if len(x) == 0:
        raise ValueError(
            f"{where}: expected at least one row in {name}, got an empty batch of shape "
            f"{tuple(x.shape)}. Leave empty batches out."
        )


def check_batch(where: str, name: str, x: Any) -> None:
    """Raises unless ``x`` is a tensor of any rank with rows."""
    some_rank = isinstance(x, torch.Tensor) and x.dim() > 0
    check_data(where, name, x, tuple(x.shape[1:]) if some_rank else (-1,))


def check_arguments(where: str, arguments: Any) -> None:
    """Raises if a tensor among the arguments of a program is empty."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            raise ValueError(
                f"{where}: expected at least one row of data, got an empty tensor of shape "
                f"{tuple(leaf.shape)}. Leave empty batches out."
            )


def check_observations(where: str, sites: dict[str, Any]) -> None:
    """Raises if observed values are not finite or lie outside their distribution's support.

    Values that a mask declares unobserved are not looked at.
    """
    for name, site in sites.items():
        value, mask = site["value"], site["mask"]
        if not isinstance(value, torch.Tensor):
            continue
        check_values(where, name, site["fn"], value, mask)


def check_values(
    where: str, name: str, fn: Any, value: torch.Tensor, mask: torch.Tensor | bool | None = None
) -> None:
    """Raises if ``value`` is not finite or outside the support of ``fn``, with the usual fix.

    Values where ``mask`` is false are not looked at.
    """
    if mask is False:
        return
    *wrappers, base = layers(fn)
    if any(hasattr(wrapper, "_mask") for wrapper in wrappers) or isinstance(base, dist.Unit):
        return  # A factor has no value.
    if isinstance(base, dist.NanMaskedNormal | dist.NanMaskedMultivariateNormal):
        return  # NaN is how these say "not observed".
    # Rows are selected by the mask for messages only: in a captured graph shapes are fixed.
    if value.is_floating_point():
        finite = value.isfinite()
        if isinstance(mask, torch.Tensor):
            finite = finite | ~mask[(..., *(None,) * fn.event_dim)]
        if not finite.all():
            _check_finite(where, name, _seen(value, mask, fn.event_dim))
    support = support_of(fn)
    if support is None:
        return
    valid = support.check(value)
    if isinstance(mask, torch.Tensor):
        valid = valid | ~mask
    if not valid.all():
        _raise_outside_support(where, name, _seen(value, mask, fn.event_dim), base, fn)


def _seen(value: torch.Tensor, mask: Any, event_dim: int) -> torch.Tensor:
    """The values that a mask lets through."""
    if not isinstance(mask, torch.Tensor):
        return value
    batch_shape = value.shape[: value.dim() - event_dim]
    event_shape = value.shape[len(batch_shape) :]
    batch_shape = torch.broadcast_shapes(batch_shape, mask.shape)
    return value.expand(batch_shape + event_shape)[mask.expand(batch_shape)]


def support_of(fn: Any) -> Any:
    """The support of a distribution, or ``None`` where its author left it out."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def support_of_numbers(support: Any) -> Any:
    """What a support says of single numbers, or of a component, where it wraps another one."""
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def _check_finite(
    where: str, name: str | None, value: torch.Tensor, cause: Exception | None = None
) -> None:
    if value.is_floating_point() and not value.isfinite().all():
        num_nan, num_inf = int(value.isnan().sum()), int(value.isinf().sum())
        at = f" at site '{name}'" if name else f" in the argument of shape {tuple(value.shape)}"
        raise ValueError(
            f"{where}: expected finite data{at}, got {num_nan} NaN and {num_inf} "
            f"infinite values. {NOT_FINITE_FIX}"
        ) from cause


def _raise_outside_support(where: str, name: str, value: torch.Tensor, base: Any, fn: Any) -> None:
    low, high = float(value.min()), float(value.max())
    if isinstance(base, Bernoulli):
        raise ValueError(
            f"{where}: expected values 0 and 1 at site '{name}' under a Bernoulli, got values "
            f"in [{low:g}, {high:g}]. Binarise the data (pyro_vae.datasets.binarize) or use "
            "pyro_vae.likelihoods.ContinuousBernoulli for values in [0, 1]."
        )
    raise ValueError(
        f"{where}: expected values at site '{name}' in the support {fn.support} of "
        f"{type(base).__name__}, got values in [{low:g}, {high:g}]. "
        "Rescale the data or choose another likelihood."
    )


_IN_PLATE = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>.+)'\) at site (?P<site>.+) dim "
    r"(?P<dim>-?\d+), (?P<plate_size>\d+) vs (?P<size>\d+)"
)
_LOG_PROB = re.compile(r"at site \"?'?(?P<site>[^\"']+)\"?'?, invalid log_prob shape")


@contextmanager
def explained(where: str, arguments: Any = ()) -> Iterator[None]:
    """Adds the usual cause to Pyro's messages: about shapes, and NaN that come from the data."""
    try:
        yield
    except ValueError as err:
        if found := _IN_PLATE.search(str(err)):
            raise ValueError(
                f"{where}: expected size {found['plate_size']} at dimension {found['dim']} of "
                f"site '{found['site']}' inside plate '{found['plate']}', got {found['size']}. "
                "Was `.to_event(1)` forgotten? It declares the dimensions of one datum: "
                "dist.Normal(loc, scale).to_event(1)."
            ) from err
        if found := _LOG_PROB.search(str(err)):
            raise ValueError(
                f"{where}: expected one log-probability per row at site '{found['site']}', got "
                "more. Was `.to_event(1)` forgotten? It declares the dimensions of one datum: "
                "dist.Normal(loc, scale).to_event(1)."
            ) from err
        if "to satisfy the constraint" in str(err):  # A guide meets the data before the model.
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, torch.Tensor):
                    _check_finite(where, None, leaf, err)
        raise


class _RefuseSubsampling(Messenger):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        size, wanted = msg["fn"].size, msg["fn"].subsample_size
        if wanted is not None and 0 <= wanted < size:
            raise ValueError(
                f"{self.where}: expected plate '{msg['name']}' over the rows given, got a random "
                f"subsample of {wanted} of {size} rows, so that no value belongs to a known row. "
                f"Pass the rows and use pyro.plate('{msg['name']}', {size}, subsample=rows)."
            )


def refuse_subsampling(where: str) -> Messenger:
    """A handler that raises where a plate would draw its rows at random."""
    return _RefuseSubsampling(where)
