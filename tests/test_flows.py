"""Flows: the density against brute force, caches that are stale, dtypes, errors."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.flows import ExactFlow, inverse_autoregressive, neural_spline
from pyro_vae.guides import AmortizedFlow
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP, FlowEncoder

CONTEXT = 5
FLOWS: dict[str, Callable[[int], list[nn.Module]]] = {
    "inverse autoregressive": lambda dim: inverse_autoregressive(dim, CONTEXT, hidden=[8]),
    "spline": lambda dim: neural_spline(dim, CONTEXT, hidden=[8, 8], num_bins=4),
}


@pytest.fixture(params=FLOWS.values(), ids=FLOWS.keys())
def make(request: pytest.FixtureRequest) -> Callable[[int], list[nn.Module]]:
    return request.param


def encoder(transforms: list[nn.Module], dim: int, size: float = 30.0) -> FlowEncoder:
    """Far from the identity: its last layers are as large as the others."""
    for parameter in nn.ModuleList(transforms).parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(size if parameter.abs().max() < 0.02 else 1.0)
    return FlowEncoder(MLP(4, [7], 2 * dim + CONTEXT, activation=nn.Tanh), dim, transforms)


def flow(make: Callable[[int], list[nn.Module]], dim: int, num_rows: int = 3) -> ExactFlow:
    q = encoder(make(dim), dim)(torch.randn(num_rows, 4))
    assert isinstance(q, ExactFlow)
    return q


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_density_is_that_of_the_change_of_variables(make: Any, dim: int) -> None:
    q = flow(make, dim, num_rows=1)

    def transport(noise: torch.Tensor) -> torch.Tensor:
        for transform in q.transforms:
            noise = transform(noise)
        return noise.squeeze(0)

    for _ in range(5):
        noise = torch.randn(1, dim)
        jacobian = torch.autograd.functional.jacobian(transport, noise).reshape(dim, dim)
        expected = q.base_dist.log_prob(noise) - jacobian.slogdet().logabsdet
        if dim > 1:
            assert (jacobian - jacobian.diagonal().diag()).abs().max() > 1e-5
        value = transport(noise).detach().unsqueeze(0)
        torch.testing.assert_close(q.log_prob(value), expected, rtol=0, atol=1e-9)


def test_the_density_integrates_to_one(make: Any) -> None:
    q = flow(make, 2, num_rows=1)
    with torch.no_grad():
        sample = q.sample((2000,))
        center, spread = sample.mean((0, 1)), sample.std((0, 1))
        axis = torch.linspace(-8, 8, 200)
        grid = torch.cartesian_prod(axis, axis).unsqueeze(1) * spread + center
        total = q.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2 * spread.prod()
    assert float(total) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_one_density_whatever_the_cache_holds(
    make: Any, dtype: torch.dtype, default: torch.dtype
) -> None:
    net, x = encoder(make(3), 3).to(dtype), torch.randn(6, 4, dtype=dtype)
    torch.set_default_dtype(default)
    try:
        q = net(x)
        z = q.rsample((7,))
        cached, inverted = q.log_prob(z), q.log_prob(z.clone())
    finally:
        torch.set_default_dtype(torch.float64)
    assert cached.dtype == inverted.dtype == z.dtype == dtype
    tolerance = 1e-2 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(cached, inverted, rtol=0, atol=tolerance)


def test_a_sample_is_scored_without_another_run_of_the_networks(make: Any) -> None:
    q = flow(make, 3).expand((5, 3))
    runs: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: runs.append(m))
    try:
        z = q.rsample()
        assert len(runs) > 0
        runs.clear()
        cached = q.log_prob(z)
        assert not [m for m in runs if isinstance(m, nn.Linear)]
        inverted = q.log_prob(z.detach())
        assert [m for m in runs if isinstance(m, nn.Linear)]
    finally:
        hook.remove()
    torch.testing.assert_close(cached, inverted)


def test_the_gradient_at_a_detached_value(make: Any) -> None:
    q = flow(make, 3)
    drawn = q.rsample()
    q.log_prob(drawn)  # Fills every cache with the same numbers.
    value = drawn.detach().requires_grad_()
    assert torch.autograd.gradcheck(q.log_prob, value)
    itself = q.sample().requires_grad_()  # The very object that was drawn.
    assert torch.autograd.gradcheck(q.log_prob, itself)
    (gradient,) = torch.autograd.grad(q.log_prob(itself).sum(), itself)
    assert gradient.abs().min() > 0


def test_a_sample_drawn_without_gradients_is_scored_with_all_of_them(make: Any) -> None:
    """Torch's cache would lose those of the inverse."""
    transforms = make(3)
    net, x = encoder(transforms, 3), torch.randn(6, 4)
    q = net(x)
    z = q.sample()
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(q.log_prob(z).sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad(net(x).log_prob(z.clone()).sum(), parameters)
    torch.testing.assert_close(gradients, expected)
    with torch.no_grad():
        torch.testing.assert_close(q.log_prob(z), net(x).log_prob(z.clone()))
    torch.testing.assert_close(torch.autograd.grad(q.log_prob(z).sum(), parameters), expected)


def test_a_sample_changed_in_place_is_scored_anew(make: Any) -> None:
    q = flow(make, 3)
    with torch.no_grad():
        z = q.sample()
        before = q.log_prob(z)
        z += 0.5
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
        assert (q.log_prob(z) - before).abs().max() > 0.1


def test_inference_mode(make: Any) -> None:
    q = flow(make, 2)
    with torch.inference_mode():
        z = q.sample()
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_values_far_away_have_finite_densities_and_gradients(make: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        net = encoder(make(3), 3).to(dtype)
        q = net(torch.randn(6, 4, dtype=dtype))
        far = torch.tensor([[-30.0, 3.0, 1e-7], [3.0, -3.0, 0.0]], dtype=dtype).repeat(3, 1)
        log_prob = q.log_prob(far.requires_grad_())
        assert log_prob.isfinite().all()
        log_prob.sum().backward()
        for tensor in (far, *net.parameters()):
            assert tensor.grad.isfinite().all()


def test_a_fresh_flow_is_close_to_the_normal_of_its_network() -> None:
    x = torch.randn(6, 4)
    for transforms, factor in ((neural_spline(3, 5), 1.0), (inverse_autoregressive(3, 5), 0.776)):
        network = MLP(4, [7], 2 * 3 + 5, activation=nn.Tanh)
        q = FlowEncoder(network, 3, transforms)(x)
        loc, scale = network(x)[:, :3], nn.functional.softplus(network(x)[:, 3:6]) + 1e-6
        noise = torch.randn(6, 3)
        z = noise
        for transform in q.transforms:
            z = transform(z)
        torch.testing.assert_close(z, loc + scale * factor * noise, rtol=0, atol=0.05)


def test_every_second_transform_runs_in_reverse(make: Any) -> None:
    """So every latent can depend on every other one."""
    q = flow(make, 3, num_rows=1)
    jacobian = torch.autograd.functional.jacobian(
        lambda noise: q.transforms[1](q.transforms[0](noise)).squeeze(0), torch.randn(1, 3)
    ).reshape(3, 3)
    assert (jacobian.abs() > 1e-9).all()


def test_a_flow_fits_a_density_with_two_modes_better_than_any_normal() -> None:
    target = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.2, 1.2]), torch.ones(2) / 2)
    )

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", target.expand([1]).to_event(1))

    guide = AmortizedFlow(
        nn.Linear(1, 2 + 4), 1, neural_spline(1, 4, num_transforms=1, hidden=[16])
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    x = torch.zeros(100, 1)
    for _ in range(80):
        svi.step(x)
    kl = svi.evaluate_loss(torch.zeros(5000, 1)) / 5000
    grid = torch.linspace(-6, 6, 1000).unsqueeze(-1)
    loc, scale = torch.cartesian_prod(torch.linspace(0, 2, 21), torch.linspace(0.3, 2, 35)).T
    normal = dist.Normal(loc, scale).log_prob(grid)
    of_normals = (normal.exp() * (normal - target.log_prob(grid))).sum(0) * (grid[1] - grid[0])
    assert kl < float(of_normals.min()) / 4


def test_importance_weights_agree_with_the_exact_answer(make: Any) -> None:
    model, x = LinearGaussian(4, 2), torch.randn(5, 4)
    guide = AmortizedFlow(MLP(4, [7], 2 * 2 + CONTEXT), 2, make(2))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(40):
        svi.step(x)
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=3000)
    error = (estimate.log_likelihood - model.log_prob(x).detach()).abs()
    assert (error < 5 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.2).all()


def test_bad_arguments() -> None:
    for function in (inverse_autoregressive, neural_spline):
        name = function.__name__
        with pytest.raises(ValueError, match=f"{name}: expected latent_dim >= 1, got 0"):
            function(0, 5)
        with pytest.raises(ValueError, match=f"{name}: expected context_dim >= 1, got 0"):
            function(2, 0)
        with pytest.raises(ValueError, match=f"{name}: expected num_transforms >= 1, got 0"):
            function(2, 5, num_transforms=0)
        for hidden in ([], [8, 2]):
            match = f"{name}: expected hidden layers of at least latent_dim=3 units, got"
            with pytest.raises(ValueError, match=match):
                function(3, 5, hidden=hidden)
    with pytest.raises(ValueError, match="neural_spline: expected num_bins >= 2, got 1"):
        neural_spline(2, 5, num_bins=1)
    with pytest.raises(ValueError, match="neural_spline: expected bound > 0, got -1"):
        neural_spline(2, 5, bound=-1.0)


def test_networks_that_do_not_fit_the_transforms(make: Any) -> None:
    x = torch.randn(5, 4)
    match = r"expected a context of width 5 .* got 4. Give the network 2 \* 2 \+ 5 outputs"
    with pytest.raises(ValueError, match=match):
        AmortizedFlow(MLP(4, [], 2 * 2 + 4), 2, make(2))(x)
    with pytest.raises(ValueError, match="expected 3 latents as the transforms do, got 2"):
        AmortizedFlow(MLP(4, [], 2 * 2 + 5), 2, make(3))(x)
