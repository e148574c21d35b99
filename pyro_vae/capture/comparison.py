"""Whether a graph computes the numbers of the program it was captured from."""

from collections.abc import Iterable
from typing import Any

import torch

from pyro_vae.capture.errors import CaptureError

__all__ = ["compare", "precision_of", "size_of"]

# Compilers sum in another order. Relative to the largest element.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4}
_TOLERANCE_OF_SHORT_FLOATS = 2e-2


def precision_of(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The shortest floating-point type among tensors, which bounds the precision of results."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    # Where there are others, 0-d tensors do not decide the type of a result.
    kinds = {tensor.dtype for tensor in [t for t in floats if t.dim()] or floats}
    return min(kinds, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float64)


def size_of(tensor: torch.Tensor) -> float:
    """The largest finite absolute value, 0 if there is none."""
    values = tensor.detach().double()
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def compare(
    name: str, actual: Any, wanted: Any, precision: torch.dtype, context: float = 0.0
) -> None:
    """Compares a result of a graph with that of the program.

    Args:
        name: What it is, for the message.
        actual: The graph's.
        wanted: The program's.
        precision: That of the arithmetic.
        context: Size of what it was computed beside: a gradient that is zero but for rounding
            is as large as the rounding of the others.

    Raises:
        CaptureError: If they are not the same numbers up to rounding.
    """
    actual, wanted = torch.as_tensor(actual).detach(), torch.as_tensor(wanted).detach()
    if actual.shape != wanted.shape:
        shapes = f"{tuple(actual.shape)} and {tuple(wanted.shape)}"
        raise CaptureError(f"{name} has different shapes in the graph and in the program, {shapes}")
    tolerance, size = 0.0, 0.0
    if wanted.is_floating_point():
        size = size_of(wanted)
        relative = _TOLERANCES.get(precision, _TOLERANCE_OF_SHORT_FLOATS)
        tolerance = relative * (size + 1e-2 * context)
    actual, wanted = actual.double(), wanted.double()
    same = ((actual - wanted).abs() <= tolerance) | (actual == wanted)
    if not (same | (actual.isnan() & wanted.isnan())).all():
        raise CaptureError(
            f"{name} is not what the program computes with the same random numbers: it differs "
            f"by {size_of(actual - wanted):.3g}, its size is {size:.3g}"
        )
