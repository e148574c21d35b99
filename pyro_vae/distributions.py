"""Two of torch's distributions made safe for the outputs of a network, which may be large."""

from typing import Any

import pyro.distributions as dist
import torch
from torch.nn.functional import softplus

__all__ = ["LogPoisson", "StableContinuousBernoulli"]

# Below this logit the closed forms of the moments lose digits to cancellation; their series have
# all of them. Those of the distribution function lose none, but divide zero by zero at zero.
_NEAR_ZERO = 0.1
_ZERO = 1e-6


class StableContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[misc]
    r"""The continuous Bernoulli from logits l of any size: p(x) = l e^{lx} / (e^l - 1) on [0, 1].

    Torch's own clamps the probability: in float32 its density is not normalised for logits
    beyond 16 in absolute value, which background pixels reach.

    Example:
        >>> fn = StableContinuousBernoulli(logits=torch.tensor(-30.0))
        >>> fn.log_prob(torch.tensor(0.0))  # log 30
        tensor(3.4012)

    References:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, equation 6.
    """

    def _nonzero_logits(self, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        near_zero = self.logits.abs() < threshold
        return near_zero, torch.where(near_zero, torch.ones_like(self.logits), self.logits)

    def _cont_bern_log_norm(self) -> torch.Tensor:
        near_zero, logits = self._nonzero_logits(_NEAR_ZERO)
        square = (self.logits / 2).square()
        series = (square / 3 - square**2 / 45 + 2 * square**3 / 945).log1p() + torch.log(
            torch.full_like(square, 2.0)
        )
        closed = logits.abs().log() - (logits.abs() / 2).tanh().log()
        return torch.where(near_zero, series, closed)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density of values in [0, 1], nats."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - softplus(self.logits) + self._cont_bern_log_norm()

    @property
    def mean(self) -> torch.Tensor:
        """Mean, in (0, 1)."""
        near_zero, logits = self._nonzero_logits(_NEAR_ZERO)
        small = self.logits
        series = 0.5 + small / 12 - small**3 / 720 + small**5 / 30240
        return torch.where(near_zero, series, -1 / torch.expm1(-logits) - 1 / logits)

    @property
    def variance(self) -> torch.Tensor:
        """Variance, at most 1 / 12."""
        near_zero, logits = self._nonzero_logits(_NEAR_ZERO)
        square = self.logits.square()
        series = 1 / 12 - square / 240 + square**2 / 6048
        closed = logits**-2 - (2 * (logits / 2).sinh()) ** -2
        return torch.where(near_zero, series, closed)

    def cdf(self, value: torch.Tensor) -> torch.Tensor:
        """Probability of values up to ``value``, which lies in [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        near_zero, logits = self._nonzero_logits(_ZERO)
        # By symmetry about 1/2 only negative logits are needed, where nothing overflows.
        minus = -logits.abs()
        below = torch.expm1(minus * torch.where(logits > 0, 1 - value, value)) / torch.expm1(minus)
        closed = torch.where(logits > 0, 1 - below, below)
        return torch.where(near_zero, value, closed)

    def icdf(self, value: torch.Tensor) -> torch.Tensor:
        """Quantile of probabilities in [0, 1]."""
        near_zero, logits = self._nonzero_logits(_ZERO)
        minus = -logits.abs()
        flipped = torch.where(logits > 0, 1 - value, value)
        below = (flipped * torch.expm1(minus)).log1p() / minus
        closed = torch.where(logits > 0, 1 - below, below)
        return torch.where(near_zero, value, closed).clamp(0, 1)  # Rounding may pass the ends.

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients, by the inverse of the distribution function."""
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class LogPoisson(dist.Poisson):
    """The Poisson from the logarithm of its rate, with gradients where the rate underflows.

    Example:
        >>> log_rate = torch.tensor(-110.0, requires_grad=True)
        >>> LogPoisson(log_rate).log_prob(torch.tensor(2.0)).backward()
        >>> log_rate.grad
        tensor(2.)
    """

    def __init__(self, log_rate: torch.Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogPoisson":
        """The same distribution with a larger batch shape."""
        new: LogPoisson = self._get_checked_instance(LogPoisson, _instance)
        new.log_rate = self.log_rate.expand(batch_shape)
        super().expand(batch_shape, _instance=new)
        return new

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability of counts, nats."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.log_rate - self.log_rate.exp() - (value + 1).lgamma()
