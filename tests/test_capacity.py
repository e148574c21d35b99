"""The capacity against the formula by hand, at the same samples."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_elbo import DATA, ROWS, SEEN, WEIGHTS, LinearElbo
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal

from pyro_vae.handlers import scale_kl
from pyro_vae.objectives import TraceCapacity_ELBO
from pyro_vae.schedules import LinearWarmup

LATENTS = 2


class Linear(LinearElbo):
    def __init__(self) -> None:
        super().__init__(LATENTS)

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(x | z) at the sample of seed 0, and the KL, of every row."""
        log_likelihood, kl, _ = self.parts()
        return log_likelihood, kl.sum(-1)


def capacities(kl: torch.Tensor) -> tuple[float, ...]:
    """None, one below and one above the mean KL."""
    mean = float(kl.detach().mean())
    return 0.0, 0.5 * mean, 1.5 * mean


def test_value_and_gradient() -> None:
    p = Linear()
    log_likelihood, kl = p.terms()
    for capacity in capacities(kl):
        penalty = 7.0 * ROWS * (kl.mean() - capacity).abs()
        expected = p.with_gradient(penalty - log_likelihood.sum())
        torch.testing.assert_close(p.training(TraceCapacity_ELBO(capacity, 7.0)), expected)


def test_the_reported_loss_is_the_bound() -> None:
    p, objective = Linear(), TraceCapacity_ELBO(25.0, 1000.0)
    pyro.set_rng_seed(0)
    expected = float(TraceMeanField_ELBO().differentiable_loss(p.model, p.guide, p.x).detach())
    losses = []
    for loss in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
        pyro.set_rng_seed(0)
        losses.append(float(torch.as_tensor(loss(p.model, p.guide, p.x)).detach()))
    assert losses == pytest.approx([expected] * 3, rel=1e-12)


def test_no_capacity_is_the_elbo_and_gamma_is_beta() -> None:
    p = Linear()
    for gamma in (1.0, 4.0, 0.0):
        found = p.training(TraceCapacity_ELBO(0.0, gamma))
        pyro.set_rng_seed(0)
        elbo = TraceMeanField_ELBO().differentiable_loss(
            scale_kl(p.model, gamma), scale_kl(p.guide, gamma), p.x
        )
        torch.testing.assert_close(found, p.with_gradient(elbo), rtol=1e-12, atol=1e-12)


def test_a_negative_estimate_of_the_kl() -> None:
    """It stays as it is without a capacity, and lies below every other one."""
    p = Linear()
    prior = dist.StudentT(50.0, torch.zeros(LATENTS), 0.7)
    with torch.no_grad():  # Guide and prior nearly the same: the estimates are about 0.
        for parameter in p.guide.parameters():
            parameter.mul_(0.1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", prior.to_event(1))
            loc = z @ p.model.weight.T + p.model.loc
            pyro.sample("y", dist.Normal(loc, p.model.log_scale.exp()).to_event(1), obs=x)

    for seed in range(100):
        pyro.set_rng_seed(seed)
        q = p.guide.encoder(p.x).base_dist
        z = q.rsample()
        kl = (q.log_prob(z) - prior.log_prob(z)).sum()
        if kl < 0:
            break
    assert kl < 0
    pyro.set_rng_seed(seed)
    elbo = p.with_gradient(Trace_ELBO().differentiable_loss(model, p.guide, p.x))
    pyro.set_rng_seed(seed)
    none = TraceCapacity_ELBO(0.0, 1.0).training_loss(model, p.guide, p.x)
    torch.testing.assert_close(p.with_gradient(none), elbo)
    pyro.set_rng_seed(seed)
    some = TraceCapacity_ELBO(0.5, 1.0).training_loss(model, p.guide, p.x)
    expected = elbo + p.with_gradient(0.5 * ROWS - 2 * kl + 0 * sum(v.sum() for v in p.parameters))
    torch.testing.assert_close(p.with_gradient(some), expected)


def test_beta_multiplies_the_penalty() -> None:
    p, beta = Linear(), 0.3
    log_likelihood, kl = p.terms()
    for capacity in capacities(kl):
        penalty = beta * 7.0 * ROWS * (kl.mean() - capacity).abs()
        expected = p.with_gradient(penalty - log_likelihood.sum())
        objective = TraceCapacity_ELBO(capacity, 7.0)
        for scale in (beta, torch.tensor(beta)):
            found = p.training(objective, scale_kl(p.model, scale), scale_kl(p.guide, scale))
            torch.testing.assert_close(found, expected)
        nothing = p.training(objective, scale_kl(p.model, 0.0), scale_kl(p.guide, 0.0))
        assert nothing[0] == pytest.approx(-float(log_likelihood.detach().sum()))
        assert nothing.isfinite().all()


def subsampled_pair(p: Linear, size: int) -> tuple[Any, Any]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            loc = z @ p.model.weight.T + p.model.loc
            pyro.sample("x", dist.Normal(loc, p.model.log_scale.exp()).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", p.guide.encoder(x))

    return model, guide


def test_a_subsample_and_weights_of_rows() -> None:
    """The mean is weighted, and the sum stands for all 20 rows."""
    p = Linear()
    log_likelihood, kl = p.terms()
    weights = 4 * WEIGHTS
    model, guide = subsampled_pair(p, 20)
    for capacity in capacities(kl):
        penalty = 7.0 * weights.sum() * ((weights * kl).sum() / weights.sum() - capacity).abs()
        expected = p.with_gradient(penalty - (weights * log_likelihood).sum())
        found = p.training(
            TraceCapacity_ELBO(capacity, 7.0),
            poutine.scale(model, WEIGHTS),
            poutine.scale(guide, WEIGHTS),
        )
        torch.testing.assert_close(found, expected)


def test_every_row_twice_is_the_same_mean() -> None:
    p = Linear()
    objective = TraceCapacity_ELBO(3.0, 7.0)
    found = p.training(objective, *subsampled_pair(p, 2 * ROWS))
    torch.testing.assert_close(found, 2 * p.training(objective))


def test_masked_rows_are_not_counted() -> None:
    p = Linear()
    log_likelihood, kl = (term[SEEN] for term in p.terms())
    for capacity in capacities(kl):
        expected = p.with_gradient(7.0 * (kl.sum() - 3 * capacity).abs() - log_likelihood.sum())
        found = p.training(
            TraceCapacity_ELBO(capacity, 7.0),
            poutine.mask(p.model, SEEN),
            poutine.mask(p.guide, SEEN),
        )
        torch.testing.assert_close(found, expected)


def standard_kl(loc: Any, scale: float) -> torch.Tensor:
    loc = torch.as_tensor(loc)
    return 0.5 * (loc**2 + scale**2 - 1) - torch.tensor(scale).log()


def shared_pair(x: torch.Tensor, scales: tuple[float, float]) -> tuple[Any, Any]:
    """A latent of all data, one of every datum, and one of every half of a datum."""

    def rows() -> Any:
        return pyro.plate("rows", 4 * len(x), subsample=torch.arange(len(x)), dim=-1)

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with rows():
            with poutine.scale(scale=scales[0]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("halves", 2, dim=-2):
                with poutine.scale(scale=scales[1]):
                    u = pyro.sample("u", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z + u + shift, 1.0), obs=x[:, :2].T)

    def guide() -> None:
        pyro.sample("shift", dist.Normal(0.5, 0.8))
        with rows():
            with poutine.scale(scale=scales[0]):
                pyro.sample("z", dist.Normal(x[:, 0], 0.7))
            with pyro.plate("halves", 2, dim=-2), poutine.scale(scale=scales[1]):
                pyro.sample("u", dist.Normal(0.3 * x[:, :2].T, 0.9))

    return model, guide


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.5), (0.5, 2.0)])
def test_several_latents_and_one_outside_the_plate(scales: tuple[float, float]) -> None:
    """What all data share is no code of a datum: its KL is that of the ELBO."""
    x = Linear().x
    model, guide = shared_pair(x, scales)
    shift = float(standard_kl(0.5, 0.8))
    of_z = 20 * float(standard_kl(x[:, 0], 0.7).mean())
    of_u = 20 * float(standard_kl(0.3 * x[:, :2], 0.9).sum(-1).mean())
    kl = scales[0] * of_z + scales[1] * of_u
    for capacity in (0.0, 0.1, 4.0):
        pyro.set_rng_seed(0)
        objective = TraceCapacity_ELBO(capacity, 7.0)
        found = float(objective.training_loss(model, guide))
        pyro.set_rng_seed(0)
        log_likelihood = shift + kl - objective.loss(model, guide)
        penalty = 7.0 * abs(kl - max(scales) * 20 * capacity)
        assert found == pytest.approx(shift + penalty - log_likelihood)


def test_a_reversed_guide_has_estimated_kls() -> None:
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def model() -> None:
        with pyro.plate("rows", 3):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(top, 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(x, 0.2))
            pyro.sample("top", dist.Normal(0.9 * z, 0.4))

    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace()
    z, top = trace.nodes["z"]["value"], trace.nodes["top"]["value"]
    kl = dist.Normal(x, 0.2).log_prob(z) - dist.Normal(top, 0.5).log_prob(z)
    kl = (kl + standard_kl(0.9 * z, 0.4)).sum()
    log_likelihood = dist.Normal(z, 1.0).log_prob(x).sum()
    for capacity in (0.0, float(kl) / 6, float(kl)):
        pyro.set_rng_seed(0)
        found = TraceCapacity_ELBO(capacity, 7.0).training_loss(model, guide)
        torch.testing.assert_close(found, 7.0 * (kl - 3 * capacity).abs() - log_likelihood)


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_averaged_before_the_difference(vectorize: bool) -> None:
    p = Linear()
    _, kl = p.terms()
    options: dict[str, Any] = {"num_particles": 3, "vectorize_particles": vectorize}
    for capacity in capacities(kl):
        pyro.set_rng_seed(0)
        found = TraceCapacity_ELBO(capacity, 7.0, **options).training_loss(p.model, p.guide, p.x)
        pyro.set_rng_seed(0)
        elbo = TraceMeanField_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=1)
        bound = elbo.differentiable_loss(p.model, p.guide, p.x)
        penalty = 7.0 * ROWS * (kl.mean() - capacity).abs()
        torch.testing.assert_close(found, bound - kl.sum() + penalty)


def test_schedules_and_tensors_are_read_at_every_step() -> None:
    p = Linear()
    capacity, gamma = LinearWarmup(10, start=20.0, end=30.0), torch.tensor(2.0)
    objective = TraceCapacity_ELBO(capacity, gamma)
    before = p.training(objective)[0]
    capacity.step()
    risen = p.training(objective)[0]
    assert risen - before == pytest.approx(2.0 * ROWS)
    _, kl = p.terms()
    gamma.fill_(3.0)
    expected = ROWS * 21.0 - float(kl.detach().sum())
    assert p.training(objective)[0] - risen == pytest.approx(expected)


def test_training_reaches_the_capacity() -> None:
    p = Linear()
    x = torch.randn(100, DATA)
    objective = TraceCapacity_ELBO(3.0, 20.0)
    svi = SVI(p.model, p.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    for _ in range(60):
        svi.step(x)
    q = p.guide.encoder(x)
    kl = 0.5 * (q.mean**2 + q.variance - 1) - 0.5 * q.variance.log()
    assert abs(float(kl.detach().sum(-1).mean()) - 3.0) < 0.3


def test_as_a_module_and_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        p = Linear()
        module = TraceCapacity_ELBO(LinearWarmup(10, end=5.0), 10.0, num_particles=2)(
            p.model, p.guide
        )
        loss = module(p.x)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert len(list(module.parameters())) == len(p.parameters)
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    ("capacity", "gamma", "error", "message"),
    [
        (-1.0, 1.0, ValueError, "expected a finite capacity >= 0, got -1.0"),
        (1.0, -1.0, ValueError, "expected a finite gamma >= 0, got -1.0"),
        ("much", 1.0, TypeError, "expected capacity to be a number"),
        (torch.ones(2), 1.0, ValueError, "expected a 0-d tensor capacity"),
    ],
)
def test_arguments(capacity: Any, gamma: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TraceCapacity_ELBO(capacity, gamma)


def test_all_latents_outside_the_plate() -> None:
    def model() -> None:
        z = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        pyro.sample("slope", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"inside the plate over the data, got none.*'slope'"):
        TraceCapacity_ELBO(1.0, 1.0).loss(model, guide)


def test_a_guide_without_reparameterised_samples() -> None:
    class Sampled(dist.Normal):
        has_rsample = False

    p = Linear()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Sampled(torch.zeros(LATENTS), 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected a reparameterised guide, got site 'z'"):
        TraceCapacity_ELBO(1.0, 1.0).loss(p.model, guide, p.x)


def test_no_plate_over_the_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one vectorised plate over the data"):
        TraceCapacity_ELBO(1.0, 1.0).loss(model, guide)


def test_a_guide_that_spreads_the_kl_over_other_sites() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    match = r"TraceCapacity_ELBO: expected a density for site 'z' .* point mass \(Delta\)"
    for kind in (AutoDiagonalNormal, AutoDelta):
        with pytest.raises(ValueError, match=match):
            TraceCapacity_ELBO(1.0, 10.0).loss(model, kind(model), torch.randn(4))
