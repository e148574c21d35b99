"""What a model is made of: its latents, their supports and plates, and which plate is the data's.

It is read from a few runs, without a trace of them; no network is made here.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_vae.checks import check_observations, explained, support_of
from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.structure_checks import (
    check_batch_shape,
    check_can_amortize,
    check_same_structure,
    check_shared,
    check_whole,
    choose_plate,
    plain_support,
    raise_per_row,
    raise_without_bijection,
)
from pyro_vae.traces import (
    Plate,
    Site,
    frames,
    is_latent,
    is_observed,
    mask_of,
    sites_of,
    without_hidden,
)

__all__ = ["DataPlate", "LatentSite", "ModelStructure", "Reading", "read_structure"]

# Runs with other random numbers: a second that happens to agree says little.
_NUM_RUNS = 3


@dataclass(frozen=True)
class DataPlate:
    """The plate over the data.

    Attributes:
        name: Its name.
        dim: Its negative dimension.
        size: How many rows one run has.
        full_size: How many rows there are; more than ``size`` under subsampling.
        rows: How a run comes by its rows: "all", "given" (``subsample=``) or "drawn"
            (``subsample_size=``).
    """

    name: str
    dim: int
    size: int
    full_size: int
    rows: Literal["all", "given", "drawn"]


@dataclass(frozen=True)
class LatentSite:
    """A continuous latent of a model.

    Attributes:
        name: Its name.
        plates: The plates around it.
        event_shape: Shape of one value.
        support: Where a value may lie, the same in all rows.
        unconstrained_shape: Shape of one value that ``biject_to(support)`` maps there.
        masked: Whether a mask hides some of its values.
    """

    name: str
    plates: frozenset[Plate]
    event_shape: torch.Size
    support: Any
    unconstrained_shape: torch.Size
    masked: bool


@dataclass(frozen=True)
class ModelStructure:
    """What a guide has to know of a model.

    Attributes:
        data: The plate over the data.
        local: The continuous latents inside it, in the model's order.
        shared: Those outside.
        enumerated: Discrete latents that an ELBO sums out.
        observed: The observed sites.
    """

    data: DataPlate
    local: dict[str, LatentSite]
    shared: dict[str, LatentSite]
    enumerated: tuple[str, ...]
    observed: tuple[str, ...]

    @property
    def nesting(self) -> int:
        """How many dimensions the plates around latents take."""
        sites = (*self.local.values(), *self.shared.values())
        return max(-plate.dim for site in sites for plate in site.plates)


@dataclass(frozen=True)
class Reading:
    """A structure, and what of the run it was read from belongs to its arguments alone.

    Attributes:
        structure: The structure.
        masks: Where values of masked local latents count: bool, in their batch dimensions.
        program: The model bound to its arguments, with the same rows of the data at every run.
        traces: The runs.
    """

    structure: ModelStructure
    masks: dict[str, torch.Tensor]
    program: Callable[[], Any]
    traces: list[poutine.Trace]


def read_structure(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    where: str,
    plate: str | None = None,
    rows: torch.Tensor | None = None,
    num_runs: int = _NUM_RUNS,
) -> Reading:
    """Runs a model some times, without effect on anything, and says what it is made of.

    Args:
        model: Any callable with Pyro statements.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: Who asks, for the messages.
        plate: Name of the plate over the data; needed where several may be it.
        rows: Indices of the rows of the data plate, where the model would draw them.
        num_runs: How many runs, each with other random numbers, are compared.

    Raises:
        ValueError: If the model has no latent, no data, or no plate around both; a discrete
            latent is not enumerated; a latent has no density, or a support that is not known,
            moves, or differs between rows; runs differ in their sites, shapes or plates.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(words):
        ...     with pyro.plate("texts", len(words)):
        ...         topic = pyro.sample("topic", dist.LogNormal(0.0, 1.0))
        ...         pyro.sample("words", dist.Poisson(topic), obs=words)
        >>> structure = read_structure(model, (torch.ones(5),), {}, where="me").structure
        >>> structure.data.name, structure.local["topic"].support
        ('texts', GreaterThan(lower_bound=0.0))
    """
    kinds: dict[str, Any] = {}

    def run(fixed: poutine.Trace) -> poutine.Trace:
        with poutine.trace() as tracer, poutine.replay(trace=fixed), _Rows(kinds, plate, rows):
            model(*args, **kwargs)
        return without_hidden(tracer.trace, ())

    # Blocked, because a guide may be running in a trace, a plate of particles, or a replay.
    with (
        poutine.block(),
        same_random_numbers_again(),
        without_side_effects(model),
        explained(where, (args, kwargs)),
    ):
        first = run(poutine.Trace())
        fixed = poutine.Trace()
        for name, site in sites_of(first, site_is_subsample).items():
            fixed.add_node(name, **site)
        traces = [first, *(run(fixed) for _ in range(num_runs - 1))]
    check_observations(where, sites_of(first, is_observed))
    readings = [_read(trace, kinds, plate, where) for trace in traces]
    structure, masks = readings[0]
    for other, other_masks in readings[1:]:
        check_same_structure(structure, other, where)
        for name, mask in masks.items():
            if not torch.equal(mask, other_masks[name]):
                raise ValueError(
                    f"{where}: expected masks that follow from the data, got a mask on site "
                    f"'{name}' that differs from run to run. Compute it from the arguments."
                )

    def program() -> Any:
        with poutine.replay(trace=fixed):
            return model(*args, **kwargs)

    return Reading(structure, masks, program, traces)


class _Rows(Messenger):
    """Notes how plates come by their rows; gives one of them its rows."""

    def __init__(self, kinds: dict[str, Any], name: str | None, rows: torch.Tensor | None) -> None:
        super().__init__()
        self._kinds, self._name, self._rows = kinds, name, rows

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        given = msg["value"] is not None
        drawn = msg["fn"].subsample_size is not None
        self._kinds[msg["name"]] = "given" if given else "drawn" if drawn else "all"
        if self._rows is not None and msg["name"] == self._name and not given:
            msg["value"], msg["done"] = self._rows, True


def _read(
    trace: poutine.Trace, kinds: Mapping[str, Any], plate: str | None, where: str
) -> tuple[ModelStructure, dict[str, torch.Tensor]]:
    """What one run shows."""
    latents, observed = sites_of(trace, is_latent), sites_of(trace, is_observed)
    chosen = choose_plate(latents, observed, plate, where)
    enumerated = []
    local, shared = dict[str, LatentSite](), dict[str, LatentSite]()
    masks: dict[str, Any] = {}
    for name, site in latents.items():
        check_can_amortize(site, where)
        if site["fn"].support.is_discrete:
            enumerated.append(name)
            continue
        check_batch_shape(site, where)
        if chosen not in frames(site):
            check_shared(site, where)
            shared[name] = _latent(site, None, where)
            continue
        for other in frames(site) - {chosen}:
            check_whole(site, other, kinds.get(other.name, "all"), where)
        local[name] = _latent(site, chosen.dim, where)
        if local[name].masked:
            masks[name] = mask_of(site)
    if not local:
        raise ValueError(
            f"{where}: expected a continuous latent in plate '{chosen.name}', got none: there is "
            f"nothing to amortize beside {sorted(latents)}. Use one of Pyro's autoguides."
        )
    kind = kinds.get(chosen.name, "all")
    data = DataPlate(chosen.name, chosen.dim, chosen.size, chosen.full_size, kind)
    structure = ModelStructure(data, local, shared, tuple(enumerated), tuple(observed))
    return structure, masks


def _latent(site: Site, dim: int | None, where: str) -> LatentSite:
    """A latent, whose support is that of a single row of dimension ``dim``."""
    fn, name = site["fn"], site["name"]
    whole: Any = plain_support(support_of(fn))
    try:
        biject_to(whole)
    except NotImplementedError as err:
        raise_without_bijection(name, whole, where, err)
    support = _of_a_row(whole, fn.event_dim, dim, name, where)
    shape = biject_to(_of_one_value(support, fn.event_dim)).inverse_shape(fn.event_shape)
    masked, shape = mask_of(site) is not None, torch.Size(shape)
    return LatentSite(name, frames(site), fn.event_shape, support, shape, masked)


def _of_a_row(support: Any, event_dim: int, dim: int | None, name: str, where: str) -> Any:
    """A support whose numbers have one row only, and one value where all of a plate are equal."""

    def reduced(value: torch.Tensor) -> torch.Tensor:
        for axis in range(-value.dim(), -event_dim):
            first = value.narrow(axis, 0, 1)
            if bool((value == first).all()):
                value = first
            elif dim is not None and axis == dim - event_dim:
                raise_per_row(name, support, where)
        while value.dim() > event_dim and value.shape[0] == 1:
            value = value[0]
        return value.clone()

    return _with_numbers(support, reduced)


def _of_one_value(support: Any, event_dim: int) -> Any:
    """A support whose numbers are those of the first value of all plates."""

    def first(value: torch.Tensor) -> torch.Tensor:
        while value.dim() > event_dim:
            value = value[0]
        return value

    return _with_numbers(support, first)


def _with_numbers(support: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A support with its tensors changed."""
    result = copy(support)
    for key, value in vars(support).items():
        if isinstance(value, Constraint):
            setattr(result, key, _with_numbers(value, change))
        elif isinstance(value, torch.Tensor):
            setattr(result, key, change(value.detach()))
    return result
