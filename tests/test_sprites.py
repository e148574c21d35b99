"""Sprites: where they are, how large, how turned; each different from all others."""

import math
from typing import Any

import pytest
import torch

from pyro_vae import datasets
from pyro_vae.sprites import (
    SPRITE_FACTORS,
    SPRITE_SHAPES,
    Sprites,
    draw_sprites,
    load_sprites,
)

SQUARE, ELLIPSE, HEART = range(3)


@pytest.fixture(scope="module")
def default() -> Sprites:
    return draw_sprites()


@pytest.fixture(scope="module")
def fine() -> Sprites:
    """Few, but so large that the pixels hardly count."""
    return draw_sprites(image_size=96, num_scales=2, num_rotations=3, num_positions=2)


def pictures(sprites: Sprites) -> torch.Tensor:
    """One dimension a factor, then row and column."""
    sizes = [len(sprites.values[name]) for name in SPRITE_FACTORS]
    side = math.isqrt(sprites.images.shape[1])
    return sprites.images.reshape(*sizes, side, side)


def pixel_centers(sprites: Sprites) -> torch.Tensor:
    side = math.isqrt(sprites.images.shape[1])
    return (torch.arange(side) + 0.5) / side


def test_facts_about_the_default(default: Sprites) -> None:
    assert default.images.shape == (17280, 400)
    assert default.images.dtype == torch.get_default_dtype()
    assert default.images.min() == 0
    assert default.images.max() == 1
    assert default.factors.dtype == torch.int64
    assert tuple(default.values) == SPRITE_FACTORS
    assert [len(default.values[name]) for name in SPRITE_FACTORS] == [3, 4, 10, 12, 12]
    assert len(SPRITE_SHAPES) == 3


def test_factors_are_all_combinations_in_order(default: Sprites) -> None:
    sizes = torch.tensor([3, 4, 10, 12, 12])
    strides = torch.tensor([4 * 10 * 144, 10 * 144, 144, 12, 1])
    expected = torch.arange(17280).unsqueeze(-1) // strides % sizes
    assert torch.equal(default.factors, expected)


@pytest.mark.parametrize("size", [16, 20])
def test_no_two_pictures_are_alike_at_255_grey_levels(size: int) -> None:
    grey = (draw_sprites(image_size=size).images * 255).round().to(torch.uint8).numpy()
    assert len({row.tobytes() for row in grey}) == len(grey) == 17280


@pytest.mark.parametrize("factor", range(5))
def test_a_step_of_one_factor_is_plain_to_see(default: Sprites, factor: int) -> None:
    x = pictures(default)
    others = x.roll(-1, factor)  # The last step goes around, for rotations nearly to the first.
    distance = (x - others).flatten(-2).norm(dim=-1)
    assert distance.min() > 0.4  # Of pixels between 0 and 1.


def test_rotations_stop_before_a_square_repeats(default: Sprites) -> None:
    rotation = default.values["rotation"]
    torch.testing.assert_close(rotation, torch.arange(10) * math.pi / 20)


def areas(radius: torch.Tensor) -> list[torch.Tensor]:
    """Square, ellipse of axes 2 : 1, heart: a square of half side h and two half-discs.

    The heart's outer circle touches its tip and both discs: h = 0.5607 r, found by bisection.
    """
    half = 0.56066
    heart = (4 + math.pi) * (half * radius) ** 2
    return [2 * radius**2, math.pi / 2 * radius**2, heart]


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
def test_area_is_exact(fine: Sprites, shape: int) -> None:
    grey = pictures(fine)[shape].mean((-1, -2))  # scale, rotation, x, y
    expected = areas(fine.values["scale"])[shape].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(grey, expected.expand_as(grey), rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE])
def test_x_is_the_column_and_y_the_row_of_the_center(fine: Sprites, shape: int) -> None:
    grey, at = pictures(fine)[shape], pixel_centers(fine)
    weights = grey / grey.sum((-1, -2), keepdim=True)
    column, row = (weights.sum(-2) * at).sum(-1), (weights.sum(-1) * at).sum(-1)
    x, y = fine.values["x"].reshape(-1, 1), fine.values["y"]
    torch.testing.assert_close(column, x.expand_as(column), atol=1e-3, rtol=0)
    torch.testing.assert_close(row, y.expand_as(row), atol=1e-3, rtol=0)


def offsets(sprites: Sprites) -> tuple[torch.Tensor, torch.Tensor]:
    """How far right and down of the sprite each pixel is, for every x and y."""
    at = pixel_centers(sprites)
    right = (at - sprites.values["x"].unsqueeze(-1)).reshape(-1, 1, 1, len(at))
    return right, (at - sprites.values["y"].unsqueeze(-1)).reshape(-1, len(at), 1)


def test_rotation_is_clockwise_in_radians(fine: Sprites) -> None:
    right, down = offsets(fine)
    ellipse = pictures(fine)[ELLIPSE]
    spread = [(ellipse * term).sum((-1, -2)) for term in (right**2, down**2, right * down)]
    angle = torch.atan2(2 * spread[2], spread[0] - spread[1]) / 2  # Of the long axis.
    expected = fine.values["rotation"].reshape(-1, 1, 1)
    torch.testing.assert_close(angle, expected.expand_as(angle), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
def test_scale_is_the_radius_of_the_outer_circle(fine: Sprites, shape: int) -> None:
    right, down = offsets(fine)
    lit = pictures(fine)[shape] > 0
    reach = torch.where(lit, torch.hypot(right, down), 0.0).amax((-1, -2))
    expected = fine.values["scale"].reshape(-1, 1, 1, 1)
    # A pixel is lit if its centre is within half a pixel of the edge.
    torch.testing.assert_close(reach, expected.expand_as(reach), atol=1.5 / 96, rtol=0)


def test_heart_stands_on_its_tip(fine: Sprites) -> None:
    right, down = offsets(fine)
    heart = pictures(fine)[HEART, :, 0]
    width = [(heart * ((down > low) & (down < low + 0.02))).sum((-1, -2)) for low in (-0.1, 0.1)]
    assert (width[0] > 1.5 * width[1]).all()


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
def test_upright_sprites_are_mirrored_with_their_place(default: Sprites, shape: int) -> None:
    upright = pictures(default)[shape, :, 0]
    torch.testing.assert_close(upright.flip(-1), upright.flip(1))  # Columns and x.
    if shape != HEART:
        torch.testing.assert_close(upright.flip(-2), upright.flip(2))


def inside(shape: int, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Whether points lie in a shape of radius 1, from its definition; v goes down."""
    if shape == SQUARE:
        return (u.abs() < 0.5**0.5) & (v.abs() < 0.5**0.5)
    if shape == ELLIPSE:
        return u**2 + (2 * v) ** 2 < 1
    half = 0.56066
    u, up = u / half, 0.36940 - v / half
    top = 0.5**0.5
    discs = torch.minimum(torch.hypot(u - top, up - top), torch.hypot(u + top, up - top)) < 1
    return (u.abs() + up.abs() < 2**0.5) | discs


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
def test_against_the_covered_part_of_each_pixel(default: Sprites, shape: int) -> None:
    scale, rotation, x, y = 2, 3, 4, 9
    fine = (torch.arange(20 * 30) + 0.5) / (20 * 30)
    right, down = fine - default.values["x"][x], fine.unsqueeze(-1) - default.values["y"][y]
    angle, radius = default.values["rotation"][rotation], default.values["scale"][scale]
    u = (right * angle.cos() + down * angle.sin()) / radius
    v = (down * angle.cos() - right * angle.sin()) / radius
    covered = inside(shape, u, v).double().reshape(20, 30, 20, 30).mean((1, 3))
    error = (pictures(default)[shape, scale, rotation, x, y] - covered).abs()
    assert error.max() < 0.2  # At corners; an edge of half a pixel is exact.
    assert error.mean() < 0.006


def test_one_of_everything_is_in_the_middle() -> None:
    sprites = draw_sprites(image_size=8, num_scales=1, num_rotations=1, num_positions=1)
    assert sprites.images.shape == (3, 64)
    assert sprites.values["x"].tolist() == sprites.values["y"].tolist() == [0.5]
    assert sprites.values["scale"].tolist() == pytest.approx([0.2])


def test_largest_sprites_stay_inside() -> None:
    sizes: dict[str, Any] = {"image_size": 32, "num_scales": 15, "num_rotations": 1}
    x = pictures(draw_sprites(**sizes, num_positions=15))[:, -1, 0, [0, -1]][:, :, [0, -1]]
    middle = draw_sprites(**sizes, num_positions=1)
    full = pictures(middle)[:, -1, 0].sum((-1, -2))
    torch.testing.assert_close(x.sum((-1, -2)), full.expand(3, 2, 2), rtol=0.01, atol=0)


# Split.


def test_split_holds_every_picture_once() -> None:
    sizes: dict[str, Any] = {"num_scales": 2, "num_rotations": 3, "num_positions": 5}
    whole = draw_sprites(**sizes)
    (x, factors), (x_test, factors_test) = load_sprites(**sizes, test_fraction=0.3)
    assert len(x_test) == len(factors_test) == 135
    rows = torch.cat([factors, factors_test])
    number = (rows * torch.tensor([150, 75, 25, 5, 1])).sum(-1)
    assert number.sort().values.tolist() == list(range(450))
    assert number.tolist() != sorted(number.tolist())
    assert torch.equal(torch.cat([x, x_test]), whole.images[number])


def test_split_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    (_, first), _ = load_sprites(num_positions=2, seed=1)
    torch.rand(3)
    (_, again), _ = load_sprites(num_positions=2, seed=1)
    (_, other), _ = load_sprites(num_positions=2, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.set_rng_state(state)
    load_sprites(num_positions=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_sprites_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        sprites = draw_sprites(num_positions=2)
    finally:
        torch.set_default_dtype(torch.float64)
    assert sprites.images.dtype == sprites.values["x"].dtype == torch.float32
    torch.testing.assert_close(sprites.images.double(), draw_sprites(num_positions=2).images)


def test_sprites_are_among_the_datasets() -> None:
    # By name: doctests may have imported the module a second time.
    assert datasets.load_sprites.__module__ == load_sprites.__module__
    assert "load_sprites" in datasets.__all__


@pytest.mark.parametrize("name", ["num_scales", "num_rotations", "num_positions"])
def test_too_few_values(name: str) -> None:
    numbers: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"draw_sprites: expected {name} >= 1, got 0"):
        draw_sprites(**numbers)


def test_too_few_pixels() -> None:
    with pytest.raises(ValueError, match="draw_sprites: expected image_size >= 8, got 7"):
        draw_sprites(image_size=7)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1e-6, math.nan])
def test_empty_part_of_the_split(fraction: float) -> None:
    with pytest.raises(ValueError, match="load_sprites: expected test_fraction to leave"):
        load_sprites(num_positions=2, test_fraction=fraction)
