"""Quadrature over one latent: against closed forms, then against Monte Carlo, then its messages."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.curves import Trochoid
from pyro_vae.evaluation import elbo_terms, importance_weighted_log_likelihood
from pyro_vae.evaluation.grids import Coordinate
from pyro_vae.evaluation.quadrature import GridPosterior, quadrature, quadrature_elbo
from pyro_vae.flows import neural_spline
from pyro_vae.guides import AmortizedFlow, AmortizedNormal, ExactLinearGaussian
from pyro_vae.handlers import mask_missing, scale_kl
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import GaussianMixturePrior, StandardNormalPrior

X = torch.tensor([0.0, 1.0])
EXACT = {"rtol": 0.0, "atol": 1e-8}


def linear(seed: int = 1) -> tuple[LinearGaussian, torch.Tensor]:
    torch.manual_seed(seed)
    model = LinearGaussian(4, 1, noise="diagonal")
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.normal_(std=0.3)
    return model, 2.0 * torch.randn(5, 4)


def curve() -> VAE:
    return VAE(Trochoid(), Normal(0.3), StandardNormalPrior(1))


def points() -> torch.Tensor:
    """One mode; two far apart; two close together; far from the curve."""
    return torch.tensor([[0.2, -2.2], [0.0, 2.0**0.5], [0.0, -0.75], [3.0, -2.0]])


def one_latent(
    prior: Callable[..., Any], likelihood: Callable[..., Any], event_dim: int = 0
) -> Callable[..., None]:
    """A plain program with other names than ours."""

    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            code = pyro.sample("code", prior())
            pyro.sample("count", likelihood(code).to_event(event_dim), obs=x)

    return program


def log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


# The oracles: closed forms.


def test_the_linear_gaussian_model() -> None:
    model, x = linear()
    posterior = quadrature(model, x)
    torch.testing.assert_close(posterior.log_likelihood, model.log_prob(x).detach(), **EXACT)
    exact = model.posterior(x).log_prob(posterior.grid.reshape(-1, 1, 1)).detach()
    torch.testing.assert_close(posterior.log_density, exact, **EXACT)
    assert posterior.site == "z"
    assert posterior.log_joint.shape == (len(posterior.grid), 5)
    assert float(posterior.error.max()) < 1e-8
    total = posterior.weights @ posterior.log_density.exp()
    torch.testing.assert_close(total, torch.ones(5), **EXACT)


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_a_beta_prior(a: float) -> None:
    b, n = torch.tensor(0.7), 10
    model = one_latent(lambda: dist.Beta(a, b), lambda z: dist.Binomial(n, z))
    x = torch.tensor([0.0, 3.0, 9.0])
    posterior = quadrature(model, x)
    chosen = torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    a = torch.tensor(a)
    exact = chosen + log_beta(a + x, b + n - x) - log_beta(a, b)
    torch.testing.assert_close(posterior.log_likelihood, exact, rtol=0.0, atol=2e-6)
    density = dist.Beta(a + x, b + n - x).log_prob(posterior.grid.unsqueeze(-1))
    counts = density > -30  # Binomial clamps its probability far out.
    torch.testing.assert_close(posterior.log_density[counts], density[counts], rtol=0, atol=2e-6)
    assert float(posterior.grid.min()) > 0
    assert float(posterior.grid.max()) < 1


def test_a_uniform_prior_on_another_interval() -> None:
    """x | z ~ N(z, 1), z ~ U(-2, 5): a difference of distribution functions."""
    model = one_latent(lambda: dist.Uniform(-2.0, 5.0), lambda z: dist.Normal(z, 1.0))
    x = torch.tensor([0.0, 4.9, 9.0])
    exact = (torch.special.ndtr(5 - x) - torch.special.ndtr(-2 - x)).log() - math.log(7)
    torch.testing.assert_close(quadrature(model, x).log_likelihood, exact, **EXACT)


@pytest.mark.parametrize("shape", [0.3, 2.0])
def test_a_gamma_prior(shape: float) -> None:
    rate = torch.tensor(2.0)
    model = one_latent(lambda: dist.Gamma(shape, rate), lambda z: dist.Poisson(z))
    x = torch.tensor([0.0, 3.0, 60.0])
    posterior = quadrature(model, x)
    exact = dist.GammaPoisson(torch.tensor(shape), rate).log_prob(x)
    torch.testing.assert_close(posterior.log_likelihood, exact, rtol=0.0, atol=1e-7)
    density = dist.Gamma(shape + x, rate + 1).log_prob(posterior.grid.unsqueeze(-1))
    torch.testing.assert_close(posterior.log_density, density, rtol=1e-9, atol=1e-7)


def test_a_support_that_is_bounded_above() -> None:
    below = dist.transforms.ComposeTransform(
        [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(1.0, -1.0)]
    )

    class Below(dist.TransformedDistribution):  # type: ignore[misc]
        support = torch.distributions.constraints.less_than(1.0)

    model = one_latent(
        lambda: Below(dist.Normal(0.3, 0.8), below), lambda z: dist.Normal(torch.log(1 - z), 0.5)
    )
    x = torch.tensor([-1.0, 2.0])
    exact = dist.Normal(0.3, math.hypot(0.8, 0.5)).log_prob(x)
    posterior = quadrature(model, x)
    torch.testing.assert_close(posterior.log_likelihood, exact, **EXACT)
    assert (posterior.grid.diff() > 0).all()


def test_heavy_tails() -> None:
    model = one_latent(lambda: dist.Cauchy(0.0, 1.0), lambda z: dist.Cauchy(z, 2.0))
    x = torch.tensor([0.0, 50.0])
    posterior = quadrature(model, x)
    exact = dist.Cauchy(torch.tensor(0.0), 3.0).log_prob(x)
    torch.testing.assert_close(posterior.log_likelihood, exact, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize(("loc", "scale", "noise"), [(1e4, 300.0, 0.1), (-3.0, 1e-4, 1e-6)])
def test_any_scale(loc: float, scale: float, noise: float) -> None:
    """Far from zero, wide or narrow, with posteriors a thousand times narrower than the prior."""
    model = one_latent(lambda: dist.Normal(loc, scale), lambda z: dist.Normal(z, noise))
    x = loc + scale * torch.tensor([0.0, 0.5])
    exact = dist.Normal(loc, math.hypot(scale, noise)).log_prob(x)
    posterior = quadrature(model, x)
    torch.testing.assert_close(posterior.log_likelihood, exact, rtol=0.0, atol=1e-7)


def spikes(*scales: float, at: tuple[float, float]) -> Callable[..., None]:
    """Two modes of equal weight, which the data say nothing about."""
    both = dist.Normal(torch.tensor(at), torch.tensor(scales))
    prior = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), both)
    return one_latent(lambda: prior, lambda z: dist.Normal(z - z, 1.0))


def test_two_narrow_modes() -> None:
    posterior = quadrature(spikes(1e-3, 1e-3, at=(0.00123, 2.71828)), torch.zeros(2))
    exact = dist.Normal(0.0, 1.0).log_prob(torch.zeros(2))
    torch.testing.assert_close(posterior.log_likelihood, exact, rtol=0.0, atol=1e-7)


def test_the_first_look_loses_no_mode_between_its_points() -> None:
    """One spike on a point, one between two: the second seems thousands of nats lower."""
    whole = -math.inf, math.inf
    coordinate = Coordinate(whole, 0.0, 1.0, like=torch.zeros(()), where="test")
    first_look = coordinate.grid(-coordinate.reach, coordinate.reach, 1025).points
    between = float(first_look[600:602].mean())
    modes = dist.Normal(torch.tensor([0.0, between]), 1e-4)
    start, stop = coordinate.range_of(
        lambda z: [modes.log_prob(z[:, None]).logsumexp(-1, keepdim=True)], 1025
    )
    assert start < 0 < between < math.sinh(stop)


def test_a_mode_between_the_points_of_a_grid() -> None:
    """Its feet have no mass, so that leaving out points changes nothing."""
    model, grid = spikes(0.1, 7e-4, at=(0.0, 5.005)), torch.linspace(-8, 8, 1601)
    with pytest.raises(
        ValueError, match="expected an error of at most 0.0001 nats, got an estimate"
    ):
        quadrature(model, X, grid=grid)


def test_a_decoder_that_overflows_far_out() -> None:
    model = one_latent(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Poisson(z.exp()))
    x = torch.tensor([7.0, 2.0])
    by_hand = quadrature(model, x, grid=torch.linspace(-9, 9, 2001))
    found = quadrature(model, x)
    torch.testing.assert_close(found.log_likelihood, by_hand.log_likelihood, **EXACT)


def test_a_prior_that_differs_between_rows() -> None:
    def model(x: torch.Tensor, locs: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(locs, 0.1))
            pyro.sample("x", dist.Normal(z, 0.2), obs=x)

    x, locs = torch.tensor([0.0, 1.0, -3.0]), torch.tensor([-30.0, 0.0, 40.0])
    exact = dist.Normal(locs, math.hypot(0.1, 0.2)).log_prob(x)
    torch.testing.assert_close(quadrature(model, x, locs=locs).log_likelihood, exact, **EXACT)


def test_a_prior_without_moments() -> None:
    """A mixture knows its support only through its components."""
    model = VAE(Trochoid(), Normal(0.3), GaussianMixturePrior(1, 3))
    grid = torch.linspace(-12, 12, 4801)
    x = points()
    by_hand = quadrature(model, x, grid=grid).log_likelihood
    torch.testing.assert_close(quadrature(model, x).log_likelihood, by_hand, **EXACT)


def test_discrete_latents_are_summed_out() -> None:
    """x | c, z ~ N(z + c, 1): a mixture of two closed forms."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z + 4 * kind, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.tensor([0.0, 3.0])
    marginal = dist.Normal(torch.tensor([[0.0], [4.0]]), 5.0**0.5).log_prob(x)
    exact = (marginal + torch.tensor([[0.7], [0.3]]).log()).logsumexp(0)
    torch.testing.assert_close(quadrature(model, x).log_likelihood, exact, **EXACT)
    result = quadrature_elbo(model, guide, x)
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=4000)
    assert ((result.elbo - estimate.elbo).abs() < 0.1).all()
    torch.testing.assert_close(result.posterior.log_likelihood, exact, **EXACT)


# ELBOs.


def normal_guide(loc: torch.Tensor, scale: float, site: str = "z") -> Callable[..., None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(site, dist.Normal(loc, scale).to_event(1))

    return guide


def test_the_exact_posterior_closes_the_gap() -> None:
    model, x = linear()
    result = quadrature_elbo(model, ExactLinearGaussian(model), x)
    torch.testing.assert_close(result.elbo, model.log_prob(x).detach(), **EXACT)
    torch.testing.assert_close(result.kl, torch.zeros(5), **EXACT)
    exact = model.posterior(x).log_prob(result.posterior.grid.reshape(-1, 1, 1)).detach()
    torch.testing.assert_close(result.log_guide, exact, **EXACT)


@pytest.mark.parametrize("scale", [0.02, 0.5, 6.0])
def test_the_elbo_of_a_normal_guide(scale: float) -> None:
    """Narrower and wider than the posterior: KLs between normals are known."""
    model, x = linear()
    loc = torch.linspace(-3, 3, 5).unsqueeze(-1)
    result = quadrature_elbo(model, normal_guide(loc, scale), x)
    exact = model.posterior(x)
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(loc, scale_tril=torch.full((1, 1), scale)), exact
    ).detach()
    torch.testing.assert_close(result.kl, kl, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(result.elbo, model.log_prob(x).detach() - kl, rtol=1e-9, atol=1e-8)


def test_densities_on_the_grid() -> None:
    model, x = linear()
    grid = torch.linspace(-12, 12, 3001)
    posterior = quadrature(model, x, grid=grid)
    log_q = dist.Normal(0.3, 0.7).log_prob(grid).unsqueeze(-1).expand(-1, 5)
    by_guide = quadrature_elbo(model, normal_guide(torch.full((5, 1), 0.3), 0.7), x)
    torch.testing.assert_close(posterior.elbo(log_q), by_guide.elbo, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(posterior.kl(log_q), by_guide.kl, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(posterior.kl(posterior.log_density), torch.zeros(5), **EXACT)


def test_a_guide_on_a_part_of_the_support() -> None:
    """q = U(1/4, 3/4), prior U(0, 1): E[log z] is known."""
    model = one_latent(lambda: dist.Uniform(0.0, 1.0), lambda z: dist.Bernoulli(z))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Uniform(0.25, 0.75))

    mean_log = 2 * (0.75 * math.log(0.75) - 0.25 * math.log(0.25)) - 1
    result = quadrature_elbo(model, guide, torch.tensor([1.0]), tolerance=2e-3)
    assert float(result.elbo) == pytest.approx(mean_log - math.log(2), abs=2e-3)


def test_an_elbo_of_minus_infinity() -> None:
    """A guide with mass where the likelihood has none."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([1.0])
    result = quadrature_elbo(model, guide, x, tolerance=1e-3)
    assert float(result.elbo) == -math.inf
    assert float(result.kl) == math.inf
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x) + torch.special.log_ndtr(x / 2**0.5)
    torch.testing.assert_close(result.posterior.log_likelihood, exact, rtol=0.0, atol=1e-3)


def guide_from(fn: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("code", fn(x))

    return guide


@pytest.mark.parametrize("df", [2.0, 2.1, 2.5, 3.0])
def test_a_guide_with_heavy_tails_is_refused(df: float) -> None:
    """E[z^2] is infinite, or has much of its mass far out, where q itself has none."""
    guide = guide_from(lambda x: dist.StudentT(df, x / 2, 1.0))
    with pytest.raises(ValueError, match="expected a guide whose tail adds nothing to the ELBO"):
        quadrature_elbo(normal_model, guide, X)


@pytest.mark.parametrize("df", [2.5, 3.0, 4.0, 8.0])
def test_the_error_of_a_guide_with_heavy_tails(df: float) -> None:
    guide, x = guide_from(lambda x: dist.StudentT(df, x / 2, 1.0)), X.double()
    result = quadrature_elbo(normal_model, guide, x, tolerance=0.5)
    mean, variance = x / 2, df / (df - 2)
    energy = (variance + mean**2 + (x - mean) ** 2 + variance) / 2 + math.log(2 * math.pi)
    exact = dist.StudentT(torch.tensor(df), 0.0, 1.0).entropy() - energy
    assert ((result.elbo - exact).abs() <= 1.1 * result.error + 1e-8).all()


def test_an_integrand_far_beyond_both_densities() -> None:
    """q exp(z) has its mass at z = 49, seven standard deviations from that of q = N(0, 7)."""
    model = one_latent(lambda: dist.Normal(0.0, 7.0), lambda z: dist.Poisson(z.exp()))
    guide = guide_from(lambda x: dist.Normal(torch.zeros_like(x), 7.0))
    x = torch.tensor([0.0, 3.0])
    exact = -math.exp(24.5) - torch.lgamma(x + 1)
    torch.testing.assert_close(quadrature_elbo(model, guide, x).elbo, exact, rtol=1e-9, atol=0.0)


def test_a_guide_beyond_the_support_of_the_prior() -> None:
    """Six standard deviations within it are mass beyond; a hundred are none in float64."""
    model = one_latent(lambda: dist.Gamma(2.0, 1.0), lambda z: dist.Poisson(z))
    beyond = quadrature_elbo(model, guide_from(lambda x: dist.Normal(3.0 + 0 * x, 0.5)), X)
    assert (beyond.elbo == -math.inf).all()
    assert (beyond.kl == math.inf).all()
    assert (beyond.error == 0).all()
    far = quadrature_elbo(model, guide_from(lambda x: dist.Normal(50.0 + 0 * x, 0.5)), X)
    assert far.elbo.isfinite().all()


@pytest.mark.parametrize("built_outside", [False, True])
def test_a_guide_on_half_of_the_support(built_outside: bool) -> None:
    """q = Gamma(3, 1) for a real latent: all of its moments are known."""
    gamma = dist.Gamma(torch.tensor(3.0), torch.tensor(1.0))
    guide = guide_from(
        lambda x: gamma.expand(x.shape) if built_outside else dist.Gamma(3.0 + 0 * x, 1.0)
    )
    x = X.double()
    result = quadrature_elbo(normal_model, guide, x)
    exact = gamma.entropy() - math.log(2 * math.pi) - (12 + x**2 - 6 * x + 12) / 2
    assert ((result.elbo - exact).abs() <= result.error).all()
    torch.testing.assert_close(result.elbo, exact, rtol=0.0, atol=1e-4)


def test_an_exponential_guide_has_no_density_below_zero() -> None:
    """Torch gives it one there, which grows without bound."""
    guide = guide_from(lambda x: dist.Exponential(1.0 + 0 * x))
    x = X.double()
    result = quadrature_elbo(normal_model, guide, x, tolerance=2e-3)
    exact = 1 - math.log(2 * math.pi) - (2 + x**2 - 2 * x + 2) / 2
    assert ((result.elbo - exact).abs() <= result.error).all()
    torch.testing.assert_close(result.elbo, exact, rtol=0.0, atol=2e-3)


def test_a_hidden_latent_with_data() -> None:
    """Without its densities the guide stands for the prior: x ~ N(2, 0.1^2 + 0.05^2)."""
    seen, x = torch.tensor([True, False]), torch.tensor([2.0, 2.1])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)), poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(torch.full_like(x, 2.0), 0.05))

    result = quadrature_elbo(model, guide, x)
    expected = dist.Normal(2.0, 0.1).log_prob(x[1]) - 0.5 * (0.05 / 0.1) ** 2
    torch.testing.assert_close(result.elbo[1], expected, **EXACT)
    bounded = dist.Normal(2.0, math.hypot(0.1, 0.05)).log_prob(x[1])
    torch.testing.assert_close(result.kl[1], bounded - expected, **EXACT)
    gap = result.posterior.log_likelihood[0] - result.elbo[0]
    torch.testing.assert_close(result.kl[0], gap, **EXACT)


# Jumps, cusps, and supports that move.


def between_steps(center: float, width: float, high: float) -> tuple[Callable[..., None], float]:
    """A decoder that steps up and down again, and log p(x = 1)."""
    model = one_latent(
        lambda: dist.Normal(0.0, 1.0),
        lambda z: dist.Bernoulli(torch.where((z - center).abs() < width, high, 0.1)),
    )
    ends = torch.special.ndtr(torch.tensor([center + width, center - width]))
    inside = float(ends[0] - ends[1])
    return model, math.log(high * inside + 0.1 * (1 - inside))


def test_steps_up_and_down() -> None:
    """Their costs cancel on the grid and on every other point of it, or nearly."""
    model, exact = between_steps(-0.24754477330646374, 0.025021358400706118, 0.9)
    posterior = quadrature(model, torch.ones(1), tolerance=2e-3)
    assert abs(float(posterior.log_likelihood) - exact) < float(posterior.error) < 2e-3
    torch.manual_seed(0)
    for center, width, high in (torch.rand(40, 3) * torch.tensor([3.0, 1.5, 0.8])).tolist():
        model, exact = between_steps(center - 1.5, width + 0.05, high + 0.1)
        grid = torch.linspace(-9.0, 9.0, 1025)
        posterior = quadrature(model, torch.ones(1), grid=grid, tolerance=1.0)
        assert abs(float(posterior.log_likelihood) - exact) <= float(posterior.error)


def test_a_smooth_decoder_costs_nothing_for_jumps() -> None:
    posterior = quadrature(normal_model, X, grid=torch.linspace(-7, 7, 61))
    assert (posterior.error < 1e-6).all()


@pytest.mark.parametrize(
    ("center", "x", "scale"),
    [(-0.24406233131278388, 0.7265152248971123, 1e-4), (0.21129728, 1.64322733, 3e-4)],
)
def test_no_mode_is_lost_for_a_cusp(center: float, x: float, scale: float) -> None:
    """A parabola through the points beside a cusp ends far below it."""
    model = one_latent(
        lambda: dist.Normal(0.0, 1.0), lambda z: dist.Laplace((z - center) ** 2, scale)
    )
    data = torch.tensor([x])
    posterior = quadrature(model, data, tolerance=0.5)
    root = math.sqrt(x)
    modes = torch.tensor([center + root, center - root])
    exact = dist.Normal(0.0, 1.0).log_prob(modes).logsumexp(0) - math.log(2 * root)
    assert abs(float(posterior.log_likelihood - exact)) < 0.05
    with pytest.raises(ValueError, match="an error of at most 0.0001 nats, got an estimate"):
        quadrature(model, data)


@pytest.mark.parametrize("seed", range(6))
def test_a_support_that_moves_with_the_latent(seed: int) -> None:
    """What the prior draws does not matter: x = 0.5 is possible for z in (-0.5, 1.5) alone."""
    pyro.set_rng_seed(seed)
    model = one_latent(
        lambda: dist.Normal(0.0, 1.0), lambda z: dist.Uniform(z - 1, z + 1, validate_args=False)
    )
    posterior = quadrature(model, torch.tensor([0.5]), tolerance=1e-3)
    inside = torch.special.ndtr(torch.tensor(1.5)) - torch.special.ndtr(torch.tensor(-0.5))
    exact = math.log(float(inside) / 2)
    assert abs(float(posterior.log_likelihood) - exact) <= float(posterior.error)


def test_a_density_that_goes_on_outside_its_support() -> None:
    """A Pareto gives numbers there: x > z, so that p(x) is an integral up to x."""
    x = torch.tensor([1.5])
    model = one_latent(lambda: dist.Gamma(2.0, 1.0), lambda z: dist.Pareto(z, 2.0))
    posterior = quadrature(model, x, tolerance=2e-3)
    # 2 x^-3 times the integral of z^3 exp(-z) up to x.
    exact = (2 * x**-3 * 6 * torch.special.gammainc(torch.tensor([4.0]), x)).log()
    assert ((posterior.log_likelihood - exact).abs() <= posterior.error).all()


def test_data_that_no_latent_allows() -> None:
    model = one_latent(
        lambda: dist.Beta(2.0, 2.0), lambda z: dist.Uniform(z, z + 1, validate_args=False)
    )
    with pytest.raises(ValueError, match="expected data that are possible for some value"):
        quadrature(model, torch.tensor([0.5, 9.0]))


# Against Monte Carlo, on the curve.


def encoder() -> AmortizedNormal:
    return AmortizedNormal(MLP(2, [8], 2))


def test_importance_sampling_on_the_curve() -> None:
    x = points()
    exact = quadrature(curve(), x)
    wide = normal_guide(torch.zeros(4, 1), 1.3)
    estimate = importance_weighted_log_likelihood(curve(), wide, x, num_particles=10_000)
    error = estimate.standard_error
    assert (error < 0.2).all()
    assert ((estimate.log_likelihood - exact.log_likelihood).abs() < 5 * error).all()


def test_elbos_by_sampling_on_the_curve() -> None:
    x, guide, model = points(), encoder(), curve()
    result = quadrature_elbo(model, guide, x)
    num, repeats = 50, 20
    terms = torch.stack(
        [elbo_terms(model, guide, x, num_particles=num).elbo for _ in range(repeats)]
    )
    error = terms.std(0) / repeats**0.5
    assert ((terms.mean(0) - result.elbo).abs() < 5 * error).all()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([-elbo.loss(model, guide, x) for _ in range(20)])
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - result.elbo.sum()) < 5 * error


def test_a_flow_is_a_guide() -> None:
    x = points()
    guide = AmortizedFlow(MLP(2, [8], 2 + 4), 1, neural_spline(1, 4, num_transforms=1))
    result = quadrature_elbo(curve(), guide, x, tolerance=1e-3)
    total = result.posterior.weights @ result.log_guide.exp()
    torch.testing.assert_close(total, torch.ones(4), rtol=0.0, atol=1e-3)
    estimate = importance_weighted_log_likelihood(curve(), guide, x, num_particles=4000)
    terms = elbo_terms(curve(), guide, x, num_particles=4000, chunk_size=4000).elbo
    assert ((estimate.elbo - result.elbo).abs() < 3 * (estimate.elbo - terms).abs() + 1.0).all()


# What must not matter.


@pytest.mark.parametrize("num_points", [65, 400, 3000])
def test_refinement(num_points: int) -> None:
    x = points()
    reference = quadrature(curve(), x).log_likelihood
    refined = quadrature(curve(), x, num_points=num_points, tolerance=1e-7)
    torch.testing.assert_close(refined.log_likelihood, reference, rtol=0.0, atol=1e-7)
    grid = torch.linspace(-6, 6, 1200 + num_points)
    by_hand = quadrature(curve(), x, grid=grid)
    torch.testing.assert_close(by_hand.log_likelihood, reference, rtol=0.0, atol=1e-7)
    assert torch.equal(by_hand.grid, grid)


def test_a_grid_that_is_not_even() -> None:
    x = points()
    grid = torch.linspace(-2, 2, 6001).sinh() * 1.5
    found = quadrature(curve(), x, grid=grid).log_likelihood
    torch.testing.assert_close(found, quadrature(curve(), x).log_likelihood, rtol=0.0, atol=1e-5)


def test_the_error_is_no_understatement() -> None:
    """A kink makes the rule converge slowly; the estimate has to say so."""
    model = one_latent(lambda: dist.Laplace(0.0123, 1.0), lambda z: dist.Normal(z - z, 1.0))
    x = torch.zeros(1)
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    errors = []
    for num in (101, 401, 1601):
        posterior = quadrature(model, x, grid=torch.linspace(-40, 40, num), tolerance=1.0)
        actual = (posterior.log_likelihood - exact).abs()
        assert (actual <= posterior.error).all()
        errors.append(float(posterior.error))
    assert errors[0] > errors[1] > errors[2] > 0


def test_rows_do_not_matter_to_one_another() -> None:
    x = points()
    together = quadrature(curve(), x).log_likelihood
    alone = torch.cat([quadrature(curve(), row.unsqueeze(0)).log_likelihood for row in x])
    torch.testing.assert_close(together, alone, **EXACT)


def test_several_observed_sites_and_a_factor() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(2 * z, 0.5), obs=y)
            pyro.factor("weight", -x)

    x, y = torch.tensor([0.0, 1.0]), torch.tensor([2.0, -1.0])
    w, noise = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.25])
    joint = dist.MultivariateNormal(torch.zeros(2), torch.outer(w, w) + noise.diag())
    exact = joint.log_prob(torch.stack([x, y], -1)) - x
    torch.testing.assert_close(quadrature(model, x, y).log_likelihood, exact, **EXACT)


def test_plates_elsewhere_and_within_a_datum() -> None:
    """The data plate at dim -2, around a plate of three measurements of one latent."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("subjects", len(x), dim=-2):
            z = pyro.sample("ability", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 3, dim=-1):
                pyro.sample("answer", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("subjects", len(x), dim=-2):
            pyro.sample("ability", dist.Normal(x.sum(-1, keepdim=True) / 4, 0.5))

    torch.manual_seed(0)
    x = torch.randn(4, 3)
    covariance = torch.ones(3, 3) + torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    posterior = quadrature(model, x)
    assert posterior.log_joint.shape == (len(posterior.grid), 4)
    torch.testing.assert_close(posterior.log_likelihood, exact, **EXACT)
    torch.testing.assert_close(quadrature_elbo(model, guide, x).kl, torch.zeros(4), **EXACT)


def test_two_data_plates() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("time", x.shape[0], dim=-2), pyro.plate("place", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.arange(6.0).reshape(3, 2)
    posterior = quadrature(model, x)
    assert posterior.log_joint.shape[1:] == (3, 2)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    torch.testing.assert_close(posterior.log_likelihood, exact, **EXACT)


def test_a_transformed_latent_is_no_second_one() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            twice = pyro.sample("twice", dist.Delta(2 * z))
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(2 * x / 5, 0.2**0.5))
            pyro.sample("twice", dist.Delta(2 * z))

    x = torch.tensor([0.0, 1.0])
    exact = dist.Normal(0.0, 5.0**0.5).log_prob(x)
    torch.testing.assert_close(quadrature(model, x).log_likelihood, exact, **EXACT)
    torch.testing.assert_close(quadrature_elbo(model, guide, x).elbo, exact, **EXACT)


def test_scales_are_ignored() -> None:
    model, x = linear()
    guide = ExactLinearGaussian(model)
    weighted = poutine.scale(scale_kl(model, 4.0), scale=10.0)
    result = quadrature_elbo(weighted, poutine.scale(scale_kl(guide, 4.0), scale=10.0), x)
    torch.testing.assert_close(result.elbo, model.log_prob(x).detach(), **EXACT)


def test_a_mask_on_the_observation() -> None:
    model, x = linear()
    seen = torch.tensor([True, False, True, True, False])
    masked = mask_missing(model, {"x": seen})
    posterior = quadrature(masked, x)
    exact = torch.where(seen, model.log_prob(x).detach(), 0.0)
    torch.testing.assert_close(posterior.log_likelihood, exact, **EXACT)
    prior = dist.Normal(0.0, 1.0).log_prob(posterior.grid)
    torch.testing.assert_close(posterior.log_density[:, 1], prior, **EXACT)


def test_rows_that_are_no_data() -> None:
    """A mask around everything: they have probability one, and no KL."""
    model, x = linear()
    kept = torch.tensor([True, False, True, True, False])
    result = quadrature_elbo(
        poutine.mask(model, mask=kept), poutine.mask(normal_guide(x[:, :1], 0.5), mask=kept), x
    )
    whole = quadrature_elbo(model, normal_guide(x[:, :1], 0.5), x)
    likelihood = whole.posterior.log_likelihood
    torch.testing.assert_close(result.elbo, torch.where(kept, whole.elbo, 0.0), **EXACT)
    torch.testing.assert_close(
        result.posterior.log_likelihood, torch.where(kept, likelihood, 0.0), **EXACT
    )
    torch.testing.assert_close(result.kl, torch.where(kept, whole.kl, 0.0), **EXACT)


def test_float32() -> None:
    model, x = curve().float(), points()
    reference = quadrature_elbo(curve(), normal_guide(torch.zeros(4, 1), 0.5), x)
    guide = normal_guide(torch.zeros(4, 1).float(), 0.5)
    result = quadrature_elbo(model, guide, x.float())
    assert result.elbo.dtype == torch.float64
    torch.testing.assert_close(result.elbo, reference.elbo, rtol=1e-6, atol=1e-4)
    log_likelihood = reference.posterior.log_likelihood
    torch.testing.assert_close(result.posterior.log_likelihood, log_likelihood, rtol=0, atol=1e-4)


def test_a_program_that_does_not_broadcast() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.stack([z[i] for i in range(len(x))])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x, grid = torch.tensor([0.0, 1.0]), torch.linspace(-7, 7, 61)
    with pytest.warns(UserWarning, match="does not broadcast over particles"):
        posterior = quadrature(model, x, grid=grid)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    torch.testing.assert_close(posterior.log_likelihood, exact, **EXACT)


def test_no_side_effects() -> None:
    model, guide = curve(), AmortizedNormal(nn.Sequential(MLP(2, [8], 2), nn.Dropout(0.5)))
    state, x = torch.get_rng_state(), points()
    first = quadrature(model, x)
    assert guide.training
    torch.set_rng_state(state)
    second = quadrature_elbo(model, guide, x)
    assert guide.training
    assert not pyro.get_param_store().keys()
    assert not second.elbo.requires_grad
    torch.testing.assert_close(first.log_likelihood, second.posterior.log_likelihood, **EXACT)


# Messages.

WHERE = "quadrature: expected "


def normal_model(x: torch.Tensor) -> None:
    one_latent(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))(x)


def latents(*fns: Any) -> Callable[..., None]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            for i, fn in enumerate(fns):
                pyro.sample(f"z{i}", fn)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("fns", "message"),
    [
        ([dist.Normal(0.0, 1.0)] * 2, r"one continuous latent, got the latents \['z0', 'z1'\]"),
        ([], "one continuous latent, got none"),
        ([dist.Bernoulli(0.5)], r"one continuous latent, got the discrete \['z0'\] alone. Sum it"),
        ([dist.Poisson(2.0)], "can be summed out, got the discrete site 'z0' whose values"),
        ([dist.Normal(torch.zeros(3), 1.0).to_event(1)], "one number for each datum at site 'z0'"),
        ([dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))], "one support for all rows at"),
        ([dist.Dirichlet(torch.ones(1))], "whose support is the real line or an interval, got"),
    ],
)
def test_latents_that_are_not_one_number(fns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=WHERE + ".*" + message):
        quadrature(latents(*fns), X)


def test_a_latent_within_another_plate() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("parts", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)

    with pytest.raises(ValueError, match="one number for each datum at site 'z', got 3"):
        quadrature(model, X.unsqueeze(-1))


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "grid to be a float tensor, got list"),
        (torch.arange(9), TypeError, "grid to be a float tensor, got torch.int64"),
        (torch.zeros(9, 1), ValueError, r"grid of shape \(num,\) with at least 5 points, got"),
        (torch.zeros(3), ValueError, r"grid of shape .* with at least 5 points, got shape \(3,\)"),
        (torch.linspace(3, -3, 9), ValueError, "finite points in ascending order"),
        (torch.tensor([0.0, 1, 2, 3, math.inf]), ValueError, "finite points in ascending order"),
        (torch.linspace(-8, 1, 901), ValueError, "a grid that holds all of p.x, z., got a grid of"),
        (torch.linspace(0, 8, 901), ValueError, "a grid that holds all of p.x, z., got a grid of"),
        (torch.linspace(-9, 9, 13), ValueError, "an error of at most 0.0001 nats, got an estimate"),
    ],
)
def test_grids_that_do_not_do(grid: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=WHERE + message):
        quadrature(normal_model, X, grid=grid)


def test_a_grid_that_cuts_off_a_long_tail() -> None:
    """The point beyond the last one has little mass, all of them have not."""
    model = one_latent(lambda: dist.Laplace(0.0, 1.0), lambda z: dist.Normal(z - z, 1.0))
    grid = torch.arange(-30_000, 9_001) * 1e-3
    with pytest.raises(ValueError, match="that may lack 6.*e-05 nats of it in some row"):
        quadrature(model, X, grid=grid, tolerance=1e-5)


def test_grids_beyond_the_support_or_the_dtype() -> None:
    model = one_latent(lambda: dist.Beta(2.0, 2.0), lambda z: dist.Bernoulli(z))
    with pytest.raises(
        ValueError, match="expected grid in the support of site 'code', from 0 to 1"
    ):
        quadrature(model, X, grid=torch.linspace(-0.1, 1, 101))
    with pytest.raises(ValueError, match="that may lack 0.11 nats"):
        quadrature(model, X, grid=torch.linspace(0.1, 0.9, 1001), tolerance=1e-3)
    whole = quadrature(model, X, grid=torch.linspace(0, 1, 1001))
    exact = torch.full((2,), math.log(0.5))
    torch.testing.assert_close(whole.log_likelihood, exact, rtol=0.0, atol=2e-6)
    grid = torch.cat([torch.linspace(-8, 0, 500), torch.tensor([1e-12]), torch.linspace(1, 8, 500)])
    half = one_latent(
        lambda: dist.Normal(torch.zeros(()).float(), 1.0), lambda z: dist.Normal(z, 1)
    )
    shifted = grid + 1
    with pytest.raises(ValueError, match="that the dtype of site 'code' tells apart"):
        quadrature(half, X.float(), grid=shifted)


def test_a_dtype_that_cannot_hold_the_posterior() -> None:
    loc = torch.tensor(1e8, dtype=torch.float32)
    model = one_latent(lambda: dist.Normal(loc, 1e-3), lambda z: dist.Normal(z, 1.0))
    with pytest.raises(ValueError, match="expected a latent whose dtype tells its values apart"):
        quadrature(model, torch.full((1,), 1e8, dtype=torch.float32))


def test_densities_that_are_no_numbers() -> None:
    model = one_latent(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.log(), 1.0))
    message = r"finite log-densities, got nan as log p\(x, z\) at z = -"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        quadrature(model, X, grid=torch.linspace(-8, 8, 101))
    nowhere = one_latent(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Uniform(5.0, 6.0 + z - z))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="expected"):
        quadrature(nowhere, X)


def test_settings() -> None:
    with pytest.raises(ValueError, match=WHERE + "num_points >= 9, got 3"):
        quadrature(normal_model, X, num_points=3)
    with pytest.raises(TypeError, match=WHERE + "an integer num_points"):
        quadrature(normal_model, X, num_points=99.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=WHERE + "tolerance > 0, got 0"):
        quadrature(normal_model, X, tolerance=0.0)


def test_data_and_plates_as_elsewhere() -> None:
    with pytest.raises(ValueError, match=WHERE + "finite data at site 'count'"):
        quadrature(normal_model, torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=WHERE + "at least one row of data"):
        quadrature(normal_model, X[:0])

    def outside(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="quadrature: expected"):
        quadrature(outside, X)


def with_guide(*fns: Any) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            for name, fn in zip(["code", "other"], fns, strict=False):
                infer = {"is_auxiliary": True} if name == "other" else {}
                pyro.sample(name, fn, infer=infer)

    quadrature_elbo(normal_model, guide, X, grid=torch.linspace(-8, 8, 401))


@pytest.mark.parametrize(
    ("fns", "message"),
    [
        ([dist.Normal(0.0, 1.0)] * 2, "a guide that samples site 'code' alone, got 'other'"),
        ([dist.Delta(torch.tensor(0.0))], "a guide with a density, got a point mass"),
        ([dist.Normal(0.0, 9.0)], "a grid that holds all of the guide's density, got a grid of"),
        ([dist.Normal(7.0, 1.0)], "a grid that holds all of the guide's density, got a grid of"),
        ([dist.Normal(0.003, 1e-3)], "a grid that holds all of the guide's density, got a grid of"),
    ],
)
def test_guides_that_do_not_do(fns: Any, message: str) -> None:
    with pytest.raises(ValueError, match="quadrature_elbo: expected " + message):
        with_guide(*fns)


def test_the_shape_of_a_density() -> None:
    posterior: GridPosterior = quadrature(normal_model, X, grid=torch.linspace(-8, 8, 101))
    message = r"GridPosterior.elbo: expected log_q of shape \(101, 2\), got \(101,\)"
    with pytest.raises(ValueError, match=message):
        posterior.elbo(posterior.grid)


# The curve.


def test_the_curve_crosses_itself() -> None:
    """At angle 3 pi / 4 on both sides, for a ratio of 4 sin(3 pi / 4) / (3 pi)."""
    angle = 3 * math.pi / 4
    net = Trochoid(pitch=2 * math.sin(angle) / angle, radius=2.0, frequency=1.5)
    z = torch.tensor([[-angle / 1.5], [angle / 1.5], [0.0]])
    expected = torch.tensor([[0.0, 2.0**0.5], [0.0, 2.0**0.5], [0.0, -2.0]])
    torch.testing.assert_close(net(z), expected)
    assert net(z.expand(7, 3, 1)).shape == (7, 3, 2)
    assert "radius=2.0" in repr(net)


@pytest.mark.parametrize("name", ["pitch", "radius", "frequency"])
def test_arguments_of_the_curve(name: str) -> None:
    with pytest.raises(ValueError, match=f"Trochoid: expected {name} > 0, got -1"):
        Trochoid(**{name: -1.0})


def test_codes_of_the_curve() -> None:
    with pytest.raises(ValueError, match=r"Trochoid: expected codes of shape \(\*sample, batch, 1"):
        Trochoid()(torch.zeros(5, 2))
