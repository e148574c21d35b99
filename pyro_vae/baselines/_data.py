"""What every baseline does with its data matrix before any fitting: check, convert, centre."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_data_matrix", "check_integer", "constant_columns", "covariance_root"]


def as_data_matrix(x: object, where: str, name: str = "x") -> Tensor:
    """Convert the data to a float64 matrix that shares no gradient with the caller.

    Args:
        x: Tensor, array or nested sequence of real numbers, shape ``(num_rows, num_columns)``.
        where: Name of the calling function, for the error message.
        name: Name of the argument, for the error message.

    Returns:
        Detached float64 tensor of the same shape, on the device of ``x``. It may share
        memory with ``x`` and must not be written to.

    Raises:
        TypeError: If ``x`` does not hold real numbers.
        ValueError: If ``x`` is no matrix of at least two rows, or is not finite, or so large or
            small throughout that its squares leave the range of float64.

    Example:
        >>> as_data_matrix([[1, 2], [3, 4]], "demo").dtype
        torch.float64
    """
    try:
        data = x.detach() if isinstance(x, Tensor) else torch.tensor(np.asarray(x))
    except (TypeError, ValueError, RuntimeError) as err:
        raise TypeError(
            f"{where}: expected `{name}` to be a tensor or an array of numbers, "
            f"got {type(x).__name__}. Convert it with torch.as_tensor first."
        ) from err
    if data.is_complex():
        raise TypeError(
            f"{where}: expected `{name}` to be real, got {data.dtype}. "
            f"Pass torch.view_as_real({name}).flatten(1) to model both parts."
        )
    if data.ndim != 2 or data.shape[1] == 0:
        raise ValueError(
            f"{where}: expected `{name}` of shape (num_rows, num_columns), got "
            f"{tuple(data.shape)}. Make one row of each example, for instance with "
            f"{name}.flatten(1)."
        )
    if data.shape[0] < 2:
        raise ValueError(
            f"{where}: expected at least 2 rows in `{name}`, got {data.shape[0]}. "
            "A variance cannot be estimated from less; pass more data."
        )
    data = data.to(torch.float64)
    num_bad = int(data.numel() - torch.isfinite(data).sum())
    if num_bad:
        num_nan = int(torch.isnan(data).sum())
        raise ValueError(
            f"{where}: expected `{name}` to be finite, got {num_nan} NaN and {num_bad - num_nan} "
            f"infinite of {data.numel()} entries. Drop or impute them first."
        )
    largest = float(data.abs().max())
    if largest > 1e150 or 0.0 < largest < 1e-150:
        raise ValueError(
            f"{where}: expected entries of `{name}` whose squares float64 can hold, got "
            f"{largest:.3g} as the largest magnitude. Rescale the data."
        )
    return data


def check_integer(value: int, name: str, low: int, high: int | None, where: str, fix: str) -> None:
    """Raise unless ``value`` is an integer between ``low`` and ``high``, both included.

    Args:
        value: The argument to check.
        name: Its name, for the error message.
        low: Smallest allowed value.
        high: Largest allowed value, or None for no limit.
        where: Name of the calling function, for the error message.
        fix: One sentence that says what to do.

    Raises:
        TypeError: If ``value`` is no integer.
        ValueError: If ``value`` is out of range.

    Example:
        >>> check_integer(2, "latent_dim", 1, 3, "demo", "Use fewer.")
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: expected an integer `{name}`, got {type(value).__name__}. {fix}")
    if value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{where}: expected `{name}` {limits}, got {value}. {fix}")


def constant_columns(data: Tensor) -> list[int]:
    """List the columns that hold one single value.

    Args:
        data: Shape ``(num_rows, num_columns)``.

    Returns:
        Indices of the constant columns, ascending.

    Example:
        >>> constant_columns(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))
        [0]
    """
    columns: list[int] = (data == data[0]).all(0).nonzero().flatten().tolist()
    return columns


def covariance_root(data: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce the data to its mean and a square root of its covariance.

    For the Gaussian baselines this pair is a sufficient statistic. The root is kept instead
    of the covariance because squaring would lose half of the digits of the small eigenvalues.

    Args:
        data: Float64 matrix of shape ``(num_rows, num_columns)``.

    Returns:
        ``loc`` of shape ``(num_columns,)``, and ``root`` of shape
        ``(min(num_rows, num_columns), num_columns)`` for which ``root.mT @ root`` is the
        maximum likelihood covariance (divided by ``num_rows``).

    Example:
        >>> loc, root = covariance_root(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
        >>> loc
        tensor([2., 1.])
        >>> bool(torch.allclose((root.mT @ root)[0, 0], torch.tensor(8.0 / 3.0)))
        True
    """
    # Subtracting a row first makes duplicates and constant columns cancel to exact zeros.
    shifted = data - data[0]
    offset = shifted.mean(0)
    root = (shifted - offset) / data.shape[0] ** 0.5
    if data.shape[0] > data.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return data[0] + offset, root
