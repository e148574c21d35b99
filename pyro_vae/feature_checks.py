"""What the encoder of a guide made from a model is given, and returns; messages about both."""

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from pyro.distributions.util import is_validation_enabled
from torch.utils._pytree import tree_flatten, tree_leaves

from pyro_vae.checks import NOT_FINITE_FIX
from pyro_vae.structure import DataPlate

__all__ = ["check_features", "check_rows", "form_of", "refuse_empty"]


def refuse_empty(
    where: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raises if a tensor among the arguments is empty, by its name in the model's signature."""
    try:
        program = model.forward if isinstance(model, torch.nn.Module) else model
        named = inspect.signature(program).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        named = {"the arguments": (args, kwargs)}
    for name, value in named.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
                raise ValueError(
                    f"{where}: expected at least one row in {name}, got an empty batch of shape "
                    f"{tuple(leaf.shape)}. Leave empty batches out."
                )


def check_features(where: str, features: Any, width: int | None) -> None:
    """Raises unless ``features`` are finite floats ``(batch, width)``; ``None`` is any width."""
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(
            f"{where}: expected an encoder that returns a tensor of floats, got {got}. "
            "Return features (batch, width); the heads turn them into distributions."
        )
    if features.dim() != 2 or features.shape[1] != (width or features.shape[1]):
        wanted = "width" if width is None else width
        raise ValueError(
            f"{where}: expected features of shape (batch, {wanted}), got {tuple(features.shape)}. "
            "Let the encoder end with flatten(1), and with the same width for all data."
        )
    if is_validation_enabled() and not features.isfinite().all():
        num = int((~features.isfinite()).sum())
        raise ValueError(
            f"{where}: expected finite features, got {num} that are not. Look at the encoder and "
            f"at the data. {NOT_FINITE_FIX}"
        )


def check_rows(where: str, features: torch.Tensor, data: DataPlate) -> None:
    """Raises unless there are features for each row of the data plate, or to draw them from."""
    sizes = [data.size, data.full_size] if data.rows == "drawn" else [data.size]
    if len(features) not in sizes:
        raise ValueError(
            f"{where}: expected features of {' or '.join(map(str, sizes))} rows, those of plate "
            f"'{data.name}', got shape {tuple(features.shape)}. The encoder has to encode the rows "
            "that the model observes; pass plate= if it is another plate."
        )


def form_of(args: Any, kwargs: Any, features: torch.Tensor) -> Hashable:
    """What of the arguments may change sites, sizes and supports: of tensors, single numbers."""
    leaves, tree = tree_flatten((args, kwargs))
    return (
        len(features),
        str(tree),
        tuple(
            (tuple(leaf.shape), leaf.item() if leaf.dim() == 0 else None)
            if isinstance(leaf, torch.Tensor)
            else (type(leaf), leaf if isinstance(leaf, int | float | str | None) else None)
            for leaf in leaves
        ),
    )
