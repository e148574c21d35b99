"""One execution of a model and its guide, checked: that they belong together and fit the data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_vae.checks import check_arguments, check_observations, explained
from pyro_vae.traces import (
    DataPlates,
    Plate,
    Site,
    frames,
    is_latent,
    is_observed,
    is_point_mass,
    is_random,
    mask_of,
    sites_of,
    without_hidden,
)

__all__ = ["Pair", "common_plates", "data_plates", "refuse_point_mass", "trace_pair"]


@dataclass(frozen=True)
class Pair:
    """One execution of guide and model, checked.

    Attributes:
        guide_trace: Trace of the guide.
        model_trace: Trace of the model, replayed on the guide's values.
        enumerated: Names of the model's discrete latents that the guide leaves out.
        model: The model, bound to its arguments.
        guide: The guide, bound to its arguments.
    """

    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    enumerated: tuple[str, ...]
    model: Callable[[], Any]
    guide: Callable[[], Any]

    @property
    def guide_sites(self) -> dict[str, Site]:
        """The guide's random sites, auxiliary ones too."""
        return sites_of(self.guide_trace, is_latent)

    @property
    def latent_shapes(self) -> dict[str, torch.Size]:
        """The shape of every latent, of both programs, where its author drew it."""
        traces = (self.model_trace, self.guide_trace)
        return {n: s["value"].shape for t in traces for n, s in sites_of(t, is_latent).items()}

    @property
    def device(self) -> torch.device:
        """Where the data and latents live."""
        sites = sites_of(self.model_trace, is_random).values()
        values = [s["value"] for s in sites if isinstance(s["value"], torch.Tensor)]
        return values[0].device if values else torch.device("cpu")

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates of model and guide take."""
        traces = (self.guide_trace, self.model_trace)
        nodes = [site for trace in traces for site in trace.nodes.values()]
        dims = [-f.dim for site in nodes if site["type"] == "sample" for f in frames(site)]
        return max(dims, default=0)


def trace_pair(model: Any, guide: Any, args: Any, kwargs: Any, where: str) -> Pair:
    """Runs guide and model once and checks that they belong together and fit the data.

    Args:
        model: Any callable with Pyro statements.
        guide: Any callable with the same signature.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        where: The function that asks, for the messages.

    Raises:
        ValueError: An empty batch; data that are not finite or outside the support; a shape
            that does not fit its plate; latents on one side only.
    """
    check_arguments(where, (args, kwargs))
    with explained(where, (args, kwargs)):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        latents = guide_trace.copy()
        for name in sites_of(guide_trace, site_is_subsample):
            latents.remove_node(name)  # Each side has its own plates, to be compared later.
        replayed = poutine.replay(model, trace=latents)
        try:
            with _CompareShapes(set(latents.nodes), where), _SameRows(guide_trace):
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        except _ShapeMismatch as err:
            raise ValueError(str(err)) from None
    model_trace = without_hidden(model_trace, guide_trace.nodes)
    for trace in (guide_trace, model_trace):
        for name, site in sites_of(trace, is_random).items():
            _check_batch_shape(name, site, where)
    enumerated = _check_latents(guide_trace, model_trace, where)
    check_observations(where, sites_of(model_trace, is_observed))
    bound_model, bound_guide = (partial(program, *args, **kwargs) for program in (model, guide))
    return Pair(guide_trace, model_trace, enumerated, bound_model, bound_guide)


def common_plates(
    model: Iterable[frozenset[Plate]], guide: Iterable[frozenset[Plate]]
) -> DataPlates:
    """The plates around every site of model and guide, which may be none.

    Plates of model and guide need not share names: they are matched by dimension and size.

    Args:
        model: The plates around each site of the model.
        guide: The same for the guide.
    """
    model = list(model)
    around = [{(f.dim, f.size) for f in plates} for plates in (*model, *guide)]
    common = set.intersection(*around) if around else set()
    found = {f.dim: f for plates in model for f in plates if (f.dim, f.size) in common}
    ordered = [found[dim] for dim in sorted(found)]
    return DataPlates(
        names=tuple(f.name for f in ordered),
        dims=tuple(f.dim for f in ordered),
        sizes=tuple(f.size for f in ordered),
    )


def data_plates(pair: Pair, where: str) -> DataPlates:
    """Finds the plates common to all random sites of a model and its guide.

    Raises:
        ValueError: If a site lies outside, or if the two disagree about plates or masks.
    """
    _check_masks(pair, where)
    plates = DataPlates.of(sites_of(pair.model_trace, is_random), where)
    if not pair.guide_sites:
        return plates
    # Plates of model and guide need not share names: they are matched by dimension.
    of_guide = DataPlates.of(pair.guide_sites, where)
    common = [i for i, dim in enumerate(plates.dims) if dim in of_guide.dims]
    if not common:
        raise ValueError(
            f"{where}: expected model and guide to share a data plate, got dimension "
            f"{plates.dims} in the model and {of_guide.dims} in the guide. "
            "Give both plates the same dim."
        )
    return DataPlates(
        names=tuple(plates.names[i] for i in common),
        dims=tuple(plates.dims[i] for i in common),
        sizes=tuple(plates.sizes[i] for i in common),
    )


def refuse_point_mass(pair: Pair, where: str) -> None:
    """A guide of point masses has no density: its "weights" bound nothing."""
    sites = pair.guide_sites
    if any(site["infer"].get("is_auxiliary") for site in sites.values()):
        return  # A transformed auxiliary variable: the Delta carries its Jacobian.
    for name, site in sites.items():
        # A point mass on both sides is a transformation of other latents, not a latent.
        if is_point_mass(site["fn"]) and not is_point_mass(pair.model_trace.nodes[name]["fn"]):
            raise ValueError(
                f"{where}: expected a guide with a density, got a point mass (Delta) at site "
                f"'{name}'. Use a distribution with the support of the posterior."
            )


def _check_latents(guide: poutine.Trace, model: poutine.Trace, where: str) -> tuple[str, ...]:
    """Compares the latents of both sides; returns those to be summed out in the model."""
    in_guide, in_model = sites_of(guide, is_latent), sites_of(model, is_latent)
    extra = [
        name
        for name, site in in_guide.items()
        if name not in in_model and not site["infer"].get("is_auxiliary")
    ]
    if extra:
        raise ValueError(
            f"{where}: expected the guide to sample the model's latents {list(in_model)}, got "
            f"site '{extra[0]}' that the model does not have. Rename it, or mark it "
            "infer={'is_auxiliary': True} if it is transformed into a latent."
        )
    missing = [name for name in in_model if name not in in_guide]
    for name in missing:
        if not getattr(in_model[name]["fn"], "has_enumerate_support", False):
            raise ValueError(
                f"{where}: expected the guide to sample every latent of the model, got no site "
                f"'{name}' in the guide. Add pyro.sample('{name}', ...) to the guide."
            )
    if not sites_of(model, is_observed):
        raise ValueError(
            f"{where}: expected the model to observe data, got no observed site. "
            "Pass obs=x to pyro.sample, or use pyro.poutine.condition."
        )
    return tuple(missing)


class _ShapeMismatch(Exception):
    """Not a ``ValueError``: to those a trace appends a table of all shapes."""


class _SameRows(Messenger):
    """Gives a plate of the model the rows that the guide drew for one of the same name and size."""

    def __init__(self, guide_trace: poutine.Trace) -> None:
        super().__init__()
        self._drawn = sites_of(guide_trace, site_is_subsample)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        drawn = self._drawn.get(msg["name"])
        if drawn is None:
            return
        sizes = [(fn.size, fn.subsample_size) for fn in (msg["fn"], drawn["fn"])]
        if sizes[0] == sizes[1]:
            msg["value"], msg["done"] = drawn["value"], True


class _CompareShapes(Messenger):
    """Compares the guide's values with the model's sites before the model computes with them.

    Broadcasting would hide a code that is too narrow, or shared by rows that the model separates.
    """

    def __init__(self, names: set[str], where: str) -> None:
        super().__init__()
        self._names, self._where = names, where

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self._names or not is_latent(msg):
            return
        event_shape = tuple(msg["fn"].event_shape)
        nesting = max([len(msg["fn"].batch_shape), *(-f.dim for f in frames(msg))])
        batch_shape = [1] * nesting
        for frame in frames(msg):
            batch_shape[frame.dim] = frame.size
        actual = tuple(msg["value"].shape)
        wanted = (*batch_shape, *event_shape)
        rank = max(len(wanted), len(actual))
        if (1,) * (rank - len(actual)) + actual != (1,) * (rank - len(wanted)) + wanted:
            raise _ShapeMismatch(
                f"{self._where}: expected the guide to sample site '{msg['name']}' with shape "
                f"{wanted} as the model does, got {actual}. Give the guide's distribution the "
                f"plates and the event shape {event_shape} of the model's."
            )


def _check_masks(pair: Pair, where: str) -> None:
    """Masks over the plates, and alike on latents of both sides, whose densities are to cancel."""
    for trace in (pair.guide_trace, pair.model_trace):
        for name, site in sites_of(trace, is_random).items():
            _check_mask_shape(name, site, where)
    if sites_of(pair.guide_trace, is_observed):
        return  # A factor may hold the density of a masked site.
    model_sites = sites_of(pair.model_trace, is_latent)
    for name, site in pair.guide_sites.items():
        if name not in model_sites:
            continue
        masks = [mask_of(s) for s in (model_sites[name], site)]
        first, second = torch.broadcast_tensors(
            *(torch.tensor(True) if mask is None else mask.cpu() for mask in masks)
        )
        if not first.equal(second):
            raise ValueError(
                f"{where}: expected the same mask on latent site '{name}' in model and guide, got "
                "different ones, so that its two densities do not cancel. Mask both sides alike."
            )


def _check_batch_shape(name: str, site: Site, where: str) -> None:
    """Every batch dimension must belong to a plate, whether validation is on or not."""
    plated = {f.dim for f in frames(site)}
    shape = site["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in plated:
            raise ValueError(
                f"{where}: expected every batch dimension of site '{name}' to be a plate, got "
                f"batch shape {tuple(shape)} where dimension {dim} has no plate. Was "
                f"`.to_event(1)` forgotten? It declares the dimensions of one datum."
            )


def _check_mask_shape(name: str, site: Site, where: str) -> None:
    """A mask with more dimensions would count each datum several times."""
    plated, mask = {f.dim for f in frames(site)}, site["mask"]
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else ()
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in plated:
            raise ValueError(
                f"{where}: expected a mask over the plates around site '{name}', got one of shape "
                f"{shape} where dimension {dim} has no plate. It has one entry for a whole datum: "
                "write mask.all(-1) for one that has an entry for each of its elements."
            )
