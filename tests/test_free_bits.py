"""Free bits against the formula by hand, at the same samples."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_elbo import DATA, ROWS, SEEN, WEIGHTS, LinearElbo
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.guides import AmortizedMultivariateNormal
from pyro_vae.handlers import scale_kl
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceFreeBits_ELBO
from pyro_vae.schedules import LinearWarmup

LATENTS = 4


class Linear(LinearElbo):
    def __init__(self) -> None:
        super().__init__(LATENTS)

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(x | z) of every row at the sample of seed 0, and the KL of every latent."""
        log_likelihood, kl, _ = self.parts()
        return log_likelihood, kl


def limit(kl: torch.Tensor, free_bits: float) -> torch.Tensor:
    """The maximum; the test has made sure that it takes both sides."""
    return kl.clamp(min=free_bits)


@pytest.mark.parametrize("over", ["batch", "datum"])
@pytest.mark.parametrize("per", ["site", 1, 2, "dimension", LATENTS])
def test_value_and_gradient(per: Any, over: Any) -> None:
    p = Linear()
    log_likelihood, kl = p.terms()
    num = {"site": 1, "dimension": LATENTS}.get(per, per)
    groups = kl.reshape(ROWS, num, -1).sum(-1)
    groups = groups.mean(0) if over == "batch" else groups
    free_bits = float(groups.detach().median()) * (1.001 if num * ROWS > 1 else 1)
    assert (groups < free_bits).any() or groups.numel() == 1
    penalty = ROWS * limit(groups, free_bits).sum() if over == "batch" else 0
    if over == "datum":
        penalty = limit(groups, free_bits).sum()
    expected = p.with_gradient(penalty - log_likelihood.sum())
    objective = TraceFreeBits_ELBO(free_bits, per=per, over=over)
    torch.testing.assert_close(p.training(objective), expected)


@pytest.mark.parametrize("above", [False, True])
def test_the_whole_site_above_and_below(above: bool) -> None:
    p = Linear()
    log_likelihood, kl = p.terms()
    mean = float(kl.detach().sum(-1).mean())
    free_bits = mean + (-0.1 if above else 0.1)
    term = kl.sum() if above else torch.tensor(ROWS * free_bits)
    expected = p.with_gradient(term - log_likelihood.sum())
    torch.testing.assert_close(p.training(TraceFreeBits_ELBO(free_bits)), expected)


def test_the_reported_loss_is_the_bound() -> None:
    p, objective = Linear(), TraceFreeBits_ELBO(50.0)
    pyro.set_rng_seed(0)
    expected = float(TraceMeanField_ELBO().differentiable_loss(p.model, p.guide, p.x).detach())
    losses = []
    for loss in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
        pyro.set_rng_seed(0)
        losses.append(float(torch.as_tensor(loss(p.model, p.guide, p.x)).detach()))
    assert losses == pytest.approx([expected] * 3, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"per": "dimension"}, {"per": 2, "over": "datum"}])
def test_no_free_bits_is_the_elbo(options: dict[str, Any]) -> None:
    p = Linear()
    found = p.training(TraceFreeBits_ELBO(0.0, **options))
    pyro.set_rng_seed(0)
    elbo = TraceMeanField_ELBO().differentiable_loss(p.model, p.guide, p.x)
    torch.testing.assert_close(found, p.with_gradient(elbo), rtol=1e-12, atol=1e-12)


def heavy_tailed(p: Linear, prior: Any) -> Any:
    """A prior without closed-form KL."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", prior.to_event(1))
            loc = z @ p.model.weight.T + p.model.loc
            pyro.sample("y", dist.Normal(loc, p.model.log_scale.exp()).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("over", ["batch", "datum"])
def test_no_free_bits_with_negative_estimates(over: Any) -> None:
    """They are no KL below 0 to be lifted, but the plain ELBO's noise."""
    p = Linear()
    with torch.no_grad():  # Guide and prior nearly the same: the estimates are about 0.
        for parameter in p.guide.parameters():
            parameter.mul_(0.1)
    prior = dist.StudentT(50.0, torch.zeros(LATENTS), 0.7)
    model = heavy_tailed(p, prior)
    pyro.set_rng_seed(0)
    q = p.guide.encoder(p.x).base_dist
    z = q.rsample()
    kl = q.log_prob(z) - prior.log_prob(z)
    assert (kl.mean(0) if over == "batch" else kl).min() < 0
    found = p.training(TraceFreeBits_ELBO(0.0, per="dimension", over=over), model)
    pyro.set_rng_seed(0)
    expected = p.with_gradient(Trace_ELBO().differentiable_loss(model, p.guide, p.x))
    torch.testing.assert_close(found, expected)


def test_estimated_kls() -> None:
    """With several particles their mean is compared, not each."""
    p, num = Linear(), 3
    model = heavy_tailed(p, dist.StudentT(3.0, torch.zeros(LATENTS)))
    pyro.set_rng_seed(0)
    q = p.guide.encoder(p.x)
    z = q.rsample((num,))
    loc = z @ p.model.weight.T + p.model.loc
    log_likelihood = dist.Normal(loc, p.model.log_scale.exp()).log_prob(p.x).sum((1, 2)).mean()
    kl = (q.base_dist.log_prob(z) - dist.StudentT(3.0).log_prob(z)).mean(0)
    free_bits = float(kl.detach().mean(0).median()) + 1e-3
    expected = p.with_gradient(ROWS * limit(kl.mean(0), free_bits).sum() - log_likelihood)
    objective = TraceFreeBits_ELBO(
        free_bits, per="dimension", num_particles=num, vectorize_particles=True
    )
    pyro.set_rng_seed(0)
    loss = objective.training_loss(model, p.guide, p.x)
    torch.testing.assert_close(p.with_gradient(loss), expected)


@pytest.mark.parametrize("over", ["batch", "datum"])
def test_beta_multiplies_the_larger(over: Any) -> None:
    p, beta = Linear(), 0.3
    log_likelihood, kl = p.terms()
    kl = kl.mean(0) * ROWS if over == "batch" else kl
    free_bits = float(kl.detach().median()) * 1.001
    expected = p.with_gradient(beta * limit(kl, free_bits).sum() - log_likelihood.sum())
    objective = TraceFreeBits_ELBO(
        free_bits / ROWS if over == "batch" else free_bits, per="dimension", over=over
    )
    for scale in (beta, torch.tensor(beta)):
        found = p.training(objective, scale_kl(p.model, scale), scale_kl(p.guide, scale))
        torch.testing.assert_close(found, expected)
    nothing = p.training(objective, scale_kl(p.model, 0.0), scale_kl(p.guide, 0.0))
    assert nothing[0] == pytest.approx(-float(log_likelihood.detach().sum()))
    assert nothing.isfinite().all()


def plated(program: Any, size: int) -> Any:
    """The same program, its rows a subsample of ``size``."""

    def inside(x: torch.Tensor) -> None:
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            program(x)

    return inside


def subsampled_pair(p: Linear, size: int) -> tuple[Any, Any]:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
        loc = z @ p.model.weight.T + p.model.loc
        pyro.sample("x", dist.Normal(loc, p.model.log_scale.exp()).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", p.guide.encoder(x))

    return plated(model, size), plated(guide, size)


@pytest.mark.parametrize("over", ["batch", "datum"])
def test_a_subsample_and_weights_of_rows(over: Any) -> None:
    """The mean is weighted, and the sum stands for all 20 rows."""
    p = Linear()
    log_likelihood, kl = p.terms()
    weights = 4 * WEIGHTS
    if over == "batch":
        mean = (weights.unsqueeze(-1) * kl).sum(0) / weights.sum()
        free_bits = float(mean.detach().median()) * 1.001
        penalty = weights.sum() * limit(mean, free_bits).sum()
    else:
        free_bits = float(kl.detach().median())
        penalty = (weights.unsqueeze(-1) * limit(kl, free_bits)).sum()
    expected = p.with_gradient(penalty - (weights * log_likelihood).sum())
    model, guide = subsampled_pair(p, 20)
    found = p.training(
        TraceFreeBits_ELBO(free_bits, per="dimension", over=over),
        poutine.scale(model, WEIGHTS),
        poutine.scale(guide, WEIGHTS),
    )
    torch.testing.assert_close(found, expected)


def test_every_row_twice_is_the_same_mean() -> None:
    p = Linear()
    model, guide = subsampled_pair(p, 2 * ROWS)
    objective = TraceFreeBits_ELBO(0.4, per="dimension")
    torch.testing.assert_close(p.training(objective, model, guide), 2 * p.training(objective))


@pytest.mark.parametrize("over", ["batch", "datum"])
def test_masked_rows_have_no_part_in_the_mean(over: Any) -> None:
    p = Linear()
    log_likelihood, kl = (term[SEEN] for term in p.terms())
    groups = kl.sum(-1).mean() if over == "batch" else kl.sum(-1)
    for free_bits in (float(groups.detach().max()) * 0.99, float(groups.detach().max()) * 1.01):
        term = limit(groups, free_bits)
        term = 3 * term if over == "batch" else term.sum()
        expected = p.with_gradient(term - log_likelihood.sum())
        found = p.training(
            TraceFreeBits_ELBO(free_bits, over=over),
            poutine.mask(p.model, SEEN),
            poutine.mask(p.guide, SEEN),
        )
        torch.testing.assert_close(found, expected)


def shared_latent(x: torch.Tensor) -> None:
    """A latent of all data, one of every datum, and one of every half of a datum."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("halves", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + u + shift, 1.0), obs=x[:, :2].T)


def shared_guide(x: torch.Tensor) -> None:
    pyro.sample("shift", dist.Normal(0.5, 0.8))
    with pyro.plate("rows", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
        pyro.sample("z", dist.Normal(x[:, 0], 0.7))
        with pyro.plate("halves", 2, dim=-2):
            pyro.sample("u", dist.Normal(0.3 * x[:, :2].T, 0.9))


def standard_kl(loc: Any, scale: float) -> torch.Tensor:
    loc = torch.as_tensor(loc)
    return 0.5 * (loc**2 + scale**2 - 1) - torch.tensor(scale).log()


def test_several_latents_and_one_outside_the_plate() -> None:
    x = Linear().x
    kl = {
        "shift": standard_kl(0.5, 0.8),
        "z": 20 * standard_kl(x[:, 0], 0.7).mean(),
        "u": 20 * standard_kl(0.3 * x[:, :2], 0.9).sum(-1).mean(),
    }
    number = {"shift": 1, "z": 20, "u": 20}

    def extra(free_bits: Any) -> float:
        pyro.set_rng_seed(0)
        objective = TraceFreeBits_ELBO(free_bits)
        loss = objective.training_loss(shared_latent, shared_guide, x)
        pyro.set_rng_seed(0)
        return float(loss) - objective.loss(shared_latent, shared_guide, x)

    for floor in (0.02, 0.2, 2.0):
        by_site = {n: max(0.0, number[n] * floor - float(kl[n])) for n in kl}
        assert extra(floor) == pytest.approx(sum(by_site.values()))
        for name in kl:
            assert extra({name: floor}) == pytest.approx(by_site[name])
    assert extra({"z": 2.0, "u": 0.0}) == pytest.approx(40 - float(kl["z"]))
    assert extra({}) == 0


def test_a_reversed_guide_has_estimated_kls() -> None:
    """Its lower latent has no closed form: the same samples enter here and in Trace_ELBO."""
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
    kl_z = dist.Normal(x, 0.2).log_prob(z) - dist.Normal(top, 0.5).log_prob(z)
    log_likelihood = dist.Normal(z, 1.0).log_prob(x).sum()
    kl_top = standard_kl(0.9 * z, 0.4).sum()
    for floor in (float(kl_z.mean()) - 0.1, float(kl_z.mean()) + 0.1):
        pyro.set_rng_seed(0)
        found = TraceFreeBits_ELBO({"z": max(floor, 0.0)}).training_loss(model, guide)
        expected = kl_top + 3 * max(floor, float(kl_z.mean())) - log_likelihood
        torch.testing.assert_close(found, expected)


def test_a_schedule_and_a_tensor_are_read_at_every_step() -> None:
    p, warmup = Linear(), LinearWarmup(2, start=4.0, end=100.0)
    tensor = torch.tensor(4.0)
    for weight, change in (
        (warmup, lambda: warmup.load_state_dict({"num_steps_taken": 2})),
        (tensor, lambda: tensor.fill_(100.0)),
    ):
        objective = TraceFreeBits_ELBO({"z": weight})
        before = p.training(objective)
        change()
        after = p.training(objective)
        assert after[0] - before[0] == pytest.approx(ROWS * 96.0)


def test_training_stops_at_the_floor() -> None:
    """The held KL is about lambda, where the ELBO alone lets the latent collapse."""
    p = Linear()
    with torch.no_grad():
        p.model.weight.mul_(0.01)
    x = torch.randn(200, DATA) * 0.3
    objective = TraceFreeBits_ELBO(0.5, per="dimension")
    svi = SVI(p.model, p.guide, pyro.optim.Adam({"lr": 0.05}), objective)
    for _ in range(50):
        svi.step(x)
    q = p.guide.encoder(x)
    kl = (0.5 * (q.mean**2 + q.variance - 1) - 0.5 * q.variance.log()).mean(0)
    assert (kl > 0.4).all()


def test_as_a_module_and_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        p = Linear()
        module = TraceFreeBits_ELBO(1.0, num_particles=2)(p.model, p.guide)
        loss = module(p.x)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert len(list(module.parameters())) == len(p.parameters)
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"free_bits": -0.1}, ValueError, "expected a finite free_bits >= 0, got -0.1"),
        ({"free_bits": {"z": -1}}, ValueError, r"expected a finite free_bits\['z'\] >= 0"),
        ({"free_bits": "half"}, TypeError, "expected free_bits to be a number"),
        ({"free_bits": 1, "per": "row"}, ValueError, "expected per to be 'site', 'dimension'"),
        ({"free_bits": 1, "per": 0}, ValueError, "expected per >= 1, got 0"),
        ({"free_bits": 1, "per": None}, TypeError, "expected an integer per"),
        ({"free_bits": 1, "over": "all"}, ValueError, "expected over to be 'batch' or 'datum'"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TraceFreeBits_ELBO(**arguments)


def test_latents_that_the_model_does_not_have() -> None:
    p = Linear()
    with pytest.raises(ValueError, match=r"latents of the model, \['z'\], got 'w'"):
        TraceFreeBits_ELBO({"z": 1.0, "w": 1.0}).loss(p.model, p.guide, p.x)


def test_elements_that_are_not_independent() -> None:
    p = Linear()
    network = MLP(DATA, [], LATENTS + LATENTS * (LATENTS + 1) // 2)
    guide = AmortizedMultivariateNormal(network, LATENTS)
    with pytest.raises(ValueError, match="independent elements at site 'z'.*in the guide"):
        TraceFreeBits_ELBO(1.0, per="dimension").loss(p.model, guide, p.x)
    assert TraceFreeBits_ELBO(1.0).loss(p.model, guide, p.x) > 0


def test_groups_that_do_not_divide() -> None:
    p = Linear()
    with pytest.raises(ValueError, match="site 'z' to divide into 3 equal groups, got 4 elements"):
        TraceFreeBits_ELBO(1.0, per=3).loss(p.model, p.guide, p.x)


def test_a_point_mass_has_no_kl_of_its_own() -> None:
    p = Linear()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", p.guide.encoder(x), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * u, event_dim=1))

    with pytest.raises(ValueError, match="expected a density for site 'z' in the guide"):
        TraceFreeBits_ELBO(1.0).loss(p.model, guide, p.x)
    assert TraceFreeBits_ELBO({}).loss(p.model, guide, p.x) > 0


class Sampled(dist.Normal):
    has_rsample = False


def test_a_guide_without_reparameterised_samples() -> None:
    p = Linear()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Sampled(torch.zeros(LATENTS), 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected a reparameterised guide, got site 'z'"):
        TraceFreeBits_ELBO(1.0).loss(p.model, guide, p.x)


def test_no_plate_over_the_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one vectorised plate over the data"):
        TraceFreeBits_ELBO(1.0).loss(model, guide)


def test_components_beside_the_data() -> None:
    """Their plate has the dimension of the data's, but holds no data."""

    def components() -> torch.Tensor:
        with pyro.plate("components", 3):
            return pyro.sample("loc", dist.Normal(0.0, 1.0))

    def model(x: torch.Tensor) -> None:
        loc = components()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + loc.sum(), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        components()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.randn(5)
    for over in ("batch", "datum"):
        objective = TraceFreeBits_ELBO({"loc": 10.0}, over=over)
        pyro.set_rng_seed(0)
        training_loss = objective.training_loss(model, guide, x)
        pyro.set_rng_seed(0)
        penalty = float(training_loss) - objective.loss(model, guide, x)
        assert penalty == pytest.approx(10.0)  # The KL of all three is 0.
