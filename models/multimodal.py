"""Several modalities from a shared latent, any of them missing in any row."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_vae.modalities import (
    Batch,
    Present,
    as_module,
    check_names,
    modules_by_name,
    observe,
    observed_of,
)
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.program import Program
from pyro_vae.schedules import Weight, weight_of
from pyro_vae.traces import is_observed

__all__ = ["MultimodalVAE"]


class MultimodalVAE(Program):
    r"""z ~ prior, and for each modality x_m ~ likelihood_m(decoder_m(z)), independent given z.

    A modality may have a latent w_m of its own beside the shared one; its decoder then takes
    both, ``cat([z, w_m], -1)``.

    What is not observed has no part in the density: log p of a batch is that of the observed
    modalities of each row. There are three ways to say so. A modality without a key in
    ``batch`` is left out. One whose value is ``None`` is not observed either, but drawn from the
    model, which is how it is generated; train without it. And ``present`` says it row by row;
    whatever stands in the batch in those rows, NaN for instance, is never looked at.

    Latents about which a row says nothing are N(0, I) in the library's guides. With standard
    normal priors a row with nothing observed therefore adds exactly nothing to a bound and its
    gradient; with others it costs KL(N(0, I) || prior), so leave such rows out, and keep private
    priors standard where their modality may be missing.

    Args:
        decoders: By modality, a network from codes ``(*sample, batch, dim)`` to
            ``(*sample, batch, ...)``.
        likelihoods: By modality, from its output to the distribution of one datum, see
            ``pyro_vae.likelihoods``.
        prior: Samples the shared code inside the plate, see ``pyro_vae.priors``.
        private: By modality, a prior of a latent of its own, with site ``"w_<modality>"``, or
            the number of its dimensions for a standard normal one. Any subset of modalities.
        weights: By modality, a weight of its log-likelihood in training: a number, a 0-d tensor
            or a schedule. Evaluation ignores them. In ``TraceIWAE_ELBO`` with several particles
            they stand inside the logarithm; that of a modality which is alone in a batch is a
            weight of the data, outside.
        name: Name in the param store.

    Sites: ``"x_<modality>"``, ``"w_<modality>"`` and those of the prior (``"z"``), in the plate
    ``"data"``.

    Raises:
        ValueError: If the modalities of the arguments differ, or a name is not one that torch
            can give to a module.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli, Categorical
        >>> from pyro_vae.nets import MLP
        >>> vae = MultimodalVAE(
        ...     {"image": MLP(2, [16], 64), "label": MLP(2, [16], 10)},
        ...     {"image": Bernoulli(), "label": Categorical(event_dim=0)},
        ...     StandardNormalPrior(2),
        ... )
        >>> images = torch.zeros(5, 64)
        >>> vae({"image": images, "label": None})["label"].shape  # drawn
        torch.Size([5])
        >>> given = {"image": images, "label": torch.full((5,), -1)}
        >>> first_three = torch.arange(5) < 3
        >>> sites = poutine.trace(vae).get_trace(given, {"label": first_three & False}).nodes
        >>> sites["x_label"]["mask"].any()
        tensor(False)

    References:
        Wu and Goodman (2018), Multimodal generative models for scalable weakly-supervised
        learning, https://arxiv.org/abs/1802.05335;
        Lee and Pavlovic (2021), Private-shared disentangled multimodal VAE,
        https://arxiv.org/abs/2012.13024 (the private latents)
    """

    def __init__(
        self,
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, Callable[[torch.Tensor], TorchDistribution]],
        prior: Callable[[], torch.Tensor],
        private: Mapping[str, Callable[[], torch.Tensor] | int] | None = None,
        *,
        weights: Mapping[str, Weight] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        where = "MultimodalVAE"
        self.decoders = modules_by_name(where, "decoders", decoders)
        if set(likelihoods) != set(decoders):
            raise ValueError(
                f"{where}: expected one likelihood for each of {list(decoders)}, got "
                f"{list(likelihoods)}. Use the same names as in decoders."
            )
        self.likelihoods = nn.ModuleDict(
            {n: as_module(where, f"likelihoods['{n}']", likelihoods[n]) for n in decoders}
        )
        self.prior = as_module(where, "prior", prior)
        private, weights = private or {}, weights or {}
        check_names(where, "private", private, decoders)
        check_names(where, "weights", weights, decoders)
        priors = {n: _private_prior(n, p) for n, p in private.items()}
        # Of Pyro's kind, so that parameters of a prior are named after this program.
        self.private: Any = PyroModule[nn.ModuleDict](priors)  # type: ignore[arg-type]
        self.weights = {
            n: weight_of(where, f"weights['{n}']", weight) for n, weight in weights.items()
        }
        self.modalities = tuple(decoders)

    def forward(self, batch: Batch, present: Present | None = None) -> dict[str, torch.Tensor]:
        """Runs the model on a batch; returns the data of the modalities that took part.

        Args:
            batch: Data by modality, ``(batch, *event)``, or ``None`` for what is to be drawn.
            present: By modality, bool ``(batch,)``: the rows in which it is observed.

        Returns:
            By modality, the data as given or as drawn, ``(*sample, batch, *event)``.

        Raises:
            TypeError: If an argument, or what is in it, has another type.
            ValueError: If a modality is unknown, or data or masks do not fit.
        """
        seen = observed_of("MultimodalVAE", self.modalities, batch, present)
        # Each look at one of these attributes calls pyro.module on all that is in it.
        decoders, likelihoods, private = self.decoders, self.likelihoods, self.private
        names = [n for n in self.modalities if n in seen.values or n in seen.unknown]
        values = {}
        with pyro.plate("data", seen.num_rows):
            shared = self.prior()
            codes = {}
            for name in names:
                codes[name] = shared
                if name in private:  # Of what is only drawn, the latents are not a guide's either.
                    with Messenger() if name in seen.values else poutine.mask(mask=False):
                        codes[name] = _joined(shared, private[name]())
            for name, code in codes.items():
                fn = likelihoods[name](decoders[name](code))
                with _Weighted(self.weights.get(name)):
                    values[name] = observe("MultimodalVAE", name, fn, seen)
        return values


class _Weighted(Messenger):
    """Scales what is observed inside. Not poutine.scale: that refuses the scale 0."""

    def __init__(self, weight: float | torch.Tensor | None) -> None:
        super().__init__()
        self._weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if self._weight is not None and is_observed(msg):
            msg["scale"] = msg["scale"] * self._weight


def _joined(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Two codes side by side; one that particles do not share is spread over them."""
    leading = torch.broadcast_shapes(shared.shape[:-1], own.shape[:-1])
    return torch.cat([part.expand(*leading, part.shape[-1]) for part in (shared, own)], -1)


def _private_prior(name: str, prior: Any) -> nn.Module:
    site = f"w_{name}"
    if isinstance(prior, int):
        return StandardNormalPrior(prior, site=site)
    if getattr(prior, "site", site) != site:
        raise ValueError(
            f"MultimodalVAE: expected the private prior of modality '{name}' to sample site "
            f"'{site}', got '{prior.site}'. Make it with site='{site}'."
        )
    return as_module("MultimodalVAE", f"private['{name}']", prior)
