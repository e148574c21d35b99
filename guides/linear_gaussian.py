"""The exact posterior of the linear-Gaussian model."""

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.program import Program

__all__ = ["ExactLinearGaussian"]


class ExactLinearGaussian(Program):
    """q(z | x) = p(z | x): with it every log-weight equals log p(x).

    It has no parameters of its own and follows those of the model. Trained with it, the ELBO is
    the exact log-likelihood for every sample.

    Args:
        model: The model whose posterior to sample.
        name: Name in the param store.

    Example:
        >>> model = LinearGaussian(data_dim=5, latent_dim=2)
        >>> ExactLinearGaussian(model)(torch.zeros(7, 5)).shape
        torch.Size([7, 2])
    """

    def __init__(self, model: LinearGaussian, *, name: str | None = None) -> None:
        super().__init__(name)
        self._model = (model,)  # In a tuple: the parameters stay the model's alone.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Samples codes for a batch ``(batch, D)``: ``(*sample, batch, L)``."""
        posterior = self._model[0].posterior(x)
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(posterior.loc, scale_tril=posterior.scale_tril)
            code: torch.Tensor = pyro.sample("z", q)
        return code
