"""The variational autoencoder with several layers of latents."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae.checks import check_at_least
from pyro_vae.models.vae import VAE
from pyro_vae.nets import MLP, NormalEncoder
from pyro_vae.priors import HierarchicalPrior, StandardNormalPrior
from pyro_vae.program import new_name

__all__ = ["HierarchicalVAE"]


def HierarchicalVAE(
    latent_dims: Sequence[int],
    decoder: nn.Module,
    likelihood: Callable[[torch.Tensor], TorchDistribution],
    *,
    hidden: Sequence[int],
    activation: type[nn.Module] = nn.ReLU,
    name: str | None = None,
) -> VAE:
    """A :class:`VAE` with a hierarchy of latents: z_L ~ N(0, I), ..., z1 | z2, x | z1.

    Each conditional p(z_l | z_{l+1}) is a diagonal normal whose loc and scale come from an
    ``MLP``. For others write ``VAE(decoder, likelihood, HierarchicalPrior(...))``.

    Args:
        latent_dims: Numbers of latents, z1 (nearest the data) first; two layers or more.
        decoder: Network from z1 to what the likelihood takes.
        likelihood: See ``pyro_vae.likelihoods``.
        hidden: Widths of the hidden layers of each conditional; empty for linear ones.
        activation: Class of the activation.
        name: Name in the param store.

    Raises:
        ValueError: If there are fewer than two ``latent_dims``, or one below 1.

    Sites: ``"z1"`` to ``"zL"`` and ``"x"``, in the plate ``"data"``.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> model = HierarchicalVAE([8, 4, 2], MLP(8, [32], 64), Bernoulli(), hidden=[16])
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 64])

    References:
        Burda et al. (2016), Importance weighted autoencoders, section 2; Sonderby et al. (2016),
        Ladder variational autoencoders, equations 1-4, https://arxiv.org/abs/1602.02282
    """
    if len(latent_dims) < 2:
        raise ValueError(
            f"HierarchicalVAE: expected two or more latent_dims, got {list(latent_dims)}. "
            "For one layer use VAE with a StandardNormalPrior."
        )
    for dim in latent_dims:
        check_at_least("HierarchicalVAE", "latent_dims", dim, 1)
    conditionals = [
        NormalEncoder(MLP(above, hidden, 2 * below, activation=activation))
        for below, above in pairwise(latent_dims)
    ]
    top = StandardNormalPrior(latent_dims[-1], site=f"z{len(latent_dims)}")
    prior = HierarchicalPrior(top, conditionals[::-1])  # They run from the top down.
    return VAE(decoder, likelihood, prior, name=name or new_name("HierarchicalVAE"))
