"""Modalities with latents of their own, coupled by an exponential-family prior."""

from collections.abc import Callable, Mapping

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae.interplay_prior import InterplayPrior
from pyro_vae.modalities import Batch, Present, as_module, modules_by_name, observe, observed_of
from pyro_vae.program import Program

__all__ = ["InterplayVAE"]


class InterplayVAE(Program):
    """z ~ interplay, x_m ~ likelihood_m(decoder_m(z_m)): each modality has its own latents.

    What one modality tells of another passes through the prior alone. All latents are sampled
    whichever modalities are observed; a modality that is not leaves its latents to the others.
    A row with nothing observed has the likelihood 1 and adds exactly 0 to ``TraceInterplay_ELBO``
    and its gradient. Other objectives see the guide's divergence from the prior there: 0 for
    ``AmortizedInterplay``, up to rounding.

    Args:
        decoders: By modality, from its latents ``(*sample, batch, dim)`` to
            ``(*sample, batch, ...)``.
        likelihoods: By modality, from the decoder's output to the distribution of one datum: a
            module of ``pyro_vae.likelihoods``, or a function.
        prior: Of the same modalities.
        name: Name in the param store.

    Sites: ``"z_<modality>"`` of all modalities, ``"x_<modality>"`` of those in the batch, in the
    plate ``"data"``.

    Raises:
        TypeError: If a decoder is no module, or a likelihood cannot be called.
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
        likelihoods: Mapping[str, Callable[[torch.Tensor], TorchDistribution]],
        prior: InterplayPrior,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        where = "InterplayVAE"
        self.decoders = modules_by_name(where, "decoders", decoders)
        for what, given in {"decoders": decoders, "likelihoods": likelihoods}.items():
            if set(given) != set(prior.dims):
                raise ValueError(
                    f"{where}: expected {what} of the prior's modalities {list(prior.dims)}, "
                    f"got {list(given)}. Give one for each."
                )
        self.likelihoods = nn.ModuleDict(
            {n: as_module(where, f"likelihoods['{n}']", likelihoods[n]) for n in decoders}
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
                if name in seen.values or name in seen.unknown:
                    fn = likelihoods[name](decoders[name](z))
                    values[name] = observe("InterplayVAE", name, fn, seen)
        return values
