"""Directions in the latent space: an attribute of the data as a difference of codes."""

from collections.abc import Sequence
from typing import Any

import torch

from pyro_vae.label_checks import is_integer
from pyro_vae.latent_sites import Program
from pyro_vae.latent_walks import codes_at, mean_at, numbers

__all__ = ["attribute_vector", "move"]


def attribute_vector(
    guide: Program,
    x: Any,
    attribute: torch.Tensor,
    *args: Any,
    within: torch.Tensor | None = None,
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Mean code of the rows with an attribute minus the mean code of those without.

    What comes with the attribute in the data comes with it in the vector: where sevens are bold
    more often than ones, the vector of boldness leads from one to seven, too. With ``within`` it
    is the average over the classes of the difference in each class, as if rows were repeated
    until each class had as many with the attribute as without, and all classes as many.

    Args:
        guide: Any guide.
        x: One batch, ``(batch, *event)``.
        attribute: Which rows have it: bool, ``(batch,)``.
        *args: Further arguments of the guide, such as a class.
        within: The class of each row, integers ``(batch,)``.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of the guide.

    Returns:
        A direction, in the shape of one code. Codes are means of the guide's distributions, in a
        hierarchy given those of the latents before, or draws where a mean is not known.

    Raises:
        TypeError: If ``attribute`` does not hold bools, or ``within`` integers.
        ValueError: If they have not one entry for each row; if there are no rows with the
            attribute, or none without, in the data or in one of the classes; if the guide has no
            such latent, or several and no ``site``, or if it is discrete; if a plate draws its
            rows at random.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.nets import MLP
        >>> x, guide = torch.rand(50, 64), AmortizedNormal(MLP(64, [16], 2 * 3))
        >>> attribute_vector(guide, x, x.mean(-1) > 0.5).shape
        torch.Size([3])

    References:
        Larsen et al. (2016), Autoencoding beyond pixels using a learned similarity metric,
        https://arxiv.org/abs/1512.09300
        White (2016), Sampling generative networks, on attribute vectors with replication,
        https://arxiv.org/abs/1609.04468
    """
    codes, name, fn = codes_at(guide, (x, *args), kwargs, site, "attribute_vector")
    code = codes[name]
    rows = tuple(code.shape[: code.dim() - fn.event_dim])
    if not isinstance(attribute, torch.Tensor) or attribute.dtype != torch.bool:
        raise TypeError(
            f"attribute_vector: expected attribute to be a tensor of bools, got "
            f"{_kind(attribute)}. Compare with something, such as x.mean(-1) > 0.5."
        )
    classes = torch.zeros_like(attribute, dtype=torch.int64) if within is None else within
    if not isinstance(classes, torch.Tensor) or not is_integer(classes):
        raise TypeError(
            f"attribute_vector: expected within to be a tensor of integers, got {_kind(classes)}. "
            "Pass the class of each row."
        )
    if not attribute.shape == classes.shape == rows:
        raise ValueError(
            f"attribute_vector: expected one entry for each row, shape {rows}, got an attribute of "
            f"shape {tuple(attribute.shape)} and within of shape {tuple(classes.shape)}. Take both "
            "from the rows of x."
        )
    attribute, classes = attribute.to(code.device), classes.to(code.device)
    differences = []
    for label in classes.unique():
        here, there = code[(classes == label) & attribute], code[(classes == label) & ~attribute]
        if not len(here) or not len(there):
            place = "" if within is None else f" in class {int(label)}"
            raise ValueError(
                f"attribute_vector: expected rows with the attribute and rows without, got "
                f"{len(here)} with and {len(there)} without{place}. Choose another threshold, or "
                "leave such rows out."
            )
        differences.append(here.mean(0) - there.mean(0))
    return torch.stack(differences).mean(0)


def move(
    model: Program,
    guide: Program,
    x: Any,
    direction: torch.Tensor,
    amounts: Sequence[float] | torch.Tensor,
    *args: Any,
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Data as their code moves along a direction, and other latents stay.

    Args:
        model: Any model.
        guide: Its guide.
        x: One batch, ``(batch, *event)``.
        direction: Added to every code, in the shape of one code; see :func:`attribute_vector`.
        amounts: How many times; 0 is the reconstruction.
        *args: Further arguments of both programs, such as a class.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of both programs.

    Returns:
        Means of the data, ``(len(amounts), batch, *event)``.

    Raises:
        TypeError: If the direction is no tensor.
        ValueError: If there is no amount, or the direction has not the shape of one code; if the
            guide has no such latent, or several and no ``site``, or if it is discrete; if a code
            leaves the support; if not exactly one site is observed, or a plate draws its rows at
            random.

    Example:
        >>> from pyro_vae.guides import ExactLinearGaussian
        >>> from pyro_vae.models import LinearGaussian
        >>> model = LinearGaussian(data_dim=64, latent_dim=2)
        >>> pair, x = (model, ExactLinearGaussian(model)), torch.zeros(5, 64)
        >>> move(*pair, x, torch.tensor([1.0, 0.0]), [-1, 0, 1]).shape
        torch.Size([3, 5, 64])
    """
    steps = numbers("move", "amounts", amounts)
    if not isinstance(direction, torch.Tensor):
        raise TypeError(
            f"move: expected direction to be a tensor, got {type(direction).__name__}. Take one of "
            "attribute_vector, or convert it with torch.as_tensor(direction)."
        )
    codes, name, fn = codes_at(guide, (x, *args), kwargs, site, "move")
    if direction.shape != fn.event_shape:
        raise ValueError(
            f"move: expected a direction of shape {tuple(fn.event_shape)}, that of one code at "
            f"site '{name}', got {tuple(direction.shape)}. Take one of attribute_vector, for "
            "instance."
        )
    direction = direction.to(codes[name])
    moved = [{**codes, name: codes[name] + amount * direction} for amount in steps]
    return mean_at(model, moved, (x, *args), kwargs, "move", name)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
