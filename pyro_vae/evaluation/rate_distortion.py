"""Rate and distortion of pairs trained with different beta."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.evaluation.elbo_terms import ElboTerms, elbo_terms

__all__ = ["RateDistortionPoint", "rate_distortion"]

Pair = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class RateDistortionPoint:
    """Where one model and guide lie in the plane of rate and distortion; nats per datum.

    The standard errors are over the data: how much another test set would change the mean. They
    cover the Monte-Carlo error. NaN for one datum.

    Attributes:
        beta: Weight of the KL in training; the numbers themselves are without it.
        rate: Mean of the KLs' sum.
        distortion: Mean of the negative expected log-likelihood.
        elbo: -distortion - rate.
        rate_standard_error: Of ``rate``.
        distortion_standard_error: Of ``distortion``.
        elbo_standard_error: Of ``elbo``.
        num_data: How many data.
    """

    beta: float
    rate: float
    distortion: float
    elbo: float
    rate_standard_error: float
    distortion_standard_error: float
    elbo_standard_error: float
    num_data: int

    @staticmethod
    def of(beta: float, terms: ElboTerms) -> "RateDistortionPoint":
        """The point of evaluated data; join batches with ``ElboTerms.cat``.

        Raises:
            ValueError: If a mask leaves out all data.
        """
        num_data = int(terms.is_data.sum())
        if not num_data:
            raise ValueError(
                "RateDistortionPoint.of: expected at least one row of data, got a mask that "
                f"leaves out all {terms.is_data.numel()}. Look at the mask."
            )
        rate, distortion, elbo = (
            values[terms.is_data] for values in (terms.rate, terms.distortion, terms.elbo)
        )
        return RateDistortionPoint(
            beta=beta,
            rate=float(rate.mean()),
            distortion=float(distortion.mean()),
            elbo=float(elbo.mean()),
            rate_standard_error=_standard_error(rate),
            distortion_standard_error=_standard_error(distortion),
            elbo_standard_error=_standard_error(elbo),
            num_data=num_data,
        )


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan


def rate_distortion(
    pairs: Mapping[float, Pair],
    *args: Any,
    num_particles: int = 100,
    chunk_size: int = 10,
    **kwargs: Any,
) -> list[RateDistortionPoint]:
    r"""Evaluates rate and distortion of models trained with different beta on the same data.

    .. math::
        R = E_x[KL(q(z \mid x) \,\|\, p(z))], \qquad
        D = -E_x[E_{q(z \mid x)}[\log p(x \mid z)]], \qquad \text{ELBO} = -D - R

    R is an upper bound on the information a code carries about x. Pairs of one ELBO differ in
    how they divide it: beta < 1 buys reconstruction with rate, beta > 1 the opposite. Evaluation
    only, as in ``elbo_terms``: scales are ignored, so whether the programs are wrapped in
    ``scale_kl`` makes no difference.

    Args:
        pairs: Model and guide by the beta they were trained with.
        *args: The whole data set, as for ``svi.step``. For one too large, evaluate batches with
            ``elbo_terms`` and use ``RateDistortionPoint.of``.
        num_particles: Samples from each guide.
        chunk_size: Particles run at a time. More take more memory; results differ only in the
            random numbers drawn.
        **kwargs: Keyword arguments of the programs.

    Returns:
        A point for each pair, nats per datum, beta ascending.

    Raises:
        TypeError: If a beta is not a number, or has no pair.
        ValueError: If there are no pairs or a beta is negative or not finite; and as
            ``elbo_terms``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def best_guide(beta):  # It minimises D + beta R.
        ...     def guide(x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(x / (1 + beta), (beta / (1 + beta)) ** 0.5))
        ...     return guide
        >>> pairs = {beta: (model, best_guide(beta)) for beta in (4.0, 1.0)}
        >>> points = rate_distortion(pairs, torch.tensor([-1.0, 2.0]))
        >>> [(point.beta, round(point.rate, 3)) for point in points]
        [(1.0, 0.409), (4.0, 0.062)]

    References:
        Alemi et al. (2018), Fixing a broken ELBO, section 2, https://arxiv.org/abs/1711.00464
    """
    _check_pairs(pairs)
    return [
        RateDistortionPoint.of(
            beta,
            elbo_terms(
                *pairs[beta], *args, num_particles=num_particles, chunk_size=chunk_size, **kwargs
            ),
        )
        for beta in sorted(pairs)
    ]


def _check_pairs(pairs: Mapping[float, Pair]) -> None:
    where = "rate_distortion"
    if not pairs:
        raise ValueError(
            f"{where}: expected at least one pair, got none. Pass {{beta: (model, guide)}}."
        )
    for beta, pair in pairs.items():
        if isinstance(beta, bool) or not isinstance(beta, int | float):
            raise TypeError(
                f"{where}: expected the keys of pairs to be numbers, the betas, got "
                f"{type(beta).__name__}. Pass {{beta: (model, guide)}}."
            )
        if not 0 <= beta < math.inf:
            raise ValueError(
                f"{where}: expected finite betas >= 0, got {beta}. Pass {{beta: (model, guide)}}."
            )
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"{where}: expected a model and a guide for beta = {beta}, got "
                f"{type(pair).__name__}. Pass {{beta: (model, guide)}}."
            )
