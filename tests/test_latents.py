"""Into the latent space and back, for programs of the library and of anybody else."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vae import latents
from pyro_vae.guides import AmortizedNormal, ExactGaussianMixture, ExactLinearGaussian
from pyro_vae.handlers import replay_values
from pyro_vae.latent_paths import autoregressive_noise, great_circle, periodic_noise
from pyro_vae.likelihoods import Bernoulli, Categorical, Normal
from pyro_vae.models import VAE, GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP, NormalEncoder
from pyro_vae.priors import (
    FlowPrior,
    GaussianMixturePrior,
    HierarchicalPrior,
    StandardNormalPrior,
)

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


@pytest.mark.parametrize("within", [False, True])
def test_of_one_hot_classes_it_is_the_mode(within: bool) -> None:
    """Their mean is a vector of probabilities, which is no class."""
    p = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.35, 0.25]])

    def model(x: torch.Tensor | None) -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1e-6).to_event(1))
            fn: Any = dist.OneHotCategorical(probs=p + z.abs())
            if within:
                fn = dist.OneHotCategorical(probs=(p + z.abs()).unsqueeze(-2)).to_event(1)
            pyro.sample("class", fn.mask(False), obs=x)

    x = torch.eye(3)[[2, 2]].unsqueeze(-2) if within else torch.eye(3)[[2, 2]]
    found = latents.generate(model, x)
    assert found.reshape(2, 3).tolist() == [[0, 1, 0], [1, 0, 0]]


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
    pair = model, ExactLinearGaussian(model)
    message = r"traverse: expected one or more dims in 0 ... 1, got "
    with pytest.raises(ValueError, match=message + r"\[2\]"):
        latents.traverse(*pair, torch.zeros(5, 3), dims=[2])
    with pytest.raises(ValueError, match=message + r"\[\]. .* leave dims out for all"):
        latents.traverse(*pair, torch.zeros(5, 3), dims=[])
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        latents.traverse(*pair, torch.zeros(5, 3), dims=[0.5])  # type: ignore[list-item]
    some = latents.traverse(*pair, torch.zeros(5, 3), dims=torch.tensor([1, -2]))
    assert torch.equal(some, latents.traverse(*pair, torch.zeros(5, 3), dims=[1, 0]))


def test_walks_need_one_observed_site() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("first", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.sample("second", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x, message = torch.zeros(3, 1), r": expected a model with one observed site, got \['first', 's"
    with pytest.raises(ValueError, match="interpolate" + message):
        latents.interpolate(model, guide, x, x)
    with pytest.raises(ValueError, match="traverse" + message):
        latents.traverse(model, guide, x)
    with pytest.raises(ValueError, match="walk" + message):
        latents.walk(model, x, num_steps=2)
    hidden = pyro.poutine.block(model, hide=["second"])
    start = latents.interpolate(hidden, guide, x + 2, x, num_steps=2)[0]
    torch.testing.assert_close(start, x + 2)
    assert latents.walk(hidden, x, num_steps=2).shape == (2, 3, 1)


# Several sites, drawn or observed.


def two_views(batch: dict[str, torch.Tensor | None]) -> None:
    """A picture and a class of one code; what is not given is drawn."""
    num = next(len(x) for x in batch.values() if x is not None)
    with pyro.plate("rows", num):
        code = pyro.sample("code", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("view", dist.Normal(2 * code, 0.1).to_event(1), obs=batch["view"])
        tag = dist.Categorical(logits=100 * code)
        pyro.sample("tag", tag.mask(batch["tag"] is not None), obs=batch["tag"])


def view_guide(batch: dict[str, torch.Tensor | None]) -> None:
    view, tag = batch["view"], batch["tag"]
    loc = torch.eye(3)[tag] if view is None and tag is not None else view
    assert loc is not None
    with pyro.plate("rows", len(loc)):
        pyro.sample("code", dist.Normal(loc, 0.5).to_event(1))


def test_from_one_modality_to_another() -> None:
    x, y = torch.randn(50, 3), torch.arange(50) % 3
    tags = latents.reconstruct(two_views, view_guide, {"view": x, "tag": None}, site="tag")
    assert torch.equal(tags, x.argmax(-1))
    views = latents.reconstruct(two_views, view_guide, {"view": None, "tag": y}, site="view")
    torch.testing.assert_close(views, 2 * torch.eye(3)[y])
    # The only site that is observed needs no name.
    views = latents.reconstruct(two_views, view_guide, {"view": x, "tag": None})
    torch.testing.assert_close(views, 2 * x)


def test_codes_that_are_samples() -> None:
    x = torch.randn(2000, 3)
    batch = {"view": x, "tag": None}
    found = latents.reconstruct(two_views, view_guide, batch, site=["tag", "view"], sample=True)
    assert list(found) == ["tag", "view"]
    assert torch.equal(found["tag"], found["view"].argmax(-1))  # One code for both.
    noise = found["view"] / 2 - x
    assert float(noise.std()) == pytest.approx(0.5, abs=5 * 0.5 / (2 * noise.numel()) ** 0.5)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("names", [["view", "tag"], ("tag", "view"), {"tag", "view"}])
def test_sites_that_are_generated_together(mean: bool, names: Any) -> None:
    batch: dict[str, torch.Tensor | None] = {"view": torch.zeros(300, 3), "tag": None}
    found = latents.generate(two_views, batch, mean=mean, site=names)
    assert set(found) == set(names)
    second, first = found["view"].sort(-1).values[:, 1:].T
    clear = first - second > 1.0  # More than the noise of the view.
    assert clear.sum() > 100
    assert torch.equal(found["view"].argmax(-1)[clear], found["tag"][clear])
    assert len(found["tag"].unique()) == 3


def test_several_sites_are_decoded_in_one_run() -> None:
    batch = {"view": torch.zeros(40, 3), "tag": torch.zeros(40, dtype=torch.int64)}
    found = latents.decode(two_views, {}, batch, site=["view", "tag"])
    torch.testing.assert_close(
        found["tag"].base_dist.logits.argmax(-1), found["view"].mean.argmax(-1)
    )
    code = torch.randn(40, 3)
    found = latents.decode(two_views, {"code": code}, batch, site=["view"])
    torch.testing.assert_close(found["view"].mean, 2 * code)
    assert latents.decode(two_views, {"code": code}, batch, site=[]) == {}


def labelled_view(x: torch.Tensor | None, y: torch.Tensor | None, num: int) -> None:
    """The class comes first, and the picture is made of it."""
    with pyro.plate("rows", num):
        style = pyro.sample("style", dist.Normal(torch.zeros(num), 0.1))
        tag = pyro.sample("tag", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), obs=y)
        pyro.sample("view", dist.Normal(style + tag * 10.0, 0.1), obs=x)


def test_a_site_that_another_one_depends_on_keeps_its_value() -> None:
    """Its mode would be class 0 in every row, whatever the picture shows."""
    settings: Any = {"x": torch.zeros(4000), "y": torch.zeros(4000).long(), "num": 4000}
    found = latents.generate(labelled_view, **settings, site=["view", "tag"])
    assert torch.equal((found["view"] / 10).round().long(), found["tag"])
    share = found["tag"].bincount() / 4000
    p = torch.tensor([0.5, 0.3, 0.2])
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
    torch.testing.assert_close(  # Means of pictures all the same: no noise beside the style's.
        (found["view"] - 10 * found["tag"]).std(), torch.tensor(0.1), atol=0.01, rtol=0
    )
    noisy = latents.generate(labelled_view, **settings, mean=False, site=["view", "tag"])
    assert torch.equal((noisy["view"] / 10).round().long(), noisy["tag"])
    # A class that is not asked for stays as given.
    views = latents.generate(labelled_view, **settings, site=["view"])["view"]
    assert (views.abs() < 1).all()


def other_guide(batch: dict[str, torch.Tensor | None]) -> None:
    with pyro.plate("rows", 4):
        pyro.sample("other", dist.Normal(0.0, 1.0))


def test_sites_asked_for_that_are_not_there() -> None:
    batch = {"view": torch.zeros(4, 3), "tag": None}
    message = r": expected site to be one of \['view', 'tag'\], got '{}'. Name the site"
    with pytest.raises(ValueError, match="reconstruct" + message.format("x_tag")):
        latents.reconstruct(two_views, view_guide, batch, site="x_tag")
    with pytest.raises(ValueError, match="decode" + message.format("code")):
        latents.decode(two_views, {"code": torch.zeros(4, 3)}, batch, site=["tag", "code"])
    with pytest.raises(ValueError, match=r"generate: .* one of \['code', 'view', 'tag'\], got 'x'"):
        latents.generate(two_views, batch, site=["x"])
    with pytest.raises(ValueError, match=r"reconstruct: expected codes for the latents .*'other'"):
        latents.reconstruct(two_views, other_guide, batch)


def test_walks_want_continuous_latents_with_one_event_dimension() -> None:
    """Else rows would be taken for coordinates, or points between classes decoded."""

    def pair(fn: Any) -> tuple[Any, Any]:
        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("code", fn)
                pyro.sample("x", dist.Normal(0.0 * z.reshape(len(x), -1).sum(-1), 1.0), obs=x)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("code", fn)

        return model, guide

    x = torch.zeros(3)
    for shape in ((), (2, 3)):
        normal = dist.Normal(torch.zeros(3, *shape), 1.0).to_event(len(shape))
        with pytest.raises(ValueError, match="traverse: expected one event dimension at site 'co"):
            latents.traverse(*pair(normal), x)
        assert latents.interpolate(*pair(normal), x, x, num_steps=2).shape == (2, 3)
    for fn in (dist.Categorical(torch.ones(3, 4)), dist.OneHotCategorical(torch.ones(3, 4))):
        with pytest.raises(ValueError, match="traverse: expected a continuous latent at site 'c"):
            latents.traverse(*pair(fn), x)
        with pytest.raises(ValueError, match="interpolate: expected a continuous latent at site"):
            latents.interpolate(*pair(fn), x, x)


# Paths between codes.


def test_a_quarter_of_the_unit_circle_in_equal_angles() -> None:
    weights = torch.linspace(0, 1, 7)
    start, end = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    angle = weights * math.pi / 2
    expected = torch.stack([angle.cos(), torch.zeros(7), angle.sin()], -1)
    torch.testing.assert_close(great_circle(start, end, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_great_circle_in_general(dtype: torch.dtype) -> None:
    """Its angles and norms grow evenly, in the plane of its ends, which are exact."""
    start, end = torch.randn(2, 6, 4, dtype=dtype)
    weights = torch.linspace(0, 1, 5, dtype=dtype)
    path = great_circle(start, end, weights)
    assert path.shape == (5, 6, 4)
    assert path.dtype == dtype
    assert torch.equal(path[0], start)
    assert torch.equal(path[-1], end)
    norms = torch.stack([start.norm(dim=-1), end.norm(dim=-1)])
    torch.testing.assert_close(
        path.norm(dim=-1), norms[0] + weights[:, None] * (norms[1] - norms[0])
    )
    unit = path / path.norm(dim=-1, keepdim=True)
    cosines = (unit[:-1] * unit[1:]).sum(-1)
    whole = (unit[0] * unit[-1]).sum(-1).acos()
    torch.testing.assert_close(cosines, (whole / 4).cos().expand(4, -1))
    rank = torch.linalg.svdvals(path.transpose(0, 1))  # (6, 4): two directions span each path.
    assert (rank[:, 2] < 1e-5 * rank[:, 0]).all()


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1e-3])
def test_near_parallel_codes_go_straight(angle: float) -> None:
    """Without a jump: the distance from the line is of the order of the angle squared."""
    start = torch.tensor([2.0, 0.0])
    end = 2 * torch.tensor([math.cos(angle), math.sin(angle)])
    weights = torch.linspace(0, 1, 9)
    line = start.lerp(end, weights[:, None])
    path = great_circle(start, end, weights)
    assert (path - line).norm(dim=-1).max() <= angle**2 / 3 + 1e-14
    # Along the arc even the smallest angle is divided evenly, also between other norms.
    path = great_circle(start, 5 * end, weights)
    sines = (angle * weights).sin() * (2 + 8 * weights)
    torch.testing.assert_close(path[:, 1], sines, atol=0, rtol=1e-9)


def test_from_the_origin_the_path_is_straight() -> None:
    zero, code, weights = torch.zeros(3), torch.randn(3), torch.linspace(0, 1, 5)
    line = weights[:, None] * code
    torch.testing.assert_close(great_circle(zero, code, weights), line)
    torch.testing.assert_close(great_circle(code, zero, weights), line.flip(0))
    assert torch.equal(great_circle(zero, zero, weights), torch.zeros(5, 3))


def test_nearly_opposite_codes() -> None:
    """They still have one shortest arc; opposite ones have none."""
    start = torch.tensor([1.0, 0.0])
    end = torch.tensor([-1.0, 1e-6])
    middle = great_circle(start, end, torch.tensor([0.5]))[0]
    torch.testing.assert_close(middle, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    message = "interpolate: expected codes that are not opposite, got 1 pairs that are, between"
    for scale in (1.0, 5.0):
        with pytest.raises(ValueError, match=message):
            great_circle(torch.eye(2), torch.stack([-scale * start, start]), torch.tensor([0.5]))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e25, 1e300])
def test_lengths_whose_squares_are_no_numbers(scale: float) -> None:
    start, end = scale * torch.tensor([1.0, 0.0]), scale * torch.tensor([0.0, 1.0])
    middle = great_circle(start, end, torch.tensor([0.5]))[0] / scale
    torch.testing.assert_close(middle, torch.full((2,), 0.5**0.5))


def test_spherical_interpolation_of_a_linear_model() -> None:
    model, guide = linear_pair()
    start, end = torch.randn(2, 4, DATA_DIM)
    first, last = (latents.encode(guide, x).mean for x in (start, end))
    found = latents.interpolate(model, guide, start, end, num_steps=3, path="spherical")
    unit = [z / z.norm(dim=-1, keepdim=True) for z in (first, last)]
    middle = unit[0] + unit[1]  # The bisector.
    middle = middle / middle.norm(dim=-1, keepdim=True)
    code = middle * (first.norm(dim=-1) + last.norm(dim=-1))[:, None] / 2
    torch.testing.assert_close(found[1], latents.decode(model, {"z": code}, start).mean)
    torch.testing.assert_close(found[0], latents.reconstruct(model, guide, start))
    torch.testing.assert_close(found[2], latents.reconstruct(model, guide, end))


def test_a_code_with_several_event_dimensions_has_one_norm() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(2))

    start, end = torch.randn(2, 4, 2, 3)
    found = latents.interpolate(model, guide, start, end, num_steps=5, path="spherical")
    expected = great_circle(start.flatten(1), end.flatten(1), torch.linspace(0, 1, 5))
    torch.testing.assert_close(found, expected.reshape(5, 4, 2, 3))


def shifted_model(x: torch.Tensor, y: torch.Tensor) -> None:
    """The class shifts the data."""
    with pyro.plate("rows", len(x)):
        code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(code + 10 * y[:, None], 0.1).to_event(1), obs=x)


def shifted_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    """Codes do not know the class."""
    with pyro.plate("rows", len(x)):
        pyro.sample("code", dist.Normal(x - 10 * y[:, None], 0.5).to_event(1))


def test_walks_of_programs_with_a_class() -> None:
    y = torch.arange(4)
    start, end = torch.randn(2, 4, 2) + 10 * y[:, None]
    given: dict[str, Any] = {"num_steps": 3}
    for path in (
        latents.interpolate(shifted_model, shifted_guide, start, end, y, **given),
        latents.interpolate(shifted_model, shifted_guide, start, end, y=y, **given),
    ):
        torch.testing.assert_close(path, torch.stack([start, (start + end) / 2, end]))
    moved = latents.traverse(shifted_model, shifted_guide, start, y, dims=[1], values=[-1, 2])
    assert moved.shape == (1, 2, 4, 2)
    torch.testing.assert_close(moved[0, :, :, 0], start[:, 0].expand(2, -1))
    torch.testing.assert_close(moved[0, :, :, 1], torch.tensor([[-1.0], [2.0]]) + 10 * y.to(start))
    again = latents.traverse(shifted_model, shifted_guide, start, y=y, dims=[1], values=[-1, 2])
    assert torch.equal(again, moved)
    for steps in (latents.walk, latents.loop):
        path = steps(shifted_model, start, y, num_steps=50)
        assert torch.equal((path / 10).round().mean((0, 2)), y.to(path))


# Codes that belong together, and to the model.


def bottom_up_model(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
        loc = torch.cat([top, low, kind.to(low).unsqueeze(-1)], -1)
        pyro.sample("obs", dist.Normal(loc, 1.0).to_event(1), obs=x)


def bottom_up_guide(x: torch.Tensor) -> None:
    """Each latent follows the value of the one before."""
    with pyro.plate("rows", len(x)):
        low = pyro.sample("low", dist.Normal(x[:, 2:4], 3.0).to_event(1))
        kind = pyro.sample("kind", dist.Categorical(logits=torch.cat([low, 0 * low[:, :1]], -1)))
        pyro.sample("top", dist.Normal(2 * low + kind.unsqueeze(-1), 3.0).to_event(1))


def test_codes_are_means_given_means() -> None:
    pair, x = (bottom_up_model, bottom_up_guide), torch.randn(20, 5)
    low = x[:, 2:4]
    kind = torch.cat([low, 0 * low[:, :1]], -1).argmax(-1, keepdim=True)
    expected = torch.cat([2 * low + kind, low, kind.to(low)], -1)
    torch.testing.assert_close(latents.reconstruct(*pair, x), expected)
    found = latents.interpolate(*pair, x, x, num_steps=2, site="top")
    torch.testing.assert_close(found, expected.expand(2, -1, -1))
    found = latents.traverse(*pair, x, dims=[0], values=[7], site="low")[0, 0]
    expected[:, 2] = 7
    torch.testing.assert_close(found, expected)
    noisy = latents.reconstruct(*pair, x, sample=True)
    assert ((noisy - expected)[:, :2].abs() > 1e-3).all()


def test_values_that_a_guide_is_given_are_its_codes() -> None:
    x, low = torch.zeros(4, 5), torch.randn(4, 2)
    guide = replay_values(bottom_up_guide, {"low": low})
    found = latents.reconstruct(bottom_up_model, guide, x)
    torch.testing.assert_close(found[:, 2:4], low)
    torch.testing.assert_close(found[:, :2], 2 * low + found[:, 4:])


def test_without_a_mean_a_code_is_a_draw() -> None:
    """Cauchy distributions have none, in those rows alone where the degrees of freedom say so."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.StudentT(x[:, :1] + 1.0, x, 1.0).to_event(1))

    x = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    found = [latents.reconstruct(identity_model, guide, x) for _ in range(2)]
    assert all(f.isfinite().all() for f in found)
    assert (found[0][0] != found[1][0]).all()
    for f in found:
        torch.testing.assert_close(f[1], x[1])


def simplex_model(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("obs", dist.Normal(share, 1.0).to_event(1), obs=x)


def simplex_guide(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("share", dist.Dirichlet(x))


def test_codes_outside_the_support() -> None:
    pair, start = (simplex_model, simplex_guide), torch.tensor([[5.0, 1.0, 1.0], [1.0, 7.0, 1.0]])
    end = start.flip(-1)
    message = (
        r": expected codes in the support of site 'share', Simplex\(\), got some outside it. Stay"
    )
    with pytest.raises(ValueError, match="interpolate" + message):
        latents.interpolate(*pair, start, end, path="spherical")
    with pytest.raises(ValueError, match="traverse" + message):
        latents.traverse(*pair, start, dims=[0])
    for code in (torch.ones(2, 3), torch.full((2, 3), math.nan)):
        with pytest.raises(ValueError, match="decode" + message):
            latents.decode(simplex_model, {"share": code}, start)
    found = latents.interpolate(*pair, start, end, num_steps=3)  # A simplex is convex.
    ends = [x / x.sum(-1, keepdim=True) for x in (start, end)]
    torch.testing.assert_close(found[1], (ends[0] + ends[1]) / 2)
    torch.testing.assert_close(
        latents.decode(simplex_model, {"share": ends[0]}, start).mean, ends[0]
    )


# Random walks.


def moments(path: torch.Tensor, correlations: list[float]) -> None:
    """Compares mean, variance and correlations in time with those of N(0, I), over rows."""
    num = path.shape[1] * path.shape[2]
    assert (path.mean((1, 2)).abs() < 5 / num**0.5).all()
    assert (path.var((1, 2)) - 1).abs().max() < 5 * (2 / num) ** 0.5
    for lag, correlation in enumerate(correlations):
        found = (path[: len(path) - lag] * path[lag:]).mean((1, 2))
        error = 5 * ((1 + correlation**2) / num) ** 0.5
        assert (found - correlation).abs().max() < error, lag


def test_noise_stays_standard_normal() -> None:
    like, s = torch.empty(4000, 2), 0.6
    moments(autoregressive_noise(like, 8, s), [(1 - s**2) ** (k / 2) for k in range(4)])
    moments(autoregressive_noise(like, 3, 1.0), [1, 0, 0])
    waves = torch.arange(1, 4.0)
    expected = [float((2 * math.pi * waves * lag / 9).cos().mean()) for lag in range(4)]
    path = periodic_noise(like, 9, 3)
    moments(path, expected)
    moments(path.roll(1, 0), expected)  # From the last point to the first as anywhere else.
    # No two coordinates or rows share noise.
    assert (path[0, :, 0] * path[0, :, 1]).mean().abs() < 5 / 4000**0.5


def test_a_loop_of_one_wave_is_an_ellipse() -> None:
    path = periodic_noise(torch.empty(3), 8, 1)
    torch.testing.assert_close(path[4:], -path[:4])
    angle = 2 * math.pi * torch.arange(8) / 8
    ellipse = angle.cos()[:, None] * path[0] + angle.sin()[:, None] * path[2]
    torch.testing.assert_close(path, ellipse)


def identity_model(x: torch.Tensor) -> None:
    """The mean of the data is the code."""
    with pyro.plate("rows", len(x)):
        code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(code, 0.1).to_event(1), obs=x)


def test_walks_stay_in_the_prior() -> None:
    x, s = torch.zeros(4000, 2), 0.4
    path = latents.walk(identity_model, x, num_steps=6, step_size=s)
    assert path.shape == (6, 4000, 2)
    moments(path, [(1 - s**2) ** (k / 2) for k in range(3)])
    path = latents.loop(identity_model, x, num_steps=5, num_waves=2)
    moments(path, [1, float((2 * math.pi * torch.tensor([1.0, 2.0]) / 5).cos().mean())])


def test_walks_follow_the_seed() -> None:
    x = torch.zeros(3, 2)
    for steps in (latents.walk, latents.loop):
        paths = []
        for seed in (1, 1, 2):
            pyro.set_rng_seed(seed)
            paths.append(steps(identity_model, x, num_steps=4))
        assert torch.equal(paths[0], paths[1])
        assert not torch.equal(paths[0], paths[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_walks_have_the_type_of_the_model(dtype: torch.dtype) -> None:
    decoder = MLP(LATENT_DIM, [8], DATA_DIM, dropout=0.5)
    model = VAE(decoder, Normal(0.3), StandardNormalPrior(LATENT_DIM)).to(dtype)
    x = torch.zeros(3, DATA_DIM, dtype=dtype)
    path = latents.walk(model, x, num_steps=1)
    assert path.dtype == dtype
    assert not path.requires_grad
    assert model.training
    assert not list(pyro.get_param_store())


def scaled(fn: Any) -> Any:
    """A model whose data show its only latent."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", fn)
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(fn.event_dim), obs=x)

    return model


def test_priors_made_of_normal_noise() -> None:
    """Each is turned back into its noise, whose moments are known."""
    loc, root = torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    normal = dist.Normal(loc, torch.tensor([0.5, 2.0]))
    x, correlations = torch.zeros(3000, 2), [1, 0.8]
    path = latents.walk(scaled(normal.to_event(1)), x, num_steps=3, step_size=0.6)
    moments((path - loc) / normal.scale, correlations)
    full = dist.MultivariateNormal(loc, scale_tril=root)
    path = latents.walk(scaled(full), x, num_steps=3, step_size=0.6)
    moments((path - loc) @ root.inverse().T, correlations)
    transforms = [dist.transforms.AffineTransform(loc, 2.0), dist.transforms.TanhTransform()]
    bent = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), transforms).to_event(1)
    path = latents.walk(scaled(bent), x, num_steps=3, step_size=0.6)
    moments((path.atanh() - loc) / 2, correlations)
    scalar = dist.Normal(1.0, 3.0).mask(False)
    path = latents.walk(scaled(scalar), x[:, 0], num_steps=3, step_size=0.6)
    moments((path[..., None] - 1) / 3, correlations)


def test_a_flow_bends_its_noise() -> None:
    prior = FlowPrior(
        2, [dist.transforms.affine_autoregressive(2), dist.transforms.affine_coupling(2)]
    )
    model = VAE(MLP(2, [], 2), Normal(0.3), prior)
    with torch.no_grad():
        model.decoder[0].weight.copy_(torch.eye(2))
        model.decoder[0].bias.zero_()
    x = torch.zeros(500, 2)
    paths = []
    for seed in (5, 5):
        pyro.set_rng_seed(seed)
        paths.append(latents.walk(model, x, num_steps=3))
    assert torch.equal(*paths)
    pyro.set_rng_seed(5)
    noise = autoregressive_noise(torch.empty(500, 2), 3, 0.3)
    with torch.no_grad():
        for transform in pyro.poutine.trace(model).get_trace(x).nodes["z"]["fn"].transforms:
            noise = transform(noise)
    torch.testing.assert_close(paths[0], noise)


def test_all_layers_of_a_hierarchy_walk() -> None:
    """Joint moments are those of the prior: low = top + noise."""
    x = torch.zeros(4000, 4)
    path = latents.walk(ladder_model, x, num_steps=3, step_size=0.6)
    top, low = path[..., :2], path[..., 2:]
    moments(top, [1, 0.8])
    moments(low - top, [1, 0.8])
    assert ((low - top) * top).mean((1, 2)).abs().max() < 5 / 8000**0.5


@pytest.mark.parametrize("site", ["top", "low"])
def test_one_layer_of_a_hierarchy_walks(site: str) -> None:
    """The noise of the other one stays."""
    path = latents.walk(ladder_model, torch.zeros(2000, 4), num_steps=3, step_size=0.6, site=site)
    noise = {"top": path[..., :2], "low": path[..., 2:] - path[..., :2]}
    moments(noise.pop(site), [1, 0.8])
    (still,) = noise.values()
    torch.testing.assert_close(still, still[:1].expand_as(still))
    assert abs(float(still[0].std()) - 1) < 5 / 8000**0.5


def test_walks_of_library_hierarchies() -> None:
    conditional = NormalEncoder(MLP(2, [8], 2 * 3))
    prior = HierarchicalPrior(StandardNormalPrior(2, site="z2"), [conditional])
    model = VAE(MLP(3, [8], DATA_DIM), Bernoulli(), prior)
    for site in (None, "z1", "z2"):
        path = latents.loop(model, torch.zeros(4, DATA_DIM), num_steps=6, site=site)
        assert path.shape == (6, 4, DATA_DIM)
        assert (path.diff(dim=0).abs().amax((1, 2)) > 0).all()


def test_latents_of_another_kind_stay() -> None:
    """So do the rows that a plate draws, and what follows from a latent follows it."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
            double = pyro.sample("double", dist.Delta(2 * z))
            y = pyro.sample("y", dist.Categorical(torch.ones(5, 10)))
            loc = torch.stack([z, double, y.to(z), rows.to(z)], -1)
            pyro.sample("obs", dist.Normal(loc, 1.0).to_event(1), obs=x[rows])

    path = latents.walk(model, torch.zeros(100, 4), num_steps=4, site="z")
    z, double, *still = path.unbind(-1)
    assert (z.diff(dim=0).abs() > 0).all()
    torch.testing.assert_close(double, 2 * z)
    for value in still:
        assert torch.equal(value, value[:1].expand_as(value))
        assert len(value[0].unique()) > 1


@pytest.mark.parametrize(
    "fn", [dist.HalfNormal(1.0), dist.Gumbel(0.0, 1.0), dist.Weibull(1.0, 2.0)]
)
def test_distributions_with_a_part_of_torch(fn: Any) -> None:
    """Pyro wraps those of torch, which have no ``shape`` of Pyro's."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            other = pyro.sample("other", fn)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.cat([z, other.unsqueeze(-1)], -1)
            pyro.sample("obs", dist.Normal(loc, 1.0).to_event(1), obs=x)

    path = latents.walk(model, torch.zeros(4, 3), num_steps=3, site="z")
    assert (path[..., :2].diff(dim=0).abs() > 0).all()
    assert torch.equal(path[..., 2], path[:1, :, 2].expand(3, 4))


def test_half_normal_noise_walks() -> None:
    path = latents.walk(scaled(dist.HalfNormal(2.0)), torch.zeros(4000), num_steps=3)
    assert (path >= 0).all()
    mean, variance = 2 * (2 / math.pi) ** 0.5, 4 * (1 - 2 / math.pi)
    assert ((path.mean(1) - mean).abs() < 5 * (variance / 4000) ** 0.5).all()


def test_values_given_inside_the_model_stay() -> None:
    x, top = torch.zeros(3, 4), torch.randn(3, 2)
    trace = pyro.poutine.trace(ladder_model).get_trace(x)
    trace.remove_node("low")
    for model, value in (
        (replay_values(ladder_model, {"top": top}), top),
        (pyro.poutine.replay(ladder_model, trace), trace.nodes["top"]["value"]),
    ):
        for site in (None, "low"):
            path = latents.walk(model, x, num_steps=3, site=site)
            torch.testing.assert_close(path[..., :2], value.expand(3, -1, -1))
            assert (path[..., 2:].diff(dim=0).abs() > 0).all()
        with pytest.raises(ValueError, match=r"walk: expected site .* of \['low'\], got 'top'"):
            latents.walk(model, x, num_steps=3, site="top")


def test_a_point_mass_is_no_latent_of_its_own() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            double = pyro.sample("double", dist.Delta(2 * z).to_event(1))
            loc = torch.cat([z, double], -1)
            pyro.sample("obs", dist.Normal(loc, 1.0).to_event(1), obs=x)

    path = latents.walk(model, torch.zeros(3, 4), num_steps=4)
    torch.testing.assert_close(path[..., 2:], 2 * path[..., :2])
    assert (path.diff(dim=0).abs() > 0).all()
    with pytest.raises(ValueError, match=r"walk: expected site .* of \['z'\], got 'double'"):
        latents.walk(model, torch.zeros(3, 4), num_steps=4, site="double")


def test_priors_that_are_not_made_of_normal_noise() -> None:
    message = "walk: expected latents made of normal noise, got {} at site 'z'. Name another site"
    model = VAE(MLP(2, [], 4), Bernoulli(), GaussianMixturePrior(2, 3))
    with pytest.raises(ValueError, match=message.format(".*")):
        latents.walk(model, torch.zeros(5, 4), num_steps=2)
    x = torch.zeros(5)
    for site in (None, "z"):
        with pytest.raises(ValueError, match=message.format("Gamma")):
            latents.walk(scaled(dist.Gamma(1.0, 1.0)), x, num_steps=2, site=site)
    classes = dist.Categorical(torch.ones(5, 3))
    with pytest.raises(ValueError, match=message.format("Categorical").replace("walk", "loop")):
        latents.loop(scaled(classes), x, num_steps=2)
    bound = dist.TransformedDistribution(
        dist.Uniform(torch.zeros(5), 1.0), [dist.transforms.ExpTransform()]
    )
    with pytest.raises(ValueError, match=message.format("TransformedDistribution")):
        latents.walk(scaled(bound), x, num_steps=2)
    # Expanded from outside, a transformed normal would give all rows the noise of one.
    shared = dist.ExpandedDistribution(dist.LogNormal(0.0, 1.0), torch.Size([5]))
    with pytest.raises(ValueError, match=message.format("ExpandedDistribution")):
        latents.walk(scaled(shared), x, num_steps=2)


# Errors of walks.


def test_which_latent_walks() -> None:
    x = torch.zeros(3, 4)
    message = r": expected site to be one of \['top', 'low'\], got 'middle'. Name the site"
    for steps in (latents.walk, latents.loop):
        with pytest.raises(ValueError, match=steps.__name__ + message):
            steps(ladder_model, x, num_steps=2, site="middle")

    def nothing(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(0.0, 1.0).expand([4]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"walk: expected site to be one of \[\], got none"):
        latents.walk(nothing, x, num_steps=2)


@pytest.mark.parametrize("step_size", [0.0, -0.1, 1.1, math.nan])
def test_step_size_out_of_range(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"walk: expected step_size in \(0, 1\], got"):
        latents.walk(identity_model, torch.zeros(3, 2), num_steps=2, step_size=step_size)


def test_numbers_of_steps() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="walk: expected num_steps >= 1, got 0"):
        latents.walk(identity_model, x, num_steps=0)
    with pytest.raises(TypeError, match="loop: expected an integer num_steps, got float"):
        latents.loop(identity_model, x, num_steps=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loop: expected num_waves >= 1, got 0"):
        latents.loop(identity_model, x, num_steps=2, num_waves=0)


def test_an_unknown_path() -> None:
    model, guide = linear_pair()
    x = torch.zeros(3, DATA_DIM)
    message = "interpolate: expected path 'linear' or 'spherical', got 'slerp'. A linear one"
    with pytest.raises(ValueError, match=message):
        latents.interpolate(model, guide, x, x, path="slerp")  # type: ignore[arg-type]


def test_traverse_needs_a_value() -> None:
    model, guide = linear_pair()
    for values, shape in (([], r"\(0,\)"), (torch.tensor(1.0), r"\(\)")):
        with pytest.raises(ValueError, match=f"traverse: expected one or more values, .*{shape}"):
            latents.traverse(model, guide, torch.zeros(3, DATA_DIM), values=values)


def test_walks_from_data_refuse_rows_drawn_at_random() -> None:
    """The rows of start and end, or of guide and model, would not belong together."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0).to_event(1))

    x = torch.randn(5, 1)
    with pytest.raises(ValueError, match="interpolate: expected plate 'rows' over the rows given"):
        latents.interpolate(model, guide, x, x)
    with pytest.raises(ValueError, match="traverse: expected plate 'rows' over the rows given"):
        latents.traverse(model, guide, x)
