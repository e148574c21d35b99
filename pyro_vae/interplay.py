"""Exponential-family joints of latents that act on one another. Tensors in, tensors out, no Pyro.

Each modality has a latent vector with sufficient statistics T, whose joint density is

    p(z_1, ..., z_M) = exp(sum_m natural_m . T(z_m) + sum_{m<n} T(z_m)^T W_mn T(z_n)) / Z

with respect to the Lebesgue or the counting measure. Given the others, each latent is of the
family of its statistics, hence block Gibbs sampling. Evidence of data, exp(evidence_m . T(z_m)),
adds to the natural parameters, so that prior and posterior are of one kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from pyro_vae.checks import check_at_least
from pyro_vae.interplay_checks import check_evidence, check_natural, check_pair
from pyro_vae.statistics import Statistics

__all__ = ["Interplay"]

Latents = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Interplay:
    r"""Latents of several modalities whose sufficient statistics act on one another in pairs.

    .. math::
        \log p(z) = \sum_m \lambda_m \cdot T(z_m) + \sum_{m<n} T(z_m)^\top W_{mn} T(z_n)
        - \log Z(\lambda, W)

    Normal statistics are accepted where a sufficient condition says that the density can be
    normalised. With g = -W of two squares, it is that g >= 0, that a square acts on a value only
    where g > 0, and that the matrix is positive definite which has
    :math:`-2 (\lambda_{i2} + \sum_j W_{ij}^2 / 2 g_{ij})` on its diagonal (W here from the square
    of i to the value of j), and elsewhere -W of two values where g = 0. (By Young's inequality
    each such W is outweighed by half of g and by a part of the square; two values are outweighed
    wherever g > 0.) It is checked while the validation of ``torch.distributions`` is on.

    Like a distribution, a joint is made anew after its parameters change: what
    :meth:`log_partition` and :meth:`sample` have in common is worked out once.

    Args:
        statistics: Family of the latents.
        natural: lambda of each modality, ``(*batch, per_dim * dim)``. Two modalities or more,
            or what is left of them.
        interaction: W of pairs of modalities, ``(per_dim * dim_m, per_dim * dim_n)``; for normal
            statistics also ``(dim_m, dim_n)``, which couples the values and not their squares.
            Pairs left out do not interact.

    Raises:
        ValueError: If a modality is unknown, coupled to itself or coupled twice, a W has a wrong
            shape, or the density cannot be shown to have a normaliser.

    Example:
        >>> natural = {"image": torch.zeros(2), "label": torch.zeros(1)}
        >>> from pyro_vae.statistics import BernoulliStatistics
        >>> joint = Interplay(
        ...     BernoulliStatistics(), natural, {("image", "label"): torch.tensor([[1.0], [2.0]])}
        ... )
        >>> joint.log_density({"image": torch.tensor([1.0, 1.0]), "label": torch.tensor([1.0])})
        tensor(3.)
        >>> states = torch.tensor([0.0, 1.0, 2.0, 3.0]).exp().sum() + 4
        >>> torch.allclose(joint.log_partition(), states.log())
        True

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval, for two modalities, one of them data; here all are latent.
        Arnold, Castillo and Sarabia (1999), Conditional specification of statistical models, for
        densities with normal conditionals.
    """

    statistics: Statistics
    natural: Mapping[str, torch.Tensor]
    interaction: Mapping[tuple[str, str], torch.Tensor]
    _unexpanded: "Interplay | None" = field(default=None, init=False, repr=False, compare=False)
    _solutions: dict[bool, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        widths = {name: check_natural(n, self._per_dim, name) for name, n in self.natural.items()}
        for pair, weight in self.interaction.items():
            check_pair(pair, weight, self.interaction, widths, self._per_dim)
        if torch.distributions.Distribution._validate_args:
            self.statistics.check(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in order."""
        return tuple(self.natural)

    @property
    def batch_shape(self) -> torch.Size:
        """Of the natural parameters of all modalities."""
        return torch.broadcast_shapes(*(n.shape[:-1] for n in self.natural.values()))

    def dim(self, name: str) -> int:
        """Number of latents of a modality."""
        return self._width(name) // self._per_dim

    @property
    def is_exact(self) -> bool:
        """Whether :meth:`log_partition` is known.

        It is for one modality, for normal statistics whose values alone interact, and for
        Bernoulli latents of which all but the largest modality have 12 dimensions at most.
        """
        return len(self.names) == 1 or self.statistics.is_exact(self)

    def tilted(self, evidence: Mapping[str, torch.Tensor]) -> "Interplay":
        """The joint times exp(sum_m evidence_m . T(z_m)); modalities left out have no evidence.

        Args:
            evidence: By modality, ``(*batch, per_dim * dim)``.

        Raises:
            ValueError: If a modality is unknown or its evidence has a wrong width, or if no
                normaliser is left.
        """
        check_evidence(evidence, {name: self._width(name) for name in self.names})
        natural = dict(self.natural)
        for name, value in evidence.items():
            natural[name] = natural[name] + value
        other = self.with_natural(natural)
        if torch.distributions.Distribution._validate_args and not all(
            self.statistics.keeps_normaliser(value) for value in evidence.values()
        ):
            self.statistics.check(other)
        return other

    def expand(self, batch_shape: tuple[int, ...]) -> "Interplay":
        """The same joint for every row of a batch."""
        natural = {n: v.expand(*batch_shape, v.shape[-1]) for n, v in self.natural.items()}
        other = self.with_natural(natural)
        object.__setattr__(other, "_unexpanded", self._solved)
        return other

    def with_natural(self, natural: Mapping[str, torch.Tensor]) -> "Interplay":
        """The same interactions of modalities with these natural parameters; not checked again."""
        other = object.__new__(Interplay)
        new = {"natural": natural, "_unexpanded": None, "_solutions": {}}
        for name, value in {**vars(self), **new}.items():
            object.__setattr__(other, name, value)
        return other

    def pairs(self) -> list[tuple[tuple[str, str], torch.Tensor]]:
        """The interactions between modalities that are left, as given."""
        return [
            ((m, n), w)
            for (m, n), w in self.interaction.items()
            if m in self.natural and n in self.natural
        ]

    def given(self, z: Latents) -> "Interplay":
        """The joint of the other modalities, given the latents of some, ``(*batch, dim)``."""
        known = {name: self.statistics.of(value) for name, value in z.items()}
        return self.with_natural({n: self._field(n, known) for n in self.names if n not in z})

    def log_density(self, z: Latents) -> torch.Tensor:
        """Log-density without its normaliser, nats, ``(*batch,)``."""
        own = [(self.natural[n] * self.statistics.of(z[n])).sum(-1) for n in self.names]
        return torch.stack(torch.broadcast_tensors(*own)).sum(0) + self.coupling(z)

    def coupling(self, z: Latents) -> torch.Tensor:
        """The part of the log-density that couples modalities, nats, ``(*batch,)``."""
        known = {name: self.statistics.of(value) for name, value in z.items()}
        total = known[self.names[0]].new_zeros(())
        for (first, second), weight in self.pairs():
            rows, columns = weight.shape
            pull = known[first][..., :rows] @ weight
            total = total + (pull * known[second][..., :columns]).sum(-1)
        return total

    def sweep(self, z: Latents, strength: float = 1.0) -> Latents:
        """One sweep of block Gibbs sampling: each modality given the newest of the others.

        Args:
            z: Latents by modality, ``(*batch, dim)``.
            strength: Multiplies all interactions, in [0, 1].
        """
        known = {name: self.statistics.of(z[name]) for name in self.names}
        result = {}
        for name in self.names:
            others = {n: t for n, t in known.items() if n != name}
            result[name] = self.statistics.draw(self._field(name, others, strength))
            known[name] = self.statistics.of(result[name])
        return result

    def annealed(
        self, num_temperatures: int, sample_shape: tuple[int, ...] = (), *, num_more: int = 0
    ) -> tuple[Latents, torch.Tensor]:
        r"""Samples by Gibbs sweeps while the interactions grow from 0 to their strength.

        The start, without interaction, is exact. At any number of temperatures the weights w
        have :math:`E[w] = Z` and :math:`E[w f(z)] = Z \, E_p[f(z)]`; so the expected log-weight is
        a lower bound on log Z, which it approaches as the temperatures increase.

        Args:
            num_temperatures: Number of sweeps, each at another strength.
            sample_shape: Shape of independent chains.
            num_more: Sweeps at full strength after them, which leave the weights as they are and
                bring the samples closer to p.

        Returns:
            The last latents, ``(*sample_shape, *batch, dim)`` by modality, and log w, nats,
            ``(*sample_shape, *batch)``.

        References:
            Neal (2001), Annealed importance sampling; Salakhutdinov and Murray (2008), On the
            quantitative analysis of deep belief networks.
        """
        check_at_least("Interplay.annealed", "num_temperatures", num_temperatures, 1)
        joint = self.expand((*sample_shape, *self.batch_shape))
        z = {name: self.statistics.draw(joint.natural[name]) for name in self.names}
        each = [self.statistics.log_partition(joint.natural[name]) for name in self.names]
        log_weight = torch.stack(each).sum(0)
        for step in range(1, num_temperatures + 1):
            log_weight = log_weight + joint.coupling(z) / num_temperatures
            z = joint.sweep(z, step / num_temperatures)
        for _ in range(num_more):
            z = joint.sweep(z)
        return z, log_weight

    def log_partition(self) -> torch.Tensor:
        """log Z, nats, ``(*batch,)``, exact and with a gradient.

        Raises:
            ValueError: If it is not known, see :attr:`is_exact`.
        """
        self._require_exact("log_partition")
        if len(self.names) == 1:
            return self.statistics.log_partition(self.natural[self.names[0]])
        return self.statistics.log_partition_of(self, self._solution())

    def sample(self) -> Latents:
        """Exact samples, ``(*batch, dim)`` by modality; of normal latents with a gradient.

        Raises:
            ValueError: If the normaliser is not known, see :attr:`is_exact`.
        """
        self._require_exact("sample")
        if len(self.names) == 1:
            return {name: self.statistics.draw(n) for name, n in self.natural.items()}
        return self.statistics.sample_of(self, self._solution())

    @property
    def _per_dim(self) -> int:
        return self.statistics.per_dim

    @property
    def _solved(self) -> "Interplay":
        """The joint that this one was expanded from, or itself."""
        return self if self._unexpanded is None else self._unexpanded

    def _solution(self) -> torch.Tensor:
        """What log-partition and samples have in common, worked out once with its gradient."""
        joint, with_gradient = self._solved, torch.is_grad_enabled()
        if with_gradient not in joint._solutions:
            joint._solutions[with_gradient] = joint.statistics.solve(joint)
        return joint._solutions[with_gradient]

    def _width(self, name: str) -> int:
        return self.natural[name].shape[-1]

    def _field(self, name: str, known: Latents, strength: float = 1.0) -> torch.Tensor:
        """Natural parameters of a modality given the statistics of others."""
        total, width = self.natural[name], self._width(name)
        for (first, second), weight in self.interaction.items():
            if first == name and second in known:
                weight, other = weight.mT, known[second]
            elif second == name and first in known:
                other = known[first]
            else:
                continue
            pull = other[..., : weight.shape[0]] @ weight
            total = total + strength * pad(pull, (0, width - weight.shape[1]))
        return total

    def _require_exact(self, what: str) -> None:
        if not self.is_exact:
            dims = {name: self.dim(name) for name in self.names}
            raise ValueError(
                f"Interplay.{what}: expected a joint whose log-partition is known, got "
                f"{type(self.statistics).__name__} of dimensions {dims}. Estimate it with "
                "annealed(num_temperatures)."
            )
