"""Attribute vectors and moves along them, where both are known in closed form."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import latents
from pyro_vae.guides import AmortizedBottomUp, AmortizedNormal, ExactLinearGaussian
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP

DATA_DIM, LATENT_DIM = 5, 2


def linear_pair() -> tuple[LinearGaussian, ExactLinearGaussian]:
    model = LinearGaussian(DATA_DIM, LATENT_DIM)
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.fill_(-0.5)
    return model, ExactLinearGaussian(model)


def conditional_model(x: torch.Tensor, y: torch.Tensor) -> None:
    """The class shifts the data."""
    with pyro.plate("rows", len(x)):
        code = pyro.sample("code", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(2 * code + 10 * y[:, None], 0.1).to_event(1), obs=x)


def conditional_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    """Codes do not know the class."""
    with pyro.plate("rows", len(x)):
        pyro.sample("code", dist.Normal(x / 2 - 5 * y[:, None], 0.5).to_event(1))


def ladder_model(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(torch.cat([top, low], -1), 1.0).to_event(1), obs=x)


def ladder_guide(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("top", dist.Normal(x[:, :2], 0.5).to_event(1))
        pyro.sample("low", dist.Normal(x[:, 2:] + 1, 0.5).to_event(1))


def test_it_is_the_difference_of_posterior_means() -> None:
    model, guide = linear_pair()
    x = torch.randn(50, DATA_DIM)
    attribute = x[:, 0] > 0.3
    loadings, noise = model.weight.detach(), model.noise_variance.detach()
    precision = torch.eye(LATENT_DIM) + loadings.T @ (loadings / noise[:, None])
    gap = x[attribute].mean(0) - x[~attribute].mean(0)
    expected = torch.linalg.solve(precision, loadings.T @ (gap / noise))
    found = latents.attribute_vector(guide, x, attribute)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    torch.testing.assert_close(latents.attribute_vector(guide, x, ~attribute), -expected)


def test_within_classes_every_class_counts_the_same() -> None:
    _, guide = linear_pair()
    x, y = torch.randn(60, DATA_DIM), torch.tensor([0] * 10 + [7] * 20 + [2] * 30)
    attribute = torch.arange(60) % 3 == 0
    code = latents.encode(guide, x).mean
    parts = [
        code[(y == label) & attribute].mean(0) - code[(y == label) & ~attribute].mean(0)
        for label in (0, 7, 2)
    ]
    found = latents.attribute_vector(guide, x, attribute, within=y)
    torch.testing.assert_close(found, (parts[0] + parts[1] + parts[2]) / 3)


def test_within_classes_it_does_not_carry_the_class() -> None:
    """An attribute of the second coordinate that is more frequent in a class of the first."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(x, 1.0).to_event(1))

    y = torch.tensor([0] * 10 + [1] * 10)
    attribute = torch.tensor([True] * 2 + [False] * 8 + [True] * 8 + [False] * 2)
    x = torch.stack([5.0 * y, attribute.double()], -1)
    torch.testing.assert_close(
        latents.attribute_vector(guide, x, attribute), torch.tensor([3.0, 1.0])
    )
    torch.testing.assert_close(
        latents.attribute_vector(guide, x, attribute, within=y), torch.tensor([0.0, 1.0])
    )


def test_moved_reconstructions_are_linear_in_the_amount() -> None:
    model, guide = linear_pair()
    x, direction, amounts = torch.randn(4, DATA_DIM), torch.randn(LATENT_DIM), [-2.0, 0.0, 0.5, 3.0]
    found = latents.move(model, guide, x, direction, amounts)
    assert found.shape == (4, 4, DATA_DIM)
    assert not found.requires_grad
    kept = latents.reconstruct(model, guide, x)
    shift = torch.tensor(amounts)[:, None, None] * (model.weight @ direction).detach()
    torch.testing.assert_close(found, kept + shift)
    again = latents.move(model, guide, x, direction, torch.tensor(amounts))
    torch.testing.assert_close(again, found)


def test_one_step_takes_the_mean_of_one_group_to_that_of_the_other() -> None:
    model, guide = linear_pair()
    x = torch.randn(50, DATA_DIM)
    attribute = x.sum(-1) > 0
    direction = latents.attribute_vector(guide, x, attribute)
    (moved,) = latents.move(model, guide, x[~attribute], direction, [1])
    there = latents.reconstruct(model, guide, x[attribute])
    torch.testing.assert_close(moved.mean(0), there.mean(0))


def test_programs_with_a_class() -> None:
    y = torch.arange(40) % 2
    attribute = torch.arange(40) < 13
    code = torch.randn(40, 3) + attribute[:, None] * torch.tensor([1.0, -2.0, 0.0])
    x = 2 * code + 10 * y[:, None]
    direction = latents.attribute_vector(conditional_guide, x, attribute, y)
    expected = code[attribute].mean(0) - code[~attribute].mean(0)
    torch.testing.assert_close(direction, expected)
    torch.testing.assert_close(
        latents.attribute_vector(conditional_guide, x, attribute, y=y), expected
    )
    moved = latents.move(conditional_model, conditional_guide, x, direction, [0, 2], y)
    torch.testing.assert_close(moved, torch.stack([x, x + 4 * direction]))
    # The same code with the other class.
    other = latents.decode(conditional_model, {"code": code}, x, 1 - y).mean
    torch.testing.assert_close(other, x + 10 * (1 - 2 * y[:, None]))


@pytest.mark.parametrize("site", ["top", "low"])
def test_other_latents_stay(site: str) -> None:
    x = torch.randn(6, 4)
    attribute = torch.tensor([True, False] * 3)
    direction = latents.attribute_vector(ladder_guide, x, attribute, site=site)
    columns = slice(2) if site == "top" else slice(2, None)
    gap = (x[attribute].mean(0) - x[~attribute].mean(0))[columns]
    torch.testing.assert_close(direction, gap)
    moved = latents.move(ladder_model, ladder_guide, x, direction, [1.5], site=site)[0]
    shift = torch.zeros(4)
    shift[columns] = 1.5 * gap
    torch.testing.assert_close(moved, x + torch.tensor([0, 0, 1, 1]) + shift)


def test_codes_of_a_hierarchy_are_means_given_means() -> None:
    """From the bottom up, the upper latent would follow a draw of the lower one."""
    guide = AmortizedBottomUp([MLP(DATA_DIM, [], 2 * 3), MLP(3, [8], 2 * LATENT_DIM)])
    x = torch.randn(8, DATA_DIM)
    attribute = x[:, 0] > 0
    low, top = guide.encoders
    code = top(low(x).mean).mean.detach()
    expected = code[attribute].mean(0) - code[~attribute].mean(0)
    torch.testing.assert_close(latents.attribute_vector(guide, x, attribute, site="z2"), expected)


def test_moves_out_of_the_support() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
            pyro.sample("obs", dist.Poisson(length), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("length", dist.LogNormal(0.0 * x, 0.1))

    x, direction = torch.ones(3), torch.tensor(1.0)
    message = "move: expected codes in the support of site 'length', .*, got some outside it"
    with pytest.raises(ValueError, match=message):
        latents.move(model, guide, x, direction, [1, -5])
    mean = torch.tensor(0.005).exp().expand(3)
    torch.testing.assert_close(latents.move(model, guide, x, direction, [1])[0], mean + 1)


def test_codes_that_are_matrices_and_numbers() -> None:
    """A direction has the shape of one code, whatever that is."""
    for shape in ((), (2, 3)):

        def model(x: torch.Tensor, shape: Any = shape) -> None:
            with pyro.plate("rows", len(x)):
                fn = dist.Normal(torch.zeros(shape), 1.0).expand((len(x), *shape))
                z = pyro.sample("z", fn.to_event(len(shape)))
                pyro.sample("obs", dist.Normal(z, 1.0).to_event(len(shape)), obs=x)

        def guide(x: torch.Tensor, shape: Any = shape) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(len(shape)))

        x = torch.randn(4, *shape)
        direction = latents.attribute_vector(guide, x, torch.tensor([True, True, False, False]))
        torch.testing.assert_close(direction, x[:2].mean(0) - x[2:].mean(0))
        moved = latents.move(model, guide, x, direction, [2])[0]
        torch.testing.assert_close(moved, x + 2 * direction)


def test_single_precision_and_no_side_effects() -> None:
    guide = AmortizedNormal(MLP(DATA_DIM, [8], 2 * LATENT_DIM, dropout=0.5)).float()
    x, attribute = torch.randn(6, DATA_DIM).float(), torch.tensor([True, False] * 3)
    direction = latents.attribute_vector(guide, x, attribute)
    assert direction.dtype == torch.float32
    assert torch.equal(latents.attribute_vector(guide, x, attribute), direction)  # No dropout.
    assert guide.training
    assert not list(pyro.get_param_store())


# Errors.


@pytest.mark.parametrize(
    ("attribute", "got"),
    [(torch.ones(4).int(), "torch.int32"), ([True, False, True, False], "list")],
)
def test_an_attribute_is_bool(attribute: Any, got: str) -> None:
    _, guide = linear_pair()
    message = f"attribute_vector: expected attribute to be a tensor of bools, got {got}. Compare"
    with pytest.raises(TypeError, match=message):
        latents.attribute_vector(guide, torch.zeros(4, DATA_DIM), attribute)


@pytest.mark.parametrize(
    ("within", "got"),
    [(torch.ones(4).half(), "torch.float16"), (torch.ones(4).bool(), "torch.bool")],
)
def test_classes_are_integers(within: torch.Tensor, got: str) -> None:
    _, guide = linear_pair()
    x, attribute = torch.zeros(4, DATA_DIM), torch.tensor([True, False] * 2)
    message = f"attribute_vector: expected within to be a tensor of integers, got {got}. Pass"
    with pytest.raises(TypeError, match=message):
        latents.attribute_vector(guide, x, attribute, within=within)


def test_one_entry_for_each_row() -> None:
    _, guide = linear_pair()
    x, attribute = torch.zeros(4, DATA_DIM), torch.tensor([True, False] * 2)
    message = r"attribute_vector: expected one entry for each row, shape \(4,\), got an attribute "
    with pytest.raises(ValueError, match=message + r"of shape \(3,\)"):
        latents.attribute_vector(guide, x, attribute[:3])
    with pytest.raises(ValueError, match=message + r"of shape \(4, 1\)"):
        latents.attribute_vector(guide, x, attribute[:, None])
    with pytest.raises(ValueError, match=message + r"of shape \(4,\) and within of shape \(2,\)"):
        latents.attribute_vector(guide, x, attribute, within=torch.zeros(2).long())


def test_rows_with_and_without() -> None:
    _, guide = linear_pair()
    x, ones = torch.zeros(4, DATA_DIM), torch.ones(4).bool()
    message = "attribute_vector: expected rows with the attribute and rows without, got "
    with pytest.raises(ValueError, match=message + r"4 with and 0 without\. Choose another"):
        latents.attribute_vector(guide, x, ones)
    with pytest.raises(ValueError, match=message + r"0 with and 4 without\. Choose another"):
        latents.attribute_vector(guide, x, ~ones)
    attribute, within = torch.tensor([True, False, False, False]), torch.tensor([2, 2, 5, 5])
    with pytest.raises(ValueError, match=message + "0 with and 2 without in class 5. Choose"):
        latents.attribute_vector(guide, x, attribute, within=within)


def test_a_direction_has_the_shape_of_one_code() -> None:
    model, guide = linear_pair()
    x = torch.zeros(4, DATA_DIM)
    message = r"move: expected a direction of shape \(2,\), that of one code at site 'z', got "
    for direction in (torch.zeros(3), torch.zeros(4, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=message):
            latents.move(model, guide, x, direction, [1])
    for amounts in ([], torch.tensor(1.0), [[1.0]]):
        with pytest.raises(
            ValueError, match=r"move: expected one or more amounts, .* got shape \("
        ):
            latents.move(model, guide, x, torch.zeros(2), amounts)
    with pytest.raises(TypeError, match="move: expected direction to be a tensor, got list"):
        latents.move(model, guide, x, [1.0, 0.0], [1])  # type: ignore[arg-type]


def test_what_else_is_asked_of_programs() -> None:
    x, attribute = torch.randn(4, 4), torch.tensor([True, False] * 2)
    message = r": expected site to be one of \['top', 'low'\], got none. Name the site"
    with pytest.raises(ValueError, match="attribute_vector" + message):
        latents.attribute_vector(ladder_guide, x, attribute)
    with pytest.raises(ValueError, match="move" + message):
        latents.move(ladder_model, ladder_guide, x, torch.zeros(2), [1])

    def discrete(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(logits=x))

    with pytest.raises(ValueError, match="attribute_vector: expected a continuous latent at site"):
        latents.attribute_vector(discrete, x, attribute)

    def random_rows(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0).to_event(1))

    with pytest.raises(ValueError, match="attribute_vector: expected plate 'rows' over the rows"):
        latents.attribute_vector(random_rows, x, attribute)
