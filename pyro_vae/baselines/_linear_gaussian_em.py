"""The EM fit behind probabilistic PCA and factor analysis, which differ in the noise only."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.baselines._data import check_integer, covariance_root
from pyro_vae.baselines._em import run_em
from pyro_vae.baselines.linear_gaussian import LinearGaussianFit, posterior_factors

__all__ = ["check_latent_dim", "linear_gaussian_em"]


def check_latent_dim(latent_dim: int, num_columns: int, where: str) -> None:
    """Raise unless there are at least one latent and fewer latents than columns.

    Args:
        latent_dim: Number of latents L.
        num_columns: Number of columns D of the data.
        where: Name of the calling function, for the error message.

    Raises:
        TypeError: If ``latent_dim`` is no integer.
        ValueError: If it is out of range, or if the data have one column only.

    Example:
        >>> check_latent_dim(2, 5, "demo")
    """
    if num_columns < 2:
        raise ValueError(
            f"{where}: expected at least 2 columns in `x`, got {num_columns}. "
            "One column has no latent structure; use baselines.gaussian."
        )
    fix = "Without latents the model is baselines.gaussian; with one per column it is not unique."
    check_integer(latent_dim, "latent_dim", 1, num_columns - 1, where, fix)


def linear_gaussian_em(
    data: Tensor,
    start: Callable[[Tensor], tuple[Tensor, Tensor]],
    constrain: Callable[[Tensor], Tensor],
    *,
    num_steps: int,
    tolerance: float,
) -> LinearGaussianFit:
    """Fit by EM on the square root of the covariance, in O(min(N, D) D L) a step.

    Args:
        data: Checked float64 matrix, shape ``(N, D)``.
        start: Maps the covariance root to the first weight and noise variance.
        constrain: Maps the noise variance of each column, shape ``(D,)``, to the constrained
            one that maximises the same expected log-likelihood.
        num_steps: Largest number of steps.
        tolerance: Stop after a step that gains less, in nats per datum.

    Returns:
        The fit.

    References:
        Rubin and Thayer 1982, "EM algorithms for ML factor analysis"; Tipping and Bishop 1999,
        "Probabilistic principal component analysis", appendix B. Both steps are the same maths
        as there, in square-root form.
    """
    loc, root = covariance_root(data)
    num_columns = data.shape[1]

    def e_step(params: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weight, noise_variance = params
        gain, scale_tril = posterior_factors(weight, noise_variance)
        z = root @ gain.mT
        residual = (root - z @ weight.mT).square().sum(0)
        log_det = noise_variance.log().sum() - 2 * scale_tril.diagonal().log().sum()
        quadratic = (residual / noise_variance).sum() + z.square().sum()
        constant = num_columns * math.log(2 * math.pi)
        # The rows of `root` and z stand for the data: E[z z'] = z.mT @ z + scale_tril @ scale_tril'
        # is the square of this stack, and E[z x'] is z.mT @ root.
        return torch.cat([z, scale_tril.mT]), -0.5 * (quadratic + log_det + constant)

    def m_step(stack: Tensor) -> tuple[Tensor, Tensor]:
        # E|x - W z|^2, to be minimised over W, is a least-squares problem with rows of zeros
        # below `root`; its residual is the noise variance, again a sum without cancellation.
        padding = root.new_zeros(len(stack) - len(root), num_columns)
        target = torch.cat([root, padding])
        coefficients = torch.linalg.lstsq(stack, target, driver="gels").solution
        residual = (target - stack @ coefficients).square().sum(0)
        return coefficients.mT, constrain(residual)

    (weight, noise_variance), log_likelihoods = run_em(
        e_step, m_step, start(root), num_steps=num_steps, tolerance=tolerance
    )
    return LinearGaussianFit(loc, weight, noise_variance, log_likelihoods)
