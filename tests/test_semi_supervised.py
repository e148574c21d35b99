"""Labels for some rows: against sums over classes by hand, and an exact linear-Gaussian model."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, Case, GuideContract, ModelContract, latent_sites, normal_x, traced
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from semi_linear import LABELLED, C, D, K, LinearClasses, Y
from torch import nn

from pyro_vae import (
    fit,
    importance_weighted_log_likelihood,
    latents,
    scale_kl,
    to_inference_data,
)
from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.datasets import Batches
from pyro_vae.evaluation import elbo_terms
from pyro_vae.guides import AmortizedNormal
from pyro_vae.guides.semi_supervised import AmortizedSemiSupervised
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE
from pyro_vae.models.semi_supervised import SemiSupervisedVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import StandardNormalPrior

close = torch.testing.assert_close
Pair = tuple[SemiSupervisedVAE, AmortizedSemiSupervised]
KNOWN: dict[str, tuple[torch.Tensor, ...]] = {
    "none": (),
    "some": (Y, LABELLED),
    "all": (Y.clamp(0, C - 1),),
    "masked all": (Y, LABELLED & False),
}


def decoder(width: int = D, num_classes: int = C) -> Concatenate:
    net = MLP(K + num_classes, [7], width, activation=nn.Tanh)
    return Concatenate(net, embed=OneHot(num_classes))


def pair(learn: bool = True) -> Pair:
    likelihood = Normal(torch.ones(D), learn=True)
    probs = torch.tensor([0.5, 0.3, 0.2])
    model = SemiSupervisedVAE(
        decoder(),
        likelihood,
        StandardNormalPrior(K),
        C,
        class_probs=probs,
        learn_class_probs=learn,
    )
    network = Concatenate(MLP(D + C, [7], 2 * K, activation=nn.Tanh), embed=OneHot(C))
    return model, AmortizedSemiSupervised(MLP(D, [7], C, activation=nn.Tanh), network, C)


def data() -> torch.Tensor:
    return normal_x(len(Y))


def one_particle(vectorize: bool = False, num_particles: int = 1) -> TraceEnum_ELBO:
    return TraceEnum_ELBO(
        max_plate_nesting=1, num_particles=num_particles, vectorize_particles=vectorize
    )


# Contracts, without labels and with labels for some rows.


def with_labels(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Labels that follow from the row itself, so that rows can be moved about."""
    if x.dim() < 2:
        return x, torch.zeros(1, dtype=torch.int64), torch.ones(1) > 0
    return x, (x[:, 0] > 0).long(), x[:, 1] > 0


CASES = {
    "no labels": Case(pair, normal_x, {"y": (), "z": (K,)}, discrete=True),
    "some labels": Case(pair, normal_x, {"y": (), "z": (K,)}, discrete=True, given=with_labels),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestModel(ModelContract):
    pass


class TestGuide(GuideContract):
    pass


# The bound, by a sum over classes in plain torch.


def bound_by_hand(
    programs: Pair,
    x: torch.Tensor,
    known: tuple[torch.Tensor, ...],
    particles: tuple[int, ...] = (),
    beta: float = 1.0,
) -> torch.Tensor:
    """The bound of every row; the noise comes from torch's generator, as that of the guide."""
    model, guide = programs
    net, noise = model.decoder.net, torch.distributions.Normal(0.0, 1.0)
    eps = noise.sample((C, *particles, len(x), K))
    log_q = guide.classifier(x).log_softmax(-1)
    log_p = model.raw_class_probs.log_softmax(-1)
    of_class, code_kl = [], []
    for y in range(C):
        one_hot = torch.eye(C)[y].expand(len(x), C)
        loc, raw = guide.encoder.net.net(torch.cat([x, one_hot], -1)).chunk(2, -1)
        scale = nn.functional.softplus(raw) + 1e-6
        z = loc + scale * eps[y]
        mean = net(torch.cat([z, one_hot.expand(*z.shape[:-1], C)], -1))
        log_x = torch.distributions.Normal(mean, model.likelihood.scale).log_prob(x).sum(-1)
        q, p = torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 1.0)
        kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
        of_class.append(log_x.reshape(-1, len(x)).mean(0))
        code_kl.append(kl.reshape(-1, len(x)).mean(0))
    likelihood, kl = torch.stack(of_class, -1), torch.stack(code_kl, -1)
    terms = likelihood - beta * (kl + log_q - log_p)
    unlabelled = (log_q.exp() * terms).sum(-1)
    if not known:
        return unlabelled
    y, labelled = known if len(known) == 2 else (known[0], torch.ones(len(x)) > 0)
    of_label = (likelihood - beta * kl + log_p).gather(1, torch.where(labelled, y, 0)[:, None])
    return torch.where(labelled, of_label[:, 0], unlabelled)


def gradients(programs: Pair, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {f"{i}.{n}": p for i, m in enumerate(programs) for n, p in m.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("particles", [(), (5,)])
@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN.keys())
def test_bound_and_gradient_are_sums_over_classes(
    known: tuple[torch.Tensor, ...], particles: tuple[int, ...]
) -> None:
    programs, x = pair(), data()
    pyro.set_rng_seed(1)
    expected = -bound_by_hand(programs, x, known, particles).sum()
    pyro.set_rng_seed(1)
    elbo = one_particle(bool(particles), particles[0] if particles else 1)
    loss = elbo.differentiable_loss(*programs, x, *known)
    close(loss, expected)
    close(gradients(programs, loss), gradients(programs, expected))


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_on_both_sides(beta: float) -> None:
    """Also 0, where a warm-up starts: it multiplies probabilities of 0 without a NaN."""
    programs, x, known = pair(), data(), KNOWN["some"]
    pyro.set_rng_seed(1)
    expected = -bound_by_hand(programs, x, known, beta=beta).sum()
    pyro.set_rng_seed(1)
    scaled = [scale_kl(program, beta) for program in programs]
    loss = one_particle().differentiable_loss(*scaled, x, *known)
    close(loss, expected)
    close(gradients(programs, loss), gradients(programs, expected))


def test_masks_on_rows_and_scales() -> None:
    programs, x, known = pair(), data(), KNOWN["some"]
    rows = torch.tensor([True, False, True, False, True, True])
    pyro.set_rng_seed(1)
    expected = -bound_by_hand(programs, x, known)[rows].sum()
    pyro.set_rng_seed(1)
    masked = [poutine.mask(program, mask=rows) for program in programs]
    loss = one_particle().differentiable_loss(*masked, x, *known)
    close(loss, expected)
    close(gradients(programs, loss), gradients(programs, expected))
    pyro.set_rng_seed(1)
    scaled = [poutine.scale(program, scale=2.0) for program in masked]
    close(one_particle().differentiable_loss(*scaled, x, *known), 2 * expected)


def test_values_of_labels_that_are_not_known_play_no_role() -> None:
    programs, x = pair(), data()
    losses = []
    for other in (-1, 99, 1):
        pyro.set_rng_seed(1)
        y = torch.where(LABELLED, Y, other)
        losses.append(one_particle().loss(*programs, x, y, LABELLED))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    programs, x = pair(), data()
    losses = []
    for y in (Y.clamp(0, 2), Y.clamp(0, 2).to(dtype)):
        pyro.set_rng_seed(1)
        losses.append(one_particle().loss(*programs, x, y, LABELLED))
    assert losses[0] == losses[1]


def test_single_precision() -> None:
    programs, x = [program.float() for program in pair()], data().float()
    loss = one_particle().differentiable_loss(*programs, x, *KNOWN["some"])
    assert loss.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients(tuple(programs), loss).values())


# The exact model.


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN.keys())
def test_every_weight_is_the_marginal_likelihood(known: tuple[torch.Tensor, ...]) -> None:
    """log p(x, y) of rows with a label, log p(x) of those without."""
    exact = LinearClasses()
    args, expected = (exact.x, *known), exact.log_marginal(*known)
    estimate = importance_weighted_log_likelihood(exact.model, exact.guide, *args, num_particles=50)
    close(estimate.log_likelihood, expected, rtol=0, atol=1e-10)
    close(estimate.elbo, expected, rtol=0, atol=1e-10)
    assert estimate.standard_error.max() < 1e-7  # the root of a difference of rounding errors
    for _ in range(5):
        guide_trace = poutine.trace(exact.guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(exact.model, guide_trace)).get_trace(*args)
        log_weight = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        close(log_weight, expected.sum(), rtol=0, atol=1e-9)


def sampling(elbo: Callable[[], Any]) -> Callable[[], Any]:
    """Pyro says of objectives that sample that they do not enumerate what could be."""

    def make() -> Any:
        warnings.filterwarnings("ignore", r"(?s).*If you want to enumerate sites")
        return elbo()

    return make


@pytest.mark.parametrize(
    "make",
    [
        one_particle,
        lambda: one_particle(vectorize=True, num_particles=3),
        sampling(Trace_ELBO),
        sampling(lambda: TraceIWAE_ELBO(3, "vimco")),
    ],
    ids=["TraceEnum", "TraceEnum, vectorised", "Trace", "IWAE"],
)
@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN.keys())
def test_any_objective_reports_it(known: tuple[torch.Tensor, ...], make: Callable[[], Any]) -> None:
    exact = LinearClasses()
    with warnings.catch_warnings():
        loss = make().loss(exact.model, exact.guide, exact.x, *known)
    close(loss, -float(exact.log_marginal(*known).sum()), rtol=0, atol=1e-9)


def test_kinds_of_rows_add_up() -> None:
    exact, elbo = LinearClasses(), one_particle()
    pair_of = exact.model, exact.guide
    mixed = elbo.loss(*pair_of, exact.x, Y, LABELLED)
    with_label = elbo.loss(*pair_of, exact.x[LABELLED], Y[LABELLED])
    without = elbo.loss(*pair_of, exact.x[~LABELLED])
    close(mixed, with_label + without, rtol=0, atol=1e-9)


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN.keys())
def test_the_model_alone_sums_over_classes(known: tuple[torch.Tensor, ...]) -> None:
    """With a guide of z alone."""
    exact = LinearClasses()
    loc, scale = torch.tensor([0.3, -0.2]), torch.tensor([1.2, 1.4])  # wider than the prior
    q, p = dist.Normal(loc, scale).to_event(1), dist.Normal(torch.zeros(K), 1.0).to_event(1)

    def guide(x: torch.Tensor, *_: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    pyro.set_rng_seed(1)
    loss = one_particle().loss(exact.model, guide, exact.x, *known)
    pyro.set_rng_seed(1)
    z = q.sample((len(Y),))
    mean = (z @ exact.weight.T)[:, None] + exact.locs
    joint = dist.Normal(mean, 0.7).log_prob(exact.x[:, None]).sum(-1) + exact.probs.log()
    expected = joint.logsumexp(1)
    if known:
        labelled = known[1] if len(known) == 2 else LABELLED | True
        of_label = joint.gather(1, torch.where(labelled, known[0], 0)[:, None])[:, 0]
        expected = torch.where(labelled, of_label, expected)
    expected = expected + p.log_prob(z) - q.log_prob(z)
    close(loss, -float(expected.sum()))
    estimate = importance_weighted_log_likelihood(
        exact.model, guide, exact.x, *known, num_particles=2000
    )
    error = estimate.log_likelihood - exact.log_marginal(*known)
    assert (error.abs() < 5 * estimate.standard_error).all()


def test_the_sum_over_classes_does_not_underflow() -> None:
    """The data are 200 nats less likely in the class of their label than in another one."""
    model, _ = pair()
    net = model.decoder.net = MLP(K + C, [], D)
    for parameter in net.parameters():
        parameter.data.zero_()
    net[0].weight.data[0, K + 1] = 20.0
    model.float()

    def guide(x: torch.Tensor, *_: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(K, dtype=torch.float32), 1.0).to_event(1))

    x = torch.zeros(1, D, dtype=torch.float32)
    loss = one_particle().loss(model, guide, x, torch.tensor([1]))
    log_p = torch.tensor(0.3).log() + D * dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    close(loss, float(200 - log_p), rtol=1e-6, atol=0)


def test_the_class_of_a_labelled_row_is_its_label() -> None:
    model, guide = pair()
    x = data()
    for program in (model, guide):
        drawn = [traced(program, x, Y, LABELLED).nodes["y"]["value"] for _ in range(30)]
        classes = torch.stack(drawn)
        assert (classes[:, LABELLED] == Y[LABELLED]).all()
        assert len(classes[:, ~LABELLED].unique()) == C
    trace = traced(model, x, Y, LABELLED)
    assert (trace.nodes["y"]["log_prob"][LABELLED] == 0).all()
    close(trace.nodes["y_label"]["log_prob"][LABELLED], model.class_probs.log()[Y[LABELLED]])
    assert (trace.nodes["y_label"]["log_prob"][~LABELLED] == 0).all()
    assert "y_label" not in traced(model, x).nodes


def test_class_probs() -> None:
    net, prior = decoder(), StandardNormalPrior(K)
    model = SemiSupervisedVAE(net, Normal(), prior, C)
    close(model.class_probs, torch.full((C,), 1 / 3))
    assert "raw_class_probs" in model.state_dict()
    assert "raw_class_probs" not in dict(model.named_parameters())
    probs = torch.tensor([0.7, 0.1, 0.2])
    learnt = SemiSupervisedVAE(net, Normal(), prior, C, class_probs=probs, learn_class_probs=True)
    close(learnt.class_probs, probs)
    assert "raw_class_probs" in dict(learnt.named_parameters())


# Into the latent space and back; evaluation; training.


def test_the_classifier_is_the_guides_distribution_of_y() -> None:
    model, guide = pair()
    x = data()
    q = latents.encode(guide, x, site="y")
    close(q.logits, guide.classifier(x).log_softmax(-1).detach())
    known = latents.encode(guide, x, Y, LABELLED, site="y")
    close(known.probs[~LABELLED], q.probs[~LABELLED])
    assert (known.mode[LABELLED] == Y[LABELLED]).all()


def test_codes_go_in_and_out() -> None:
    exact = LinearClasses()
    model, guide, x = exact.model, exact.guide, exact.x
    z, y = normal_x(len(x))[:, :K], torch.tensor([0, 1, 2, 0, 1, 2])
    mean = latents.decode(model, {"z": z, "y": y}, x).mean
    close(mean, z @ exact.weight.T + exact.locs[y], check_dtype=False)
    for known in KNOWN.values():
        assert latents.generate(model, x, *known, site="x").shape == x.shape
        assert latents.reconstruct(model, guide, x, *known, site="x").shape == x.shape
    drawn = latents.generate(model, x, Y, LABELLED, site=["x", "y"])
    assert (drawn["y"][LABELLED] == Y[LABELLED]).all()
    centre = latents.encode(guide, x[:3], Y[:3], site="z").mean
    again = latents.reconstruct(model, guide, x[:3], Y[:3], site="x")
    close(again, centre @ exact.weight.T + exact.locs[Y[:3]], check_dtype=False)


@pytest.mark.parametrize("with_class", [True, False])
def test_posterior_samples_hold_the_labels(with_class: bool) -> None:
    """Where the guide leaves the class out, they come from the model given z."""
    exact = LinearClasses()

    def of_code(x: torch.Tensor, *_: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(K), 1.3).to_event(1))

    guide = exact.guide if with_class else of_code
    samples = to_inference_data(exact.model, guide, exact.x, Y, LABELLED, num_samples=40)
    drawn = torch.as_tensor(samples.posterior["y"].values).reshape(-1, len(Y))
    assert (drawn[:, LABELLED] == Y[LABELLED]).all()
    assert len(drawn[:, ~LABELLED].unique()) > 1


def test_terms_of_the_elbo() -> None:
    exact = LinearClasses()
    terms = elbo_terms(exact.model, exact.guide, exact.x, Y, LABELLED, num_particles=10)
    assert {"y", "z"} == terms.closed_form
    close(terms.log_likelihood["y_label"][:3], exact.probs.log()[Y[:3]])
    assert (terms.log_likelihood["y_label"][3:] == 0).all()
    assert (terms.kl["y"][:3] == 0).all()
    q = (exact.log_joint(exact.x)).softmax(-1)
    close(terms.kl["y"][3:], (q * (q / exact.probs).log()).sum(-1)[3:])


def test_it_trains_on_batches_and_evaluation_changes_nothing() -> None:
    programs = pair()
    batches = Batches(data(), Y, LABELLED, batch_size=4)
    optimizer = pyro.optim.Adam({"lr": 0.05})
    history = fit(SVI(*programs, optimizer, one_particle()), batches, 8, progress=False)
    assert history.loss[-1] < history.loss[0]
    before = [p.detach().clone() for program in programs for p in program.parameters()]
    importance_weighted_log_likelihood(*programs, data(), Y, LABELLED, num_particles=20)
    after = [p for program in programs for p in program.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_on_the_codes_of_a_vae() -> None:
    """M1+M2: the second model's data are codes of the first."""
    x = data()
    first, encoder = VAE(MLP(3, [], D), Normal(), StandardNormalPrior(3)), MLP(D, [], 6)
    encode = AmortizedNormal(encoder)
    fit(SVI(first, encode, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()), [x], 3, progress=False)
    codes = latents.encode(encode, x).mean
    assert not codes.requires_grad
    model = SemiSupervisedVAE(decoder(3), Normal(torch.ones(3)), StandardNormalPrior(K), C)
    network = Concatenate(MLP(3 + C, [], 2 * K), embed=OneHot(C))
    guide = AmortizedSemiSupervised(MLP(3, [], C), network, C)
    before = encoder[0].weight.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), one_particle())
    fit(svi, Batches(codes, Y, LABELLED, batch_size=6), 3, progress=False)
    assert torch.equal(encoder[0].weight, before)
    assert latents.encode(guide, codes, site="y").probs.shape == (len(x), C)
    z1 = latents.decode(model, {"y": Y.clamp(0, 2)}, codes).mean  # A code of each class,
    assert latents.decode(first, {"z": z1}, x).mean.shape == x.shape  # and its picture.


# What cannot be right.


class OfDataAlone(nn.Linear):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


BAD_LABELS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "out of range": (
        (Y, LABELLED | True),
        ValueError,
        r"classes 0 \.\.\. 2 in y, got -1.*labelled",
    ),
    "too large": ((Y.clamp(min=0),), ValueError, r"classes 0 \.\.\. 2 in y, got 7"),
    "one-hot": ((torch.eye(C)[Y.clamp(0, 2)],), TypeError, r"y of integers.*y.argmax\(-1\) turns"),
    "one-hot integers": ((torch.eye(C).long()[Y.clamp(0, 2)],), ValueError, r"y of shape \(6,\)"),
    "floats": ((Y.double(),), TypeError, r"y of integers, .* got torch.float64. y.long\(\)"),
    "truth values": ((LABELLED,), TypeError, r"y of integers, .* got torch.bool"),
    "a list": (([0, 1, 2, 0, 1, 2],), TypeError, "y to be a tensor of integers, got list"),
    "too few": ((Y[:3],), ValueError, r"y of shape \(6,\), one class for each row, got \(3,\)"),
    "labelled alone": ((None, LABELLED), ValueError, "labels y beside labelled, got None"),
    "labelled as integers": ((Y, LABELLED.long()), TypeError, "labelled to be a bool tensor, got"),
    "labelled too short": ((Y, LABELLED[:3]), ValueError, r"labelled of shape \(6,\) as the lab"),
}


@pytest.mark.parametrize(("args", "error", "match"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_labels_that_cannot_be_right(
    args: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    for program in pair():
        with pytest.raises(error, match=f"{type(program).__name__}: expected {match}"):
            program(data(), *args)


@pytest.mark.parametrize("num_classes", [C - 1, C + 1])
def test_a_classifier_with_another_number_of_outputs(num_classes: int) -> None:
    _, guide = pair()
    guide.classifier = MLP(D, [], num_classes)
    with pytest.raises(ValueError, match=r"logits of shape \(6, 3\) from the classifier.*num_cla"):
        guide(data())


def test_networks_for_single_rows() -> None:
    _, guide = pair()
    x = torch.zeros(5, 2, 2, D)
    with pytest.raises(ValueError, match=r"logits of shape .* got \(5, 2, 2, 3\).*flatten\(1\)"):
        guide(x)
    guide.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4 * D, C))
    guide.encoder.net = OfDataAlone(D, 2 * K)
    with pytest.raises(ValueError, match=r"each of 5 rows into one code.*\(x.flatten\(1\)\)"):
        guide(x)


def test_networks_that_take_no_classes() -> None:
    model, guide = pair()
    model.decoder, guide.encoder.net = MLP(K, [], D), MLP(D, [], 2 * K)
    for program, what in ((model, "decoder"), (guide, "network")):
        with pytest.raises(TypeError) as caught:
            program(data())
        assert f"the {what} is called with" in caught.value.__notes__[0]
        assert "Concatenate(net, embed=OneHot(num_classes))" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "probs", [[0.5, 0.3, 0.2], torch.ones(2) / 2, torch.ones(3), torch.tensor([1.0, 0.0, 0.0])]
)
def test_probabilities_that_are_none(probs: Any) -> None:
    with pytest.raises(ValueError, match="expected class_probs as a tensor of 3 positive numb"):
        SemiSupervisedVAE(decoder(), Normal(), StandardNormalPrior(K), C, class_probs=probs)


def test_a_single_class() -> None:
    with pytest.raises(ValueError, match="SemiSupervisedVAE: expected num_classes >= 2, got 1"):
        SemiSupervisedVAE(decoder(), Normal(), StandardNormalPrior(K), 1)
    with pytest.raises(ValueError, match="AmortizedSemiSupervised: expected num_classes >= 2"):
        AmortizedSemiSupervised(MLP(D, [], 1), MLP(D, [], 2 * K), 1)


def test_data_of_another_width_and_outside_the_support() -> None:
    model, _ = pair()
    with pytest.raises(ValueError, match=r"SemiSupervisedVAE: expected x of shape \(batch, 4\)"):
        model(torch.zeros(BATCH, 3))
    x = data()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="SemiSupervisedVAE: expected finite data at site 'x'"):
        model(x)
    assert set(latent_sites(traced(model, data()))) == {"y", "z"}
