"""Messages for class labels that cannot be right."""

from typing import Any

import torch

__all__ = ["check_labels", "is_integer"]


def is_integer(y: torch.Tensor) -> bool:
    """Whether a tensor holds integers; truth values are none."""
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def check_labels(
    where: str,
    name: str,
    y: Any,
    num_classes: int,
    *,
    num_rows: int | None = None,
    labelled: torch.Tensor | None = None,
) -> None:
    """Raises unless ``y`` holds classes 0 ... C-1.

    Args:
        where: The function that asks, for the messages.
        name: What the argument is called there.
        y: Labels; with ``num_rows`` of shape ``(num_rows,)``, else of any shape.
        num_classes: C.
        num_rows: How many rows of data there are.
        labelled: bool, ``(num_rows,)``: the rows whose labels count; all by default.
    """
    if not isinstance(y, torch.Tensor):
        raise TypeError(
            f"{where}: expected {name} to be a tensor of integers, got {type(y).__name__}. "
            f"Convert it with torch.as_tensor({name})."
        )
    if not is_integer(y):
        one_hot = y.dim() > 0 and y.shape[-1] == num_classes and num_classes > 1
        fix = f"{name}.argmax(-1) turns one-hot rows" if one_hot else f"{name}.long() turns them"
        raise TypeError(
            f"{where}: expected {name} of integers, classes 0 ... {num_classes - 1}, got "
            f"{y.dtype}. {fix} into classes."
        )
    if num_rows is not None and tuple(y.shape) != (num_rows,):
        raise ValueError(
            f"{where}: expected {name} of shape ({num_rows},), one class for each row, got "
            f"{tuple(y.shape)}. For one-hot rows use {name}.argmax(-1)."
        )
    if labelled is not None:
        _check_labelled(where, labelled, y)
    classes = y.long()  # Not all types can be compared.
    wrong = (classes < 0) | (classes >= num_classes)
    if labelled is not None:
        wrong = wrong & labelled
    if wrong.any():
        bad = classes[wrong]
        raise ValueError(
            f"{where}: expected classes 0 ... {num_classes - 1} in {name}, got {int(bad[0])}. "
            "Number the classes from 0, and mark rows without a label by labelled=False."
        )


def _check_labelled(where: str, labelled: Any, y: torch.Tensor) -> None:
    if not isinstance(labelled, torch.Tensor) or labelled.dtype != torch.bool:
        got = getattr(labelled, "dtype", type(labelled).__name__)
        raise TypeError(
            f"{where}: expected labelled to be a bool tensor, got {got}. True marks the rows "
            "whose label is known."
        )
    if labelled.shape != y.shape:
        raise ValueError(
            f"{where}: expected labelled of shape {tuple(y.shape)} as the labels, got "
            f"{tuple(labelled.shape)}. It has one entry for each row."
        )
