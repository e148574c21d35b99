"""Likelihoods: normalised, equal to torch's and SciPy's densities, any leading dimensions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import nn

from pyro_vae import likelihoods
from pyro_vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    HeteroscedasticNormal,
    NegativeBinomial,
    Normal,
    Poisson,
)

# How to make each one, the width of the output for 3 data, and a datum of width 3.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.Tensor]] = {
    "Bernoulli": (Bernoulli, (3,), torch.tensor([0.0, 1.0, 1.0])),
    "ContinuousBernoulli": (ContinuousBernoulli, (3,), torch.tensor([0.0, 0.3, 1.0])),
    "Normal": (lambda: Normal(torch.tensor([0.5, 1.0, 2.0])), (3,), torch.tensor([0.0, -1, 2])),
    "HeteroscedasticNormal": (HeteroscedasticNormal, (6,), torch.tensor([0.0, -1, 2])),
    "Categorical": (Categorical, (3, 5), torch.tensor([0, 4, 2])),
    "Poisson": (Poisson, (3,), torch.tensor([0.0, 4.0, 2.0])),
    "NegativeBinomial": (
        lambda: NegativeBinomial((3,), inverse_dispersion=2.5),
        (3,),
        torch.tensor([0.0, 4.0, 2.0]),
    ),
}


def case(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...], torch.Tensor]:
    make, width, x = CASES[name]
    return make, width, x.double() if x.is_floating_point() else x


def outputs(*shape: int) -> torch.Tensor:
    return 0.7 * torch.randn(*shape)


def test_every_public_likelihood_is_among_the_cases() -> None:
    assert set(CASES) == set(likelihoods.__all__)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("leading", [(1,), (6,), (4, 6)])
def test_shapes(name: str, leading: tuple[int, ...]) -> None:
    make, width, x = case(name)
    fn = make()(outputs(*leading, *width))
    assert fn.batch_shape == leading
    assert fn.event_shape == (3,)
    assert fn.log_prob(x).shape == leading
    assert fn.log_prob(x).isfinite().all()
    assert fn.sample().shape == (*leading, 3)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_scored_alone(name: str) -> None:
    make, width, x = case(name)
    likelihood, out = make(), outputs(4, 6, *width)
    together = likelihood(out).log_prob(x)
    alone = torch.stack([likelihood(row).log_prob(x) for row in out.flatten(0, 1)])
    torch.testing.assert_close(together.flatten(), alone)


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical", "Poisson", "NegativeBinomial"])
def test_mass_functions_sum_to_one(name: str) -> None:
    make, width, _ = case(name)
    out = outputs(*width)
    support = {"Bernoulli": 2, "Categorical": 5}.get(name, 400)
    values = torch.arange(support).unsqueeze(-1).expand(-1, 3)
    values = values if name == "Categorical" else values.double()
    # One dimension at a time: the event is a product.
    total = make()(out).base_dist.log_prob(values).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.parametrize("name", ["ContinuousBernoulli", "Normal", "HeteroscedasticNormal"])
def test_densities_integrate_to_one(name: str) -> None:
    make, width, _ = case(name)
    low, high = (0.0, 1.0) if name == "ContinuousBernoulli" else (-40.0, 40.0)
    grid = torch.linspace(low, high, 200_001)
    density = make()(outputs(*width)).base_dist.log_prob(grid.unsqueeze(-1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid, dim=0), torch.ones(3))


def scipy_density(name: str, out: torch.Tensor, x: torch.Tensor) -> Any:
    o, v = out.numpy(), x.numpy()
    if name == "Bernoulli":
        return scipy.stats.bernoulli(1 / (1 + (-out).exp().numpy())).logpmf(v)
    if name == "Normal":
        return scipy.stats.norm(o, [0.5, 1.0, 2.0]).logpdf(v)
    if name == "HeteroscedasticNormal":
        scale = nn.functional.softplus(out[..., 3:]).numpy() + 1e-3
        return scipy.stats.norm(o[..., :3], scale).logpdf(v)
    if name == "Categorical":
        return out.log_softmax(-1).gather(-1, x.expand(out.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    if name == "Poisson":
        return scipy.stats.poisson(out.exp().numpy()).logpmf(v)
    if name == "NegativeBinomial":
        mean, r = out.exp().numpy(), 2.5
        return scipy.stats.nbinom(r, r / (r + mean)).logpmf(v)
    probs = out.sigmoid()  # the continuous Bernoulli, by its paper's equation 2
    constant = 2 * torch.atanh(1 - 2 * probs) / (1 - 2 * probs)
    return x * probs.log() + (1 - x) * (1 - probs).log() + constant.log()


@pytest.mark.parametrize("name", CASES)
def test_against_scipy(name: str) -> None:
    make, width, x = case(name)
    out = outputs(6, *width)
    expected = torch.as_tensor(scipy_density(name, out, x)).sum(-1)
    torch.testing.assert_close(make()(out).log_prob(x).detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    make, width, x = case(name)
    likelihood, out = make(), outputs(6, *width).requires_grad_()
    likelihood(out).log_prob(x).sum().backward()
    assert (out.grad != 0).all()
    for parameter_name, parameter in likelihood.named_parameters():
        assert (parameter.grad != 0).all(), parameter_name


@pytest.mark.parametrize("likelihood", [Bernoulli, ContinuousBernoulli, Poisson, Normal])
def test_images_as_events(likelihood: type) -> None:
    fn = likelihood(event_dim=3)(outputs(4, 6, 1, 2, 2))
    assert fn.batch_shape == (4, 6)
    assert fn.event_shape == (1, 2, 2)
    assert "event_dim=3" in repr(likelihood(event_dim=3))


def test_other_events() -> None:
    assert Categorical(event_dim=2)(outputs(6, 2, 3, 5)).event_shape == (2, 3)
    assert HeteroscedasticNormal(event_dim=2)(outputs(6, 2, 8)).event_shape == (2, 4)
    assert NegativeBinomial((2, 3))(outputs(6, 2, 3)).event_shape == (2, 3)
    assert Normal(torch.ones(2, 3), event_dim=2)(outputs(6, 2, 3)).event_shape == (2, 3)


def test_noise_is_fixed_or_learnt() -> None:
    fixed, learnt = Normal(0.5), Normal(torch.tensor([0.5, 2.0]), learn=True)
    assert not list(fixed.parameters())
    assert list(fixed.state_dict()) == ["log_scale"]
    torch.testing.assert_close(fixed.scale, torch.tensor(0.5))
    (parameter,) = learnt.parameters()
    torch.testing.assert_close(learnt.scale, torch.tensor([0.5, 2.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    data = torch.randn(4000, 2) * torch.tensor([2.0, 0.3])
    for _ in range(200):
        optimizer.zero_grad()
        (-learnt(torch.zeros(4000, 2)).log_prob(data).mean()).backward()
        optimizer.step()
    expected = data.square().mean(0).sqrt()
    torch.testing.assert_close(learnt.scale.detach(), expected, rtol=1e-3, atol=0.0)


def test_noise_follows_the_default_dtype() -> None:
    assert Normal(torch.ones(3).float()).scale.dtype == torch.float64


def test_heteroscedastic_noise_has_a_floor() -> None:
    fn = HeteroscedasticNormal(min_scale=0.1)(torch.tensor([[1.0, 2.0, -1e3, 0.0]]))
    torch.testing.assert_close(fn.mean, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(fn.stddev, torch.tensor([[0.1, 0.1 + math.log(2)]]))


def test_negative_binomial_moments_and_limit() -> None:
    out = torch.tensor([[0.0, 1.0, 2.0]])
    fn = NegativeBinomial((3,), inverse_dispersion=2.0)(out)
    torch.testing.assert_close(fn.mean, out.exp())
    torch.testing.assert_close(fn.variance, out.exp() + out.exp() ** 2 / 2)
    nearly = NegativeBinomial((3,), inverse_dispersion=1e7)(out)
    x = torch.tensor([0.0, 2.0, 5.0])
    torch.testing.assert_close(nearly.log_prob(x), Poisson()(out).log_prob(x), rtol=1e-5, atol=1e-5)


def test_bad_arguments() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="Normal: expected a positive, finite scale, got"):
            Normal(scale)
    for min_scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="HeteroscedasticNormal: expected min_scale > 0, got"):
            HeteroscedasticNormal(min_scale)
    for value in (0.0, -2.0):
        with pytest.raises(ValueError, match="NegativeBinomial: expected inverse_dispersion > 0"):
            NegativeBinomial((3,), value)
    with pytest.raises(ValueError, match="HeteroscedasticNormal: expected an even number of outp"):
        HeteroscedasticNormal()(torch.zeros(2, 5))
