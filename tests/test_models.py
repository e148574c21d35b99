"""The public models keep the contracts; what is their own is tested below."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, Case, ModelContract, normal_x, traced
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vae.models
from pyro_vae import likelihoods
from pyro_vae.baselines import gaussian_mixture_em, ppca
from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.guides import (
    AmortizedBottomUp,
    AmortizedInterplay,
    AmortizedNormal,
    ExactGaussianMixture,
    ExactLinearGaussian,
    ProductOfExperts,
)
from pyro_vae.models import (
    VAE,
    GaussianMixture,
    HierarchicalVAE,
    InterplayVAE,
    LinearGaussian,
    MultimodalVAE,
)
from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder
from pyro_vae.priors import InterplayPrior, StandardNormalPrior


def binary_x(num_rows: int) -> torch.Tensor:
    return (normal_x(num_rows) > 0).double()


def images(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(num_rows, 1, 8, 8, generator=generator, dtype=torch.float64)


def counts(num_rows: int) -> torch.Tensor:
    return (3 * normal_x(num_rows).abs()).round()


def vae(likelihood: Any, width: int = 4) -> tuple[VAE, AmortizedNormal]:
    decoder = MLP(2, [7], width, activation=torch.nn.Tanh)
    encoder = MLP(4, [7], 4, activation=torch.nn.Tanh)
    return VAE(decoder, likelihood, StandardNormalPrior(2)), AmortizedNormal(encoder)


def conv_vae() -> tuple[VAE, AmortizedNormal]:
    likelihood = likelihoods.ContinuousBernoulli(event_dim=3)
    decoder, encoder = ConvDecoder(2, [4, 3], (1, 8, 8)), ConvEncoder((1, 8, 8), [3, 4], 4)
    return VAE(decoder, likelihood, StandardNormalPrior(2)), AmortizedNormal(encoder)


def linear(noise: Any) -> tuple[LinearGaussian, AmortizedNormal]:
    return LinearGaussian(4, 2, noise=noise), AmortizedNormal(MLP(4, [], 4))


def mixture(covariance: Any) -> tuple[GaussianMixture, ExactGaussianMixture]:
    model = GaussianMixture(4, 3, covariance=covariance)
    return model, ExactGaussianMixture(model)


def exact_linear() -> tuple[LinearGaussian, ExactLinearGaussian]:
    model = LinearGaussian(4, 2)
    return model, ExactLinearGaussian(model)


def hierarchy(dims: list[int]) -> tuple[VAE, AmortizedBottomUp]:
    model = HierarchicalVAE(
        dims,
        MLP(dims[0], [7], 4, activation=torch.nn.Tanh),
        likelihoods.Normal(torch.ones(4), learn=True),
        hidden=[7],
        activation=torch.nn.Tanh,
    )
    widths = zip([4, *dims], dims, strict=False)
    return model, AmortizedBottomUp([MLP(below, [], 2 * above) for below, above in widths])


def multimodal(private: bool = False) -> tuple[MultimodalVAE, ProductOfExperts]:
    width = 2 + private
    model = MultimodalVAE(
        {name: MLP(width, [7], 4, activation=torch.nn.Tanh) for name in ("image", "sound")},
        {"image": likelihoods.Normal(torch.ones(4), learn=True), "sound": likelihoods.Normal()},
        StandardNormalPrior(2),
        {"image": 1, "sound": 1} if private else None,
    )
    networks, own = ({name: MLP(4, [], w) for name in ("image", "sound")} for w in (4, 2))
    return model, ProductOfExperts(networks, 2, own if private else None)


def interplay(kind: Any) -> tuple[InterplayVAE, AmortizedInterplay]:
    dims = {"image": 2, "sound": 1}
    prior = InterplayPrior(dims, kind)
    decoders = {name: MLP(dim, [7], 4, activation=torch.nn.Tanh) for name, dim in dims.items()}
    model = InterplayVAE(decoders, {name: likelihoods.Normal() for name in dims}, prior)
    return model, AmortizedInterplay({name: MLP(4, [], 2 * d) for name, d in dims.items()}, prior)


def both(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers seen and heard."""
    return {"image": x, "sound": x}


def image_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["image"]


CASES = {
    "VAE, Bernoulli": Case(lambda: vae(likelihoods.Bernoulli()), binary_x),
    "VAE, Normal": Case(lambda: vae(likelihoods.Normal(torch.ones(4), learn=True)), normal_x),
    "VAE, heteroscedastic": Case(lambda: vae(likelihoods.HeteroscedasticNormal(), 8), normal_x),
    "VAE, Poisson": Case(lambda: vae(likelihoods.Poisson()), counts),
    "VAE, negative binomial": Case(lambda: vae(likelihoods.NegativeBinomial((4,))), counts),
    "VAE, convolutional": Case(conv_vae, images),
    "HierarchicalVAE, two layers": Case(
        lambda: hierarchy([3, 2]),
        normal_x,
        latents={"z1": (3,), "z2": (2,)},
        named="HierarchicalVAE",
    ),
    "HierarchicalVAE, three layers": Case(
        lambda: hierarchy([3, 2, 1]),
        normal_x,
        latents={"z1": (3,), "z2": (2,), "z3": (1,)},
        named="HierarchicalVAE",
    ),
    "MultimodalVAE": Case(multimodal, normal_x, observed="x_image", given=both, returned=image_of),
    "MultimodalVAE, private latents": Case(
        lambda: multimodal(private=True),
        normal_x,
        latents={"z": (2,), "w_image": (1,), "w_sound": (1,)},
        observed="x_image",
        given=both,
        returned=image_of,
    ),
    "InterplayVAE": Case(
        lambda: interplay("normal"),
        normal_x,
        latents={"z_image": (2,), "z_sound": (1,)},
        observed="x_image",
        given=both,
        returned=image_of,
    ),
    "pPCA": Case(lambda: linear("isotropic"), normal_x),
    "factor analysis": Case(lambda: linear("diagonal"), normal_x),
    "mixture, full": Case(
        lambda: mixture("full"), normal_x, latents={"z": ()}, discrete=True, data_only=True
    ),
    "mixture, diagonal": Case(
        lambda: mixture("diagonal"), normal_x, latents={"z": ()}, discrete=True, data_only=True
    ),
    "mixture, spherical": Case(
        lambda: mixture("spherical"), normal_x, latents={"z": ()}, discrete=True, data_only=True
    ),
}


# Models whose contracts are beside the tests of what is their own.
ELSEWHERE = {
    "ConditionalVAE": "test_conditional_vae.py",
    "SemiSupervisedVAE": "test_semi_supervised.py",
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestModels(ModelContract):
    pass


def test_every_public_model_is_among_the_cases() -> None:
    # Their names in the param store: a function that composes a model gives its own.
    covered = {case.make()[0]._pyro_name.split("_")[0] for case in CASES.values()}
    for name, file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert "(ModelContract)" in text
        assert f"{name}(" in text
    assert covered | ELSEWHERE.keys() == set(pyro_vae.models.__all__)


def test_the_imports_change_nothing() -> None:
    """In an interpreter of its own: neither parameters nor any global state."""
    code = """
import pkgutil, pyro, torch
def state():
    return (list(pyro.get_param_store().keys()), torch.get_default_dtype(), pyro.settings.get(),
            torch.get_num_threads(), torch.initial_seed(), torch.get_rng_state().tolist())
before = state()
import pyro_vae
for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae."):
    __import__(module.name)
assert state() == before
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Names in the param store.


def test_names_are_numbered_or_chosen() -> None:
    first, second = LinearGaussian(2, 1), LinearGaussian(2, 1)
    assert first._pyro_name != second._pyro_name
    assert LinearGaussian(2, 1, name="mine")._pyro_name == "mine"
    svi_names = []
    for model in (first, second):
        pyro.clear_param_store()
        model(torch.zeros(3, 2))
        svi_names.append(set(pyro.get_param_store().keys()))
    assert svi_names[0].isdisjoint(svi_names[1])


# VAE.


def test_a_vae_takes_another_prior() -> None:
    def prior() -> torch.Tensor:
        z = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
        return torch.stack([z, z**2], -1)

    model = VAE(MLP(2, [], 4), likelihoods.Normal(), prior)
    sites = traced(model, normal_x(3)).nodes
    assert sites["level"]["value"].shape == (3,)
    assert sites["x"]["log_prob"].shape == (3,)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0])
def test_values_that_are_not_binary(bad: float) -> None:
    model, _ = vae(likelihoods.Bernoulli())
    x = binary_x(BATCH)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="VAE: expected values 0 and 1 at site 'x' under a Bern"):
        model(x)
    with pyro.validation_enabled(False):
        model(x)  # such a check costs a synchronisation on every step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite(bad: float) -> None:
    model, _ = vae(likelihoods.Normal())
    x = normal_x(BATCH)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="VAE: expected finite data at site 'x'.*poutine.mask"):
        model(x)
    seen = torch.arange(BATCH) != 1
    poutine.mask(model, mask=seen)(x)  # as the message says


def test_the_wrong_width() -> None:
    model, guide = vae(likelihoods.Normal())
    with pytest.raises(ValueError, match=r"VAE: expected x of shape \(batch, 4\), got \(5, 3\)"):
        model(normal_x(5)[:, :3])
    with pytest.raises(ValueError, match="MLP: expected input of width 4 .* shape"):
        guide(normal_x(5)[:, :3])
    for program in (model, guide):
        with pytest.raises(TypeError, match=f"{type(program).__name__}: expected x to be a tensor"):
            program([1.0, 2.0])


# LinearGaussian.


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_linear_gaussian_marginal_and_posterior(noise: Any) -> None:
    """Against the joint normal of (z, x), conditioned by the textbook formula."""
    model, x = LinearGaussian(4, 2, noise=noise), normal_x(BATCH)
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.normal_()
        w = model.weight
        covariance = w @ w.T + model.noise_variance.diag()
        marginal = torch.distributions.MultivariateNormal(model.loc, covariance)
        torch.testing.assert_close(model.log_prob(x), marginal.log_prob(x))
        gain = w.T @ torch.linalg.inv(covariance)
        posterior = model.posterior(x)
        torch.testing.assert_close(posterior.mean, (x - model.loc) @ gain.T)
        torch.testing.assert_close(
            posterior.covariance_matrix, (torch.eye(2) - gain @ w).expand(BATCH, 2, 2)
        )


def test_linear_gaussian_noise() -> None:
    assert LinearGaussian(4, 2).log_scale.shape == ()
    assert LinearGaussian(4, 2, noise="diagonal").log_scale.shape == (4,)
    assert LinearGaussian(4, 2).noise_variance.shape == (4,)


def test_linear_gaussian_elbo_of_the_exact_guide_is_the_log_likelihood() -> None:
    model, guide = exact_linear()
    x = normal_x(BATCH)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum())


def test_linear_gaussian_from_a_fit() -> None:
    x = normal_x(50)
    fit = ppca(x, 2)
    model = LinearGaussian.from_fit(fit)
    torch.testing.assert_close(model.log_prob(x).detach(), fit.log_prob(x))
    assert model.log_scale.shape == ()
    estimate = importance_weighted_log_likelihood(
        model, ExactLinearGaussian(model), x, num_particles=3
    )
    torch.testing.assert_close(estimate.log_likelihood, fit.log_prob(x))


def test_linear_gaussian_bad_arguments() -> None:
    with pytest.raises(ValueError, match="LinearGaussian: expected data_dim >= 1, got 0"):
        LinearGaussian(0, 2)
    with pytest.raises(ValueError, match="LinearGaussian: expected latent_dim >= 1, got -1"):
        LinearGaussian(3, -1)
    with pytest.raises(TypeError, match="expected an integer latent_dim, got float"):
        LinearGaussian(3, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected noise 'isotropic' or 'diagonal', got 'none'"):
        LinearGaussian(3, 2, noise="none")  # type: ignore[arg-type]
    model = LinearGaussian(3, 2)
    for method in (model, model.log_prob, model.posterior):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 3\), got \(5, 4\)"):
            method(normal_x(5))


# GaussianMixture.


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_mixture_marginal_and_posterior(covariance: Any) -> None:
    model, x = GaussianMixture(4, 3, covariance=covariance), normal_x(BATCH)
    model.weights = torch.tensor([0.2, 0.5, 0.3])
    if covariance == "full":
        model.scale = torch.linalg.cholesky(torch.eye(4) + 0.5 * torch.ones(4, 4)) * torch.tensor(
            [1.0, 2.0, 0.5]
        ).reshape(3, 1, 1)
    else:
        model.scale = torch.rand(model.scale.shape) + 0.5
    joint = []
    for k in range(3):
        scale = model.scale[k].detach()
        tril = scale if covariance == "full" else scale.expand(4).diag()
        normal = torch.distributions.MultivariateNormal(model.locs[k].detach(), scale_tril=tril)
        joint.append(normal.log_prob(x) + model.weights[k].detach().log())
    log_joint = torch.stack(joint, -1)
    torch.testing.assert_close(model.log_prob(x).detach(), log_joint.logsumexp(-1))
    torch.testing.assert_close(model.posterior(x).probs.detach(), log_joint.softmax(-1))


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_mixture_enumerated_in_the_model_is_the_marginal(covariance: Any) -> None:
    model, x = GaussianMixture(4, 3, covariance=covariance), normal_x(BATCH)

    def guide(x: torch.Tensor) -> None:
        pass

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_mixture_from_a_fit() -> None:
    x = normal_x(60) + 4 * (torch.arange(60) % 2).unsqueeze(-1)
    fit = gaussian_mixture_em(x, 2)
    model = GaussianMixture.from_fit(fit)
    torch.testing.assert_close(model.log_prob(x).detach(), fit.log_prob(x))
    assert not pyro.get_param_store().keys()


def test_mixture_keeps_its_constraints_while_training() -> None:
    model, guide = mixture("full")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.5}), elbo)
    for _ in range(5):
        svi.step(normal_x(BATCH))
    assert float(model.weights.sum().detach()) == pytest.approx(1.0)
    assert (model.weights > 0).all()
    assert torch.equal(model.scale.tril(), model.scale)
    assert (model.scale.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_mixture_bad_arguments() -> None:
    with pytest.raises(ValueError, match="GaussianMixture: expected data_dim >= 1, got 0"):
        GaussianMixture(0, 2)
    with pytest.raises(ValueError, match="GaussianMixture: expected num_components >= 1, got 0"):
        GaussianMixture(3, 0)
    with pytest.raises(ValueError, match=r"expected covariance in \['full', .* got 'tied'"):
        GaussianMixture(3, 2, covariance="tied")  # type: ignore[arg-type]
    model = GaussianMixture(3, 2)
    for method in (model, model.log_prob, model.posterior):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 3\), got \(5, 4\)"):
            method(normal_x(5))


def test_a_copy_of_a_mixture_is_evaluated_with_its_own_parameters() -> None:
    model = GaussianMixture(4, 3)
    x = torch.randn(5, 4)
    model(x)  # Its parameters are in the param store.
    best = copy.deepcopy(model)
    before = best.log_prob(x).detach()
    model.locs.data += 3.0
    estimate = importance_weighted_log_likelihood(best, lambda x: None, x, num_particles=2)
    torch.testing.assert_close(estimate.log_likelihood, before)
    torch.testing.assert_close(best.log_prob(x), before)


def test_small_weights_of_a_mixture_are_not_clamped() -> None:
    model = GaussianMixture(2, 2)
    model.raw_weights.data = torch.tensor([0.0, -46.0])
    model.locs.data = torch.tensor([[0.0, 0.0], [30.0, 0.0]])
    x = torch.tensor([[30.0, 0.0]])
    for guide in (lambda x: None, ExactGaussianMixture(model)):
        estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=3)
        torch.testing.assert_close(estimate.log_likelihood, model.log_prob(x).detach())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", torch.tensor([-1.0, 2.0])),
        ("weights", torch.tensor(0.5)),
        ("scale", torch.ones(2, 2, 2)),
        ("scale", -torch.eye(2).expand(2, 2, 2)),
    ],
)
def test_impossible_parameters_of_a_mixture(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"GaussianMixture: expected {name} of shape"):
        setattr(GaussianMixture(2, 2), name, value)
