"""GECO against the algorithm by hand, at the same samples; saving and resuming; its fixed point."""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_elbo import ROWS, SEEN, WEIGHTS, LinearElbo
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_vae.datasets import load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.handlers import scale_kl
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceGECO_ELBO
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

LATENTS = 2


class Linear(LinearElbo):
    def __init__(self) -> None:
        super().__init__(LATENTS)

    def terms(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-log p(x | z), the KL and the squared error of every row, at the sample of a seed."""
        log_likelihood, kl, squared_error = self.parts(seed)
        return -log_likelihood, kl.sum(-1), squared_error


def squared_error(sites: Mapping[str, Any]) -> torch.Tensor:
    site = sites["x"]
    error: torch.Tensor = (site["fn"].mean - site["value"]).square().sum(-1)
    return error


@pytest.mark.parametrize("multiplier", [1.0, 0.3])
@pytest.mark.parametrize("constraint", [None, squared_error])
def test_value_and_gradient_of_the_first_step(multiplier: float, constraint: Any) -> None:
    p = Linear()
    error, kl, square = p.terms()
    above = (square if constraint else error).mean() - 1.5
    expected = p.with_gradient(ROWS * (kl.mean() + multiplier * above))
    objective = TraceGECO_ELBO(1.5, rate=0.1, multiplier=multiplier, constraint=constraint)
    torch.testing.assert_close(p.training(objective), expected)


def test_three_steps_of_the_algorithm() -> None:
    """Value of the moving average, gradient of the batch, and then the multiplier."""
    p, rate, decay = Linear(), 0.05, 0.6
    objective = TraceGECO_ELBO(1.5, rate=rate, decay=decay, multiplier=2.0)
    tensors = objective.multiplier, objective.moving_average
    multiplier, average = 2.0, None
    for seed in range(3):
        error, kl, _ = p.terms(seed)
        above = error.mean() - 1.5
        now = float(above.detach())
        average = now if average is None else decay * average + (1 - decay) * now
        expected = p.with_gradient(ROWS * (kl.mean() + multiplier * above))
        expected[0] += ROWS * multiplier * (average - now)
        pyro.set_rng_seed(seed)
        found = p.with_gradient(objective.training_loss(p.model, p.guide, p.x))
        torch.testing.assert_close(found, expected)
        pyro.set_rng_seed(seed)
        objective.loss_and_grads(p.model, p.guide, p.x)
        multiplier *= math.exp(rate * average)
        assert float(objective.moving_average) == pytest.approx(average, rel=1e-12)
        assert float(objective.multiplier) == pytest.approx(multiplier, rel=1e-12)
    assert tensors == (objective.multiplier, objective.moving_average)
    assert objective.multiplier is tensors[0]
    assert objective.multiplier.dtype == torch.float64


def test_the_reported_loss_is_the_bound() -> None:
    p, objective = Linear(), TraceGECO_ELBO(-50.0, rate=0.1, multiplier=30.0)
    pyro.set_rng_seed(0)
    expected = float(TraceMeanField_ELBO().differentiable_loss(p.model, p.guide, p.x).detach())
    losses = []
    for loss in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
        pyro.set_rng_seed(0)
        losses.append(float(torch.as_tensor(loss(p.model, p.guide, p.x)).detach()))
    assert losses == pytest.approx([expected] * 3, rel=1e-12)


def test_multiplier_one_is_the_elbo() -> None:
    """But for a constant: with tolerance 0 the value is the same too."""
    p = Linear()
    found = p.training(TraceGECO_ELBO(0.0, rate=0.0))
    pyro.set_rng_seed(0)
    elbo = p.with_gradient(TraceMeanField_ELBO().differentiable_loss(p.model, p.guide, p.x))
    torch.testing.assert_close(found, elbo, rtol=1e-12, atol=1e-12)
    found = p.training(TraceGECO_ELBO(2.0, rate=0.0))
    torch.testing.assert_close(found[1:], elbo[1:], rtol=1e-12, atol=1e-12)


def test_only_training_moves_the_multiplier() -> None:
    p, objective = Linear(), TraceGECO_ELBO(0.0, rate=0.1)
    before = objective.state_dict()
    svi = SVI(p.model, p.guide, pyro.optim.Adam({"lr": 0.0}), objective)
    svi.evaluate_loss(p.x)
    objective.training_loss(p.model, p.guide, p.x)
    with torch.no_grad():
        objective.differentiable_loss(p.model, p.guide, p.x)
        objective.loss_and_grads(p.model, p.guide, p.x)
    assert str(objective.state_dict()) == str(before)
    svi.step(p.x)
    once = objective.state_dict()
    assert once["multiplier"] > 1
    objective.differentiable_loss(p.model, p.guide, p.x)
    assert objective.state_dict()["multiplier"] > once["multiplier"]


def test_the_multiplier_keeps_to_its_limits() -> None:
    p = Linear()
    for tolerance, end in ((-1e6, 8.0), (1e6, 0.5)):
        objective = TraceGECO_ELBO(tolerance, rate=1.0, limits=(0.5, 8.0))
        for _ in range(2):
            objective.loss_and_grads(p.model, p.guide, p.x)
            assert float(objective.multiplier) == end
    objective.rate.fill_(0.0)
    objective.loss_and_grads(p.model, p.guide, p.x)
    assert float(objective.multiplier) == 0.5


def trained(num_steps: int, resume_after: int | None) -> tuple[list[float], dict[str, float]]:
    """Losses and final state; perhaps with everything saved and made anew on the way."""
    p = Linear()
    objective, adam = TraceGECO_ELBO(1.0, rate=0.02), pyro.optim.Adam({"lr": 0.01})
    svi = SVI(p.model, p.guide, adam, objective)
    losses = []
    pyro.set_rng_seed(1)
    for step in range(num_steps):
        if step == resume_after:
            state, of_adam = objective.state_dict(), adam.get_state()
            objective, adam = TraceGECO_ELBO(1.0, rate=0.02), pyro.optim.Adam({"lr": 0.01})
            objective.load_state_dict(state)
            adam.set_state(of_adam)
            random = pyro.util.get_rng_state()
            svi = SVI(p.model, p.guide, adam, objective)
            pyro.util.set_rng_state(random)
        losses.append(svi.step(p.x))
    pyro.clear_param_store()
    return losses, objective.state_dict()


@pytest.mark.parametrize("resume_after", [0, 3])
def test_resumed_training_is_the_uninterrupted_one(resume_after: int) -> None:
    assert trained(6, resume_after) == trained(6, None)


def test_loading_keeps_the_tensors() -> None:
    objective = TraceGECO_ELBO(1.0, rate=0.1)
    tensor = objective.multiplier
    objective.load_state_dict({"multiplier": 3.0, "moving_average": -0.5})
    assert objective.multiplier is tensor
    assert objective.state_dict() == {"multiplier": 3.0, "moving_average": -0.5}
    with pytest.raises(ValueError, match=r"expected the keys \['moving_average', 'multiplier'\]"):
        objective.load_state_dict({"multiplier": 3.0})


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


@pytest.mark.parametrize("constraint", [None, squared_error])
def test_a_subsample_and_weights_of_rows(constraint: Any) -> None:
    """The mean is weighted, and the sum stands for all 20 rows."""
    p = Linear()
    error, kl, square = p.terms()
    error = square if constraint else error
    weights = 4 * WEIGHTS
    mean = (weights * error).sum() / weights.sum()
    expected = p.with_gradient((weights * kl).sum() + 0.3 * weights.sum() * (mean - 1.5))
    model, guide = (poutine.scale(fn, WEIGHTS) for fn in subsampled_pair(p, 20))
    objective = TraceGECO_ELBO(1.5, rate=0.1, multiplier=0.3, constraint=constraint)
    torch.testing.assert_close(p.training(objective, model, guide), expected)
    pyro.set_rng_seed(0)
    objective.loss_and_grads(model, guide, p.x)
    assert float(objective.moving_average) == pytest.approx(float(mean.detach()) - 1.5)


@pytest.mark.parametrize("constraint", [None, squared_error])
def test_masked_rows_are_not_counted(constraint: Any) -> None:
    p = Linear()
    error, kl, square = (term[SEEN] for term in p.terms())
    error = square if constraint else error
    expected = p.with_gradient(kl.sum() + 0.3 * 3 * (error.mean() - 1.5))
    model, guide = poutine.mask(p.model, SEEN), poutine.mask(p.guide, SEEN)
    objective = TraceGECO_ELBO(1.5, rate=0.1, multiplier=0.3, constraint=constraint)
    torch.testing.assert_close(p.training(objective, model, guide), expected)


def test_nothing_observed_in_a_batch() -> None:
    p = Linear()
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    objective = TraceGECO_ELBO(1.5, rate=0.1)
    with poutine.mask(mask=nothing):
        objective.loss_and_grads(p.model, p.guide, p.x)
    assert objective.state_dict() == {"multiplier": 1.0, "moving_average": 0.0}


def test_beta_stays_on_the_kl() -> None:
    p = Linear()
    error, kl, _ = p.terms()
    expected = p.with_gradient(4.0 * kl.sum() + 0.3 * ROWS * (error.mean() - 1.5))
    objective = TraceGECO_ELBO(1.5, rate=0.1, multiplier=0.3)
    found = p.training(objective, scale_kl(p.model, 4.0), scale_kl(p.guide, 4.0))
    torch.testing.assert_close(found, expected)


def standard_kl(loc: Any, scale: float) -> torch.Tensor:
    loc = torch.as_tensor(loc)
    return 0.5 * (loc**2 + scale**2 - 1) - torch.tensor(scale).log()


def test_several_sites_with_scales_and_what_all_data_share() -> None:
    """Two observations, an inner plate, a latent of all data, and a factor on it."""
    x = Linear().x

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -3 * shift.square())
        with pyro.plate("rows", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z + shift, 1.0), obs=x[:, 2])
            with pyro.plate("halves", 2, dim=-2), poutine.scale(scale=0.5):
                pyro.sample("b", dist.Normal(z, 1.0), obs=x[:, :2].T)

    def guide() -> None:
        pyro.sample("shift", dist.Normal(0.5, 0.8))
        with pyro.plate("rows", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 0.7))

    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace()
    shift, z = trace.nodes["shift"]["value"], trace.nodes["z"]["value"]
    error = -dist.Normal(z + shift, 1.0).log_prob(x[:, 2])
    error = error - 0.5 * dist.Normal(z, 1.0).log_prob(x[:, :2].T).sum(0)
    kl = standard_kl(0.5, 0.8) + 4 * standard_kl(x[:, 0], 0.7).sum()
    expected = kl + 3 * shift.square() + 0.3 * 20 * (error.mean() - 1.5)
    objective = TraceGECO_ELBO(1.5, rate=0.1, multiplier=0.3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(objective.training_loss(model, guide), expected)
    pyro.set_rng_seed(0)
    bound = kl + 3 * shift.square() + 4 * error.sum()
    assert objective.loss(model, guide) == pytest.approx(float(bound))


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
    above = -dist.Normal(z, 1.0).log_prob(x).mean() - 0.5
    pyro.set_rng_seed(0)
    found = TraceGECO_ELBO(0.5, rate=0.1, multiplier=2.0).training_loss(model, guide)
    torch.testing.assert_close(found, kl + 2.0 * 3 * above)


@pytest.mark.parametrize("constraint", [None, squared_error])
@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_averaged(vectorize: bool, constraint: Any) -> None:
    p, num = Linear(), 3
    pyro.set_rng_seed(0)
    q = p.guide.encoder(p.x)
    z = q.rsample((num,)) if vectorize else torch.stack([q.rsample() for _ in range(num)])
    _, kl, _ = p.terms()
    fn = dist.Normal(z @ p.model.weight.T + p.model.loc, p.model.log_scale.exp())
    error = (fn.mean - p.x).square() if constraint else -fn.log_prob(p.x)
    above = error.sum(-1).mean() - 1.5
    expected = p.with_gradient(ROWS * (kl.mean() + 0.3 * above))
    objective = TraceGECO_ELBO(
        1.5,
        rate=0.1,
        multiplier=0.3,
        constraint=constraint,
        num_particles=num,
        vectorize_particles=vectorize,
    )
    torch.testing.assert_close(p.training(objective), expected)


def test_schedules_are_read_at_every_step() -> None:
    p = Linear()
    tolerance, rate = LinearWarmup(2, start=2.0, end=-2.0), LinearWarmup(2)
    objective = TraceGECO_ELBO(tolerance, rate=rate, decay=0.0, multiplier=3.0)
    before = p.training(objective)[0]
    objective.loss_and_grads(p.model, p.guide, p.x)
    assert float(objective.multiplier) == 3.0  # The rate is still 0.
    tolerance.step()
    assert p.training(objective)[0] - before == pytest.approx(3.0 * ROWS * 2.0)
    rate.step()
    objective.loss_and_grads(p.model, p.guide, p.x)
    assert float(objective.multiplier) > 3.0


def test_as_a_module_and_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        p = Linear()
        objective = TraceGECO_ELBO(1.0, rate=0.1, num_particles=2)
        module = objective(p.model, p.guide)
        module(p.x).backward()
        loss = module(p.x)
        assert loss.dtype == torch.float32
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert objective.multiplier.dtype == torch.float64
        assert objective.multiplier > 1
        # A precise average, not one rounded to the data's precision.
        assert float(objective.multiplier) != float(objective.multiplier.float())
    finally:
        torch.set_default_dtype(torch.float64)


def test_digits_end_at_the_tolerance() -> None:
    """Of images held out; the ELBO's own optimum has an error of about 16 nats."""
    (train, _), (test, _) = load_digits(dequantize=False)
    train, test = (train > 0.5).double(), (test > 0.5).double()
    model = VAE(MLP(8, [16], 64), Bernoulli(), StandardNormalPrior(8))
    guide = AmortizedNormal(MLP(64, [16], 2 * 8))
    tolerance = 25.0
    objective = TraceGECO_ELBO(tolerance, rate=0.012, decay=0.8)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), objective)
    for step in range(120):
        svi.step(train[200 * (step % 7) : 200 * (step % 7 + 1)])
    with torch.no_grad():
        logits = model.decoder(guide.encoder(test).sample())
        errors = -dist.Bernoulli(logits=logits).log_prob(test).sum(-1)
    assert abs(float(errors.mean()) - tolerance) < 2.0
    assert float(objective.multiplier) < 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": math.inf}, ValueError, "expected a finite 0-d tolerance, got inf"),
        ({"tolerance": torch.ones(2)}, ValueError, "expected a finite 0-d tolerance, got"),
        ({"tolerance": "low"}, TypeError, "expected tolerance to be a number"),
        ({"rate": -0.1}, ValueError, "expected a finite rate >= 0, got -0.1"),
        ({"decay": 1.0}, ValueError, r"expected decay in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, ValueError, r"expected decay in \[0, 1\), got -0.1"),
        ({"multiplier": 0.0}, ValueError, "expected 0 < lower limit <= multiplier"),
        ({"limits": (0.0, 1.0)}, ValueError, "expected 0 < lower limit <= multiplier"),
        ({"limits": (2.0, 3.0)}, ValueError, "got multiplier 1.0 and limits"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TraceGECO_ELBO(**{"tolerance": 1.0, "rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("constraint", "actual"),
    [
        (lambda sites: squared_error(sites).mean(), r"\(\)"),
        (lambda sites: (sites["x"]["fn"].mean - sites["x"]["value"]).square(), r"\(5, 3\)"),
        (lambda sites: 3.0, "float"),
    ],
)
def test_a_constraint_that_is_not_per_datum(constraint: Any, actual: str) -> None:
    p = Linear()
    objective = TraceGECO_ELBO(1.0, rate=0.1, constraint=constraint)
    message = rf"one error per datum, of shape \(1, 5\), got {actual}\. Sum over the event"
    with pytest.raises(ValueError, match=message):
        objective.training_loss(p.model, p.guide, p.x)


def test_a_guide_without_reparameterised_samples() -> None:
    class Sampled(dist.Normal):
        has_rsample = False

    p = Linear()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Sampled(torch.zeros(LATENTS), 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected a reparameterised guide, got site 'z'"):
        TraceGECO_ELBO(1.0, rate=0.1).loss(p.model, guide, p.x)


def test_no_plate_over_the_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one vectorised plate over the data"):
        TraceGECO_ELBO(1.0, rate=0.1).loss(model, guide)


def test_a_batch_of_infinite_error_changes_nothing() -> None:
    def model(x: torch.Tensor, log_factor: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("f", torch.full((len(x),), log_factor))

    def guide(x: torch.Tensor, log_factor: float) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    objective = TraceGECO_ELBO(0.0, rate=0.1)
    x = torch.randn(4)
    objective.loss_and_grads(model, guide, x, -math.inf)
    assert objective.multiplier == 1
    assert objective.moving_average.isnan()
    objective.loss_and_grads(model, guide, x, 0.0)
    state = objective.state_dict()
    assert state["multiplier"] > 1
    objective.loss_and_grads(model, guide, x, -math.inf)
    assert objective.state_dict()["moving_average"] == state["moving_average"]
    assert math.isfinite(float(objective.multiplier))
