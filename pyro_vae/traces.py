"""What the trace of a program says: latents, observations, data plates.

Nothing here depends on the names a program gives its sites and plates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.util import site_is_subsample

__all__ = [
    "DataPlates",
    "Plate",
    "Site",
    "frames",
    "is_latent",
    "is_observed",
    "is_point_mass",
    "is_random",
    "layers",
    "mask_of",
    "masked",
    "masks_elements",
    "plates_over_data",
    "site_log_prob",
    "sites_of",
    "subsampling",
    "without_hidden",
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


def layers(fn: Any) -> list[Any]:
    """A distribution and those it wraps, the innermost last."""
    result = [fn]
    while hasattr(result[-1], "base_dist"):
        result.append(result[-1].base_dist)
    return result


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a Delta, perhaps reshaped or masked."""
    return isinstance(layers(fn)[-1], Delta)


def sites_of(trace: poutine.Trace, kind: Any) -> dict[str, Site]:
    """The sites of ``trace`` for which ``kind`` holds, in the order of execution."""
    return {name: site for name, site in trace.nodes.items() if kind(site)}


def without_hidden(trace: poutine.Trace, keep: Iterable[str]) -> poutine.Trace:
    """A model's trace without latents that a mask hides everywhere, but for those to keep.

    They are drawn for their own sake, as a modality that is to be generated: they have no part
    in the density, and a guide needs no site for them.
    """
    kept = set(keep)
    result = trace.copy()
    for name, site in sites_of(trace, is_latent).items():
        if site["mask"] is False and name not in kept:
            result.remove_node(name)
    return result


def site_log_prob(site: Site) -> torch.Tensor:
    """Log-density of a site in nats, batch shape kept: masks applied, scales ignored.

    A mask says that a value was not observed; a scale is a weight of training.
    """
    known = site.get("unscaled_log_prob")  # As Pyro's traces name it.
    if known is not None:
        return masked(known, site["mask"])
    log_prob: torch.Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return masked(log_prob, site["mask"])


def mask_of(site: Site) -> torch.Tensor | None:
    """Where the masks around a site and those in its distribution let a value through.

    Of a mask over the elements of an event, some that it lets through are enough.

    Returns:
        bool, in the site's batch dimensions or fewer; ``None`` where nothing is masked.
    """
    masks = [site["mask"]]
    for fn in layers(site["fn"]):
        if isinstance(fn, MaskedDistribution):
            mask: torch.Tensor | bool = fn._mask
            within = site["fn"].event_dim - fn.event_dim
            if isinstance(mask, torch.Tensor) and within and mask.dim():
                mask = mask.flatten(-min(within, mask.dim())).any(-1)
            masks.append(mask)
    device = getattr(site["value"], "device", None)
    tensors = [
        torch.as_tensor(mask, device=device)
        for mask in masks
        if mask is not None and mask is not True
    ]
    return reduce(torch.logical_and, tensors) if tensors else None


def masks_elements(site: Site) -> bool:
    """Whether the distribution of a site has a mask over the elements of its events."""
    fn = site["fn"]
    return any(
        isinstance(f, MaskedDistribution) and f.event_dim != fn.event_dim for f in layers(fn)
    )


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


def subsampling(plates: Iterable[Plate]) -> float:
    """By how much a subsample within these plates is scaled up."""
    return math.prod(plate.full_size / plate.size for plate in plates)


def plates_over_data(
    around: Iterable[frozenset[Plate]], observed: Iterable[frozenset[Plate]]
) -> frozenset[Plate]:
    """The plates over the data: of those around observed sites, the ones all local sites share.

    A plate around no observed site, such as one over the components of a mixture, holds no data.

    Args:
        around: The plates around each random site.
        observed: Those around each observed site.
    """
    of_data = frozenset[Plate]().union(*observed)
    local = [plates & of_data for plates in around if plates & of_data]
    return frozenset.intersection(*local) if local else frozenset()


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
            _raise_outside(sites, around, where)
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


def _raise_outside(sites: dict[str, Site], around: dict[str, frozenset[Plate]], where: str) -> None:
    plates = [f for frame_set in around.values() for f in frame_set]
    if not plates:
        raise ValueError(
            f"{where}: expected sample sites inside a plate over the data, got no vectorised "
            f"plate around sites {list(around)}. Put them in `with pyro.plate('data', len(x)):`."
        )
    most = max(plates, key=plates.count)
    name = next(name for name, frame_set in around.items() if most not in frame_set)
    if sites[name]["infer"].get("is_auxiliary"):
        fix = "This guide couples all rows: use an amortized guide, or AutoNormal."
    elif any(f.dim == most.dim for f in around[name]):
        others = [f.name for f in around[name] if f.dim == most.dim]
        fix = f"It stands in a plate of its own, '{others[0]}': use one plate for both."
    else:
        fix = (
            "Move it inside, or fix its value in model and guide: "
            f"pyro.poutine.block(pyro.poutine.condition(model, data={{'{name}': value}}), "
            f"hide=['{name}'])."
        )
    raise ValueError(
        f"{where}: expected every sample site inside plate '{most.name}', got site '{name}' "
        "outside it, so that the data are not independent given the parameters and no value per "
        f"datum exists. {fix}"
    )
