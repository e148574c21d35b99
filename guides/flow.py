"""Amortized guides whose posterior is a normalising flow."""

from collections.abc import Sequence

from torch import nn

from pyro_vae.guides.vae import _Amortized
from pyro_vae.nets import FlowEncoder

__all__ = ["AmortizedFlow"]


class AmortizedFlow(_Amortized):
    """q(z | x) a normalising flow, whose transforms take a context from the network.

    It starts near ``AmortizedNormal`` and can become curved, skewed or have several modes. It
    knows its density and samples but no mean, and has no closed-form KL.

    Args:
        network: From data to ``2 * latent_dim + context_dim`` numbers: the locs, the raw scales
            (through a softplus) and the context.
        latent_dim: Number of latents.
        transforms: ``pyro_vae.flows.inverse_autoregressive`` or ``neural_spline``, or any of
            Pyro's conditional transforms.
        site: Name of the latent site.
        name: Name in the param store.

    Example:
        >>> import torch
        >>> from pyro_vae.flows import inverse_autoregressive
        >>> from pyro_vae.nets import MLP
        >>> transforms = inverse_autoregressive(3, context_dim=8)
        >>> guide = AmortizedFlow(MLP(64, [32], 2 * 3 + 8), 3, transforms)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows; Kingma et al.
        (2016), Improved variational inference with inverse autoregressive flow, algorithm 1,
        https://arxiv.org/abs/1606.04934. There the loc and scale come before the transforms,
        here after them.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        transforms: Sequence[nn.Module],
        *,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        super().__init__(site, name)
        self.encoder = FlowEncoder(network, latent_dim, transforms)
