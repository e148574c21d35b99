"""Into the latent space and back, for programs of the library and of anybody else."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vae import latents
from pyro_vae.guides import AmortizedNormal, ExactGaussianMixture, ExactLinearGaussian
from pyro_vae.likelihoods import Bernoulli, Categorical, Normal
from pyro_vae.models import VAE, GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

DATA_DIM, LATENT_DIM = 5, 2


def linear_pair() -> tuple[LinearGaussian, ExactLinearGaussian]:
    model = LinearGaussian(DATA_DIM, LATENT_DIM)
    with torch.no_grad():
        model.loc.normal_()
    return model, ExactLinearGaussian(model)


def vae_pair() -> tuple[VAE, AmortizedNormal]:
    decoder = MLP(LATENT_DIM, [8], DATA_DIM, dropout=0.5)
    vae = VAE(decoder, Normal(0.3), StandardNormalPrior(LATENT_DIM))
    return vae, AmortizedNormal(MLP(DATA_DIM, [8], 2 * LATENT_DIM, dropout=0.5))


def plain_pair() -> tuple[Any, Any]:
    """Plain functions whose sites and plates have names of their own."""
    decoder, encoder = nn.Linear(LATENT_DIM, DATA_DIM), nn.Linear(DATA_DIM, LATENT_DIM)

    def model(images: torch.Tensor) -> None:
        net = pyro.module("plain decoder", decoder)
        with pyro.plate("images", len(images)):
            code = pyro.sample("code", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("pixels", dist.Normal(net(code), 0.5).to_event(1), obs=images)

    def guide(images: torch.Tensor) -> None:
        net = pyro.module("plain encoder", encoder)
        with pyro.plate("images", len(images)):
            pyro.sample("code", dist.Normal(net(images), 0.1).to_event(1))

    return model, guide


def ladder_model(x: torch.Tensor) -> None:
    """Two latents: the mean of the data shows both, the top one in its first half."""
    with pyro.plate("rows", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(torch.cat([top, low], -1), 1.0).to_event(1), obs=x)


def ladder_guide(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("top", dist.Normal(x[:, :2], 0.5).to_event(1))
        pyro.sample("low", dist.Normal(x[:, 2:] + 1, 0.5).to_event(1))


PAIRS = {"linear": linear_pair, "VAE": vae_pair, "plain": plain_pair}


@pytest.mark.parametrize("name", PAIRS)
def test_ends_of_an_interpolation_are_reconstructions(name: str) -> None:
    model, guide = PAIRS[name]()
    start, end = torch.randn(2, 4, DATA_DIM)
    path = latents.interpolate(model, guide, start, end, num_steps=3)
    assert path.shape == (3, 4, DATA_DIM)
    torch.testing.assert_close(path[0], latents.reconstruct(model, guide, start))
    torch.testing.assert_close(path[-1], latents.reconstruct(model, guide, end))
    assert not path.requires_grad
    if name != "VAE":  # Linear decoders keep straight lines straight.
        torch.testing.assert_close(path[1], (path[0] + path[2]) / 2)


@pytest.mark.parametrize("name", PAIRS)
def test_decoding_the_code_reconstructs(name: str) -> None:
    model, guide = PAIRS[name]()
    x = torch.randn(4, DATA_DIM)
    q = latents.encode(guide, x)
    assert q.batch_shape == (4,)
    assert q.event_shape == (LATENT_DIM,)
    site = "code" if name == "plain" else "z"
    fn = latents.decode(model, {site: q.mean}, x)
    assert fn.batch_shape == (4,)
    torch.testing.assert_close(fn.mean, latents.reconstruct(model, guide, x))


def test_exact_expectations_of_the_linear_gaussian() -> None:
    model, guide = linear_pair()
    x = torch.randn(4, DATA_DIM)
    posterior = model.posterior(x)
    q = latents.encode(guide, x)
    torch.testing.assert_close(q.mean, posterior.mean.detach())
    torch.testing.assert_close(q.covariance_matrix, posterior.covariance_matrix.detach())
    mean = (posterior.mean @ model.weight.T + model.loc).detach()
    torch.testing.assert_close(latents.reconstruct(model, guide, x), mean)
    code = torch.randn(4, LATENT_DIM)
    fn = latents.decode(model, {"z": code}, torch.zeros_like(x))
    torch.testing.assert_close(fn.mean, (code @ model.weight.T + model.loc).detach())
    torch.testing.assert_close(fn.variance, model.noise_variance.detach().expand(4, -1))


@pytest.mark.parametrize("mean", [True, False])
def test_moments_of_generated_data(mean: bool) -> None:
    model, _ = linear_pair()
    num = 40_000
    x = latents.generate(model, torch.zeros(num, DATA_DIM), mean=mean)
    assert x.shape == (num, DATA_DIM)
    assert not x.requires_grad
    variance = model.weight.detach().square().sum(-1)
    if not mean:
        variance = variance + model.noise_variance.detach()
    error = 5 * (variance / num).sqrt()
    assert ((x.mean(0) - model.loc.detach()).abs() < error).all()
    assert ((x.var(0) - variance).abs() < 5 * variance * (2 / num) ** 0.5).all()


def test_a_generated_sample_of_a_bernoulli_is_binary() -> None:
    vae = VAE(MLP(2, [], 4), Bernoulli(), StandardNormalPrior(2))
    x = torch.zeros(50, 4)
    sample = latents.generate(vae, x, mean=False)
    assert sample.unique().tolist() == [0.0, 1.0]
    means = latents.generate(vae, x)
    assert ((means > 0) & (means < 1)).all()


@pytest.mark.parametrize("name", PAIRS)
def test_traverse_moves_one_coordinate(name: str) -> None:
    model, guide = PAIRS[name]()
    x = torch.randn(3, DATA_DIM)
    site = "code" if name == "plain" else "z"
    code = latents.encode(guide, x).mean
    images = latents.traverse(model, guide, x, dims=[1], values=[-2.0, 0.5])
    assert images.shape == (1, 2, 3, DATA_DIM)
    for index, value in enumerate([-2.0, 0.5]):
        moved = torch.stack([code[:, 0], torch.full((3,), value)], -1)
        expected = latents.decode(model, {site: moved}, x).mean
        torch.testing.assert_close(images[0, index], expected)


def test_traverse_takes_all_coordinates_by_default() -> None:
    model, guide = linear_pair()
    images = latents.traverse(model, guide, torch.randn(3, DATA_DIM))
    assert images.shape == (LATENT_DIM, 7, 3, DATA_DIM)
    steps = images.diff(dim=1)  # Of one unit, along a column of the loadings.
    expected = model.weight.detach().T.reshape(LATENT_DIM, 1, 1, DATA_DIM).expand_as(steps)
    torch.testing.assert_close(steps, expected)


def test_reconstruct_several_latents() -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        latents.reconstruct(ladder_model, ladder_guide, x), x + torch.tensor([0, 0, 1, 1])
    )


@pytest.mark.parametrize("site", ["top", "low"])
def test_other_latents_stay(site: str) -> None:
    x = torch.randn(3, 4)
    still = slice(2, None) if site == "top" else slice(2)
    moving = 0 if site == "top" else 2
    kept = latents.reconstruct(ladder_model, ladder_guide, x)[:, still]
    path = latents.interpolate(ladder_model, ladder_guide, x, -x, num_steps=5, site=site)
    images = latents.traverse(ladder_model, ladder_guide, x, dims=[0], values=[0, 3], site=site)
    torch.testing.assert_close(path[..., still], kept.expand(5, -1, -1))
    torch.testing.assert_close(images[..., still], kept.expand(1, 2, -1, -1))
    assert images[0, :, :, moving].tolist() == [[0.0] * 3, [3.0] * 3]
    assert not torch.allclose(path[0], path[-1])


def test_latents_left_out_are_drawn() -> None:
    x = torch.zeros(2000, 4)
    mean = latents.decode(ladder_model, {"top": torch.ones(2000, 2)}, x).mean
    assert (mean[:, :2] == 1).all()
    assert mean[:, 2:].std().item() == pytest.approx(1.0, abs=5 / (2 * 4000) ** 0.5)
    assert mean[:, 2:].mean().item() == pytest.approx(1.0, abs=5 / 4000**0.5)


def test_discrete_latent() -> None:
    model = GaussianMixture(2, 2)
    model.locs.data = torch.tensor([[-9.0, 0.0], [9.0, 0.0]])
    guide = ExactGaussianMixture(model)
    x = torch.tensor([[-8.0, 0.0], [8.0, 1.0]])
    assert latents.encode(guide, x).probs.argmax(-1).tolist() == [0, 1]
    expected = model.locs.detach()
    torch.testing.assert_close(latents.reconstruct(model, guide, x), expected)
    fn = latents.decode(model, {"z": torch.tensor([1, 1])}, x)
    torch.testing.assert_close(fn.mean, expected[[1, 1]])
    drawn = latents.generate(model, torch.zeros(100, 2))
    assert {tuple(row) for row in drawn.tolist()} == {(-9.0, 0.0), (9.0, 0.0)}


def test_a_guide_with_auxiliary_sites() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide, x = AutoNormal(model), torch.ones(3, 1)
    guide(x)
    values = latents.encode(guide, x).mean
    assert values.shape == (3, 1)
    assert (values > 0).all()
    assert latents.reconstruct(model, guide, x).shape == (3, 1)


@pytest.mark.parametrize("name", PAIRS)
def test_no_side_effects(name: str) -> None:
    model, guide = PAIRS[name]()
    x = torch.randn(4, DATA_DIM)
    copy = x.clone()
    modules = [m for p in (model, guide) if isinstance(p, nn.Module) for m in p.modules()]
    results = [
        latents.reconstruct(model, guide, x),
        latents.generate(model, x),
        latents.interpolate(model, guide, x, x),
        latents.traverse(model, guide, x),
        latents.encode(guide, x).mean,
    ]
    assert not any(result.requires_grad for result in results)
    assert torch.equal(x, copy)
    assert not list(pyro.get_param_store())
    assert all(module.training for module in modules)
    if name == "VAE":  # Dropout is off: codes and reconstructions are no random numbers.
        assert torch.equal(latents.reconstruct(model, guide, x), results[0])


# Errors.


def test_unknown_code() -> None:
    model, _ = linear_pair()
    with pytest.raises(
        ValueError, match=r"decode: expected codes for the latents \['z'\], got 'c'"
    ):
        latents.decode(model, {"c": torch.zeros(2, 2)}, torch.zeros(2, DATA_DIM))


@pytest.mark.parametrize("site", [None, "middle"])
def test_site_must_be_named(site: str | None) -> None:
    x = torch.zeros(2, 4)
    got = "none" if site is None else "'middle'"
    message = rf": expected site to be one of \['top', 'low'\], got {got}. Name the site"
    with pytest.raises(ValueError, match="encode" + message):
        latents.encode(ladder_guide, x, site=site)
    with pytest.raises(ValueError, match="interpolate" + message):
        latents.interpolate(ladder_model, ladder_guide, x, x, site=site)
    with pytest.raises(ValueError, match="traverse" + message):
        latents.traverse(ladder_model, ladder_guide, x, site=site)


def test_observed_site_must_be_named() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("left", dist.Normal(z, 1.0), obs=x)
            pyro.sample("right", dist.Normal(z + 5, 1.0), obs=x)

    x, codes = torch.zeros(2), {"z": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"decode: expected site to be one of \['left', 'right'\]"):
        latents.decode(model, codes, x)
    with pytest.raises(ValueError, match=r"generate: expected site to be one of \['left', 'right'"):
        latents.generate(model, x)
    assert latents.decode(model, codes, x, site="right").mean.tolist() == [5.0, 5.0]
    difference = latents.generate(model, x, site="right") - 5
    assert difference.shape == (2,)


def test_interpolate_needs_pairs_and_two_steps() -> None:
    model, guide = linear_pair()
    x = torch.zeros(3, DATA_DIM)
    message = r"interpolate: expected two batches of one shape and num_steps >= 2, got "
    with pytest.raises(ValueError, match=message + r"\(3, 5\), \(2, 5\) and 8"):
        latents.interpolate(model, guide, x, x[:2])
    with pytest.raises(ValueError, match=message + r"\(3, 5\), \(3, 5\) and 1"):
        latents.interpolate(model, guide, x, x, num_steps=1)


def test_classes_are_reconstructed_by_their_mode() -> None:
    model = VAE(MLP(2, [], 3 * 4), Categorical(), StandardNormalPrior(2))
    model.decoder = nn.Sequential(model.decoder, nn.Unflatten(-1, (3, 4)))
    guide = AmortizedNormal(MLP(3, [], 4))
    x = torch.zeros(5, 3)
    logits = model.decoder(guide.encoder(x).mean)
    assert latents.reconstruct(model, guide, x).equal(logits.argmax(-1))
    assert latents.generate(model, x).shape == (5, 3)


def test_traverse_refuses_a_coordinate_that_is_not_there() -> None:
    model = LinearGaussian(3, 2)
    with pytest.raises(ValueError, match="traverse: expected dims in 0 ... 1, got"):
        latents.traverse(model, ExactLinearGaussian(model), torch.zeros(5, 3), dims=[2])
