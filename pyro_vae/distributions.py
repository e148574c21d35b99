"""Two of torch's distributions made safe for the outputs of a network, which may be large."""

from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import register_kl
from torch.nn.functional import softplus

__all__ = ["LogPoisson", "StableContinuousBernoulli"]

# Below this logit the closed forms of the moments lose digits to cancellation; their series have
# all of them. Those of the distribution function lose none, but divide zero by zero at zero.
_NEAR_ZERO = 0.1
_ZERO = 1e-6
_NEAR_ZERO_VARIANCE = 0.5
# Of B_2n (2n - 1) / (2n)! in even powers, with the Bernoulli numbers B_2n.
_VARIANCE_SERIES = (1 / 12, -1 / 240, 1 / 6048, -1 / 172800, 1 / 5322240, -5.81275e-9)


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
        return value * self.logits + self._log_density_at_zero()

    @property
    def mean(self) -> torch.Tensor:
        """Mean, in (0, 1)."""
        near_zero, logits = self._nonzero_logits(_NEAR_ZERO)
        small = self.logits
        series = 0.5 + small / 12 - small**3 / 720 + small**5 / 30240
        size = logits.abs()
        low = 1 / size + (-size).exp() / torch.expm1(-size)  # At minus the size.
        return torch.where(near_zero, series, torch.where(logits > 0, 1 - low, low))

    @property
    def variance(self) -> torch.Tensor:
        """Variance, at most 1 / 12."""
        near_zero, logits = self._nonzero_logits(_NEAR_ZERO_VARIANCE)
        series = torch.zeros_like(self.logits)
        for coefficient in reversed(_VARIANCE_SERIES):
            series = series * self.logits.square() + coefficient
        size = logits.abs()
        closed = size**-2 - (-size).exp() / torch.expm1(-size).square()
        return torch.where(near_zero, series, closed)

    def entropy(self) -> torch.Tensor:
        """Differential entropy, nats."""
        return -(self.mean * self.logits + self._log_density_at_zero())

    def _log_density_at_zero(self) -> torch.Tensor:
        return self._cont_bern_log_norm() - softplus(self.logits)

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


@register_kl(StableContinuousBernoulli, StableContinuousBernoulli)  # type: ignore[untyped-decorator]
def _kl_continuous_bernoulli(
    p: StableContinuousBernoulli, q: StableContinuousBernoulli
) -> torch.Tensor:
    difference = p._log_density_at_zero() - q._log_density_at_zero()
    return p.mean * (p.logits - q.logits) + difference


@register_kl(LogPoisson, LogPoisson)  # type: ignore[untyped-decorator]
def _kl_log_poisson(p: LogPoisson, q: LogPoisson) -> torch.Tensor:
    return p.rate * (p.log_rate - q.log_rate) - (p.rate - q.rate)
