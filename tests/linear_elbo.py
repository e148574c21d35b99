"""A linear-Gaussian model with a small encoder, for tests of objectives made of ELBO terms."""

from typing import Any

import pyro
import torch

from pyro_vae.guides import AmortizedNormal
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP

ROWS, DATA = 5, 3
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.5], dtype=torch.float64)
SEEN = torch.tensor([True, False, True, True, False])


class LinearElbo:
    """The pair, five rows of data, and the parts of its ELBO by hand."""

    def __init__(self, num_latents: int) -> None:
        pyro.set_rng_seed(3)
        self.model = LinearGaussian(DATA, num_latents)
        self.guide = AmortizedNormal(MLP(DATA, [4], 2 * num_latents))
        self.x = torch.randn(ROWS, DATA)
        self.parameters = [*self.model.parameters(), *self.guide.parameters()]

    def parts(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p(x | z), the KL of every latent and the squared error of every row.

        They belong to the sample of a seed.
        """
        pyro.set_rng_seed(seed)
        q = self.guide.encoder(self.x)
        z = q.rsample()
        scale = self.model.log_scale.exp()
        residual = self.x - z @ self.model.weight.T - self.model.loc
        log_normaliser = scale.log() + 0.5 * torch.tensor(2 * torch.pi).log()
        log_likelihood = (-0.5 * (residual / scale) ** 2 - log_normaliser).sum(-1)
        kl = 0.5 * (q.mean**2 + q.variance - 1) - 0.5 * q.variance.log()
        return log_likelihood, kl, residual.square().sum(-1)

    def with_gradient(self, value: torch.Tensor) -> torch.Tensor:
        """A value and its gradient as one vector; 0 where it does not depend on a parameter."""
        grads = torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) for p in self.parameters]
        flat = [(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)]
        return torch.cat([value.detach().reshape(1), *flat])

    def training(self, objective: Any, model: Any = None, guide: Any = None) -> torch.Tensor:
        """The training loss at the sample of seed 0, with its gradient."""
        pyro.set_rng_seed(0)
        loss = objective.training_loss(model or self.model, guide or self.guide, self.x)
        return self.with_gradient(loss)
