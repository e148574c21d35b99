"""The public guides keep the contracts; what is their own is tested below."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import BATCH, Case, GuideContract, normal_x, traced
from pyro.infer import TraceEnum_ELBO

import pyro_vae.guides
from pyro_vae import likelihoods
from pyro_vae.flows import inverse_autoregressive, neural_spline
from pyro_vae.guides import (
    AmortizedBottomUp,
    AmortizedFlow,
    AmortizedInterplay,
    AmortizedLadder,
    AmortizedMixture,
    AmortizedMultivariateNormal,
    AmortizedNormal,
    AmortizedSet,
    ExactGaussianMixture,
    ExactLinearGaussian,
    MixtureOfExperts,
    MixtureOfProducts,
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


def images(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_rows, 1, 8, 8, generator=generator, dtype=torch.float64)


def vae(guide: Any) -> tuple[VAE, Any]:
    decoder = MLP(2, [7], 4, activation=torch.nn.Tanh)
    return VAE(decoder, likelihoods.Normal(learn=True), StandardNormalPrior(2)), guide


def encoder(width: int) -> MLP:
    return MLP(4, [7], width, activation=torch.nn.Tanh)


def conv() -> tuple[VAE, AmortizedNormal]:
    likelihood = likelihoods.Normal(event_dim=3)
    model = VAE(ConvDecoder(2, [4, 3], (1, 8, 8)), likelihood, StandardNormalPrior(2))
    return model, AmortizedNormal(ConvEncoder((1, 8, 8), [3, 4], 4))


def exact_linear(noise: Any) -> tuple[LinearGaussian, ExactLinearGaussian]:
    model = LinearGaussian(4, 2, noise=noise)
    return model, ExactLinearGaussian(model)


def exact_mixture(covariance: Any) -> tuple[GaussianMixture, ExactGaussianMixture]:
    model = GaussianMixture(4, 3, covariance=covariance)
    return model, ExactGaussianMixture(model)


def tanh_mlp(*args: Any) -> MLP:
    return MLP(*args, activation=torch.nn.Tanh)


def hierarchy(dims: list[int]) -> VAE:
    decoder = tanh_mlp(dims[0], [7], 4)
    return HierarchicalVAE(
        dims, decoder, likelihoods.Normal(learn=True), hidden=[7], activation=torch.nn.Tanh
    )


def bottom_up(dims: list[int]) -> tuple[VAE, AmortizedBottomUp]:
    widths = zip([4, *dims], dims, strict=False)
    networks = [tanh_mlp(below, [7], 2 * above) for below, above in widths]
    return hierarchy(dims), AmortizedBottomUp(networks)


def ladder(dims: list[int]) -> tuple[VAE, AmortizedLadder]:
    networks = [torch.nn.Sequential(MLP(4, [], 6), torch.nn.Tanh())]
    networks += [tanh_mlp(6, [7], 6) for _ in dims[1:]]
    model = hierarchy(dims)
    return model, AmortizedLadder(model.prior, networks, [MLP(6, [], 2 * dim) for dim in dims])


def multimodal(
    kind: Any, *, private: bool = False, width: int = 4, **how: Any
) -> tuple[MultimodalVAE, Any]:
    """Two modalities; private latents of both, if any, are of one dimension."""
    names = ("image", "sound")
    model = MultimodalVAE(
        {name: tanh_mlp(2 + private, [7], 4) for name in names},
        {name: likelihoods.Normal(torch.ones(4), learn=True) for name in names},
        StandardNormalPrior(2),
        {name: 1 for name in names} if private else None,
    )
    networks, own = ({name: tanh_mlp(4, [7], w) for name in names} for w in (width, 2))
    return model, kind(networks, 2, private=own if private else None, **how)


def multimodal_case(*args: Any, **kwargs: Any) -> Case:
    def both(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image": x, "sound": x.flip(-1)}

    latents = {"z": (2,)}
    if kwargs.get("private"):
        latents |= {"w_image": (1,), "w_sound": (1,)}
    return Case(lambda: multimodal(*args, **kwargs), normal_x, latents=latents, given=both)


def interplay(kind: Any) -> tuple[InterplayVAE, AmortizedInterplay]:
    """Two modalities with latents of their own."""
    dims = {"image": 2, "sound": 1}
    prior = InterplayPrior(dims, kind)
    decoders = {name: tanh_mlp(dim, [7], 4) for name, dim in dims.items()}
    noise = {name: likelihoods.Normal(torch.ones(4), learn=True) for name in dims}
    width = 1 if kind == "bernoulli" else 2
    networks = {name: tanh_mlp(4, [7], width * dim) for name, dim in dims.items()}
    return InterplayVAE(decoders, noise, prior), AmortizedInterplay(networks, prior)


TWO = {"z1": (3,), "z2": (2,)}
THREE = {"z1": (3,), "z2": (2,), "z3": (1,)}

CASES = {
    "AmortizedNormal": Case(lambda: vae(AmortizedNormal(encoder(4))), normal_x),
    "AmortizedNormal, convolutional": Case(conv, images),
    "AmortizedNormal, another site": Case(
        lambda: (
            VAE(MLP(2, [], 4), likelihoods.Normal(), StandardNormalPrior(2, site="code")),
            AmortizedNormal(encoder(4), site="code"),
        ),
        normal_x,
        latents={"code": (2,)},
    ),
    "AmortizedMultivariateNormal": Case(
        lambda: vae(AmortizedMultivariateNormal(encoder(5), 2)), normal_x
    ),
    "AmortizedFlow, inverse autoregressive": Case(
        lambda: vae(AmortizedFlow(encoder(9), 2, inverse_autoregressive(2, 5, hidden=[8]))),
        normal_x,
    ),
    "AmortizedFlow, spline": Case(
        lambda: vae(AmortizedFlow(encoder(9), 2, neural_spline(2, 5, hidden=[8], num_bins=4))),
        normal_x,
    ),
    "AmortizedMixture": Case(lambda: vae(AmortizedMixture(encoder(15), 3)), normal_x),
    "AmortizedBottomUp, two layers": Case(lambda: bottom_up([3, 2]), normal_x, latents=TWO),
    "AmortizedBottomUp, three layers": Case(lambda: bottom_up([3, 2, 1]), normal_x, latents=THREE),
    "AmortizedLadder, two layers": Case(lambda: ladder([3, 2]), normal_x, latents=TWO),
    "AmortizedLadder, three layers": Case(lambda: ladder([3, 2, 1]), normal_x, latents=THREE),
    "ProductOfExperts": multimodal_case(ProductOfExperts),
    "ProductOfExperts, generalised": multimodal_case(ProductOfExperts, learn_weights=True),
    "ProductOfExperts, private latents": multimodal_case(ProductOfExperts, private=True),
    "MixtureOfExperts": multimodal_case(MixtureOfExperts),
    "MixtureOfExperts, private latents": multimodal_case(MixtureOfExperts, private=True),
    "MixtureOfProducts": multimodal_case(MixtureOfProducts),
    "MixtureOfProducts, private latents": multimodal_case(MixtureOfProducts, private=True),
    "MixtureOfProducts, drawn": multimodal_case(MixtureOfProducts, num_subsets=3),
    "AmortizedSet": Case(
        lambda: multimodal(
            lambda *args, **how: AmortizedSet(*args, tanh_mlp(6, [7], 4), **how), width=6
        ),
        normal_x,
        given=lambda x: {"image": x, "sound": x.flip(-1)},
    ),
    "AmortizedInterplay": Case(
        lambda: interplay("normal"),
        normal_x,
        latents={"z_image": (2,), "z_sound": (1,)},
        given=lambda x: {"image": x, "sound": x.flip(-1)},
    ),
    "ExactLinearGaussian": Case(lambda: exact_linear("isotropic"), normal_x, data_only=True),
    "ExactLinearGaussian, diagonal": Case(
        lambda: exact_linear("diagonal"), normal_x, data_only=True
    ),
    "ExactGaussianMixture": Case(
        lambda: exact_mixture("full"), normal_x, latents={"z": ()}, discrete=True, data_only=True
    ),
    "ExactGaussianMixture, diagonal": Case(
        lambda: exact_mixture("diagonal"),
        normal_x,
        latents={"z": ()},
        discrete=True,
        data_only=True,
    ),
}


# Guides whose contracts are beside the tests of what is their own.
ELSEWHERE = {
    "AmortizedAutoGuide": "test_auto_guide.py",
    "AmortizedCategorical": "test_categorical.py",
    "AmortizedOneHot": "test_categorical.py",
    "AmortizedSemiSupervised": "test_semi_supervised.py",
    "NearestCode": "test_vq.py",
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestGuides(GuideContract):
    pass


def test_every_public_guide_is_among_the_cases() -> None:
    covered = {type(case.make()[1]).__name__ for case in CASES.values()}
    for name, file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert "(GuideContract)" in text
        assert f"{name}(" in text
    assert covered | ELSEWHERE.keys() == set(pyro_vae.guides.__all__)


def test_amortized_normal_is_what_its_network_says() -> None:
    network = encoder(4)
    guide, x = AmortizedNormal(network), normal_x(BATCH)
    fn = traced(guide, x).nodes["z"]["fn"]
    loc, raw = network(x).chunk(2, -1)
    torch.testing.assert_close(fn.mean, loc)
    torch.testing.assert_close(fn.stddev, torch.nn.functional.softplus(raw), rtol=0, atol=2e-6)


def test_amortized_multivariate_normal_has_any_covariance() -> None:
    network = encoder(5)
    with torch.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.copy_(torch.tensor([1.0, -2.0, 0.5, -3.0, 0.2]))
    fn = traced(AmortizedMultivariateNormal(network, 2), normal_x(BATCH)).nodes["z"]["fn"]
    diagonal = torch.nn.functional.softplus(torch.tensor([0.5, 0.2]))
    tril = torch.tensor([[0.0, 0.0], [-3.0, 0.0]]) + diagonal.diag()
    torch.testing.assert_close(fn.mean[0], torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(fn.covariance_matrix[0], tril @ tril.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [exact_linear, exact_mixture])
def test_exact_guides_follow_the_model(make: Any) -> None:
    """They hold none of its parameters, so no optimizer sees them twice."""
    model, guide = make("diagonal")
    assert not list(guide.parameters())
    assert not guide.state_dict()
    x = normal_x(BATCH)
    before = traced(guide, x).nodes["z"]["fn"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = traced(guide, x).nodes["z"]["fn"]
    value = before.sample()
    assert not torch.allclose(before.log_prob(value), after.log_prob(value))
    torch.testing.assert_close(after.log_prob(value), model.posterior(x).log_prob(value))


def test_the_exact_elbo_of_the_mixture_is_the_marginal() -> None:
    model, guide = exact_mixture("full")
    x = normal_x(BATCH)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum())
    # The gradient too: at the exact posterior the guide's own part of it vanishes.
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(-model.log_prob(x).sum(), list(model.parameters()))
    torch.testing.assert_close(gradient, expected)


def test_networks_of_the_wrong_width() -> None:
    with pytest.raises(ValueError, match="NormalEncoder: expected a network with an even number"):
        AmortizedNormal(encoder(5))(normal_x(BATCH))
    with pytest.raises(ValueError, match="MultivariateNormalEncoder: expected 5 outputs .* got 4"):
        AmortizedMultivariateNormal(encoder(4), 2)(normal_x(BATCH))
