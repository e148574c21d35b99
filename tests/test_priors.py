"""Priors: sub-programs that sample the latents of a model."""

import copy
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import biject_to

from pyro_vae import importance_weighted_log_likelihood, priors
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.models import VAE
from pyro_vae.nets import MLP, MultivariateNormalEncoder, NormalEncoder
from pyro_vae.priors import (
    FlowPrior,
    GaussianMixturePrior,
    HierarchicalPrior,
    StandardNormalPrior,
    VampPrior,
)

DATA_DIM = 6


def import_zuko() -> Any:
    zuko = pytest.importorskip("zuko")
    pyro.enable_validation(True)  # Importing it switches that of torch off.
    return zuko


def stirred(prior: Any, by: float = 0.1) -> Any:
    """The prior with parameters that are not those it starts with."""
    for parameter in prior.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return prior


def encoder(dim: int) -> nn.Module:
    return NormalEncoder(MLP(DATA_DIM, [7], 2 * dim, activation=nn.Tanh))


def full_encoder(dim: int) -> nn.Module:
    net = MLP(DATA_DIM, [7], dim + dim * (dim + 1) // 2, activation=nn.Tanh)
    return MultivariateNormalEncoder(net, dim)


def vamp(net: nn.Module) -> VampPrior:
    return VampPrior(net, torch.rand(5, DATA_DIM), limits=(0.0, 1.0))


def composed(dim: int) -> list[Any]:
    affine = dist.transforms.AffineTransform(0.3, 1.5)
    autoregressive = transforms.affine_autoregressive(dim, hidden_dims=[8])
    return [transforms.ComposeTransform([affine, autoregressive.inv])]


# By name: makes a prior of a given number of latents.
MAKE: dict[str, Callable[[int], Any]] = {
    "normal": StandardNormalPrior,
    "mixture": lambda d: stirred(GaussianMixturePrior(d, 4), 0.4),
    "vamp": lambda d: stirred(vamp(encoder(d))),
    "vamp of full covariances": lambda d: stirred(vamp(full_encoder(d))),
    "spline": lambda d: stirred(FlowPrior(d, [transforms.Spline(d, count_bins=4)])),
    "coupling": lambda d: stirred(
        FlowPrior(
            d,
            [
                transforms.affine_coupling(d, hidden_dims=[8]),
                transforms.permute(d, torch.arange(d).flip(0)),
                transforms.affine_coupling(d, hidden_dims=[8]),
            ],
        )
    ),
    "autoregressive": lambda d: stirred(
        FlowPrior(d, [transforms.affine_autoregressive(d, hidden_dims=[8])])
    ),
    "composed inverse": lambda d: stirred(FlowPrior(d, composed(d))),
    "zuko": lambda d: stirred(
        FlowPrior(d, import_zuko().flows.MAF(d, transforms=2, hidden_features=[8]))
    ),
}
NEED_TWO = ["coupling", "autoregressive", "composed inverse"]
LEARNT = [name for name in MAKE if name != "normal"]


def traced(program: Callable[..., Any], *args: Any, **data: torch.Tensor) -> poutine.Trace:
    """The trace of a program, at given values of some sites."""
    trace = poutine.trace(poutine.condition(program, data=data)).get_trace(*args)
    trace.compute_log_prob()
    return trace


def log_density(prior: Any, z: torch.Tensor) -> torch.Tensor:
    """Of codes ``(num, dim)``: nats, ``(num,)``."""

    def program() -> torch.Tensor:
        with pyro.plate("rows", len(z)):
            return prior()

    return traced(program, z=z).nodes["z"]["log_prob"]


def sample(prior: Any, num: int) -> torch.Tensor:
    with pyro.plate("rows", num), torch.no_grad():
        return prior()


def grid(dim: int, radius: float, num: int) -> tuple[torch.Tensor, float]:
    """Points ``(num**dim, dim)`` and the volume of each."""
    axis = torch.linspace(-radius, radius, num)
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim), float(axis[1] - axis[0]) ** dim


def test_standard_normal() -> None:
    prior = StandardNormalPrior(3)
    with poutine.trace() as tracer, pyro.plate("data", 5):
        code = prior()
    tracer.trace.compute_log_prob()
    site = tracer.trace.nodes["z"]
    assert code is site["value"]
    assert code.shape == (5, 3)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(site["log_prob"], normal.log_prob(code).sum(-1))


def test_standard_normal_under_particles() -> None:
    prior = StandardNormalPrior(3)
    with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
        assert prior().shape == (7, 5, 3)


def test_the_site_can_be_named() -> None:
    with poutine.trace() as tracer, pyro.plate("data", 5):
        StandardNormalPrior(3, site="code")()
    assert "code" in tracer.trace.nodes


def test_it_has_no_parameters_and_moves_with_its_module() -> None:
    prior = StandardNormalPrior(3)
    assert not list(prior.parameters())
    assert not prior.state_dict()
    with pyro.plate("data", 5):
        assert prior.float()().dtype == torch.float32


def test_latent_dim_below_one() -> None:
    with pytest.raises(ValueError, match="StandardNormalPrior: expected latent_dim >= 1, got 0"):
        StandardNormalPrior(0)


class TestEveryPrior:
    """What holds for each of them."""

    @pytest.mark.parametrize("dim", [1, 2])
    @pytest.mark.parametrize("name", MAKE)
    def test_normalised_and_sampled_from_its_density(self, name: str, dim: int) -> None:
        """Moments of samples against those of the density, by quadrature."""
        if (dim == 1 and name in NEED_TWO) or (dim == 2 and name == "spline"):
            pytest.skip("does not exist; acts on each latent alone")
        prior = MAKE[name](dim)
        with torch.no_grad():
            z, volume = grid(dim, *((12, 100_001) if dim == 1 else (16, 401)))
            density = log_density(prior, z).exp() * volume
        smooth = name in ("normal", "mixture") or "vamp" in name
        assert abs(float(density.sum()) - 1) < (1e-9 if smooth else 1e-4)
        draws = sample(prior, 20_000)
        assert draws.shape == (20_000, dim)

        def features(z: torch.Tensor) -> torch.Tensor:
            product = (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1)
            return torch.cat([z, product, (2 * z - 1).tanh(), (3 * z).sin()], -1)

        expected, values = density @ features(z), features(draws)
        error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - expected).abs() < 5 * error).all()

    @pytest.mark.parametrize("name", MAKE)
    def test_under_particles(self, name: str) -> None:
        prior = MAKE[name](2)

        def program() -> torch.Tensor:
            with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
                return prior()

        site = traced(program).nodes["z"]
        assert site["value"].shape == (7, 5, 2)
        assert len(site["value"].flatten(0, 1).unique(dim=0)) == 35
        alone = log_density(prior, site["value"].flatten(0, 1))
        torch.testing.assert_close(site["log_prob"], alone.reshape(7, 5))

    @pytest.mark.parametrize("name", MAKE)
    def test_hamiltonian_monte_carlo_can_move_its_codes(self, name: str) -> None:
        site = traced(MAKE[name](2)).nodes["z"]
        assert biject_to(site["fn"].support)(torch.zeros(2)).shape == (2,)

    @pytest.mark.parametrize("name", LEARNT)
    def test_gradients_against_finite_differences(self, name: str) -> None:
        """Of everything that shapes the density, the encoder of a VampPrior as well."""
        prior, z = MAKE[name](2), torch.randn(9, 2)
        parameters = list(prior.parameters())
        if isinstance(prior, VampPrior):
            parameters += list(prior._encoder[0].parameters())
        gradients = torch.autograd.grad(log_density(prior, z).sum(), parameters)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        # In two directions, not of single numbers.
        for seed in range(2):
            torch.manual_seed(seed)
            directions = [torch.randn_like(parameter) for parameter in parameters]
            ends = []
            for step in (1e-6, -2e-6):  # One step ahead, then to the other side.
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.data += step * direction
                ends.append(log_density(prior, z).sum().detach())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data += 1e-6 * direction
            slope = (ends[0] - ends[1]) / 2e-6
            pairs = zip(gradients, directions, strict=True)
            expected = torch.stack([(g * d).sum() for g, d in pairs]).sum()
            torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", LEARNT)
    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
    def test_in_a_vae(self, name: str, elbo: type[Trace_ELBO]) -> None:
        """It trains, is evaluated at once, without a warning, and can be copied afterwards."""
        x = torch.rand(8, DATA_DIM).round()
        prior = MAKE[name](2)
        guide = AmortizedNormal(MLP(DATA_DIM, [8], 4))
        if isinstance(prior, VampPrior):
            prior = vamp(guide.encoder)
        model = VAE(MLP(2, [8], DATA_DIM), Bernoulli(), prior)
        assert prior._pyro_name == f"{model._pyro_name}.prior"
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
        for _ in range(3):
            svi.step(x)
        for n, parameter in model.named_parameters():
            assert not torch.equal(before[n], parameter), n
        assert not {n for n in before if "encoder" in n}

        def log_likelihood(model: Any, guide: Any) -> torch.Tensor:
            pyro.set_rng_seed(1)
            estimate = importance_weighted_log_likelihood(
                model, guide, x, num_particles=9, chunk_size=4
            )
            return estimate.log_likelihood

        pair = copy.deepcopy((model, guide))
        expected = log_likelihood(model, guide)
        assert expected.isfinite().all()
        assert pair[0].prior._pyro_name == f"{pair[0]._pyro_name}.prior"
        svi.step(x)  # The copy does not follow.
        torch.testing.assert_close(log_likelihood(*pair), expected)
        assert not torch.allclose(log_likelihood(model, guide), expected)
        with torch.no_grad():
            assert poutine.uncondition(model)(x).shape == x.shape

    @pytest.mark.parametrize("name", LEARNT)
    def test_in_plain_functions(self, name: str) -> None:
        """Two priors in one script, one after the other: both train."""
        x = torch.randn(8, DATA_DIM)
        for _ in range(2):
            net = encoder(2)
            prior = vamp(net) if name == "vamp" else MAKE[name](2)
            if name == "vamp of full covariances":
                net = full_encoder(2)
                prior = vamp(net)

            def model(x: torch.Tensor, prior: Any = prior) -> None:
                pyro.module("prior", prior)
                with pyro.plate("rows", len(x)):
                    code = prior()
                    pyro.sample("data", dist.Normal(code.sum(-1, True), 1.0).to_event(1), obs=x)

            def guide(x: torch.Tensor, net: nn.Module = net) -> None:
                pyro.module("net", net)
                with pyro.plate("rows", len(x)):
                    pyro.sample("z", net(x))

            pyro.clear_param_store()  # Of "prior" and "net", which are the names of both.
            before = [p.detach().clone() for p in (*prior.parameters(), *net.parameters())]
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            svi.step(x)
            svi.step(x)
            after = [*prior.parameters(), *net.parameters()]
            assert not [1 for old, new in zip(before, after, strict=True) if torch.equal(old, new)]

    @pytest.mark.parametrize("name", LEARNT)
    def test_two_need_no_names(self, name: str) -> None:
        """Called by functions that register nothing, they share no entry of the param store."""
        for prior in (MAKE[name](2), MAKE[name](2)):

            def model(prior: Any = prior) -> None:
                with pyro.plate("rows", 4):
                    pyro.sample("sum", dist.Normal(prior().sum(-1), 1.0), obs=torch.ones(4))

            def guide() -> None:
                with pyro.plate("rows", 4):
                    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

            before = [p.detach().clone() for p in prior.parameters()]
            SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
            pairs = zip(before, prior.parameters(), strict=True)
            assert not [1 for old, new in pairs if torch.equal(old, new)]

    @pytest.mark.parametrize("name", LEARNT)
    def test_parameters_of_the_module_alone(self, name: str) -> None:
        """With Pyro's other way to keep parameters."""
        with pyro.settings.context(module_local_params=True):
            x, prior = torch.rand(8, DATA_DIM).round(), MAKE[name](2)
            guide = AmortizedNormal(MLP(DATA_DIM, [8], 4))
            if isinstance(prior, VampPrior):
                prior = vamp(guide.encoder)
            model = VAE(MLP(2, [8], DATA_DIM), Bernoulli(), prior)
            Trace_ELBO()(model, guide)(x).backward()
        assert all(p.grad.abs().max() > 0 for p in prior.parameters())

    @pytest.mark.parametrize("name", LEARNT)
    def test_state_and_dtype(self, name: str, tmp_path: Any) -> None:
        prior, other, z = MAKE[name](2), MAKE[name](2), torch.randn(4, 2)
        torch.save(prior.state_dict(), tmp_path / "state.pt")
        assert not torch.allclose(log_density(other, z), log_density(prior, z))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if isinstance(prior, VampPrior):
            assert list(prior.state_dict()) == ["pseudo_inputs"]
            other._encoder[0].load_state_dict(prior._encoder[0].state_dict())
        pyro.clear_param_store()
        expected = log_density(prior, z)
        torch.testing.assert_close(log_density(other, z), expected)
        torch.testing.assert_close(log_density(copy.deepcopy(prior), z), expected)
        if name in ("autoregressive", "composed inverse"):
            return  # Pyro's inverse starts from zeros of the default dtype.
        other.float()
        if isinstance(other, VampPrior):
            other._encoder[0].float()
        assert sample(other, 3).dtype == torch.float32
        log_p = log_density(other, z.float())
        assert log_p.dtype == torch.float32
        torch.testing.assert_close(log_p.double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", MAKE)
    def test_no_parameters_in_the_store_and_no_random_numbers(self, name: str) -> None:
        """By constructors: but for the initial values, nothing is drawn."""
        MAKE[name](2)
        assert not pyro.get_param_store().keys()
        if "vamp" in name or "coupling" in name:
            net, inputs = encoder(2), torch.rand(5, DATA_DIM)
            layers = [transforms.affine_coupling(2)]
            state = torch.get_rng_state()
            VampPrior(net, inputs)
            FlowPrior(2, layers)
            assert torch.equal(torch.get_rng_state(), state)


class TestGaussianMixturePrior:
    def test_against_the_sum(self) -> None:
        prior, z = MAKE["mixture"](3), torch.randn(7, 3)
        total = torch.zeros(7)
        for k in range(4):
            normal = torch.distributions.Normal(prior.locs[k], prior.scales[k])
            total = total + prior.weights[k] * normal.log_prob(z).sum(-1).exp()
        torch.testing.assert_close(log_density(prior, z), total.log())
        torch.testing.assert_close(prior.weights.sum(), torch.ones(()))

    def test_one_component_is_a_normal(self) -> None:
        prior, z = stirred(GaussianMixturePrior(2, 1), 0.4), torch.randn(7, 2)
        normal = torch.distributions.Normal(prior.locs[0], prior.scales[0])
        torch.testing.assert_close(log_density(prior, z), normal.log_prob(z).sum(-1))

    def test_it_starts_with_different_components(self) -> None:
        prior = GaussianMixturePrior(2, 3)
        assert len(prior.locs.unique(dim=0)) == 3
        assert (prior.scales == 1).all()
        torch.testing.assert_close(prior.weights, torch.full((3,), 1 / 3))

    def test_components_far_away_and_almost_without_weight(self) -> None:
        """In float32, where densities underflow and Categorical clamps probabilities."""
        prior = GaussianMixturePrior(2, 3).float()
        prior.locs.data = torch.tensor([[0.0, 0.0], [1e4, 0.0], [-3e3, 3e3]]).float()
        prior.raw_weights.data = torch.tensor([0.0, -200.0, 1.0]).float()
        prior.raw_scales.data[2] = -4.0
        z = torch.tensor([[0.5, 0.0], [1e4, 1.0], [500.0, 70.0]], dtype=torch.float32)
        log_p = log_density(prior, z)
        gradients = torch.autograd.grad(log_p.sum(), list(prior.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        exact = log_density(prior.double(), z.double())
        assert exact[1] < -200
        torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-5)

    def test_too_few(self) -> None:
        match = "GaussianMixturePrior: expected num_components >= 1, got 0"
        with pytest.raises(ValueError, match=match):
            GaussianMixturePrior(2, 0)
        with pytest.raises(ValueError, match="GaussianMixturePrior: expected latent_dim >= 1"):
            GaussianMixturePrior(0, 2)


class TestVampPrior:
    @pytest.mark.parametrize("make", [encoder, full_encoder])
    def test_against_the_sum(self, make: Callable[[int], nn.Module]) -> None:
        net, inputs, z = make(2), torch.rand(5, DATA_DIM), torch.randn(7, 2)
        total = torch.zeros(7)
        for k in range(5):
            q = net(inputs[k : k + 1])
            total = total + q.log_prob(z).exp() / 5
        torch.testing.assert_close(log_density(VampPrior(net, inputs), z), total.log())

    def test_images_under_a_convolution(self) -> None:
        net = NormalEncoder(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4)))
        prior = VampPrior(net, torch.rand(5, 1, 4, 4))
        assert sample(prior, 3).shape == (3, 2)

    def test_the_encoder_stays_the_guides(self) -> None:
        net = encoder(2)
        prior = VampPrior(net, torch.rand(5, DATA_DIM))
        assert [name for name, _ in prior.named_parameters()] == ["pseudo_inputs"]
        z = torch.randn(7, 2)
        before = log_density(prior, z)
        next(net.parameters()).data += 0.5
        assert not torch.allclose(log_density(prior, z), before)

    def test_a_copy_of_both_follows_the_copied_guide(self) -> None:
        guide = AmortizedNormal(MLP(DATA_DIM, [8], 4))
        prior = VampPrior(guide.encoder, torch.rand(5, DATA_DIM))
        other, other_guide = copy.deepcopy((prior, guide))
        assert other._encoder[0] is other_guide.encoder
        assert copy.deepcopy(prior)._encoder[0] is not guide.encoder

    def test_the_pseudo_inputs_are_copied(self) -> None:
        inputs = torch.rand(5, DATA_DIM)
        prior, before = VampPrior(encoder(2), inputs), inputs.clone()
        prior.pseudo_inputs.data += 1
        assert torch.equal(inputs, before)
        assert prior.pseudo_inputs.requires_grad

    def test_limits(self) -> None:
        """Beyond them nothing changes; on them, where binary data start, the inputs still learn."""
        net, z = encoder(2), torch.randn(7, 2)
        inputs = torch.rand(5, DATA_DIM).round()
        prior = VampPrior(net, inputs, limits=(0.0, 1.0))
        (gradient,) = torch.autograd.grad(log_density(prior, z).sum(), [prior.pseudo_inputs])
        assert (gradient != 0).all()
        expected = log_density(prior, z)
        prior.pseudo_inputs.data += 5 * (2 * inputs - 1)
        torch.testing.assert_close(log_density(prior, z), expected)

    def test_the_encoder_is_tried_without_side_effects(self) -> None:
        net = NormalEncoder(nn.Sequential(nn.BatchNorm1d(DATA_DIM), nn.Dropout(), MLP(6, [], 4)))
        state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        VampPrior(net, torch.ones(5, DATA_DIM))
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(module.training for module in net.modules())

    @pytest.mark.parametrize(
        ("inputs", "error", "match"),
        [
            ([[0.0]], TypeError, "pseudo_inputs to be a float tensor, got list"),
            (torch.ones(2, 6, dtype=torch.uint8), TypeError, "got dtype torch.uint8.*Convert"),
            (torch.zeros(0, 6), ValueError, r"at least one pseudo-input, got shape \(0, 6\)"),
            (torch.zeros(()), ValueError, r"at least one pseudo-input, got shape \(\)"),
            (torch.full((2, 6), math.nan), ValueError, "finite pseudo_inputs, got 12 values"),
            (torch.full((2, 6), 1.5), ValueError, r"limits \(0.0, 1.0\), got values in \[1.5, 1.5"),
            (
                torch.ones(2, 5).double(),
                ValueError,
                r"the encoder takes, got shape \(2, 5\).*MLP: expected",
            ),
            (
                torch.ones(6).double(),
                ValueError,
                r"each of 6 .*batch shape \(\) .* of shape \(6,\)",
            ),
        ],
    )
    def test_pseudo_inputs_that_cannot_be(
        self, inputs: Any, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=f"VampPrior: expected .*{match}") as raised:
            VampPrior(encoder(2), inputs, limits=(0.0, 1.0))
        if "takes" in match:
            assert isinstance(raised.value.__cause__, ValueError)

    def test_limits_that_cannot_be(self) -> None:
        with pytest.raises(ValueError, match=r"VampPrior: expected limits .* got \(1.0, 0.0\)"):
            VampPrior(encoder(2), torch.ones(2, 6), limits=(1.0, 0.0))

    def test_what_is_no_encoder(self) -> None:
        inputs = torch.ones(2, 6)
        with pytest.raises(TypeError, match="VampPrior: expected the guide's encoder, a module, "):
            VampPrior(encoder(2).forward, inputs)  # type: ignore[arg-type]
        match = "VampPrior: expected the encoder to return a distribution, got Tensor. Wrap it in"
        with pytest.raises(TypeError, match=match):
            VampPrior(MLP(6, [], 4), inputs)

        class Forgetful(nn.Module):
            def forward(self, x: torch.Tensor) -> dist.TorchDistribution:
                return dist.Normal(x, 1.0)

        with pytest.raises(ValueError, match=r"batch shape \(2, 6\) .* was `.to_event\(1\)` forgo"):
            VampPrior(Forgetful(), inputs)


class TestFlowPrior:
    def test_an_affine_flow_is_a_normal(self) -> None:
        layers = [transforms.AffineTransform(2.0, 3.0), transforms.AffineTransform(1.0, -0.5)]
        z = torch.randn(7, 2)
        expected = torch.distributions.Normal(0.0, 1.5).log_prob(z).sum(-1)
        torch.testing.assert_close(log_density(FlowPrior(2, layers), z), expected)

    @pytest.mark.parametrize("name", ["composed inverse", "autoregressive", "coupling", "spline"])
    def test_what_the_transforms_remember_does_not_count(self, name: str) -> None:
        """The same tensor again, after an update, after a sample, with and without gradients."""
        prior, z = MAKE[name](2), torch.randn(7, 2)
        with torch.no_grad():
            log_density(prior, z)
        assert log_density(prior, z).requires_grad
        for parameter in prior.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        again = log_density(prior, z)
        torch.testing.assert_close(again, log_density(prior, z.clone()))
        again.sum().backward()
        log_density(prior, z).sum().backward()  # No graph is shared.
        drawn = sample(prior, 7)
        parameters = list(prior.parameters())
        first = torch.autograd.grad(log_density(prior, drawn).sum(), parameters)
        second = torch.autograd.grad(log_density(prior, drawn.clone()).sum(), parameters)
        torch.testing.assert_close(first, second)

    def test_parts_of_compositions_and_inverses_train_and_move(self) -> None:
        layer, spline = transforms.affine_autoregressive(2), transforms.Spline(2)
        inner = transforms.ComposeTransformModule([layer.inv, spline])
        other = transforms.Spline(2)
        outer = transforms.ComposeTransform([transforms.ComposeTransform([other]).inv])
        prior = FlowPrior(2, [inner, outer, layer])
        held = {id(parameter) for parameter in prior.parameters()}
        wanted = [p for part in (layer, spline, other) for p in part.parameters()]
        assert held == {id(parameter) for parameter in wanted}
        state = prior.state_dict().values()
        assert len({value.data_ptr() for value in state}) == len(state)  # No names for the same.

    def test_buffers_stand_where_the_transforms_do(self) -> None:
        prior = FlowPrior(2, [transforms.Spline(2).float()])
        assert sample(prior, 3).dtype == torch.float32
        assert not {"flow.loc", "flow.scale"} & set(prior.state_dict())

    def test_batch_normalisation_is_only_tried(self) -> None:
        layer = transforms.batchnorm(2)
        FlowPrior(2, [layer])
        assert layer.training
        assert (layer.moving_variance == 1).all()

    @pytest.mark.parametrize(
        "name", ["planar", "radial", "sylvester", "block_autoregressive", "neural_autoregressive"]
    )
    def test_transforms_without_inverse(self, name: str) -> None:
        layer = getattr(transforms, name)(2)
        match = f"expected transforms that Pyro can invert for site 'code', got .*'{layer!r}'"[:-3]
        with pytest.raises(ValueError, match=f"FlowPrior: {match}"):
            FlowPrior(2, [layer], site="code")

    @pytest.mark.parametrize(
        ("layers", "error", "match"),
        [
            (lambda: [], ValueError, "at least one transform, got none"),
            (lambda: transforms.Spline(2), TypeError, "a sequence .* got Spline. Pass a single"),
            (lambda: 3, TypeError, "a sequence of transforms or a flow, got int"),
            (lambda: [MLP(2, [], 2)], TypeError, "transforms, got MLP among them"),
            (
                lambda: [transforms.conditional_spline(2, 3)],
                TypeError,
                "got ConditionalSpline among them. Condition",
            ),
            (lambda: [transforms.AbsTransform()], ValueError, "bijective .* got AbsTransform"),
            (
                lambda: [transforms.affine_coupling(3)],
                ValueError,
                r"of 2 latents for site 'z', got \['AffineCoupling'\], .* latent_dim=2",
            ),
            (
                lambda: [transforms.StickBreakingTransform()],
                ValueError,
                r"code of shape \(2,\), got event shape \(3,\)",
            ),
            (lambda: MLP(2, [], 2), TypeError, "missing 1 required"),
            (lambda: Constant(2), TypeError, "the flow to return a distribution, got Tensor"),
            (lambda: import_zuko().flows.MAF(3), ValueError, r"\(2,\), got event shape \(3,\)"),
        ],
    )
    def test_what_is_no_flow(
        self, layers: Callable[[], Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            FlowPrior(2, layers())

    def test_zuko_is_not_imported(self) -> None:
        """It is the user's: an optional package, and its import changes torch's settings."""
        lines = inspect.getsource(priors).splitlines()
        assert not [line for line in lines if line.strip().startswith(("import zuko", "from zuko"))]

    def test_against_zuko(self) -> None:
        flow = import_zuko().flows.NSF(2, transforms=1, hidden_features=[8])
        prior, z = FlowPrior(2, flow), torch.randn(7, 2)
        torch.testing.assert_close(log_density(prior, z), flow().log_prob(z))
        drawn = sample(prior, 5)
        torch.testing.assert_close(log_density(prior, drawn), flow().log_prob(drawn))


class Constant(nn.Module):
    """Returns zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self) -> torch.Tensor:
        return torch.zeros(self.dim)


def linear_conditional(d_above: int, d_below: int) -> tuple[nn.Module, Any]:
    """A linear map with constant scales, and its ``(weight, bias, covariance)``."""
    linear = nn.Linear(d_above, 2 * d_below)
    linear.weight.data[d_below:] = 0
    net = NormalEncoder(linear)
    scale = net(torch.zeros(1, d_above)).stddev[0].detach()
    weight, bias = linear.weight.data[:d_below], linear.bias.data[:d_below]
    return net, (weight, bias, scale.square().diag())


def chain_moments(links: list[Any], dim: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Mean and covariance of all of ``v_0 ~ N(0, I)``, ``v_i ~ N(W v_{i-1} + b, S)``."""
    mean, cov, sizes = torch.zeros(dim), torch.eye(dim), [dim]
    for weight, bias, noise in links:
        last = slice(sum(sizes) - sizes[-1], sum(sizes))
        cross = weight @ cov[last]
        cov = torch.cat(
            [
                torch.cat([cov, cross.T], 1),
                torch.cat([cross, weight @ cov[last, last] @ weight.T + noise], 1),
            ]
        )
        mean = torch.cat([mean, weight @ mean[last] + bias])
        sizes.append(len(bias))
    return mean, cov, sizes


class TestHierarchicalPrior:
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_against_the_linear_gaussian_model(self, depth: int) -> None:
        """With the exact posterior as guide every log-weight is log p(x)."""
        dims = [2, 3, 2, 4][: depth + 1]
        made = [
            linear_conditional(above, below) for above, below in zip(dims, dims[1:], strict=False)
        ]
        nets, links = [net for net, _ in made], [link for _, link in made]
        top = StandardNormalPrior(2, site=f"z{depth + 1}")
        prior, decoder = HierarchicalPrior(top, nets), nn.Linear(dims[-1], DATA_DIM)
        links.append((decoder.weight.data, decoder.bias.data, 0.25 * torch.eye(DATA_DIM)))
        mean, cov, sizes = chain_moments(links, dims[0])
        model = VAE(decoder, Normal(scale=0.5), prior)

        def guide(x: torch.Tensor) -> None:
            known, rows = list(range(len(mean) - DATA_DIM, len(mean))), x
            with pyro.plate("data", len(x)):
                for i, name in enumerate(f"z{n}" for n in range(depth + 1, 0, -1)):
                    here = list(range(sum(sizes[:i]), sum(sizes[: i + 1])))
                    gain = torch.linalg.solve(cov[known][:, known], cov[known][:, here]).T
                    loc = mean[here] + (rows - mean[known]) @ gain.T
                    left = cov[here][:, here] - gain @ cov[known][:, here]
                    value = pyro.sample(name, dist.MultivariateNormal(loc, (left + left.T) / 2))
                    known = known + here
                    rows = torch.cat([rows.expand(*value.shape[:-1], rows.shape[-1]), value], -1)

        x = 2 * torch.randn(5, DATA_DIM)
        estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=6)
        exact = torch.distributions.MultivariateNormal(
            mean[-DATA_DIM:], cov[-DATA_DIM:, -DATA_DIM:]
        )
        torch.testing.assert_close(estimate.log_likelihood, exact.log_prob(x))
        assert estimate.standard_error.max() < 1e-10
        # Samples of the prior have the marginal's moments.
        code, num = sample(prior, 20_000), dims[-1]
        last = slice(len(mean) - DATA_DIM - num, len(mean) - DATA_DIM)
        error = cov[last, last].diagonal().sqrt() / math.sqrt(len(code))
        assert ((code.mean(0) - mean[last]).abs() < 5 * error).all()
        products = (code - mean[last]).unsqueeze(-1) * (code - mean[last]).unsqueeze(-2)
        error = products.std(0) / math.sqrt(len(code))
        assert ((products.mean(0) - cov[last, last]).abs() < 5 * error).all()

    def test_sites_plates_and_the_code(self) -> None:
        top = StandardNormalPrior(2, site="z3")
        nets = [NormalEncoder(MLP(2, [4], 6)), NormalEncoder(MLP(3, [4], 10))]
        prior = HierarchicalPrior(top, nets)
        assert prior.sites == ("z2", "z1")
        assert prior.top is top
        assert list(prior.conditionals) == nets

        def program() -> torch.Tensor:
            with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
                return prior()

        trace = traced(program)
        assert [n for n in trace.nodes if n.startswith("z")] == ["z3", "z2", "z1"]
        shapes = {n: tuple(trace.nodes[n]["value"].shape) for n in ("z3", "z2", "z1")}
        assert shapes == {"z3": (7, 5, 2), "z2": (7, 5, 3), "z1": (7, 5, 5)}
        assert trace.nodes["_RETURN"]["value"] is trace.nodes["z1"]["value"]
        z1, z2 = trace.nodes["z1"], trace.nodes["z2"]
        expected = prior.conditionals[1](z2["value"]).log_prob(z1["value"])
        torch.testing.assert_close(z1["log_prob"], expected)
        assert z1["log_prob"].shape == (7, 5)

    def test_sites_can_be_named_and_any_prior_is_a_top(self) -> None:
        top = HierarchicalPrior(
            GaussianMixturePrior(2, 3, site="a"), [NormalEncoder(MLP(2, [], 4))], sites=["b"]
        )
        prior = HierarchicalPrior(top, [NormalEncoder(MLP(2, [], 6))], sites=["c"])

        def program() -> torch.Tensor:
            with pyro.plate("rows", 5):
                return prior()

        trace = traced(program)
        assert [n for n in trace.nodes if n in "abc"] == ["a", "b", "c"]
        (gradient,) = torch.autograd.grad(trace.log_prob_sum(), [prior.top.top.locs])
        assert gradient.abs().max() > 0

    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
    def test_in_plain_functions_with_a_plain_top(self, elbo: type[Trace_ELBO]) -> None:
        def top() -> torch.Tensor:
            return pyro.sample("upper", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        prior = HierarchicalPrior(top, [NormalEncoder(MLP(2, [], 6))], sites=["lower"])
        net, upper = NormalEncoder(MLP(3, [], 6)), NormalEncoder(MLP(3, [], 4))

        def model(x: torch.Tensor) -> None:
            pyro.module("prior", prior)
            with pyro.plate("rows", len(x)):
                pyro.sample("data", dist.Normal(prior(), 1.0).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            pyro.module("net", net)
            pyro.module("upper net", upper)
            with pyro.plate("rows", len(x)):
                pyro.sample("upper", upper(x))
                pyro.sample("lower", net(x))

        x, before = torch.randn(8, 3), [p.detach().clone() for p in prior.parameters()]
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
        svi.step(x)
        svi.step(x)
        moved = [not torch.equal(*pair) for pair in zip(before, prior.parameters(), strict=True)]
        assert moved == [True] * 2
        estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=9)
        other = copy.deepcopy(prior)
        other.load_state_dict(prior.state_dict())
        assert estimate.log_likelihood.isfinite().all()
        with pyro.plate("rows", 5):
            assert other.float().conditionals[0](torch.zeros(5, 2).float()).mean.shape == (5, 3)

    def test_what_cannot_be(self) -> None:
        top, net = StandardNormalPrior(2, site="z2"), NormalEncoder(MLP(2, [], 6))
        with pytest.raises(ValueError, match="HierarchicalPrior: expected at least one network"):
            HierarchicalPrior(top, [])
        for sites in (["a", "b"], []):
            with pytest.raises(ValueError, match=r"expected 1 different sites, .* got \["):
                HierarchicalPrior(top, [net], sites=sites)
        with pytest.raises(ValueError, match=r"expected 2 different sites, .* got \['a', 'a'\]"):
            HierarchicalPrior(top, [net, net], sites=["a", "a"])

    def test_networks_that_do_not_fit(self) -> None:
        def run(net: nn.Module) -> None:
            with pyro.plate("rows", 5):
                HierarchicalPrior(StandardNormalPrior(2, site="z2"), [net])()

        match = "expected the network of site 'z1' to return a distribution, got Tensor. Wrap"
        with pytest.raises(TypeError, match=match):
            run(MLP(2, [], 6))
        for net in (NormalEncoder(MLP(3, [], 6)), NormalEncoder(nn.Linear(3, 6))):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                run(net)
            (note,) = raised.value.__notes__
            assert "network of site 'z1' got the code above, of shape (5, 2)" in note

        class Forgetful(nn.Module):
            def forward(self, code: torch.Tensor) -> dist.TorchDistribution:
                return dist.Normal(code, 1.0)

        match = r"one code per row at site 'z1', got batch shape \(5, 2\) .* `.to_event\(1\)` forgo"
        with pytest.raises(ValueError, match=match):
            run(Forgetful())

        class Folding(nn.Module):
            def forward(self, code: torch.Tensor) -> dist.TorchDistribution:
                return dist.Normal(code[:1], 1.0).to_event(1)

        with pytest.raises(ValueError, match=r"batch shape \(1,\) and event shape \(2,\) from the"):
            run(Folding())


def test_a_flow_of_bounded_noise_is_refused() -> None:
    """Outside its noise it has no density, to which training would move the codes."""
    zuko = import_zuko()
    match = "FlowPrior: expected a flow over all real codes for site 'z', got one that, or whose"
    with pytest.raises(ValueError, match=match):
        FlowPrior(1, zuko.flows.NCSF(1, transforms=2))


def zuko_prior(kind: str) -> FlowPrior:
    zuko = import_zuko()
    if kind == "mixture":
        return FlowPrior(2, zuko.flows.GMM(2, components=3))
    return FlowPrior(2, zuko.flows.MAF(2, transforms=1, hidden_features=[4]))


@pytest.mark.parametrize("kind", ["flow", "mixture"])
def test_flows_of_zuko_as_distributions_of_pyro(kind: str) -> None:
    prior = zuko_prior(kind)

    def model() -> torch.Tensor:
        with pyro.plate("data", 4):
            return pyro.sample("x", dist.Normal(prior(), 1.0).to_event(1))

    drawn = Predictive(model, num_samples=7, parallel=True)()
    assert drawn["z"].reshape(-1, 2).shape == (28, 2)
    trace = poutine.trace(model).get_trace()
    fn, value = trace.nodes["z"]["fn"], trace.nodes["z"]["value"].detach()
    assert fn.support.check(value).all()
    torch.testing.assert_close(fn.log_prob(value), prior.flow().log_prob(value))
    changed = value.clone()
    fn.log_prob(changed)
    changed.mul_(2)
    torch.testing.assert_close(fn.log_prob(changed), prior.flow().log_prob(2 * value))
    with torch.no_grad():
        replayed = poutine.trace(model).get_trace()
    replayed.compute_log_prob()
    assert replayed.nodes["z"]["log_prob"].requires_grad


def test_a_model_with_a_vamp_prior_can_be_saved_after_training() -> None:
    x = torch.rand(8, 4)
    guide = AmortizedNormal(MLP(4, [5], 4))
    model = VAE(MLP(2, [5], 4), Normal(0.3), VampPrior(guide.encoder, x[:3]))
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    file = io.BytesIO()
    torch.save((model, guide), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    expected = Trace_ELBO().loss(model, guide, x)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert Trace_ELBO().loss(*again, x) == pytest.approx(expected)


def test_the_top_of_a_hierarchy_has_a_site_of_its_own() -> None:
    network = NormalEncoder(MLP(2, [], 4))
    with pytest.raises(ValueError, match=r"another for top, got \['z1'\] and 'z1'"):
        HierarchicalPrior(StandardNormalPrior(2, site="z1"), [network])


@pytest.mark.parametrize("make", [lambda: FlowPrior(2, [transforms.affine_coupling(2)])])
def test_a_users_module_around_a_prior_can_be_copied(make: Any) -> None:
    class Mine(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.prior = make()

    mine = Mine()
    again = copy.deepcopy(mine)
    for name, parameter in mine.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)


def test_a_module_that_makes_bounded_codes_is_refused() -> None:
    class Bounded(nn.Module):
        def forward(self) -> Any:
            return torch.distributions.Independent(
                torch.distributions.Beta(torch.ones(2), torch.ones(2)), 1
            )

    with pytest.raises(ValueError, match="expected a flow over all real codes for site 'z'"):
        FlowPrior(2, Bounded())
