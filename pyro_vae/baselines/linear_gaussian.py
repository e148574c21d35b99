"""The linear-Gaussian latent variable model x = loc + W z + noise, in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, MultivariateNormal, constraints

__all__ = [
    "LinearGaussianFit",
    "LinearGaussianMarginal",
    "marginal",
    "posterior",
    "posterior_factors",
]


def posterior_factors(weight: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factorise the posterior of z given x, whose covariance does not depend on x.

    With :math:`\Psi` the diagonal of noise variances, the posterior covariance is
    :math:`(I + W^\top \Psi^{-1} W)^{-1}`. It comes from a QR decomposition of the stacked
    matrix :math:`[\Psi^{-1/2} W; I]`, which is never squared, so that small noise costs few digits.

    Args:
        weight: Loadings W, shape ``(D, L)``.
        noise_variance: Positive, shape ``()`` or ``(D,)``.

    Returns:
        ``gain`` of shape ``(L, D)``, which maps ``x - loc`` to the posterior mean, and the lower
        triangular ``scale_tril`` of the posterior covariance, of shape ``(L, L)``.

    Example:
        >>> gain, scale_tril = posterior_factors(torch.ones(3, 1), torch.tensor(1.0))
        >>> gain, scale_tril
        (tensor([[0.2500, 0.2500, 0.2500]]), tensor([[0.5000]]))
    """
    num_columns, latent_dim = weight.shape
    scale = noise_variance.expand(num_columns).sqrt()
    eye = torch.eye(latent_dim, dtype=weight.dtype, device=weight.device)
    # Columns in reverse order: the inverse of the upper triangular factor, turned back in both
    # dimensions, is then lower triangular. The signs make its diagonal positive.
    stacked = torch.cat([weight / scale.unsqueeze(-1), eye]).flip(-1)
    orthogonal, upper = torch.linalg.qr(stacked)
    sign = upper.diagonal().detach().sign()
    inverse = torch.linalg.solve_triangular(upper * sign.unsqueeze(-1), eye, upper=True)
    gain = (inverse @ (orthogonal[:num_columns] * sign).mT).flip(0) / scale
    return gain, inverse.flip(0, 1)


class LinearGaussianMarginal(Distribution):
    r"""The distribution of x, Normal with covariance :math:`W W^\top + \Psi`.

    It does the work of ``LowRankMultivariateNormal`` and keeps more digits: the quadratic form is
    computed as :math:`|\Psi^{-1/2}(x - \mu - W m)|^2 + |m|^2` with m the posterior mean,
    a sum without cancellation. With noise variance 1e-6 the error is a thousandth of that of
    the dense Cholesky route, and float32 stays usable.

    Args:
        loc: Mean of x, shape ``(D,)``.
        weight: Loadings W, shape ``(D, L)``.
        noise_variance: Positive, shape ``()`` or ``(D,)``.
        validate_args: Check values, as in every ``torch.distributions`` class.

    Raises:
        ValueError: If the shapes do not fit, or under validation if a noise variance is not
            positive.

    Example:
        >>> x = LinearGaussianMarginal(torch.zeros(2), torch.ones(2, 1), torch.tensor(0.5))
        >>> x.covariance_matrix
        tensor([[1.5000, 1.0000],
                [1.0000, 1.5000]])
        >>> x.log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "weight": constraints.independent(constraints.real, 2),
        "noise_variance": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        weight: Tensor,
        noise_variance: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        _check_shapes(loc, weight, noise_variance, "LinearGaussianMarginal")
        self.loc = loc
        self.weight = weight
        self.noise_variance = noise_variance.expand(loc.shape)
        super().__init__(Size(), loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean, shape ``(D,)``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, shape ``(D,)``."""
        return self.weight.square().sum(-1) + self.noise_variance

    @property
    def covariance_matrix(self) -> Tensor:
        """Dense covariance, shape ``(D, D)``."""
        return self.weight @ self.weight.mT + self.noise_variance.diag()

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = Size()) -> Tensor:
        """Draw z and the noise, and return x with gradients.

        Args:
            sample_shape: Shape of the draws.

        Returns:
            Shape ``(*sample_shape, D)``.
        """
        latent_shape = (*sample_shape, self.weight.shape[1])
        z = torch.randn(latent_shape, dtype=self.loc.dtype, device=self.loc.device)
        noise = torch.randn_like(self.loc.expand(*sample_shape, -1))
        return self.loc + z @ self.weight.mT + noise * self.noise_variance.sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the exact log-density.

        Args:
            value: Shape ``(*batch, D)``.

        Returns:
            Shape ``batch``, nats.
        """
        _check_event(value, self.loc, "LinearGaussianMarginal")
        if self._validate_args:
            self._validate_sample(value)
        gain, scale_tril = posterior_factors(self.weight, self.noise_variance)
        centred = value - self.loc
        z = centred @ gain.mT
        residual = centred - z @ self.weight.mT
        quadratic = (residual.square() / self.noise_variance).sum(-1) + z.square().sum(-1)
        log_det = self.noise_variance.log().sum() - 2 * scale_tril.diagonal().log().sum()
        return -0.5 * (quadratic + log_det + self.loc.shape[0] * math.log(2 * math.pi))


def marginal(loc: Tensor, weight: Tensor, noise_variance: Tensor) -> LinearGaussianMarginal:
    """Return the distribution of x with z integrated out.

    Args:
        loc: Mean of x, shape ``(D,)``.
        weight: Loadings, shape ``(D, L)``.
        noise_variance: Positive, shape ``()`` or ``(D,)``.

    Returns:
        Distribution with event shape ``(D,)``, in the dtype of the arguments and differentiable.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> marginal(torch.zeros(2), torch.ones(2, 1), torch.tensor(0.5)).variance
        tensor([1.5000, 1.5000])
    """
    return LinearGaussianMarginal(loc, weight, noise_variance)


def posterior(x: Tensor, loc: Tensor, weight: Tensor, noise_variance: Tensor) -> MultivariateNormal:
    """Return the exact posterior of z given x.

    Args:
        x: Shape ``(*batch, D)``.
        loc: Mean of x, shape ``(D,)``.
        weight: Loadings, shape ``(D, L)``.
        noise_variance: Positive, shape ``()`` or ``(D,)``.

    Returns:
        Normal with batch shape ``batch`` and event shape ``(L,)``, in the dtype of the arguments
        and differentiable.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> z = posterior(torch.ones(5, 3), torch.zeros(3), torch.ones(3, 1), torch.tensor(1.0))
        >>> z.batch_shape, z.mean[0], z.variance[0]
        (torch.Size([5]), tensor([0.7500]), tensor([0.2500]))
    """
    _check_shapes(loc, weight, noise_variance, "posterior")
    _check_event(x, loc, "posterior")
    gain, scale_tril = posterior_factors(weight, noise_variance)
    return MultivariateNormal((x - loc) @ gain.mT, scale_tril=scale_tril)


@dataclass(frozen=True, eq=False)
class LinearGaussianFit:
    """A fitted linear-Gaussian model, float64.

    Args:
        loc: Mean of x, shape ``(D,)``.
        weight: Loadings, shape ``(D, L)``; the likelihood fixes them up to a rotation.
        noise_variance: Shape ``(D,)``; all equal for probabilistic PCA.
        log_likelihoods: Mean log-likelihood of the training data after each EM step, nats per
            datum, shape ``(steps_taken,)``; empty for a closed form.

    Example:
        >>> from pyro_vae.baselines import ppca
        >>> fit = ppca(torch.randn(100, 4), latent_dim=2)
        >>> fit.log_prob(torch.zeros(3, 4)).shape, fit.posterior(torch.zeros(3, 4)).mean.shape
        (torch.Size([3]), torch.Size([3, 2]))
    """

    loc: Tensor
    weight: Tensor
    noise_variance: Tensor
    log_likelihoods: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the exact log-likelihood of each row.

        Args:
            x: Shape ``(N, D)``, any real dtype.

        Returns:
            Shape ``(N,)``, nats, float64.
        """
        return marginal(self.loc, self.weight, self.noise_variance).log_prob(x.to(self.loc))

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Return the exact posterior of the latents of each row.

        Args:
            x: Shape ``(N, D)``, any real dtype.

        Returns:
            Normal with batch shape ``(N,)`` and event shape ``(L,)``, float64.
        """
        return posterior(x.to(self.loc), self.loc, self.weight, self.noise_variance)

    def sample(self, num_samples: int) -> Tensor:
        """Draw new data.

        Args:
            num_samples: Number of rows n.

        Returns:
            Shape ``(n, D)``, float64.
        """
        return marginal(self.loc, self.weight, self.noise_variance).sample(Size([num_samples]))


def _check_shapes(loc: Tensor, weight: Tensor, noise_variance: Tensor, where: str) -> None:
    """Raise unless the parameters fit together."""
    if weight.ndim != 2:
        raise ValueError(
            f"{where}: expected `weight` of shape (D, L), got {tuple(weight.shape)}. "
            "Pass one column per latent; unsqueeze(-1) makes a vector one column."
        )
    if loc.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: expected `loc` of shape ({weight.shape[0]},) to match the rows of `weight`, "
            f"got {tuple(loc.shape)}. Transpose `weight` if it is (L, D)."
        )
    if noise_variance.shape not in (Size(), loc.shape):
        raise ValueError(
            f"{where}: expected `noise_variance` of shape () or ({loc.shape[0]},), "
            f"got {tuple(noise_variance.shape)}. Pass one variance, or one per column of x."
        )


def _check_event(x: Tensor, loc: Tensor, where: str) -> None:
    """Raise unless the rows of ``x`` have as many columns as the model."""
    if x.ndim == 0 or x.shape[-1] != loc.shape[0]:
        raise ValueError(
            f"{where}: expected data of shape (*batch, {loc.shape[0]}), got {tuple(x.shape)}. "
            "Flatten each example into one row."
        )
