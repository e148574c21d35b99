"""Sub-programs that sample the latents inside a model and return the code for the decoder."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_vae.checks import check_at_least

__all__ = ["StandardNormalPrior"]


class StandardNormalPrior(PyroModule):
    """z ~ N(0, I).

    Args:
        latent_dim: Number of latents.
        site: Name of the sample site.

    Returns (when called inside a plate): the code, ``(*sample, batch, latent_dim)``.

    Example:
        >>> prior = StandardNormalPrior(3)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 3])
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, latent_dim: int, *, site: str = "z") -> None:
        check_at_least("StandardNormalPrior", "latent_dim", latent_dim, 1)
        super().__init__()
        self.site = site
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        code: torch.Tensor = pyro.sample(self.site, dist.Normal(self.loc, self.scale).to_event(1))
        return code
