"""Priors with a context: each encoder, enumerated contexts, particles, errors."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import traced
from pyro import poutine
from torch import nn

from pyro_vae.conditional_priors import ConditionalPrior, Unconditional
from pyro_vae.conditioning import Embed, OneHot
from pyro_vae.flows import inverse_autoregressive
from pyro_vae.nets import (
    MLP,
    ConvEncoder,
    FlowEncoder,
    MixtureEncoder,
    MultivariateNormalEncoder,
    NormalEncoder,
)
from pyro_vae.priors import GaussianMixturePrior, StandardNormalPrior

NUM_CLASSES = 3


def of_class(width: int) -> nn.Module:
    return nn.Sequential(OneHot(NUM_CLASSES), MLP(NUM_CLASSES, [7], width, activation=nn.Tanh))


ENCODERS = {
    "normal": lambda: NormalEncoder(of_class(4)),
    "multivariate": lambda: MultivariateNormalEncoder(of_class(5), 2),
    "flow": lambda: FlowEncoder(of_class(4 + 3), 2, inverse_autoregressive(2, context_dim=3)),
    "mixture": lambda: MixtureEncoder(of_class(4 * 5), 4),
}


@pytest.fixture(params=ENCODERS)
def prior(request: pytest.FixtureRequest) -> ConditionalPrior:
    return ConditionalPrior(ENCODERS[request.param]())


def sampled(prior: Any, context: torch.Tensor, num_rows: int, **given: torch.Tensor) -> Any:
    def program() -> torch.Tensor:
        with pyro.plate("data", num_rows):
            return prior(context)

    return traced(poutine.condition(program, data=given))


def test_it_samples_from_the_encoder(prior: ConditionalPrior) -> None:
    y = torch.tensor([2, 0, 1, 1, 2])
    trace = sampled(prior, y, 5)
    site = trace.nodes["z"]
    assert site["value"].shape == (5, 2)
    assert trace.nodes["_RETURN"]["value"] is site["value"]
    torch.testing.assert_close(site["log_prob"], prior.encoder(y).log_prob(site["value"]))
    other = prior.encoder((y + 1) % 3).log_prob(site["value"])
    assert ((other - site["log_prob"]).abs() > 1e-6).all()


def test_its_density_is_normalised(prior: ConditionalPrior) -> None:
    grid = torch.linspace(-12, 12, 241)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).flatten(0, 1)
    for label in range(NUM_CLASSES):
        y = torch.full((len(z),), label)
        with torch.no_grad():
            density = sampled(prior, y, len(z), z=z).nodes["z"]["log_prob"].exp()
        assert float(density.sum() * (grid[1] - grid[0]) ** 2) == pytest.approx(1, abs=1e-4)


def test_every_parameter_gets_a_gradient_and_a_name(prior: ConditionalPrior) -> None:
    y = torch.tensor([2, 0, 1, 1, 2])
    sampled(prior, y, 5, z=torch.randn(5, 2)).log_prob_sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    names = list(pyro.get_param_store().keys())
    assert names
    assert all(name.startswith(prior._pyro_name) for name in names)


def test_particles_and_enumerated_classes(prior: ConditionalPrior) -> None:
    classes = torch.arange(NUM_CLASSES).unsqueeze(1)  # as Pyro enumerates them
    site = sampled(prior, classes, 5).nodes["z"]
    assert site["value"].shape == (NUM_CLASSES, 5, 2)
    assert site["value"].flatten(0, 1).unique(dim=0).shape == (3 * 5, 2)
    for label in range(NUM_CLASSES):
        alone = sampled(prior, torch.full((5,), label), 5, z=site["value"][label])
        torch.testing.assert_close(site["log_prob"][label], alone.nodes["z"]["log_prob"])
    y = torch.tensor([2, 0, 1, 1, 2])
    with pyro.plate("particles", 4, dim=-2):
        site = sampled(prior, y, 5).nodes["z"]
    assert site["value"].shape == (4, 5, 2)
    torch.testing.assert_close(site["log_prob"], prior.encoder(y).log_prob(site["value"]))


def test_a_state_dict_brings_the_same_density(prior: ConditionalPrior, tmp_path: Any) -> None:
    y, z = torch.tensor([2, 0, 1]), torch.randn(3, 2)
    before = prior.encoder(y).log_prob(z).detach()
    torch.save(prior.state_dict(), tmp_path / "prior.pt")
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    assert not torch.allclose(prior.encoder(y).log_prob(z), before)
    prior.load_state_dict(torch.load(tmp_path / "prior.pt", weights_only=True))
    torch.testing.assert_close(prior.encoder(y).log_prob(z).detach(), before)


@pytest.mark.parametrize(
    ("network", "context"),
    [
        (nn.Sequential(Embed(3, 4), MLP(4, [7], 4)), torch.tensor([2, 0, 1])),
        (MLP(6, [7], 4), torch.randn(3, 6)),
        (ConvEncoder((1, 8, 4), [3], 4), torch.rand(3, 1, 8, 4)),
    ],
    ids=["embedded", "vector", "image"],
)
def test_kinds_of_context(network: nn.Module, context: torch.Tensor) -> None:
    prior = ConditionalPrior(NormalEncoder(network.double()), site="code")
    context = context.double() if context.is_floating_point() else context
    assert sampled(prior, context, 3).nodes["code"]["value"].shape == (3, 2)


def test_a_code_may_be_a_class() -> None:
    class Categorical(nn.Module):
        def forward(self, y: torch.Tensor) -> dist.Categorical:
            return dist.Categorical(logits=torch.eye(3)[y])

    site = sampled(ConditionalPrior(Categorical()), torch.tensor([2, 0, 1, 1]), 4).nodes["z"]
    assert site["log_prob"].shape == (4,)


# Unconditional.


@pytest.mark.parametrize("make", [StandardNormalPrior, lambda d: GaussianMixturePrior(d, 3)])
def test_a_wrapped_prior_ignores_the_context(make: Any) -> None:
    inner = make(2)
    prior, z = Unconditional(inner), torch.randn(4, 2)
    densities = [
        sampled(prior, context, 4, z=z).nodes["z"]["log_prob"]
        for context in (torch.tensor([2, 0, 1, 1]), torch.rand(4, 1, 8, 8))
    ]
    assert densities[0].equal(densities[1])

    def alone() -> None:
        with pyro.plate("data", 4):
            inner()

    expected = traced(poutine.condition(alone, data={"z": z})).nodes["z"]["log_prob"]
    torch.testing.assert_close(densities[0], expected)


def test_a_plain_function_can_be_wrapped() -> None:
    def function() -> torch.Tensor:
        return pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))

    trace = sampled(Unconditional(function), torch.tensor([2, 0]), 2)
    assert trace.nodes["level"]["value"].shape == (2,)


def test_parameters_of_two_wrapped_priors_do_not_collide() -> None:
    first, second = (Unconditional(GaussianMixturePrior(2, 3)) for _ in range(2))
    names = []
    for prior in (first, second):
        pyro.clear_param_store()
        sampled(prior, torch.zeros(4), 4)
        names.append(set(pyro.get_param_store().keys()))
    assert names[0]
    assert names[0].isdisjoint(names[1])


# Errors.


class Returns(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, context: torch.Tensor) -> Any:
        return self.fn


def test_a_network_that_returns_no_distribution() -> None:
    match = "ConditionalPrior: expected the encoder to return a distribution, got Tensor.*NormalEnc"
    with pytest.raises(TypeError, match=match):
        sampled(ConditionalPrior(of_class(4)), torch.tensor([2, 0]), 2)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(torch.zeros(3, 2), 1.0),  # .to_event(1) forgotten
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(1),  # another number of rows
        dist.Normal(torch.zeros(3), 1.0),
        dist.Categorical(torch.ones(2, 4)),
        dist.Normal(torch.zeros(2), 1.0).to_event(1),  # the batch averaged away
        dist.Categorical(torch.ones(4)),
    ],
)
def test_codes_of_other_rows(fn: Any) -> None:
    match = r"ConditionalPrior: expected one code for each row of the context, got.*to_event\(1\)"
    with pytest.raises(ValueError, match=match):
        sampled(ConditionalPrior(Returns(fn)), torch.tensor([2, 0, 1]), 3)


def test_classes_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"OneHot: expected classes 0 ... 2 in y, got 3"):
        sampled(ConditionalPrior(NormalEncoder(of_class(4))), torch.tensor([3, 0]), 2)
