"""Effect handlers around a model or a guide."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import constraints, transform_to

from pyro_vae.checks import support_of
from pyro_vae.isolation import Evaluating
from pyro_vae.schedules import Weight, weight_of
from pyro_vae.traces import is_latent, is_observed

__all__ = [
    "MaskMissingMessenger",
    "ReplayValuesMessenger",
    "ScaleKLMessenger",
    "StopAfterMessenger",
    "mask_missing",
    "replay_values",
    "scale_kl",
    "stop_after",
]


class MaskMissingMessenger(Messenger):
    """The handler behind :func:`mask_missing`."""

    def __init__(self, present: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, mask in present.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(
                    f"mask_missing: expected a bool tensor for site '{name}', got {got}. "
                    "It says in which rows the site was observed."
                )
        self._present = present
        self._observed: list[str] = []

    def __enter__(self) -> Any:
        self._observed = []
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        unknown = [name for name in self._present if name not in self._observed]
        if unknown and exception == (None, None, None):
            super().__exit__(*exception)
            raise ValueError(
                f"mask_missing: expected observed sites among {self._observed}, got "
                f"'{unknown[0]}'. Name the sites that the program observes."
            )
        return super().__exit__(*exception)

    def _pyro_sample(self, msg: Any) -> None:
        if not is_observed(msg):
            return
        self._observed.append(msg["name"])
        mask = self._present.get(msg["name"])
        if mask is None:
            return
        value, event_dim = msg["value"], msg["fn"].event_dim
        batch_shape = value.shape[: value.dim() - event_dim]
        shape = torch.broadcast_shapes(batch_shape, msg["fn"].batch_shape)
        if mask.dim() > len(shape) or any(
            n not in (1, size) for n, size in zip(mask.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"mask_missing: expected a mask of shape {tuple(shape)} for site '{msg['name']}', "
                f"its batch shape, got {tuple(mask.shape)}. One entry stands for a whole datum of "
                f"event shape {tuple(value.shape[len(batch_shape) :])}: write mask.all(-1), or "
                "make single elements data of a plate."
            )
        msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]
        mask = mask.reshape(mask.shape + (1,) * event_dim)
        msg["value"] = torch.where(mask, value, _legal(msg["fn"], value))


def mask_missing(
    fn: Callable[..., Any] | None = None, present: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """Says row by row which observed sites of ``fn`` were observed.

    A missing value has no part in the density: its site is masked there. What stands in its
    place, NaN for instance, is never looked at, and the data are not changed. Like Pyro's own
    handlers it is a wrapper, a decorator and a context manager.

    Args:
        fn: A model.
        present: By observed site, bool, in the site's batch dimensions: ``(batch,)`` for a
            single plate over the data. Other sites are left alone.

    Returns:
        The wrapped ``fn``, or the handler when ``fn`` is not given.

    Raises:
        TypeError: If a mask is not a bool tensor.
        ValueError: If a mask does not fit the batch shape of its site; after running, if
            ``present`` names a site that ``fn`` does not observe.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> x = torch.tensor([0.0, float("nan")])
        >>> seen = mask_missing(model, {"x": torch.tensor([True, False])})
        >>> trace = poutine.trace(seen).get_trace(x)
        >>> trace.compute_log_prob()
        >>> trace.nodes["x"]["log_prob"]
        tensor([-0.9189,  0.0000])
    """
    if present is None:
        raise TypeError(
            "mask_missing: expected masks by site, got None. Call mask_missing(fn, present)."
        )
    handler = MaskMissingMessenger(present)
    return handler if fn is None else handler(fn)


def _legal(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """A value with a finite density, to stand in for a missing one: a fixed one, or a draw.

    A mask alone does not do: where the density of a missing value is NaN, so are its gradients.
    """
    support = support_of(fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.one_hot:
        first = torch.zeros_like(value)
        first[..., 0] = 1
        return first
    if support is None or support.is_discrete:
        return torch.zeros_like(value) + getattr(support, "lower_bound", 0)
    try:
        legal: torch.Tensor = transform_to(support)(torch.zeros_like(value))
    except (NotImplementedError, RuntimeError, ValueError):
        legal = value.new_empty(())
    # Some supports have no map from the real numbers, or one from another number of them.
    return legal if legal.shape == value.shape else fn.sample()


class ReplayValuesMessenger(Messenger):
    """The handler behind :func:`replay_values`."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg) and msg["name"] in self._values:
            msg["value"], msg["done"] = self._values[msg["name"]], True


def replay_values(fn: Callable[..., Any], values: Mapping[str, torch.Tensor]) -> Any:
    """Runs ``fn`` with given values at its latent sites.

    ``pyro.poutine.replay`` does the same from a trace, and replaces each site's ``infer`` too.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> replay_values(model, {"z": torch.tensor(3.0)})()
        tensor(3.)
    """
    return ReplayValuesMessenger(values)(fn)


class _Stop(Exception):
    """All sites asked for have been drawn."""


class StopAfterMessenger(Messenger):
    """The handler behind :func:`stop_after`."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._missing = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._missing:
            self._missing.remove(msg["name"])
            if not self._missing:
                raise _Stop


@contextmanager
def stop_after(names: Collection[str]) -> Iterator[None]:
    """Ends a program inside the block once it has drawn all these sites, not at all if none.

    A trace has to be opened outside the block, to see the last of them. Decoders behind latents
    need not run where only the latents are wanted.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0))
        >>> with poutine.trace() as tracer, stop_after(["z"]):
        ...     model()
        >>> list(tracer.trace.nodes)
        ['z']
    """
    try:
        with StopAfterMessenger(names):
            yield
    except _Stop:
        pass


class ScaleKLMessenger(Messenger):
    """The handler behind :func:`scale_kl`."""

    def __init__(self, scale: Weight) -> None:
        super().__init__()
        self.scale = weight_of("scale_kl", "scale", scale)

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg):
            # Not poutine.scale: that refuses the scale 0.
            msg["scale"] = msg["scale"] * self.scale

    def _pyro_post_sample(self, msg: Any) -> None:
        """Refuses a latent summed out in the model alone, where beta has no meaning.

        Its sum replaces the expectation under a guide, so there is no KL to scale.
        """
        if not is_latent(msg) or msg["infer"].get("_enumerate_dim") is None:
            return
        if any(isinstance(handler, Evaluating) for handler in _PYRO_STACK):
            return
        # TraceEnum_ELBO replays a guide too, on a trace that ends where it got to.
        guides = [
            handler.trace
            for handler in _PYRO_STACK
            if isinstance(handler, ReplayMessenger)
            and handler.trace is not None
            and "_RETURN" in handler.trace
        ]
        in_guide = any(msg["name"] in trace for trace in guides)
        if guides and not in_guide and float(self.scale) != 1.0:
            raise ValueError(
                f"scale_kl: expected a guide distribution for site '{msg['name']}', got a site "
                "that is enumerated in the model alone, where no KL exists to scale. "
                f"Sample '{msg['name']}' in the guide with infer={{'enumerate': 'parallel'}}."
            )


def scale_kl(fn: Callable[..., Any] | None = None, scale: Weight | None = None) -> Any:
    r"""Multiplies the log-probability of every latent site by ``scale``.

    Around model *and* guide this is the beta-VAE objective, whichever ELBO evaluates it:

    .. math:: E_q[\log p(x \mid z)] - \beta\, KL(q(z \mid x) \,\|\, p(z))

    Wrap both sides: on one side only, ``Trace_ELBO`` and ``TraceMeanField_ELBO`` disagree.
    Observed sites, ``pyro.factor``, plates and masks are left alone. Training weights are not
    probabilities: evaluation ignores them. Apply ``poutine.condition`` inside
    (``scale_kl(poutine.condition(model, data), beta)``), so that a conditioned site is seen as
    observed. Like Pyro's own handlers it is a wrapper, a decorator and a context manager.

    Args:
        fn: A model or guide.
        scale: beta >= 0; a float, a 0-d tensor or a schedule, whose tensor is read at each run.

    Returns:
        The wrapped ``fn``, or the handler when ``fn`` is not given.

    Raises:
        TypeError: If ``scale`` is missing or not a number, tensor or schedule.
        ValueError: If ``scale`` is negative, not finite or not 0-d; while running, if a latent
            is enumerated in the model alone and ``scale`` is not 1.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def guide():
        ...     return pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> trace = poutine.trace(scale_kl(guide, 4.0)).get_trace()
        >>> trace.compute_log_prob()
        >>> z = trace.nodes["z"]
        >>> bool(z["log_prob"] == 4.0 * z["unscaled_log_prob"])
        True

    References:
        Higgins et al. (2017), beta-VAE: Learning basic visual concepts with a constrained
        variational framework, https://openreview.net/forum?id=Sy2fzU9gl
    """
    if fn is not None and not callable(fn):
        raise TypeError(
            f"scale_kl: expected a model or guide first, got {type(fn).__name__}. "
            "As a decorator or context manager write scale_kl(scale=0.5)."
        )
    if scale is None:
        raise TypeError("scale_kl: expected a scale, got None. Call scale_kl(fn, 0.5).")
    handler = ScaleKLMessenger(scale)
    return handler if fn is None else handler(fn)
