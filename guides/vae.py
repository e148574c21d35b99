"""Amortized guides for a model with one continuous latent site."""

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae.checks import check_batch
from pyro_vae.nets import MultivariateNormalEncoder, NormalEncoder
from pyro_vae.program import Program

__all__ = ["AmortizedMultivariateNormal", "AmortizedNormal"]


class _Amortized(Program):
    """Abstract: samples one site from what ``encoder`` returns.

    A context, such as the class of each row, is handed on: ``guide(x, y)`` calls ``encoder(x, y)``.
    One may come by a keyword, as the model names it: ``guide(x, y=y)`` is the same.
    """

    encoder: nn.Module

    def __init__(self, site: str, name: str | None) -> None:
        super().__init__(name)
        self.site = site

    def forward(
        self, x: torch.Tensor, *context: torch.Tensor, **named: torch.Tensor
    ) -> torch.Tensor:
        """Samples codes for a batch ``(batch, *event)``: ``(*sample, batch, latent_dim)``."""
        where = type(self).__name__
        check_batch(where, "x", x)
        if len(named) > 1:
            raise TypeError(
                f"{where}: expected at most one context by keyword, got {list(named)}. The network "
                "takes them in order: pass all by position."
            )
        context += tuple(named.values())
        with pyro.plate("data", len(x)):
            q: TorchDistribution = self.encoder(x, *context)
            if q.batch_shape != (len(x),):
                given = "".join(f", context of shape {tuple(c.shape)}" for c in context)
                raise ValueError(
                    f"{where}: expected the network to encode each of {len(x)} rows into one code, "
                    f"got codes of batch shape {tuple(q.batch_shape)} from x of shape "
                    f"{tuple(x.shape)}{given}. Flatten each datum (x.flatten(1)), or use a network "
                    "for data of that shape; classes are integers of shape (batch,)."
                )
            code: torch.Tensor = pyro.sample(self.site, q)
        return code


class AmortizedNormal(_Amortized):
    """q(z | x) = N(loc(x), diag(scale(x)^2)).

    Args:
        network: From data to ``2 * latent_dim`` numbers: the locs and the raw scales (through a
            softplus). With a context it is called ``network(x, context)``, see
            ``pyro_vae.conditioning``.
        site: Name of the latent site.
        name: Name in the param store.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedNormal(MLP(64, [32], 2 * 3))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, appendix C.2.
    """

    def __init__(self, network: nn.Module, *, site: str = "z", name: str | None = None) -> None:
        super().__init__(site, name)
        self.encoder = NormalEncoder(network)


class AmortizedMultivariateNormal(_Amortized):
    """q(z | x) = N(loc(x), L(x) L(x)^T) with a full Cholesky factor L.

    Args:
        network: From data to ``latent_dim + latent_dim * (latent_dim + 1) // 2`` numbers.
        latent_dim: Number of latents.
        site: Name of the latent site.
        name: Name in the param store.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedMultivariateNormal(MLP(64, [32], 3 + 6), latent_dim=3)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])

    References:
        Kingma and Welling (2019), An introduction to variational autoencoders, section 2.5.1.
    """

    def __init__(
        self, network: nn.Module, latent_dim: int, *, site: str = "z", name: str | None = None
    ) -> None:
        super().__init__(site, name)
        self.encoder = MultivariateNormalEncoder(network, latent_dim)
