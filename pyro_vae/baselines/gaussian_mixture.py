"""Mixtures of Gaussians by EM, and the single Gaussian in closed form."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae.baselines._data import check_integer
from pyro_vae.baselines._em import check_stopping, run_em
from pyro_vae.baselines._mixture_checks import (
    CollapsedComponentError,
    check_distinct_rows,
    check_mixture_data,
    remedy,
)
from pyro_vae.baselines._mixture_em import component_log_probs, m_step, mixture_start

__all__ = ["GaussianMixtureFit", "gaussian", "gaussian_mixture_em"]

Covariance = Literal["full", "diagonal", "spherical"]
_Params = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianMixtureFit:
    """A fitted mixture of Gaussians, float64.

    Args:
        weights: Probability of each component, shape ``(K,)``.
        locs: Shape ``(K, D)``.
        covariances: Shape ``(K, D, D)``, whatever the constraint they were fitted under.
        log_likelihoods: Mean log-likelihood of the training data after each EM step, nats per
            datum, shape ``(steps_taken,)``; empty for a closed form.

    Example:
        >>> fit = gaussian_mixture_em(torch.randn(100, 2), num_components=2)
        >>> fit.log_prob(torch.zeros(3, 2)).shape, fit.posterior(torch.zeros(3, 2)).probs.shape
        (torch.Size([3]), torch.Size([3, 2]))
    """

    weights: Tensor
    locs: Tensor
    covariances: Tensor
    log_likelihoods: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the exact log-likelihood of each row.

        Args:
            x: Shape ``(N, D)``, any real dtype.

        Returns:
            Shape ``(N,)``, nats, float64.

        Raises:
            ValueError: If the shape does not fit.
        """
        return self._joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Categorical:
        """Return the distribution of the component that each row came from.

        Args:
            x: Shape ``(N, D)``, any real dtype.

        Returns:
            Categorical with batch shape ``(N,)`` over K components.

        Raises:
            ValueError: If the shape does not fit.
        """
        return Categorical(logits=self._joint(x))

    def sample(self, num_samples: int) -> Tensor:
        """Draw new data.

        Args:
            num_samples: Number of rows n.

        Returns:
            Shape ``(n, D)``, float64.
        """
        labels = Categorical(self.weights).sample(torch.Size([num_samples]))
        x = torch.randn_like(self.locs[:1].expand(num_samples, -1))
        for component, covariance in enumerate(self.covariances):
            mine = labels == component
            x[mine] = self.locs[component] + x[mine] @ torch.linalg.cholesky(covariance).mT
        return x

    def _joint(self, x: Tensor) -> Tensor:
        """Log-density of each row together with each component, shape ``(N, K)``."""
        if x.ndim != 2 or x.shape[1] != self.locs.shape[1]:
            raise ValueError(
                f"GaussianMixtureFit: expected data of shape (N, {self.locs.shape[1]}), "
                f"got {tuple(x.shape)}. Flatten each example into one row."
            )
        log_probs = component_log_probs(x.to(self.locs), self.locs, self.covariances)
        return log_probs + self.weights.log()


def gaussian(
    x: Tensor, *, covariance: Covariance = "full", min_variance: float = 0.0
) -> GaussianMixtureFit:
    """Fit a single Gaussian by maximum likelihood, in closed form.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        min_variance: Smallest eigenvalue allowed; smaller ones are raised to it, which is the
            maximum likelihood under this constraint.

    Returns:
        The fit, a mixture of one component with empty ``log_likelihoods``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix, or an argument is out of range, or the
            covariance is singular, so that the likelihood is unbounded.

    Example:
        >>> fit = gaussian(torch.tensor([[0.0, 0.0], [2.0, 4.0]]), covariance="diagonal")
        >>> fit.locs, fit.covariances.diagonal(dim1=1, dim2=2)
        (tensor([[1., 2.]], dtype=torch.float64), tensor([[1., 4.]], dtype=torch.float64))
    """
    data = check_mixture_data(x, covariance, min_variance, "gaussian")
    try:
        params = m_step(data, data.new_ones(len(data), 1), covariance, min_variance)
    except CollapsedComponentError as err:
        raise ValueError(
            f"gaussian: expected a covariance of full rank {data.shape[1]}, got rank {err.rank} "
            f"from {len(data)} rows. {remedy(covariance, min_variance)}"
        ) from err
    return _to_fit(params, data.new_empty(0))


def gaussian_mixture_em(
    x: Tensor,
    num_components: int,
    *,
    covariance: Covariance = "full",
    num_steps: int = 1000,
    tolerance: float = 1e-8,
    num_restarts: int = 1,
    min_variance: float = 0.0,
) -> GaussianMixtureFit:
    """Fit a mixture of Gaussians by EM, and keep the best of several starts.

    A start takes the clusters of k-means, seeded from torch's global generator, with their pooled
    covariance. Reaching ``num_steps`` is not an error; look at the end of ``log_likelihoods`` to
    judge. The optimum is a local one.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64.
        num_components: Number of components K.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``, for each component.
        num_steps: Largest number of EM steps of a start.
        tolerance: Stop after a step that gains less than this, in nats per datum.
        num_restarts: Number of starts, at least 1. One whose components collapse is passed over.
        min_variance: Smallest eigenvalue of a covariance; smaller ones are raised to it. With 0 the
            likelihood is unbounded, and a component may collapse onto a few rows.

    Returns:
        The fit of the start with the highest final log-likelihood.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix, or have constant columns or fewer distinct
            rows than components, or an argument is out of range, or a component collapsed in
            every start.

    Example:
        >>> x = torch.cat([torch.randn(50, 1) - 9, torch.randn(150, 1) + 9])
        >>> fit = gaussian_mixture_em(x, num_components=2)
        >>> fit.weights.sort().values
        tensor([0.2500, 0.7500], dtype=torch.float64)

    References:
        Dempster, Laird and Rubin 1977, "Maximum likelihood from incomplete data via the EM
        algorithm", section 4.3.
    """
    where = "gaussian_mixture_em"
    data = check_mixture_data(x, covariance, min_variance, where)
    check_integer(num_components, "num_components", 1, None, where, "Pass for instance 10.")
    check_integer(num_restarts, "num_restarts", 1, None, where, "Pass 1 for a single start.")
    check_stopping(num_steps, tolerance, where)
    check_distinct_rows(data, num_components, where)

    def step(responsibilities: Tensor) -> _Params:
        return m_step(data, responsibilities, covariance, min_variance)

    fits, failures = [], []
    for _ in range(num_restarts):
        try:
            start = mixture_start(data, num_components, covariance, min_variance)
            e_step = partial(_e_step, data)
            fits.append(run_em(e_step, step, start, num_steps=num_steps, tolerance=tolerance))
        except CollapsedComponentError as err:
            failures.append(err)
    if not fits:
        last = failures[-1]
        raise ValueError(
            f"{where}: expected every component to keep a covariance of full rank "
            f"{data.shape[1]}, got component {last.component} with about {last.num_rows:.3g} rows "
            f"and rank {last.rank} in the last of {num_restarts} starts. "
            f"{remedy(covariance, min_variance)}"
        ) from last
    return _to_fit(*max(fits, key=lambda fit: float(fit[1][-1])))


def _e_step(data: Tensor, params: _Params) -> tuple[Tensor, Tensor]:
    """Return the responsibilities, shape ``(N, K)``, and the mean log-likelihood."""
    weights, locs, covariances = params
    joint = component_log_probs(data, locs, covariances) + weights.log()
    log_prob = joint.logsumexp(-1)
    return (joint - log_prob.unsqueeze(-1)).exp(), log_prob.mean()


def _to_fit(params: _Params, log_likelihoods: Tensor) -> GaussianMixtureFit:
    """Return the result, with diagonals spread to matrices."""
    weights, locs, covariances = params
    if covariances.ndim == 2:
        covariances = covariances.diag_embed()
    return GaussianMixtureFit(weights, locs, covariances, log_likelihoods)
