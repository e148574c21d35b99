"""The amortized guide whose posterior is a mixture."""

from torch import nn

from pyro_vae.guides.vae import _Amortized
from pyro_vae.nets import MixtureEncoder

__all__ = ["AmortizedMixture"]


class AmortizedMixture(_Amortized):
    """q(z | x) = sum_k w_k(x) N(loc_k(x), diag(scale_k(x)^2)).

    Samples are reparameterised, weights included. Where the components lie far apart, the
    gradient of the weights has a large variance: see ``pyro_vae.mixtures.NormalMixture``.

    Args:
        network: From data to ``num_components * (1 + 2 * latent_dim)`` numbers: the logits of
            the weights, all locs, all raw scales (through a softplus).
        num_components: K.
        site: Name of the latent site.
        name: Name in the param store.

    Example:
        >>> import torch
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedMixture(MLP(64, [32], 4 * (1 + 2 * 3)), num_components=4)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])

    References:
        Figurnov et al. (2018), Implicit reparameterization gradients, section 3.
    """

    def __init__(
        self, network: nn.Module, num_components: int, *, site: str = "z", name: str | None = None
    ) -> None:
        super().__init__(site, name)
        self.encoder = MixtureEncoder(network, num_components)
