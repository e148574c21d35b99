"""Modalities with latents of their own, coupled by an exponential-family prior."""

from collections.abc import Mapping
from functools import reduce
from operator import and_

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_mask
from torch import nn

from pyro_vae.checks import check_data, check_values
from pyro_vae.handlers import MaskMissingMessenger
from pyro_vae.interplay_prior import InterplayPrior
from pyro_vae.modalities import Batch, Observed, Present, modules_by_name, observed_of
from pyro_vae.program import Program

__all__ = ["InterplayVAE"]


class InterplayVAE(Program):
    """z ~ interplay, x_m ~ likelihood_m(decoder_m(z_m)): each modality has its own latents.

    What one modality tells of another passes through the prior alone. All latents are sampled
    whichever modalities are observed; a modality that is not leaves its latents to the others.

    Args:
        decoders: By modality, from its latents ``(*sample, batch, dim)`` to
            ``(*sample, batch, ...)``.
        likelihoods: By modality, from the decoder's output to the distribution of one datum.
        prior: Of the same modalities.
        name: Name in the param store.

    Sites: ``"z_<modality>"`` of all modalities, ``"x_<modality>"`` of those in the batch, in the
    plate ``"data"``.

    Raises:
        ValueError: If decoders, likelihoods and prior are not of the same modalities.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli, Categorical
        >>> from pyro_vae.nets import MLP
        >>> vae = InterplayVAE(
        ...     {"image": MLP(3, [16], 64), "label": MLP(2, [], 10)},
        ...     {"image": Bernoulli(), "label": Categorical(event_dim=0)},
        ...     InterplayPrior({"image": 3, "label": 2}),
        ... )
        >>> vae({"image": torch.zeros(5, 64), "label": None})["label"].shape
        torch.Size([5])

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval, for the prior.
    """

    def __init__(
        self,
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, nn.Module],
        prior: InterplayPrior,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        where = "InterplayVAE"
        self.decoders = modules_by_name(where, "decoders", decoders)
        self.likelihoods = modules_by_name(where, "likelihoods", likelihoods)
        for what, given in {"decoders": decoders, "likelihoods": likelihoods}.items():
            if set(given) != set(prior.dims):
                raise ValueError(
                    f"{where}: expected {what} of the prior's modalities {list(prior.dims)}, "
                    f"got {list(given)}. Give one for each."
                )
        self.prior = prior

    def forward(self, batch: Batch, present: Present | None = None) -> dict[str, torch.Tensor]:
        """Runs the model on a batch.

        Args:
            batch: Data by modality, ``(batch, *event)``. A missing key: the modality plays no
                part in this run. ``None``: not observed, drawn from the model.
            present: Rows in which a modality is observed, bool, ``(batch,)``; by default all.

        Returns:
            The data of each modality in the batch, as given or drawn.

        Raises:
            TypeError: If the arguments are no mappings of tensors.
            ValueError: If a modality is unknown, numbers of rows differ, or data do not fit.
        """
        seen = observed_of("InterplayVAE", self.prior.dims, batch, present)
        decoders, likelihoods = self.decoders, self.likelihoods
        values: dict[str, torch.Tensor] = {}
        with pyro.plate("data", seen.num_rows):
            for name, z in self.prior().items():
                if name in seen.values:
                    values[name] = _observe(name, likelihoods[name](decoders[name](z)), seen)
                elif name in seen.unknown:
                    with poutine.mask(mask=False):
                        fn = likelihoods[name](decoders[name](z))
                        values[name] = pyro.sample(f"x_{name}", fn)
        return values


def _observe(name: str, fn: TorchDistribution, seen: Observed) -> torch.Tensor:
    site, value, mask = f"x_{name}", seen.values[name], seen.masks[name]
    check_data("InterplayVAE", f"batch['{name}']", value, tuple(fn.event_shape))
    if is_validation_enabled():
        masks = [m for m in (mask, get_mask()) if m is not None]
        check_values("InterplayVAE", site, fn, value, reduce(and_, masks) if masks else None)
    with Messenger() if mask is None else MaskMissingMessenger({site: mask}):
        observed: torch.Tensor = pyro.sample(site, fn, obs=value)
    return observed
