"""Small grey pictures of one shape each, drawn from known factors: data for disentanglement."""

import math
from dataclasses import dataclass

import torch

from pyro_vae.checks import check_at_least

__all__ = ["SPRITE_FACTORS", "SPRITE_SHAPES", "Sprites", "draw_sprites", "load_sprites"]

Split = tuple[torch.Tensor, torch.Tensor]

SPRITE_FACTORS = ("shape", "scale", "rotation", "x", "y")
"""What the columns of the factors mean."""

SPRITE_SHAPES = ("square", "ellipse", "heart")
"""What the values of the first factor mean."""

# All lengths in widths of the picture.
_RADII = 0.14, 0.26
_CENTERS = 0.26, 0.74  # The largest sprite then just stays inside.


@dataclass(frozen=True)
class Sprites:
    """Every combination of the factors, in lexicographic order, the last factor fastest.

    Attributes:
        images: Grey values in [0, 1], shape ``(N, image_size ** 2)``, rows of pixels from the top.
        factors: Index of the value of each factor, int64 of shape ``(N, 5)``.
        values: The values of each factor, by name and in the order of the index: the shape's
            number in ``SPRITE_SHAPES``; the radius of the circle around the sprite ("scale") and
            its centre from the left and the top ("x", "y"), in widths of the picture; the
            clockwise rotation in radians.
    """

    images: torch.Tensor
    factors: torch.Tensor
    values: dict[str, torch.Tensor]


def load_sprites(
    *,
    image_size: int = 20,
    num_scales: int = 4,
    num_rotations: int = 10,
    num_positions: int = 12,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Split, Split]:
    """Pictures of :func:`draw_sprites` in random order, split in two; needs no network.

    Args:
        image_size: Pixels on each side.
        num_scales: Number of sizes.
        num_rotations: Number of angles.
        num_positions: Number of places along each axis.
        test_fraction: Part of the combinations held out.
        seed: Seed of order and split; the global random state is not touched.

    Returns:
        ``((x_train, factors_train), (x_test, factors_test))``: images ``(N, image_size ** 2)`` in
        [0, 1] of the default dtype, factors ``(N, 5)`` of int64, columns as in ``SPRITE_FACTORS``.

    Raises:
        ValueError: If a size or number is too small, or a part of the split would be empty.

    Example:
        >>> (x_train, factors_train), (x_test, factors_test) = load_sprites()
        >>> x_train.shape, factors_train.shape, x_test.shape
        (torch.Size([13824, 400]), torch.Size([13824, 5]), torch.Size([3456, 400]))
    """
    sprites = draw_sprites(
        image_size=image_size,
        num_scales=num_scales,
        num_rotations=num_rotations,
        num_positions=num_positions,
    )
    num_rows = len(sprites.images)
    num_test = round(test_fraction * num_rows) if 0 < test_fraction < 1 else 0
    if not 0 < num_test < num_rows:
        raise ValueError(
            f"load_sprites: expected test_fraction to leave pictures on both sides, got "
            f"{test_fraction} of {num_rows}. 0.2 holds out every fifth picture."
        )
    check_at_least("load_sprites", "seed", seed, 0)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    test, train = order.split([num_test, num_rows - num_test])
    images, factors = sprites.images, sprites.factors
    return (images[train], factors[train]), (images[test], factors[test])


def draw_sprites(
    *,
    image_size: int = 20,
    num_scales: int = 4,
    num_rotations: int = 10,
    num_positions: int = 12,
) -> Sprites:
    """Draws a square, an ellipse and a heart in every size, angle and place: 17,280 pictures.

    The factors are those of dSprites, with one difference: rotations lie in [0, 90) degrees,
    because a square looks the same after 90, so that no two combinations give the same picture.
    Edges are smoothed over one pixel, so moves of a fraction of a pixel are seen.

    Args:
        image_size: Pixels on each side, at least 8; from 16 on all factors are plain to the eye.
        num_scales: Number of sizes, evenly spaced.
        num_rotations: Number of angles, evenly spaced from 0.
        num_positions: Number of places along each axis, evenly spaced; the sprite stays inside.

    Returns:
        Pictures of the default dtype and their factors.

    Example:
        >>> sprites = draw_sprites(num_scales=2, num_rotations=3, num_positions=4)
        >>> sprites.images.shape, sprites.factors[-1], sprites.values["x"]
        (torch.Size([288, 400]), tensor([2, 1, 2, 3, 3]), tensor([0.3200, 0.4400, 0.5600, 0.6800]))

    References:
        Matthey et al. (2017), dSprites: disentanglement testing sprites dataset,
        https://github.com/google-deepmind/dsprites-dataset
    """
    numbers = {"num_scales": num_scales, "num_rotations": num_rotations}
    for name, value in {**numbers, "num_positions": num_positions}.items():
        check_at_least("draw_sprites", name, value, 1)
    check_at_least("draw_sprites", "image_size", image_size, 8)
    values = {
        "shape": torch.arange(3.0, dtype=torch.float64),
        "scale": _between(*_RADII, num_scales),
        "rotation": torch.arange(num_rotations, dtype=torch.float64) * math.pi / 2 / num_rotations,
        "x": _between(*_CENTERS, num_positions),
        "y": _between(*_CENTERS, num_positions),
    }
    indices = [torch.arange(len(values[name])) for name in SPRITE_FACTORS]
    dtype = torch.get_default_dtype()
    return Sprites(
        images=torch.cat([_draw(shape, values, image_size) for shape in range(3)]).to(dtype),
        factors=torch.cartesian_prod(*indices),
        values={name: value.to(dtype) for name, value in values.items()},
    )


def _between(low: float, high: float, num: int) -> torch.Tensor:
    """The midpoints of ``num`` equal parts of an interval."""
    return low + (high - low) * (torch.arange(num, dtype=torch.float64) + 0.5) / num


def _draw(shape: int, values: dict[str, torch.Tensor], image_size: int) -> torch.Tensor:
    """All pictures of one shape, ``(N / 3, pixels)``."""
    pixel = (torch.arange(image_size, dtype=torch.float64) + 0.5) / image_size
    # Dimensions: scale, rotation, x, y, row, column.
    radius = values["scale"].reshape(-1, 1, 1, 1, 1, 1)
    angle = values["rotation"].reshape(-1, 1, 1, 1, 1)
    right = (pixel - values["x"].unsqueeze(-1)).reshape(-1, 1, 1, image_size)
    down = (pixel - values["y"].unsqueeze(-1)).reshape(-1, image_size, 1)
    u = (right * angle.cos() + down * angle.sin()) / radius
    v = (down * angle.cos() - right * angle.sin()) / radius
    distance = (_square, _ellipse, _heart)[shape](u, v) * radius
    return (0.5 - distance * image_size).clamp_(0, 1).flatten(-2).flatten(0, -2)


# Signed distances to the edge, negative inside, of shapes whose outer circle has radius 1.


def _square(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(u.abs(), v.abs()) - math.sqrt(0.5)


def _ellipse(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """To first order, (|p| - 1) / |gradient of |p||, where p are the axes' coordinates."""
    height = 0.5
    p = torch.hypot(u, v / height)
    slope = torch.hypot(u, v / height**2) / p
    return torch.where(p > 0, (p - 1) / slope, -height)


def _heart(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A square on its corner, with half a disc on each of its two upper sides."""
    root = math.sqrt(2)
    # In half sides of the square: where the outer circle is, above the middle of the square.
    middle = (2 * root - 2) / (3 * root - 2)
    radius = middle + root
    up = middle - v * radius
    p, q = (up + u * radius) / root, (up - u * radius) / root
    square = torch.maximum(p.abs(), q.abs()) - 1
    discs = torch.minimum(torch.hypot(p - 1, q), torch.hypot(p, q - 1)) - 1
    return torch.minimum(square, discs) / radius
