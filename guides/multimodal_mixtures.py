"""Amortized guides for several modalities whose posterior is a mixture."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae.checks import check_at_least
from pyro_vae.experts import product_of_normals
from pyro_vae.guides.multimodal import _Multimodal, _without_prior
from pyro_vae.mixtures import FixedNormalMixture
from pyro_vae.modalities import Observed

__all__ = ["MixtureOfExperts", "MixtureOfProducts"]

_MOST_ENUMERATED = 10
"""Modalities whose subsets are enumerated: 1,023 of them."""


class MixtureOfExperts(_Multimodal):
    r"""q(z | x) = mean over m of N(z; loc_m(x_m), diag scale_m(x_m)^2).

    The mean runs over the modalities observed in each row; with none q is the prior N(0, I).
    The density is that of the whole mixture. The library's importance weights draw from its
    components in proportion, and so does ``TraceIWAE_ELBO(stratified=True)``.

    Args:
        networks: By modality, from data to ``2 * latent_dim`` numbers: the locs and the raw
            scales (through a softplus).
        latent_dim: Number of shared latents.
        private: By modality, a network for a latent of its own, as in :class:`ProductOfExperts`.
        site: Name of the shared latent's site.
        name: Name in the param store.

    Raises:
        ValueError: If names differ; when called, if a network gives another number of latents.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = MixtureOfExperts({"image": MLP(64, [32], 4), "sound": MLP(9, [32], 4)}, 2)
        >>> guide({"image": torch.zeros(5, 64), "sound": torch.zeros(5, 9)}).shape
        torch.Size([5, 2])

    References:
        Shi et al. (2019), Variational mixture-of-experts autoencoders for multi-modal deep
        generative models, https://arxiv.org/abs/1911.03393
    """

    def _posterior(self, seen: Observed) -> TorchDistribution:
        loc, scale, there = self._experts(seen)
        return _mixture(loc, scale, _without_prior(there))


class MixtureOfProducts(_Multimodal):
    r"""q(z | x) = mean over subsets S of the product of the experts in S, with the prior.

    All non-empty subsets of the modalities observed in each row, in equal shares; with none
    observed q is the prior N(0, I). Beyond ten modalities there are too many: ``num_subsets`` of
    them are drawn once, when the guide is made, among them each modality alone and all
    together. They are saved with the parameters.

    Args:
        networks: By modality, from data to ``2 * latent_dim`` numbers: the locs and the raw
            scales (through a softplus).
        latent_dim: Number of shared latents.
        private: By modality, a network for a latent of its own, as in :class:`ProductOfExperts`.
        num_subsets: How many subsets to draw; all of them by default. In a row with missing
            modalities a subset stands for what is left of it.
        with_prior: Whether the prior is an expert in each product.
        site: Name of the shared latent's site.
        name: Name in the param store.

    Attributes:
        subsets: Members of the subsets drawn, bool, ``(num_subsets, modalities)``, or ``None``.

    Raises:
        ValueError: If names differ; if there are more than ten modalities and no
            ``num_subsets``, or if that is not between their number plus one and the number of
            all subsets; when called, if a network gives another number of latents.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = MixtureOfProducts({"image": MLP(64, [32], 4), "sound": MLP(9, [32], 4)}, 2)
        >>> guide({"image": torch.zeros(5, 64), "sound": torch.zeros(5, 9)}).shape
        torch.Size([5, 2])

    References:
        Sutter et al. (2021), Generalized multimodal ELBO,
        https://arxiv.org/abs/2105.02470
    """

    subsets: torch.Tensor | None

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        latent_dim: int,
        private: Mapping[str, nn.Module] | None = None,
        *,
        num_subsets: int | None = None,
        with_prior: bool = True,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        super().__init__(networks, latent_dim, private, site=site, name=name)
        self.with_prior = with_prior
        subsets = None if num_subsets is None else _draw_subsets(len(networks), num_subsets)
        if subsets is None and len(networks) > _MOST_ENUMERATED:
            raise ValueError(
                f"MixtureOfProducts: expected at most {_MOST_ENUMERATED} modalities for all their "
                f"subsets, got {len(networks)}, which have {2 ** len(networks) - 1:,}. Pass "
                "num_subsets=100, for instance, to draw some of them."
            )
        self.register_buffer("subsets", subsets)

    def _posterior(self, seen: Observed) -> TorchDistribution:
        loc, scale, there = self._experts(seen)
        subsets = self._subsets_of(seen)  # (S, M)
        if not seen.values:
            return dist.Normal(loc[:, 0], scale[:, 0]).to_event(1)
        members = subsets & there[:, None, :-1]  # (batch, S, M)
        anyone = members.any(-1)
        with_prior = torch.ones_like(anyone) if self.with_prior else ~anyone
        members = torch.cat([members, with_prior.unsqueeze(-1)], -1)
        loc, scale = (part.unsqueeze(-3).expand(*members.shape, -1) for part in (loc, scale))
        # Where nothing is observed all products are the prior.
        anyone = anyone | ~anyone.any(-1, keepdim=True)
        return _mixture(*product_of_normals(loc, scale, members), anyone)

    def _subsets_of(self, seen: Observed) -> torch.Tensor:
        """What is left of the subsets among the modalities seen: ``(S, M)``."""
        if self.subsets is None:
            num = len(seen.values)
            codes = torch.arange(1, 2**num, device=seen.device).unsqueeze(-1)
            return (codes >> torch.arange(num, device=seen.device)) % 2 == 1
        columns = [self.modalities.index(m) for m in seen.values]
        return self.subsets[:, columns].to(seen.device)


def _mixture(loc: torch.Tensor, scale: torch.Tensor, there: torch.Tensor) -> TorchDistribution:
    """Components that are there in equal shares: batch ``(batch,)``, event ``(latent_dim,)``."""
    logits = torch.zeros_like(loc[..., 0]).masked_fill(~there, -torch.inf)
    components = dist.Normal(loc, scale).to_event(1)
    return FixedNormalMixture(dist.Categorical(logits=logits), components)


def _draw_subsets(num_modalities: int, num_subsets: int) -> torch.Tensor:
    """Each modality alone, all together, and others at random: ``(num_subsets, modalities)``."""
    check_at_least("MixtureOfProducts", "num_subsets", num_subsets, 1)
    most = 2**num_modalities - 1
    least = min(num_modalities + 1, most)
    if not least <= num_subsets <= most:
        raise ValueError(
            f"MixtureOfProducts: expected num_subsets in {least} ... {most:,} for "
            f"{num_modalities} modalities, got {num_subsets}. Each modality alone and all "
            "together are always among them."
        )
    found = {1 << m for m in range(num_modalities)} | {most}
    while len(found) < num_subsets:
        members = (torch.rand(num_modalities) < 0.5).tolist()
        found |= {sum(1 << m for m, member in enumerate(members) if member)} - {0}
    bits = [[bool(code >> m & 1) for m in range(num_modalities)] for code in sorted(found)]
    return torch.tensor(bits, dtype=torch.bool)
