"""Principal axes from a square root of the covariance, as probabilistic PCA uses them."""

import torch
from torch import Tensor

__all__ = ["check_rank", "principal_parameters"]


def check_rank(singular_values: Tensor, latent_dim: int, num_rows: int, where: str) -> None:
    """Raise unless some variance is left over for the noise.

    Args:
        singular_values: Of the covariance root, descending, shape ``(min(N, D),)``.
        latent_dim: Number of latents L.
        num_rows: Number of rows N.
        where: Name of the calling function, for the error message.

    Raises:
        ValueError: If the covariance has rank ``latent_dim`` or lower, so that the noise variance
            would be zero and the likelihood infinite.

    Example:
        >>> check_rank(torch.tensor([2.0, 1.0]), 1, 10, "demo")
    """
    eps = torch.finfo(singular_values.dtype).eps
    threshold = eps * max(num_rows, len(singular_values)) * singular_values[0]
    rank = int((singular_values > threshold).sum())
    if rank <= latent_dim:
        fix = f"Use latent_dim < {rank}, or" if rank > 1 else "Pass"
        raise ValueError(
            f"{where}: expected a sample covariance of rank above latent_dim = {latent_dim}, "
            f"got rank {rank} from {num_rows} rows, which makes the noise variance zero and the "
            f"likelihood infinite. {fix} more data."
        )


def principal_parameters(
    root: Tensor, latent_dim: int, num_rows: int, where: str
) -> tuple[Tensor, Tensor]:
    """Return the maximum likelihood parameters of probabilistic PCA.

    Args:
        root: Square root of the covariance, shape ``(min(N, D), D)``.
        latent_dim: Number of latents L.
        num_rows: Number of rows N of the data.
        where: Name of the calling function, for the error message.

    Returns:
        The weight, of shape ``(D, L)``, with orthogonal columns whose largest entry is positive,
        and the 0-d noise variance.

    Raises:
        ValueError: If the noise variance would be zero.

    Example:
        >>> weight, noise_variance = principal_parameters(torch.eye(3), 1, 10, "demo")
        >>> weight.abs().sum(), noise_variance
        (tensor(0.), tensor(1.))
    """
    _, singular_values, axes = torch.linalg.svd(root, full_matrices=False)
    check_rank(singular_values, latent_dim, num_rows, where)
    eigenvalues, axes = singular_values.square(), axes[:latent_dim]
    # With fewer rows than columns, the eigenvalues that are missing here are zeros.
    noise_variance = eigenvalues[latent_dim:].sum() / (root.shape[1] - latent_dim)
    # Equal eigenvalues may fall below their own mean by rounding, hence the clamp.
    scale = (eigenvalues[:latent_dim] - noise_variance).clamp(min=0.0).sqrt()
    sign = axes.gather(-1, axes.abs().argmax(-1, keepdim=True)).sign()
    return (sign * axes).mT * scale, noise_variance
