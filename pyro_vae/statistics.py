"""Sufficient statistics of latents in exponential families. Tensors in, tensors out, no Pyro."""

import math
from abc import ABC, abstractmethod

import torch
from torch.nn.functional import softplus

__all__ = ["BernoulliStatistics", "NormalStatistics", "Statistics"]


class Statistics(ABC):
    """Abstract: a family of independent coordinates, ``per_dim`` statistics for each."""

    per_dim: int
    has_rsample: bool

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


class NormalStatistics(Statistics):
    """T(z) = (z, z^2), z real; natural parameters (loc / scale^2, -1 / (2 scale^2)).

    Example:
        >>> NormalStatistics().of(torch.tensor([2.0, 3.0]))
        tensor([2., 3., 4., 9.])
    """

    per_dim = 2
    has_rsample = True

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


class BernoulliStatistics(Statistics):
    """T(z) = z, z in {0, 1}; natural parameters are logits.

    Example:
        >>> BernoulliStatistics().log_partition(torch.zeros(3)).exp()
        tensor(8.)
    """

    per_dim = 1
    has_rsample = False

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
