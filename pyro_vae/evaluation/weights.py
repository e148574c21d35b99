"""Pure numerics of importance weights: running sums, standard errors, Pareto-k. No Pyro."""

import math

import torch

_FEWEST_BLOCKS = 10
"""Fewer would give a standard error that is itself too uncertain."""

__all__ = ["LogWeightSums", "pareto_k", "tail_length"]


def tail_length(num_particles: int) -> int:
    """How many of the largest weights describe the tail: min(K / 5, 3 sqrt(K)), rounded up."""
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


class LogWeightSums:
    """Running sums over log-weights that arrive in chunks of any size.

    What is kept per datum does not grow with the number of particles, but for the largest
    ``tail_length`` weights.

    Args:
        shape: Shape of the data.
        num_particles: How many weights will arrive in all.
        device: Device of the sums, which are float64.
        block: How many weights in a row were drawn together, in proportion to the components of
            a mixture. Those depend on one another, so that the standard error is that of the
            blocks; of fewer than ten blocks that of independent weights, which is too large
            rather than too small.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_particles: int,
        device: torch.device | str = "cpu",
        *,
        block: int = 1,
    ) -> None:
        self.num_particles = num_particles
        self._block, self._blocks = block, list[torch.Tensor]()
        minus_inf = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
        self._log_sum = minus_inf
        self._log_sum_of_squares = minus_inf
        self._sum_of_logs = torch.zeros_like(minus_inf)
        self._largest = minus_inf.new_empty((0, *shape))
        self._reference = torch.zeros_like(minus_inf)
        self.count = 0

    def add(self, log_weights: torch.Tensor) -> None:
        """Takes a chunk of shape ``(chunk, *shape)``."""
        log_weights = log_weights.to(torch.float64)
        if not self.count:
            # Sums of weights relative to an early one keep the digits of their spread, however
            # large the log-weights themselves are.
            largest = log_weights.amax(0)
            self._reference = torch.where(largest.isfinite(), largest, self._reference)
        log_weights = log_weights - self._reference
        self._log_sum = torch.logaddexp(self._log_sum, log_weights.logsumexp(0))
        self._log_sum_of_squares = torch.logaddexp(
            self._log_sum_of_squares, (2 * log_weights).logsumexp(0)
        )
        self._sum_of_logs = self._sum_of_logs + log_weights.sum(0)
        if self._block > 1:
            self._add_blocks(log_weights)
        candidates = torch.cat([self._largest, log_weights])
        num_kept = min(len(candidates), tail_length(self.num_particles) + 1)
        self._largest = candidates.topk(num_kept, dim=0).values
        self.count += len(log_weights)

    def _add_blocks(self, log_weights: torch.Tensor) -> None:
        """Log-sums of the blocks, whatever chunks they arrive in."""
        is_open = self.count % self._block
        first = self._block - is_open if is_open else 0
        head, rest = log_weights[:first], log_weights[first:]
        if len(head):
            self._blocks[-1] = torch.logaddexp(self._blocks[-1], head.logsumexp(0))
        self._blocks += [part.logsumexp(0) for part in rest.split(self._block) if len(part)]

    @property
    def log_mean(self) -> torch.Tensor:
        """Log of the mean weight: the importance-weighted bound, nats per datum."""
        return self._reference + self._log_sum - math.log(self.count)

    @property
    def mean_log(self) -> torch.Tensor:
        """Mean log-weight: the ELBO, nats per datum."""
        return self._reference + self._sum_of_logs / self.count

    @property
    def effective_sample_size(self) -> torch.Tensor:
        """(sum w)^2 / sum w^2, between 1 and the number of weights; 0 if all weights are 0."""
        return (2 * self._log_sum - self._log_sum_of_squares).exp().nan_to_num(nan=0.0)

    @property
    def standard_error(self) -> torch.Tensor:
        """Monte-Carlo standard error of ``log_mean`` by the delta method; NaN for one weight."""
        if self.count == 1:
            return torch.full_like(self._log_sum, math.nan)
        if len(self._blocks) >= _FEWEST_BLOCKS:
            return self._error_of_blocks()
        # Sample variance of w over its squared mean; rounding can take it just below zero.
        relative = (1 / self.effective_sample_size - 1 / self.count).clamp(min=0.0)
        return (relative * self.count / (self.count - 1)).sqrt()

    def _error_of_blocks(self) -> torch.Tensor:
        """The same from the sums of the blocks, the last of which may be shorter."""
        num = len(self._blocks)
        sizes = self._log_sum.new_full((num,), self._block)
        sizes[-1] = self.count - self._block * (num - 1)
        share = (torch.stack(self._blocks) - self._log_sum).exp()  # Of the sum of all weights.
        share = share.nan_to_num(nan=0.0)  # No weight anywhere.
        expected = (sizes / self.count).reshape((num,) + (1,) * self._log_sum.dim())
        error = ((share - expected).square().sum(0) / (1 - expected.square().sum(0))).sqrt()
        return error.masked_fill(self._log_sum == -math.inf, math.inf)

    @property
    def pareto_k(self) -> torch.Tensor:
        """Pareto-k of each datum's weights, see :func:`pareto_k`."""
        return pareto_k(self._largest)


def pareto_k(largest: torch.Tensor) -> torch.Tensor:
    """Shape of the generalised Pareto distribution fitted to the tail of importance weights.

    Below 0.7 the importance-sampling estimate can be trusted; above, its error is larger than
    the standard error says.

    Args:
        largest: The tail's log-weights and the next smaller one, shape ``(tail + 1, *data)``,
            in descending order along the first dimension.

    Returns:
        Tensor of shape ``(*data)``: ``-inf`` where all weights are equal up to rounding, so that
        there is no tail; ``inf`` where a tail of four weights or fewer cannot be judged.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> pareto = torch.rand(100_000, dtype=torch.float64) ** -0.5  # weights with k = 0.5
        >>> bool((pareto_k(pareto.log().topk(tail_length(100_000) + 1).values) - 0.5).abs() < 0.1)
        True

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, section 3 and appendix C;
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized
        Pareto distribution.
    """
    shape = largest.shape[1:]
    log_weights = largest.to(torch.float64).reshape(len(largest), -1)
    log_weights = log_weights - log_weights[:1]
    result = torch.full_like(log_weights[0], math.inf)
    excess = (log_weights.exp() - log_weights[-1:].exp()).flip(0)
    lengths = (excess > 0).sum(0)  # Ties with the threshold are no part of the tail.
    for length in lengths[lengths > 4].unique().tolist():
        rows = lengths == length
        result[rows] = _fit_shape(excess[-length:, rows])
    # An exact guide: the log-weights differ by the rounding of float64 alone.
    flat = (log_weights[-1] > -1e-9) & (len(log_weights) > 1)
    return result.masked_fill(flat, -math.inf).reshape(shape)


def _fit_shape(excess: torch.Tensor) -> torch.Tensor:
    """Posterior-mean estimate of Zhang and Stephens, with the weak prior of Vehtari et al.

    Args:
        excess: Positive excesses over the threshold, ascending, shape ``(tail, rows)``.
    """
    length = len(excess)
    num_grid = 30 + int(math.sqrt(length))
    grid = torch.arange(1, num_grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[int(length / 4 + 0.5) - 1]
    theta = (1 - (num_grid / (grid - 0.5)).sqrt()).unsqueeze(-1) / (3 * quartile)
    theta = theta + 1 / excess[-1]  # (grid, rows)
    k = torch.stack([(-t * excess).log1p().mean(0) for t in theta])
    profile = length * ((-theta / k).log() - k - 1)
    theta = (profile.softmax(0) * theta).sum(0)
    k = (-theta * excess).log1p().mean(0)
    return (length * k + 5) / (length + 10)
