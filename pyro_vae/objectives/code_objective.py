"""The codes that a guide gives a batch, as objectives about their distribution see them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pyro_vae.dependence import dependent_latents
from pyro_vae.objectives.objective import TermsObjective
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.scales import Scales
from pyro_vae.terms import Terms, data_plates_of
from pyro_vae.traces import Plate, Site, is_latent, mask_of, masks_elements, sites_of

__all__ = ["CodeObjective", "Codes", "require_fixed_by_data", "rows"]


class CodeObjective(TermsObjective):
    """Abstract: an objective about the distribution q(z) of the codes of a batch.

    The code of a datum is all latents of the guide in the one plate over the data, flattened
    and concatenated in the guide's order. Data that a mask leaves out at one of these sites
    have no code: they count in the ELBO only.

    Args:
        sites: Latents that make up the code; all in the data plate by default.
        num_particles: Samples from the guide.
        vectorize_particles: As for :class:`Objective`.
        retain_graph: As for :class:`Objective`.
    """

    def __init__(
        self,
        *,
        sites: Sequence[str] | None,
        num_particles: int,
        vectorize_particles: bool | None,
        retain_graph: bool | None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        if isinstance(sites, str) or (sites is not None and not sites):
            raise TypeError(
                f"{type(self).__name__}: expected sites to be a list of names of latents, got "
                f"{sites!r}. Pass sites=['z'], or leave it out for all latents."
            )
        self.sites = None if sites is None else tuple(sites)

    def _check_terms(self, pair: Pair, terms: Terms) -> None:
        where, run = type(self).__name__, Run.of(pair)
        plates = data_plates_of(run)
        if len(plates) != 1:
            raise ValueError(
                f"{where}: expected one plate over the data, in which all codes lie side by side, "
                f"got {sorted(p.name for p in plates)}. Flatten a grid of data to one dimension."
            )
        known = _sites_in_plate(run, terms.scales)
        _check_sites(self.sites, known, next(iter(plates)), where)
        for name in self.sites or known:
            _check_whole(run, name, terms, where)
        self._check_codes(self._codes([run], terms.scales), terms)

    def _check_codes(self, codes: "Codes", terms: Terms) -> None:
        """Raises where the objective cannot take the codes of a first batch."""

    def _codes(self, runs: list[Run], scales: Scales) -> "Codes":
        names = self.sites or tuple(_sites_in_plate(runs[0], scales))
        return Codes.of(runs, names, scales)


@dataclass(frozen=True)
class Codes:
    """The codes of a batch.

    Attributes:
        runs: Where they come from.
        names: The latents that make up a code.
        plate: The plate over the data.
        weights: How many data each row stands for, ``(batch,)``: 0 where it is masked out.
        is_masked: Whether a mask leaves out some rows.
    """

    runs: list[Run]
    names: tuple[str, ...]
    plate: Plate
    weights: torch.Tensor
    is_masked: bool

    @staticmethod
    def of(runs: list[Run], names: tuple[str, ...], scales: Scales) -> "Codes":
        """Finds plate and weights."""
        (plate,) = data_plates_of(runs[0])
        first: Site = runs[0].guide_trace.nodes[names[0]]
        like: torch.Tensor = first["value"]
        shape = [1] * runs[0].nesting
        shape[plate.dim] = plate.size
        weights = (like.new_ones(shape) * scales.of_data).reshape(plate.size)
        traces = runs[0].guide_trace, runs[0].model_trace
        sites: list[Site] = [trace.nodes[name] for trace in traces for name in names]
        masks = [(site, mask) for site in sites if (mask := mask_of(site)) is not None]
        for site, mask in masks:
            present = rows(runs[0].spread(mask, site), plate)
            weights = weights * present.all(2).all(0)
        return Codes(runs, names, plate, weights, bool(masks))

    def collect(
        self, of: Callable[[Site], torch.Tensor], role: str = "guide", *, event: bool = True
    ) -> torch.Tensor:
        """Something of every element of the codes, ``(num_particles, batch, D)``.

        Args:
            of: From a site to a tensor of its shape.
            role: Whose sites, "guide" or "model".
            event: Whether the tensor has the site's event dimensions; if not, D counts sites.
        """
        return torch.cat(
            [
                torch.cat([self._rows(run, name, of, role, event) for name in self.names], 2)
                for run in self.runs
            ]
        )

    def _rows(
        self, run: Run, name: str, of: Callable[[Site], torch.Tensor], role: str, event: bool
    ) -> torch.Tensor:
        site: Site = (run.guide_trace if role == "guide" else run.model_trace).nodes[name]
        event_dim = site["fn"].event_dim if event else 0
        return rows(run.spread(of(site), site, event_dim), self.plate, event_dim)

    @property
    def values(self) -> torch.Tensor:
        """The codes, ``(num_particles, batch, D)``."""
        return self.collect(lambda site: site["value"])

    @property
    def shares(self) -> torch.Tensor:
        """The weights as shares of their sum, ``(batch,)``; zeros if all rows are masked out."""
        return self.weights / self.weights.sum().clamp(min=torch.finfo(self.weights.dtype).tiny)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all data, 0-d, of values ``(num_particles, batch)`` averaged over particles."""
        return (values.mean(0) * self.weights).sum()


def rows(values: torch.Tensor, plate: Plate, event_dim: int = 0) -> torch.Tensor:
    """``(num, *plates, *event)`` as one row for every datum: ``(num, batch, D)``."""
    return values.unsqueeze(-1).movedim(plate.dim - event_dim - 1, 1).flatten(2)


def require_fixed_by_data(codes: Codes, where: str, fix: str) -> None:
    """Raises if the guide's distribution of a code depends on the value of another latent.

    Args:
        codes: The codes of a first execution.
        where: The objective, for the message.
        fix: What to do instead.
    """
    dependent = dependent_latents(codes.runs[0].guide, codes.runs[0].guide_trace)
    for name in codes.names:
        if name in dependent:
            raise ValueError(
                f"{where}: expected a guide whose q(z | x) at site '{name}' is fixed by the data, "
                "got a distribution that depends on the value of another latent, so that its "
                f"q(z | x) is no closed form. {fix}"
            )


def _sites_in_plate(run: Run, scales: Scales) -> list[str]:
    """Latents of the guide, auxiliary ones not among them, that lie in the plate over the data."""
    return [
        name
        for name, site in sites_of(run.guide_trace, is_latent).items()
        if name in run.model_trace
        and all(
            any(map(scales.is_data, run.plates(s))) for s in (site, run.model_trace.nodes[name])
        )
    ]


def _check_sites(sites: tuple[str, ...] | None, known: list[str], plate: Plate, where: str) -> None:
    if not known:
        raise ValueError(
            f"{where}: expected a latent in plate '{plate.name}', got none, so that the data have "
            "no codes. Sample one inside the plate, or train with Trace_ELBO."
        )
    for name in sites or ():
        if name not in known:
            raise ValueError(
                f"{where}: expected sites among the latents {known} in plate '{plate.name}', got "
                f"'{name}'. Use the names that the guide gives them."
            )


def _check_whole(run: Run, name: str, terms: Terms, where: str) -> None:
    if terms.kl[name].within != 1:
        raise ValueError(
            f"{where}: expected whole codes at site '{name}', got a subsample of their elements "
            f"along a plate. Subsample the data only, or leave '{name}' out of sites."
        )
    sites: list[Site] = [run.guide_trace.nodes[name], run.model_trace.nodes[name]]
    if any(map(masks_elements, sites)):
        raise ValueError(
            f"{where}: expected a mask over whole codes at site '{name}', got one over "
            "their dimensions. Apply .mask(...) after .to_event(...)."
        )
