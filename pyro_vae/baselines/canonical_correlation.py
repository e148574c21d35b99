"""Canonical correlation analysis of two views, classical and probabilistic, in closed form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.baselines._data import as_data_matrix, check_integer, covariance_root
from pyro_vae.baselines.multimodal_linear_gaussian import MultimodalLinearGaussian
from pyro_vae.checks import check_data

__all__ = ["CanonicalCorrelation", "canonical_correlation"]

_WHERE = "canonical_correlation"

# A standard deviation below this fraction of the largest is taken for zero. The covariance of the
# noise, whose condition number is its inverse square, then keeps at least four digits.
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True, eq=False)
class CanonicalCorrelation:
    """Canonical correlations and directions of two views, and the model they belong to, float64.

    Args:
        correlations: The L largest canonical correlations, descending, shape ``(L,)``.
        directions: The matrix that projects each view, shape ``(D_m, L)``. On the training data
            the projections have mean 0, variance 1 (divided by N), and no correlation
            but those between equal columns of the two views.
        fit: Probabilistic canonical correlation analysis, by maximum likelihood.

    Example:
        >>> x = torch.randn(100, 3)
        >>> cca = canonical_correlation(x, x[:, :2] + torch.randn(100, 2), latent_dim=1)
        >>> cca.project({"x": x})["x"].shape, cca.fit.predict({"x": x}, "y").shape
        (torch.Size([100, 1]), torch.Size([100, 2]))
    """

    correlations: Tensor
    directions: Mapping[str, Tensor]
    fit: MultimodalLinearGaussian

    def project(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the canonical variates of the views that are given.

        Args:
            batch: Values of shape ``(N, D_m)`` by view, any real dtype.

        Returns:
            Shape ``(N, L)`` by view.

        Raises:
            TypeError: If a value is no tensor.
            ValueError: If the name of a view is unknown, or its shape does not fit.
        """
        where, projections = "CanonicalCorrelation.project", {}
        for name, value in batch.items():
            if name not in self.directions:
                raise ValueError(
                    f"{where}: expected views among {list(self.directions)}, got {name!r}. "
                    "Use the names that canonical_correlation was given."
                )
            direction, loc = self.directions[name], self.fit.loc[name]
            check_data(where, f"batch['{name}']", value, tuple(loc.shape))
            projections[name] = (value.to(loc) - loc) @ direction
        return projections


def canonical_correlation(
    x: Tensor,
    y: Tensor,
    latent_dim: int,
    *,
    regularization: float = 0.0,
    names: tuple[str, str] = ("x", "y"),
) -> CanonicalCorrelation:
    r"""Fit canonical correlation analysis and its probabilistic model, in closed form.

    With the covariances factored as :math:`\Sigma_m = R_m^\top R_m`, the singular value
    decomposition :math:`R_x^{-\top} \Sigma_{xy} R_y^{-1} = V_x P V_y^\top` has the canonical
    correlations in P, and the directions are :math:`U_m = R_m^{-1} V_m`. The likelihood of
    z ~ N(0, I), x_m ~ N(loc_m + W_m z, Psi_m) with full noise covariances is largest at
    :math:`W_m = \Sigma_m U_m P^{1/2}` and :math:`\Psi_m = \Sigma_m - W_m W_m^\top`, with the first
    L columns of U and P. Correlations and directions come from QR decompositions of the
    data, which are never squared. The covariances divide by N.

    Args:
        x: First view, shape ``(N, D_x)``, any real dtype; computed in float64.
        y: Second view, shape ``(N, D_y)``; row n of both is one datum.
        latent_dim: Number of latents L, from 1 to the smaller of D_x and D_y, where the model
            reaches every joint covariance.
        regularization: Added to the variance of every column of both views, in squared units of
            the data, 0 or more. The answers are then those for the enlarged covariances.
        names: What to call the two views in the result.

    Returns:
        Correlations, directions and fit. The largest entry of each direction of the first view
        is positive. The loadings are unique up to a rotation of the latents, and up to a share
        of P between the views: here each takes the root.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a view is no finite matrix, the numbers of rows differ, an argument is out
            of range, or the likelihood is unbounded: the covariance of a view is singular, or a
            canonical correlation is 1.

    Example:
        >>> z = torch.randn(500, 1)
        >>> x, y = z + torch.randn(500, 3), z + torch.randn(500, 2)
        >>> cca = canonical_correlation(x, y, latent_dim=1, names=("image", "sound"))
        >>> batch = {"image": x, "sound": None}
        >>> cca.fit.log_prob(batch).shape, cca.fit.predict(batch, "sound").shape
        (torch.Size([500]), torch.Size([500, 2]))

    References:
        Hotelling 1936, "Relations between two sets of variates",
        https://doi.org/10.1093/biomet/28.3-4.321; Bach and Jordan 2005, "A probabilistic
        interpretation of canonical correlation analysis", Technical Report 688, University of
        California, Berkeley, theorem 2, with M_1 = M_2 = P^(1/2); Vinod 1976, "Canonical ridge
        and econometrics of joint production", for the regularization.
    """
    _check_names(names)
    views = [as_data_matrix(x, _WHERE), as_data_matrix(y, _WHERE, "y")]
    _check_sizes(views, latent_dim, regularization)
    loc, root = covariance_root(torch.cat(views, 1))
    widths = [view.shape[1] for view in views]
    factors = [_factor(part, regularization) for part in root.split(widths, 1)]
    for name, (_, upper) in zip(names, factors, strict=True):
        _check_rank(name, upper, regularization)
    (orthogonal_x, _), (orthogonal_y, _) = factors
    left, correlations, right = torch.linalg.svd(
        orthogonal_x.mT @ orthogonal_y, full_matrices=False
    )
    correlations = correlations[:latent_dim]
    bases = [left[:, :latent_dim], right[:latent_dim].mT]
    directions, weights, noise = {}, {}, {}
    for name, basis, (_, upper) in zip(names, bases, factors, strict=True):
        directions[name] = torch.linalg.solve_triangular(upper, basis, upper=True)
        weights[name] = upper.mT @ (basis * correlations.sqrt())
        # I - basis shrink basis' is the symmetric root of I - basis P basis'.
        shrink = 1 - (1 - correlations.clamp(max=1.0)).sqrt()
        noise_root = upper - (basis * shrink) @ (basis.mT @ upper)
        _check_noise(name, noise_root, upper, float(correlations[0]), regularization)
        covariance = noise_root.mT @ noise_root
        noise[name] = 0.5 * (covariance + covariance.mT)
    first = directions[names[0]].mT
    sign = first.gather(-1, first.abs().argmax(-1, keepdim=True)).sign().squeeze(-1)
    directions = {name: direction * sign for name, direction in directions.items()}
    weights = {name: weight * sign for name, weight in weights.items()}
    locs = dict(zip(names, loc.split(widths), strict=True))
    return CanonicalCorrelation(
        correlations, directions, MultimodalLinearGaussian(locs, weights, noise)
    )


def _factor(root: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    """Q and R of a covariance root ``(rows, D)``, with the ridge below it; Q without its rows."""
    ridge = math.sqrt(regularization) * torch.eye(
        root.shape[1], dtype=root.dtype, device=root.device
    )
    orthogonal, upper = torch.linalg.qr(torch.cat([root, ridge]))
    return orthogonal[: len(root)], upper


def _remedy(upper: Tensor, regularization: float) -> str:
    """What to pass for a regularization: a thousandth of the mean variance, or ten times more."""
    variance = float(upper.square().sum()) / upper.shape[1]
    enough = max(1e-3 * variance, 10 * regularization) or 1.0
    return f"pass regularization={enough:.2g} or more"


def _check_rank(name: str, upper: Tensor, regularization: float) -> None:
    """Raise if the covariance of a view is singular, whatever the units of its columns."""
    length = upper.norm(dim=0)
    singular_values = torch.linalg.svdvals(upper / torch.where(length > 0, length, 1.0))
    rank = int((singular_values > _SMALLEST_DEVIATION * singular_values[0]).sum())
    if rank < upper.shape[1]:
        raise ValueError(
            f"{_WHERE}: expected a regular covariance of view '{name}', got rank {rank} from "
            f"{upper.shape[1]} columns: some are constant or follow from others, as the last of "
            "one-hot labels does, or there are too few rows. Drop such columns, or "
            f"{_remedy(upper, regularization)}."
        )


def _check_noise(
    name: str, noise_root: Tensor, upper: Tensor, correlation: float, regularization: float
) -> None:
    """Raise if the other view predicts some direction of a view exactly."""
    relative = torch.linalg.svdvals(noise_root / upper.norm(dim=0))
    if relative[-1] <= _SMALLEST_DEVIATION * relative[0]:
        raise ValueError(
            f"{_WHERE}: expected canonical correlations below 1, got {correlation:.10g}, which "
            f"leaves no noise in a direction of view '{name}' and makes the likelihood infinite. "
            f"Pass more rows, drop the columns that both views share, or "
            f"{_remedy(upper, regularization)}."
        )


def _check_names(names: tuple[str, str]) -> None:
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise ValueError(
            f"{_WHERE}: expected two different names, got {names!r}. "
            'Pass one for each view, as in names=("image", "label").'
        )


def _check_sizes(views: list[Tensor], latent_dim: int, regularization: float) -> None:
    lengths = [len(view) for view in views]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"{_WHERE}: expected as many rows in `x` as in `y`, got {lengths[0]} and {lengths[1]}. "
            "Row n of both is one datum; leave out rows that lack a view."
        )
    fix = "There are no more canonical correlations than columns in the narrower view."
    high = min(view.shape[1] for view in views)
    check_integer(latent_dim, "latent_dim", 1, high, _WHERE, fix)
    if isinstance(regularization, bool) or not isinstance(regularization, int | float):
        raise TypeError(
            f"{_WHERE}: expected a number `regularization`, got {type(regularization).__name__}. "
            "Pass 0.0 or a variance in squared units of the data."
        )
    if not 0 <= regularization < math.inf:
        raise ValueError(
            f"{_WHERE}: expected `regularization` of at least 0 and finite, got {regularization}. "
            "Pass 0.0 or a variance in squared units of the data."
        )
