"""Hierarchies of latents: exact answers of linear-Gaussian chains, guides, errors."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, normal_x, traced
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import likelihoods, scale_kl
from pyro_vae.datasets import load_digits
from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.guides import AmortizedBottomUp, AmortizedLadder
from pyro_vae.guides.hierarchical import _product
from pyro_vae.models import VAE, HierarchicalVAE
from pyro_vae.nets import MLP, MultivariateNormalEncoder
from pyro_vae.priors import HierarchicalPrior, StandardNormalPrior
from pyro_vae.schedules import LinearWarmup


class LinearNormal(nn.Module):
    """N(weight z + bias, diag scale^2), without parameters."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def loc(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.weight.T + self.bias

    def forward(self, z: torch.Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.loc(z), self.scale).to_event(1)


class Decoder(nn.Module):
    def __init__(self, bottom: LinearNormal) -> None:
        super().__init__()
        self.bottom = bottom

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.bottom.loc(z)


class Chain:
    """x <- z1 <- z2 <- ..., linear with fixed noise, and the joint normal of all of them.

    Args:
        links: From the top to the data.
    """

    def __init__(self, links: Sequence[LinearNormal]) -> None:
        *conditionals, bottom = links
        depth, top_dim = len(links), links[0].weight.shape[1]
        prior = HierarchicalPrior(StandardNormalPrior(top_dim, site=f"z{depth}"), conditionals)
        self.model = VAE(Decoder(bottom), likelihoods.Normal(bottom.scale), prior)
        # Of (z_top, ..., z1, x), one link after the other.
        mean, cov = torch.zeros(top_dim), torch.eye(top_dim)
        for link in links:
            above = slice(len(mean) - link.weight.shape[1], len(mean))
            cross = link.weight @ cov[above]
            own = cross[:, above] @ link.weight.T + link.scale.square().diag()
            mean = torch.cat([mean, link.loc(mean[above])])
            cov = torch.cat([torch.cat([cov, cross.T], 1), torch.cat([cross, own], 1)])
        self.mean, self.cov = mean, cov
        dims = [top_dim, *(len(link.bias) for link in links)]
        starts = torch.tensor([0, *dims]).cumsum(0).tolist()
        names = [*(f"z{level}" for level in range(depth, 0, -1)), "x"]
        self.at = {
            name: slice(start, start + dim)
            for name, start, dim in zip(names, starts, dims, strict=False)
        }

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        at = self.at["x"]
        return dist.MultivariateNormal(self.mean[at], self.cov[at, at]).log_prob(x)

    def given(self, name: str, other: str, value: torch.Tensor) -> dist.TorchDistribution:
        """The exact conditional p(name | other)."""
        a, b = self.at[name], self.at[other]
        gain = torch.linalg.solve(self.cov[b, b], self.cov[b, a]).T
        cov = self.cov[a, a] - gain @ self.cov[b, a]
        loc = self.mean[a] + (value - self.mean[b]) @ gain.T
        return dist.MultivariateNormal(loc, (cov + cov.T) / 2)


def random_link(below: int, above: int) -> LinearNormal:
    weight = torch.randn(below, above) / 2
    return LinearNormal(weight, torch.randn(below), torch.rand(below) + 0.7)


def three_layers() -> Chain:
    return Chain([random_link(2, 2), random_link(3, 2), random_link(4, 3)])


def test_the_exact_posterior_gives_the_exact_likelihood_with_every_weight() -> None:
    chain, x = three_layers(), normal_x(BATCH)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", chain.given("z1", "x", x))
            z2 = pyro.sample("z2", chain.given("z2", "z1", z1))
            pyro.sample("z3", chain.given("z3", "z2", z2))

    estimate = importance_weighted_log_likelihood(chain.model, guide, x, num_particles=20)
    torch.testing.assert_close(estimate.log_likelihood, chain.log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.elbo, chain.log_prob(x), rtol=0, atol=1e-10)
    assert (estimate.standard_error < 1e-7).all()


def bottom_up() -> tuple[Any, Callable[..., Any]]:
    networks = [MLP(4, [], 2 * 3), MLP(3, [], 2 * 2), MLP(2, [], 2 * 2)]
    return three_layers(), AmortizedBottomUp(networks)


def ladder() -> tuple[Any, Callable[..., Any]]:
    chain = three_layers()
    networks = [MLP(4, [], 8), MLP(8, [], 8), MLP(8, [], 8)]
    heads = [MLP(8, [], 2 * 3), MLP(8, [], 2 * 2), MLP(8, [], 2 * 2)]
    return chain, AmortizedLadder(chain.model.prior, networks, heads)


@pytest.mark.parametrize("make", [bottom_up, ladder])
def test_trained_guides_agree_with_the_exact_likelihood(make: Any) -> None:
    chain, guide = make()
    x = normal_x(BATCH)
    svi = SVI(chain.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    many = x.repeat(20, 1)
    for _ in range(100):
        svi.step(many)
    estimate = importance_weighted_log_likelihood(chain.model, guide, x, num_particles=4000)
    error = (estimate.log_likelihood - chain.log_prob(x)).abs()
    assert (error < 5 * estimate.standard_error).all()
    assert (estimate.pareto_k < 0.7).all()
    assert (estimate.standard_error < 0.1).all()
    assert (estimate.elbo < chain.log_prob(x)).all()


def raw(scale: torch.Tensor) -> torch.Tensor:
    """What NormalEncoder turns into ``scale``."""
    return (scale - 1e-6).expm1().log()


def affine(weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> nn.Linear:
    """A head for N(weight x + bias, diag scale^2)."""
    head = nn.Linear(weight.shape[1], 2 * len(scale))
    head.weight.data = torch.cat([weight, torch.zeros_like(weight)])
    head.bias.data = torch.cat([bias, raw(scale)])
    return head


def test_a_linear_ladder_is_the_exact_posterior_where_loadings_are_orthogonal() -> None:
    """With W^T W diagonal the likelihood is a diagonal normal in z1: the head's own."""
    noise, scale = torch.tensor(0.7), torch.tensor([0.5, 0.8, 1.1])
    weight = torch.linalg.qr(torch.randn(4, 3)).Q * torch.tensor([2.0, 1.0, 0.5])
    upper = torch.tensor([[1.5, 0.0], [-0.7, 0.0], [0.0, 0.9]])  # z2's posterior is diagonal.
    chain = Chain(
        [
            LinearNormal(upper, torch.tensor([0.3, -0.2, 0.1]), scale),
            LinearNormal(weight, torch.tensor([1.0, 0.0, -1.0, 0.5]), noise.expand(4)),
        ]
    )
    squares = weight.square().sum(0)
    inverse = (weight / squares).T
    bottom = affine(inverse, -inverse @ torch.tensor([1.0, 0.0, -1.0, 0.5]), noise / squares.sqrt())
    at_zero = chain.given("z2", "x", torch.zeros(4))
    gain = torch.stack([chain.given("z2", "x", e).mean - at_zero.mean for e in torch.eye(4)], 1)
    cov = at_zero.covariance_matrix
    torch.testing.assert_close(cov, cov.diagonal().diag())
    top = affine(gain, at_zero.mean, cov.diagonal().sqrt())
    guide = AmortizedLadder(chain.model.prior, [nn.Identity(), nn.Identity()], [bottom, top])
    x = normal_x(BATCH)
    estimate = importance_weighted_log_likelihood(chain.model, guide, x, num_particles=20)
    torch.testing.assert_close(estimate.log_likelihood, chain.log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.elbo, chain.log_prob(x), rtol=0, atol=1e-10)
    assert (estimate.standard_error < 1e-7).all()


# Products of normals.


def test_the_product_adds_precisions() -> None:
    first = dist.Normal(torch.randn(7, 5, 3), torch.rand(7, 5, 3) + 0.1).to_event(1)
    second = dist.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1).to_event(1)
    q = _product(second, first, "z1")
    precision = first.variance**-1 + second.variance**-1
    mean = (first.mean / first.variance + second.mean / second.variance) / precision
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.variance, 1 / precision)


@pytest.mark.parametrize("ratio", [1e-24, 1e-6, 1.0, 1e6, 1e24])
def test_the_product_of_very_unequal_normals(ratio: float) -> None:
    for dtype in (torch.float32, torch.float64):
        scales = torch.tensor([[1e-6], [1e-6 * ratio]], dtype=dtype).requires_grad_()
        locs = torch.tensor([[2.0], [3.0]], dtype=dtype).requires_grad_()
        up, down = (dist.Normal(loc, s).to_event(1) for loc, s in zip(locs, scales, strict=True))
        q = _product(up, down, "z1")
        expected = 2.5 if ratio == 1 else 3.0 if ratio < 1 else 2.0
        assert float(q.mean.detach()) == pytest.approx(expected)
        smaller = 1e-6 * (2**-0.5 if ratio == 1 else min(1, ratio))
        scale = q.base_dist.scale
        assert float(scale.detach()) == pytest.approx(smaller, rel=1e-3)
        (q.mean.sum() + scale.log().sum()).backward()
        assert locs.grad.isfinite().all()
        assert scales.grad.isfinite().all()


# Ladder and bottom-up guides.


def digits_pair() -> tuple[VAE, AmortizedLadder]:
    model = HierarchicalVAE([6, 4, 2], MLP(6, [16], 64), likelihoods.Bernoulli(), hidden=[16])
    networks = [MLP(64, [], 16), MLP(16, [16], 16), MLP(16, [16], 16)]
    heads = [MLP(16, [], 2 * 6), MLP(16, [], 2 * 4), MLP(16, [], 2 * 2)]
    return model, AmortizedLadder(model.prior, networks, heads)


def test_a_ladder_trains_on_digits_with_warm_up_and_closed_form_kls() -> None:
    (images, _), _ = load_digits()
    x = (images[:200].flatten(1) > 0.5).to(torch.get_default_dtype())
    model, guide = digits_pair()
    before = {name: p.clone() for m in (model, guide) for name, p in m.named_parameters()}
    beta = LinearWarmup(20)
    svi = SVI(
        scale_kl(model, beta),
        scale_kl(guide, beta),
        pyro.optim.Adam({"lr": 0.01}),
        TraceMeanField_ELBO(),
    )
    losses = []
    for _ in range(40):
        losses.append(svi.step(x))
        beta.step()
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    for program in (model, guide):
        for name, parameter in program.named_parameters():
            assert parameter.isfinite().all()
            assert (parameter - before[name]).abs().max() > 1e-4, name


def test_closed_form_kls_of_a_ladder_are_those_of_samples() -> None:
    model, guide = digits_pair()
    x = (torch.rand(2, 64) > 0.5).double()
    num = 2000
    many = x.repeat(num, 1)

    def per_datum(elbo: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.tensor(
                [elbo.loss(model, guide, rows) / len(rows) for rows in many.chunk(20)]
            )

    closed, sampled = per_datum(TraceMeanField_ELBO()), per_datum(Trace_ELBO())
    error = ((closed.var() + sampled.var()) / 20).sqrt()
    assert (closed.mean() - sampled.mean()).abs() < 5 * error


def test_the_order_of_the_sites() -> None:
    x = normal_x(BATCH)
    for make, expected in ((bottom_up, ["z1", "z2", "z3"]), (ladder, ["z3", "z2", "z1"])):
        _, guide = make()
        assert [n for n in traced(guide, x).nodes if n.startswith("z")] == expected


def test_bottom_up_is_what_its_networks_say() -> None:
    networks = [MLP(4, [], 2 * 3), MLP(3, [], 2 * 2)]
    x = normal_x(BATCH)
    trace = traced(AmortizedBottomUp(networks, sites=["low", "high"]), x)
    for site, network, given in (
        ("low", networks[0], x),
        ("high", networks[1], trace.nodes["low"]["value"]),
    ):
        loc, scale = network(given).chunk(2, -1)
        fn = trace.nodes[site]["fn"]
        torch.testing.assert_close(fn.mean, loc)
        torch.testing.assert_close(fn.stddev, nn.functional.softplus(scale) + 1e-6)


def test_a_ladder_is_the_product_with_the_models_conditionals() -> None:
    chain, guide = ladder()
    x = normal_x(BATCH)
    trace = traced(guide, x)
    feature, normals = x, []
    for network, head in zip(guide.networks, guide.encoders, strict=True):
        feature = network(feature)
        normals.append(head(feature))
    torch.testing.assert_close(trace.nodes["z3"]["fn"].mean, normals[2].mean)
    for level, conditional in ((2, chain.model.prior.conditionals[0]), (1, None)):
        conditional = conditional or chain.model.prior.conditionals[1]
        p = conditional(trace.nodes[f"z{level + 1}"]["value"])
        up = normals[level - 1]
        precision = p.variance**-1 + up.variance**-1
        fn = trace.nodes[f"z{level}"]["fn"]
        torch.testing.assert_close(fn.variance, 1 / precision)
        torch.testing.assert_close(
            fn.mean, (p.mean / p.variance + up.mean / up.variance) / precision
        )


def test_a_ladder_follows_the_model_and_holds_none_of_its_parameters() -> None:
    model, guide = digits_pair()
    shared = {id(p) for p in model.parameters()}
    assert not shared & {id(p) for p in guide.parameters()}
    assert not any("conditionals" in name for name in guide.state_dict())
    x = torch.ones(2, 64)
    trace = traced(guide, x)
    before = trace.log_prob_sum()
    with torch.no_grad():
        for parameter in model.prior.conditionals.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = traced(poutine.replay(guide, trace=trace), x).log_prob_sum()
    assert not torch.allclose(before, after)


def test_sites_of_ones_own() -> None:
    prior = HierarchicalPrior(
        StandardNormalPrior(2, site="top"), [LinearNormal(*_unit(3, 2))], sites=["low"]
    )
    model = VAE(MLP(3, [], 4), likelihoods.Normal(), prior)
    networks, heads = [MLP(4, [], 5), MLP(5, [], 5)], [MLP(5, [], 6), MLP(5, [], 4)]
    guides = (
        AmortizedLadder(prior, networks, heads, top_site="top"),
        AmortizedBottomUp([MLP(4, [], 6), MLP(3, [], 4)], sites=["low", "top"]),
    )
    for guide in guides:
        x = normal_x(BATCH)
        estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=10)
        assert estimate.log_likelihood.isfinite().all()


def _unit(below: int, above: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(below, above), torch.zeros(below), torch.ones(below)


# The model.


def test_latents_are_listed_from_the_data_upwards() -> None:
    decoder = MLP(5, [7], 4)
    model = HierarchicalVAE([5, 3, 2], decoder, likelihoods.Normal(), hidden=[6, 8])
    trace = traced(model, normal_x(BATCH))
    shapes = {name: trace.nodes[name]["value"].shape[-1] for name in ("z1", "z2", "z3")}
    assert shapes == {"z1": 5, "z2": 3, "z3": 2}
    assert list(model.prior.sites) == ["z2", "z1"]
    nets = [conditional.net for conditional in model.prior.conditionals]
    assert [[layer.out_features for layer in list(net)[::2]] for net in nets] == [
        [6, 8, 6],
        [6, 8, 10],
    ]
    assert isinstance(nets[0][1], nn.ReLU)
    tanh = HierarchicalVAE(
        [5, 3], decoder, likelihoods.Normal(), hidden=[6], activation=nn.Tanh, name="mine"
    )
    assert isinstance(tanh.prior.conditionals[0].net[1], nn.Tanh)
    assert tanh._pyro_name == "mine"


def test_names_are_numbered() -> None:
    names = [
        HierarchicalVAE([2, 1], MLP(2, [], 4), likelihoods.Normal(), hidden=[])._pyro_name
        for _ in range(2)
    ]
    assert len(set(names)) == 2
    assert all(name.startswith("HierarchicalVAE") for name in names)


def test_float32() -> None:
    model, guide = digits_pair()
    x = (torch.rand(3, 64) > 0.5).float()
    estimate = importance_weighted_log_likelihood(model.float(), guide.float(), x, num_particles=5)
    assert estimate.log_likelihood.isfinite().all()
    assert guide(x).dtype == torch.float32


# Errors.


def test_bad_arguments_of_the_model() -> None:
    decoder, likelihood = MLP(2, [], 4), likelihoods.Normal()
    with pytest.raises(ValueError, match=r"HierarchicalVAE: expected two or more .* got \[2\]"):
        HierarchicalVAE([2], decoder, likelihood, hidden=[])
    with pytest.raises(ValueError, match="HierarchicalVAE: expected latent_dims >= 1, got 0"):
        HierarchicalVAE([2, 0], decoder, likelihood, hidden=[])
    with pytest.raises(TypeError, match="HierarchicalVAE: expected an integer latent_dims"):
        HierarchicalVAE([2, 1.5], decoder, likelihood, hidden=[])  # type: ignore[list-item]


def test_bad_arguments_of_the_guides() -> None:
    one, two = [MLP(4, [], 4)], [MLP(4, [], 4), MLP(2, [], 2)]
    with pytest.raises(ValueError, match="AmortizedBottomUp: expected two or more networks, .*1"):
        AmortizedBottomUp(one)
    for sites in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="AmortizedBottomUp: expected 2 different sites"):
            AmortizedBottomUp(two, sites=sites)
    prior = HierarchicalPrior(StandardNormalPrior(1, site="z2"), [LinearNormal(*_unit(2, 1))])
    with pytest.raises(TypeError, match="expected a HierarchicalPrior, got StandardNormalPrior"):
        AmortizedLadder(StandardNormalPrior(2), two, two)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AmortizedLadder: expected 2 networks, .* got 1"):
        AmortizedLadder(prior, one, two)
    with pytest.raises(ValueError, match="AmortizedLadder: expected 2 heads, .* got 3"):
        AmortizedLadder(prior, two, [*two, *one])


def test_networks_that_do_not_fit() -> None:
    x = normal_x(BATCH)
    prior = HierarchicalPrior(StandardNormalPrior(1, site="z2"), [LinearNormal(*_unit(2, 1))])
    networks = [MLP(4, [], 5), MLP(5, [], 5)]
    heads = [MLP(5, [], 2), MLP(5, [], 2)]
    match = r"expected a head with 2 \* 2 outputs for site 'z1', got 2 \* 1. List networks"
    with pytest.raises(ValueError, match=match):
        AmortizedLadder(prior, networks, heads)(x)
    heads = [MLP(5, [], 2), MLP(5, [], 4)]  # The wrong way round.
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        AmortizedLadder(prior, networks, heads)(x)
    note = (
        "AmortizedLadder: the prior's conditional of site 'z1' got the code above, of shape (5, 2)"
    )
    assert raised.value.__notes__[0].startswith(note)
    images = x.reshape(BATCH, 1, 4)
    match = rf"expected the networks to encode each of {BATCH} rows into one code, got codes of"
    with pytest.raises(ValueError, match=f"AmortizedLadder: {match}"):
        AmortizedLadder(prior, networks, heads[::-1])(images)
    with pytest.raises(ValueError, match=f"AmortizedBottomUp: {match}"):
        AmortizedBottomUp([MLP(4, [], 4), MLP(2, [], 2)])(images)


def test_a_ladder_needs_normal_conditionals() -> None:
    conditional = MultivariateNormalEncoder(MLP(1, [], 5), 2)
    prior = HierarchicalPrior(StandardNormalPrior(1, site="z2"), [conditional])
    guide = AmortizedLadder(prior, [MLP(4, [], 5), MLP(5, [], 5)], [MLP(5, [], 4), MLP(5, [], 2)])
    match = "expected a diagonal normal as the prior's conditional of site 'z1', got Multivariate"
    with pytest.raises(TypeError, match=match):
        guide(normal_x(BATCH))
