"""What must hold of a model, a guide and a grid for quadrature over one latent."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from pyro_vae.checks import support_of
from pyro_vae.evaluation.grids import Grid
from pyro_vae.pairs import Pair
from pyro_vae.traces import DataPlates, Site, is_point_mass

__all__ = [
    "check_converged",
    "check_densities",
    "check_grid",
    "check_grid_in_support",
    "check_guide_sites",
    "check_scalar",
    "check_tolerance",
    "latent_of",
]


def check_tolerance(where: str, tolerance: float) -> None:
    """Raises unless ``tolerance`` is positive."""
    if not tolerance > 0:
        raise ValueError(
            f"{where}: expected tolerance > 0, got {tolerance}. It is an error in nats, for "
            "instance 1e-4."
        )


def check_grid(where: str, grid: Any) -> None:
    """Raises unless ``grid`` is a float vector in ascending order."""
    if not isinstance(grid, torch.Tensor) or not grid.is_floating_point():
        got = grid.dtype if isinstance(grid, torch.Tensor) else type(grid).__name__
        raise TypeError(
            f"{where}: expected grid to be a float tensor, got {got}. Pass for instance "
            "torch.linspace(-5.0, 5.0, 501)."
        )
    if grid.dim() != 1 or len(grid) < 5:
        raise ValueError(
            f"{where}: expected grid of shape (num,) with at least 5 points, got shape "
            f"{tuple(grid.shape)}. All data share it: torch.linspace(-5.0, 5.0, 501)."
        )
    if not grid.isfinite().all() or not (grid.diff() > 0).all():
        raise ValueError(
            f"{where}: expected finite points in ascending order in grid, each once, got others. "
            "Use grid.unique()."
        )


def check_grid_in_support(
    where: str, site: str, grid: torch.Tensor, bounds: tuple[float, float]
) -> None:
    """Raises unless the points, in the dtype of the latent, are distinct and in its support."""
    first, last = float(grid[0]), float(grid[-1])
    if first < bounds[0] or last > bounds[1]:
        raise ValueError(
            f"{where}: expected grid in the support of site '{site}', from {bounds[0]:g} to "
            f"{bounds[1]:g}, got points from {first:g} to {last:g}. Leave the others out."
        )
    if not (grid.diff() > 0).all():
        raise ValueError(
            f"{where}: expected points of grid that the dtype of site '{site}' tells apart, got "
            "some that it rounds to the same number. Use fewer points, or torch.float64."
        )


def latent_of(pair: Pair, where: str) -> Site:
    """The only continuous latent of a model.

    Args:
        pair: The model with its own prior as guide.
        where: The function that asks, for the messages.

    Raises:
        ValueError: If there is none, or several, or a discrete one that cannot be summed out.
    """
    sites = {n: s for n, s in pair.guide_sites.items() if not is_point_mass(s["fn"])}
    discrete = [n for n, s in sites.items() if getattr(support_of(s["fn"]), "is_discrete", False)]
    if discrete:
        raise ValueError(
            f"{where}: expected latents that are continuous or can be summed out, got the "
            f"discrete site '{discrete[0]}' whose values cannot be listed. Use "
            "importance_weighted_log_likelihood."
        )
    if not sites and pair.enumerated:
        raise ValueError(
            f"{where}: expected one continuous latent, got the discrete {list(pair.enumerated)} "
            "alone. Sum it out with importance_weighted_log_likelihood and a guide that samples "
            "nothing, which is exact."
        )
    if len(sites) != 1:
        got = f"the latents {list(sites)}" if sites else "none"
        raise ValueError(
            f"{where}: expected one continuous latent, got {got}. Integrals over several are for "
            "importance_weighted_log_likelihood; without any, a trace of the model says log p(x)."
        )
    return next(iter(sites.values()))


def check_scalar(where: str, site: Site, plates: DataPlates) -> None:
    """Raises unless a latent is one number for each datum."""
    size = site["value"].numel() / math.prod(plates.sizes)
    if size != 1:
        raise ValueError(
            f"{where}: expected one number for each datum at site '{site['name']}', got "
            f"{size:g}: values of shape {tuple(site['value'].shape)} for data of shape "
            f"{plates.sizes}. Use importance_weighted_log_likelihood for codes of several numbers."
        )


def check_guide_sites(pair: Pair, name: str, where: str) -> None:
    """Raises unless a guide samples the site ``name`` and nothing else."""
    others = [
        other
        for other, site in pair.guide_sites.items()
        if other != name and not is_point_mass(site["fn"])
    ]
    if others:
        raise ValueError(
            f"{where}: expected a guide that samples site '{name}' alone, got '{others[0]}' as "
            "well. Leave discrete latents to the sum over their values; a guide with auxiliary "
            "sites has no density that could be written down."
        )


def check_densities(where: str, what: str, z: torch.Tensor, log_density: torch.Tensor) -> None:
    """Raises where a log-density is NaN or infinitely large."""
    wrong = log_density.isnan() | (log_density == torch.inf)
    if wrong.any():
        index = wrong.nonzero()[0]
        raise ValueError(
            f"{where}: expected finite log-densities, got {float(log_density[tuple(index)])} as "
            f"{what} at z = {float(z[index[0]]):g}. Look at the parameters and data that the sites "
            "depend on there, or leave such points out of grid=."
        )


def check_converged(
    where: str, grid: Grid, errors: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Raises where an estimated error is above ``tolerance``.

    Args:
        where: The function that asks.
        grid: The grid.
        errors: Nats, ``(*batch,)``: of rows that are "impossible" for every z, which is infinite;
            from what may lie "outside" the grid; "between" its points;
            from a "guide" whose density the grid does not hold, and what the "tail" of the
            integrand of the ELBO may have beyond it.
        tolerance: Nats.
    """
    first, last, num = float(grid.points[0]), float(grid.points[-1]), len(grid.points)
    of = f"a grid of {num} points from {first:g} to {last:g}"
    for what, error in errors.items():
        largest = float(error.nan_to_num(torch.inf, torch.inf).max())
        if largest <= tolerance:
            continue
        if what == "impossible":
            num_rows = int((error > 0).sum())
            raise ValueError(
                f"{where}: expected data that are possible for some value of the latent, got "
                f"log p(x) = -inf in {num_rows} of {error.numel()} rows with {of}. Check that the "
                "data are in the likelihood's support, or pass a grid=... where they have a "
                "density."
            )
        if what == "outside":
            raise ValueError(
                f"{where}: expected a grid that holds all of p(x, z), got {of} that may lack "
                f"{largest:.2g} nats of it in some row. Pass a grid=... that is wide enough."
            )
        if what == "guide":
            raise ValueError(
                f"{where}: expected a grid that holds all of the guide's density, got {of} on "
                f"which its integral is off by {largest:.2g}. Pass a grid=... that is wider, or "
                "finer, or more num_points."
            )
        if what == "tail":
            raise ValueError(
                f"{where}: expected a guide whose tail adds nothing to the ELBO, got {of} beyond "
                f"which it may add {largest:.2g} nats in some row. If the guide's tails are much "
                "heavier than the prior's the ELBO may be -inf: choose lighter ones; otherwise "
                "pass a wider grid=..., or a larger tolerance."
            )
        raise ValueError(
            f"{where}: expected an error of at most {tolerance:g} nats, got an estimate of "
            f"{largest:.2g} with {of}. Pass a finer grid=..., or more num_points, or a larger "
            "tolerance."
        )
