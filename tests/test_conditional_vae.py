"""The conditional VAE against exact answers, and the contracts of the pair."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, Case, GuideContract, ModelContract, normal_x, traced
from linear_given_class import LinearGivenClass
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import latents, likelihoods
from pyro_vae.conditional_priors import ConditionalPrior, Unconditional
from pyro_vae.conditioning import Concatenate, FiLM, OneHot
from pyro_vae.evaluation import elbo_terms
from pyro_vae.evaluation import importance_weighted_log_likelihood as log_likelihood
from pyro_vae.guides import AmortizedMultivariateNormal, AmortizedNormal
from pyro_vae.models import VAE
from pyro_vae.models.conditional import ConditionalVAE
from pyro_vae.nets import MLP, ConvEncoder, MultivariateNormalEncoder, NormalEncoder
from pyro_vae.priors import FlowPrior, HierarchicalPrior, StandardNormalPrior

NUM_CLASSES = 3


def classes_of(x: torch.Tensor) -> torch.Tensor:
    """A class for each row that only depends on the row."""
    if x.dim() < 2:
        return torch.zeros(x.shape[:1], dtype=torch.int64)
    return (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def mlp(width_in: int, width_out: int) -> MLP:
    return MLP(width_in, [7], width_out, activation=nn.Tanh)


def of_classes(learnt: bool, site: str = "z") -> tuple[ConditionalVAE, AmortizedNormal]:
    one_hot = OneHot(NUM_CLASSES)
    prior: Any = Unconditional(StandardNormalPrior(2, site=site))
    if learnt:
        of_class = nn.Sequential(one_hot, MLP(NUM_CLASSES, [], 4))
        prior = ConditionalPrior(NormalEncoder(of_class), site=site)
    decoder = Concatenate(mlp(2 + NUM_CLASSES, 4), embed=one_hot)
    likelihood = likelihoods.Normal(torch.ones(4), learn=True)
    network = Concatenate(mlp(4 + NUM_CLASSES, 4), embed=one_hot)
    return ConditionalVAE(decoder, likelihood, prior), AmortizedNormal(network, site=site)


def of_vectors() -> tuple[ConditionalVAE, AmortizedMultivariateNormal]:
    """The first half of a row is the context of the whole."""
    prior = ConditionalPrior(MultivariateNormalEncoder(mlp(2, 5), 2))
    decoder = FiLM(2, [7], 4, 2, activation=nn.Tanh)
    network = FiLM(4, [7], 5, 2, activation=nn.Tanh)
    model = ConditionalVAE(decoder, likelihoods.Normal(), prior)
    return model, AmortizedMultivariateNormal(network, latent_dim=2)


def of_images() -> tuple[ConditionalVAE, AmortizedNormal]:
    """Context of shape (1, 8, 4)."""
    prior = ConditionalPrior(NormalEncoder(ConvEncoder((1, 8, 4), [3], 4)))
    decoder = Concatenate(mlp(2 + 5, 4), embed=ConvEncoder((1, 8, 4), [3], 5))
    network = Concatenate(mlp(4 + 5, 4), embed=ConvEncoder((1, 8, 4), [3], 5))
    return ConditionalVAE(decoder, likelihoods.Normal(), prior), AmortizedNormal(network)


def image_of(x: torch.Tensor) -> torch.Tensor:
    if x.dim() < 2:
        return torch.zeros(*x.shape[:1], 1, 8, 4)
    return torch.outer(x[:, 0], torch.linspace(-1, 1, 32)).cos().reshape(-1, 1, 8, 4)


CASES = {
    "class, N(0, I)": Case(
        lambda: of_classes(learnt=False), normal_x, given=lambda x: (x, classes_of(x))
    ),
    "class, learnt prior": Case(
        lambda: of_classes(learnt=True), normal_x, given=lambda x: (x, classes_of(x))
    ),
    "another site": Case(
        lambda: of_classes(learnt=True, site="code"),
        normal_x,
        latents={"code": (2,)},
        given=lambda x: (x, classes_of(x)),
    ),
    "vector": Case(of_vectors, normal_x, given=lambda x: (x, x[:, :2] if x.dim() else x)),
    "image": Case(of_images, normal_x, given=lambda x: (x, image_of(x))),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestModel(ModelContract):
    pass


class TestGuide(GuideContract):
    pass


@pytest.fixture
def exact() -> LinearGivenClass:
    return LinearGivenClass()


# Exact answers.


def test_every_log_weight_is_the_exact_log_likelihood(exact: LinearGivenClass) -> None:
    """Vectorised: falling back to single particles would warn."""
    x = normal_x(7)
    for label in range(exact.num_classes):
        y = torch.full((7,), label)
        estimate = log_likelihood(exact.model, exact.guide, x, y, num_particles=9, chunk_size=4)
        expected = exact.log_prob(x)[:, label]
        for actual in (estimate.log_likelihood, estimate.elbo):  # equal where no weight differs
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_rows_of_different_classes(exact: LinearGivenClass) -> None:
    x, y = normal_x(7), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    estimate = log_likelihood(exact.model, exact.guide, x, y, num_particles=3)
    expected = exact.log_prob(x).gather(1, y.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(estimate.log_likelihood, expected, rtol=0, atol=1e-10)


def test_an_amortized_guide_gives_the_same_within_noise(exact: LinearGivenClass) -> None:
    x, y = normal_x(7), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    guide = AmortizedNormal(Concatenate(MLP(4 + 3, [], 4), embed=OneHot(3)))
    svi = SVI(exact.model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    exact.model.requires_grad_(False).eval()
    for _ in range(100):
        svi.step(x, y)
    estimate = log_likelihood(exact.model, guide, x, y, num_particles=2000)
    expected = exact.log_prob(x).gather(1, y.unsqueeze(1)).squeeze(1)
    error = (estimate.log_likelihood - expected).abs()
    assert (error < 5 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.1).all()


def test_the_kl_is_to_the_prior_of_the_class() -> None:
    model, guide = of_classes(learnt=True)
    x = normal_x(BATCH)
    y = classes_of(x)
    terms = elbo_terms(model, guide, x, y, num_particles=2)
    q, p = guide.encoder(x, y), model.prior.encoder(y)
    expected = torch.distributions.kl_divergence(q, p).detach()
    assert expected.unique().numel() == BATCH
    torch.testing.assert_close(terms.kl["z"], expected)


def test_a_constant_context_makes_it_a_vae() -> None:
    model, guide = of_classes(learnt=False)
    x = normal_x(BATCH)
    y = torch.full((BATCH,), 2)

    class Given(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return self.net(h, torch.tensor(2))

    vae = VAE(Given(model.decoder), model.likelihood, model.prior.prior)
    of_vae = AmortizedNormal(Given(guide.encoder.net))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        losses = []
        for pair, args in (((model, guide), (x, y)), ((vae, of_vae), (x,))):
            pyro.set_rng_seed(1)
            losses.append(elbo.loss(*pair, *args))
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    pyro.set_rng_seed(1)
    estimate = log_likelihood(model, guide, x, y, num_particles=20)
    pyro.set_rng_seed(1)
    of_one = log_likelihood(vae, of_vae, x, num_particles=20)
    torch.testing.assert_close(estimate.log_likelihood, of_one.log_likelihood)


def test_training_learns_the_exact_likelihood() -> None:
    """The class moves the mean of x: with a decoder of the class alone, to the class mean."""
    y = torch.arange(60) % 3
    x = torch.randn(60, 4) + 3.0 * y.unsqueeze(1)
    model, guide = of_classes(learnt=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(150):
        svi.step(x, y)
    generated = latents.generate(model, x, y)
    for label in range(3):
        of_label = y == label
        error = (generated[of_label].mean(0) - x[of_label].mean(0)).abs()
        assert (error < 1).all()  # a class is 3 away from the next


# Into the latent space and back.


def test_encode_decode_reconstruct_generate() -> None:
    model, guide = of_classes(learnt=True)
    x = normal_x(BATCH)
    y = classes_of(x)
    q = latents.encode(guide, x, y)
    torch.testing.assert_close(q.mean, guide.encoder(x, y).mean.detach())
    expected = model.decoder(q.mean, y).detach()
    torch.testing.assert_close(latents.reconstruct(model, guide, x, y), expected)
    codes = {"z": torch.ones(BATCH, 2)}
    decoded = latents.decode(model, codes, x, y).mean
    torch.testing.assert_close(decoded, model.decoder(codes["z"], y).detach())
    other = latents.decode(model, codes, x, (y + 1) % 3).mean  # same code, another class
    assert ((decoded - other).abs().amax(-1) > 1e-3).all()
    generated = latents.generate(model, torch.zeros(20, 4), torch.arange(20) % 3)
    assert generated.shape == (20, 4)
    assert generated.unique(dim=0).shape == (20, 4)


def test_an_image_as_context_is_used() -> None:
    """Data that follow from it: another image then makes them improbable."""
    model, guide = of_images()
    y = torch.rand(20, 1, 8, 4)
    x = y.mean((1, 2, 3))
    x = ((x - x.mean()) / x.std()).unsqueeze(1).repeat(1, 4)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(60):
        svi.step(x, y)
    order = x[:, 0].argsort()
    right = log_likelihood(model, guide, x, y, num_particles=50)
    wrong = log_likelihood(model, guide, x[order], y[order.flip(0)], num_particles=50)
    assert right.mean() > wrong.mean() + 1


def test_float32_and_a_batch_of_one() -> None:
    model, guide = (program.float() for program in of_classes(learnt=True))
    x = normal_x(1).float()
    estimate = log_likelihood(model, guide, x, classes_of(x), num_particles=10)
    assert estimate.log_likelihood.shape == (1,)
    assert latents.encode(guide, x, classes_of(x)).mean.dtype == torch.float32
    assert latents.generate(model, x, classes_of(x)).dtype == torch.float32


def test_a_plain_function_calls_the_networks() -> None:
    """Other names of sites and plate, without any class of ours but the networks."""
    decoder = Concatenate(mlp(2 + 3, 4), embed=OneHot(3))
    network = NormalEncoder(FiLM(4, [7], 4, 3, embed=OneHot(3)))

    def model(batch: torch.Tensor, kind: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(batch)):
            code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            fn = dist.Normal(decoder(code, kind), 1.0).to_event(1)
            pyro.sample("pixels", fn, obs=batch)

    def guide(batch: torch.Tensor, kind: torch.Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("rows", len(batch)):
            pyro.sample("code", network(batch, kind))

    x = normal_x(BATCH)
    y = classes_of(x)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x, y)
    estimate = log_likelihood(model, guide, x, y, num_particles=10)
    assert estimate.log_likelihood.shape == (BATCH,)


# Errors.


def pair_and_data() -> tuple[ConditionalVAE, AmortizedNormal, torch.Tensor, torch.Tensor]:
    x = normal_x(BATCH)
    return *of_classes(learnt=True), x, classes_of(x)


def test_a_context_that_is_no_tensor() -> None:
    model, _, x, _ = pair_and_data()
    match = "ConditionalVAE: expected the context y to be a tensor, got list.*as_tensor"
    with pytest.raises(TypeError, match=match):
        model(x, [0] * BATCH)


@pytest.mark.parametrize("shape", [(), (1,), (BATCH - 1,), (BATCH + 1, 2)])
def test_a_context_of_other_rows(shape: tuple[int, ...]) -> None:
    model, _, x, _ = pair_and_data()
    match = r"ConditionalVAE: expected a context y of 5 rows, as x has, got shape \(.*Give each row"
    with pytest.raises(ValueError, match=match):
        model(x, torch.zeros(shape, dtype=torch.int64))


def test_a_guide_with_a_context_of_other_rows() -> None:
    _, guide, x, y = pair_and_data()
    with pytest.raises(ValueError, match="Concatenate: expected context and input with the same"):
        guide(x, y[:3])
    match = r"AmortizedNormal: expected the network to encode each of 1 rows .* \(5,\) from x of"
    with pytest.raises(ValueError, match=match):
        guide(x[:1], y)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("num_rows", [2, BATCH])
def test_classes_as_a_column(num_rows: int, learnt: bool) -> None:
    """Each row would meet the classes of all: two rows are as many as the code has coordinates."""
    (model, guide), x = of_classes(learnt), normal_x(num_rows)
    column = classes_of(x).unsqueeze(-1)
    match = (
        rf"ConditionalVAE: expected one output of the decoder for each of {num_rows} rows, got "
        rf"batch shape \({num_rows}, {num_rows}\) .*y.squeeze\(-1\)"
    )
    with pytest.raises(ValueError, match=match):
        latents.generate(model, x, column)
    match = rf"into one code, .* context of shape \({num_rows}, 1\).*integers of shape \(batch,\)"
    with pytest.raises(ValueError, match=match):
        guide(x, column)


class Number(nn.Module):
    """A decoder of codes and contexts that are single numbers."""

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (z + y.reshape(len(y))).unsqueeze(-1).expand(*z.shape[:-1], len(y), 4)


@pytest.mark.parametrize("num_rows", [1, 2, BATCH])
def test_codes_of_a_single_number_with_particles_and_enumerated(num_rows: int) -> None:
    """They have no dimension of their own, and contexts that are columns may be features."""
    x, y = normal_x(num_rows), torch.arange(num_rows)

    def of_normal(context: torch.Tensor) -> torch.Tensor:
        return pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    def of_class(context: torch.Tensor) -> torch.Tensor:
        return pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    for context in (y, y.double().unsqueeze(-1)):
        model = ConditionalVAE(Number(), likelihoods.Normal(), of_normal)
        estimate = log_likelihood(model, guide, x, context, num_particles=num_rows)
        assert estimate.log_likelihood.shape == (num_rows,)
        model = ConditionalVAE(Number(), likelihoods.Normal(), of_class)
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x, y: None, x, context)
        each = [dist.Normal(y + z, 1.0).log_prob(x.T).sum(0).exp() / 2 for z in (0.0, 1.0)]
        assert loss == pytest.approx(-float((each[0] + each[1]).log().sum()))


def test_a_context_by_keyword() -> None:
    model, guide, x, y = pair_and_data()
    results = []
    for args, kwargs in (((x, y), {}), ((x,), {"y": y})):
        pyro.set_rng_seed(1)
        results.append(
            SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO()).step(*args, **kwargs)
        )
    assert results[0] == results[1]
    assert torch.equal(latents.encode(guide, x, y=y).mean, latents.encode(guide, x, y).mean)
    match = r"AmortizedNormal: expected at most one context by keyword, got \['y', 'mask'\]"
    with pytest.raises(TypeError, match=match):
        guide(x, y=y, mask=y)


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_labels_out_of_range(label: int) -> None:
    model, guide, x, y = pair_and_data()
    y[2] = label
    for program in (model, guide):
        with pytest.raises(ValueError, match=rf"expected classes 0 \.\.\. 2 .*, got {label}"):
            program(x, y)


def test_labels_of_another_type() -> None:
    model, guide, x, y = pair_and_data()
    for program in (model, guide):
        with pytest.raises(TypeError, match="expected y of integers.*got torch.bool"):
            program(x, y > 0)
        with pytest.raises(ValueError, match="OneHot: expected classes as integers, or one-hot"):
            program(x, y.double())
    one_hot = torch.eye(NUM_CLASSES)[y]
    torch.testing.assert_close(guide.encoder(x, one_hot).mean, guide.encoder(x, y).mean)


def test_no_context() -> None:
    model, guide, x, _ = pair_and_data()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        model(x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'context'"):
        guide(x)


def test_a_prior_without_context() -> None:
    decoder = Concatenate(mlp(2 + 3, 4), embed=OneHot(3))
    model = ConditionalVAE(decoder, likelihoods.Normal(), StandardNormalPrior(2))
    match = r"(?s)takes 1 positional argument.*ConditionalVAE: the prior .*Unconditional\(prior\)"
    with pytest.raises(TypeError, match=match):
        model(normal_x(BATCH), classes_of(normal_x(BATCH)))


def test_a_decoder_without_context() -> None:
    model = ConditionalVAE(mlp(2, 4), likelihoods.Normal(), Unconditional(StandardNormalPrior(2)))
    match = r"(?s)takes 2 positional arguments.*ConditionalVAE: the decoder .*Concatenate\(net\)"
    with pytest.raises(TypeError, match=match):
        model(normal_x(BATCH), classes_of(normal_x(BATCH)))


def test_data_that_the_likelihood_does_not_take() -> None:
    model, _, x, y = pair_and_data()
    with pytest.raises(ValueError, match=r"ConditionalVAE: expected x of shape \(batch, 4\), got"):
        model(x[:, :3], y)
    x[1, 1] = float("nan")
    with pytest.raises(ValueError, match="ConditionalVAE: expected finite data at site 'x'"):
        model(x, y)
    pyro.poutine.mask(model, mask=torch.arange(BATCH) != 1)(x, y)  # as the message says


def test_every_prior_without_context_can_be_wrapped() -> None:
    x = normal_x(BATCH)
    hierarchy = HierarchicalPrior(
        StandardNormalPrior(3, site="z2"), [NormalEncoder(MLP(3, [], 4))], sites=["z"]
    )
    flow = FlowPrior(2, [dist.transforms.affine_autoregressive(2, [5]).inv])
    for prior in (hierarchy, flow):
        decoder = Concatenate(mlp(2 + 3, 4), embed=OneHot(3))
        model = ConditionalVAE(decoder, likelihoods.Normal(), Unconditional(prior))
        assert traced(model, x, classes_of(x)).nodes["x"]["log_prob"].shape == (BATCH,)
        assert any(name.startswith("prior.prior") for name, _ in model.named_parameters())
