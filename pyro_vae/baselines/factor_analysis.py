"""Factor analysis by EM."""

from torch import Tensor

from pyro_vae.baselines._data import as_data_matrix, constant_columns
from pyro_vae.baselines._em import check_stopping
from pyro_vae.baselines._linear_gaussian_em import check_latent_dim, linear_gaussian_em
from pyro_vae.baselines._principal import principal_parameters
from pyro_vae.baselines.linear_gaussian import LinearGaussianFit

__all__ = ["factor_analysis_em"]

# A noise variance below this fraction of the variance of its column is taken for zero. A fit on
# its way to a legitimate boundary approaches like 1 / step and does not get there.
_SMALLEST_UNIQUENESS = 1e-13


def factor_analysis_em(
    x: Tensor, latent_dim: int, *, num_steps: int = 1000, tolerance: float = 1e-9
) -> LinearGaussianFit:
    """Fit factor analysis, with one noise variance per column, by EM.

    The start is probabilistic PCA of the standardised data, so that the fit draws no random
    number and does not depend on the units of the columns. Reaching ``num_steps`` is
    not an error; look at the end of ``log_likelihoods`` to judge.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64.
        latent_dim: Number of latents L, from 1 to D - 1.
        num_steps: Largest number of EM steps.
        tolerance: Stop after a step that gains less than this, in nats per datum.

    Returns:
        The fit. Its ``weight`` is known up to a rotation only.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix or hold constant columns, if an argument is out
            of range, or if the likelihood is unbounded: the sample covariance has rank
            ``latent_dim`` or lower, or the noise variance of some column falls to zero.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 1)
        >>> noise = torch.randn(500, 3) * torch.tensor([0.1, 1.0, 2.0])
        >>> fit = factor_analysis_em(z + noise, latent_dim=1)
        >>> bool((fit.log_likelihoods.diff() > -1e-9).all())
        True

    References:
        Rubin and Thayer 1982, "EM algorithms for ML factor analysis",
        https://doi.org/10.1007/BF02293851.
    """
    data = as_data_matrix(x, "factor_analysis_em")
    num_rows, num_columns = data.shape
    check_latent_dim(latent_dim, num_columns, "factor_analysis_em")
    check_stopping(num_steps, tolerance, "factor_analysis_em")
    constant = constant_columns(data)
    if constant:
        raise ValueError(
            "factor_analysis_em: expected every column of `x` to vary, got constant columns "
            f"{constant}, whose likelihood is unbounded. Drop these columns."
        )
    variance = data.var(0, correction=0)

    def start(root: Tensor) -> tuple[Tensor, Tensor]:
        scale = root.square().sum(0).sqrt()
        weight, noise_variance = principal_parameters(
            root / scale, latent_dim, num_rows, "factor_analysis_em"
        )
        return weight * scale.unsqueeze(-1), noise_variance * scale.square()

    def check(noise_variance: Tensor) -> Tensor:
        zero = (noise_variance < _SMALLEST_UNIQUENESS * variance).nonzero().flatten().tolist()
        if zero:
            raise ValueError(
                "factor_analysis_em: expected a positive noise variance in every column, got zero "
                f"in columns {zero}, which {latent_dim} latents reproduce exactly, so that the "
                "likelihood is unbounded. Drop duplicated columns or use a smaller latent_dim."
            )
        return noise_variance

    return linear_gaussian_em(data, start, check, num_steps=num_steps, tolerance=tolerance)
