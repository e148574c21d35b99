"""Distributions that stay exact for large outputs of a network."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence
from torch.quasirandom import SobolEngine

from pyro_vae.distributions import LogPoisson, StableContinuousBernoulli

LOGITS = [-1e4, -300.0, -30.0, -17.0, -3.0, -0.11, -0.09, -1e-4, 0.0, 1e-3, 0.11, 2.0, 40.0, 500.0]


def logarithmic_grid() -> torch.Tensor:
    """Points of [0, 1], dense at both ends."""
    low = torch.logspace(-12, -0.31, 20_001)
    return torch.cat([torch.zeros(1), low, 1 - low, torch.ones(1)]).unique()


def integral(density: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.trapezoid(density, x, dim=0)


def test_density_mean_and_variance_by_quadrature() -> None:
    fn = StableContinuousBernoulli(logits=torch.tensor(LOGITS))
    x = logarithmic_grid()
    density = fn.log_prob(x[:, None]).exp()
    torch.testing.assert_close(integral(density, x), torch.ones(len(LOGITS)), rtol=0, atol=1e-5)
    torch.testing.assert_close(integral(density * x[:, None], x), fn.mean, rtol=1e-4, atol=1e-5)
    square = integral(density * (x[:, None] - fn.mean).square(), x)
    torch.testing.assert_close(square, fn.variance, rtol=1e-4, atol=1e-5)


def test_float32_is_as_good() -> None:
    logits = torch.tensor(LOGITS)
    x = torch.linspace(0, 1, 11)[:, None]
    coarse = StableContinuousBernoulli(logits=logits.float()).log_prob(x.float())
    fine = StableContinuousBernoulli(logits=logits).log_prob(x)
    torch.testing.assert_close(coarse.double(), fine, rtol=1e-5, atol=1e-5)


def test_it_is_that_of_torch_where_torch_is_exact() -> None:
    logits, x = torch.linspace(-8, 8, 33), torch.linspace(0.05, 0.95, 10)[:, None]
    logits = logits[logits.abs() > 0.1]
    ours, theirs = StableContinuousBernoulli(logits=logits), dist.ContinuousBernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.cdf(x), theirs.cdf(x))
    torch.testing.assert_close(ours.icdf(x), theirs.icdf(x))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)


def test_gradient_is_data_minus_mean() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    fn = StableContinuousBernoulli(logits=logits)
    (gradient,) = torch.autograd.grad(fn.log_prob(torch.tensor(0.3)).sum(), logits)
    torch.testing.assert_close(gradient, 0.3 - fn.mean)


def test_samples_follow_the_distribution() -> None:
    fn = StableContinuousBernoulli(logits=torch.tensor(LOGITS))
    u = SobolEngine(1).draw(1000, dtype=torch.float64)
    torch.testing.assert_close(fn.cdf(fn.icdf(u)), u.expand(-1, len(LOGITS)))
    draws = fn.sample(torch.Size([20_000]))
    assert ((draws >= 0) & (draws <= 1)).all()
    assert ((draws.mean(0) - fn.mean).abs() < 5 * (fn.variance / len(draws)).sqrt()).all()


def test_values_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="support"):
        StableContinuousBernoulli(logits=torch.zeros(())).log_prob(torch.tensor(1.5))
    with pytest.raises(ValueError, match="support"):
        LogPoisson(torch.zeros(())).log_prob(torch.tensor(0.5))


def test_log_poisson_is_the_poisson() -> None:
    log_rate, count = torch.linspace(-5, 5, 11), torch.arange(8.0)[:, None]
    fn = LogPoisson(log_rate)
    torch.testing.assert_close(fn.log_prob(count), dist.Poisson(log_rate.exp()).log_prob(count))
    larger = fn.expand([3, 11])
    assert larger.log_prob(count[:3]).shape == (3, 11)
    assert larger.sample().shape == (3, 11)


@pytest.mark.parametrize("log_rate", [-110.0, -88.0, 0.0, 5.0])
@pytest.mark.parametrize("count", [0.0, 1.0, 7.0])
def test_log_poisson_has_a_gradient_where_the_rate_underflows(
    log_rate: float, count: float
) -> None:
    raw = torch.tensor(log_rate, dtype=torch.float32, requires_grad=True)
    LogPoisson(raw).log_prob(torch.tensor(count, dtype=torch.float32)).backward()
    expected = count - torch.tensor(log_rate).exp()
    torch.testing.assert_close(raw.grad, expected.float())


def test_entropy_and_divergence_by_quadrature() -> None:
    logits, x = torch.tensor([-100.0, -3.0, 0.01, 0.4, 20.0, 40.0]), logarithmic_grid()[:, None]
    p, q = StableContinuousBernoulli(logits=logits), StableContinuousBernoulli(logits=-logits / 3)
    density = p.log_prob(x).exp()
    entropy = integral(-density * p.log_prob(x), x[:, 0])
    torch.testing.assert_close(p.entropy(), entropy, rtol=1e-4, atol=1e-4)
    divergence = integral(density * (p.log_prob(x) - q.log_prob(x)), x[:, 0])
    torch.testing.assert_close(kl_divergence(p, q), divergence, rtol=1e-4, atol=1e-4)
    log_rate = torch.tensor([-1.0, 0.5])
    torch.testing.assert_close(
        kl_divergence(LogPoisson(log_rate), LogPoisson(log_rate + 1)),
        kl_divergence(dist.Poisson(log_rate.exp()), dist.Poisson((log_rate + 1).exp())),
    )


@pytest.mark.parametrize("moment", ["mean", "variance"])
def test_moments_have_gradients_at_any_logit(moment: str) -> None:
    logits = torch.tensor([-200.0, -0.3, 0.0, 0.49, 0.51, 200.0], requires_grad=True)
    value = getattr(StableContinuousBernoulli(logits=logits), moment)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    step = 1e-5
    fn = StableContinuousBernoulli(logits=logits.detach() + torch.tensor([[-step], [step]]))
    below, above = getattr(fn, moment)
    torch.testing.assert_close(gradient, (above - below) / (2 * step), rtol=1e-5, atol=1e-9)
