"""Exact marginals, posteriors and ELBOs of models with one scalar latent per datum."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pyro_vae.checks import check_at_least, refuse_subsampling
from pyro_vae.drawn_sites import unmasked
from pyro_vae.evaluation.grids import Coordinate, Grid, bounds_of
from pyro_vae.evaluation.quadrature_checks import (
    check_converged,
    check_grid,
    check_grid_in_support,
    check_guide_sites,
    check_tolerance,
)
from pyro_vae.evaluation.scalar_densities import (
    ScalarDensities,
    prior_pair,
    within_support,
)
from pyro_vae.isolation import without_side_effects
from pyro_vae.pairs import refuse_point_mass, trace_pair
from pyro_vae.traces import Site

__all__ = ["GridElbo", "GridPosterior", "quadrature", "quadrature_elbo"]

Errors = dict[str, torch.Tensor]
Result = TypeVar("Result")

_MOST_POINTS = 2**16 + 1


@dataclass(frozen=True)
class GridPosterior:
    r"""The joint density of every datum and its latent z on a grid, and what follows from it.

    Attributes:
        site: Name of the latent.
        grid: Values of z in ascending order, ``(num,)``, float64.
        weights: Of the quadrature rule, ``(num,)``: the integral of f is ``weights @ f``.
        log_joint: log p(x, z), nats, ``(num, batch)``.
        log_likelihood: log p(x), nats, ``(batch,)``.
        error: Estimate of its absolute error, nats, ``(batch,)``: the change when every second
            point is left out, which as a rule is far more than the error; what jumps between the
            points may cost; and what the ends of the grid may cut off. What no point shows is not
            in it: a mode, or a step up and down again, narrower than the spacing beside a wide
            mode. More points find it. The rounding of a model in float32 comes on top.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 2.0])
        >>> posterior = quadrature(model, x, grid=torch.linspace(-8, 8, 201))
        >>> q = dist.Normal(x / 2, 0.5**0.5).log_prob(posterior.grid.unsqueeze(-1))
        >>> bool((posterior.kl(q).abs() < 1e-5).all())  # q is the posterior
        True
    """

    site: str
    grid: torch.Tensor
    weights: torch.Tensor
    log_joint: torch.Tensor
    log_likelihood: torch.Tensor
    error: torch.Tensor

    @property
    def log_density(self) -> torch.Tensor:
        """Log-density log p(z | x) of the posterior on the grid, nats, ``(num, batch)``."""
        return self.log_joint - self.log_likelihood

    def elbo(self, log_q: torch.Tensor) -> torch.Tensor:
        """The ELBO of any density q(z | x) given by its values on the grid: nats, ``(batch,)``.

        It is for you to see that the grid is fine and wide enough for q:
        :func:`quadrature_elbo` checks that for a guide.

        Args:
            log_q: Its log-density, nats, ``(num, batch)``.

        Raises:
            ValueError: If ``log_q`` has another shape.
        """
        if log_q.shape != self.log_joint.shape:
            raise ValueError(
                f"GridPosterior.elbo: expected log_q of shape {tuple(self.log_joint.shape)}, got "
                f"{tuple(log_q.shape)}. Evaluate q at posterior.grid, for every datum."
            )
        return torch.tensordot(self.weights, _expected(log_q, self.log_joint - log_q), 1)

    def kl(self, log_q: torch.Tensor) -> torch.Tensor:
        """KL(q(z | x) || p(z | x)) likewise: nats, ``(batch,)``."""
        return self.log_likelihood - self.elbo(log_q)


@dataclass(frozen=True)
class GridElbo:
    """The ELBO of a guide without Monte-Carlo error, on the grid of a :class:`GridPosterior`.

    Attributes:
        posterior: Of the model, on a grid that suits the guide as well.
        log_guide: log q(z | x), nats, ``(num, batch)``.
        elbo: Lower bound on log p(x), nats, ``(batch,)``; -inf where the guide has mass that the
            model has not. In a row where a mask hides the latent, its densities are left out on
            both sides, as in an estimate by sampling: there q stands for the prior, and this is a
            bound on the logarithm of the integral of q(z | x) p(x | z).
        kl: KL(q(z | x) || p(z | x)), the gap of the bound, nats, ``(batch,)``; in a hidden row
            from q to the posterior under q as prior.
        error: Estimate of the absolute error of ``elbo``, nats, ``(batch,)``, as that of the
            posterior, and with what the tail of q log(p / q) may add beyond the grid.
    """

    posterior: GridPosterior
    log_guide: torch.Tensor
    elbo: torch.Tensor
    kl: torch.Tensor
    error: torch.Tensor


def quadrature(
    model: Callable[..., Any],
    *args: Any,
    grid: torch.Tensor | None = None,
    num_points: int = 1025,
    tolerance: float = 1e-4,
    **kwargs: Any,
) -> GridPosterior:
    r"""Computes log p(x) and p(z | x) of every datum of a model with one scalar latent.

    .. math:: \log p(x) = \log \int p(x, z)\, dz

    It needs no guide, and random numbers do not matter to it: an oracle for inference in nonlinear
    models. Other latents may be discrete; they are summed out. Evaluation only: modules run in
    eval mode, no gradient is kept, parameters are not touched, every scale (beta, subsampling) is
    ignored and every mask kept. In a row where a mask hides the latent, z has its prior density.

    Args:
        model: Any callable with Pyro statements whose sites share a plate over the data, and
            whose only continuous latent is a number for each datum, of event shape () or (1,).
        *args: One batch, as for ``svi.step``.
        grid: Values of z in ascending order, ``(num,)``, the same for all data; the rule is then
            the trapezoidal one. By default the grid is found: it covers what counts of p(x, z)
            for any datum, and has as many points as ``tolerance`` asks for, up to about 65,000.
        num_points: How many points that one has at first. More find a narrower mode beside a wide
            one.
        tolerance: Largest estimated error that is accepted, nats.
        **kwargs: Keyword arguments of the model.

    Returns:
        Density and likelihood in nats, float64. If sites share several plates their shape stands
        for ``batch``, outermost first.

    Raises:
        TypeError: If ``num_points`` is no integer or ``grid`` no float tensor.
        ValueError: If ``num_points`` is below 9, ``tolerance`` not positive, or ``grid`` not an
            ascending vector in the support; the data are empty, not finite or impossible for
            every z; there is not exactly one continuous latent, or it is not one
            number for each datum; a site lies outside the data plate; a log-density is not a
            number; the grid is too narrow or too coarse for ``tolerance``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         bias = pyro.sample("bias", dist.Beta(1.0, 1.0).to_event(0))
        ...         pyro.sample("x", dist.Binomial(10, bias), obs=x)
        >>> posterior = quadrature(model, torch.tensor([0.0, 3.0, 10.0]))
        >>> posterior.log_likelihood.exp()  # 1 / 11
        tensor([0.0909, 0.0909, 0.0909], dtype=torch.float64)

    References:
        Takahasi and Mori (1974), Double exponential formulas for numerical integration, for the
        default grid.
    """
    where = "quadrature"
    _check_settings(where, grid, num_points, tolerance)
    with without_side_effects(model):
        prior, site = prior_pair(within_support(model), args, kwargs, where)
        densities = ScalarDensities(prior, prior, site, where)

        def solve(points: Grid) -> tuple[GridPosterior, Errors]:
            return _posterior(points, densities.log_joint(points.points), site["name"])

        def counts(z: torch.Tensor) -> list[torch.Tensor]:
            return [densities.log_joint(z, strict=False)]

        return _solved(solve, counts, site, grid, num_points, tolerance, where)


def quadrature_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    grid: torch.Tensor | None = None,
    num_points: int = 1025,
    tolerance: float = 1e-4,
    **kwargs: Any,
) -> GridElbo:
    r"""Computes the ELBO of every datum, and KL(q(z | x) || p(z | x)), without sampling.

    .. math:: \text{ELBO}(x) = \int q(z \mid x) \log \frac{p(x, z)}{q(z \mid x)}\, dz

    Args:
        model: As for :func:`quadrature`.
        guide: A callable with the same signature that samples the continuous latent alone.
        *args: One batch, as for ``svi.step``.
        grid: As for :func:`quadrature`. The default one covers the guide as well.
        num_points: Likewise.
        tolerance: Likewise, for the errors of log p(x) and of the ELBO.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        ELBO, KL, posterior and the guide's density.

    Raises:
        TypeError: As in :func:`quadrature`.
        ValueError: Likewise; and if the guide samples anything else, or from a point mass, or
            does not fit the model, or the grid does not hold its density, or its tails are so
            heavy that the ELBO beyond the grid cannot be neglected.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> quadrature_elbo(model, guide, torch.tensor([0.0, 2.0])).kl  # 1/2 - log(2) / 2
        tensor([0.1534, 0.1534], dtype=torch.float64)
    """
    where = "quadrature_elbo"
    _check_settings(where, grid, num_points, tolerance)
    with without_side_effects(model, guide):
        shown = within_support(model)
        prior, site = prior_pair(shown, args, kwargs, where)
        with refuse_subsampling(where):
            pair = trace_pair(shown, guide, args, kwargs, where)
        refuse_point_mass(pair, where)
        check_guide_sites(pair, site["name"], where)
        densities = ScalarDensities(pair, prior, site, where)

        bounds = bounds_of(site["fn"], where, site["name"])

        def solve(points: Grid) -> tuple[GridElbo, Errors]:
            return _elbo(points, densities, bounds, site["name"])

        def counts(z: torch.Tensor) -> list[torch.Tensor]:
            log_joint, log_q = (
                f(z, strict=False) for f in (densities.log_joint, densities.log_guide)
            )
            return [log_joint, log_q, log_q + (log_joint - log_q).abs().log()]

        return _solved(solve, counts, site, grid, num_points, tolerance, where)


def _check_settings(where: str, grid: Any, num_points: int, tolerance: float) -> None:
    check_at_least(where, "num_points", num_points, 9)
    check_tolerance(where, tolerance)
    if grid is not None:
        check_grid(where, grid)


def _expected(log_q: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """q(z) f(z), also where q is 0."""
    q = log_q.exp()
    return torch.where(q > 0, q * f, 0.0)


def _posterior(grid: Grid, log_joint: torch.Tensor, site: str) -> tuple[GridPosterior, Errors]:
    """The result, and its errors by where they come from, ``(*batch,)``."""
    log_likelihood, coarse = grid.log_integral(log_joint), grid.log_integral(log_joint, every=2)
    errors = {
        "impossible": torch.where(log_likelihood == -torch.inf, torch.inf, 0.0),
        "outside": (grid.log_tails(log_joint) - log_likelihood).exp().log1p(),
        "between": torch.maximum(
            (log_likelihood - coarse).abs() + grid.log_roughness(log_joint),
            grid.coarseness(log_joint),
        ),
    }
    error = errors["outside"] + errors["between"]
    weights = grid.weights()
    return GridPosterior(site, grid.points, weights, log_joint, log_likelihood, error), errors


def _elbo(
    grid: Grid, densities: ScalarDensities, bounds: tuple[float, float], site: str
) -> tuple[GridElbo, Errors]:
    log_joint, log_q = densities.log_joint(grid.points), densities.log_guide(grid.points)
    posterior, of_posterior = _posterior(grid, log_joint, site)
    log_ratio = densities.log_ratio(grid.points, log_joint, log_q)
    f = _expected(log_q, log_ratio)
    beyond = densities.guide_goes_beyond(grid.points, bounds)
    elbo = torch.where(beyond, -torch.inf, grid.integral(f))
    missed = (grid.integral(log_q.exp()) - 1).abs() + grid.log_tails(log_q).exp()
    # An ELBO of -inf is what it says.
    is_finite = elbo.isfinite()
    f = torch.where(is_finite, f, 0.0)
    change = torch.where(is_finite, (elbo - grid.integral(f, every=2)).abs(), 0.0)
    size = torch.where(f != 0, log_ratio.abs(), 0.0)
    scale = torch.where(f != 0, log_q.exp() * (1 + size) * (1 + log_joint.abs()), 0.0)
    tail = grid.log_tails(log_q + size.log1p()).exp()
    errors = {
        "impossible": of_posterior["impossible"],
        "outside": of_posterior["outside"],
        "guide": torch.where(beyond, 0.0, missed),
        "tail": torch.where(is_finite, tail, 0.0),
        "between": torch.maximum(change + grid.roughness(f, scale), grid.coarseness(log_q)),
    }
    # A bound on log p(x), or where the latent is hidden on the same with q as the prior.
    bounded = torch.where(
        densities.is_hidden, grid.log_integral(log_ratio + log_q), posterior.log_likelihood
    )
    error = errors["between"] + errors["guide"] + errors["tail"]
    errors["between"] = torch.maximum(of_posterior["between"], errors["between"])
    result = GridElbo(posterior, log_q, elbo, bounded - elbo, error)
    return result, errors


def _solved(
    solve: Callable[[Grid], tuple[Result, Errors]],
    counts: Callable[[torch.Tensor], list[torch.Tensor]],
    site: Site,
    grid: torch.Tensor | None,
    num_points: int,
    tolerance: float,
    where: str,
) -> Result:
    """The result on the grid given, or on one that is refined as far as needed."""
    bounds = bounds_of(site["fn"], where, site["name"])
    if grid is not None:
        points = _given(grid, site, bounds, where)
        result, errors = solve(points)
    else:
        coordinate = _coordinate(site, bounds, where)
        counts(coordinate.grid(-1.0, 1.0, 9).points)  # Programs are compared where they matter.
        start, stop = coordinate.range_of(counts, num_points)
        num = num_points
        while True:
            points = coordinate.grid(start, stop, num)
            result, errors = solve(points)
            between = torch.stack([e for n, e in errors.items() if n in ("between", "guide")])
            if float(between.max()) <= tolerance or 2 * num - 1 > _MOST_POINTS:
                break
            num = 2 * num - 1
    check_converged(where, points, errors, tolerance)
    return result


def _given(grid: torch.Tensor, site: Site, bounds: tuple[float, float], where: str) -> Grid:
    """The trapezoidal rule on a user's points, as the dtype of the latent has them."""
    points = grid.detach().to(site["value"]).to(torch.float64)
    check_grid_in_support(where, site["name"], points, bounds)
    gaps = float(points[0]) - bounds[0], bounds[1] - float(points[-1])
    eps = torch.finfo(site["value"].dtype).eps
    return Grid(points, points, torch.zeros_like(points), gaps, eps)


def _coordinate(site: Site, bounds: tuple[float, float], where: str) -> Coordinate:
    """The coordinate around the prior of all rows, as far as its moments are known."""
    low, high = bounds
    loc, scale, fn = 0.0, 1.0, unmasked(site["fn"])
    if low > -math.inf:
        loc = (low + high) / 2 if high < math.inf else low + 1.0
    elif high < math.inf:
        loc = high - 1.0
    try:
        mean, stddev = fn.mean.to(torch.float64), fn.stddev.to(torch.float64)
    except NotImplementedError:  # As of a flow.
        pass
    else:
        center = float(mean.mean())
        spread = float(stddev.max() + mean.max() - mean.min())
        if low < center < high and 0 < spread < math.inf:
            loc, scale = center, spread
    return Coordinate(bounds, loc, scale, like=site["value"], where=where)
