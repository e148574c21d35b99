"""Distributions over sequences of codes, whose values are vectors of a codebook."""

from abc import abstractmethod
from copy import copy
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import one_hot

from pyro_vae.codebook import Codebook

__all__ = ["AutoregressiveCodes", "CategoricalCodes", "CodeDistribution", "NearestCodes"]

_MOST_VALUES = 2**20


class _Codes(constraints.Constraint):
    """Sequences of vectors of a codebook."""

    is_discrete = True
    event_dim = 2

    def __init__(self, codebook: Codebook) -> None:
        self._codebook = codebook
        super().__init__()

    def check(self, value: torch.Tensor) -> torch.Tensor:
        """Whether every vector of a value is a code: ``(*, N, D)`` to bool, ``(*)``."""
        return self._codebook.find(value)[1].all(-1)

    def __repr__(self) -> str:
        return f"{self._codebook.num_codes} codes of {self._codebook.code_dim} numbers"


class CodeDistribution(TorchDistribution):
    """Abstract: a distribution over N codes, with probabilities, not densities.

    Values are ``(*sample, *batch, N, D)``. One whose vectors are not in the codebook has the
    log-probability -inf, and under validation is an error.

    Args:
        codebook: The codes.
        num_positions: N.
        batch_shape: Shape of the batch.
        validate_args: Whether to check parameters and values, as in torch.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_enumerate_support = True

    def __init__(
        self,
        codebook: Codebook,
        num_positions: int,
        batch_shape: Any = torch.Size(),
        validate_args: bool | None = None,
    ) -> None:
        self.codebook, self.num_positions = codebook, num_positions
        event_shape = torch.Size([num_positions, codebook.code_dim])
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=validate_args)

    @abstractmethod
    def _log_prob(self, indices: torch.Tensor) -> torch.Tensor:
        """Log-probability of numbers of codes ``(*, N)``: nats, ``(*)``."""

    @property
    def support(self) -> constraints.Constraint:
        """Where a value may lie."""
        return _Codes(self.codebook)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with a larger batch shape."""
        new = copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def indices_of(self, value: torch.Tensor) -> torch.Tensor:
        """Numbers of the codes of a value: ``(*, N, D)`` to int64, ``(*, N)``.

        Raises:
            ValueError: If the value is of another shape or has a vector that is no code.
        """
        self._check_shape(value)
        return self.codebook.locate(value, type(self).__name__)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability, nats: ``(*sample, *batch)``."""
        self._check_shape(value)
        if self._validate_args:
            log_prob = self._log_prob(self.codebook.locate(value, type(self).__name__))
        else:
            indices, is_code = self.codebook.find(value)
            log_prob = self._log_prob(indices).masked_fill(~is_code.all(-1), -torch.inf)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        """All values, ``(K^N, *batch, N, D)``; without ``expand`` ones in place of the batch.

        Raises:
            ValueError: If there are more than 2^20.
        """
        num_codes, num_positions = self.codebook.num_codes, self.num_positions
        if num_codes**num_positions > _MOST_VALUES:
            raise ValueError(
                f"{type(self).__name__}: expected at most {_MOST_VALUES} values to enumerate, got "
                f"{num_codes}^{num_positions}. Sample the codes in the guide as well."
            )
        numbers = torch.arange(num_codes, device=self.codebook.vectors.device)
        indices = torch.cartesian_prod(*[numbers] * num_positions).reshape(-1, num_positions)
        values = self.codebook.vectors.detach()[indices]
        ones = (1,) * len(self.batch_shape)
        values = values.reshape(len(values), *ones, *self.event_shape)
        return (
            values.expand(len(values), *self.batch_shape, *self.event_shape) if expand else values
        )

    def _check_shape(self, value: torch.Tensor) -> None:
        if value.shape[-2:] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}: expected values of {self.num_positions} codes of "
                f"{self.codebook.code_dim} numbers, shape (..., {self.num_positions}, "
                f"{self.codebook.code_dim}), got {tuple(value.shape)}. Give model and guide the "
                "same codebook and num_positions."
            )


class CategoricalCodes(CodeDistribution):
    """Independent positions, each with a categorical distribution over the codes.

    Args:
        codebook: The codes, K of them.
        logits: ``(*batch, N, K)``.
        validate_args: Whether to check parameters and values, as in torch.

    Example:
        >>> codebook = Codebook(num_codes=4, code_dim=2)
        >>> fn = CategoricalCodes(codebook, torch.zeros(5, 3, 4))
        >>> z = fn.sample()
        >>> z.shape, fn.log_prob(z)[0]  # -3 log 4
        (torch.Size([5, 3, 2]), tensor(-4.1589))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.independent(constraints.real, 2)
    }

    def __init__(
        self, codebook: Codebook, logits: torch.Tensor, validate_args: bool | None = None
    ) -> None:
        self.logits = logits.log_softmax(-1)
        super().__init__(codebook, logits.shape[-2], logits.shape[:-2], validate_args)

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws codes: ``(*sample_shape, *batch, N, D)``."""
        shape = self._batch_shape + self.logits.shape[-2:]
        with torch.no_grad():
            indices = dist.Categorical(logits=self.logits.expand(shape)).sample(sample_shape)
            return self.codebook.vectors[indices]

    def _log_prob(self, indices: torch.Tensor) -> torch.Tensor:
        return _chosen(self.logits, indices)


class AutoregressiveCodes(CodeDistribution):
    r"""p(i_1) p(i_2 | i_1) ... p(i_N | i_1 ... i_{N-1}) over numbers of codes.

    Args:
        codebook: The codes, K of them.
        net: From one-hot numbers ``(*, N * K)`` to logits ``(*, N, K)``, of which those of a
            position depend on the positions before it alone: an ``AutoregressiveNet``.
        num_positions: N.
        validate_args: Whether to check parameters and values, as in torch.

    Example:
        >>> from pyro_vae.autoregressive import AutoregressiveNet
        >>> codebook = Codebook(num_codes=4, code_dim=2)
        >>> net = AutoregressiveNet(3, [16], in_features=4, out_features=4)
        >>> fn = AutoregressiveCodes(codebook, net, num_positions=3)
        >>> fn.sample((5,)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        codebook: Codebook,
        net: nn.Module,
        num_positions: int,
        validate_args: bool | None = None,
    ) -> None:
        self.net = net
        super().__init__(codebook, num_positions, validate_args=validate_args)

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws codes, position after position: ``(*sample_shape, *batch, N, D)``."""
        shape = torch.Size(sample_shape) + self._batch_shape + (self.num_positions,)
        indices = torch.zeros(shape, dtype=torch.long, device=self.codebook.vectors.device)
        with torch.no_grad():
            for position in range(self.num_positions):
                logits = self._logits(indices)[..., position, :]
                indices[..., position] = dist.Categorical(logits=logits).sample()
            return self.codebook.vectors[indices]

    def _log_prob(self, indices: torch.Tensor) -> torch.Tensor:
        return _chosen(self._logits(indices).log_softmax(-1), indices)

    def _logits(self, indices: torch.Tensor) -> torch.Tensor:
        codes = one_hot(indices, self.codebook.num_codes).to(self.codebook.vectors.dtype)
        logits: torch.Tensor = self.net(codes.flatten(-2))
        return logits


class NearestCodes(CodeDistribution):
    """All probability on the codes nearest to encoded vectors; samples carry a gradient for those.

    A sample is exactly the codes. Its gradient is handed on to the encoded vectors as it is,
    straight through the step from them to the codes, and none of it reaches the codebook.

    Args:
        codebook: The codes.
        encoded: What an encoder made of each datum, ``(*batch, N, D)``.
        validate_args: Whether to check parameters and values, as in torch.

    Attributes:
        indices: Numbers of the nearest codes, ``(*batch, N)``.

    Example:
        >>> codebook = Codebook(num_codes=4, code_dim=2)
        >>> encoded = torch.randn(5, 3, 2, requires_grad=True)
        >>> z = NearestCodes(codebook, encoded).rsample()
        >>> z.sum().backward()
        >>> encoded.grad.unique()
        tensor([1.])

    References:
        van den Oord et al. (2017), Neural discrete representation learning, equations 1 and 2,
        https://arxiv.org/abs/1711.00937
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "encoded": constraints.independent(constraints.real, 2)
    }
    has_rsample = True

    def __init__(
        self, codebook: Codebook, encoded: torch.Tensor, validate_args: bool | None = None
    ) -> None:
        self.encoded, self.indices = encoded, codebook.nearest(encoded)
        super().__init__(codebook, encoded.shape[-2], encoded.shape[:-2], validate_args)

    @property
    def codes(self) -> torch.Tensor:
        """The nearest codes, with gradients for the codebook: ``(*batch, N, D)``."""
        return self.codebook.vectors[self.indices]

    @property
    def mean(self) -> torch.Tensor:
        """The nearest codes, without gradients."""
        return self.codes.detach().expand(self._extended_shape())

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """The nearest codes with the gradient of ``encoded``: ``(*sample_shape, *batch, N, D)``."""
        # Zero, but for its gradient; encoded + (codes - encoded) would not be a code exactly.
        codes = self.codes.detach() + (self.encoded - self.encoded.detach())
        return codes.expand(self._extended_shape(torch.Size(sample_shape)))

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def _log_prob(self, indices: torch.Tensor) -> torch.Tensor:
        same = (indices == self.indices).all(-1)
        return torch.zeros_like(same, dtype=self.encoded.dtype).masked_fill(~same, -torch.inf)


def _chosen(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Sums the chosen entries over the positions: ``(*, N, K)`` and ``(*, N)`` to ``(*)``."""
    shape = torch.broadcast_shapes(log_probs.shape[:-1], indices.shape)
    log_probs = log_probs.expand(*shape, log_probs.shape[-1])
    return log_probs.gather(-1, indices.expand(shape).unsqueeze(-1)).squeeze(-1).sum(-1)
