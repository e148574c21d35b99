"""Modalities with latents of their own, coupled by an exponential-family prior."""

from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from operator import and_
from typing import Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_mask
from torch import nn
from torch.nn.functional import softplus

from pyro_vae.checks import check_at_least, check_data, check_values
from pyro_vae.handlers import MaskMissingMessenger
from pyro_vae.interplay import BernoulliStatistics, Interplay, NormalStatistics, Statistics
from pyro_vae.interplay_sites import sample_interplay
from pyro_vae.modalities import Batch, Observed, Present, modules_by_name, observed_of
from pyro_vae.program import Program

__all__ = ["InterplayPrior", "InterplayVAE"]

KINDS = ("normal", "normal-squares", "bernoulli")

_MARGIN = 0.98  # How near to a density without normaliser the strongest interaction comes.


class InterplayPrior(Program):
    r"""p(z_1, ..., z_M), where the sufficient statistics of modalities act on one another.

    See :class:`pyro_vae.interplay.Interplay`. The kinds of latents are

    - ``"normal"``: real, the values interact. The joint is a multivariate normal; its density is
      known and samples are exact.
    - ``"normal-squares"``: real, values and squares interact. Each modality is normal given the
      others, the joint is not. Gibbs sampling; the normaliser is not
      known.
    - ``"bernoulli"``: binary. Exact as long as all modalities but the largest have 12 dimensions
      at most, else as before.

    Where the normaliser is known the latents have proper densities and every ELBO and every
    evaluation takes them. Where it is not, their ``log_prob`` raises: train with
    ``TraceInterplay_ELBO``, which reports a bound.

    Whatever the values of the parameters, the density has a normaliser.

    Args:
        dims: Number of latents of each modality.
        kind: "normal", "normal-squares" or "bernoulli".
        num_sweeps: Gibbs sweeps of a sample, while the interactions grow from nothing to their
            strength. By default samples are exact where possible, else 30.
        name: Name in the param store.

    Sites (when called inside a plate): ``"z_<modality>"`` each. Returns their values by modality.

    Attributes:
        kind: As given.
        raw_natural: Unconstrained natural parameters by modality.
        raw_interaction: Unconstrained W, of pairs "<modality> & <modality>".

    Raises:
        TypeError: If a dimension or ``num_sweeps`` is no integer.
        ValueError: If there are fewer than two modalities, one without latents, or the kind is
            unknown.

    Example:
        >>> prior = InterplayPrior({"image": 3, "label": 2})
        >>> with pyro.plate("data", 5):
        ...     [z.shape for z in prior().values()]
        [torch.Size([5, 3]), torch.Size([5, 2])]

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval, section 2. There one side is data; here both are latent.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        kind: Literal["normal", "normal-squares", "bernoulli"] = "normal",
        *,
        num_sweeps: int | None = None,
        name: str | None = None,
    ) -> None:
        where = "InterplayPrior"
        if kind not in KINDS:
            raise ValueError(
                f"{where}: expected kind to be one of {KINDS}, got {kind!r}. Name one."
            )
        if len(dims) < 2:
            raise ValueError(
                f"{where}: expected two modalities or more, got {list(dims)}. A single one has "
                "nothing to interact with: use VAE."
            )
        for modality, dim in dims.items():
            check_at_least(where, f"dims['{modality}']", dim, 1)
        if num_sweeps is not None:
            check_at_least(where, "num_sweeps", num_sweeps, 1)
        super().__init__(name)
        self.kind, self.dims, self.num_sweeps = kind, dict(dims), num_sweeps
        binary = kind == "bernoulli"
        self.statistics: Statistics = BernoulliStatistics() if binary else NormalStatistics()
        per_dim = self.statistics.per_dim
        self.raw_natural = nn.ParameterDict(
            {modality: nn.Parameter(torch.zeros(per_dim * dim)) for modality, dim in dims.items()}
        )
        width = 1 if kind == "normal" else per_dim
        self.raw_interaction = nn.ParameterDict(
            {
                f"{m} & {n}": nn.Parameter(0.01 * torch.randn(width * dims[m], width * dims[n]))
                for m, n in combinations(dims, 2)
            }
        )

    def joint(self) -> Interplay:
        """The prior with the present values of its parameters."""
        pairs = list(combinations(self.dims, 2))
        raw = {(m, n): self.raw_interaction[f"{m} & {n}"] for m, n in pairs}
        if self.kind == "bernoulli":
            natural = {name: self.raw_natural[name] for name in self.dims}
            return Interplay(self.statistics, natural, raw)
        natural, scales = {}, {}
        for name in self.dims:
            linear, log_precision = self.raw_natural[name].chunk(2)
            natural[name] = torch.cat([linear, -0.5 * log_precision.exp()])
            scales[name] = (0.5 * log_precision).exp()
        interaction = self._linear(raw) if self.kind == "normal" else self._squares(raw)
        # The raw W belong to latents of precision 1.
        for (m, n), weight in interaction.items():
            powers = [scales[k] if self.kind == "normal" else _powers(scales[k]) for k in (m, n)]
            interaction[m, n] = powers[0].unsqueeze(-1) * weight * powers[1]
        return Interplay(self.statistics, natural, interaction)

    def forward(self) -> dict[str, torch.Tensor]:
        """Samples the latents of all modalities within the plates around the call."""
        return sample_interplay(self.joint(), num_sweeps=self.num_sweeps)

    def _linear(
        self, raw: dict[tuple[str, str], torch.Tensor]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """W of values for which I - W, over all modalities, is positive definite."""
        starts, total = {}, 0
        for name, dim in self.dims.items():
            starts[name] = total
            total += dim
        matrix = next(iter(raw.values())).new_zeros(total, total)
        for (m, n), weight in raw.items():
            rows = slice(starts[m], starts[m] + self.dims[m])
            columns = slice(starts[n], starts[n] + self.dims[n])
            matrix[rows, columns], matrix[columns, rows] = weight, weight.mT
        norm = torch.linalg.eigvalsh(matrix).abs().amax()
        return {pair: _MARGIN * weight / (1 + norm.square()).sqrt() for pair, weight in raw.items()}

    def _squares(
        self, raw: dict[tuple[str, str], torch.Tensor]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """W of values and squares that keeps within the condition of ``Interplay``."""
        total, result = sum(self.dims.values()), {}
        for (m, n), weight in raw.items():
            top, bottom = weight.chunk(2)
            (values, left), (right, squares) = top.chunk(2, -1), bottom.chunk(2, -1)
            # At most -1/2 is spent on each square, shared by all that act on it.
            damping = softplus(squares) / total
            on_first = (_MARGIN * damping / (total - self.dims[m])).sqrt()
            on_second = (_MARGIN * damping / (total - self.dims[n])).sqrt()
            above = torch.cat([values, left.tanh() * on_second], -1)
            below = torch.cat([right.tanh() * on_first, -damping], -1)
            result[m, n] = torch.cat([above, below])
        return result


def _powers(scale: torch.Tensor) -> torch.Tensor:
    return torch.cat([scale, scale.square()])


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
