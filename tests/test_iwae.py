"""The importance-weighted bounds: values by hand, exact posteriors, gradients by other means."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from torch.distributions import Normal

from pyro_vae import scale_kl
from pyro_vae.flows import inverse_autoregressive
from pyro_vae.guides import (
    AmortizedFlow,
    AmortizedMultivariateNormal,
    ExactLinearGaussian,
)
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.objectives.iwae import _leave_one_out
from pyro_vae.schedules import Constant, LinearWarmup

PATHWISE = ["standard", "stl", "dreg"]
ESTIMATORS = [*PATHWISE, "vimco"]
Tensors = dict[str, torch.Tensor]


def leaves(**values: Any) -> Tensors:
    """Parameters: tensors that collect gradients."""
    return {k: torch.as_tensor(v).double().clone().requires_grad_() for k, v in values.items()}


def gradients(
    objective: TraceIWAE_ELBO, model: Any, guide: Any, params: Tensors, *args: Any, **kwargs: Any
) -> tuple[float, Tensors]:
    """The reported loss and the gradient of training."""
    for p in params.values():
        p.grad = None
    loss = objective.loss_and_grads(model, guide, *args, **kwargs)
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}


def mean_exp(log_w: torch.Tensor, dim: int) -> torch.Tensor:
    return log_w.exp().mean(dim).log()


class Recorder(Messenger):
    """Keeps what the latents of a guide were."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[torch.Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample":
            self.values.setdefault(msg["name"], []).append(msg["value"].detach().clone())

    def last(self, name: str, num: int, *shape: int) -> torch.Tensor:
        """The particles of the last call."""
        values, count = [], 0
        for value in reversed(self.values[name]):
            values.append(value.reshape(-1, *shape))
            count += len(values[-1])
            if count >= num:
                break
        return torch.cat(values[::-1])


# ---------------------------------------------------------------- the bound


def gaussian_pair(num_data: int = 6) -> tuple[Any, Any, Tensors, torch.Tensor]:
    """Plain functions with one normal latent of two dimensions, far from the posterior."""
    params = leaves(
        W=[[0.9, -0.4], [0.3, 1.2], [-0.7, 0.5]],
        b=[0.1, -0.2, 0.3],
        s=0.3,
        A=[[0.3, 0.1, -0.2], [0.2, 0.4, 0.1]],
        c=[0.2, -0.1],
        r=[-0.4, 0.1],
    )

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = u @ params["W"].T + params["b"]
            pyro.sample("obs", dist.Normal(loc, params["s"].exp()).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            loc = x @ params["A"].T + params["c"]
            pyro.sample("u", dist.Normal(loc, params["r"].exp()).to_event(1))

    return model, guide, params, torch.randn(num_data, 3)


def log_p_by_hand(p: Tensors, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    prior = Normal(0.0, 1.0).log_prob(u).sum(-1)
    return prior + Normal(u @ p["W"].T + p["b"], p["s"].exp()).log_prob(x).sum(-1)


def log_q_by_hand(p: Tensors, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return Normal(x @ p["A"].T + p["c"], p["r"].exp()).log_prob(u).sum(-1)


def combined(
    log_w: torch.Tensor, num_groups: int = 1, partial: bool = False, elbo_weight: float = 0.0
) -> torch.Tensor:
    """The bound of every datum from log-weights ``(particles of all groups, data)``."""
    if partial:
        bound = mean_exp(log_w, 0)
    else:
        bound = mean_exp(log_w.unflatten(0, (num_groups, -1)), 1).mean(0)
    return (1 - elbo_weight) * bound + elbo_weight * log_w.mean(0)


VARIANTS = [
    {},
    {"num_groups": 3},
    {"num_groups": 3, "partial": True},
    {"elbo_weight": 0.3},
    {"elbo_weight": 1.0},
    {"num_groups": 2, "partial": True, "elbo_weight": 0.6},
]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_bound_by_hand(estimator: Any, vectorize: bool) -> None:
    model, guide, params, x = gaussian_pair()
    for variant in VARIANTS:
        objective = TraceIWAE_ELBO(4, estimator, vectorize_particles=vectorize, **variant)
        recorder = Recorder()
        pair, num = (model, recorder(guide)), 4 * variant.get("num_groups", 1)
        ways = objective.loss, objective.loss_and_grads, objective.differentiable_loss
        for evaluate in (*ways, objective.training_loss):
            loss = float(torch.as_tensor(evaluate(*pair, x)).detach())
            u = recorder.last("u", num, 6, 2)
            log_w = log_p_by_hand(params, x, u) - log_q_by_hand(params, x, u)
            expected = -combined(log_w, **variant).sum()
            assert loss == pytest.approx(float(expected.detach()), abs=1e-10)


@pytest.mark.parametrize("estimator", ["standard", "stl"])
@pytest.mark.parametrize("variant", [{}, {"elbo_weight": 0.4}])
def test_one_particle_is_the_elbo_at_the_same_seed(estimator: Any, variant: Any) -> None:
    model, guide, params, x = gaussian_pair()
    pyro.set_rng_seed(5)
    expected = Trace_ELBO().differentiable_loss(model, guide, x)
    expected_grads = dict(
        zip(params, torch.autograd.grad(expected, list(params.values())), strict=True)
    )
    state = torch.get_rng_state()
    pyro.set_rng_seed(5)
    loss, grads = gradients(TraceIWAE_ELBO(1, estimator, **variant), model, guide, params, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-11)
    for name, grad in grads.items():
        same = torch.allclose(grad, expected_grads[name], atol=1e-11)
        assert same == (estimator == "standard" or name in "Wbs")


# ---------------------------------------------------------------- exact posteriors


def exact_multivariate(model: LinearGaussian) -> AmortizedMultivariateNormal:
    """The posterior of the linear-Gaussian model as a linear encoder, its weights set by hand."""
    data_dim, dim = model.weight.shape
    rows, columns = torch.tril_indices(dim, dim)
    network = MLP(data_dim, [], dim + len(rows))
    guide = AmortizedMultivariateNormal(network, dim)
    with torch.no_grad():
        w, noise = model.weight, model.noise_variance[0]
        m = w.T @ w + noise * torch.eye(dim)
        tril = torch.linalg.cholesky(noise * m.inverse())
        raw = torch.where(torch.eye(dim) > 0, (tril - 1e-6).clamp(min=1e-9).expm1().log(), tril)
        linear = network[0]
        linear.weight.zero_()
        linear.weight[:dim] = m.inverse() @ w.T
        linear.bias[:dim] = -m.inverse() @ w.T @ model.loc
        linear.bias[dim:] = raw[rows, columns]
    return guide


def linear_gaussian(data_dim: int = 4, latent_dim: int = 2) -> LinearGaussian:
    model = LinearGaussian(data_dim, latent_dim)
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.fill_(-0.3)
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_at_the_exact_posterior(estimator: Any, vectorize: bool) -> None:
    model = linear_gaussian()
    guide, x = exact_multivariate(model), torch.randn(5, 4)
    params = dict(guide.named_parameters())
    expected = -float(model.log_prob(x).sum().detach())
    for variant in VARIANTS:
        objective = TraceIWAE_ELBO(3, estimator, vectorize_particles=vectorize, **variant)
        assert objective.loss(model, guide, x) == pytest.approx(expected, abs=1e-10)
        loss, grads = gradients(objective, model, guide, params, x)
        assert loss == pytest.approx(expected, abs=1e-10)
        largest = max(float(g.abs().max()) for g in grads.values())
        # The score of the guide's density is noise.
        assert largest < 1e-10 if estimator in ("stl", "dreg") else largest > 1e-2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_the_guide_that_follows_the_model(estimator: Any) -> None:
    model, x = linear_gaussian(), torch.randn(5, 4)
    guide = ExactLinearGaussian(model)
    objective = TraceIWAE_ELBO(7, estimator)
    expected = -float(model.log_prob(x).sum().detach())
    assert objective.loss(model, guide, x) == pytest.approx(expected, abs=1e-10)
    params = dict(model.named_parameters())
    _, grads = gradients(objective, model, guide, params, x)
    exact = torch.autograd.grad(-model.log_prob(x).sum(), list(params.values()))
    same = [torch.allclose(g, e, atol=1e-9) for g, e in zip(grads.values(), exact, strict=True)]
    # Path and score of the guide cancel those of the model, unless one is left out.
    assert all(same) == (estimator in ("standard", "vimco"))


class Chain:
    """z_n ~ N(0, 1), ..., z1 | z2, x | z1, each a normal about a multiple of the one above.

    Its guide samples the latents in any order, each from the exact normal given x and those
    before it; ``bend`` moves it away from there.
    """

    def __init__(self, order: Sequence[int], bend: float = 0.0) -> None:
        self.order, depth = list(order), len(order)
        self.model_params = leaves(slopes=[0.8, -1.3, 0.6][:depth], log_scales=[-0.3, 0.2, -0.5])
        slopes, scales = self.model_params["slopes"], self.model_params["log_scales"].exp()
        # (x, z1, ..., zn) = mixing @ independent noises.
        mixing = torch.eye(depth + 1)
        with torch.no_grad():
            for level in range(depth - 1, -1, -1):
                noise = torch.zeros(depth + 1)
                noise[level] = scales[level]
                mixing[level] = slopes[level] * mixing[level + 1] + noise
            cov = mixing @ mixing.T
        self.variance = cov[0, 0]
        guide_params, given = {}, [0]
        for level in self.order:
            weights = torch.linalg.solve(cov[given][:, given], cov[given, level])
            variance = cov[level, level] - weights @ cov[given, level]
            guide_params[f"weights{level}"] = weights + bend
            guide_params[f"bias{level}"] = torch.tensor(bend)
            guide_params[f"log_scale{level}"] = variance.log() / 2 - bend
            given.append(level)
        self.guide_params = leaves(**guide_params)

    def exact(self, x: torch.Tensor) -> float:
        return float(Normal(0.0, self.variance.sqrt()).log_prob(x).sum())

    def model(self, x: torch.Tensor) -> None:
        slopes, scales = self.model_params["slopes"], self.model_params["log_scales"].exp()
        with pyro.plate("n", len(x)):
            z = pyro.sample(f"z{len(slopes)}", dist.Normal(0.0, 1.0))
            for level in range(len(slopes) - 1, 0, -1):
                z = pyro.sample(f"z{level}", dist.Normal(slopes[level] * z, scales[level]))
            pyro.sample("x", dist.Normal(slopes[0] * z, scales[0]), obs=x)

    def conditional(self, level: int, given: list[torch.Tensor], p: Tensors) -> Any:
        weights = p[f"weights{level}"]
        loc = sum((w * g for w, g in zip(weights, given, strict=True)), p[f"bias{level}"])
        return dist.Normal(loc, p[f"log_scale{level}"].exp())

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            given = [x]
            for level in self.order:
                fn = self.conditional(level, given, self.guide_params)
                given.append(pyro.sample(f"z{level}", fn))

    def plain(self, x: torch.Tensor, z: Tensors, detached: bool) -> tuple[Tensors, torch.Tensor]:
        """Samples with their paths back to the guide's parameters, and the guide's log-density."""
        p, given, paths, log_q = self.guide_params, [x], {}, torch.zeros(())
        frozen = {n: v.detach() for n, v in p.items()} if detached else p
        values = [x]
        for level in self.order:
            fn = self.conditional(level, values, {n: v.detach() for n, v in p.items()})
            noise = (z[f"z{level}"] - fn.loc) / fn.scale
            path = self.conditional(level, given, p)
            paths[f"z{level}"] = path.loc + path.scale * noise
            density = self.conditional(level, given, frozen)
            log_q = log_q + density.log_prob(paths[f"z{level}"])
            given.append(paths[f"z{level}"])
            values.append(z[f"z{level}"])
        return paths, log_q

    def log_p(self, x: torch.Tensor, z: Tensors, p: Tensors) -> torch.Tensor:
        slopes, scales = p["slopes"], p["log_scales"].exp()
        values = [x] + [z[f"z{level}"] for level in range(1, len(slopes) + 1)]
        log_p = Normal(0.0, 1.0).log_prob(values[-1])
        for level in range(len(slopes)):
            fn = Normal(slopes[level] * values[level + 1], scales[level])
            log_p = log_p + fn.log_prob(values[level])
        return log_p


ORDERS = [(1, 2), (2, 1), (3, 2, 1), (1, 2, 3), (2, 3, 1)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("estimator", PATHWISE)
def test_a_hierarchy_at_its_exact_posterior(order: Any, estimator: Any) -> None:
    chain, x = Chain(order), torch.randn(4)
    for variant in VARIANTS if order == (2, 1) else VARIANTS[:1]:
        objective = TraceIWAE_ELBO(3, estimator, **variant)
        loss, grads = gradients(objective, chain.model, chain.guide, chain.guide_params, x)
        assert loss == pytest.approx(-chain.exact(x), abs=1e-10)
        largest = max(float(g.abs().max()) for g in grads.values())
        assert largest < 1e-10 if estimator in ("stl", "dreg") else largest > 1e-2


# ---------------------------------------------------------------- gradients by hand


def by_hand(
    chain: Chain,
    x: torch.Tensor,
    z: Tensors,
    estimator: str,
    *,
    num_groups: int = 1,
    partial: bool = False,
    elbo_weight: float = 0.0,
    weight: Any = 1.0,
) -> tuple[float, Tensors, Tensors]:
    """The loss and its gradients for the parameters of model and guide, in plain torch.

    The guide's come from a bound whose gradient is the estimator's, the model's from the bound
    at fixed samples.
    """
    fixed = {n: v.detach() for n, v in chain.model_params.items()}
    log_q = chain.plain(x, z, False)[1].detach()
    log_w = chain.log_p(x, z, chain.model_params) - log_q
    loss = -(weight * combined(log_w, num_groups, partial, elbo_weight)).sum()
    of_model = torch.autograd.grad(loss, list(chain.model_params.values()))

    paths, log_q = chain.plain(x, z, estimator in ("stl", "dreg"))
    log_w = chain.log_p(x, paths, fixed) - log_q
    bound = combined(log_w, num_groups, False, elbo_weight)
    if estimator == "dreg":
        grouped = log_w.unflatten(0, (num_groups, -1))
        normalized = grouped.detach().exp() / grouped.detach().exp().sum(1, keepdim=True)
        bound = (normalized**2 * grouped).sum(1).mean(0)
        bound = (1 - elbo_weight) * bound + elbo_weight * log_w.mean(0)
    of_guide = torch.autograd.grad(-(weight * bound).sum(), list(chain.guide_params.values()))
    return (
        float(loss.detach()),
        dict(zip(chain.model_params, of_model, strict=True)),
        dict(zip(chain.guide_params, of_guide, strict=True)),
    )


@pytest.mark.parametrize(
    ("order", "vectorize"), [((1,), True), ((1, 2), False), ((2, 1), True), ((2, 3, 1), True)]
)
@pytest.mark.parametrize("estimator", PATHWISE)
def test_gradients_by_hand(order: Any, estimator: Any, vectorize: bool) -> None:
    chain, x = Chain(order, bend=0.15), torch.randn(4)
    params = chain.model_params | chain.guide_params
    for variant in VARIANTS:
        objective = TraceIWAE_ELBO(3, estimator, vectorize_particles=vectorize, **variant)
        num, recorder = 3 * variant.get("num_groups", 1), Recorder()
        loss, grads = gradients(objective, chain.model, recorder(chain.guide), params, x)
        z = {f"z{level}": recorder.last(f"z{level}", num, 4) for level in order}
        value, of_model, of_guide = by_hand(chain, x, z, estimator, **variant)
        assert loss == pytest.approx(value, abs=1e-10)
        for name, expected in (of_model | of_guide).items():
            torch.testing.assert_close(grads[name], expected, atol=1e-10, rtol=1e-10, msg=name)


def test_a_parameter_that_model_and_guide_share() -> None:
    """Its gradient is the sum of both roles'."""
    shared = leaves(a=0.7)

    def programs(of_model: torch.Tensor, of_guide: torch.Tensor) -> tuple[Any, Any]:
        def model(x: torch.Tensor) -> None:
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(of_model * z, 1.0), obs=x)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("n", len(x)):
                pyro.sample("z", dist.Normal(of_guide * x, 0.8))

        return model, guide

    x, a = torch.randn(5), shared["a"]
    for estimator, variant in product(PATHWISE, VARIANTS):
        objective = TraceIWAE_ELBO(3, estimator, **variant)
        split = leaves(model=0.7, guide=0.7)
        pyro.set_rng_seed(1)
        _, grads = gradients(objective, *programs(a, a), shared, x)
        pyro.set_rng_seed(1)
        _, parts = gradients(objective, *programs(split["model"], split["guide"]), split, x)
        torch.testing.assert_close(grads["a"], parts["model"] + parts["guide"])


def flow_pair() -> tuple[Any, Any, torch.Tensor]:
    model = linear_gaussian()
    transforms = inverse_autoregressive(2, context_dim=3, hidden=[4])
    guide = AmortizedFlow(MLP(4, [5], 2 * 2 + 3), 2, transforms)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, guide, torch.randn(5, 4)


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_gradients_by_hand_of_a_flow(estimator: Any) -> None:
    model, guide, x = flow_pair()
    params = dict(guide.named_parameters())
    pyro.set_rng_seed(3)
    _, grads = gradients(TraceIWAE_ELBO(4, estimator), model, guide, params, x)
    pyro.set_rng_seed(3)
    z = guide.encoder(x).expand((4, 5)).rsample()
    q = copy.deepcopy(guide.encoder).requires_grad_(False)(x)
    density = model.posterior(x).log_prob(z) + model.log_prob(x)
    log_w = density - q.log_prob(z)
    weights = log_w.detach().softmax(0) ** (2 if estimator == "dreg" else 1)
    expected = torch.autograd.grad(-(weights * log_w).sum(), list(params.values()))
    for grad, other in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("estimator", PATHWISE)
def test_a_flow_at_the_exact_posterior(estimator: Any) -> None:
    """Two affine maps, of torch's own class, whose caches know no other tensor."""
    params = leaves(loc=[0.5, -0.2], scale=2.0)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        maps = [
            dist.transforms.AffineTransform(params["loc"].sum() - 0.3, params["scale"]),
            dist.transforms.AffineTransform(x / 2, 0.5**1.5, cache_size=1),
        ]
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0), maps))

    x = torch.randn(4)  # The posterior is N(x / 2, 1 / 2).
    exact = Normal(0.0, math.sqrt(2.0)).log_prob(x).sum()
    loss, grads = gradients(TraceIWAE_ELBO(3, estimator), model, guide, params, x)
    assert loss == pytest.approx(-float(exact), abs=1e-10)
    largest = max(float(g.abs().max()) for g in grads.values())
    assert largest < 1e-10 if estimator in ("stl", "dreg") else largest > 1e-2


# ---------------------------------------------------------------- gradients in expectation

ROWS = 20_000
"""So many copies of one datum, each with parameters of its own, are so many repeats."""


def hermite(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def joint_1d(p: Tensors, x: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """A curved model, so that no posterior is normal."""
    prior = Normal(p["a"], 1.0).log_prob(z)
    return prior + Normal(z + 0.5 * (p["a"] * z).sin(), 0.7).log_prob(torch.as_tensor(x))


def model_1d(p: Tensors) -> Callable[[torch.Tensor], None]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(p["a"], 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * (p["a"] * z).sin(), 0.7), obs=x)

    return model


def guide_1d(p: Tensors) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Normal(p["m"], p["r"].exp()))

    return guide


def exact_gradients(p: Tensors, x: float, num: int, groups: int, variant: Any) -> Tensors:
    """Of the loss in expectation over the noise, by quadrature; the guide's is of the groups."""
    nodes, weights = hermite(40)
    noise = torch.cartesian_prod(*[nodes] * num).reshape(-1, num)
    mass = torch.cartesian_prod(*[weights] * num).reshape(-1, num).prod(1)
    z = p["m"] + p["r"].exp() * noise
    log_w = joint_1d(p, x, z) - Normal(p["m"], p["r"].exp()).log_prob(z)
    alpha = variant.get("elbo_weight", 0.0)
    bound = (1 - alpha) * mean_exp(log_w, 1) + alpha * log_w.mean(1)
    return dict(zip(p, torch.autograd.grad(-(mass * bound).sum(), list(p.values())), strict=True))


@pytest.mark.parametrize(
    ("num", "estimator", "variant"),
    [
        (1, "standard", {}),
        (1, "stl", {}),
        (1, "dreg", {}),
        (2, "standard", {}),
        (2, "dreg", {}),
        (2, "dreg", {"elbo_weight": 0.5}),
        (2, "dreg", {"num_groups": 2}),
        (2, "vimco", {}),
    ],
)
def test_reparameterised_gradients_are_unbiased(num: int, estimator: Any, variant: Any) -> None:
    values = {"a": 0.6, "m": 0.9, "r": -0.2}
    params = leaves(**{n: torch.full((ROWS,), v) for n, v in values.items()})
    objective = TraceIWAE_ELBO(num, estimator, vectorize_particles=True, **variant)
    _, grads = gradients(
        objective, model_1d(params), guide_1d(params), params, torch.full((ROWS,), 1.5)
    )
    exact = exact_gradients(leaves(**values), 1.5, num, 1, variant)
    for name, grad in grads.items():
        error = float(grad.std()) / math.sqrt(ROWS)
        assert abs(float(grad.mean() - exact[name])) < 5 * error, name
        assert error < 0.05


def test_sticking_the_landing_is_biased_for_two_particles() -> None:
    values = {"a": 0.6, "m": 0.9, "r": -0.2}
    params = leaves(**{n: torch.full((ROWS,), v) for n, v in values.items()})
    objective = TraceIWAE_ELBO(2, "stl", vectorize_particles=True)
    _, grads = gradients(
        objective, model_1d(params), guide_1d(params), params, torch.full((ROWS,), 1.5)
    )
    exact = exact_gradients(leaves(**values), 1.5, 2, 1, {})
    error = float(grads["r"].std()) / math.sqrt(ROWS)
    assert abs(float(grads["r"].mean() - exact["r"])) > 5 * error
    error = float(grads["a"].std()) / math.sqrt(ROWS)
    assert abs(float(grads["a"].mean() - exact["a"])) < 5 * error


class Forced(Messenger):
    """Gives a site these values, once there are any."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.values: torch.Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site and self.values is not None:
            msg["value"], msg["done"] = self.values, True


def categories(rows: int) -> tuple[Any, Any, Tensors, torch.Tensor]:
    """Three categories; each row has parameters of its own, all alike."""
    values = {"prior": [0.3, -0.2, 0.5], "locs": [-1.0, 0.4, 1.3], "q": [0.2, -0.6, 0.4]}
    params = leaves(**{n: torch.tensor(v).repeat(rows, 1) for n, v in values.items()})

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=params["prior"]))
            locs = params["locs"].expand(*c.shape, 3).gather(-1, c[..., None])[..., 0]
            pyro.sample("x", dist.Normal(locs, 0.8), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("c", dist.Categorical(logits=params["q"]))

    return model, guide, params, torch.full((rows,), 0.7)


@pytest.mark.parametrize("estimator", ["standard", "vimco"])
@pytest.mark.parametrize(
    ("num", "variant"),
    [
        (2, {}),
        (3, {}),
        (2, {"elbo_weight": 0.4}),
        (2, {"num_groups": 2}),
        (2, {"num_groups": 2, "partial": True}),
    ],
)
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_discrete_gradients_by_enumeration(
    estimator: Any, num: int, variant: Any, beta: float
) -> None:
    """Every tuple of values is a row: weighted by probability, their gradients are exact."""
    total = num * variant.get("num_groups", 1)
    tuples = torch.tensor(list(product(range(3), repeat=total)))
    model, guide, params, x = categories(len(tuples))
    objective = TraceIWAE_ELBO(num, estimator, vectorize_particles=True, **variant)
    forced = Forced("c")
    pair = scale_kl(model, beta), scale_kl(forced(guide), beta)
    objective.loss(*pair, x)  # The first look.
    forced.values = tuples.T
    loss, grads = gradients(objective, *pair, params, x)

    p = {n: v[0].detach().requires_grad_() for n, v in params.items()}
    log_q, log_prior = p["q"].log_softmax(-1), p["prior"].log_softmax(-1)
    log_w = Normal(p["locs"], 0.8).log_prob(x[0]) + beta * (log_prior - log_q)
    log_w = log_w[tuples].T
    of_model, of_guide = combined(log_w, **variant), combined(log_w, **variant | {"partial": False})
    assert loss == pytest.approx(-float(of_model.sum().detach()))
    mass = log_q[tuples].sum(1).exp()
    losses = {"prior": of_model, "locs": of_model, "q": of_guide}
    for name, bound in losses.items():
        (wanted,) = torch.autograd.grad(-(mass * bound).sum(), [p[name]], retain_graph=True)
        mean = (mass.detach()[:, None] * grads[name]).sum(0)
        torch.testing.assert_close(mean, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("elbo_weight", [0.0, 0.4, 1.0])
def test_vimco_at_the_exact_posterior(elbo_weight: float) -> None:
    """All particles are as good as their comparison: no score but that of the entropy is left."""
    model, guide, params, x = categories(4)
    p = {n: v.detach() for n, v in params.items()}
    with torch.no_grad():
        params["q"].copy_(p["prior"] + Normal(p["locs"], 0.8).log_prob(x[:, None]))
    objective, recorder = TraceIWAE_ELBO(3, "vimco", elbo_weight=elbo_weight), Recorder()
    _, grads = gradients(objective, model, recorder(guide), params, x)
    q = params["q"].detach().requires_grad_()
    score = q.log_softmax(-1).expand(3, 4, 3).gather(-1, recorder.last("c", 3, 4)[..., None])
    (wanted,) = torch.autograd.grad(score.mean(0).sum(), [q])
    torch.testing.assert_close(grads["q"], wanted)


def test_vimco_varies_less_than_the_plain_score_function() -> None:
    model, guide, params, x = categories(ROWS)
    variances, means = {}, {}
    for estimator in ("standard", "vimco"):
        objective = TraceIWAE_ELBO(5, estimator, vectorize_particles=True)
        _, grads = gradients(objective, model, guide, params, x)
        means[estimator], variances[estimator] = grads["q"].mean(0), grads["q"].var(0)
    error = ((variances["standard"] + variances["vimco"]) / ROWS).sqrt()
    assert ((means["standard"] - means["vimco"]).abs() < 5 * error).all()
    assert (variances["vimco"] < 0.2 * variances["standard"]).all()


def test_the_score_function_of_a_single_particle() -> None:
    model, guide, params, x = categories(3)
    objective, forced = TraceIWAE_ELBO(1), Forced("c")
    forced_guide = forced(guide)
    objective.loss(model, forced_guide, x)
    forced.values = torch.arange(3)
    loss, grads = gradients(objective, model, forced_guide, params, x)
    p = {n: v[0].detach().requires_grad_() for n, v in params.items()}
    log_q = p["q"].log_softmax(-1)
    log_p = p["prior"].log_softmax(-1) + Normal(p["locs"], 0.8).log_prob(x[0])
    elbo = (log_q.exp() * (log_p - log_q)).sum()
    (wanted,) = torch.autograd.grad(-elbo, [p["q"]])
    torch.testing.assert_close((log_q.exp()[:, None] * grads["q"]).sum(0).detach(), wanted)


@pytest.mark.parametrize("estimator", ["standard", "vimco"])
@pytest.mark.parametrize("normal_first", [True, False])
def test_discrete_and_normal_latents_together(estimator: Any, normal_first: bool) -> None:
    """Against sums over the coin and quadrature over the noise, two particles."""
    values = {"q": 0.4, "m": 0.3, "d": 0.8, "a": -0.5}
    params = leaves(**{n: torch.full((ROWS,), v) for n, v in values.items()})

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(params["a"] * c, 1.0))
            pyro.sample("x", dist.Normal(z + c, 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            if normal_first:
                z = pyro.sample("z", dist.Normal(params["m"], 0.8))
                pyro.sample("c", dist.Bernoulli(logits=params["q"] + params["d"] * z))
            else:
                c = pyro.sample("c", dist.Bernoulli(logits=params["q"]))
                pyro.sample("z", dist.Normal(params["m"] + params["d"] * c, 0.8))

    objective = TraceIWAE_ELBO(2, estimator, vectorize_particles=True)
    _, grads = gradients(objective, model, guide, params, torch.full((ROWS,), 1.2))

    p = leaves(**values)
    nodes, weights = hermite(40)
    noise = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(weights, weights).prod(1)
    loss: torch.Tensor | float = 0.0
    for coins in product([0.0, 1.0], repeat=2):
        c = torch.tensor(coins)
        if normal_first:
            z = p["m"] + 0.8 * noise
            log_q = Normal(p["m"], 0.8).log_prob(z)
            of_coin = dist.Bernoulli(logits=p["q"] + p["d"] * z).log_prob(c.expand_as(z))
        else:
            z = p["m"] + p["d"] * c + 0.8 * noise
            log_q = Normal(p["m"] + p["d"] * c, 0.8).log_prob(z)
            of_coin = dist.Bernoulli(logits=p["q"]).log_prob(c).expand_as(z)
        log_p = dist.Bernoulli(0.3).log_prob(c) + Normal(p["a"] * c, 1.0).log_prob(z)
        log_p = log_p + Normal(z + c, 0.7).log_prob(torch.tensor(1.2))
        bound = mean_exp(log_p - log_q - of_coin, 1)
        loss = loss - (mass * of_coin.sum(1).exp() * bound).sum()
    exact = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    for name, grad in grads.items():
        error = float(grad.std()) / math.sqrt(ROWS)
        assert abs(float(grad.mean() - exact[name])) < 5 * error, name
        assert error < 0.05


def test_signal_to_noise_of_the_guides_gradient() -> None:
    """With the particles it falls for standard and rises for dreg, which stay below stl's."""
    ratios: dict[str, list[float]] = {}
    for estimator, num in product(PATHWISE, [1, 100]):
        params = leaves(a=0.6, m=torch.full((2000,), 0.7), r=torch.full((2000,), -0.1))
        objective = TraceIWAE_ELBO(num, estimator, vectorize_particles=True)
        x = torch.full((2000,), 1.5)
        _, grads = gradients(objective, model_1d(params), guide_1d(params), params, x)
        ratio = grads["m"].mean().abs() / grads["m"].std()
        ratios.setdefault(estimator, []).append(float(ratio))
    error = 1 / math.sqrt(2000)  # Of a ratio well below one.
    assert ratios["standard"][0] - ratios["standard"][1] > 5 * error
    assert ratios["dreg"][1] - ratios["dreg"][0] > 5 * error
    for estimator in ("stl", "dreg"):
        assert ratios[estimator][1] - ratios["standard"][1] > 5 * error


def test_leave_one_out_by_hand() -> None:
    log_w = torch.randn(2, 5, 3) * 30
    log_w[0, 1, 0] = log_w[1, 2:4, 1] = -math.inf  # Particles without weight.
    result, baseline = _leave_one_out(log_w)
    for k in range(5):
        others = torch.cat([log_w[:, :k], log_w[:, k + 1 :]], 1)
        replaced = log_w.clone()
        replaced[:, k] = others.mean(1)
        torch.testing.assert_close(baseline[:, k], others.mean(1))
        torch.testing.assert_close(result[:, k], replaced.logsumexp(1) - math.log(5))


# ---------------------------------------------------------------- weights, masks, plates


def weights_of(params: Tensors, x: torch.Tensor, u: torch.Tensor, beta: float = 1.0) -> Any:
    """Log-weights with the latents' part multiplied by beta."""
    prior = Normal(0.0, 1.0).log_prob(u).sum(-1)
    likelihood = log_p_by_hand(params, x, u) - prior
    return likelihood + beta * (prior - log_q_by_hand(params, x, u))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("estimator", ["standard", "dreg"])
def test_a_subsample_stands_for_all_data(estimator: Any, drawn: bool, vectorize: bool) -> None:
    """Its weight is outside the logarithm, and all particles see the same rows."""
    inner_model, inner_guide, params, x = gaussian_pair(num_data=10)
    rows: list[list[int]] = []

    def in_plate(program: Any) -> Any:
        def run(x: torch.Tensor, index: torch.Tensor | None = None) -> None:
            how = {"subsample_size": 4} if index is None else {"subsample": index}
            with pyro.plate("rows", len(x), **how) as i:
                rows.append(i.tolist())
                program(x[i])

        return run

    def model(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = u @ params["W"].T + params["b"]
        pyro.sample("obs", dist.Normal(loc, params["s"].exp()).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = x @ params["A"].T + params["c"]
        pyro.sample("u", dist.Normal(loc, params["r"].exp()).to_event(1))

    objective = TraceIWAE_ELBO(3, estimator, vectorize_particles=vectorize)
    recorder, index = Recorder(), torch.tensor([7, 1, 2, 5])
    arguments = (x,) if drawn else (x, index)
    programs = in_plate(model), recorder(in_plate(guide))
    seen = []
    for _ in range(2):
        rows.clear()
        loss, grads = gradients(objective, *programs, params, *arguments)
        assert all(row == rows[-1] for row in rows[-6 if not vectorize else -2 :])
        seen.append(rows[-1])
        chosen, u = x[rows[-1]], recorder.last("u", 3, 4, 2)
        bound = mean_exp(weights_of(params, chosen, u), 0).sum()
        assert loss == pytest.approx(-2.5 * float(bound.detach()), abs=1e-10)
        values = list(params.values())[:3]
        for grad, expected in zip(grads.values(), torch.autograd.grad(bound, values), strict=False):
            torch.testing.assert_close(grad, -2.5 * expected)
    assert (seen[0] != seen[1]) == drawn


def test_subsamples_of_all_rows_average_to_the_whole() -> None:
    params = leaves(a=0.8)

    def model(x: torch.Tensor, index: torch.Tensor) -> None:
        with pyro.plate("n", 6, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(params["a"] * z, 1.0), obs=x[index])

    def exact(x: torch.Tensor, index: torch.Tensor) -> None:
        precision = 1 + params["a"] ** 2
        with pyro.plate("n", 6, subsample=index):
            pyro.sample("z", dist.Normal(params["a"] * x[index] / precision, precision**-0.5))

    objective, x = TraceIWAE_ELBO(4), torch.randn(6)
    parts = [objective.loss(model, exact, x, torch.tensor(i)) for i in ([0, 3], [1, 2], [4, 5])]
    whole = objective.loss(model, exact, x, torch.arange(6))
    log_prob = Normal(0.0, (1 + params["a"] ** 2).sqrt()).log_prob(x)
    assert whole == pytest.approx(-float(log_prob.sum().detach()), abs=1e-10)
    assert sum(parts) / 3 == pytest.approx(whole, abs=1e-10)


@pytest.mark.parametrize("estimator", PATHWISE)
@pytest.mark.parametrize("kind", ["number", "0-d", "per row"])
@pytest.mark.parametrize("variant", [{}, {"num_groups": 2, "partial": True, "elbo_weight": 0.3}])
def test_weights_of_data_stand_outside_the_logarithm(
    kind: str, estimator: Any, variant: Any
) -> None:
    chain, x = Chain((1, 2), bend=0.15), torch.randn(4)
    weight: Any = {"number": 0.25, "0-d": torch.tensor(0.25), "per row": torch.rand(4) + 0.2}[kind]
    recorder, params = Recorder(), chain.model_params | chain.guide_params
    programs = poutine.scale(chain.model, weight), recorder(poutine.scale(chain.guide, weight))
    objective, num = TraceIWAE_ELBO(3, estimator, **variant), 3 * variant.get("num_groups", 1)
    loss, grads = gradients(objective, *programs, params, x)
    z = {name: recorder.last(name, num, 4) for name in ("z1", "z2")}
    value, of_model, of_guide = by_hand(chain, x, z, estimator, weight=weight, **variant)
    assert loss == pytest.approx(value, abs=1e-10)
    for name, expected in (of_model | of_guide).items():
        torch.testing.assert_close(grads[name], expected, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_kl_acts_inside_the_logarithm(estimator: Any) -> None:
    model, guide, params, x = gaussian_pair()
    for beta in (0.0, 0.3, torch.tensor(2.0), Constant(0.5)):
        number = float(getattr(beta, "value", beta))
        recorder, objective = Recorder(), TraceIWAE_ELBO(4, estimator)
        pair = scale_kl(model, beta), recorder(scale_kl(guide, beta))
        loss, grads = gradients(objective, *pair, params, x)
        u = recorder.last("u", 4, 6, 2)
        bound = mean_exp(weights_of(params, x, u, number), 0).sum()
        assert loss == pytest.approx(-float(bound.detach()), abs=1e-10)
        (expected,) = torch.autograd.grad(-bound, [params["W"]])
        torch.testing.assert_close(grads["W"], expected)


def test_beta_inside_and_weights_of_data_outside() -> None:
    model, guide, params, x = gaussian_pair()
    weight, recorder = torch.rand(6) + 0.2, Recorder()
    pair = [poutine.scale(scale_kl(program, 0.4), weight) for program in (model, recorder(guide))]
    loss = TraceIWAE_ELBO(4).loss(*pair, x)
    u = recorder.last("u", 4, 6, 2)
    bound = (weight * mean_exp(weights_of(params, x, u, 0.4), 0)).sum()
    assert loss == pytest.approx(-float(bound.detach()), abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_rows_count_for_nothing(estimator: Any) -> None:
    model, guide, params, x = gaussian_pair()
    mask = torch.tensor([True, False, True, True, False, True])
    objective, recorder = TraceIWAE_ELBO(4, estimator), Recorder()
    pair = poutine.mask(model, mask), recorder(poutine.mask(guide, mask))
    loss, grads = gradients(objective, *pair, params, x)
    u = recorder.last("u", 4, 6, 2)
    bound = mean_exp(weights_of(params, x, u), 0)[mask].sum()
    assert loss == pytest.approx(-float(bound.detach()), abs=1e-10)
    broken = x.clone()
    broken[~mask] = 1e6
    pyro.set_rng_seed(2)
    _, grads = gradients(objective, *pair, params, x)
    pyro.set_rng_seed(2)
    _, others = gradients(objective, *pair, params, broken)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad)


def test_observations_that_are_partly_missing() -> None:
    """A mask inside the distribution, and one around the observation alone."""
    params, recorder = leaves(a=0.5), Recorder()
    x, seen = torch.randn(5, 3), torch.rand(5, 3) > 0.4
    rows = torch.tensor([True, True, False, True, False])

    def model() -> None:
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(params["a"] * z[..., None], 1.0)
            pyro.sample("x", fn.expand([*z.shape, 3]).mask(seen).to_event(1), obs=x)
            with poutine.mask(mask=rows):
                pyro.sample("y", dist.Normal(z, 2.0), obs=x[:, 0])

    def guide() -> None:
        with pyro.plate("n", 5):
            pyro.sample("z", dist.Normal(0.3, 0.9))

    loss = TraceIWAE_ELBO(6).loss(model, recorder(guide))
    z = recorder.last("z", 6, 5)
    log_w = Normal(0.0, 1.0).log_prob(z) - Normal(0.3, 0.9).log_prob(z)
    log_w = log_w + (Normal(0.5 * z[..., None], 1.0).log_prob(x) * seen).sum(-1)
    log_w = log_w + Normal(z, 2.0).log_prob(x[:, 0]) * rows
    assert loss == pytest.approx(-float(mean_exp(log_w, 0).sum()), abs=1e-10)


def test_observations_with_scales_of_their_own() -> None:
    """What differs between the sites of a datum belongs inside."""
    recorder, x = Recorder(), torch.randn(5)

    def model() -> None:
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            with poutine.scale(scale=0.2):
                pyro.sample("y", dist.Normal(z, 2.0), obs=x)

    def guide() -> None:
        with pyro.plate("n", 5):
            pyro.sample("z", dist.Normal(0.3, 0.9))

    loss = TraceIWAE_ELBO(6).loss(model, recorder(guide))
    z = recorder.last("z", 6, 5)
    log_w = Normal(0.0, 1.0).log_prob(z) - Normal(0.3, 0.9).log_prob(z)
    log_w = log_w + Normal(z, 1.0).log_prob(x) + 0.2 * Normal(z, 2.0).log_prob(x)
    assert loss == pytest.approx(-float(mean_exp(log_w, 0).sum()), abs=1e-10)


@pytest.mark.parametrize("estimator", PATHWISE)
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_plate_inside_the_data(estimator: Any, vectorize: bool) -> None:
    """Groups with a latent of their own and one for each member, at the exact posterior."""
    params, x = leaves(shift=0.0, inner=0.5, outer=1 / 9), torch.randn(4, 5)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("groups", 4, dim=-2):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 5, dim=-1):
                z = pyro.sample("z", dist.Normal(c, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        # c | x: precision 1 + 5/2, mean sum(x)/2 over it; z | c, x: mean (c + x) / 2.
        loc = x.sum(-1, keepdim=True) / 7 + params["shift"]
        with pyro.plate("some", 4, dim=-2):
            c = pyro.sample("c", dist.Normal(loc, 3.5**-0.5))
            with pyro.plate("others", 5, dim=-1):
                loc = params["inner"] * c + x / 2
                pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    cov = 2 * torch.eye(5) + torch.ones(5, 5)
    exact = torch.distributions.MultivariateNormal(torch.zeros(5), cov).log_prob(x).sum()
    objective = TraceIWAE_ELBO(3, estimator, vectorize_particles=vectorize)
    loss, grads = gradients(objective, model, guide, params, x)
    assert loss == pytest.approx(-float(exact), abs=1e-10)
    largest = max(float(g.abs().max()) for g in grads.values())
    assert largest < 1e-10 if estimator in ("stl", "dreg") else largest > 1e-2

    with torch.no_grad():  # Away from it: one weight for each group.
        params["inner"].fill_(0.1)
    recorder = Recorder()
    loss = objective.loss(model, recorder(guide), x)
    c, z = recorder.last("c", 3, 4, 1), recorder.last("z", 3, 4, 5)
    log_w = Normal(c, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)
    log_w = log_w - Normal(0.1 * c + x / 2, 0.5**0.5).log_prob(z)
    of_c = Normal(0.0, 1.0).log_prob(c) - Normal(x.sum(-1, keepdim=True) / 7, 3.5**-0.5).log_prob(c)
    bound = mean_exp(log_w.sum(-1) + of_c[..., 0], 0).sum()
    assert loss == pytest.approx(-float(bound), abs=1e-10)


def shared_latent(x: torch.Tensor, index: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x), subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def guide_of_shared(x: torch.Tensor, index: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.2, 0.7))
    with pyro.plate("n", len(x), subsample=index) as rows:
        pyro.sample("z", dist.Normal((w + x[rows]) / 2, 0.8))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_latent_that_all_data_share_has_one_weight_with_them(vectorize: bool) -> None:
    x, recorder = torch.randn(4), Recorder()
    for scale in (1.0, 0.5):
        objective = TraceIWAE_ELBO(5, vectorize_particles=vectorize)
        pair = [poutine.scale(p, scale) for p in (shared_latent, recorder(guide_of_shared))]
        loss = objective.loss(*pair, x)
        w, z = recorder.last("w", 5, 1), recorder.last("z", 5, 4)
        log_w = Normal(w, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)
        log_w = (log_w - Normal((w + x) / 2, 0.8).log_prob(z)).sum(-1)
        log_w = log_w + (Normal(0.0, 1.0).log_prob(w) - Normal(0.2, 0.7).log_prob(w))[:, 0]
        assert loss == pytest.approx(-scale * float(mean_exp(log_w, 0)), abs=1e-10)


def test_a_latent_outside_a_subsampled_plate_is_refused() -> None:
    message = "inside the subsampled plate 'n', got site 'w' outside it"
    with pytest.raises(ValueError, match=message):
        TraceIWAE_ELBO(5).loss(shared_latent, guide_of_shared, torch.randn(4), torch.tensor([1, 2]))


@pytest.mark.parametrize("subsample", [None, torch.tensor([1, 3])])
@pytest.mark.parametrize("shared", [False, True])
def test_a_loop_over_a_subsampled_plate(subsample: torch.Tensor | None, shared: bool) -> None:
    """Its rows share one weight, unless there is a latent outside."""
    recorder, x = Recorder(), torch.randn(6)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if shared else 0.0
        for i in pyro.plate("rows", 6, subsample=subsample):
            z = pyro.sample(f"z{i}", dist.Normal(w, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide() -> None:
        if shared:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 6, subsample=subsample):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 3, 0.8))

    objective = TraceIWAE_ELBO(4)
    if shared and subsample is not None:
        with pytest.raises(ValueError, match="inside the subsampled plate 'rows', got site 'w'"):
            objective.loss(model, guide)
        return
    loss = objective.loss(model, recorder(guide))
    rows = torch.arange(6) if subsample is None else subsample
    z = torch.stack([recorder.last(f"z{i}", 4) for i in rows], -1)
    w = recorder.last("w", 4)[:, None] if shared else 0.0
    log_w = Normal(w, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x[rows])
    log_w = (log_w - Normal(x[rows] / 3, 0.8).log_prob(z)).sum(-1)
    expected = -6 / len(rows) * float(mean_exp(log_w, 0))
    assert loss == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("subsample", [None, torch.tensor([1, 3, 4])])
@pytest.mark.parametrize("only_model", [True, False])
@pytest.mark.parametrize("weight", [2.0, torch.tensor([[0.3], [2.0], [0.7], [1.0], [1.5], [0.2]])])
def test_with_one_particle_all_scales_are_pyros(
    subsample: Any, only_model: bool, weight: Any
) -> None:
    """Around both programs or one, around single sites, of rows and of columns, with masks."""
    params, x = leaves(a=0.3, b=0.5, c=-0.2), torch.randn(6, 3)
    rows = torch.arange(6) if subsample is None else subsample
    weight = weight[rows] if isinstance(weight, torch.Tensor) else weight
    mask, columns = (torch.arange(6) != 3)[rows, None], torch.rand(3)

    def program(in_guide: bool) -> None:
        with pyro.plate("rows", 6, subsample=subsample, dim=-2), poutine.mask(mask=mask):
            zero = torch.zeros(len(rows), 1)
            with poutine.scale(scale=0.5):
                loc = x[rows, :1] * params["a"] if in_guide else zero
                z = pyro.sample("z", dist.Normal(loc, 1.0))
            with pyro.plate("columns", 3, dim=-1), poutine.scale(scale=columns):
                loc = params["b"] * z + x[rows] * params["c"] if in_guide else z.expand(-1, 3)
                u = pyro.sample("u", dist.Normal(loc, 0.8))
                if not in_guide:
                    pyro.sample("x", dist.Normal(u, 1.0), obs=x[rows])
            if not in_guide:
                with poutine.scale(scale=3.0):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows, 1:2])

    model = poutine.scale(scale_kl(lambda: program(False), 0.4), weight)
    guide = scale_kl(lambda: program(True), 0.4)
    guide = guide if only_model else poutine.scale(guide, weight)
    results = []
    for objective in (Trace_ELBO(), TraceIWAE_ELBO(1)):
        pyro.set_rng_seed(4)
        loss = objective.differentiable_loss(model, guide)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(params.values()))])
    torch.testing.assert_close(results[1], results[0])


def test_the_refusal_also_comes_later() -> None:
    objective, x = TraceIWAE_ELBO(5), torch.randn(4)
    objective.loss(shared_latent, guide_of_shared, x)
    with pytest.raises(ValueError, match="got site 'w' outside it"):
        objective.loss(shared_latent, guide_of_shared, x, torch.tensor([1, 2]))


def test_a_subsampled_plate_within_a_datum_is_refused() -> None:
    x = torch.randn(3, 5)

    def model() -> None:
        with pyro.plate("n", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 5, subsample=torch.tensor([0, 3]), dim=-1) as rows:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, rows])

    def guide() -> None:
        with pyro.plate("n", 3, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))

    with pytest.raises(ValueError, match="inside the subsampled plate 'parts', got site 'z'"):
        TraceIWAE_ELBO(5).loss(model, guide)


@pytest.mark.parametrize("estimator", PATHWISE)
def test_without_any_plate(estimator: Any) -> None:
    params, x, recorder = leaves(m=0.4), torch.randn(3), Recorder()

    def model(*, data: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide(*, data: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(params["m"] * data, 0.5**0.5).to_event(1))

    objective = TraceIWAE_ELBO(4, estimator)
    loss = objective.loss(model, recorder(guide), data=x)
    z = recorder.last("z", 4, 3)
    log_w = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)
    log_w = (log_w - Normal(0.4 * x, 0.5**0.5).log_prob(z)).sum(-1)
    assert loss == pytest.approx(-float(mean_exp(log_w, 0)), abs=1e-10)
    with torch.no_grad():
        params["m"].fill_(0.5)
    loss, grads = gradients(objective, model, guide, params, data=x)
    exact = Normal(0.0, 2**0.5).log_prob(x).sum()
    assert loss == pytest.approx(-float(exact), abs=1e-10)
    assert (grads["m"].abs() < 1e-10) == (estimator != "standard")


def test_another_plate_of_the_same_size_is_not_the_datas() -> None:
    """As many components as data: all data share them, so there is one weight for all."""
    x, recorder = torch.randn(3), Recorder()

    def model() -> None:
        with pyro.plate("components", 3):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(m.sum(-1, keepdim=True), 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("components", 3):
            pyro.sample("m", dist.Normal(0.3, 0.8))

    loss = TraceIWAE_ELBO(5).loss(model, recorder(guide))
    m = recorder.last("m", 5, 3)
    log_w = Normal(0.0, 1.0).log_prob(m) - Normal(0.3, 0.8).log_prob(m)
    log_w = (log_w + Normal(m.sum(-1, keepdim=True), 1.0).log_prob(x)).sum(-1)
    assert loss == pytest.approx(-float(mean_exp(log_w, 0)), abs=1e-10)


def test_the_guide_may_name_its_plates_otherwise() -> None:
    index, x = torch.tensor([0, 2]), torch.randn(6)

    def programs(name: str) -> tuple[Any, Any]:
        def model() -> None:
            with pyro.plate(name, 6, subsample=index):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide() -> None:
            with pyro.plate("of data", 6, subsample=index):
                pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))

        return model, guide

    exact = -3 * float(Normal(0.0, 2**0.5).log_prob(x[index]).sum())
    for name in ("of data", "rows"):
        assert TraceIWAE_ELBO(3).loss(*programs(name)) == pytest.approx(exact, abs=1e-10)


# ---------------------------------------------------------------- guides of Pyro


def conjugate(x: torch.Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rate = pyro.sample("rate", dist.LogNormal(z, 0.5))
        pyro.sample("x", dist.Normal(rate, 1.0), obs=x)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("estimator", PATHWISE)
def test_automatic_guides(kind: Any, estimator: Any) -> None:
    """Auxiliary sites and point masses; a coupled guide has one weight for all data."""
    x, guide, recorder = torch.rand(4), kind(conjugate), Recorder()
    objective = TraceIWAE_ELBO(6, estimator)
    objective.loss(conjugate, recorder(guide), x)
    params = dict(guide.named_parameters())
    if kind is AutoDelta and estimator in ("stl", "dreg"):
        with pytest.raises(ValueError, match=r"point mass \(Delta\) with parameters of its own"):
            gradients(objective, conjugate, recorder(guide), params, x)
        return
    loss, grads = gradients(objective, conjugate, recorder(guide), params, x)
    values = {name: recorder.last(name, 6, 4) for name in ("z", "rate")}
    log_w = Normal(0.0, 1.0).log_prob(values["z"]) + Normal(values["rate"], 1.0).log_prob(x)
    log_w = log_w + dist.LogNormal(values["z"], 0.5).log_prob(values["rate"])
    if kind is AutoNormal:
        for name in values:
            fn = Normal(getattr(guide.locs, name), getattr(guide.scales, name))
            u = recorder.last(f"{name}_unconstrained", 6, 4)
            log_w = log_w - fn.log_prob(u)
        log_w = log_w + values["rate"].log()
    if kind is AutoMultivariateNormal:
        u = recorder.last("_AutoMultivariateNormal_latent", 6, 8)
        fn = guide.get_posterior()
        log_w = (log_w + values["rate"].log()).sum(-1) - fn.log_prob(u)
    bound = mean_exp(log_w, 0).sum()
    assert loss == pytest.approx(-float(bound.detach()), abs=1e-10)
    assert all(float(g.abs().max()) > 0 for g in grads.values())


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_an_automatic_guide_at_the_exact_posterior(estimator: Any) -> None:
    """Through its unconstrained sites: a log-normal prior seen through its logarithm."""
    x = torch.randn(4)

    def model() -> None:
        with pyro.plate("n", 4):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(rate.log(), 1.0), obs=x)

    guide = AutoNormal(model)
    guide()
    guide.locs.rate = x / 2
    guide.scales.rate = torch.full((4,), 0.5**0.5)
    params = dict(guide.named_parameters())
    loss, grads = gradients(TraceIWAE_ELBO(3, estimator), model, guide, params)
    exact = Normal(0.0, 2**0.5).log_prob(x).sum()
    assert loss == pytest.approx(-float(exact), abs=1e-9)
    assert all(float(g.abs().max()) < 1e-9 for g in grads.values())


def test_a_factor_in_the_guide_counts() -> None:
    def model() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(0.0, 0.5**0.5))
            pyro.factor("more", torch.tensor(0.25), has_rsample=False)

    exact = 3 * Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
    assert TraceIWAE_ELBO(3).loss(model, guide) == pytest.approx(0.75 - float(exact), abs=1e-10)


def test_a_guide_without_latents() -> None:
    params, x = leaves(m=0.4), torch.randn(5)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(params["m"], 1.0), obs=x)

    for estimator in PATHWISE:
        loss, grads = gradients(TraceIWAE_ELBO(3, estimator), model, lambda x: None, params, x)
        assert loss == pytest.approx(-float(Normal(0.4, 1.0).log_prob(x).sum()))
        torch.testing.assert_close(grads["m"], -(x - 0.4).sum())


# ---------------------------------------------------------------- what else it meets


@pytest.mark.parametrize("estimator", ["standard", "vimco"])
def test_particles_without_weight(estimator: Any) -> None:
    """Where the model has no density the weight is 0, and the bound is of the others."""
    params = leaves(q=[0.1, 0.2, 0.3])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.tensor([0.0, 0.5, -math.inf])))
            pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("c", dist.Categorical(logits=params["q"]))

    forced = Forced("c")
    pair, x = (model, forced(guide)), torch.tensor([0.3])
    objective = TraceIWAE_ELBO(4, estimator, vectorize_particles=True)
    forced.values = torch.tensor([1])
    objective.loss(*pair, x)
    forced.values = torch.tensor([[0], [2], [1], [1]])
    loss, grads = gradients(objective, *pair, params, x)
    c = torch.tensor([0, 1, 1])
    log_p = torch.tensor([0.0, 0.5]).log_softmax(0)[c] + Normal(c.double(), 1.0).log_prob(x)
    log_w = log_p - params["q"].detach().log_softmax(0)[c]
    assert loss == pytest.approx(math.log(4) - float(log_w.logsumexp(0)), abs=1e-10)
    assert grads["q"].isfinite().all()
    assert torch.isfinite(objective.differentiable_loss(*pair, x).detach())


def test_many_particles() -> None:
    model, guide, params, x = gaussian_pair()
    for estimator in ESTIMATORS:
        objective = TraceIWAE_ELBO(20_000, estimator)
        loss, _ = gradients(objective, model, guide, params, x)
        w = params["W"].detach()
        cov = w @ w.T + (2 * params["s"].detach()).exp() * torch.eye(3)
        fn = torch.distributions.MultivariateNormal(params["b"].detach(), cov)
        assert loss == pytest.approx(-float(fn.log_prob(x).sum()), abs=0.2)


def test_latents_that_are_summed_out_are_refused() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match="expected the guide to sample every latent, got no site"):
        TraceIWAE_ELBO(3).loss(model, lambda x: None, torch.randn(4))


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_samples_without_gradient_are_refused(estimator: Any) -> None:
    model, guide, _, x = categories(2)
    with pytest.raises(ValueError, match=rf"estimator='{estimator}'\): expected a reparam.*'c'"):
        TraceIWAE_ELBO(3, estimator).loss(model, guide, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_particles": 0}, "expected num_particles >= 1"),
        ({"num_groups": 0}, "expected num_groups >= 1"),
        ({"estimator": "drag"}, "expected estimator in .*got 'drag'"),
        ({"num_particles": 1, "estimator": "vimco"}, "expected num_particles >= 2"),
        ({"elbo_weight": -0.1}, "expected a finite .* >= 0"),
        ({"elbo_weight": 1.1}, "expected elbo_weight <= 1, got 1.1"),
        ({"elbo_weight": torch.ones(2)}, "expected a 0-d tensor"),
    ],
)
def test_arguments_that_mean_nothing(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TraceIWAE_ELBO(**({"num_particles": 2} | arguments))


@pytest.mark.parametrize("arguments", [{"num_particles": 2.0}, {"elbo_weight": "half"}])
def test_arguments_of_another_type(arguments: Any) -> None:
    with pytest.raises(TypeError, match=r"expected (an integer num_particles|.*elbo_weight)"):
        TraceIWAE_ELBO(**({"num_particles": 2} | arguments))


@pytest.mark.parametrize("estimator", ["standard", "dreg"])
def test_the_weight_of_the_elbo_may_change(estimator: Any) -> None:
    model, guide, params, x = gaussian_pair()
    schedule = LinearWarmup(2, start=1.0, end=0.0)
    objective = TraceIWAE_ELBO(4, estimator, elbo_weight=schedule)
    for weight in (1.0, 0.5, 0.0):
        pyro.set_rng_seed(1)
        loss, grads = gradients(objective, model, guide, params, x)
        pyro.set_rng_seed(1)
        fixed = TraceIWAE_ELBO(4, estimator, elbo_weight=weight)
        expected, others = gradients(fixed, model, guide, params, x)
        assert loss == pytest.approx(expected)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, others[name])
        schedule.step()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_schedule_at_its_end_is_the_number(weight: float) -> None:
    """Also where a particle has a density of 0, so that the ELBO is -inf."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if weight == 0:
                pyro.factor("f", torch.where(z > 0, 0.0, -math.inf))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    losses = []
    for given in (weight, torch.tensor(weight)):
        pyro.set_rng_seed(0)
        objective = TraceIWAE_ELBO(20, elbo_weight=given)
        losses.append(objective.loss(model, guide, torch.tensor([0.2, -0.1])))
    assert math.isfinite(losses[0])
    assert losses[0] == losses[1]


def test_a_factor_of_the_guide_without_gradient_has_a_score() -> None:
    """It is the density of something drawn without a gradient; here of either outcome."""
    logits = torch.tensor(0.4, requires_grad=True)
    log_p = torch.tensor([-0.3, -1.7])

    def model(drawn: torch.Tensor) -> None:
        with pyro.plate("data", 1):
            pyro.factor("x", log_p[drawn])

    def guide(drawn: torch.Tensor) -> None:
        with pyro.plate("data", 1):
            log_q = dist.Bernoulli(logits=logits).log_prob(drawn.double())
            pyro.factor("f", log_q, has_rsample=False)

    estimates = []
    for outcome in (0, 1):
        loss = TraceIWAE_ELBO(1).differentiable_loss(model, guide, torch.tensor([outcome]))
        estimates += torch.autograd.grad(loss, logits)
    q = dist.Bernoulli(logits=logits).log_prob(torch.tensor([0.0, 1.0]))
    expected = torch.autograd.grad((q.exp() * (q - log_p)).sum(), logits)[0]
    torch.testing.assert_close((q.exp().detach() * torch.stack(estimates)).sum(), expected)


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
@pytest.mark.parametrize("where", ["value", "density"])
def test_point_masses_with_parameters(estimator: Any, where: str) -> None:
    """Their density does not follow from the samples, so these estimators would lose a part."""
    x, scale = torch.tensor([0.7, -1.2]), torch.zeros(2, requires_grad=True)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.3, 1.2))
            pyro.sample("y", dist.Normal(u, 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            e = pyro.sample("e", dist.Normal(0 * x, 1.0), infer={"is_auxiliary": True})
            size, jacobian = (scale.exp(), -scale) if where == "value" else (1.0, -scale)
            pyro.sample("u", dist.Delta(size * e, log_density=jacobian))

    objective = TraceIWAE_ELBO(3, estimator)
    objective.loss(model, guide, x)  # Its value is right.
    with pytest.raises(ValueError, match="parameters of its own at site 'u'.*'standard'"):
        objective.loss_and_grads(model, guide, x)
    TraceIWAE_ELBO(3).loss_and_grads(model, guide, x)


@pytest.mark.parametrize("vectorize", [None, False, True])
def test_a_flow_without_an_inverse(vectorize: Any) -> None:
    """Its samples are scored while their transforms remember them, particle by particle."""
    planar = dist.transforms.planar(2)
    x, params = torch.randn(4, 2), {"bias": planar.bias, "u": planar.u}

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x / 2, 0.7), [planar]))

    def run() -> tuple[float, dict[str, torch.Tensor]]:
        return gradients(TraceIWAE_ELBO(1, vectorize_particles=vectorize), model, guide, params, x)

    pyro.set_rng_seed(0)
    loss, grads = run()
    pyro.set_rng_seed(0)
    expected = Trace_ELBO().differentiable_loss(model, guide, x)
    assert loss == pytest.approx(float(expected.detach()))
    for name, grad in zip(params, torch.autograd.grad(expected, params.values()), strict=True):
        torch.testing.assert_close(grads[name], grad)
    objective = TraceIWAE_ELBO(5, vectorize_particles=vectorize)
    if vectorize is None:
        with pytest.warns(UserWarning, match="a density cannot be computed again"):
            objective.loss(model, guide, x)
    assert math.isfinite(objective.loss_and_grads(model, guide, x))
    match = "expected a density at any value of site 'z', got a flow that has no inverse"
    for estimator in ("stl", "dreg"):
        with pytest.raises(ValueError, match=match):
            TraceIWAE_ELBO(1, estimator).loss_and_grads(model, guide, x)
