"""Sufficient statistics of latents in exponential families. Tensors in, tensors out, no Pyro.

What a family knows of single latents, and of a joint of several modalities, see
:class:`pyro_vae.interplay.Interplay`.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import constraints
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from pyro_vae.interplay import Interplay, Latents

__all__ = ["BernoulliStatistics", "NormalStatistics", "Statistics"]

_MOST_BITS = 12  # Of the latents that are enumerated: 4096 states a row.


class Statistics(ABC):
    """Abstract: a family of independent coordinates, ``per_dim`` statistics for each.

    Attributes:
        per_dim: Statistics of a coordinate. Those of all first powers come first.
        has_rsample: Whether samples have a gradient.
        support: Where the latents of a modality may lie.
    """

    per_dim: int
    has_rsample: bool
    support: Any

    @abstractmethod
    def of(self, z: torch.Tensor) -> torch.Tensor:
        """T(z): ``(*batch, dim)`` to ``(*batch, per_dim * dim)``."""

    @abstractmethod
    def draw(self, natural: torch.Tensor) -> torch.Tensor:
        """A sample, ``(*batch, dim)``, where it can be with a gradient."""

    @abstractmethod
    def log_partition(self, natural: torch.Tensor) -> torch.Tensor:
        """Log of the normaliser without interaction, nats, ``(*batch,)``."""

    @abstractmethod
    def evidence(self, output: torch.Tensor) -> torch.Tensor:
        """A network's output as natural parameters that keep every joint normalisable."""

    @abstractmethod
    def keeps_normaliser(self, evidence: torch.Tensor) -> bool:
        """Whether natural parameters, added to a joint's, keep every joint normalisable."""

    @abstractmethod
    def check(self, joint: "Interplay") -> None:
        """Raises unless a sufficient condition for a normaliser holds."""

    @abstractmethod
    def is_exact(self, joint: "Interplay") -> bool:
        """Whether two modalities or more have a known log-partition and exact samples."""

    @abstractmethod
    def solve(self, joint: "Interplay") -> torch.Tensor:
        """What log-partition and samples of an exact joint have in common."""

    @abstractmethod
    def log_partition_of(self, joint: "Interplay", solution: torch.Tensor) -> torch.Tensor:
        """log Z of a solved joint, or of what it was expanded to, nats, ``(*batch,)``."""

    @abstractmethod
    def sample_of(self, joint: "Interplay", solution: torch.Tensor) -> "Latents":
        """Exact samples of a solved joint, or of what it was expanded to, by modality."""


class NormalStatistics(Statistics):
    """T(z) = (z, z^2), z real; natural parameters (loc / scale^2, -1 / (2 scale^2)).

    Example:
        >>> NormalStatistics().of(torch.tensor([2.0, 3.0]))
        tensor([2., 3., 4., 9.])
    """

    per_dim = 2
    has_rsample = True
    support = constraints.real_vector

    def of(self, z: torch.Tensor) -> torch.Tensor:
        """T(z), the values and then their squares."""
        return torch.cat([z, z.square()], -1)

    def draw(self, natural: torch.Tensor) -> torch.Tensor:
        """A sample with a gradient."""
        linear, quadratic = natural.chunk(2, -1)
        variance = -0.5 / quadratic
        return linear * variance + variance.sqrt() * torch.randn_like(linear)

    def log_partition(self, natural: torch.Tensor) -> torch.Tensor:
        """Log of the normaliser without interaction, nats, ``(*batch,)``."""
        linear, quadratic = natural.chunk(2, -1)
        return (-0.25 * linear.square() / quadratic + 0.5 * (-math.pi / quadratic).log()).sum(-1)

    def evidence(self, output: torch.Tensor) -> torch.Tensor:
        """The first half as it is; the second, a raw precision, through a softplus."""
        linear, raw = output.chunk(2, -1)
        return torch.cat([linear, -0.5 * softplus(raw)], -1)

    def keeps_normaliser(self, evidence: torch.Tensor) -> bool:
        """Whether no square gains: the condition of :meth:`check` bounds them from above."""
        return bool((evidence.chunk(2, -1)[1] <= 0).all())

    @torch.no_grad()
    def check(self, joint: "Interplay") -> None:
        """Raises unless the sufficient condition holds that ``Interplay`` states."""
        quadratic = _halves(joint)[1]
        problem = None
        if not (quadratic < 0).all():
            highest = float(quadratic.max())
            problem = f"a natural parameter of a square of {highest:g}, which is not < 0"
        else:
            damping, mixed, values = (
                -_matrix(joint, 1, 1),
                _matrix(joint, 1, 0),
                _matrix(joint, 0, 0),
            )
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
                f"density has a normaliser, got {problem}. Weaken W or lower the natural "
                "parameters of the squares, or take them from pyro_vae.priors.InterplayPrior."
            )

    def is_exact(self, joint: "Interplay") -> bool:
        """Whether the shapes of all W say that only values interact."""
        return all(tuple(w.shape) == (joint.dim(m), joint.dim(n)) for (m, n), w in joint.pairs())

    def solve(self, joint: "Interplay") -> torch.Tensor:
        """The Cholesky factor of the precision of a multivariate normal."""
        precision = (-2 * _halves(joint)[1]).diag_embed() - _matrix(joint, 0, 0)
        return torch.linalg.cholesky(precision)

    def log_partition_of(self, joint: "Interplay", solution: torch.Tensor) -> torch.Tensor:
        """From the factor of the precision."""
        half = _whitened_mean(joint, solution)
        log_det = solution.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * half.shape[-2] * math.log(2 * math.pi)
        return 0.5 * half.square().sum((-2, -1)) + constant - log_det

    def sample_of(self, joint: "Interplay", solution: torch.Tensor) -> "Latents":
        """From the factor of the precision, with a gradient."""
        half = _whitened_mean(joint, solution)
        noise = half + torch.randn_like(half)
        joined = torch.linalg.solve_triangular(solution.mT, noise, upper=True).squeeze(-1)
        values = joined.split([joint.dim(name) for name in joint.names], -1)
        return dict(zip(joint.names, values, strict=True))


class BernoulliStatistics(Statistics):
    """T(z) = z, z in {0, 1}; natural parameters are logits.

    Example:
        >>> BernoulliStatistics().log_partition(torch.zeros(3)).exp()
        tensor(8.)
    """

    per_dim = 1
    has_rsample = False
    support = constraints.independent(constraints.boolean, 1)

    def of(self, z: torch.Tensor) -> torch.Tensor:
        """T(z), the values themselves."""
        return z

    def draw(self, natural: torch.Tensor) -> torch.Tensor:
        """A sample without a gradient."""
        return torch.bernoulli(natural.detach().sigmoid())

    def log_partition(self, natural: torch.Tensor) -> torch.Tensor:
        """Log of the normaliser without interaction, nats, ``(*batch,)``."""
        return softplus(natural).sum(-1)

    def evidence(self, output: torch.Tensor) -> torch.Tensor:
        """The output as it is."""
        return output

    def keeps_normaliser(self, evidence: torch.Tensor) -> bool:
        """A finite sum over states always has one."""
        return True

    def check(self, joint: "Interplay") -> None:
        """A finite sum over states always has a normaliser."""

    def is_exact(self, joint: "Interplay") -> bool:
        """Whether all modalities but the largest have 12 dimensions at most."""
        return sum(_enumerated_dims(joint)) <= _MOST_BITS

    def solve(self, joint: "Interplay") -> torch.Tensor:
        """The log-density of all states of all modalities but the largest, that one summed out.

        Without normaliser, ``(*batch, states)``.
        """
        summed, rest = _largest_and_rest(joint)
        like = joint.natural[summed]
        index = torch.arange(2 ** sum(_enumerated_dims(joint)), device=like.device)
        states = _states(joint, index)
        wide = joint.with_natural({n: v.unsqueeze(-2) for n, v in joint.natural.items()})
        of_rest = wide.with_natural({name: wide.natural[name] for name in rest})
        of_summed = self.log_partition(wide.given(states).natural[summed])
        return of_rest.log_density(states) + of_summed

    def log_partition_of(self, joint: "Interplay", solution: torch.Tensor) -> torch.Tensor:
        """A sum over the states."""
        return solution.logsumexp(-1).expand(joint.batch_shape)

    def sample_of(self, joint: "Interplay", solution: torch.Tensor) -> "Latents":
        """One of the states, then the largest modality given it."""
        logits = solution.detach().expand(*joint.batch_shape, solution.shape[-1])
        z = _states(joint, torch.distributions.Categorical(logits=logits).sample())
        z |= {name: self.draw(n) for name, n in joint.given(z).natural.items()}
        return {name: z[name] for name in joint.names}


def _halves(joint: "Interplay") -> tuple[torch.Tensor, torch.Tensor]:
    """Linear and quadratic natural parameters of all normal latents, ``(*batch, latents)``."""
    both = [n.expand(*joint.batch_shape, n.shape[-1]).chunk(2, -1) for n in joint.natural.values()]
    linear, quadratic = (torch.cat(parts, -1) for parts in zip(*both, strict=True))
    return linear, quadratic


def _whitened_mean(joint: "Interplay", chol: torch.Tensor) -> torch.Tensor:
    linear = _halves(joint)[0].unsqueeze(-1)
    return torch.linalg.solve_triangular(chol, linear, upper=False)


def _matrix(joint: "Interplay", row: int, column: int) -> torch.Tensor:
    """W from one power of all normal latents to another, ``(latents, latents)``.

    Args:
        joint: Whose.
        row: 0 for the values, 1 for the squares.
        column: The same.
    """
    start, total = {}, 0
    for name in joint.names:
        start[name] = total
        total += joint.dim(name)
    matrix = joint.natural[joint.names[0]].new_zeros(total, total)
    for (m, n), w in joint.pairs():
        for (first, second), weight in {(m, n): w, (n, m): w.mT}.items():
            size_i, size_j = joint.dim(first), joint.dim(second)
            rows = slice(row * size_i, (row + 1) * size_i)
            block = weight[rows, column * size_j : (column + 1) * size_j]
            i, j = start[first], start[second]
            if block.numel():  # Else the squares do not interact.
                matrix[i : i + size_i, j : j + size_j] = block
    return matrix


def _largest_and_rest(joint: "Interplay") -> tuple[str, list[str]]:
    largest = max(joint.names, key=joint.dim)
    return largest, [name for name in joint.names if name != largest]


def _enumerated_dims(joint: "Interplay") -> list[int]:
    return [joint.dim(name) for name in _largest_and_rest(joint)[1]]


def _states(joint: "Interplay", index: torch.Tensor) -> "Latents":
    """The states of these numbers, their bits, by modality but the largest: ``(*index, dim)``."""
    largest, rest = _largest_and_rest(joint)
    dims = _enumerated_dims(joint)
    shifts = torch.arange(sum(dims) - 1, -1, -1, device=index.device)
    bits = (index.unsqueeze(-1) >> shifts & 1).to(joint.natural[largest].dtype)
    return dict(zip(rest, bits.split(dims, -1), strict=True))
