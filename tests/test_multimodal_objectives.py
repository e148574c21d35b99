"""What objectives of several modalities promise, and draws of a mixture in proportion (MMVAE)."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_modalities import LinearModalities, mixed_patterns
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.mixtures import FixedNormalMixture
from pyro_vae.objectives import TraceExpertKL_ELBO, TraceIWAE_ELBO, TraceSubsets_ELBO

Make = Callable[..., Any]
Tensors = dict[str, torch.Tensor]
close = torch.testing.assert_close


def subsets(*args: Any, **of_subsets: Any) -> Make:
    return lambda **k: TraceSubsets_ELBO(TraceMeanField_ELBO(**k), *args, **of_subsets)


MAKE: dict[str, Make] = {
    "expert kl": lambda **k: TraceExpertKL_ELBO(0.3, likelihood_weight=0.8, kl_weight=1.4, **k),
    "subsets": subsets(),
    "subsets, random": subsets(num_random=2),
    "subsets, all": subsets("all", target="all"),
    "subsets, prior": subsets("single", target="all", private="prior"),
    "subsets, iwae": lambda **k: TraceSubsets_ELBO(of_iwae(**k), "single", target="all"),
}


def of_iwae(num_particles: int = 2, **k: Any) -> TraceIWAE_ELBO:
    return TraceIWAE_ELBO(num_particles, "dreg", **k)


@pytest.fixture(params=MAKE)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKE[request.param]


def model(batch: Any, present: Any = None, *, noise: float = 0.5) -> None:
    """A user's, with names of its own and a private latent for each modality."""
    with pyro.plate("people", len(next(iter(batch.values())))):
        code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for name, x in batch.items():
            weight = pyro.param(f"weight of {name}", lambda: torch.randn(2, 3))  # noqa: B023
            with pyro.poutine.mask(mask=mask_of(name, batch, present)):
                own = pyro.sample(f"own {name}", dist.Normal(torch.zeros(()), 1.0))
                loc = code @ weight + own.unsqueeze(-1)
                pyro.sample(f"seen {name}", dist.Normal(loc, noise).to_event(1), obs=x)


def guide(batch: Any, present: Any = None, *, noise: float = 0.5) -> None:
    masks = {name: mask_of(name, batch, present) for name in batch}
    encoders = {n: pyro.param(f"encoder of {n}", lambda: 0.4 * torch.randn(3, 2)) for n in batch}
    loc = sum(torch.where(masks[n].unsqueeze(-1), x @ encoders[n], 0.0) for n, x in batch.items())
    scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
    with pyro.plate("people", len(next(iter(batch.values())))):
        pyro.sample("code", dist.Normal(loc, scale).to_event(1))
        for name, x in batch.items():
            with pyro.poutine.mask(mask=masks[name]):
                pyro.sample(f"own {name}", dist.Normal(0.5 * x.mean(-1), 0.7))


def mask_of(name: str, batch: Any, present: Any) -> torch.Tensor:
    mask: torch.Tensor | None = (present or {}).get(name)
    return torch.ones(len(batch[name]), dtype=torch.bool) if mask is None else mask


def data(rows: int = 6) -> tuple[Tensors, Tensors]:
    batch = {n: torch.randn(rows, 3) for n in ("a", "b", "c")}
    return batch, {"b": torch.arange(rows) % 2 == 0, "c": torch.arange(rows) % 3 > 0}


def gradients(loss: Any, *args: Any) -> tuple[float, Tensors]:
    """The value and the gradient of training, after one seed."""
    store = pyro.get_param_store()
    for name in store:
        store._params[name].grad = None
    pyro.set_rng_seed(5)
    value = loss(model, guide, *args)
    if isinstance(value, torch.Tensor):
        value.backward()
        value = value.item()
    return value, {n: store._params[n].grad for n in store if store._params[n].grad is not None}


def test_it_is_an_elbo_of_pyro(make: Make) -> None:
    objective = make(num_particles=2)
    assert isinstance(objective, ELBO)
    assert objective.num_particles == 2


def test_all_ways_report_the_same_and_have_the_same_gradient(make: Make) -> None:
    args = data()
    make().loss(model, guide, *args)  # Makes the parameters.
    loss, grads = gradients(make().loss_and_grads, *args)
    again, others = gradients(make().differentiable_loss, *args)
    trained, of_training = gradients(make().training_loss, *args)
    assert isinstance(loss, float)
    assert again == pytest.approx(loss)
    close(others, grads)
    close(of_training, grads)
    assert len(grads) == 7
    pyro.set_rng_seed(5)
    if not isinstance(make(), TraceSubsets_ELBO) or make().num_random == 0:
        assert make().loss(model, guide, *args) == pytest.approx(loss)
    with torch.no_grad():
        assert not make().differentiable_loss(model, guide, *args).requires_grad


@pytest.mark.parametrize("name", ["expert kl", "subsets", "subsets, random"])
def test_it_reports_the_joint_bound_and_not_what_it_minimises(name: str) -> None:
    p, objective = LinearModalities(), MAKE[name]()
    batch, present = mixed_patterns(p.data(9))
    pyro.set_rng_seed(3)
    stock = TraceMeanField_ELBO().loss(p.model, p.guide, batch, present)
    losses = []
    for way in (objective.loss, objective.loss_and_grads, objective.differentiable_loss):
        if "random" in name:  # They are drawn before.
            torch.manual_seed(0)
        pyro.set_rng_seed(3)
        losses.append(float(way(p.model, p.guide, batch, present)))
    if "random" not in name:
        assert losses == pytest.approx([stock] * 3)
    assert objective.training_loss(p.model, p.guide, batch, present) != pytest.approx(stock)


def test_a_used_objective_can_be_pickled_and_copied(make: Make) -> None:
    args, objective = data(), make(num_particles=2)
    objective.loss(lambda *a: model(*a), guide, *args)
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        pyro.set_rng_seed(0)
        expected = objective.loss(model, guide, *args)
        pyro.set_rng_seed(0)
        assert again.loss(model, guide, *args) == expected


def test_the_graph_is_kept_where_asked_for(make: Make) -> None:
    args, kept = data(), list[torch.Tensor]()

    def watched(batch: Any, present: Any = None) -> None:
        weight = pyro.param("extra", lambda: torch.ones(()))
        kept.append((weight.exp() * 2).sum())
        factor = kept[-1] / kept[-1].detach()
        guide({n: x * factor for n, x in batch.items()}, present)

    make(retain_graph=True).loss_and_grads(model, watched, *args)
    kept[-1].backward()
    make().loss_and_grads(model, watched, *args)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[-1].backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svi_in_either_dtype_with_short_batches(make: Make, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        objective = make()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        batch, present = data(7)
        for rows in (slice(0, 5), slice(5, 7)):
            some = {n: x[rows] for n, x in batch.items()}, {n: m[rows] for n, m in present.items()}
            assert math.isfinite(svi.step(*some, noise=0.4))
            assert math.isfinite(svi.evaluate_loss(*some, noise=0.4))
        loss = objective.training_loss(model, guide, batch, present, noise=0.4)
        assert loss.dtype == dtype
        assert all(value.dtype == dtype for value in pyro.get_param_store().values())
        assert len(pyro.get_param_store()) == 7
    finally:
        torch.set_default_dtype(torch.float64)


def test_the_first_look_has_no_effect(make: Make) -> None:
    args, fresh, used = data(), make(num_particles=2), make(num_particles=2)
    used.loss(model, guide, *args)
    first, grads = gradients(fresh.loss_and_grads, *args)
    again, others = gradients(used.loss_and_grads, *args)
    assert first == again
    close(grads, others, rtol=0, atol=0)


def test_no_graph_outlives_a_step(make: Make) -> None:
    args, objective, samples = data(), make(), list[Any]()

    class Watch(pyro.poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_post_sample(self, msg: Any) -> None:
            samples.append(weakref.ref(msg["value"]))

    watched = Watch()(guide)
    for _ in range(2):
        objective.loss_and_grads(model, watched, *args)
        objective.loss(model, watched, *args)
    gc.collect()
    kept = [sample() for sample in samples if sample() is not None]
    assert not [value for value in kept if value.is_floating_point()]


# ---------------------------------------------------------------- a mixture's draws in proportion


class Mixture:
    """x_m ~ N(z, 1), z ~ N(0, 1), two rows; q(z | x) the mean of normals about the x_m."""

    def __init__(self, spread: float = 1.0, scale: float = 0.6) -> None:
        self.params = {
            "shift": torch.tensor(0.2).requires_grad_(),
            "log_scale": torch.tensor(math.log(scale)).requires_grad_(),
            "loc": torch.tensor(0.1).requires_grad_(),
        }
        base = torch.tensor([[0.3, -0.5], [1.1, 0.4], [-1.0, 0.2]])
        self.batch = dict(zip("abc", spread * base, strict=True))
        self.present: Tensors = {}

    def model(self, batch: Tensors, present: Any = None) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            for name, x in batch.items():
                with pyro.poutine.mask(mask=mask_of(name, batch, present)):
                    fn = dist.Normal(z.squeeze(-1) + self.params["loc"], 1.0)
                    pyro.sample(name, fn, obs=x)

    def guide(self, batch: Tensors, present: Any = None) -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", self.mixture(batch, present))

    def mixture(self, batch: Tensors, present: Any = None) -> Any:
        loc = torch.stack(list(batch.values()), -1).unsqueeze(-1) + self.params["shift"]
        there = torch.stack([mask_of(n, batch, present) for n in batch], -1)
        logits = torch.zeros(there.shape).masked_fill(~there, -math.inf)
        scale = self.params["log_scale"].exp().expand_as(loc)
        normals = dist.Normal(loc, scale).to_event(1)
        return FixedNormalMixture(dist.Categorical(logits=logits), normals)

    def log_weight(self, z: torch.Tensor, present: Any = None) -> torch.Tensor:
        """log p(x, z) - log q(z | x), ``(*sample, 2)`` for z of that shape."""
        value = dist.Normal(0.0, 1.0).log_prob(z)
        for name, x in self.batch.items():
            log_prob = dist.Normal(z + self.params["loc"], 1.0).log_prob(x)
            value = value + log_prob * mask_of(name, self.batch, present)
        return value - self.mixture(self.batch, present).log_prob(z.unsqueeze(-1))

    def quadrature(self, f: Any, present: Any = None) -> torch.Tensor:
        """E_q[f(z)] for each row and component, ``(2, 3)``, by the trapezoid rule."""
        grid = torch.linspace(-14, 14, 6001)
        fn = self.mixture(self.batch, present)
        normal = fn.component_distribution.base_dist
        density = torch.stack(
            [
                dist.Normal(normal.loc[:, k, 0], normal.scale[:, k, 0])
                .log_prob(grid.unsqueeze(-1))
                .exp()
                for k in range(3)
            ],
            -1,
        )
        return torch.trapezoid(
            density * f(grid.unsqueeze(-1).expand(-1, 2)).unsqueeze(-1), grid, dim=0
        )

    def elbo(self, present: Any = None) -> torch.Tensor:
        """The ELBO of each row by quadrature, with its gradient."""
        values = self.quadrature(lambda z: self.log_weight(z, present), present)
        return (values * self.mixture(self.batch, present).mixture_distribution.probs).sum(-1)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(torch.autograd.grad(value, list(self.params.values())))


PATTERN = {"b": torch.tensor([True, False]), "c": torch.tensor([False, True])}


def sampled(p: Mixture, num: int, objective: Any, present: Any = None) -> torch.Tensor:
    """Negative loss and gradient of several seeds, ``(num, 4)``."""
    found = []
    for _ in range(num):
        loss = objective.differentiable_loss(p.model, p.guide, p.batch, present)
        found.append(-torch.cat([loss.detach().reshape(1), p.gradient(loss)]))
    return torch.stack(found)


def stratified(num: int = 1, estimator: Any = "standard", groups: int = 3, **k: Any) -> Any:
    k = {"stratified": True, "vectorize_particles": True, **k}
    return TraceIWAE_ELBO(num, estimator, num_groups=groups, **k)


def assert_mean(draws: torch.Tensor, expected: torch.Tensor) -> None:
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert (5 * error[0] < 0.05 * expected[0].abs()).all()


@pytest.mark.parametrize("estimator", ["standard", "stl"])
@pytest.mark.parametrize("present", [None, PATTERN])
def test_one_particle_a_group_is_the_elbo_of_the_mixture(estimator: Any, present: Any) -> None:
    """Value and gradient, against quadrature; each group may have one expert's particle."""
    p = Mixture()
    value = p.elbo(present).sum()
    expected = torch.cat([value.detach().reshape(1), p.gradient(value)])
    objective = stratified(1, estimator, groups=60)
    assert_mean(sampled(p, 150, objective, present), expected)


def test_several_particles_a_group() -> None:
    """MMVAE's bound, by brute force: group m has K particles of expert m."""
    p, num = Mixture(), 5
    fn = p.mixture(p.batch).component_distribution.base_dist
    z = dist.Normal(fn.loc.detach(), fn.scale.detach()).sample((40000, num)).squeeze(-1)
    log_w = torch.stack([p.log_weight(z[..., k]) for k in range(3)])
    bounds = (log_w.logsumexp(2) - math.log(num)).mean(0).sum(-1).detach()
    objective = stratified(num)
    draws = torch.tensor([-objective.loss(p.model, p.guide, p.batch) for _ in range(600)])
    error = (bounds.var() / len(bounds) + draws.var() / len(draws)).sqrt()
    assert abs(draws.mean() - bounds.mean()) < 5 * error


def test_there_is_less_noise() -> None:
    """Far-apart experts: chance decides which are drawn, proportion does not."""
    p = Mixture(spread=3.0)
    with_chance, without = (
        sampled(p, 150, stratified(1, stratified=how)).var(0) for how in (False, True)
    )
    assert (without[:2] < 0.5 * with_chance[:2]).all()


@pytest.mark.parametrize("how", [True, False])
def test_each_group_has_the_particles_of_one_expert(how: bool) -> None:
    p, seen = Mixture(spread=50.0), list[torch.Tensor]()

    class Watch(pyro.poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_post_sample(self, msg: Any) -> None:
            if msg["name"] == "z":
                seen.append(msg["value"].detach())

    objective, guide = stratified(4, vectorize_particles=how), Watch()(p.guide)
    objective.loss(p.model, guide, p.batch)
    objective.loss(p.model, guide, p.batch, PATTERN)
    seen.clear()  # That was the first look as well.
    objective.loss(p.model, guide, p.batch)
    z = torch.cat([value.reshape(-1, 2) for value in seen])  # (12, rows)
    centres = torch.stack(list(p.batch.values()))  # (3, rows)
    of = (z.unsqueeze(1) - centres).abs().argmin(1)
    assert (of == torch.arange(3).repeat_interleave(4).unsqueeze(-1)).all()
    seen.clear()
    objective.loss(p.model, guide, p.batch, PATTERN)
    z = torch.cat([value.reshape(-1, 2) for value in seen])
    of = (z.unsqueeze(1) - centres).abs().argmin(1)
    assert of[:, 0].bincount(minlength=3).tolist() == [6, 6, 0]
    assert of[:, 1].bincount(minlength=3).tolist() == [6, 0, 6]


def test_particles_at_once_and_one_by_one_have_one_distribution() -> None:
    p = Mixture()
    losses = []
    for how in (True, False):
        objective = stratified(2, vectorize_particles=how)
        losses.append(torch.tensor([objective.loss(p.model, p.guide, p.batch) for _ in range(200)]))
    error = (losses[0].var() / 200 + losses[1].var() / 200).sqrt()
    assert abs(losses[0].mean() - losses[1].mean()) < 5 * error
    assert 0.7 < losses[0].std() / losses[1].std() < 1.4


def test_dreg_is_unbiased_with_independent_particles() -> None:
    p = Mixture()
    found = [
        sampled(p, 250, stratified(5, estimator, stratified=False, groups=1))
        for estimator in ("standard", "dreg")
    ]
    error = (found[0].var(0) / 250 + found[1].var(0) / 250).sqrt()
    assert ((found[0].mean(0) - found[1].mean(0)).abs() < 5 * error).all()


def test_standard_gradients_of_stratified_particles_are_those_of_the_bound() -> None:
    """Of five particles for each expert: a finite difference of the same noise."""
    p = Mixture()
    objective = stratified(5)

    def value(seed: int) -> torch.Tensor:
        pyro.set_rng_seed(seed)
        return objective.differentiable_loss(p.model, p.guide, p.batch)

    gradient = p.gradient(value(1))
    for i, parameter in enumerate(p.params.values()):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step)
            ends.append(value(1).item())
            with torch.no_grad():
                parameter.sub_(step)
        assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("estimator", ["dreg", "vimco"])
def test_estimators_that_want_independent_particles(estimator: Any) -> None:
    match = f"expected independent particles for estimator='{estimator}'"
    with pytest.raises(ValueError, match=match):
        TraceIWAE_ELBO(4, estimator, stratified=True)


def test_the_elbo_without_strata_is_the_same() -> None:
    p = Mixture()
    objective = Trace_ELBO(num_particles=60, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.tensor([-objective.loss(p.model, p.guide, p.batch) for _ in range(60)])
    error = draws.std() / 60**0.5
    assert abs(draws.mean() - p.elbo().sum()) < 5 * error
