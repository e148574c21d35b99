"""Linear observations of a latent, divided by a root of their noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Whitened"]


@dataclass(frozen=True, eq=False)
class Whitened:
    """A modality in units of its noise, which is factored once for all rows.

    Attributes:
        value: Data ``(batch, D_m)``, NaN where not observed.
        loc: Mean ``(D_m,)``.
        root: Lower triangular root of the noise covariance, or the roots of its diagonal.
        weight: Loadings ``(D_m, L)`` in units of the noise.
        log_det: Logarithm of the determinant of those units, 0-d.
    """

    value: Tensor
    loc: Tensor
    root: Tensor
    weight: Tensor
    log_det: Tensor

    @staticmethod
    def of(value: Tensor, loc: Tensor, weight: Tensor, noise: Tensor) -> "Whitened":
        """Factors the covariance of the noise, or its diagonal."""
        if noise.ndim == 1:
            root = scale = noise.sqrt()
            weight = weight / scale.unsqueeze(-1)
        else:
            root = torch.linalg.cholesky(noise)
            scale = root.diagonal()
            weight = torch.linalg.solve_triangular(root, weight, upper=False)
        return Whitened(value, loc, root, weight, scale.log().sum())

    def residual(self, rows: Tensor) -> Tensor:
        """Of these rows alone, ``(rows, D_m)``: NaN elsewhere would spread through gradients."""
        residual = self.value[rows] - self.loc
        if self.root.ndim == 1:
            return residual / self.root
        return torch.linalg.solve_triangular(self.root, residual.mT, upper=False).mT
