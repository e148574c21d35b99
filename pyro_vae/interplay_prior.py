"""The prior of modalities whose latents act on one another."""

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_vae.checks import check_at_least
from pyro_vae.interplay import Interplay
from pyro_vae.interplay_sites import sample_interplay
from pyro_vae.program import Program
from pyro_vae.statistics import BernoulliStatistics, NormalStatistics, Statistics

__all__ = ["InterplayPrior"]

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
        num_sweeps: Gibbs sweeps of a sample; in the first half the interactions grow from nothing
            to their strength. By default samples are exact where possible, else 30.
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
        >>> import pyro
        >>> prior = InterplayPrior({"image": 3, "label": 2})
        >>> with pyro.plate("data", 5):
        ...     [z.shape for z in prior().values()]
        [torch.Size([5, 3]), torch.Size([5, 2])]

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval. There one side is data; here both are latent.
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
