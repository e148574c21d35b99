"""Densities of codes: whole, of their single dimensions, and of the mixture over all data."""

import math
from copy import copy
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyro_vae.checks import support_of

__all__ = ["AggregateDensity", "log_prob_of_rows"]

# Bytes of the largest tensor in a chunk; some others are as large.
_CHUNK_BYTES = {"cpu": 2**25}
_CHUNK_BYTES_ACCELERATOR = 2**28


class AggregateDensity:
    """The mixture q(z) of the posteriors q(z | x_n) of N data, and its marginals q_j(z_j).

    Args:
        fn: The posteriors; one batch dimension is not 1, that of the rows.
        kept: Which rows are data, ``(rows,)``.
        where: The function that asks, for the messages.
        site: The site they belong to, for the messages.

    Attributes:
        num_data: N.

    Raises:
        ValueError: If the marginals have no known density.
    """

    def __init__(self, fn: Distribution, kept: torch.Tensor, *, where: str, site: str) -> None:
        self._fn, self._kept = _unchecked(fn), kept
        self.num_data = int(kept.sum())
        base = _unwrapped(self._fn)
        self._is_product = not base.event_shape
        if isinstance(base, MultivariateNormal | LowRankMultivariateNormal):
            base = Normal(base.mean, base.variance.sqrt(), validate_args=False)
        if base.event_shape:
            raise ValueError(
                f"{where}: expected a guide with densities q_j(z_j) of single dimensions at "
                f"site '{site}', got {type(base).__name__}. Use independent dimensions, such as "
                "Normal(loc, scale).to_event(1), or a MultivariateNormal."
            )
        self._marginals = base

    def log_prob(
        self, codes: torch.Tensor, chunk_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums over all data, for some codes at a time.

        Args:
            codes: Codes of every datum, ``(S, N, *event)``.
            chunk_size: Codes at a time, by default as many as fit a fixed memory.

        Returns:
            log q(z | x_n) of the codes' own data ``(S, N)``, log q(z) ``(S, N)`` and log q_j(z_j)
            ``(S, N, dimensions)``; nats, float64.
        """
        event_shape, device = self._fn.event_shape, codes.device
        if chunk_size is None:
            budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ACCELERATOR)
            chunk_size = max(1, budget // (8 * self._kept.numel() * math.prod(event_shape)))
        # Against the batch dimensions of all data stand those of length 1.
        flat = codes.reshape(-1, *(1,) * len(self._fn.batch_shape), *event_shape)
        own = torch.arange(self.num_data, device=device).repeat(len(codes)).unsqueeze(1)
        chunks = []
        for z, row in zip(flat.split(chunk_size), own.split(chunk_size), strict=True):
            given_x, by_dimension = self._pairs(z)
            chunks.append((given_x.gather(1, row), given_x.logsumexp(1), by_dimension.logsumexp(1)))
        given_own, log_q, log_q_j = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        log_n, shape = math.log(self.num_data), codes.shape[:2]
        return (
            given_own.reshape(shape),
            (log_q - log_n).reshape(shape),
            (log_q_j - log_n).reshape(*shape, -1),
        )

    def _pairs(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log q(z | x_n) of M codes under N data: ``(M, N)``, and ``(M, N, dimensions)``."""
        batch_shape = self._fn.batch_shape
        by_dimension = _log_prob(self._marginals, z, (*batch_shape, *self._fn.event_shape))
        by_dimension = by_dimension.reshape(len(z), self._kept.numel(), -1)
        if self._is_product:
            whole = by_dimension.sum(-1)
        else:
            whole = _log_prob(self._fn, z, batch_shape).reshape(len(z), -1)
        if self.num_data < self._kept.numel():
            return whole[:, self._kept], by_dimension[:, self._kept]
        return whole, by_dimension


def log_prob_of_rows(fn: Distribution, codes: torch.Tensor) -> torch.Tensor:
    """Log-densities of codes ``(S, rows, *event)``, each under its own row of ``fn``.

    Returns:
        Nats, float64: of every dimension if they are independent, ``(S, rows, dimensions)``,
        else of whole codes, ``(S, rows)``.
    """
    fn = _unchecked(fn)
    shape = (*fn.batch_shape, *fn.event_shape)
    value, base = codes.reshape(len(codes), *shape), _unwrapped(fn)
    if base.event_shape:
        return _log_prob(fn, value, fn.batch_shape).reshape(codes.shape[:2])
    log_prob = _log_prob(base, value, shape)
    return log_prob.reshape(*codes.shape[:2], -1)


def _unwrapped(fn: Any) -> Distribution:
    """Without declarations of events, copies along the batch, and masks over rows."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def _unchecked(fn: Any) -> Any:
    """A copy that does not raise outside its support, nor look at every number of a chunk."""
    fn = copy(fn)
    fn._validate_args = False
    if hasattr(fn, "base_dist"):
        fn.base_dist = _unchecked(fn.base_dist)
    return fn


def _log_prob(fn: Distribution, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Log-density in float64, -inf outside the support: ``(len(value), *shape)``."""
    log_prob = fn.log_prob(value).to(torch.float64)
    support = support_of(fn)
    if support is not None:  # It may differ from row to row, as a Uniform's does.
        log_prob = log_prob.where(support.check(value), -torch.inf)
    return log_prob.expand(len(value), *shape)
