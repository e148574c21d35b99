"""The exact posterior of the mixture of Gaussians."""

import pyro
import torch

from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.program import Program

__all__ = ["ExactGaussianMixture"]


class ExactGaussianMixture(Program):
    """q(z | x) = p(z | x), the responsibilities: with it every log-weight equals log p(x).

    It has no parameters of its own and follows those of the model.

    Args:
        model: The mixture.
        name: Name in the param store.

    Example:
        >>> model = GaussianMixture(data_dim=2, num_components=3)
        >>> ExactGaussianMixture(model)(torch.zeros(7, 2)).shape
        torch.Size([7])
    """

    def __init__(self, model: GaussianMixture, *, name: str | None = None) -> None:
        super().__init__(name)
        self._model = (model,)  # In a tuple: the parameters stay the model's alone.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Samples components for a batch ``(batch, D)``: ``(*sample, batch)``."""
        posterior = self._model[0].posterior(x)
        with pyro.plate("data", len(x)):
            component: torch.Tensor = pyro.sample("z", posterior, infer={"enumerate": "parallel"})
        return component
