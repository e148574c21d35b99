"""What one execution of a model and its guide says: latents, observations, data plates.

Nothing here depends on the names a program gives its sites and plates.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.util import site_is_subsample

from pyro_vae.checks import check_arguments, check_observations, explained

__all__ = [
    "DataPlates",
    "Pair",
    "data_plates",
    "is_latent",
    "is_observed",
    "is_random",
    "trace_pair",
]

Site = Any
"""A Pyro message, as a trace stores it."""


def is_latent(site: Site) -> bool:
    """Whether a message is a random variable without an observed value."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_observed(site: Site) -> bool:
    """Whether a message scores data (``pyro.factor`` does, ``pyro.deterministic`` does not)."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not site["infer"].get("_deterministic", False)


def is_random(site: Site) -> bool:
    """Whether a message contributes to the joint density."""
    return is_latent(site) or is_observed(site)


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a Delta, perhaps reshaped or masked."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def sites_of(trace: poutine.Trace, kind: Any) -> dict[str, Site]:
    """The sites of ``trace`` for which ``kind`` holds, in the order of execution."""
    return {name: site for name, site in trace.nodes.items() if kind(site)}


def site_log_prob(site: Site) -> torch.Tensor:
    """Log-density of a site in nats, batch shape kept: masks applied, scales ignored.

    A mask says that a value was not observed; a scale is a weight of training.
    """
    log_prob: torch.Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return masked(log_prob, site["mask"])


def masked(log_prob: torch.Tensor, mask: torch.Tensor | bool | None) -> torch.Tensor:
    """``log_prob`` with zeros where ``mask`` is false."""
    if mask is None or mask is True:
        return log_prob
    if mask is False:
        return torch.zeros_like(log_prob)
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


class Plate(NamedTuple):
    """A vectorised plate around a site; ``full_size`` exceeds ``size`` under subsampling."""

    name: str
    dim: int
    size: int
    full_size: int


def frames(site: Site) -> frozenset[Plate]:
    """The vectorised plates around a site (sequential ones are loops, not dimensions)."""
    return frozenset(
        Plate(f.name, f.dim, f.size, f.full_size or f.size)
        for f in site["cond_indep_stack"]
        if f.vectorized
    )


@dataclass(frozen=True)
class DataPlates:
    """The plates shared by every random site: what "per datum" means for a program.

    Attributes:
        names: Plate names, outermost dimension first.
        dims: Their negative dimensions, in the same order.
        sizes: Their sizes: the shape of a per-datum quantity.
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(sites: dict[str, Site], where: str) -> "DataPlates":
        """Finds the plates common to ``sites``.

        Raises:
            ValueError: If some site lies outside the plate of the others.
        """
        around = {name: frames(site) for name, site in sites.items()}
        common = sorted(frozenset.intersection(*around.values()), key=lambda f: f.dim)
        if not common:
            _raise_outside(around, where)
        return DataPlates(
            names=tuple(f.name for f in common),
            dims=tuple(f.dim for f in common),
            sizes=tuple(f.size for f in common),
        )

    def sum_others(self, log_prob: torch.Tensor, leading: int = 0) -> torch.Tensor:
        """Sums every dimension that is not a data plate, in float64.

        Args:
            log_prob: Tensor whose plate dimensions count from the right.
            leading: How many particle dimensions stand on the left, kept as well.
        """
        keep = {dim % log_prob.dim() for dim in self.dims} | set(range(leading))
        others = [dim for dim in range(log_prob.dim()) if dim not in keep]
        log_prob = log_prob.to(torch.float64)
        return log_prob.sum(others) if others else log_prob


def _raise_outside(around: dict[str, frozenset[Plate]], where: str) -> None:
    plates = [f for frame_set in around.values() for f in frame_set]
    if not plates:
        raise ValueError(
            f"{where}: expected sample sites inside a plate over the data, got no vectorised "
            f"plate around sites {list(around)}. Put them in `with pyro.plate('data', len(x)):`."
        )
    most = max(plates, key=plates.count)
    outside = [name for name, frame_set in around.items() if most not in frame_set]
    raise ValueError(
        f"{where}: expected every sample site inside plate '{most.name}', got site "
        f"'{outside[0]}' outside it, so that the data are not independent given the parameters "
        "and no value per datum exists. Move it inside, or fix its value in model and guide: "
        f"pyro.poutine.block(pyro.poutine.condition(model, data={{'{outside[0]}': value}}), "
        f"hide=['{outside[0]}'])."
    )


@dataclass(frozen=True)
class Pair:
    """One execution of guide and model, checked.

    Attributes:
        guide_trace: Trace of the guide.
        model_trace: Trace of the model, replayed on the guide's values.
        enumerated: Names of the model's discrete latents that the guide leaves out.
    """

    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    enumerated: tuple[str, ...]

    @property
    def guide_sites(self) -> dict[str, Site]:
        """The guide's random sites, auxiliary ones too."""
        return sites_of(self.guide_trace, is_latent)

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
        model_trace = poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args, **kwargs)
    for trace in (guide_trace, model_trace):
        for name, site in sites_of(trace, is_random).items():
            _check_batch_shape(name, site, where)
    enumerated = _check_latents(guide_trace, model_trace, where)
    check_observations(where, sites_of(model_trace, is_observed))
    return Pair(guide_trace, model_trace, enumerated)


def data_plates(pair: Pair, where: str) -> DataPlates:
    """Finds the plates common to all random sites of a model and its guide.

    Raises:
        ValueError: If a site lies outside, or if the two disagree about the plates.
    """
    plates = DataPlates.of(sites_of(pair.model_trace, is_random), where)
    if not pair.guide_sites:
        return plates
    # Plates of model and guide need not share names: they are matched by dimension.
    of_guide = DataPlates.of(pair.guide_sites, where)
    sizes = dict(zip(of_guide.dims, of_guide.sizes, strict=True))
    common = [i for i, dim in enumerate(plates.dims) if dim in sizes]
    for i in common:
        if plates.sizes[i] != sizes[plates.dims[i]]:
            raise ValueError(
                f"{where}: expected plate '{plates.names[i]}' of the same size in model and "
                f"guide, got {plates.sizes[i]} and {sizes[plates.dims[i]]}. "
                "Pass both the same batch and plate dimension."
            )
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
