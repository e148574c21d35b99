"""The variational autoencoder's generative model."""

from collections.abc import Callable

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.runtime import get_mask

from pyro_vae.checks import check_batch, check_data, check_values
from pyro_vae.program import Program

__all__ = ["VAE"]


class VAE(Program):
    """z ~ prior, x ~ likelihood(decoder(z)).

    A beta-VAE is ``scale_kl(vae, beta)``; another prior or likelihood is an argument.

    Args:
        decoder: Network from codes ``(*sample, batch, latent_dim)`` to ``(*sample, batch, ...)``.
        likelihood: From its output to the distribution of one datum, see
            ``pyro_vae.likelihoods``.
        prior: Samples the code inside the plate, see ``pyro_vae.priors``.
        name: Name in the param store.

    Sites: ``"x"``, and those of the prior (``"z"``), in the plate ``"data"``.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> vae = VAE(MLP(2, [16], 64), Bernoulli(), StandardNormalPrior(2))
        >>> vae(torch.zeros(5, 64)).shape
        torch.Size([5, 64])

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes,
        https://arxiv.org/abs/1312.6114
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        likelihood: Callable[[torch.Tensor], TorchDistribution],
        prior: Callable[[], torch.Tensor],
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the model on a batch ``(batch, *event)``; returns ``x``.

        Raises:
            ValueError: If ``x`` is not a batch of what the decoder makes.
        """
        check_batch("VAE", "x", x)
        with pyro.plate("data", len(x)):
            fn = self.likelihood(self.decoder(self.prior()))
            check_data("VAE", "x", x, tuple(fn.event_shape))
            if is_validation_enabled():
                check_values("VAE", "x", fn, x, get_mask())
            result: torch.Tensor = pyro.sample("x", fn, obs=x)
        return result
