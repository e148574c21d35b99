"""The least KL under a constraint on the reconstruction."""

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch

from pyro_vae.objectives.objective import TermsObjective, check_weight
from pyro_vae.runs import Run
from pyro_vae.schedules import HasValue, Weight
from pyro_vae.terms import Terms
from pyro_vae.traces import Site, is_observed, sites_of

__all__ = ["TraceGECO_ELBO"]

Constraint = Callable[[Mapping[str, Site]], torch.Tensor]


class TraceGECO_ELBO(TermsObjective):
    r"""The least KL at which the reconstruction error stays within a tolerance.

    .. math:: \min_{\theta, \phi} \; KL + m \, (\text{error} - \text{tolerance})
        \quad \text{per datum}

    The multiplier m >= 0 grows while the moving average of error - tolerance is positive and
    falls while it is negative: after every gradient m <- m exp(rate * average). So m finds the
    weight at which the error is the tolerance. ``loss`` reports the negative ELBO, whatever m;
    ``training_loss`` is the above, with the moving average as the value of the difference and
    the batch's own gradient. Reporting, ``torch.no_grad`` and ``training_loss`` leave m and the
    average alone.

    The weights of the data (subsampled plates, ``poutine.scale``) weigh the mean error, and data
    that masks hide at all observed sites are not counted. The beta of ``scale_kl`` stays on the
    KL. Observed sites outside the plate over the data, such as a ``pyro.factor`` on parameters,
    stay as they are in the ELBO.

    Args:
        tolerance: Error per datum that is allowed: a number, a 0-d tensor or a schedule. It may
            be negative, as the error of a density may.
        rate: Speed of the multiplier, >= 0, likewise: a mean error of 1 above the tolerance
            raises log m by this much a step. With 0 the multiplier stays.
        decay: Of the moving average, in [0, 1).
        multiplier: Its first value. With 1 the gradient is that of the ELBO.
        limits: The multiplier never leaves this interval.
        constraint: From the observed sites, name to Pyro message with "fn" and "value", to the
            error of every datum, ``(*particles, *plates)`` with a 1 for all plates but the
            data's. By default -log p(x | z), nats, summed over the observed sites with their own
            scales.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run the particles at once in an outermost plate; by
            default wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Attributes:
        multiplier: m, a 0-d float64 tensor on the CPU, changed in place.
        moving_average: Of error - tolerance, likewise; NaN before the first step.

    Raises:
        ValueError: While running, if there is no plate over the data, if the guide is not
            reparameterised, or if ``constraint`` does not return one error per datum.

    Example:
        >>> import pyro, torch
        >>> from pyro_vae.guides import ExactLinearGaussian
        >>> from pyro_vae.models import LinearGaussian
        >>> model, x = LinearGaussian(5, 2), torch.randn(7, 5)
        >>> objective = TraceGECO_ELBO(tolerance=0.0, rate=0.01)
        >>> adam = pyro.optim.Adam({"lr": 0.001})
        >>> svi = pyro.infer.SVI(model, ExactLinearGaussian(model), adam, loss=objective)
        >>> _ = svi.step(x)
        >>> bool(objective.multiplier > 1)  # The error is above 0.
        True

    References:
        Rezende and Viola (2018), Taming VAEs, algorithm 1, https://arxiv.org/abs/1810.00597. The
        paper leaves the multiplier without limits.
    """

    def __init__(
        self,
        tolerance: Weight,
        *,
        rate: Weight,
        decay: float = 0.99,
        multiplier: float = 1.0,
        limits: tuple[float, float] = (1e-6, 1e6),
        constraint: Constraint | None = None,
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        where = type(self).__name__
        self.tolerance = _check_tolerance(where, tolerance)
        self.rate, self.decay = check_weight(where, "rate", rate), decay
        if not 0 <= decay < 1:
            raise ValueError(
                f"{where}: expected decay in [0, 1), got {decay}. 0 takes the error of the "
                "last batch alone; 1 would never look at a second."
            )
        low, high = limits
        if not 0 < low <= multiplier <= high < math.inf:
            raise ValueError(
                f"{where}: expected 0 < lower limit <= multiplier <= upper limit < inf, got "
                f"multiplier {multiplier} and limits {tuple(limits)}. From 0 it could not grow."
            )
        self.limits, self.constraint = (float(low), float(high)), constraint
        self.multiplier = torch.tensor(float(multiplier), dtype=torch.float64)
        self.moving_average = torch.tensor(math.nan, dtype=torch.float64)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs; the moving average is NaN before the first step."""
        names = ("multiplier", "moving_average")
        return {name: float(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes up a saved state; the tensors stay the same objects.

        Raises:
            ValueError: If ``state`` does not come from ``state_dict``.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: expected the keys "
                f"{sorted(self.state_dict())}, got {sorted(state)}. Pass what state_dict() "
                "returned."
            )
        for name, value in state.items():
            getattr(self, name).fill_(value)

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        excess, num_data = self._excess(runs, terms)
        self._excess_of_batch = excess.detach()
        average = self._next_average(self._excess_of_batch).to(excess)
        straight_through = excess + (average - self._excess_of_batch)
        shared = [term for term in terms.log_likelihood.values() if not term.local]
        loss = terms.sum_of(terms.kl.values()) - terms.sum_of(shared)
        return loss + self.multiplier.to(excess) * num_data * straight_through

    def _update(self, runs: list[Run]) -> None:
        self.moving_average.copy_(self._next_average(self._excess_of_batch))
        # Still NaN if no batch so far had a finite error.
        growth = (self.rate * self.moving_average).nan_to_num(nan=0.0).exp()
        self.multiplier.mul_(growth).clamp_(*self.limits)

    def _next_average(self, excess: torch.Tensor) -> torch.Tensor:
        """The moving average with one more batch, float64; the first batch starts it."""
        excess, before = excess.double(), self.moving_average.to(excess.device)
        after = torch.where(before.isnan(), excess, torch.lerp(excess, before, self.decay))
        return torch.where(excess.isfinite(), after, before)

    def _excess(self, runs: list[Run], terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of error - tolerance per datum, and how many data there are, both 0-d."""
        local = [term for term in terms.log_likelihood.values() if term.local]
        present = reduce(torch.maximum, map(terms.presence, local))
        if self.constraint is None:
            errors = -reduce(torch.add, map(terms.per_datum, local))
        else:
            errors = torch.cat([self._errors(run, terms, present.shape) for run in runs]).mean(0)
        # Not 0 * error: behind a mask it may be infinite.
        above = torch.where(present > 0, errors - self.tolerance.to(errors), 0.0)
        num_data = terms.scales.total(present)
        return terms.scales.total(above) / torch.where(num_data > 0, num_data, 1.0), num_data

    def _errors(self, run: Run, terms: Terms, plates: torch.Size) -> torch.Tensor:
        """What ``constraint`` says, ``(num, *plates)`` with a 1 for all but the data's."""
        assert self.constraint is not None
        errors: object = self.constraint(sites_of(run.model_trace, is_observed))
        wanted = (run.num_particles, *plates)
        if isinstance(errors, torch.Tensor):
            shape = (1,) * (len(wanted) - errors.dim()) + errors.shape
            of_data = [dim in terms.scales.dims for dim in range(-len(wanted), 0)]
            if len(shape) == len(wanted) and all(
                n == size or (n == 1 and not data)
                for n, size, data in zip(shape, wanted, of_data, strict=True)
            ):
                return errors.expand(wanted)
        actual = tuple(errors.shape) if isinstance(errors, torch.Tensor) else type(errors).__name__
        raise ValueError(
            f"{type(self).__name__}: expected constraint to return one error per datum, of shape "
            f"{wanted}, got {actual}. Sum over the event and not over the data: "
            "(site['fn'].mean - site['value']).square().sum(-1)."
        )


def _check_tolerance(where: str, tolerance: Weight) -> torch.Tensor:
    """A tolerance as a 0-d tensor, that of a schedule by reference; it may be negative."""
    value = tolerance.value if isinstance(tolerance, HasValue) else tolerance
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        raise TypeError(
            f"{where}: expected tolerance to be a number, a 0-d tensor or a schedule, got "
            f"{type(value).__name__}. Pass the error per datum that is allowed."
        )
    value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
    if value.dim() != 0 or not value.isfinite():
        raise ValueError(
            f"{where}: expected a finite 0-d tolerance, got {value.tolist()}. One number holds "
            "for all data."
        )
    return value
