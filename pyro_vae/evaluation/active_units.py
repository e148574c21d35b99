"""Active units: the dimensions of a code that follow the data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution

from pyro_vae.checks import check_at_least, support_of
from pyro_vae.evaluation.code_site import CodeSite
from pyro_vae.isolation import without_side_effects

__all__ = ["ActiveUnits", "active_units"]


@dataclass(frozen=True)
class ActiveUnits:
    """How much the mean of each unit of a code varies over the data.

    Attributes:
        variances: Var_x(E[u | x]) of each unit u, in the squared units of the code; of the event
            shape of the site, as a rule ``(latent_dim,)``.
        standard_error: Standard error of ``variances`` over the data, same shape. Where samples
            stand in for a mean it contains their noise.
        threshold: Variance above which a unit is active.

    Example:
        >>> units = ActiveUnits(torch.tensor([0.9, 0.001]), torch.tensor([0.1, 0.001]), 0.01)
        >>> units.count, units.active
        (1, tensor([ True, False]))
        >>> print(units)
        1 of 2 units active (variance of their mean over the data above 0.01)
    """

    variances: torch.Tensor
    standard_error: torch.Tensor
    threshold: float

    @property
    def active(self) -> torch.Tensor:
        """Which units are active: bool, the shape of ``variances``."""
        return self.variances > self.threshold

    @property
    def count(self) -> int:
        """How many units are active."""
        return int(self.active.sum())

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.variances.numel()} units active "
            f"(variance of their mean over the data above {self.threshold:g})"
        )


def active_units(
    guide: Callable[..., Any],
    *args: Any,
    site: str | None = None,
    threshold: float = 0.01,
    num_samples: int = 100,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Counts the units u of a code with :math:`Var_x(E_{u \sim q(u \mid x)}[u])` > threshold.

    The variance is that of the N data given, :math:`\frac{1}{N} \sum_n (\cdot)^2`. The mean is
    exact where x fixes the distribution of the site and that knows its mean. Elsewhere, in
    q(z2 | z1) for instance, :math:`E[u \mid x]` runs over the other latents too: the conditional
    means of S runs of the guide are centred over the data, :math:`c_{ns}`, and

    .. math::
        \frac{1}{N} \sum_n \frac{1}{S (S - 1)} \sum_{s \neq t} c_{ns} c_{nt}

    has the right expectation. The variance of averages over S, in contrast, is too large by the
    variance of the averages. The estimate of an inactive unit may come out below 0.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched.
    Rows that a mask leaves out are not data. The guide runs on all rows at once.

    Args:
        guide: Any guide.
        *args: The whole data set, as for ``svi.step``.
        site: Which latent; needed where the guide has several.
        threshold: Variance above which a unit is active, >= 0; that of the paper by default.
        num_samples: S, at least 2; counts only where the mean has to be estimated.
        **kwargs: Keyword arguments of the guide.

    Returns:
        Variances and which of them exceed ``threshold``.

    Raises:
        TypeError: If ``num_samples`` is no integer.
        ValueError: If ``num_samples`` is below 2 or ``threshold`` below 0; the data are empty,
            subsampled at random or leave fewer than two rows; there is no such latent, or
            several and no ``site``; the site is discrete, has no finite mean, or is not in
            exactly one plate.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(x):  # Its second unit has collapsed to the prior.
        ...     loc = torch.cat([x, torch.zeros_like(x)], -1)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, torch.tensor([0.1, 1.0])).to_event(1))
        >>> print(active_units(guide, torch.tensor([[-1.0], [0.0], [2.0]])))
        1 of 2 units active (variance of their mean over the data above 0.01)

    References:
        Burda et al. (2016), Importance weighted autoencoders, section 5.2,
        https://arxiv.org/abs/1509.00519. The correction for a finite number of samples is ours.
    """
    where = "active_units"
    check_at_least(where, "num_samples", num_samples, 2)
    if not 0 <= threshold < math.inf:
        raise ValueError(
            f"{where}: expected a finite threshold >= 0, got {threshold}. The paper's is 0.01."
        )
    with without_side_effects(guide):
        codes = CodeSite(guide, args, kwargs, name=site, where=where, role="guide")
        if getattr(support_of(codes.fn), "is_discrete", False):
            raise ValueError(
                f"{where}: expected a continuous latent, got the discrete site '{codes.name}', "
                "whose values have no mean. Name another one with site=..."
            )
        if int(codes.kept.sum()) < 2:
            raise ValueError(
                f"{where}: expected at least two rows of data at site '{codes.name}', got one, "
                "over which nothing varies. Pass the whole data set."
            )
        squares = _squared_deviations(codes, num_samples, where)
    return ActiveUnits(
        variances=squares.mean(0),
        standard_error=squares.std(0) / len(squares) ** 0.5,
        threshold=threshold,
    )


def _squared_deviations(codes: CodeSite, num_samples: int, where: str) -> torch.Tensor:
    """Unbiased estimates of each row's squared deviation from the mean: ``(N, *event)``."""
    mean = _mean(codes.fn) if codes.is_fixed else None
    if mean is not None:
        return _centred(mean, codes, where).square()
    total = squares = torch.zeros((), dtype=torch.float64, device=codes.kept.device)
    for values in _conditional_means(codes, num_samples):
        centred = _centred(values, codes, where)
        total, squares = total + centred, squares + centred.square()
    return (total.square() - squares) / (num_samples * (num_samples - 1))


def _conditional_means(codes: CodeSite, num_samples: int) -> Iterator[torch.Tensor]:
    """Means of independent runs of the guide, or samples where there is no mean."""
    for _ in range(num_samples):
        if codes.is_fixed:
            yield codes.fn.sample()
        else:
            site = codes.run()
            mean = _mean(site["fn"])
            yield site["value"] if mean is None else mean


def _mean(fn: TorchDistribution) -> torch.Tensor | None:
    try:
        mean: torch.Tensor = fn.mean
    except NotImplementedError:
        return None
    return mean


def _centred(values: torch.Tensor, codes: CodeSite, where: str) -> torch.Tensor:
    """Deviations of the rows that are data from their mean: float64, ``(N, *event)``."""
    rows = values.reshape(-1, *codes.fn.event_shape)[codes.kept].to(torch.float64)
    if not rows.isfinite().all():
        raise ValueError(
            f"{where}: expected finite means at site '{codes.name}', got "
            f"{int((~rows.isfinite()).sum())} of {rows.numel()} that are not. Look at the "
            "parameters of its distribution; a Cauchy, for instance, has no mean."
        )
    return rows - rows.mean(0)
