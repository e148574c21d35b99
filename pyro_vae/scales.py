"""What the scales of a program mean: weights of the data, and factors of single sites."""

import math

import torch

from pyro_vae.runs import Run
from pyro_vae.traces import Plate, Site, is_latent, is_observed, sites_of, subsampling

__all__ = ["Scale", "Scales", "same_scale"]

Scale = float | torch.Tensor


class Scales:
    """Divides the scales of a program into one weight for each datum and the rest.

    The weight of a datum is that of its plates (subsampling) and of a ``poutine.scale`` around
    all observed sites. What is left belongs to single sites: the beta of ``scale_kl``, weights
    of single observations, and subsampled plates within a datum.

    Args:
        run: An execution of model and guide.
        plates: The plates over the data.

    Attributes:
        dims: Dimensions of those plates.
        of_data: Weight of each datum, a number or a tensor that broadcasts with the plates.
    """

    def __init__(self, run: Run, plates: frozenset[Plate]) -> None:
        self._run = run
        self.dims = frozenset(plate.dim for plate in plates)
        self._shape = {(plate.dim, plate.size) for plate in plates}
        kinds = (sites_of(run.model_trace, kind).values() for kind in (is_latent, is_observed))
        of_latents, of_observed = ({p.name for s in k for p in run.plates(s)} for k in kinds)
        self._elsewhere = of_latents - of_observed
        self._common = self._common_scale()
        self.of_data = self._common * subsampling(plates)

    def of_site(self, site: Site) -> Scale:
        """The rest of a site's scale: what it adds to the weight of its data."""
        plates = self._run.plates(site)
        around = frozenset(filter(self.is_data, plates))
        scale = site["scale"] / subsampling(around)
        # A site that all data share has no part in their weight.
        return scale / self._common if around or not self.dims else scale

    def is_data(self, plate: Plate) -> bool:
        """Whether a plate is over the data; the guide may call its own by another name.

        Plates that follow one another share a dimension, so that alone says nothing.
        """
        return (plate.dim, plate.size) in self._shape and plate.name not in self._elsewhere

    def within(self, site: Site) -> float:
        """The part of a site's scale that comes from subsampled plates within a datum."""
        return subsampling(frozenset(p for p in self._run.plates(site) if not self.is_data(p)))

    def total(self, per_datum: torch.Tensor) -> torch.Tensor:
        """Sum over all data of a quantity ``(*plates)`` with a 1 for every other plate."""
        return (per_datum * self.of_data).sum()

    def _common_scale(self) -> Scale:
        """The scale around all observed sites, that of their plates not counted."""
        first, *others = (
            site["scale"] / subsampling(self._run.plates(site))
            for site in sites_of(self._run.model_trace, is_observed).values()
        )
        shape = tuple(first.shape) if isinstance(first, torch.Tensor) else ()
        of_data = all(n == 1 or dim - len(shape) in self.dims for dim, n in enumerate(shape))
        return first if of_data and all(same_scale(first, other) for other in others) else 1.0


def same_scale(first: Scale, second: Scale) -> bool:
    """Whether two scales are the same number, or the same for every row."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        first, second = torch.as_tensor(first), torch.as_tensor(second)
        # Not torch.equal: that refuses a number on the CPU beside one on a GPU.
        return first.shape == second.shape and bool((first == second).all())
    return math.isclose(first, second)
