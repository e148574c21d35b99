"""Amortized guides for several modalities, any of them missing in any row."""

from abc import abstractmethod
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae.checks import check_at_least
from pyro_vae.experts import product_of_normals
from pyro_vae.modalities import Batch, Observed, Present, check_names, modules_by_name, observed_of
from pyro_vae.nets import NormalEncoder
from pyro_vae.program import Program

__all__ = ["AmortizedSet", "ProductOfExperts"]


class _Multimodal(Program):
    """Abstract: samples the shared latent from what is observed, and each private one.

    All rows of a batch go through in one pass, each with its own pattern of missing modalities.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        latent_dim: int,
        private: Mapping[str, nn.Module] | None = None,
        *,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        where = type(self).__name__
        check_at_least(where, "latent_dim", latent_dim, 1)
        self.networks = modules_by_name(where, "networks", networks)
        self.private = modules_by_name(where, "private", private) if private else nn.ModuleDict()
        check_names(where, "private", self.private, networks)
        self.latent_dim, self.site = latent_dim, site
        self.modalities = tuple(networks)

    @abstractmethod
    def _posterior(self, seen: Observed) -> TorchDistribution:
        """q(z | what is observed), of batch shape ``(batch,)``."""

    def forward(self, batch: Batch, present: Present | None = None) -> torch.Tensor:
        """Samples codes for a batch; returns the shared ones, ``(*sample, batch, latent_dim)``.

        Args:
            batch: Data by modality, ``(batch, *event)``. A missing key or ``None``: not observed.
            present: By modality, bool ``(batch,)``: the rows in which it is observed.

        Raises:
            TypeError: If an argument, or what is in it, has another type.
            ValueError: If a modality is unknown, data or masks do not fit, or a network gives
                another number of latents.
        """
        seen = observed_of(type(self).__name__, self.modalities, batch, present)
        private = self.private
        with pyro.plate("data", seen.num_rows):
            code: torch.Tensor = pyro.sample(self.site, self._posterior(seen))
            for modality in private:
                if modality not in seen.values:
                    continue
                normal = NormalEncoder(private[modality])(seen.filled(modality)).base_dist
                loc, scale = normal.loc, normal.scale
                if seen.masks[modality] is not None:  # Elsewhere N(0, I).
                    there = seen.mask(modality).unsqueeze(-1)
                    loc, scale = torch.where(there, loc, 0.0), torch.where(there, scale, 1.0)
                pyro.sample(f"w_{modality}", dist.Normal(loc, scale).to_event(1))
        return code

    def _experts(self, seen: Observed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The experts of the modalities seen and, last, the prior.

        Returns:
            Locs and scales, ``(batch, experts, latent_dim)``, and where each modality was
            observed, ``(batch, experts)``; the prior counts as observed.
        """
        networks = self.networks
        normals = [self._expert(m, networks[m], seen).base_dist for m in seen.values]
        nothing = torch.zeros((), device=seen.device)
        first = normals[0].loc if normals else next(networks.parameters(), nothing)
        standard = first.new_zeros(seen.num_rows, self.latent_dim)
        always = torch.ones(seen.num_rows, dtype=torch.bool, device=seen.device)
        return (
            torch.stack([*(normal.loc for normal in normals), standard], -2),
            torch.stack([*(normal.scale for normal in normals), torch.ones_like(standard)], -2),
            torch.stack([*(seen.mask(m) for m in seen.values), always], -1),
        )

    def _expert(self, modality: str, network: nn.Module, seen: Observed) -> TorchDistribution:
        q: TorchDistribution = NormalEncoder(network)(seen.filled(modality))
        if q.batch_shape + q.event_shape != (seen.num_rows, self.latent_dim):
            raise ValueError(
                f"{type(self).__name__}: expected the network of modality '{modality}' to give "
                f"2 * {self.latent_dim} numbers for each of {seen.num_rows} rows, a loc and a "
                f"scale for each latent, got codes of shape {tuple(q.batch_shape + q.event_shape)}"
                ". All experts are about the same latents: give them the same width."
            )
        return q


class ProductOfExperts(_Multimodal):
    r"""q(z | x) proportional to p(z) prod_m N(z; loc_m(x_m), diag scale_m(x_m)^2).

    The product runs over the modalities observed in each row; with none it is the prior N(0, I).

    Args:
        networks: By modality, from data to ``2 * latent_dim`` numbers: the locs and the raw
            scales (through a softplus).
        latent_dim: Number of shared latents.
        private: By modality, a network from data to ``2 * private_dim`` numbers for its own
            latent ``"w_<modality>"``; where the modality is missing, that is N(0, I).
        learn_weights: Whether each expert has a learnt exponent for each latent, 1 at the start:
            the generalised product.
        with_prior: Whether the prior is one of the experts. Without it, it takes part only in
            rows where nothing is observed.
        site: Name of the shared latent's site.
        name: Name in the param store.

    Attributes:
        log_weights: Logarithms of the exponents, ``(modalities, latent_dim)``, or ``None``.

    Raises:
        ValueError: If names differ; when called, if a network gives another number of latents.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = ProductOfExperts({"image": MLP(64, [32], 4), "sound": MLP(9, [32], 4)}, 2)
        >>> batch = {"image": torch.zeros(5, 64), "sound": torch.zeros(5, 9)}
        >>> guide(batch, {"sound": torch.arange(5) < 3}).shape
        torch.Size([5, 2])
        >>> guide({"sound": batch["sound"]}).shape
        torch.Size([5, 2])

    References:
        Wu and Goodman (2018), Multimodal generative models for scalable weakly-supervised
        learning, https://arxiv.org/abs/1802.05335;
        Cao and Fleet (2014), Generalized product of experts, https://arxiv.org/abs/1410.7827.
        Their weights depend on the data and sum to one; these are parameters and do not, so
        that a missing modality stays the identity.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        latent_dim: int,
        private: Mapping[str, nn.Module] | None = None,
        *,
        learn_weights: bool = False,
        with_prior: bool = True,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        super().__init__(networks, latent_dim, private, site=site, name=name)
        self.with_prior = with_prior
        zeros = torch.zeros(len(networks), latent_dim)
        self.log_weights = nn.Parameter(zeros) if learn_weights else None

    def _posterior(self, seen: Observed) -> TorchDistribution:
        loc, scale, there = self._experts(seen)
        if not self.with_prior:
            there = _without_prior(there)
        weights, log_weight = self.log_weights, None
        if weights is not None:  # 0 for the prior.
            rows = [self.modalities.index(m) for m in seen.values]
            log_weight = torch.cat([weights[rows], torch.zeros_like(weights[:1])])
        loc, scale = product_of_normals(loc, scale, there, log_weight=log_weight)
        return dist.Normal(loc, scale).to_event(1)


class AmortizedSet(_Multimodal):
    r"""q(z | x) = N(loc(h), diag scale(h)^2) with h = sum_m embedding_m(x_m).

    A set encoder: the sum runs over the modalities observed in each row, in any order. With none
    q is the prior N(0, I).

    Args:
        networks: By modality, from data to an embedding, all of one width.
        latent_dim: Number of shared latents.
        head: From the sum of the embeddings to ``2 * latent_dim`` numbers: the locs and the raw
            scales (through a softplus).
        private: By modality, a network for a latent of its own, as in :class:`ProductOfExperts`.
        site: Name of the shared latent's site.
        name: Name in the param store.

    Raises:
        ValueError: If names differ; when called, if embeddings differ in width, or the head
            gives another number of latents.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> networks = {"image": MLP(64, [32], 16), "sound": MLP(9, [32], 16)}
        >>> guide = AmortizedSet(networks, 2, MLP(16, [16], 4))
        >>> guide({"image": torch.zeros(5, 64)}).shape
        torch.Size([5, 2])

    References:
        Zaheer et al. (2017), Deep sets, theorem 2, https://arxiv.org/abs/1703.06114
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        latent_dim: int,
        head: nn.Module,
        private: Mapping[str, nn.Module] | None = None,
        *,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        super().__init__(networks, latent_dim, private, site=site, name=name)
        self.head = head

    def _posterior(self, seen: Observed) -> TorchDistribution:
        networks, head = self.networks, self.head
        anything = torch.zeros(seen.num_rows, 1, dtype=torch.bool, device=seen.device)
        like = next(head.parameters(), torch.zeros((), device=seen.device))
        loc = like.new_zeros(seen.num_rows, self.latent_dim)
        scale = torch.ones_like(loc)
        total = None
        for modality in seen.values:
            there = seen.mask(modality).unsqueeze(-1)
            anything = anything | there
            embedding = torch.where(there, networks[modality](seen.filled(modality)), 0.0)
            if total is not None and total.shape != embedding.shape:
                raise ValueError(
                    "AmortizedSet: expected embeddings of one width from all networks, got "
                    f"{embedding.shape[-1]} for modality '{modality}' and {total.shape[-1]} for "
                    "those before it. They are added up."
                )
            total = embedding if total is None else total + embedding
        if total is not None:
            normal = NormalEncoder(head)(total).base_dist
            if normal.loc.shape != loc.shape:
                raise ValueError(
                    f"AmortizedSet: expected a head with 2 * {self.latent_dim} outputs for each "
                    f"row, got codes of shape {tuple(normal.loc.shape)}. Give it a loc and a "
                    "scale for each latent."
                )
            loc = torch.where(anything, normal.loc, loc)
            scale = torch.where(anything, normal.scale, scale)
        return dist.Normal(loc, scale).to_event(1)


def _without_prior(there: torch.Tensor) -> torch.Tensor:
    """The prior, which is last, only where nothing else is there."""
    modalities = there[..., :-1]
    return torch.cat([modalities, ~modalities.any(-1, keepdim=True)], -1)
