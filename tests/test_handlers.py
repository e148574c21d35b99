"""``scale_kl`` against closed forms: E_q[log p(x | z)] - beta KL, its value and its gradient."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints, kl_divergence

from pyro_vae.handlers import MaskMissingMessenger, ScaleKLMessenger, mask_missing, scale_kl
from pyro_vae.schedules import Constant, LinearWarmup

BETAS = [0.0, 0.5, 1.0, 4.0]


class Linear:
    """z ~ N(0, 1), x ~ N(w z + b, exp(s)); q(z | x) = N(v x + c, exp(t))."""

    def __init__(self) -> None:
        values = {"w": 0.8, "b": -0.3, "s": -0.2, "v": 0.4, "c": 0.2, "t": -0.5}
        self.parameters = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}
        self.x = torch.tensor([0.5, -1.0, 2.0, 0.1])

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.__dict__["parameters"][name]

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.w * z + self.b, self.s.exp()), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))

    def q(self, x: torch.Tensor) -> dist.Normal:
        return dist.Normal(self.v * x + self.c, self.t.exp())

    def kl(self) -> torch.Tensor:
        return kl_divergence(self.q(self.x), torch.distributions.Normal(0.0, 1.0)).sum()

    def reconstruction(self) -> torch.Tensor:
        """E_q[log p(x | z)]."""
        q, noise = self.q(self.x), self.s.exp()
        at_mean = dist.Normal(self.w * q.mean + self.b, noise).log_prob(self.x)
        return (at_mean - 0.5 * self.w**2 * q.variance / noise**2).sum()

    def with_gradient(self, value: torch.Tensor) -> torch.Tensor:
        """The value and its gradient, in one vector."""
        gradient = torch.autograd.grad(
            value, list(self.parameters.values()), allow_unused=True, retain_graph=True
        )
        zeros = [torch.zeros(()) if g is None else g for g in gradient]
        return torch.stack([value.detach(), *zeros])

    def loss(self, elbo: Any, model: Any = None, guide: Any = None) -> torch.Tensor:
        loss = elbo.differentiable_loss(model or self.model, guide or self.guide, self.x)
        return self.with_gradient(loss)


def seeded(function: Callable[[], torch.Tensor], seed: int = 0) -> torch.Tensor:
    pyro.set_rng_seed(seed)
    return function()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_value_and_gradient_against_the_closed_form(elbo: type, beta: float) -> None:
    p = Linear()
    model, guide = scale_kl(p.model, beta), scale_kl(p.guide, beta)
    objective = elbo(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.stack([p.loss(objective, model, guide) for _ in range(50)])
    expected = p.with_gradient(-(p.reconstruction() - beta * p.kl()))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-12).all()
    assert error.max() < 0.1


@pytest.mark.parametrize("beta", BETAS)
def test_the_kl_of_mean_field_is_exact(beta: float) -> None:
    """The same draws with beta and without differ by beta times the analytic KL."""
    p, elbo = Linear(), TraceMeanField_ELBO()
    scaled = seeded(lambda: p.loss(elbo, scale_kl(p.model, beta), scale_kl(p.guide, beta)))
    plain = seeded(lambda: p.loss(elbo))
    expected = p.with_gradient((beta - 1) * p.kl())
    torch.testing.assert_close(scaled - plain, expected)


def make(elbo: type) -> Any:
    """Without the warning that nothing is enumerated."""
    options = {"strict_enumeration_warning": False} if elbo is TraceEnum_ELBO else {}
    return elbo(max_plate_nesting=1, **options)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_the_loss_is_linear_in_beta(elbo: type) -> None:
    p, objective = Linear(), make(elbo)

    def loss(beta: float) -> torch.Tensor:
        model, guide = scale_kl(p.model, beta), scale_kl(p.guide, beta)
        return seeded(lambda: p.loss(objective, model, guide))

    slope = loss(1.0) - loss(0.0)
    assert slope[0] != 0
    torch.testing.assert_close(loss(1.0), seeded(lambda: p.loss(objective)))
    torch.testing.assert_close(loss(4.0), loss(0.0) + 4 * slope)


class Discrete:
    """z ~ Categorical(prior), x ~ N(loc[z], 1); q(z | x) = Categorical(logits = table(x))."""

    def __init__(self) -> None:
        self.prior = torch.tensor([0.1, -0.4, 0.5], requires_grad=True)
        self.loc = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True)
        self.slope = torch.tensor([0.2, -0.1, 0.7], requires_grad=True)
        self.x = torch.tensor([0.5, -1.0, 2.0, 0.1])
        self.parameters = [self.prior, self.loc, self.slope]

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", dist.Categorical(logits=self.prior), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(self.loc[z], 1.0), obs=x)

    def guide(self, x: torch.Tensor, enumerate: str = "parallel") -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=x.unsqueeze(-1) * self.slope)
            pyro.sample("z", fn, infer={"enumerate": enumerate})

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p(x | z), log p(z) and log q(z | x): ``(batch, 3)``."""
        likelihood = dist.Normal(self.loc, 1.0).log_prob(self.x.unsqueeze(-1))
        q = (self.x.unsqueeze(-1) * self.slope).log_softmax(-1)
        return likelihood, self.prior.log_softmax(-1), q

    def gradient(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.autograd.grad(value, self.parameters, allow_unused=True, retain_graph=True)
        return tuple(torch.zeros(3) if g is None else g for g in found)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("enumerate", ["parallel", "sequential"])
def test_enumeration_in_the_guide_is_exact(beta: float, enumerate: str) -> None:
    p = Discrete()

    def guide(x: torch.Tensor) -> None:
        p.guide(x, enumerate)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    if enumerate == "sequential":  # one plate-wide value at a time: a batch of one
        p.x = p.x[:1]
    loss = elbo.differentiable_loss(scale_kl(p.model, beta), scale_kl(guide, beta), p.x)
    likelihood, prior, q = p.parts()
    expected = -(q.exp() * (likelihood + beta * (prior - q))).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(p.gradient(loss), p.gradient(expected))


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0, torch.tensor(0.5), LinearWarmup(10)])
def test_enumeration_in_the_model_alone_is_refused(beta: Any) -> None:
    p, elbo = Discrete(), TraceEnum_ELBO(max_plate_nesting=1)

    def guide(x: torch.Tensor) -> None:
        pass

    match = "scale_kl: expected a guide distribution for site 'z', got a site that is enumerated"
    with pytest.raises(ValueError, match=match):
        elbo.differentiable_loss(scale_kl(p.model, beta), scale_kl(guide, beta), p.x)


@pytest.mark.parametrize("beta", [1.0, torch.tensor(1.0), Constant(1.0)])
def test_enumeration_in_the_model_with_beta_one_is_the_marginal(beta: Any) -> None:
    p, elbo = Discrete(), TraceEnum_ELBO(max_plate_nesting=1)

    def guide(x: torch.Tensor) -> None:
        pass

    loss = elbo.differentiable_loss(scale_kl(p.model, beta), scale_kl(guide, beta), p.x)
    likelihood, prior, _ = p.parts()
    expected = -(likelihood + prior).logsumexp(-1).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(p.gradient(loss), p.gradient(expected))


def log_probs(fn: Callable[..., Any], *args: Any) -> dict[str, torch.Tensor]:
    trace = poutine.trace(fn).get_trace(*args)
    trace.compute_log_prob()
    return {n: s["log_prob"].detach() for n, s in trace.nodes.items() if "log_prob" in s}


def ratio(fn: Callable[..., Any], plain: Callable[..., Any], x: torch.Tensor) -> dict[str, float]:
    """By how much each site of ``fn`` counts more than in ``plain``."""
    pyro.set_rng_seed(0)
    first = log_probs(fn, x)
    pyro.set_rng_seed(0)
    second = log_probs(plain, x)
    result = {}
    for name in ("z", "x"):
        quotient = first[name].sum() / second[name].sum()
        torch.testing.assert_close(first[name], quotient * second[name])
        result[name] = round(float(quotient), 12)
    return result


def test_only_latent_sites_are_scaled() -> None:
    p = Linear()
    assert ratio(scale_kl(p.model, 4.0), p.model, p.x) == {"z": 4.0, "x": 1.0}
    assert ratio(scale_kl(p.model, 0.0), p.model, p.x) == {"z": 0.0, "x": 1.0}


def test_factors_and_deterministic_sites_are_left_alone() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.factor("f", torch.tensor(3.0))

    found = log_probs(scale_kl(model, 4.0))
    assert found["f"] == 3.0
    assert found["twice"] == 0.0


def test_a_conditioned_site_counts_as_observed() -> None:
    p = Linear()
    z = torch.tensor([0.5, -1.0, 2.0, 0.1])
    inside = log_probs(scale_kl(poutine.condition(p.model, {"z": z}), 4.0), p.x)
    torch.testing.assert_close(inside["z"], dist.Normal(0.0, 1.0).log_prob(z))


def test_wrapper_decorator_and_context_manager_are_the_same() -> None:
    p = Linear()

    @scale_kl(scale=0.5)
    def decorated(x: torch.Tensor) -> None:
        p.model(x)

    def within(x: torch.Tensor) -> None:
        with scale_kl(scale=0.5):
            p.model(x)

    for fn in (decorated, within, scale_kl(p.model, 0.5), scale_kl(p.model, scale=0.5)):
        assert ratio(fn, p.model, p.x) == {"z": 0.5, "x": 1.0}
    assert isinstance(scale_kl(scale=0.5), ScaleKLMessenger)


def test_a_wrapped_function_passes_arguments_and_result_on() -> None:
    def model(x: int, *, y: int = 0) -> tuple[int, int]:
        return x, y

    assert scale_kl(model, 0.5)(1, y=2) == (1, 2)


def test_a_tensor_is_read_at_each_run() -> None:
    p, beta = Linear(), torch.tensor(0.5)
    model = scale_kl(p.model, beta)
    assert ratio(model, p.model, p.x)["z"] == 0.5
    beta.fill_(3.0)
    assert ratio(model, p.model, p.x)["z"] == 3.0


def test_a_schedule_is_read_at_each_run() -> None:
    p, beta = Linear(), LinearWarmup(4)
    model, guide = scale_kl(p.model, beta), scale_kl(p.guide, beta)
    seen, elbo = [], TraceMeanField_ELBO()
    for _ in range(6):
        seen.append(float(seeded(lambda: p.loss(elbo, model, guide))[0]))
        beta.step()
    kl = float(p.kl().detach())
    start = float(seeded(lambda: p.loss(elbo))[0]) - kl
    expected = [start + min(step / 4, 1.0) * kl for step in range(6)]
    assert seen == pytest.approx(expected)


def test_a_float32_program_stays_float32() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z, x.new_ones(())), obs=x)

    found = log_probs(scale_kl(model, LinearWarmup(4, start=0.5)), torch.zeros(3).float())
    assert found["z"].dtype == found["x"].dtype == torch.float32


def test_nested_scales_multiply() -> None:
    p = Linear()
    outside = poutine.scale(scale_kl(p.model, 0.5), scale=6.0)
    inside = scale_kl(poutine.scale(p.model, scale=6.0), 0.5)
    for fn in (outside, inside):
        assert ratio(fn, p.model, p.x) == {"z": 3.0, "x": 6.0}
    twice = scale_kl(scale_kl(p.model, 0.5), 3.0)
    assert ratio(twice, p.model, p.x) == {"z": 1.5, "x": 1.0}


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_nested_in_poutine_scale_the_loss_is_scaled(elbo: type) -> None:
    p, objective = Linear(), make(elbo)
    programs = [scale_kl(p.model, 0.5), scale_kl(p.guide, 0.5)]
    plain = seeded(lambda: p.loss(objective, *programs))
    scaled = seeded(lambda: p.loss(objective, *[poutine.scale(f, 3.0) for f in programs]))
    torch.testing.assert_close(scaled, 3 * plain)


@pytest.mark.parametrize("beta", BETAS)
def test_subsampling_is_kept(beta: float) -> None:
    """Two of four rows stand for all: everything counts twice, the latents beta times that."""
    p = Linear()
    index = torch.tensor([2, 0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p.w * z + p.b, p.s.exp()), obs=x[index])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            pyro.sample("z", p.q(x[index]))

    elbo = TraceMeanField_ELBO()
    loss = seeded(lambda: p.loss(elbo, scale_kl(model, beta), scale_kl(guide, beta)))
    p.x = p.x[index]
    plain = seeded(lambda: p.loss(elbo))
    torch.testing.assert_close(loss, 2 * plain + p.with_gradient(2 * (beta - 1) * p.kl()))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_masks_are_kept(beta: float, elbo: type) -> None:
    p, objective = Linear(), elbo()
    mask = torch.tensor([True, False, True, False])
    masked = [poutine.mask(fn, mask=mask) for fn in (p.model, p.guide)]
    outside = [poutine.mask(scale_kl(fn, beta), mask=mask) for fn in (p.model, p.guide)]
    inside = [scale_kl(fn, beta) for fn in masked]
    first = seeded(lambda: p.loss(objective, *outside))
    second = seeded(lambda: p.loss(objective, *inside))
    torch.testing.assert_close(first, second)
    if elbo is TraceMeanField_ELBO:
        plain = seeded(lambda: p.loss(objective, *masked))
        p.x = p.x[mask]
        torch.testing.assert_close(first, plain + p.with_gradient((beta - 1) * p.kl()))


@pytest.mark.parametrize("beta", BETAS)
def test_svi_trains_with_any_beta(beta: float) -> None:
    """beta = 0, which ``poutine.scale`` refuses, trains too."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / (1 + beta), scale))

    # The best scale is sqrt(beta / (1 + beta)), which is 0 for beta = 0.
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = SVI(scale_kl(model, beta), scale_kl(guide, beta), optimizer, TraceMeanField_ELBO())
    for _ in range(300):
        svi.step(torch.zeros(50))
    best = (beta / (1 + beta)) ** 0.5
    assert float(pyro.param("scale").detach()) == pytest.approx(best, abs=0.06)


# Bad input.


@pytest.mark.parametrize("scale", ["0.5", [0.5], True, object()])
def test_a_scale_that_is_no_number(scale: Any) -> None:
    match = f"scale_kl: expected scale to be a number, .* got {type(scale).__name__}"
    with pytest.raises(TypeError, match=match):
        scale_kl(lambda: None, scale)


def test_a_missing_scale() -> None:
    with pytest.raises(TypeError, match="scale_kl: expected a scale, got None"):
        scale_kl(lambda: None)
    with pytest.raises(TypeError, match="scale_kl: expected a scale, got None"):
        scale_kl()


def test_the_scale_in_the_place_of_the_program() -> None:
    with pytest.raises(TypeError, match="expected a model or guide first, got float.*scale=0.5"):
        scale_kl(0.5)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_a_scale_out_of_range(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale_kl: expected a finite scale >= 0, got"):
        scale_kl(lambda: None, scale)


def test_a_scale_per_datum() -> None:
    with pytest.raises(ValueError, match=r"expected a 0-d tensor scale, got shape \(3,\)"):
        scale_kl(lambda: None, torch.ones(3))


# Values that were not observed.


ROWS = torch.tensor([True, False, True, False, False])
ILLEGAL = [float("nan"), float("inf"), -1.0, 0.5, -7.0, 1e30]
SITES: dict[str, tuple[Callable[[torch.Tensor], Any], Any]] = {
    "normal": (lambda p: dist.Normal(p, p.exp()), 0.3),
    "Bernoulli": (lambda p: dist.Bernoulli(logits=p), 1.0),
    "binomial": (lambda p: dist.Binomial(4, logits=p), 3.0),
    "categorical": (lambda p: dist.Categorical(logits=torch.stack([p, -p, p * 2], -1)), 2.0),
    "one-hot": (
        lambda p: dist.OneHotCategorical(logits=torch.stack([p, -p, p * 2], -1)),
        [0.0, 1.0, 0.0],
    ),
    "Poisson": (lambda p: dist.Poisson(p.exp()), 3.0),
    "negative binomial": (lambda p: dist.NegativeBinomial(3.0, logits=p), 2.0),
    "multinomial": (
        lambda p: dist.Multinomial(3, logits=torch.stack([p, -p, p * 2], -1)),
        [0.0, 1.0, 2.0],
    ),
    "Dirichlet": (lambda p: dist.Dirichlet(torch.stack([p, -p, p], -1).exp()), [0.2, 0.3, 0.5]),
    "gamma": (lambda p: dist.Gamma(p.exp(), p.exp()), 0.7),
    "log-normal": (lambda p: dist.LogNormal(p, p.exp()), 0.7),
    "beta": (lambda p: dist.Beta(p.exp(), p.exp()), 0.4),
    "uniform": (lambda p: dist.Uniform(-p.exp() - 1, p.exp() + 1), 0.4),
    "Pareto": (lambda p: dist.Pareto(1 + 0 * p, p.exp()), 1.7),
    "von Mises": (lambda p: dist.VonMises(p, p.exp()), 0.4),
    "geometric": (lambda p: dist.Geometric(logits=p), 2.0),
    "mixture": (
        lambda p: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(5, 2)), dist.Normal(torch.stack([p, -p], -1), 1.0)
        ),
        0.4,
    ),
    "discrete uniform": (lambda p: dist.Categorical(logits=p.unsqueeze(-1).expand(5, 3)), 1.0),
}


@pytest.mark.parametrize("illegal", ILLEGAL)
@pytest.mark.parametrize("name", SITES)
def test_a_missing_value_is_never_looked_at(name: str, illegal: float) -> None:
    """Density and gradient are those of the rows that were observed, and finite."""
    make, legal = SITES[name]
    parameter = torch.tensor([0.1, -0.4, 0.6, 0.2, -0.3], requires_grad=True)
    value = torch.tensor(legal).expand(5, *torch.tensor(legal).shape)
    expected = make(parameter).log_prob(value)[ROWS].sum()
    (wanted,) = torch.autograd.grad(expected, parameter)
    hidden = torch.where(ROWS.reshape(5, *[1] * (value.dim() - 1)), value, illegal)
    kept = hidden.clone()

    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", make(parameter), obs=hidden)

    def guide() -> None:
        pass

    seen = mask_missing(model, {"x": ROWS})
    trace = poutine.trace(seen).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    torch.testing.assert_close(site["log_prob_sum"], expected)
    assert (site["log_prob"][~ROWS] == 0).all()
    assert site["fn"].log_prob(site["value"]).isfinite().all()
    loss = Trace_ELBO().differentiable_loss(seen, guide)
    (gradient,) = torch.autograd.grad(loss, parameter)
    torch.testing.assert_close(gradient, -wanted)
    torch.testing.assert_close(hidden, kept, equal_nan=True, rtol=0, atol=0)


def test_missing_counts_that_start_above_zero() -> None:
    """A density that looks its values up in a table has no entry for a zero."""

    class Die(dist.TorchDistribution):  # type: ignore[misc]
        support = constraints.integer_interval(1, 6)
        arg_constraints: ClassVar[dict[str, Any]] = {}

        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits.log_softmax(-1)
            super().__init__(logits.shape[:-1])

        def log_prob(self, value: torch.Tensor) -> torch.Tensor:
            index = (value - 1).long()
            assert (index >= 0).all()
            return self.logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)

        def expand(self, batch_shape: Any, _instance: Any = None) -> "Die":
            return Die(self.logits.expand(*batch_shape, 6))

    logits, x = torch.randn(5, 6), torch.tensor([1.0, math.nan, 6.0, 0.0, -1.0])

    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", Die(logits), obs=x)

    trace = poutine.trace(mask_missing(model, {"x": ROWS})).get_trace()
    trace.compute_log_prob()
    expected = torch.stack([logits.log_softmax(-1)[0, 0], logits.log_softmax(-1)[2, 5]])
    torch.testing.assert_close(trace.nodes["x"]["log_prob"][ROWS], expected)


def test_integers_stay_integers() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Categorical(logits=torch.zeros(5, 3)), obs=x)

    x = torch.tensor([1, -1, 2, 99, -1])
    value = poutine.trace(mask_missing(model, {"x": ROWS})).get_trace(x).nodes["x"]["value"]
    assert value.dtype == torch.int64
    assert value.tolist() == [1, 0, 2, 0, 0]


def test_missing_values_of_events_and_of_several_plates() -> None:
    x = torch.randn(2, 5, 4, 3)
    rows = torch.rand(5, 1) < 0.5
    entries = torch.rand(2, 5, 4) < 0.5

    def model(x: torch.Tensor) -> None:
        with pyro.plate("outer", 2, dim=-3), pyro.plate("rows", 5, dim=-2):
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Normal(0.0, torch.ones(3)).to_event(1), obs=x)

    for mask in (rows, entries, torch.tensor(True), torch.tensor(False)):
        hidden = torch.where(mask.unsqueeze(-1), x, torch.nan)
        trace = poutine.trace(mask_missing(model, {"x": mask})).get_trace(hidden)
        trace.compute_log_prob()
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
        expected = torch.where(mask, expected, 0.0)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


def test_masks_are_joined_and_other_sites_left_alone() -> None:
    x = torch.randn(5)
    outer = torch.tensor([True, True, False, False, True])

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=outer):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    trace = poutine.trace(mask_missing(model, {"x": ROWS})).get_trace()
    assert trace.nodes["x"]["mask"].tolist() == (outer & ROWS).tolist()
    assert trace.nodes["y"]["mask"] is None
    assert trace.nodes["y"]["value"] is x
    assert trace.nodes["z"]["mask"] is None
    for mask in (True, False):
        masked = poutine.mask(mask_missing(model, {"y": ROWS}), mask=mask)
        trace = poutine.trace(masked).get_trace()
        trace.compute_log_prob()
        count = (trace.nodes["y"]["log_prob"] != 0).tolist()
        assert count == (ROWS & mask).tolist()


def test_mask_missing_under_particles() -> None:
    x = torch.tensor([1.0, float("nan"), 0.3, float("nan"), float("nan")])

    def model() -> None:
        with pyro.plate("data", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(mask_missing(model, {"x": ROWS})).get_trace()
    trace.compute_log_prob()
    expected = dist.Normal(trace.nodes["z"]["value"], 1.0).log_prob(x.nan_to_num())
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], torch.where(ROWS, expected, 0.0))


def test_mask_missing_is_wrapper_decorator_and_context_manager() -> None:
    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(5))

    present = {"x": ROWS}
    decorated = mask_missing(present=present)(model)

    def inside() -> None:
        with mask_missing(present=present):
            model()

    for program in (mask_missing(model, present), decorated, inside):
        for _ in range(2):
            site = poutine.trace(program).get_trace().nodes["x"]
            assert site["mask"].tolist() == ROWS.tolist()
    assert isinstance(mask_missing(present=present), MaskMissingMessenger)


def test_bad_calls_of_mask_missing() -> None:
    def model(fail: bool = False) -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            if fail:
                raise RuntimeError("the user's own")
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(5))

    with pytest.raises(
        TypeError, match="mask_missing: expected masks by site, got None. Call mask"
    ):
        mask_missing(model)
    for mask, got in (
        (torch.ones(5, dtype=torch.float32), "torch.float32"),
        ([True] * 5, "list"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=f"expected a bool tensor for site 'x', got {got}"):
            mask_missing(model, {"x": mask})  # type: ignore[dict-item]
    for name in ("z", "image"):
        with pytest.raises(
            ValueError, match=rf"expected observed sites among \['x'\], got '{name}'"
        ):
            mask_missing(model, {"x": ROWS, name: ROWS})()
    with pytest.raises(RuntimeError, match="the user's own"):
        mask_missing(model, {"x": ROWS})(fail=True)


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (4,), (1, 5, 1)])
def test_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    """One entry a datum: a mask by element would count each datum several times."""
    mask = torch.ones(shape, dtype=torch.bool)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(torch.zeros(5, 3), 1.0).to_event(1), obs=x)

    match = r"expected a mask of shape \(5,\) for site 'x', its batch shape, got .*mask.all\(-1\)"
    with pytest.raises(ValueError, match=match):
        mask_missing(model, {"x": mask})(torch.zeros(5, 3))


@pytest.mark.parametrize("dim", [2, 3, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_missing_values_of_a_support_of_another_shape(dim: int, rows: int) -> None:
    """Matrices have a map from vectors, of another number of dimensions."""
    fn = dist.LKJCholesky(dim, torch.ones(rows))
    value, mask = fn.sample(), torch.arange(rows) > 0

    def model() -> None:
        with pyro.plate("data", rows):
            pyro.sample("x", fn, obs=value)

    trace = poutine.trace(mask_missing(model, {"x": mask})).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == value.shape
    torch.testing.assert_close(site["log_prob_sum"], fn.log_prob(value)[mask].sum())
