"""VQ-VAE: its gradients in closed form, its bound against the sum over all codes."""

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from contracts import BATCH, Case, GuideContract, ModelContract, normal_x
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_vae import fit, importance_weighted_log_likelihood, latents
from pyro_vae.code_distributions import CategoricalCodes, NearestCodes
from pyro_vae.code_priors import AutoregressiveCodePrior, UniformCodePrior
from pyro_vae.codebook import Codebook
from pyro_vae.evaluation import codebook_usage, elbo_terms
from pyro_vae.guides import AmortizedNormal
from pyro_vae.guides.codes import NearestCode
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceFreeBits_ELBO
from pyro_vae.objectives.vq import TraceVQ_ELBO
from pyro_vae.schedules import LinearWarmup

close = torch.testing.assert_close
K, D, N, BETA = 4, 2, 3, 0.7


def codebook(**k: Any) -> Codebook:
    result = Codebook(K, D, **k)
    start = torch.tensor([[1.0, 0.1], [-0.6, 1.0], [-0.5, -1.0], [0.2, -0.1]])
    result.vectors.data.copy_(start)
    return result


def pair(prior: Any = UniformCodePrior, temperature: Any = None, **k: Any) -> Any:
    c = codebook(**k)
    hidden = ([11],) if prior is AutoregressiveCodePrior else ()
    decoder = MLP(N * D, [7], 4, activation=torch.nn.Tanh)
    model = VAE(decoder, Normal(0.8, learn=True), prior(c, N, *hidden))
    network = MLP(4, [7], N * D, activation=torch.nn.Softplus)
    for parameter in network.parameters():  # So that x + 1 has other codes in every row.
        parameter.data.mul_(2)
    return model, NearestCode(network, c, N, temperature=temperature)


@dataclass
class VQCase(Case):
    """Codebook and network learn from each other by an objective of their own."""

    def elbo(self) -> Any:
        return TraceVQ_ELBO()


SITES = {"z": (N, D)}
CASES = {
    "by gradient": VQCase(pair, normal_x, latents=SITES),
    "by moving averages": VQCase(lambda: pair(decay=0.9), normal_x, latents=SITES),
    "learnt prior": VQCase(lambda: pair(AutoregressiveCodePrior), normal_x, latents=SITES),
}


class TestVQModel(ModelContract):
    @pytest.fixture(params=CASES.values(), ids=CASES)
    def case(self, request: Any) -> Case:
        return request.param


class TestNearestCode(GuideContract):
    @pytest.fixture(params=CASES.values(), ids=CASES)
    def case(self, request: Any) -> Case:
        return request.param

    def test_particles_at_once_have_the_density_of_single_ones(
        self, case: Case, program: Any
    ) -> None:
        """All particles are alike here."""
        with pyro.plate("particles", 3, dim=-2):
            trace = case.traced(program, case.make_x(BATCH))
        site = trace.nodes["z"]
        assert site["value"].shape == (3, BATCH, N, D)
        assert torch.equal(site["log_prob"], torch.zeros(3, BATCH))


class TestNearestCodeWithATemperature(GuideContract):
    """In eval mode it has a density, with the gradient of a score function."""

    @pytest.fixture
    def case(self) -> Case:
        def make() -> Any:
            model, guide = pair(temperature=0.5)
            return model, guide.eval()

        return Case(make, normal_x, latents=SITES)


# Gradients.


class Encoded:
    """A pair whose encoded vectors are the parameters; other names and a decoder by hand."""

    def __init__(self, mask: Any = None, **k: Any) -> None:
        self.codebook, self.mask = codebook(**k), mask
        self.prior = UniformCodePrior(self.codebook, N, site="code")
        self.encoded = torch.randn(5, N, D, requires_grad=True)
        self.weights = torch.randn(N * D, 3)

    def log_likelihood(self, code: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        loc = torch.tanh(code.flatten(-2) @ self.weights)
        return torch.distributions.Normal(loc, 0.7).log_prob(x).sum(-1)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("codebook", self.codebook)
        with pyro.plate("rows", len(x), dim=-1), poutine.mask(mask=self._mask()):
            code = self.prior().unflatten(-1, (N, D))
            loc = torch.tanh(code.flatten(-2) @ self.weights)
            pyro.sample("y", pyro.distributions.Normal(loc, 0.7).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1), poutine.mask(mask=self._mask()):
            pyro.sample("code", NearestCodes(self.codebook, self.encoded))

    def _mask(self) -> Any:
        return torch.ones(5, dtype=torch.bool) if self.mask is None else self.mask

    def gradients(self, objective: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of encoded vectors and codes."""
        self.encoded.grad = self.codebook.vectors.grad = None
        objective.differentiable_loss(self.model, self.guide, x).backward()
        of_codes = self.codebook.vectors.grad
        return self.encoded.grad, torch.zeros(K, D) if of_codes is None else of_codes


def test_the_bound_s_gradient_is_that_of_the_decoder_at_the_codes() -> None:
    p, x = Encoded(), torch.randn(5, 3)
    codes = p.codebook(p.codebook.nearest(p.encoded)).detach()
    at = codes.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-p.log_likelihood(at, x).sum(), at)
    of_encoded, of_codes = p.gradients(Trace_ELBO(), x)
    close(of_encoded, expected)
    assert not of_codes.any()
    # The problem with encoded + const in place of the codes, const held while encoded moves.
    constant, step = codes - p.encoded.detach(), 1e-5
    for index in ((0, 0, 0), (2, 1, 1), (4, 2, 0)):
        moved = torch.zeros(5, N, D)
        moved[index] = step
        up, down = (
            p.log_likelihood(p.encoded.detach() + sign * moved + constant, x).sum()
            for sign in (1, -1)
        )
        close(of_encoded[index], -(up - down) / (2 * step), rtol=1e-7, atol=1e-7)


ELBOS = {
    "plain": lambda: Trace_ELBO(),
    "three": lambda: Trace_ELBO(num_particles=3),
    "three at once": lambda: Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "mean field": lambda: TraceMeanField_ELBO(),
    "free bits": lambda: TraceFreeBits_ELBO(0.0),
}


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("masked", [False, True])
def test_codebook_and_commitment_terms_in_closed_form(elbo: str, masked: bool) -> None:
    mask = torch.tensor([True, False, True, True, False]) if masked else torch.ones(5).bool()
    p, x = Encoded(mask), torch.randn(5, 3)
    nearest = p.codebook.nearest(p.encoded)
    difference = (p.encoded - p.codebook(nearest)).detach() * mask[:, None, None]
    plain, without = p.gradients(ELBOS[elbo](), x)
    assert not without.any()
    of_encoded, of_codes = p.gradients(TraceVQ_ELBO(BETA, ELBOS[elbo]()), x)
    close(of_encoded - plain, 2 * BETA * difference)
    expected = torch.zeros(K, D)
    expected.index_add_(0, nearest.flatten(), -2 * difference.reshape(-1, D))
    close(of_codes, expected)
    assert expected.any()


@pytest.mark.parametrize("masked", [False, True])
def test_a_grid_of_positions_is_the_same_codes(masked: bool) -> None:
    """Two rows of positions as an event of more dimensions, against all of them side by side."""
    start, x, weights = codebook(decay=0.5), torch.randn(5, 3), torch.randn(2 * N * D, 3)
    encoded = torch.randn(5, 2 * N, D, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False]) if masked else torch.ones(5).bool()

    def run(in_grid: bool) -> tuple[torch.Tensor, ...]:
        codes, shape = copy.deepcopy(start), (2, N) if in_grid else (2 * N,)

        def model(x: torch.Tensor) -> None:
            prior = CategoricalCodes(codes, torch.zeros(*shape, K)).to_event(in_grid)
            with pyro.plate("rows", 5), poutine.mask(mask=mask):
                loc = pyro.sample("code", prior).flatten(1) @ weights
                pyro.sample("y", pyro.distributions.Normal(loc, 0.7).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            fn = NearestCodes(codes, encoded.unflatten(1, shape)).to_event(in_grid)
            with pyro.plate("rows", 5), poutine.mask(mask=mask):
                pyro.sample("code", fn)

        encoded.grad = None
        TraceVQ_ELBO(0.3).differentiable_loss(model, guide, x).backward()
        counts = codebook_usage(guide, x).counts
        return encoded.grad, codes.vectors, codes.running_counts, counts

    assert not torch.equal(run(True)[1], start.vectors)
    for first, second in zip(run(True), run(False), strict=True):
        close(first, second)


def test_an_enumerated_site_above_the_codes_is_refused() -> None:
    """The term would count once for each of its values."""
    p = Encoded()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 5):
            pyro.sample("class", pyro.distributions.Categorical(torch.ones(2)))
        p.model(x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", 5):
            fn = pyro.distributions.Categorical(torch.ones(2))
            y = pyro.sample("class", fn, infer={"enumerate": "parallel"})
            shift = 0.1 * y[..., None, None]
            pyro.sample("code", NearestCodes(p.codebook, p.encoded + shift))

    objective = TraceVQ_ELBO(0.3, TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match="'code' to depend on no enumerated site"):
        objective.differentiable_loss(model, guide, torch.randn(5, 3))


def test_codes_may_be_used_in_the_graph_of_a_step() -> None:
    """They move before the gradient is taken, and the graph keeps what it was made of."""
    codes = codebook(decay=0.5)
    out = codes.vectors @ torch.ones(D, 1, requires_grad=True)
    codes.update(torch.randn(7, D))
    out.square().sum().backward()


def test_dead_codes_are_revived_at_different_vectors() -> None:
    codes = Codebook(6, D, decay=0.5, revive_below=0.5)
    vectors = torch.randn(2, D)
    codes.update(vectors.repeat(10, 1))
    assert (torch.cdist(codes.vectors, vectors) == 0).sum(0).max() <= 2


def test_subsampling_scales_the_terms() -> None:
    p, x = Encoded(), torch.randn(5, 3)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", 20, subsample=torch.arange(5)):
            pyro.sample("code", NearestCodes(p.codebook, p.encoded))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 20, subsample=torch.arange(5)):
            code = p.prior()
            pyro.sample("y", pyro.distributions.Normal(code[..., :3], 1.0).to_event(1), obs=x)

    p.gradients(Trace_ELBO(), x)
    grads = []
    for objective in (Trace_ELBO(), TraceVQ_ELBO(BETA)):
        loss = objective.differentiable_loss(model, guide, x)
        grads.append(torch.autograd.grad(loss, p.encoded)[0])
    difference = p.encoded - p.codebook(p.codebook.nearest(p.encoded))
    close(grads[1] - grads[0], 4 * 2 * BETA * difference.detach())


def test_a_masked_distribution_and_a_schedule() -> None:
    p, x = Encoded(), torch.randn(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    beta = LinearWarmup(2, start=0.0)
    objective, vectors = TraceVQ_ELBO(beta), p.encoded.detach()
    difference = vectors - p.codebook(p.codebook.nearest(vectors)).detach()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", 5):
            pyro.sample("code", NearestCodes(p.codebook, p.encoded).mask(mask))

    for weight in (0.0, 0.5, 1.0):
        grads = []
        for each in (Trace_ELBO(), objective):
            loss = each.differentiable_loss(p.model, guide, x)
            grads.append(torch.autograd.grad(loss, p.encoded)[0])
        close(grads[1] - grads[0], weight * 2 * difference * mask[:, None, None])
        beta.step()


@pytest.mark.parametrize("prior", [UniformCodePrior, AutoregressiveCodePrior])
def test_the_loss_is_the_negative_bound_by_hand(prior: Any) -> None:
    model, guide = pair(prior)
    x = normal_x(BATCH)
    vectors = guide.network(x).reshape(BATCH, N, D)
    indices = model.prior.codebook.nearest(vectors)
    log_codes = torch.full((BATCH,), -N * math.log(K))
    if prior is AutoregressiveCodePrior:
        one_hot = torch.nn.functional.one_hot(indices, K).double().flatten(-2)
        logits = model.prior.net(one_hot).log_softmax(-1)
        log_codes = logits.gather(-1, indices.unsqueeze(-1)).sum((-1, -2))
    fn = model.likelihood(model.decoder(model.prior.codebook(indices).flatten(-2)))
    bound = (fn.log_prob(x) + log_codes).detach()
    for objective in (TraceVQ_ELBO(), TraceVQ_ELBO(3.0)):
        assert objective.loss(model, guide, x) == pytest.approx(-float(bound.sum()))
        loss = objective.differentiable_loss(model, guide, x)
        assert loss.item() == pytest.approx(-float(bound.sum()))
        assert objective.loss_and_grads(model, guide, x) == pytest.approx(-float(bound.sum()))
    for num_particles in (1, 6):
        estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=num_particles)
        close(estimate.log_likelihood, bound)
        close(estimate.elbo, bound)
    assert not (estimate.pareto_k > 0).any()  # All weights are equal.
    terms = elbo_terms(model, guide, x, num_particles=2)
    close(terms.elbo, bound)
    close(terms.kl["z"], -log_codes.detach())


# The likelihood.


@pytest.mark.parametrize("prior", [UniformCodePrior, AutoregressiveCodePrior])
def test_bounds_rise_to_the_sum_over_all_codes(prior: Any) -> None:
    model, guide = pair(prior)
    x = normal_x(BATCH)
    indices = torch.cartesian_prod(*[torch.arange(K)] * N)
    values = model.prior.codebook(indices).detach()
    log_prior = model.prior._distribution().log_prob(values)
    fn = model.likelihood(model.decoder(values.flatten(-2)).unsqueeze(1))
    exact = (fn.log_prob(x) + log_prior.unsqueeze(-1)).logsumexp(0).detach()
    # Summed out by evaluation itself, where the guide leaves the codes out.
    summed = importance_weighted_log_likelihood(model, lambda x: None, x, num_particles=1)
    close(summed.log_likelihood, exact)
    nearest = importance_weighted_log_likelihood(model, guide, x, num_particles=1)
    assert (nearest.log_likelihood < exact - 0.1).all()
    guide.temperature = 1e-9
    cold = importance_weighted_log_likelihood(model, guide, x, num_particles=20)
    close(cold.log_likelihood, nearest.log_likelihood)
    guide.temperature = 12.0
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=4000)
    assert ((estimate.log_likelihood - exact).abs() < 5 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.2).all()
    # Its ELBO is the sum over all codes, weighted by the softmax.
    vectors = guide.network(x).reshape(BATCH, N, D)
    distances = (vectors.unsqueeze(-2) - model.prior.codebook.vectors).square().sum(-1)
    log_q = (-distances / 12.0).log_softmax(-1).detach()
    log_q = log_q[:, torch.arange(N), indices.unsqueeze(1)].squeeze(2).sum(-1)
    joint = (fn.log_prob(x) + log_prior.unsqueeze(-1)).T.detach()
    elbo = (log_q.exp() * (joint - log_q)).sum(-1)
    spread = ((log_q.exp() * (joint - log_q).square()).sum(-1) - elbo**2).sqrt()
    assert ((estimate.elbo - elbo).abs() < 5 * spread / 4000**0.5).all()
    close(log_q.exp().sum(-1), torch.ones(BATCH))


def test_training_does_not_know_the_temperature() -> None:
    _, guide = pair(temperature=0.5)
    x = normal_x(BATCH)
    for training, kind in ((True, NearestCodes), (False, CategoricalCodes)):
        fn = poutine.trace(guide.train(training)).get_trace(x).nodes["z"]["fn"]
        assert type(fn) is kind


# What moves, and when.


def test_moving_averages_step_once_a_gradient_with_the_rows_that_are_data() -> None:
    mask = torch.tensor([True, False, True, True, False])
    for given in (None, mask):
        for elbo in ELBOS:
            p, x = Encoded(given, decay=0.9), torch.randn(5, 3)
            expected = copy.deepcopy(p.codebook)
            rows = p.encoded.detach()[mask if given is not None else slice(None)]
            expected.update(torch.cat([rows] * ELBOS[elbo]().num_particles))
            TraceVQ_ELBO(BETA, ELBOS[elbo]()).loss_and_grads(p.model, p.guide, x)
            close(p.codebook.vectors, expected.vectors)
            close(p.codebook.running_counts, expected.running_counts)
            assert p.encoded.grad.any()


def moved(model: Any, guide: Any, run: Any) -> bool:
    before = copy.deepcopy({**model.state_dict(), **guide.state_dict()})
    run()
    after = {**model.state_dict(), **guide.state_dict()}
    return any(not torch.equal(value, after[name]) for name, value in before.items())


def test_nothing_but_a_gradient_in_train_mode_moves_the_codebook() -> None:
    model, guide = pair(decay=0.5, revive_below=0.5)
    x, objective = normal_x(BATCH), TraceVQ_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), objective)
    latents.encode(guide, x)
    for run in (
        lambda: svi.evaluate_loss(x),
        lambda: importance_weighted_log_likelihood(model, guide, x, num_particles=3),
        lambda: elbo_terms(model, guide, x, num_particles=3),
        lambda: guide(x),
        lambda: SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO()).step(x),
        lambda: torch.no_grad()(objective.differentiable_loss)(model, guide, x),
    ):
        assert not moved(model, guide, run)
    assert moved(model, guide, lambda: svi.step(x))
    assert moved(model, guide, lambda: fit(svi, [x], 1, progress=False))
    model.eval()
    guide.eval()
    assert not moved(model, guide, lambda: svi.step(x))
    assert model.prior.codebook.training is False


@pytest.mark.parametrize("kind", [{}, {"decay": 0.9, "revive_below": 0.1}])
def test_training_helps_and_then_the_prior_alone_learns(kind: Any) -> None:
    model, guide = pair(**kind)
    x = normal_x(60) * torch.tensor([2.0, 2.0, 0.1, 0.1])
    before = importance_weighted_log_likelihood(model, guide, x, num_particles=1).mean()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceVQ_ELBO())
    fit(svi, [x], 60, progress=False)
    bound = importance_weighted_log_likelihood(model, guide, x, num_particles=1).mean()
    assert bound > before + 1
    for fixed in (model, guide):
        fixed.requires_grad_(False).eval()
    model.prior = AutoregressiveCodePrior(model.prior.codebook, N, [16])
    state = copy.deepcopy({**model.state_dict(), **guide.state_dict()})
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    fit(svi, [x], 40, progress=False)
    for name, value in {**model.state_dict(), **guide.state_dict()}.items():
        learnt = name.startswith("prior.net.") and not name.endswith("mask")
        assert torch.equal(value, state[name]) != learnt, name
    after = importance_weighted_log_likelihood(model, guide, x, num_particles=1).mean()
    assert after > bound + 0.5
    drawn = latents.generate(model, x)
    assert drawn.shape == x.shape
    model.prior.codebook.locate(poutine.trace(model).get_trace(x).nodes["z"]["value"])


# Shapes, types, copies.


def test_float32_and_a_batch_of_one() -> None:
    for prior in (UniformCodePrior, AutoregressiveCodePrior):
        model, guide = (part.float() for part in pair(prior, decay=0.9, revive_below=0.1))
        x = normal_x(1).float()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceVQ_ELBO())
        for _ in range(3):
            assert math.isfinite(svi.step(x))
        trace = poutine.trace(guide).get_trace(x)
        assert trace.nodes["z"]["value"].dtype == torch.float32
        assert model.prior.codebook.vectors.dtype == torch.float32
        for temperature in (None, 0.5):
            guide.temperature = temperature
            estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=5)
            assert estimate.log_likelihood.isfinite().all()


def test_a_network_may_return_vectors_and_take_a_context() -> None:
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x[:, : N * D] + y.unsqueeze(-1)).unflatten(-1, (N, D))

    c, x, y = codebook(), torch.randn(5, 8), torch.randn(5)
    code = NearestCode(Network(), c, N)(x, y)
    assert torch.equal(c.nearest(code), c.nearest((x[:, :6] + y[:, None]).reshape(5, N, D)))


def test_copies_made_together_share_the_codebook() -> None:
    model, guide = pair(decay=0.9)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceVQ_ELBO()).step(normal_x(BATCH))
    for other_model, other_guide in (
        copy.deepcopy((model, guide)),
        pickle.loads(pickle.dumps((model, guide))),
    ):
        shared = other_model.prior.codebook
        assert shared is not model.prior.codebook
        assert other_guide._codebook[0] is shared
        assert torch.equal(shared.vectors, model.prior.codebook.vectors)
    learnt = pair()
    for part in (learnt[1], learnt):  # Pyro hangs links on parameters in every step.
        SVI(*learnt, pyro.optim.Adam({"lr": 0.01}), TraceVQ_ELBO()).step(normal_x(BATCH))
        pickle.loads(pickle.dumps(part))


def test_buffers_go_round() -> None:
    model, guide = pair(decay=0.9)
    TraceVQ_ELBO().loss_and_grads(model, guide, normal_x(BATCH))
    fresh, _ = pair(decay=0.9)
    fresh.load_state_dict(model.state_dict())
    for name in ("vectors", "running_counts"):
        assert torch.equal(getattr(fresh.prior.codebook, name), getattr(model.prior.codebook, name))
    assert not [name for name in guide.state_dict() if "codebook" in name or "vectors" in name]


# Errors.


def test_arguments_of_the_guide() -> None:
    with pytest.raises(TypeError, match=r"expected a Codebook, got Embedding. .*prior.codebook"):
        NearestCode(MLP(4, [], 6), torch.nn.Embedding(3, 2), 3)
    with pytest.raises(ValueError, match=r"expected num_positions >= 1, got 0"):
        NearestCode(MLP(4, [], 6), codebook(), 0)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"expected a finite temperature > 0, got"):
            NearestCode(MLP(4, [], 6), codebook(), 3, temperature=wrong)
    guide = NearestCode(MLP(4, [], 7), codebook(), N)
    with pytest.raises(
        ValueError, match=r"into 3 vectors of 2 numbers, got shape \(5, 7\) .* 6 ou"
    ):
        guide(normal_x(5))
    guide = NearestCode(MLP(4, [], 6), codebook(), N)
    with pytest.raises(ValueError, match=r"each of 5 rows .* got shape \(5, 2, 6\)"):
        guide(torch.zeros(5, 2, 4))


def test_guides_and_models_that_do_not_belong_together() -> None:
    (model, _), (_, stranger) = pair(), pair()
    stranger._codebook[0].vectors.data += 0.1
    x = normal_x(BATCH)
    with pytest.raises(ValueError, match=r"site 'z': .* give the guide the codebook of the model"):
        Trace_ELBO().loss(model, stranger, x)
    with pytest.raises(ValueError, match=r"site 'z'.*codebook|'z' in the support 4 codes"):
        importance_weighted_log_likelihood(model, stranger, x, num_particles=2)
    longer = NearestCode(MLP(4, [], (N + 1) * D), model.prior.codebook, N + 1)
    with pytest.raises(ValueError, match="expected"):
        Trace_ELBO().loss(model, longer, x)
    with pytest.raises(ValueError, match="expected a continuous latent at site 'z'"):
        latents.interpolate(model, pair()[1], x, x)


def test_arguments_of_the_objective() -> None:
    with pytest.raises(ValueError, match=r"expected a finite commitment_cost >= 0, got -1"):
        TraceVQ_ELBO(-1.0)
    with pytest.raises(TypeError, match=r"expected commitment_cost to be a number"):
        TraceVQ_ELBO("0.25")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an ELBO with a differentiable_loss"):
        TraceVQ_ELBO(elbo=Trace_ELBO)  # type: ignore[arg-type]
    x = normal_x(BATCH)
    model, guide = pair(temperature=0.5)
    match = "expected a guide that samples nearest codes, got none. Use guides.NearestCode"
    with pytest.raises(ValueError, match=match):
        TraceVQ_ELBO().differentiable_loss(model, guide.eval(), x)
    with pytest.raises(ValueError, match=match):
        TraceVQ_ELBO().loss_and_grads(LinearGaussian(4, 2), AmortizedNormal(MLP(4, [], 4)), x)
