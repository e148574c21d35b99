"""Exponential-family joints of latents that act on one another. Tensors in, tensors out, no Pyro.

Each modality has a latent vector with sufficient statistics T, whose joint density is

    p(z_1, ..., z_M) = exp(sum_m natural_m . T(z_m) + sum_{m<n} T(z_m)^T W_mn T(z_n)) / Z

with respect to the Lebesgue or the counting measure. Given the others, each latent is of the
family of its statistics, hence block Gibbs sampling. Evidence of data, exp(evidence_m . T(z_m)),
adds to the natural parameters, so that prior and posterior are of one kind.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from pyro_vae.checks import check_at_least
from pyro_vae.statistics import BernoulliStatistics, NormalStatistics, Statistics

__all__ = ["Interplay"]

Latents = dict[str, torch.Tensor]

_MOST_BITS = 12  # Of the latents that are enumerated: 4096 states a row.


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
    wherever g > 0.)

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

    def __post_init__(self) -> None:
        for name, natural in self.natural.items():
            if natural.dim() == 0 or not natural.shape[-1] or self._width(name) % self._per_dim:
                raise ValueError(
                    f"Interplay: expected {self._per_dim} natural parameters for each latent of "
                    f"modality '{name}', got shape {tuple(natural.shape)}. Their last dimension is "
                    f"{self._per_dim} * dim."
                )
        for (first, second), weight in self.interaction.items():
            self._check_pair(first, second, weight)
        if isinstance(self.statistics, NormalStatistics):
            _check_normalisable(self)

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
        if len(self.names) == 1:
            return True
        if isinstance(self.statistics, NormalStatistics):
            return self._is_linear
        dims = [self.dim(name) for name in self.names]
        return sum(dims) - max(dims) <= _MOST_BITS

    def tilted(self, evidence: Mapping[str, torch.Tensor]) -> "Interplay":
        """The joint times exp(sum_m evidence_m . T(z_m)); modalities left out have no evidence.

        Args:
            evidence: By modality, ``(*batch, per_dim * dim)``.

        Raises:
            ValueError: If a modality is unknown or its evidence has a wrong width, or if no
                normaliser is left.
        """
        natural = dict(self.natural)
        for name, value in evidence.items():
            if name not in natural or value.shape[-1] != self._width(name):
                wanted = {name: self._width(name) for name in natural}
                raise ValueError(
                    f"Interplay.tilted: expected evidence of widths {wanted}, got "
                    f"{tuple(value.shape)} for '{name}'. A network of a modality gives one "
                    "number for each of its statistics."
                )
            natural[name] = natural[name] + value
        return Interplay(self.statistics, natural, self.interaction)

    def expand(self, batch_shape: tuple[int, ...]) -> "Interplay":
        """The same joint for every row of a batch."""
        natural = {n: v.expand(*batch_shape, v.shape[-1]) for n, v in self.natural.items()}
        return self._with(natural)

    def given(self, z: Latents) -> "Interplay":
        """The joint of the other modalities, given the latents of some, ``(*batch, dim)``."""
        known = {name: self.statistics.of(value) for name, value in z.items()}
        return self._with({n: self._field(n, known) for n in self.names if n not in z})

    def log_density(self, z: Latents) -> torch.Tensor:
        """Log-density without its normaliser, nats, ``(*batch,)``."""
        own = [(self.natural[n] * self.statistics.of(z[n])).sum(-1) for n in self.names]
        return torch.stack(torch.broadcast_tensors(*own)).sum(0) + self.coupling(z)

    def coupling(self, z: Latents) -> torch.Tensor:
        """The part of the log-density that couples modalities, nats, ``(*batch,)``."""
        known = {name: self.statistics.of(value) for name, value in z.items()}
        total = known[self.names[0]].new_zeros(())
        for (first, second), weight in self._pairs():
            total = total + (known[first] @ weight * known[second]).sum(-1)
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
            quantitative analysis of deep belief networks, section 4.
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
        if isinstance(self.statistics, BernoulliStatistics):
            return self._enumerated()[1].logsumexp(-1)
        linear, chol = self._precision_chol()
        half = torch.linalg.solve_triangular(chol, linear.unsqueeze(-1), upper=False)
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * linear.shape[-1] * math.log(2 * math.pi)
        return 0.5 * half.square().sum((-2, -1)) + constant - log_det

    def sample(self) -> Latents:
        """Exact samples, ``(*batch, dim)`` by modality; of normal latents with a gradient.

        Raises:
            ValueError: If the normaliser is not known, see :attr:`is_exact`.
        """
        self._require_exact("sample")
        if len(self.names) == 1:
            return {name: self.statistics.draw(n) for name, n in self.natural.items()}
        if isinstance(self.statistics, BernoulliStatistics):
            states, log_density = self._enumerated()
            index = torch.distributions.Categorical(logits=log_density.detach()).sample()
            z = {name: state[index] for name, state in states.items()}
            rest = self.given(z)
            z |= {name: self.statistics.draw(n) for name, n in rest.natural.items()}
            return {name: z[name] for name in self.names}
        linear, chol = self._precision_chol()
        half = torch.linalg.solve_triangular(chol, linear.unsqueeze(-1), upper=False)
        noise = half + torch.randn_like(half)
        joined = torch.linalg.solve_triangular(chol.mT, noise, upper=True).squeeze(-1)
        values = joined.split([self.dim(name) for name in self.names], -1)
        return dict(zip(self.names, values, strict=True))

    @property
    def _per_dim(self) -> int:
        return self.statistics.per_dim

    @property
    def _is_linear(self) -> bool:
        """Whether the shapes of all W say that only values interact."""
        return all(
            tuple(w.shape) == (self.dim(m), self.dim(n))
            for (m, n), w in self.interaction.items()
            if m in self.natural and n in self.natural
        )

    def _width(self, name: str) -> int:
        return self.natural[name].shape[-1]

    def _with(self, natural: dict[str, torch.Tensor]) -> "Interplay":
        """One that has a normaliser because this one has; not checked again."""
        other = object.__new__(Interplay)
        for field, value in vars(self).items():
            object.__setattr__(other, field, value)
        object.__setattr__(other, "natural", natural)
        return other

    def _pairs(self) -> list[tuple[tuple[str, str], torch.Tensor]]:
        """The W between modalities that are left, of full width."""
        return [
            (
                (m, n),
                pad(w, (0, self._width(n) - w.shape[1], 0, self._width(m) - w.shape[0])),
            )
            for (m, n), w in self.interaction.items()
            if m in self.natural and n in self.natural
        ]

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
            field = other[..., : weight.shape[0]] @ weight
            total = total + strength * pad(field, (0, width - weight.shape[1]))
        return total

    def _require_exact(self, what: str) -> None:
        if not self.is_exact:
            dims = {name: self.dim(name) for name in self.names}
            raise ValueError(
                f"Interplay.{what}: expected a joint whose log-partition is known, got "
                f"{type(self.statistics).__name__} of dimensions {dims}. Estimate it with "
                "annealed(num_temperatures)."
            )

    def _enumerated(self) -> tuple[Latents, torch.Tensor]:
        """All states of all modalities but the largest, ``(states, dim)``; its sum over that one.

        The log-density of the states is without normaliser, ``(*batch, states)``.
        """
        summed = max(self.names, key=self.dim)
        rest = [name for name in self.names if name != summed]
        dims = [self.dim(name) for name in rest]
        like = self.natural[summed]
        bits = list(itertools.product((0.0, 1.0), repeat=sum(dims)))
        table = torch.tensor(bits, dtype=like.dtype, device=like.device)
        states = dict(zip(rest, table.split(dims, -1), strict=True))
        joint = self._with({n: v.unsqueeze(-2) for n, v in self.natural.items()})
        of_rest = joint._with({name: joint.natural[name] for name in rest})
        of_summed = self.statistics.log_partition(joint.given(states).natural[summed])
        return states, of_rest.log_density(states) + of_summed

    def _precision_chol(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Linear natural parameters and the factor of the precision of a normal joint."""
        both = [self.natural[name].chunk(2, -1) for name in self.names]
        shape = self.batch_shape
        linear, quadratic = (
            torch.cat([part[k].expand(*shape, part[k].shape[-1]) for part in both], -1)
            for k in (0, 1)
        )
        precision = (-2 * quadratic).diag_embed() - self._matrix(0, 0)
        return linear, torch.linalg.cholesky(precision)

    def _matrix(self, row: int, column: int) -> torch.Tensor:
        """W from one power of all normal latents to another, ``(latents, latents)``.

        Args:
            row: 0 for the values, 1 for the squares.
            column: The same.
        """
        start, total = {}, 0
        for name in self.names:
            start[name] = total
            total += self.dim(name)
        matrix = self.natural[self.names[0]].new_zeros(total, total)
        for (m, n), w in self._pairs():
            for (first, second), weight in {(m, n): w, (n, m): w.mT}.items():
                i, j, size_i, size_j = (
                    start[first],
                    start[second],
                    self.dim(first),
                    self.dim(second),
                )
                block = weight.unflatten(0, (2, size_i)).unflatten(-1, (2, size_j))
                matrix[i : i + size_i, j : j + size_j] = block[row, :, column]
        return matrix

    def _check_pair(self, first: str, second: str, weight: torch.Tensor) -> None:
        pair = f"('{first}', '{second}')"
        if first == second or first not in self.natural or second not in self.natural:
            raise ValueError(
                f"Interplay: expected interactions between two of the modalities "
                f"{list(self.names)}, got {pair}. A modality does not act on itself."
            )
        if (second, first) in self.interaction:
            raise ValueError(
                f"Interplay: expected one W for each pair of modalities, got {pair} and its "
                "reverse. Add the transpose of one to the other."
            )
        full = (self._width(first), self._width(second))
        wanted = {full, (self.dim(first), self.dim(second))}
        if tuple(weight.shape) not in wanted:
            raise ValueError(
                f"Interplay: expected W of {pair} of shape {' or '.join(map(str, sorted(wanted)))}"
                f", got {tuple(weight.shape)}. Rows belong to the first modality of the pair, "
                "columns to the second."
            )


@torch.no_grad()
def _check_normalisable(joint: Interplay) -> None:
    """Raises unless a sufficient condition for a normaliser holds, see :class:`Interplay`."""
    names, shape = joint.names, joint.batch_shape
    halves = [joint.natural[n].chunk(2, -1)[1] for n in names]
    quadratic = torch.cat([h.expand(*shape, h.shape[-1]) for h in halves], -1)
    problem = None
    if not (quadratic < 0).all():
        problem = f"a natural parameter of a square of {float(quadratic.max()):g}, which is not < 0"
    else:
        damping, mixed, values = -joint._matrix(1, 1), joint._matrix(1, 0), joint._matrix(0, 0)
        if (damping < 0).any():
            problem = "a W of two squares above 0"
        elif ((damping == 0) & ((mixed != 0) | (mixed.mT != 0))).any():
            problem = "a W of a square and a value without one of the two squares below 0"
        else:
            cost = torch.where(mixed == 0, mixed, mixed.square() / (2 * damping)).sum(-1)
            precision = (-2 * (quadratic + cost)).diag_embed()
            precision = precision - torch.where(damping == 0, values, 0.0)
            if torch.linalg.cholesky_ex(precision).info.any():
                problem = "interactions too strong for the natural parameters of the squares"
    if problem:
        raise ValueError(
            f"Interplay: expected natural parameters and W of normal statistics for which the "
            f"density has a normaliser, got {problem}. Weaken W or lower the natural parameters "
            "of the squares, or take them from pyro_vae.models.InterplayPrior."
        )
