"""What can be wrong with the input or a component of a Gaussian mixture, and what to do."""

import math

import torch
from torch import Tensor

from pyro_vae.baselines._data import as_data_matrix, constant_columns

__all__ = [
    "CollapsedComponentError",
    "check_components",
    "check_distinct_rows",
    "check_mixture_data",
    "remedy",
]

_EPS = torch.finfo(torch.float64).eps
_COVARIANCES = ("full", "diagonal", "spherical")


class CollapsedComponentError(ValueError):
    """A component lost its rows, or the rank of its covariance.

    Args:
        component: Index of the component.
        num_rows: Expected number of rows it explains.
        rank: Rank of its covariance.
    """

    def __init__(self, component: int, num_rows: float, rank: int) -> None:
        super().__init__(f"component {component} of rank {rank}, about {num_rows:.3g} rows")
        self.component = component
        self.num_rows = num_rows
        self.rank = rank


def check_components(data: Tensor, weights: Tensor, covariances: Tensor) -> None:
    """Raise unless every covariance has full rank, whatever the units of the columns.

    Args:
        data: Shape ``(N, D)``; the variances are compared with those of its columns.
        weights: Shape ``(K,)``, for the message.
        covariances: Shape ``(K, D, D)``, or ``(K, D)`` for diagonals.

    Raises:
        CollapsedComponentError: If a covariance is singular to working precision.
    """
    num_rows, num_columns = data.shape
    smallest = (num_rows * _EPS) ** 2 * data.var(0, correction=0)
    for component, covariance in enumerate(covariances):
        variances = covariance if covariance.ndim == 1 else covariance.diagonal()
        positive = variances > smallest
        rank = int(positive.sum())
        if covariance.ndim == 2 and rank:
            scale = variances[positive].sqrt()
            correlation = covariance[positive][:, positive] / scale / scale.unsqueeze(-1)
            eigenvalues = torch.linalg.eigvalsh(correlation)
            rank = int((eigenvalues > 4 * num_columns * _EPS * eigenvalues[-1]).sum())
        if rank < num_columns:
            raise CollapsedComponentError(component, num_rows * float(weights[component]), rank)


def check_mixture_data(x: object, covariance: str, min_variance: float, where: str) -> Tensor:
    """Convert the data, and check the arguments that every mixture fit has.

    Args:
        x: Data of shape ``(N, D)``.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        min_variance: Smallest eigenvalue allowed.
        where: Name of the calling function, for the error message.

    Returns:
        Float64 matrix of shape ``(N, D)``, not to be written to.

    Raises:
        TypeError: If ``x`` does not hold real numbers.
        ValueError: If an argument is out of range, the data are no finite matrix, or a column is
            constant without a floor on its variance.

    Example:
        >>> check_mixture_data([[1, 2], [3, 5]], "full", 0.0, "demo").shape
        torch.Size([2, 2])
    """
    if covariance not in _COVARIANCES:
        raise ValueError(
            f"{where}: expected `covariance` to be one of {_COVARIANCES}, got {covariance!r}. "
            'Pass for instance covariance="diagonal".'
        )
    if not 0.0 <= min_variance < math.inf:
        raise ValueError(
            f"{where}: expected a finite `min_variance` of at least 0, got {min_variance}. "
            "Pass for instance 1e-6 times the variance of the data."
        )
    data = as_data_matrix(x, where)
    constant = constant_columns(data)
    # A spherical covariance averages over the columns: one that varies is enough.
    harmless = covariance == "spherical" and len(constant) < data.shape[1]
    if constant and min_variance == 0.0 and not harmless:
        raise ValueError(
            f"{where}: expected every column of `x` to vary, got constant columns {constant}, "
            "whose likelihood is unbounded. Drop these columns or pass min_variance > 0."
        )
    return data


def check_distinct_rows(data: Tensor, num_components: int, where: str) -> None:
    """Raise unless there is a distinct row for every component.

    Args:
        data: Shape ``(N, D)``.
        num_components: Number of components K.
        where: Name of the calling function, for the error message.

    Raises:
        ValueError: If there are fewer distinct rows than components.

    Example:
        >>> check_distinct_rows(torch.tensor([[1.0], [1.0], [2.0]]), 2, "demo")
    """
    # The first rows nearly always settle it, without sorting all of them.
    for rows in (data[: 8 * num_components], data):
        num_distinct = len(torch.unique(rows, dim=0))
        if num_distinct >= num_components:
            return
    raise ValueError(
        f"{where}: expected at least num_components = {num_components} distinct rows in `x`, "
        f"got {num_distinct}. Use fewer components."
    )


def remedy(covariance: str, min_variance: float) -> str:
    """Say what to do about a singular covariance.

    Args:
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        min_variance: Smallest eigenvalue allowed.

    Returns:
        One sentence.

    Example:
        >>> remedy("diagonal", 0.0)
        'Pass min_variance > 0.'
    """
    fix = "Pass min_variance > 0" if min_variance == 0.0 else f"Raise min_variance = {min_variance}"
    return fix + (' or covariance="diagonal".' if covariance == "full" else ".")
