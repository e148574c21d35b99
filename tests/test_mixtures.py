"""Mixtures of normals: densities by hand, gradients of samples against closed forms."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.mixtures import NormalMixture

LOC = torch.tensor([[0.5, -0.3, 1.0], [-0.6, 0.8, 0.2]], dtype=torch.float64)
SCALE = torch.tensor([[0.7, 1.2, 0.5], [1.0, 0.5, 0.9]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.4], dtype=torch.float64)


def mixture(loc: torch.Tensor, scale: torch.Tensor, logits: torch.Tensor) -> NormalMixture:
    return NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_moments(dtype: torch.dtype) -> None:
    loc, scale, logits = LOC.to(dtype), SCALE.to(dtype), LOGITS.to(dtype)
    q = mixture(loc, scale, logits)
    z = torch.randn(6, 3, dtype=dtype)
    by_hand = torch.stack(
        [
            dist.Normal(loc[k], scale[k]).log_prob(z).sum(-1) + logits.log_softmax(-1)[k]
            for k in (0, 1)
        ]
    ).logsumexp(0)
    torch.testing.assert_close(q.log_prob(z), by_hand)
    weights = logits.softmax(-1).unsqueeze(-1)
    torch.testing.assert_close(q.mean, (weights * loc).sum(0))
    many = q.expand((4, 6))
    assert isinstance(many, NormalMixture)
    assert many.rsample().shape == (4, 6, 3)
    assert many.rsample().dtype == dtype
    assert many.rsample((2,)).shape == (2, 4, 6, 3)
    torch.testing.assert_close(many.log_prob(z), by_hand.expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_samples_are_those_of_the_expectation(dtype: torch.dtype) -> None:
    """Of E[z1 z2 z3 + z1^2 z2 + z3^2], known in closed form; one sample per row."""
    num = 50_000
    parameters = [t.to(dtype, copy=True).requires_grad_() for t in (LOC, SCALE, LOGITS)]
    loc, scale, logits = parameters
    terms = loc.prod(-1) + (loc**2 + scale**2)[:, 0] * loc[:, 1] + (loc**2 + scale**2)[:, 2]
    exact = torch.autograd.grad((logits.softmax(-1) * terms).sum(), parameters)
    rows = [t.detach().expand(num, *t.shape).clone().requires_grad_() for t in parameters]
    z = mixture(*rows).rsample()
    value = z.prod(-1) + z[:, 0] ** 2 * z[:, 1] + z[:, 2] ** 2
    for expected, rowwise in zip(exact, torch.autograd.grad(value.sum(), rows), strict=True):
        error = 5 * rowwise.std(0) / math.sqrt(num)
        assert (rowwise.mean(0) - expected).abs().le(error).all()
        assert error.max() < 0.15


def test_gradients_of_one_latent_invert_the_distribution_function() -> None:
    """In one dimension dz = -dF / density, here by finite differences."""
    parameters = [t.detach().clone() for t in (LOC[:, :1], SCALE[:, :1], LOGITS)]

    def cdf(z: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
        loc, scale, logits = at
        return (logits.softmax(-1) * torch.special.ndtr((z - loc[:, 0]) / scale[:, 0])).sum()

    tracked = [t.clone().requires_grad_() for t in parameters]
    z = mixture(*tracked).rsample()
    gradients = torch.autograd.grad(z.sum(), tracked)
    value, step = z.detach(), 1e-6
    density = mixture(*parameters).log_prob(value).exp()
    for index, gradient in enumerate(gradients):
        for entry in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in parameters]
                moved[index].view(-1)[entry] += sign * step
                ends.append(cdf(value, *moved))
            expected = -(ends[0] - ends[1]) / (2 * step) / density
            assert float(gradient.reshape(-1)[entry]) == pytest.approx(float(expected), rel=1e-5)


def test_without_gradients_it_only_samples() -> None:
    q = mixture(*[t.clone().requires_grad_() for t in (LOC, SCALE, LOGITS)])
    with torch.no_grad():
        assert not q.rsample((3,)).requires_grad
    torch.manual_seed(3)
    with_gradients = q.rsample((1000,))
    torch.manual_seed(3)
    torch.testing.assert_close(with_gradients.detach(), q.sample((1000,)), rtol=0, atol=0)


def test_equal_components_have_finite_gradients() -> None:
    loc = torch.zeros(2, 3, requires_grad=True)
    mixture(loc, torch.ones(2, 3), torch.zeros(2)).rsample((50,)).square().sum().backward()
    assert loc.grad is not None
    assert loc.grad.isfinite().all()


def test_many_latents_in_float32() -> None:
    loc = torch.randn(20, 5, 64, dtype=torch.float32).mul(3).requires_grad_()
    scale = torch.rand(20, 5, 64, dtype=torch.float32).add(0.01).requires_grad_()
    logits = torch.randn(20, 5, dtype=torch.float32).mul(3).requires_grad_()
    mixture(loc, scale, logits).rsample().square().sum().backward()
    for tensor in (loc, scale, logits):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert loc.grad is not None
    assert loc.grad.abs().max() < 1e3


def test_gradients_in_float32_with_a_component_far_away_in_one_dimension() -> None:
    """It is near in the dimensions before, whose densities a difference of sums would lose."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        loc = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=dtype, requires_grad=True)
        logits = torch.zeros(2, dtype=dtype, requires_grad=True)
        scale = torch.tensor([[0.5, 0.002]] * 2, dtype=dtype)
        q = NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
        value = torch.tensor([[1.0, 0.006]], dtype=dtype)
        q.sample = lambda sample_shape=(), value=value: value
        grads.append(torch.autograd.grad(q.rsample()[..., 1].sum(), [logits, loc]))
    for single, double in zip(*grads, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
