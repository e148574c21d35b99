"""The result of evaluating a likelihood: one number per datum and how far to trust it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["LogLikelihoodEstimate"]

_PER_DATUM = ("log_likelihood", "standard_error", "effective_sample_size", "pareto_k", "elbo")


@dataclass(frozen=True)
class LogLikelihoodEstimate:
    """Importance-weighted log-likelihood of every datum.

    Attributes:
        log_likelihood: Estimate of log p(x), a lower bound in expectation; nats, ``(batch,)``.
        standard_error: Its Monte-Carlo standard error, over the particles; nats, ``(batch,)``.
        effective_sample_size: Particles that count, in 1 ... ``num_particles``; ``(batch,)``.
        pareto_k: Shape of the weights' tail, ``(batch,)``; above 0.7 do not trust the standard
            error. ``-inf`` where all weights are equal (an exact guide), ``inf`` where there are
            too few particles to tell.
        elbo: The same particles' ELBO (K = 1); nats, ``(batch,)``.
        num_particles: K.

    Example:
        >>> ones = torch.ones(2, dtype=torch.float64)
        >>> first = LogLikelihoodEstimate(-80 * ones, 0.3 * ones, 9 * ones, ones, -81 * ones, 50)
        >>> both = LogLikelihoodEstimate.cat([first, first])
        >>> both.mean(), both.mean_standard_error()
        (-80.0, 0.15)
    """

    log_likelihood: torch.Tensor
    standard_error: torch.Tensor
    effective_sample_size: torch.Tensor
    pareto_k: torch.Tensor
    elbo: torch.Tensor
    num_particles: int

    def __len__(self) -> int:
        return len(self.log_likelihood)

    def mean(self) -> float:
        """Mean log-likelihood over the data, nats per datum."""
        return float(self.log_likelihood.mean())

    def mean_standard_error(self) -> float:
        """Monte-Carlo standard error of :meth:`mean` for these data, nats per datum.

        It says how much another set of particles would change the mean. NaN for K = 1.
        """
        return float(self.standard_error.square().sum().sqrt() / self.standard_error.numel())

    def data_standard_error(self) -> float:
        """Standard error of :meth:`mean` over the data, nats per datum.

        It says how much another test set would change the mean. NaN for one datum.
        """
        if self.log_likelihood.numel() == 1:
            return float("nan")
        return float(self.log_likelihood.std() / self.log_likelihood.numel() ** 0.5)

    @staticmethod
    def cat(estimates: Sequence["LogLikelihoodEstimate"]) -> "LogLikelihoodEstimate":
        """Joins the estimates of several batches, in order.

        Raises:
            ValueError: If there are none, or if their numbers of particles differ.
        """
        if not estimates:
            raise ValueError(
                "LogLikelihoodEstimate.cat: expected at least one estimate, got none. "
                "Pass the estimates of your batches."
            )
        nums = sorted({estimate.num_particles for estimate in estimates})
        if len(nums) > 1:
            raise ValueError(
                f"LogLikelihoodEstimate.cat: expected the same num_particles in all, got {nums}. "
                "Bounds with different K are not comparable: evaluate all batches alike."
            )
        joined = {f: torch.cat([getattr(e, f) for e in estimates]) for f in _PER_DATUM}
        return LogLikelihoodEstimate(**joined, num_particles=nums[0])
