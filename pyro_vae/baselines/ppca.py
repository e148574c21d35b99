"""Probabilistic PCA, in closed form and by EM."""

import torch
from torch import Tensor

from pyro_vae.baselines._data import as_data_matrix, covariance_root
from pyro_vae.baselines._em import check_stopping
from pyro_vae.baselines._linear_gaussian_em import check_latent_dim, linear_gaussian_em
from pyro_vae.baselines._principal import check_rank, principal_parameters
from pyro_vae.baselines.linear_gaussian import LinearGaussianFit

__all__ = ["ppca", "ppca_em"]


def ppca(x: Tensor, latent_dim: int) -> LinearGaussianFit:
    r"""Fit probabilistic PCA by maximum likelihood, in closed form.

    The noise variance :math:`\sigma^2` is the mean of the discarded eigenvalues
    :math:`\lambda_j` of the sample covariance, and column j of W is the j-th eigenvector times
    :math:`(\lambda_j - \sigma^2)^{1/2}`. The covariance divides by N, the maximum
    likelihood, where scikit-learn's ``PCA`` divides by N - 1.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64. Rows may be fewer than
            columns.
        latent_dim: Number of latents L, from 1 to D - 1.

    Returns:
        The fit, with orthogonal columns of ``weight`` in descending order, the largest
        entry of each positive, and empty ``log_likelihoods``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix, if ``latent_dim`` is out of range, or if the
            sample covariance has rank ``latent_dim`` or lower (the noise variance would be zero).

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> fit = ppca(x, latent_dim=1)
        >>> fit.weight.norm(), fit.noise_variance
        (tensor(2., dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))

    References:
        Tipping and Bishop 1999, "Probabilistic principal component analysis", eq. 7 and 8,
        https://doi.org/10.1111/1467-9868.00196. The rotation R is the identity.
    """
    data = as_data_matrix(x, "ppca")
    num_rows, num_columns = data.shape
    check_latent_dim(latent_dim, num_columns, "ppca")
    loc, root = covariance_root(data)
    weight, noise_variance = principal_parameters(root, latent_dim, num_rows, "ppca")
    return LinearGaussianFit(loc, weight, noise_variance.repeat(num_columns), data.new_empty(0))


def ppca_em(
    x: Tensor, latent_dim: int, *, num_steps: int = 1000, tolerance: float = 1e-9
) -> LinearGaussianFit:
    """Fit probabilistic PCA by EM, from a random start drawn with torch's global generator.

    It converges to the value of :func:`ppca`, linearly and slowly when the eigenvalues on both
    sides of the cut are close. Reaching ``num_steps`` is not an error; look at the end of
    ``log_likelihoods`` to judge.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64.
        latent_dim: Number of latents L, from 1 to D - 1.
        num_steps: Largest number of EM steps.
        tolerance: Stop after a step that gains less than this, in nats per datum.

    Returns:
        The fit. Its ``weight`` is known up to a rotation only.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: As :func:`ppca`, and if ``num_steps`` or ``tolerance`` is out of range.

    Example:
        >>> x = torch.randn(200, 3) @ torch.diag(torch.tensor([3.0, 1.0, 1.0]))
        >>> fit, exact = ppca_em(x, latent_dim=1), ppca(x, latent_dim=1)
        >>> bool((exact.log_prob(x).mean() - fit.log_likelihoods[-1]).abs() < 1e-6)
        True

    References:
        Tipping and Bishop 1999, "Probabilistic principal component analysis", appendix B,
        https://doi.org/10.1111/1467-9868.00196.
    """
    data = as_data_matrix(x, "ppca_em")
    num_rows, num_columns = data.shape
    check_latent_dim(latent_dim, num_columns, "ppca_em")
    check_stopping(num_steps, tolerance, "ppca_em")

    def start(root: Tensor) -> tuple[Tensor, Tensor]:
        check_rank(torch.linalg.svdvals(root), latent_dim, num_rows, "ppca_em")
        noise_variance = root.square().sum() / num_columns
        noise = torch.randn(num_columns, latent_dim, dtype=root.dtype, device=root.device)
        return noise * (noise_variance / latent_dim).sqrt(), noise_variance.repeat(num_columns)

    def pool(variance: Tensor) -> Tensor:
        return variance.mean().repeat(num_columns)

    return linear_gaussian_em(data, start, pool, num_steps=num_steps, tolerance=tolerance)
