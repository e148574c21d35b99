"""What every public objective promises: one suite, to which a new one is added by one line."""

import copy
import gc
import inspect
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes, Pinned
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import fit, objectives, scale_kl
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder
from pyro_vae.objectives import (
    TraceCapacity_ELBO,
    TraceDIP_ELBO,
    TraceFactor_ELBO,
    TraceFreeBits_ELBO,
    TraceGECO_ELBO,
    TraceIWAE_ELBO,
    TraceMMD_ELBO,
    TraceTotalCorrelation_ELBO,
)
from pyro_vae.objectives.objective import Objective
from pyro_vae.priors import StandardNormalPrior

Make = Callable[..., Any]
close = torch.testing.assert_close

DIM = 3
"""Width of all codes here."""

NUM_DATA = 40
"""What a batch of 5 rows is a subsample of, where it is one."""


def discriminator() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MLP(DIM, [4], 1)


# One line for a new objective: its arguments away from those that make it an ELBO, so that every
# promise is about something; ``k`` takes ``num_particles``, ``vectorize_particles`` and
# ``retain_graph``.
MAKE: dict[str, Make] = {
    "capacity": lambda **k: TraceCapacity_ELBO(0.7, 3.0, **k),
    "dip, I": lambda **k: TraceDIP_ELBO(3.0, 2.0, **k),
    "dip, II": lambda **k: TraceDIP_ELBO(3.0, 2.0, kind="II", **k),
    "factor": lambda **k: TraceFactor_ELBO(3.0, discriminator(), **k),
    "free bits": lambda **k: TraceFreeBits_ELBO(0.8, **k),
    "free bits, dimension, datum": lambda **k: TraceFreeBits_ELBO(
        0.4, per="dimension", over="datum", **k
    ),
    "geco": lambda **k: TraceGECO_ELBO(2.0, rate=0.1, multiplier=3.0, **k),
    "iwae": lambda **k: of_iwae("standard", **k),
    "iwae, stl": lambda **k: of_iwae("stl", **k),
    "iwae, dreg": lambda **k: of_iwae("dreg", **k),
    "iwae, groups": lambda **k: of_iwae("dreg", num_groups=2, partial=True, elbo_weight=0.3, **k),
    "mmd": lambda **k: TraceMMD_ELBO(0.3, 2.0, **k),
    "total correlation": lambda **k: TraceTotalCorrelation_ELBO(NUM_DATA, 2.0, 3.0, 0.5, **k),
    "total correlation, stratified": lambda **k: TraceTotalCorrelation_ELBO(
        NUM_DATA, 2.0, 3.0, 0.5, estimator="stratified", **k
    ),
}


def of_iwae(estimator: Any, num_particles: int = 1, **kwargs: Any) -> TraceIWAE_ELBO:
    """K is an argument without a default."""
    return TraceIWAE_ELBO(num_particles, estimator, **kwargs)


def of_two_latents(make: Make) -> Any:
    """The objective for codes of width 2."""
    objective = make()
    if isinstance(objective, TraceFactor_ELBO):
        return TraceFactor_ELBO(3.0, MLP(2, [4], 1))
    return objective


@pytest.fixture(params=MAKE)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKE[request.param]


def test_every_public_objective_is_here() -> None:
    # Their programs take modalities: test_multimodal_objectives.py has the same promises, and
    # test_interplay.py those of the interplay, whose normaliser is estimated.
    multimodal = {"TraceExpertKL_ELBO", "TraceInterplay_ELBO", "TraceSubsets_ELBO"}
    # These add a term to another ELBO: test_added_term.py has what they promise.
    around = {"TraceClassification_ELBO", "TraceVQ_ELBO"}
    here = {type(make()).__name__ for make in MAKE.values()}
    assert here | multimodal | around == set(objectives.__all__)


def with_gradient(p: LinearCodes, objective: Any, **of_plate: Any) -> dict[str, torch.Tensor]:
    """Reported loss and gradient of training, after one seed."""
    return p.of(objective.differentiable_loss, 7, **of_plate)


def step(p: LinearCodes, objective: Any) -> tuple[float, list[Any]]:
    """The same of the way that SVI takes."""
    for parameter in p.params.values():
        parameter.grad = None
    pyro.set_rng_seed(7)
    loss = objective.loss_and_grads(p.model, p.guide, p.x)
    return loss, [parameter.grad for parameter in p.params.values()]


# ---------------------------------------------------------------- the shape of an objective


def test_it_is_an_elbo_of_pyro(make: Make) -> None:
    objective = make()
    assert isinstance(objective, Objective)
    assert isinstance(objective, ELBO)
    assert type(objective).__name__.startswith("Trace")
    assert type(objective).__name__.endswith("_ELBO")


def test_its_common_arguments(make: Make) -> None:
    parameters = inspect.signature(type(make())).parameters
    for name in ("vectorize_particles", "retain_graph"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is None
    assert make(num_particles=2).num_particles == 2
    with pytest.raises(ValueError, match="expected num_particles >= 1, got 0"):
        make(num_particles=0)
    with pytest.raises(TypeError, match="expected an integer num_particles, got float"):
        make(num_particles=2.0)


# ---------------------------------------------------------------- the reported loss


class Orthogonal:
    """A linear-Gaussian pair whose guide is the exact posterior, with independent elements."""

    def __init__(self) -> None:
        self.x = torch.randn(5, 4)
        weight = torch.zeros(DIM, 4)
        weight[0, 0], weight[1, 1], weight[2, 2:] = 1.2, -0.7, torch.tensor([0.5, 0.8])
        self.weight = weight

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.6).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        precision = 1 + self.weight.square().sum(1) / 0.36
        loc = x @ self.weight.T / 0.36 / precision
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, precision**-0.5).to_event(1))

    def exact(self) -> float:
        cov = self.weight.T @ self.weight + 0.36 * torch.eye(4)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(4), cov)
        return -float(marginal.log_prob(self.x).sum())


@pytest.mark.parametrize("num_particles", [1, 3])
def test_it_reports_a_bound_and_not_what_it_minimises(make: Make, num_particles: int) -> None:
    """At the exact posterior: Pyro's with sampled KL, which is exact, or with closed-form KL."""
    p, objective = Orthogonal(), make(num_particles=num_particles, vectorize_particles=True)
    stock = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    reported = []
    for elbo in (Trace_ELBO(**stock), TraceMeanField_ELBO(**stock), objective):
        pyro.set_rng_seed(7)
        reported.append(elbo.loss(p.model, p.guide, p.x))
    sampled, closed, ours = reported
    assert sampled == pytest.approx(p.exact(), abs=1e-10)
    assert abs(closed - sampled) > 1e-3
    assert min(abs(ours - sampled), abs(ours - closed)) < 1e-10


def test_all_ways_report_the_same_and_have_the_same_gradient(make: Make) -> None:
    p = LinearCodes()
    expected = with_gradient(p, make())
    loss, grads = step(p, make())
    assert isinstance(loss, float)
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-12)
    close(dict(zip(p.params, grads, strict=True)), {n: expected[n] for n in p.params})
    of_training = p.of(make().training_loss, 7)
    close({n: of_training[n] for n in p.params}, {n: expected[n] for n in p.params})
    pyro.set_rng_seed(7)
    assert make().loss(p.model, p.guide, p.x) == pytest.approx(loss, rel=1e-12)
    with torch.no_grad():
        pyro.set_rng_seed(7)
        reported = make().differentiable_loss(p.model, p.guide, p.x)
    assert not reported.requires_grad
    assert reported.item() == pytest.approx(loss, rel=1e-12)


def test_its_gradient_is_not_that_of_the_elbo(make: Make) -> None:
    """Else the suite would prove nothing about it."""
    p, objective = LinearCodes(), make(num_particles=3, vectorize_particles=True)
    stock = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    ours = with_gradient(p, objective)["encoder"]
    for elbo in (Trace_ELBO(**stock), TraceMeanField_ELBO(**stock)):
        assert not torch.allclose(with_gradient(p, elbo)["encoder"], ours, rtol=1e-3)


# ---------------------------------------------------------------- scales, masks, particles


def test_a_subsample_stands_for_all_data(make: Make) -> None:
    p = LinearCodes()
    alone = with_gradient(p, make())
    close(with_gradient(p, make(), size=NUM_DATA), {n: v * 8 for n, v in alone.items()})


@pytest.mark.parametrize("scale", [0.5, torch.tensor(3.0)])
def test_a_scale_around_both_programs(make: Make, scale: Any) -> None:
    p = LinearCodes()
    alone = with_gradient(p, make())
    pyro.set_rng_seed(7)
    programs = poutine.scale(p.model, scale), poutine.scale(p.guide, scale)
    scaled = p.with_gradient(make().differentiable_loss(*programs, p.x))
    close(scaled, {n: v * scale for n, v in alone.items()})


def test_masked_rows_are_no_data(make: Make) -> None:
    p, keep = LinearCodes(Pinned), torch.tensor([True, False, True, True, False])
    masked = with_gradient(p, make(), mask=keep)
    p.x = p.x[keep]
    close(with_gradient(p, make()), masked)


def test_the_beta_of_the_programs_is_in_the_reported_loss(make: Make) -> None:
    """Which with beta = 0 is the reconstruction alone."""
    p, objective = LinearCodes(), make()
    pyro.set_rng_seed(7)
    loss = objective.loss(scale_kl(p.model, 0.0), scale_kl(p.guide, 0.0), p.x)
    z = p.codes(p.x, 7)
    expected = dist.Normal(z @ p.params["weight"], 0.7).log_prob(p.x).sum()
    if objective._total_particles == 1:
        assert loss == pytest.approx(-float(expected.detach()))


def test_particles_at_once_and_one_by_one(make: Make) -> None:
    p = LinearCodes(Pinned)
    losses = [
        with_gradient(p, make(num_particles=3, vectorize_particles=how))
        for how in (True, False, None)
    ]
    close(losses[1], losses[0])
    close(losses[2], losses[0])


# ---------------------------------------------------------------- no side effects


def test_the_first_look_has_no_effect(make: Make) -> None:
    """On random numbers, on the objective's own state, or on the second call."""
    p, fresh, used = LinearCodes(), make(num_particles=2), make(num_particles=2)
    used.loss(p.model, p.guide, p.x)
    loss, grads = step(p, fresh)
    again, others = step(p, used)
    assert loss == again
    for grad, other in zip(grads, others, strict=True):
        assert torch.equal(grad, other)


def test_reporting_changes_nothing(make: Make) -> None:
    """Between steps of training, whose own state goes on as without it."""
    p, plain, watched = LinearCodes(), make(), make()
    for _ in range(3):
        loss, grads = step(p, plain)
        again, others = step(p, watched)
        assert loss == again
        for grad, other in zip(grads, others, strict=True):
            assert torch.equal(grad, other)
        watched.loss(p.model, p.guide, p.x)
        watched.training_loss(p.model, p.guide, p.x)
        with torch.no_grad():
            watched.differentiable_loss(p.model, p.guide, p.x)


@pytest.mark.parametrize("name", ["factor", "geco"])
def test_what_it_learns_itself_goes_on_with_every_gradient(name: str) -> None:
    """Whichever way the gradient is asked for."""
    p, objective = LinearCodes(), MAKE[name]()
    states = [copy.deepcopy(objective.state_dict())]
    for method in (objective.loss_and_grads, objective.differentiable_loss):
        method(p.model, p.guide, p.x)
        states.append(copy.deepcopy(objective.state_dict()))
    assert len({str(state) for state in states}) == 3


class Noisy(nn.Module):
    """Batch norm and dropout between linear layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
        self.last = nn.Linear(7, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.net(x).relu())


def noisy_pair() -> tuple[Any, Any]:
    decoder, encoder = Noisy(DIM, 6), Noisy(6, 2 * DIM)
    return VAE(decoder, Bernoulli(), StandardNormalPrior(DIM)), AmortizedNormal(encoder)


@pytest.mark.filterwarnings("ignore:.*the model does not broadcast over particles")
def test_networks_stay_as_they_are(make: Make) -> None:
    """Modes are kept, and the first look is not a batch of batch norm."""
    objective = make()
    pair = noisy_pair()
    x = (torch.rand(8, 6) < 0.5).double()
    objective.loss_and_grads(*pair, x)
    norms = [m for program in pair for m in program.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all(m.training for program in pair for m in program.modules())
    runs = objective._total_particles
    # MMD samples the prior of the model, which may run it.
    assert {int(norm.num_batches_tracked) for norm in norms} <= {runs, runs + 1}
    for program in pair:
        program.eval()
    before = [b.clone() for program in pair for b in program.buffers()]
    objective.loss(*pair, x)
    after = [b for program in pair for b in program.buffers()]
    assert all(map(torch.equal, before, after))
    assert not any(m.training for program in pair for m in program.modules())


def test_no_graph_outlives_a_step(make: Make) -> None:
    p, objective, samples = LinearCodes(), make(num_particles=2), list[Any]()

    def guide(x: torch.Tensor) -> None:
        p.guide(x)
        # Made from a parameter, so that it lives as long as its graph does.
        samples.append(weakref.ref(p.moments(x)[0]))

    class Watch(poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_post_sample(self, msg: Any) -> None:
            samples.append(weakref.ref(msg["value"]))

    watched = Watch()(guide)
    objective.loss_and_grads(p.model, watched, p.x)
    samples.clear()
    for _ in range(2):
        objective.loss_and_grads(p.model, watched, p.x)
        objective.loss(p.model, watched, p.x)
    gc.collect()
    kept = [sample() for sample in samples if sample() is not None]
    assert not [value for value in kept if value.is_floating_point()]


# ---------------------------------------------------------------- ways to use it


def plain_model(batch: tuple[torch.Tensor, torch.Tensor], *, noise: float = 0.5) -> None:
    x, _ = batch
    weight = pyro.param("decoder weight", lambda: torch.randn(DIM, 4))
    with pyro.plate("examples", len(x)):
        u = pyro.sample("code of x", dist.Normal(torch.zeros_like(weight[:, 0]), 1.0).to_event(1))
        pyro.sample("pixels", dist.Normal(u @ weight, noise).to_event(1), obs=x)


def plain_guide(batch: tuple[torch.Tensor, torch.Tensor], *, noise: float = 0.5) -> None:
    x, _ = batch
    weight = pyro.param("encoder weight", lambda: torch.randn(4, DIM))
    scale = pyro.param("scale", lambda: torch.ones(DIM), constraint=dist.constraints.positive)
    with pyro.plate("some rows", len(x)):
        pyro.sample("code of x", dist.Normal(x @ weight, scale).to_event(1))


@pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svi_with_plain_functions(make: Make, dtype: torch.dtype) -> None:
    """Names of their own, a tuple, keywords, several batch sizes, either dtype."""
    torch.set_default_dtype(dtype)
    try:
        objective = make(num_particles=2)
        svi = SVI(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        x = torch.randn(12, 4)
        before: dict[str, torch.Tensor] = {}
        for batch in x.split(5):
            loss = svi.step((batch, batch[:, 0]), noise=0.4)
            assert isinstance(loss, float)
            assert loss == pytest.approx(loss)  # Not NaN.
            store = dict(pyro.get_param_store().items())
            assert set(store) == {"decoder weight", "encoder weight", "scale"}
            for name, value in store.items():
                assert value.dtype == dtype
                assert name not in before or not torch.equal(value, before[name])
            before = {name: value.detach().clone() for name, value in store.items()}
        loss = svi.evaluate_loss((x, x[:, 0]), noise=0.4)
        assert isinstance(loss, float)
        store = dict(pyro.get_param_store().items())
        assert all(torch.equal(value, before[name]) for name, value in store.items())
    finally:
        torch.set_default_dtype(torch.float64)


def module_pair() -> tuple[Any, Any, torch.Tensor]:
    decoder = ConvDecoder(DIM, [3], (1, 4, 4))
    encoder = ConvEncoder((1, 4, 4), [3], 2 * DIM)
    model = VAE(decoder, Bernoulli(3), StandardNormalPrior(DIM))
    return model, AmortizedNormal(encoder), (torch.rand(10, 1, 4, 4) < 0.5).double()


def test_an_elbo_module_with_an_optimizer_of_torch(make: Make) -> None:
    model, guide, x = module_pair()
    loss = make(num_particles=2)(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    assert len(before) == len([*model.parameters(), *guide.parameters()])
    for batch in x.split(4):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    assert not any(map(torch.equal, before, loss.parameters()))


def test_the_training_loop(make: Make) -> None:
    model, guide, x = module_pair()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=make(num_particles=2))
    history = fit(svi, list(x.split(4)), 2, validation=[x], progress=False)
    assert len(history.loss) == len(history.validation_loss) == 2


def test_the_graph_is_kept_where_asked_for(make: Make) -> None:
    p, kept = LinearCodes(), list[torch.Tensor]()

    def guide(x: torch.Tensor) -> None:
        kept.append((p.params["encoder"].exp() * 2).sum())
        factor = kept[-1] / kept[-1].detach()
        p.guide(x * factor)

    make(retain_graph=True).loss_and_grads(p.model, guide, p.x)
    kept[-1].backward()
    make().loss_and_grads(p.model, guide, p.x)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[-1].backward()


def test_a_loss_that_is_nan_warns(make: Make) -> None:
    p = LinearCodes()
    objective = make()
    objective.loss(p.model, p.guide, p.x)
    with torch.no_grad():
        p.params["weight"][0, 0] = torch.nan
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN: loss"):
        assert objective.loss(p.model, p.guide, p.x) != 0


# ---------------------------------------------------------------- what it refuses


def test_programs_that_do_not_belong_together(make: Make) -> None:
    p = LinearCodes()
    where = type(make()).__name__

    def lacks_b(x: torch.Tensor) -> None:
        poutine.block(p.guide, hide=["b"])(x)

    with pytest.raises(ValueError, match=f"{where}: expected the guide to sample every latent"):
        make().loss(p.model, lacks_b, p.x)
    with pytest.raises(ValueError, match=f"{where}: expected .* empty tensor"):
        make().loss(p.model, p.guide, p.x[:0])
    with pytest.raises(ValueError, match=f"{where}: expected the guide .* no site 'x'"):
        make().loss(poutine.uncondition(p.model), p.guide, p.x)


def test_latents_that_only_the_model_has(make: Make) -> None:
    p = LinearCodes()

    def model(x: torch.Tensor) -> None:
        p.model(x)
        with pyro.plate("rows 2", len(x)):
            pyro.sample("label", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="expected the guide to sample every latent.*'label'"):
        make().loss(model, p.guide, p.x)


def test_the_training_loss_has_the_dtype_of_the_programs(make: Make) -> None:
    """Weights are float64 tensors of their own, which a device may not know."""
    torch.set_default_dtype(torch.float32)
    try:
        p, objective = LinearCodes(), make()
        x = p.x.float()
        p.params = {k: v.detach().float().requires_grad_() for k, v in p.params.items()}
        if isinstance(objective, TraceFactor_ELBO):
            objective.discriminator.float()
        assert objective.training_loss(p.model, p.guide, x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float64)


def test_a_latent_that_is_observed_in_some_batches_only(make: Make) -> None:
    """What an objective cannot take is found where it comes, not at the first batch alone."""

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3 * torch.ones(len(x))), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + 4 * y, 0.7), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", dist.Bernoulli(torch.full((len(x),), 0.4)))
            loc = torch.stack([x, -x], -1)
            pyro.sample("z", dist.Normal(0.2 * loc, 0.6).to_event(1))

    x, y = torch.randn(4), torch.ones(4)
    objective = of_two_latents(make)
    objective.loss(model, guide, x, y)
    if isinstance(objective, TraceIWAE_ELBO) and objective.estimator == "standard":
        objective.loss(model, guide, x)
    else:
        with pytest.raises(ValueError, match="expected a reparameterised guide, got site 'y'"):
            objective.loss(model, guide, x)
    objective.loss(model, guide, x, y)


def test_rows_drawn_at_random_with_weights(make: Make) -> None:
    """The first look sees the same rows in model and guide."""
    data, weight = torch.randn(20, 2), torch.rand(20) + 0.5

    def model() -> None:
        with pyro.plate("d", NUM_DATA, subsample_size=5) as rows:
            rows = rows % 20
            with poutine.scale(scale=weight[rows]):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data[rows])

    def guide() -> None:
        with pyro.plate("d", NUM_DATA, subsample_size=5) as rows:
            rows = rows % 20
            with poutine.scale(scale=weight[rows]):
                pyro.sample("z", dist.Normal(0.5 * data[rows], 0.7).to_event(1))

    objective = of_two_latents(make)
    pyro.set_rng_seed(0)
    loss = objective.loss(model, guide)
    pyro.set_rng_seed(0)
    elbo = TraceMeanField_ELBO()
    if not isinstance(objective, TraceIWAE_ELBO | TraceTotalCorrelation_ELBO):
        assert loss == pytest.approx(elbo.loss(model, guide))


def test_a_used_objective_can_be_pickled(make: Make) -> None:
    """Its programs may be functions that cannot, and it will look at them again."""
    p, objective = LinearCodes(), make()

    def model(x: torch.Tensor) -> None:
        p.model(x)

    objective.loss(model, p.guide, p.x)
    again = pickle.loads(pickle.dumps(objective))
    pyro.set_rng_seed(0)
    expected = objective.loss(model, p.guide, p.x)
    pyro.set_rng_seed(0)
    assert again.loss(model, p.guide, p.x) == expected


@pytest.mark.parametrize("num_particles", [1, 3])
def test_an_encoder_with_noise_of_its_own(num_particles: int) -> None:
    """Nothing can be compared then, so particles run one at a time."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.1 * torch.randn_like(x), 1.0))

    objective = TraceIWAE_ELBO(num_particles)
    if num_particles > 1:
        with pytest.warns(UserWarning, match="vectorize_particles=True"):
            objective.loss(model, guide, torch.randn(4))
    assert math.isfinite(objective.loss_and_grads(model, guide, torch.randn(4)))
