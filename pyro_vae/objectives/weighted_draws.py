"""The particles of an importance-weighted bound: log-densities, and gradients along samples."""

from dataclasses import dataclass

import torch

from pyro_vae.runs import Run
from pyro_vae.scales import Scales
from pyro_vae.traces import Plate, Site, is_random, site_log_prob, sites_of

__all__ = ["WeightedDraws"]


def _refuse_shared(
    of_model: dict[str, Site], of_guide: dict[str, Site], of_data: frozenset[Plate]
) -> None:
    """Raises if a site lies outside a subsampled plate, or a subsampled plate within a datum."""
    dims = {plate.dim for plate in of_data}
    # Loops over a plate count as well; the guide may call its plates by other names.
    inside = [(name, {f.name for f in site["cond_indep_stack"]}) for name, site in of_model.items()]
    for name, site in of_guide.items():
        stack = site["cond_indep_stack"]
        inside.append((name, {key for f in stack for key in (f.name, (f.dim, f.size))}))
    for plate in {f for site in of_model.values() for f in site["cond_indep_stack"]}:
        if plate.full_size in (None, plate.size) or plate.dim in dims:
            continue
        outside = [
            name for name, keys in inside if not keys & {plate.name, (plate.dim, plate.size)}
        ]
        if outside:
            raise ValueError(
                f"TraceIWAE_ELBO: expected every random site inside the subsampled plate "
                f"'{plate.name}', got site '{outside[0]}' outside it: a weight that its rows share "
                "cannot be estimated from a subsample. Give all rows at once, or train with "
                "Trace_ELBO."
            )


@dataclass(frozen=True)
class WeightedDraws:
    """All particles' log-densities, ``(num, *plates)`` with a 1 for all plates but the data's.

    Attributes:
        runs: Where they come from.
        scales: Weights of data and sites.
        log_p: Of the model.
        log_q: Of the guide.
        score: Of the guide's sites without reparameterised samples, if there are any.
    """

    runs: list[Run]
    scales: Scales
    log_p: torch.Tensor
    log_q: torch.Tensor
    score: torch.Tensor | None

    @staticmethod
    def of(runs: list[Run]) -> "WeightedDraws":
        """Collects the densities of runs.

        Raises:
            ValueError: If a random site lies outside a subsampled plate.
        """
        first = runs[0]
        of_model = sites_of(first.model_trace, is_random)
        of_guide = sites_of(first.guide_trace, is_random)
        # The guide may call the plates of the model by other names.
        in_guide = [{(p.dim, p.size) for p in first.plates(s)} for s in of_guide.values()]
        of_data = frozenset(
            plate
            for plate in frozenset.intersection(*map(first.plates, of_model.values()))
            if all((plate.dim, plate.size) in plates for plates in in_guide)
        )
        _refuse_shared(of_model, of_guide, of_data)
        scales = Scales(first, of_data)
        scored = [n for n, s in of_guide.items() if not _has_path(s)]
        return WeightedDraws(
            runs,
            scales,
            torch.cat([_log_density(run, "model", scales, list(of_model)) for run in runs]),
            torch.cat([_log_density(run, "guide", scales, list(of_guide)) for run in runs]),
            torch.cat([_log_density(run, "guide", scales, scored, weighted=False) for run in runs])
            if scored
            else None,
        )

    def sum(self, coefficient: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Weighted sum over particles and data, each datum with its own weight besides."""
        # A particle without weight has a density of 0, whose logarithm is infinite.
        weighted = torch.where(coefficient == 0, coefficient, coefficient * values)
        return self.scales.total(weighted.sum(0))

    def weigh(self, weight: torch.Tensor) -> None:
        """Multiplies the gradients that come back from the model into the samples."""
        start = 0
        for run in self.runs:
            if run.links is not None:
                run.links.valve.weight = weight[start : start + run.num_particles]
            start += run.num_particles

    def along_samples(
        self, coefficient: torch.Tensor, values: torch.Tensor, *, to_model: bool = False
    ) -> torch.Tensor:
        """A number with that gradient of ``sum`` which flows through the samples.

        Args:
            coefficient: Weights of the particles, ``(num, *plates)``.
            values: Log-densities, ``(num, *plates)``.
            to_model: Whether they are the model's, which sees the samples behind the joints.
        """
        links = [run.links for run in self.runs if run.links is not None]
        pairs = [
            (joint, link.upstream[name])
            for link in links
            for name, joint in (link.downstream if to_model else link.upstream).items()
        ]
        total = values.new_zeros(())
        if not pairs or not values.requires_grad:  # A point mass has no density to follow.
            return total
        for link in links:
            link.valve.closed = True
        grads = torch.autograd.grad(
            self.sum(coefficient, values),
            [joint for joint, _ in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for link in links:
            link.valve.closed = False
        for grad, (_, sample) in zip(grads, pairs, strict=True):
            if grad is not None:
                total = total + (grad.detach() * sample).sum()
        return total


def _has_path(site: Site) -> bool:
    return bool(site["fn"].has_rsample)


def _log_density(
    run: Run, role: str, scales: Scales, names: list[str], *, weighted: bool = True
) -> torch.Tensor:
    """Log-density of some sites, ``(num, *plates)`` with a 1 for all plates but the data's."""
    trace = run.model_trace if role == "model" else run.guide_trace
    total = None
    for name in names:
        site = trace.nodes[name]
        values = run.spread(_log_prob(site), site)
        if weighted:
            values = values * scales.of_site(site)
        others = [d for d in range(-run.nesting, 0) if d not in scales.dims]
        values = values.sum(others, keepdim=True) if others else values
        total = values if total is None else total + values
    if total is None:  # A guide without latents.
        like: torch.Tensor = next(iter(sites_of(run.model_trace, is_random).values()))["value"]
        zeros = torch.zeros(run.num_particles, *(1,) * run.nesting, device=like.device)
        return zeros.to(like.dtype) if like.is_floating_point() else zeros
    return total


def _log_prob(site: Site) -> torch.Tensor:
    try:
        return site_log_prob(site)
    except KeyError as err:  # Pyro's flows without an inverse know the density of a sample alone.
        raise ValueError(
            f"TraceIWAE_ELBO: expected a density at any value of site '{site['name']}', got a flow "
            "that has no inverse in Pyro. Use one that has, such as affine_autoregressive, or "
            "estimator='standard' with partial=False."
        ) from err
