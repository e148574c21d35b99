"""The linear-Gaussian model: probabilistic PCA and factor analysis."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.baselines import LinearGaussianFit, linear_gaussian
from pyro_vae.checks import check_at_least, check_data
from pyro_vae.program import Program

__all__ = ["LinearGaussian"]


class LinearGaussian(Program):
    """z ~ N(0, I), x ~ N(W z + loc, diag(noise variance)).

    The model whose answers are known exactly: with isotropic noise it is probabilistic PCA,
    with one noise variance per dimension it is factor analysis.

    Args:
        data_dim: D.
        latent_dim: L.
        noise: "isotropic" (pPCA) or "diagonal" (factor analysis).
        name: Name in the param store.

    Attributes:
        weight: Loadings W, ``(D, L)``.
        loc: Mean, ``(D,)``.
        log_scale: Log of the noise's standard deviation, ``()`` or ``(D,)``.

    Sites: ``"z"`` and ``"x"`` in the plate ``"data"``.

    Example:
        >>> model = LinearGaussian(data_dim=5, latent_dim=2)
        >>> model.log_prob(torch.zeros(7, 5)).shape
        torch.Size([7])

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        noise: Literal["isotropic", "diagonal"] = "isotropic",
        name: str | None = None,
    ) -> None:
        check_at_least("LinearGaussian", "data_dim", data_dim, 1)
        check_at_least("LinearGaussian", "latent_dim", latent_dim, 1)
        if noise not in ("isotropic", "diagonal"):
            raise ValueError(
                f"LinearGaussian: expected noise 'isotropic' or 'diagonal', got {noise!r}. "
                "Isotropic noise gives pPCA, diagonal noise factor analysis."
            )
        super().__init__(name)
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.weight = nn.Parameter(torch.randn(data_dim, latent_dim) / latent_dim**0.5)
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.log_scale = nn.Parameter(torch.zeros(() if noise == "isotropic" else data_dim))

    @staticmethod
    def from_fit(fit: LinearGaussianFit, *, name: str | None = None) -> "LinearGaussian":
        """The model with the parameters of a closed-form or EM fit, in the default dtype."""
        equal = bool((fit.noise_variance == fit.noise_variance[0]).all())
        noise: Literal["isotropic", "diagonal"] = "isotropic" if equal else "diagonal"
        model = LinearGaussian(*fit.weight.shape, noise=noise, name=name)
        log_scale = fit.noise_variance.log() / 2
        with torch.no_grad():
            model.weight.copy_(fit.weight)
            model.loc.copy_(fit.loc)
            model.log_scale.copy_(log_scale[0] if equal else log_scale)
        return model

    @property
    def noise_variance(self) -> torch.Tensor:
        """Variance of the noise, ``(D,)``."""
        return (2 * self.log_scale).exp().expand(self.data_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the model on a batch ``(batch, D)``; returns ``x``."""
        check_data("LinearGaussian", "x", x, (self.data_dim,))
        standard = torch.zeros_like(self.weight[0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(standard, torch.ones_like(standard)).to_event(1))
            loc = z @ self.weight.T + self.loc
            fn = dist.Normal(loc, self.log_scale.exp()).to_event(1)
            result: torch.Tensor = pyro.sample("x", fn, obs=x)
        return result

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) of a batch ``(batch, D)``: nats, ``(batch,)``."""
        check_data("LinearGaussian.log_prob", "x", x, (self.data_dim,))
        marginal = linear_gaussian.marginal(self.loc, self.weight, self.noise_variance)
        return marginal.log_prob(x)

    def posterior(self, x: torch.Tensor) -> torch.distributions.MultivariateNormal:
        """Exact p(z | x): batch ``(batch,)``, event ``(L,)``."""
        check_data("LinearGaussian.posterior", "x", x, (self.data_dim,))
        return linear_gaussian.posterior(x, self.loc, self.weight, self.noise_variance)
