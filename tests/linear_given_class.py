"""A conditional VAE that is linear and Gaussian given the class, with its exact answers."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.conditional_priors import ConditionalPrior
from pyro_vae.conditioning import OneHot
from pyro_vae.likelihoods import Normal
from pyro_vae.models.conditional import ConditionalVAE
from pyro_vae.nets import MLP, NormalEncoder

NOISE = 0.7


class LinearDecoder(nn.Module):
    """W_y z + b_y."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.weight[y] @ z.unsqueeze(-1)).squeeze(-1) + self.bias[y]


class LinearGivenClass:
    """z ~ N(loc_y, diag(scale_y^2)), x ~ N(W_y z + b_y, NOISE^2), all of them at random.

    Attributes:
        model: The model.
        prior: Its prior, p(z | y).
        moments: Mean and covariance of x given each class.
    """

    def __init__(self, num_classes: int = 3, data_dim: int = 4, latent_dim: int = 2) -> None:
        of_class = nn.Sequential(OneHot(num_classes), MLP(num_classes, [], 2 * latent_dim))
        self.prior = ConditionalPrior(NormalEncoder(of_class))
        weight = torch.randn(num_classes, data_dim, latent_dim)
        self.decoder = LinearDecoder(weight, torch.randn(num_classes, data_dim))
        self.model = ConditionalVAE(self.decoder, Normal(NOISE), self.prior)
        self.num_classes, self.data_dim = num_classes, data_dim

    @property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self.decoder.weight.detach(), self.decoder.bias.detach()
        p = self.prior.encoder(torch.arange(self.num_classes))
        loc = (weight @ p.mean.detach().unsqueeze(-1)).squeeze(-1) + bias
        spread = weight @ p.variance.detach().diag_embed() @ weight.mT
        return loc, spread + NOISE**2 * torch.eye(self.data_dim)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x | y), ``(batch, C)``."""
        return dist.MultivariateNormal(*self.moments).log_prob(x.unsqueeze(1))

    def guide(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        """The exact posterior p(z | x, y)."""
        weight = self.decoder.weight[y]
        p = self.prior.encoder(y)
        precision = p.variance.reciprocal().diag_embed() + weight.mT @ weight / NOISE**2
        rest = x - self.decoder(p.mean, y)
        shift = torch.linalg.solve(precision, weight.mT @ rest.unsqueeze(-1) / NOISE**2)
        with pyro.plate("data", len(x)):
            fn = dist.MultivariateNormal(p.mean + shift.squeeze(-1), precision_matrix=precision)
            return pyro.sample("z", fn)
