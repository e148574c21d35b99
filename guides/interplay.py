"""Amortized guide of models whose modalities have coupled latents."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.interplay_prior import InterplayPrior
from pyro_vae.interplay_sites import sample_interplay
from pyro_vae.modalities import Batch, Observed, Present, modules_by_name, observed_of
from pyro_vae.program import Program

__all__ = ["AmortizedInterplay"]


class AmortizedInterplay(Program):
    r"""The prior times the evidence of each observed modality.

    .. math::
        q(z \mid x) \propto p(z_1, \dots, z_M) \prod_{m \in x} \exp(\lambda_m(x_m) \cdot T(z_m))

    A modality that is missing contributes nothing, so that its latents follow from the others
    through the interactions of the prior; with nothing observed the guide is the prior.

    The parameters of the prior stay the model's and are not saved with the guide, but get
    gradients from both. Copy model and guide at once, ``copy.deepcopy((model, guide))``.

    Args:
        networks: By modality, from data to one number for each of its statistics: ``2 * dim`` of
            normal latents (the linear parameters, then raw precisions through a softplus), ``dim``
            of Bernoulli latents (logits).
        prior: The model's, ``model.prior``.
        name: Name in the param store.

    Sites: ``"z_<modality>"`` of all modalities, in the plate ``"data"``.

    Raises:
        ValueError: If the networks are not of the prior's modalities.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> prior = InterplayPrior({"image": 3, "label": 2})
        >>> guide = AmortizedInterplay({"image": MLP(64, [16], 6), "label": MLP(10, [], 4)}, prior)
        >>> guide({"image": torch.zeros(5, 64)})["label"].shape
        torch.Size([5, 2])

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval, for the prior, of which the posterior is of the same kind.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        prior: InterplayPrior,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.networks = modules_by_name("AmortizedInterplay", "networks", networks)
        if set(networks) != set(prior.dims):
            raise ValueError(
                f"AmortizedInterplay: expected networks of the prior's modalities "
                f"{list(prior.dims)}, got {list(networks)}. Give one for each."
            )
        self._prior = (prior,)  # In a tuple: the parameters stay the model's alone.

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, without the links that Pyro hangs on parameters."""
        for parameter in self._prior[0].parameters():
            parameter.__dict__.pop("unconstrained", None)
        state: dict[str, Any] = super().__getstate__()
        return state

    def forward(self, batch: Batch, present: Present | None = None) -> dict[str, torch.Tensor]:
        """Samples the latents of all modalities, ``(*sample, batch, dim)``.

        Args:
            batch: Data by modality, ``(batch, *event)``; a missing key or ``None`` for one that is
                not observed.
            present: Rows in which a modality is observed, bool, ``(batch,)``; by default all.

        Raises:
            TypeError: If the arguments are no mappings of tensors.
            ValueError: If a modality is unknown, numbers of rows differ, or a network returns
                another number of statistics.
        """
        prior = self._prior[0]
        seen = observed_of("AmortizedInterplay", prior.dims, batch, present)
        joint = prior.joint().tilted(self._evidence(seen))
        with pyro.plate("data", seen.num_rows):
            return sample_interplay(joint, num_sweeps=prior.num_sweeps)

    def _evidence(self, seen: Observed) -> dict[str, torch.Tensor]:
        """Natural parameters by observed modality, ``(batch, per_dim * dim)``, 0 where missing."""
        prior, networks, result = self._prior[0], self.networks, {}
        for name in seen.values:
            output = networks[name](seen.filled(name))
            wanted = (seen.num_rows, prior.statistics.per_dim * prior.dims[name])
            if output.shape != wanted:
                raise ValueError(
                    f"AmortizedInterplay: expected the network of '{name}' to return shape "
                    f"{wanted}, got {tuple(output.shape)}. It gives one number for each statistic "
                    "of each latent."
                )
            there = seen.mask(name).unsqueeze(-1)
            result[name] = torch.where(there, prior.statistics.evidence(output), 0.0)
        return result
