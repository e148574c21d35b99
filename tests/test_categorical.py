"""Categorical latents: sums over all configurations, straight-through and relaxed samples."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, Case, GuideContract, ModelContract, normal_x, traced
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import importance_weighted_log_likelihood, likelihoods, scale_kl
from pyro_vae.categorical_priors import CategoricalPrior, OneHotPrior
from pyro_vae.evaluation import elbo_terms
from pyro_vae.guides.categorical import AmortizedCategorical, AmortizedOneHot
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.one_hot import OneHotStraightThrough, RelaxedOneHot
from pyro_vae.schedules import LinearWarmup

DIM = 4  # Of the data.
ENUM = TraceEnum_ELBO(max_plate_nesting=1)


def net(width_in: int, width_out: int) -> MLP:
    return MLP(width_in, [7], width_out, activation=nn.Tanh)


def vae(prior: Any, width: int) -> VAE:
    return VAE(net(width, DIM), likelihoods.Normal(torch.ones(DIM), learn=True), prior)


def integers(num: int, size: int, **how: Any) -> tuple[VAE, AmortizedCategorical]:
    guide = AmortizedCategorical(net(DIM, num * size), num, size)
    return vae(stirred(CategoricalPrior(num, size, **how)), num * size), guide


def one_hots(
    num: int, size: int, estimator: Any, temperature: Any = None, **how: Any
) -> tuple[VAE, AmortizedOneHot]:
    network = net(DIM, num * size)
    guide = AmortizedOneHot(network, num, size, estimator=estimator, temperature=temperature)
    prior_temperature = temperature if estimator == "gumbel-softmax" else None
    prior = OneHotPrior(num, size, temperature=prior_temperature, **how)
    return vae(stirred(prior), num * size), guide


def stirred(prior: Any) -> Any:
    for parameter in prior.parameters():
        parameter.data += torch.randn_like(parameter)
    return prior


def configurations(num: int, size: int) -> torch.Tensor:
    """All one-hot codes, ``(K^L, L, K)``."""
    rows = list(itertools.product(range(size), repeat=num))
    return torch.eye(size)[torch.tensor(rows)]


def log_joint(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """log p(x, z) of every configuration, by its definition: ``(K^L, batch)``."""
    codes = configurations(model.prior.num_latents, model.prior.num_categories)
    log_prior = (codes * model.prior.logits.log_softmax(-1)).sum((-1, -2))
    fn = model.likelihood(model.decoder(codes.flatten(-2)).unsqueeze(1))
    return fn.log_prob(x) + log_prior.unsqueeze(-1)


def log_guide(network: nn.Module, num: int, size: int, x: torch.Tensor) -> torch.Tensor:
    """log q(z | x) of every configuration: ``(K^L, batch)``."""
    log_q = network(x).reshape(len(x), num, size).log_softmax(-1)
    return (configurations(num, size).unsqueeze(1) * log_q).sum((-1, -2))


def gradients(value: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    return list(torch.autograd.grad(value, parameters, retain_graph=True))


def by_differences(f: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Gradient of a scalar function."""
    at, eps = at.detach(), 1e-5
    steps = eps * torch.eye(at.numel()).reshape(-1, *at.shape)
    return torch.stack([(f(at + s) - f(at - s)) / (2 * eps) for s in steps]).reshape(at.shape)


# The distributions.


@pytest.mark.parametrize("temperature", [None, 0.1, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_one_hot_with_the_right_frequencies(
    temperature: float | None, dtype: torch.dtype
) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.45, 0.5, 0.05]], dtype=dtype)
    fn = OneHotStraightThrough(logits=probs.log().requires_grad_(), temperature=temperature)
    num = 20_000
    for z in (fn.rsample((num,)), fn.sample((num,))):
        assert z.dtype == dtype
        assert z.shape == (num, 2, 3)
        assert ((z == 0) | (z == 1)).all()
        assert (z.sum(-1) == 1).all()
        error = (probs * (1 - probs) / num).sqrt()
        assert ((z.detach().mean(0) - probs).abs() < 5 * error).all()
    assert fn.rsample().requires_grad
    assert not fn.sample().requires_grad
    with torch.no_grad():
        assert not fn.rsample().requires_grad


@pytest.mark.parametrize("kind", ["probs", "logits"])
def test_the_gradient_of_samples_is_that_of_the_probabilities(kind: str) -> None:
    start, weights = torch.rand(2, 3) + 0.2, torch.randn(2, 3)

    def of_expected(parameter: torch.Tensor) -> torch.Tensor:
        return (weights * OneHotStraightThrough(**{kind: parameter}).mean).sum()

    parameter = start.clone().requires_grad_()
    (weights * OneHotStraightThrough(**{kind: parameter}).rsample()).sum().backward()
    torch.testing.assert_close(parameter.grad, by_differences(of_expected, start))


def test_the_gumbel_gradient_is_that_of_the_relaxed_sample_with_the_same_noise() -> None:
    start, weights, temperature = torch.randn(6, 3), torch.randn(6, 3), torch.tensor(0.7)
    noise = torch.empty(6, 3).exponential_(generator=torch.Generator().manual_seed(5))

    def relaxed(logits: torch.Tensor) -> torch.Tensor:
        return ((logits - noise.log()) / temperature).softmax(-1)

    logits = start.clone().requires_grad_()
    torch.manual_seed(5)
    z = OneHotStraightThrough(logits=logits, temperature=temperature).rsample()
    assert torch.equal(z.argmax(-1), relaxed(start).argmax(-1))
    (weights * z).sum().backward()
    expected = by_differences(lambda at: (weights * relaxed(at)).sum(), start)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("kind", ["probs", "logits"])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_log_probability_is_the_discrete_one(kind: str, temperature: float | None) -> None:
    parameter = torch.rand(5, 3).requires_grad_()
    fn = OneHotStraightThrough(**{kind: parameter}, temperature=temperature)
    other = torch.distributions.OneHotCategorical(**{kind: parameter})
    z = other.sample((7,))
    torch.testing.assert_close(fn.log_prob(z), other.log_prob(z))
    first, second = (gradient_of(f.log_prob(z).sum(), parameter) for f in (fn, other))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(fn.entropy(), other.entropy())
    carrying = fn.rsample()  # With a gradient: along the value it is the logits.
    along = gradient_of(fn.log_prob(carrying).sum(), carrying)
    torch.testing.assert_close(along, fn.logits)
    with pytest.raises(ValueError, match="to be within the support"):
        fn.log_prob(torch.full((5, 3), 1 / 3))


def gradient_of(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def test_categories_that_do_not_occur() -> None:
    logits = torch.tensor([0.5, -torch.inf, 0.0], requires_grad=True)
    fn = OneHotStraightThrough(logits=logits)
    log_prob = fn.log_prob(torch.eye(3))
    assert log_prob[1] == -torch.inf
    assert gradient_of(log_prob[[0, 2]].sum(), logits).isfinite().all()
    everywhere = OneHotStraightThrough(logits=torch.zeros(3))
    kl = kl_divergence(fn, everywhere)
    torch.testing.assert_close(kl, math.log(3) - fn.entropy())
    assert gradient_of(kl, logits).isfinite().all()
    assert kl_divergence(everywhere, fn) == torch.inf
    for temperature in (None, 0.5):
        z = OneHotStraightThrough(logits=logits, temperature=temperature).rsample((1000,))
        assert not z[:, 1].any()
        assert gradient_of((z * torch.randn(3)).sum(), logits).isfinite().all()


def test_kls_are_sums_over_the_categories() -> None:
    first, second = (torch.randn(5, 3).requires_grad_() for _ in range(2))
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    kinds = (OneHotStraightThrough, dist.OneHotCategorical)
    for of_p, of_q in itertools.product(kinds, kinds):
        p, q = of_p(logits=first), of_q(logits=second)
        torch.testing.assert_close(kl_divergence(p, q), expected)
        of_event = kl_divergence(p.to_event(1), q.to_event(1))
        torch.testing.assert_close(of_event, expected.sum())
        for parameter in (first, second):
            torch.testing.assert_close(
                gradient_of(kl_divergence(p, q).sum(), parameter),
                gradient_of(expected.sum(), parameter),
            )


def test_a_kl_whose_probabilities_underflow() -> None:
    logits = torch.tensor([0.0, -200.0], dtype=torch.float32)
    for other in (OneHotStraightThrough, dist.OneHotCategorical):
        for of_p, of_q in ((OneHotStraightThrough, other), (other, OneHotStraightThrough)):
            p, q = of_p(logits=0 * logits), of_q(logits=logits)
            assert q.probs[1] == 0
            assert float(kl_divergence(p, q)) == pytest.approx(100 - math.log(2))


def test_shapes_and_copies() -> None:
    for temperature in (None, 0.5):
        fn = OneHotStraightThrough(logits=torch.randn(3), temperature=temperature)
        wide = fn.expand((7, 5))
        assert isinstance(wide, OneHotStraightThrough)
        assert wide.temperature == temperature
        assert wide.rsample((2,)).shape == (2, 7, 5, 3)
        event = wide.to_event(1)
        assert event.has_rsample
        assert (event.batch_shape, event.event_shape) == ((7,), (5, 3))
        torch.testing.assert_close(fn.enumerate_support(), torch.eye(3))
    relaxed = RelaxedOneHot(torch.tensor(0.5), logits=torch.randn(3)).expand((7, 5)).to_event(1)
    assert relaxed.rsample((2,)).shape == (2, 7, 5, 3)
    assert relaxed.log_prob(relaxed.sample((2,))).shape == (2, 7)


def test_along_samples_the_gradient_of_the_kl_is_unbiased() -> None:
    """Of log p(z) - log q(z), as a sampled ELBO has it, averaged over the samples exactly."""
    logits, prior = torch.randn(4, requires_grad=True), torch.randn(4)
    q, p = OneHotStraightThrough(logits=logits), OneHotStraightThrough(logits=prior)
    average = torch.zeros(4)
    for k, hard in enumerate(torch.eye(4)):
        z = hard + (q.probs - q.probs.detach())
        average += q.probs[k].detach() * gradient_of(p.log_prob(z) - q.log_prob(z), logits)
    torch.testing.assert_close(average, -gradient_of(kl_divergence(q, p), logits))


def segment() -> tuple[torch.Tensor, float]:
    """Points of the simplex of two categories at equal steps of the logit, and the step."""
    logit = torch.linspace(-80, 80, 8001)
    return torch.stack([logit.sigmoid(), (-logit).sigmoid()], -1), 160 / 8000


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_relaxed_density(temperature: float) -> None:
    args = {"temperature": torch.tensor(temperature), "logits": torch.tensor([0.8, -0.3])}
    fn, other = RelaxedOneHot(**args), torch.distributions.RelaxedOneHotCategorical(**args)
    z = other.sample((50,))
    torch.testing.assert_close(fn.log_prob(z), other.log_prob(z))
    z = fn.rsample((50,))
    torch.testing.assert_close(fn.log_prob(z), other.log_prob(z.clone()))
    # It integrates to one: over the logit of the first entry, whose Jacobian is y (1 - y).
    values, step = segment()
    assert float(fn.log_prob(values).exp() @ values.prod(-1) * step) == pytest.approx(1)
    with pytest.raises(ValueError, match="to be within the support"):
        fn.log_prob(torch.tensor([0.7, 0.7]))


def test_relaxed_samples_at_any_temperature_and_their_kl() -> None:
    """With one temperature on both sides the KL is the same for all, and above the discrete one."""
    logits = torch.tensor([0.0, 20.0, 0.0], dtype=torch.float32, requires_grad=True)
    ratios = []
    for value in (1.0, 0.5, 0.01):
        temperature = torch.tensor(value)
        q = RelaxedOneHot(temperature, logits=logits)
        p = RelaxedOneHot(temperature, logits=torch.zeros(3))
        torch.manual_seed(0)
        z = q.rsample((1000,))
        ratios.append(q.log_prob(z) - p.log_prob(z))
        assert gradient_of(ratios[-1].mean(), logits).isfinite().all()
    assert (z == 0).any()
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ratios[0], ratios[2], rtol=1e-3, atol=1e-3)
    assert ratios[0].mean() > 2 * math.log(3)


def test_training_at_a_temperature_where_entries_underflow() -> None:
    model, guide = one_hots(2, 3, "gumbel-softmax", 0.01, learn=True)
    x = normal_x(BATCH).float()
    assert (traced(guide.float(), x).nodes["z"]["value"] == 0).any()
    loss = Trace_ELBO().differentiable_loss(model.float(), guide, x)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, model, guide))


# Sums over all configurations.


@pytest.mark.parametrize(("num", "size", "learn"), [(1, 5, False), (1, 5, True), (2, 3, True)])
def test_enumeration_is_the_sum_over_all_configurations(num: int, size: int, learn: bool) -> None:
    model, guide = integers(num, size, learn=learn)
    assert len(list(model.prior.parameters())) == learn
    x = normal_x(BATCH)
    log_p, log_q = log_joint(model, x), log_guide(guide.network, num, size, x)
    bound = (log_q.exp() * (log_p - log_q)).sum()
    loss = ENUM.differentiable_loss(model, guide, x)
    torch.testing.assert_close(loss, -bound)
    torch.testing.assert_close(gradients(loss, model, guide), gradients(-bound, model, guide))

    exact = log_p.logsumexp(0)  # Summed out in the model.
    loss = ENUM.differentiable_loss(model, lambda x: None, x)
    torch.testing.assert_close(loss, -exact.sum())
    torch.testing.assert_close(gradients(loss, model), gradients(-exact.sum(), model))
    evaluated = importance_weighted_log_likelihood(model, lambda x: None, x, num_particles=1)
    torch.testing.assert_close(evaluated.log_likelihood, exact)

    num_particles = 2000
    sampled = importance_weighted_log_likelihood(model, guide, x, num_particles=num_particles)
    weight = (log_p - log_q - exact).exp()
    variance = (log_q.exp() * (weight - 1).square()).sum(0)
    error = (variance / num_particles).sqrt()
    assert ((sampled.log_likelihood - exact).exp() - 1).abs().le(5 * error).all()
    deviation = (log_q.exp() * (log_p - log_q).square()).sum(0)
    deviation = (deviation - (log_q.exp() * (log_p - log_q)).sum(0).square()).sqrt()
    expected = (log_q.exp() * (log_p - log_q)).sum(0)
    assert (sampled.elbo - expected).abs().le(5 * deviation / num_particles**0.5).all()


def test_one_of_two_latents_left_out_of_the_guide() -> None:
    model, _ = integers(2, 3, learn=True)
    x, network = normal_x(BATCH), net(DIM, 3)
    guide = AmortizedCategorical(network, 1, 3, site="z2")
    log_p = log_joint(model, x).reshape(3, 3, BATCH).logsumexp(0)
    log_q = log_guide(network, 1, 3, x)
    loss = ENUM.differentiable_loss(model, guide, x)
    torch.testing.assert_close(loss, -(log_q.exp() * (log_p - log_q)).sum())


class OfRows(nn.Module):
    """Logits that are parameters of each row, so that rows have gradients of their own."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceIWAE_ELBO(5, "vimco")])
def test_the_score_function_is_unbiased(num: int, elbo: Any) -> None:
    """Without a warning of sites that ask for enumeration. All rows are the same."""
    size, repeats = 2, 5000
    model, _ = integers(num, size, learn=True)
    x, logits = normal_x(1), torch.randn(1, num * size)
    guide = AmortizedCategorical(OfRows(logits.repeat(repeats, 1)), num, size)
    elbo.differentiable_loss(model, guide, x.expand(repeats, -1)).backward()
    drawn = guide.network.logits.grad

    of_one = OfRows(logits)
    log_q = log_guide(of_one, num, size, x).squeeze(-1)
    log_w = log_joint(model, x).squeeze(-1) - log_q
    bound = torch.zeros(())  # Over all draws of all particles.
    for draws in itertools.product(range(size**num), repeat=elbo.num_particles):
        chosen = list(draws)
        bound = bound + log_q[chosen].sum().exp() * (
            log_w[chosen].logsumexp(0) - math.log(elbo.num_particles)
        )
    (exact,) = gradients(-bound, of_one)
    error = drawn.std(0) / repeats**0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert (exact.abs() > 5 * error).any()


# One-hot guides.


@pytest.mark.parametrize("estimator", ["straight-through", "gumbel-straight-through"])
def test_the_mean_field_elbo_has_the_exact_kl(estimator: Any) -> None:
    temperature = None if estimator == "straight-through" else 0.5
    model, guide = one_hots(2, 3, estimator, temperature, learn=True)
    with torch.no_grad():  # A decoder that ignores its code leaves nothing random.
        model.decoder[0].weight.zero_()
    x = normal_x(BATCH)
    log_p, log_q = log_joint(model, x), log_guide(guide.encoder.net, 2, 3, x)
    bound = (log_q.exp() * (log_p - log_q)).sum()
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(loss, -bound)
    torch.testing.assert_close(gradients(loss, guide), gradients(-bound, guide))
    kl = elbo_terms(model, guide, x).kl["z"]
    expected = (log_q.exp() * (log_q - log_p + log_p.logsumexp(0))).sum(0)
    torch.testing.assert_close(kl, expected)  # The posterior is the prior.


@pytest.mark.parametrize("estimator", ["straight-through", "gumbel-softmax"])
def test_a_linear_problem_trains_to_the_right_probabilities(estimator: Any) -> None:
    """Gradients of training go the right way: the loss falls, and the data are told apart."""
    temperature = None if estimator == "straight-through" else LinearWarmup(30, start=1, end=0.3)
    prior = OneHotPrior(1, 2, temperature=temperature if temperature else None)
    model = VAE(MLP(2, [], 1), likelihoods.Normal(0.5), prior)
    guide = AmortizedOneHot(MLP(1, [], 2), 1, 2, estimator=estimator, temperature=temperature)
    x = torch.tensor([[-2.0]] * 8 + [[2.0]] * 8)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO())
    for _ in range(60):
        svi.step(x)
        if temperature is not None:
            temperature.step()
    exact = -math.log(2) - 0.5 * math.log(2 * math.pi * 0.5**2)  # Two clusters, both hit.
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=50)
    assert estimate.mean() > exact - 0.3


def relaxed_pair() -> tuple[VAE, AmortizedOneHot]:
    return one_hots(1, 2, "gumbel-softmax", 0.6, learn=True)


def test_relaxed_importance_weights_integrate_to_the_relaxed_marginal() -> None:
    model, guide = relaxed_pair()
    x, num = normal_x(1), 20_000
    values, step = segment()
    with torch.no_grad():
        prior = RelaxedOneHot(torch.tensor(0.6), logits=model.prior.logits[0])
        log_p = prior.log_prob(values) + model.likelihood(model.decoder(values)).log_prob(x)
        exact = log_p.exp() @ values.prod(-1) * step
        with pyro.plate("particles", num, dim=-2):
            of_guide = traced(guide, x)
            of_model = traced(poutine.replay(model, trace=of_guide), x)
    total = sum(of_model.nodes[name]["log_prob"] for name in ("z", "x"))
    weights = (total - of_guide.nodes["z"]["log_prob"]).exp().squeeze(-1)
    error = weights.std() / num**0.5
    assert (weights.mean() - exact).abs() < 5 * error
    assert error < 0.02 * exact


class PosteriorLogits(nn.Module):
    """The exact posterior of a model with one latent, as logits."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = (model,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return log_joint(self.model[0], x).T


@pytest.mark.parametrize(
    ("estimator", "temperature"),
    [("straight-through", None), ("gumbel-straight-through", 0.5), ("gumbel-softmax", 0.5)],
)
def test_evaluation_is_of_the_discrete_model(estimator: Any, temperature: float | None) -> None:
    """In train mode as well: at the exact posterior every weight is log p(x)."""
    model, _ = one_hots(1, 4, estimator, temperature, learn=True)
    guide = AmortizedOneHot(
        PosteriorLogits(model), 1, 4, estimator=estimator, temperature=temperature
    )
    x = normal_x(BATCH)
    assert model.training
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=20)
    exact = log_joint(model, x).logsumexp(0)
    torch.testing.assert_close(estimate.log_likelihood, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate.elbo, exact, rtol=0, atol=1e-12)
    assert model.training
    # The integers have the same marginal.
    twin = VAE(model.decoder, model.likelihood, CategoricalPrior(1, 4, learn=True))
    twin.prior.load_state_dict(model.prior.state_dict())
    summed = importance_weighted_log_likelihood(twin, lambda x: None, x, num_particles=1)
    torch.testing.assert_close(summed.log_likelihood, exact)
    loss = TraceMeanField_ELBO().loss(model.eval(), guide.eval(), x)  # One sample is enough.
    assert math.isfinite(loss)


def test_in_eval_mode_samples_are_plain() -> None:
    model, guide = one_hots(2, 3, "gumbel-softmax", 0.5)
    x = normal_x(BATCH)
    for program in (model, guide):
        assert isinstance(traced(program, x).nodes["z"]["fn"].base_dist, RelaxedOneHot)
        program.eval()
        site = traced(program, x).nodes["z"]
        assert isinstance(site["fn"].base_dist, OneHotStraightThrough)
        assert site["fn"].base_dist.temperature is None
        assert ((site["value"] == 0) | (site["value"] == 1)).all()


@pytest.mark.parametrize("estimator", ["gumbel-straight-through", "gumbel-softmax"])
def test_the_temperature_follows_a_schedule(estimator: Any) -> None:
    schedule = LinearWarmup(4, start=1.0, end=0.2)
    model, guide = one_hots(2, 3, estimator, schedule)
    x = normal_x(BATCH)
    for expected in (1.0, 0.8, 0.6):
        for program in (guide, model) if estimator == "gumbel-softmax" else (guide,):
            fn = traced(program, x).nodes["z"]["fn"].base_dist
            assert float(fn.temperature) == pytest.approx(expected)
            assert fn.logits.dtype == fn.rsample().dtype
        schedule.step()
    assert not [name for name in guide.state_dict() if "temperature" in name]


def test_a_schedule_leaves_float32_as_it_is() -> None:
    schedule, x = LinearWarmup(4, start=1.0, end=0.2), normal_x(BATCH).float()
    model, guide = one_hots(2, 3, "gumbel-softmax", schedule)
    model.float()
    guide.float()
    trace = traced(guide, x)
    scored = traced(poutine.replay(model, trace=trace), x)
    for site in (trace.nodes["z"], scored.nodes["z"], scored.nodes["x"]):
        assert site["value"].dtype == site["log_prob"].dtype == torch.float32
    model, guide = integers(2, 3)
    assert traced(model.float(), x).nodes["x"]["log_prob"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["straight-through", "gumbel-softmax", "integers"])
def test_subsamples_masks_and_beta(kind: str) -> None:
    """In programs with plates and names of their own; the last batch is short."""
    decoder, encoder = net(3, DIM), net(DIM, 3)

    def fn(logits: torch.Tensor, training: bool) -> Any:
        if kind == "integers":
            return dist.Categorical(logits=logits)
        if kind == "gumbel-softmax" and training:
            return RelaxedOneHot(torch.tensor(0.5), logits=logits)
        return OneHotStraightThrough(logits=logits)

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", 20, subsample=x), poutine.mask(mask=seen):
            z = pyro.sample("cause", fn(torch.zeros(3), decoder.training))
            code = nn.functional.one_hot(z, 3).to(x) if kind == "integers" else z
            pyro.sample("seen", dist.Normal(decoder(code), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", 20, subsample=x), poutine.mask(mask=seen):
            pyro.sample("cause", fn(encoder(x), encoder.training))

    pair = scale_kl(model, 0.5), scale_kl(guide, 0.5)
    svi = SVI(*pair, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for rows in (5, 5, 1):
        assert math.isfinite(svi.step(normal_x(rows), torch.arange(rows) > 0))
    x, seen = normal_x(3), torch.tensor([True, False, True])
    estimate = importance_weighted_log_likelihood(*pair, x, seen, num_particles=4000)
    with torch.no_grad():
        log_p = dist.Normal(decoder(torch.eye(3)).unsqueeze(1), 1.0).to_event(1).log_prob(x)
    exact = (log_p.logsumexp(0) - math.log(3)) * seen
    assert ((estimate.log_likelihood - exact).abs() <= 5 * estimate.standard_error + 1e-9).all()
    assert estimate.standard_error.max() < 0.1


def test_copies_keep_their_temperature() -> None:
    _, guide = one_hots(2, 3, "gumbel-softmax", torch.tensor(0.5))
    fn = traced(copy.deepcopy(guide), normal_x(BATCH)).nodes["z"]["fn"].base_dist
    assert float(fn.temperature) == 0.5


# Contracts.


def one_hot_case(*args: Any, **how: Any) -> Case:
    return Case(lambda: one_hots(*args, **how), normal_x, latents={"z": tuple(args[:2])})


ONE = Case(lambda: integers(1, 3, learn=True), normal_x, latents={"z": ()}, discrete=True)
TWO = Case(lambda: integers(2, 3), normal_x, latents={"z1": (), "z2": ()}, discrete=True)
CASES = {
    "integers, one latent": ONE,
    "integers, two latents": TWO,
    "straight-through": one_hot_case(2, 3, "straight-through"),
    "straight-through, learnt prior": one_hot_case(1, 3, "straight-through", learn=True),
    "gumbel-straight-through": one_hot_case(2, 3, "gumbel-straight-through", 0.5),
    "gumbel-softmax": one_hot_case(2, 3, "gumbel-softmax", 0.7, learn=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestModels(ModelContract):
    pass


class TestGuides(GuideContract):
    def test_it_returns_its_sample(self, case: Case, program: Any) -> None:
        trace = case.traced(program, case.make_x(BATCH))
        returned = trace.nodes["_RETURN"]["value"]
        returned = returned if isinstance(returned, tuple) else (returned,)
        assert len(returned) == len(case.latents)
        for name, value in zip(case.latents, returned, strict=True):
            assert value is trace.nodes[name]["value"]

    def test_its_density_is_normalised(self, case: Case, program: Any) -> None:
        """Over all configurations; the relaxed density has a test of its own."""
        program.eval()
        trace = case.traced(program, case.make_x(BATCH))
        for name, shape in case.latents.items():
            fn = trace.nodes[name]["fn"]
            values = configurations(*shape).unsqueeze(1) if shape else fn.enumerate_support()
            total = fn.log_prob(values).logsumexp(0)
            torch.testing.assert_close(total, torch.zeros(BATCH))


# Errors.


@pytest.mark.parametrize(
    "make",
    [
        CategoricalPrior,
        OneHotPrior,
        lambda num, size: AmortizedCategorical(net(4, 4), num, size),
        lambda num, size: AmortizedOneHot(net(4, 4), num, size),
    ],
)
def test_too_few_latents_or_categories(make: Any) -> None:
    with pytest.raises(ValueError, match="expected num_latents >= 1, got 0"):
        make(0, 3)
    with pytest.raises(ValueError, match="expected num_categories >= 2, got 1"):
        make(2, 1)
    with pytest.raises(TypeError, match="expected an integer num_latents, got float"):
        make(2.0, 3)


@pytest.mark.parametrize("make", [AmortizedCategorical, AmortizedOneHot])
def test_networks_of_the_wrong_shape(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 6 outputs for num_latents=2 and .* got shape"):
        make(net(DIM, 5), 2, 3)(normal_x(BATCH))
    with pytest.raises(ValueError, match="expected the network to encode each of 5 rows"):
        make(net(DIM, 6), 2, 3)(normal_x(BATCH).unsqueeze(1))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, torch.tensor(0.0), LinearWarmup(3)])
def test_temperatures_that_are_not_positive(value: Any) -> None:
    for make in (lambda t: OneHotPrior(2, 3, temperature=t), gumbel):
        with pytest.raises(ValueError, match="expected a temperature > 0, got"):
            make(value)


def gumbel(temperature: Any) -> AmortizedOneHot:
    return AmortizedOneHot(net(DIM, 6), 2, 3, estimator="gumbel-softmax", temperature=temperature)


def test_temperatures_that_are_no_numbers() -> None:
    with pytest.raises(TypeError, match="expected temperature to be a number"):
        gumbel("cold")
    with pytest.raises(ValueError, match="expected a 0-d tensor temperature"):
        gumbel(torch.ones(2))
    with pytest.raises(ValueError, match="expected a temperature with estimator='gumbel-softmax'"):
        gumbel(None)
    with pytest.raises(ValueError, match="expected no temperature with estimator='straight-th"):
        AmortizedOneHot(net(DIM, 6), 2, 3, temperature=0.5)
    with pytest.raises(ValueError, match=r"expected estimator in \['straight-through', .* 'soft'"):
        AmortizedOneHot(net(DIM, 6), 2, 3, estimator="soft")  # type: ignore[arg-type]


def test_a_schedule_that_ends_at_zero() -> None:
    schedule = LinearWarmup(1, start=1.0, end=0.0)
    model, guide = one_hots(2, 3, "gumbel-softmax", schedule)
    schedule.step()
    for program in (model, guide):
        with pytest.raises(ValueError, match="expected a temperature > 0, got 0.0"):
            program(normal_x(BATCH))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_relaxed_on_one_side_only(elbo: Any) -> None:
    x = normal_x(BATCH)
    relaxed, discrete = one_hots(2, 3, "gumbel-softmax", 0.5), one_hots(2, 3, "straight-through")
    match = r"expected points inside the simplex at site 'z'.*temperature=0.5\).* leave the prior's"
    with pytest.raises(ValueError, match=match):
        elbo.loss(relaxed[0], discrete[1], x)
    match = "expected one-hot vectors at site 'z', because without a temperature"
    with pytest.raises(ValueError, match=match):
        elbo.loss(discrete[0], relaxed[1], x)
    with pytest.raises(ValueError, match="because in eval mode the prior is discrete"):
        elbo.loss(relaxed[0].eval(), relaxed[1], x)


def test_integers_against_one_hot_vectors() -> None:
    x = normal_x(BATCH)
    first, second = integers(1, 3), one_hots(1, 3, "straight-through")
    with pytest.raises(TypeError, match="expected integers at site 'z', got .* Use OneHotPrior"):
        Trace_ELBO().loss(first[0], second[1], x)
    with pytest.raises(ValueError, match=r"one-hot vectors of shape \(1, 3\) .* CategoricalPrior"):
        Trace_ELBO().loss(second[0], first[1], x)
    with pytest.raises(ValueError, match=r"one-hot vectors of shape \(1, 3\) at site 'z', got"):
        Trace_ELBO().loss(second[0], one_hots(1, 4, "straight-through")[1], x)
    wide = AmortizedCategorical(net(DIM, 30), 1, 30)
    with pytest.raises(ValueError, match=r"expected categories 0 \.\.\. 2 at site 'z', got \d+"):
        Trace_ELBO().loss(first[0], wide, x)
