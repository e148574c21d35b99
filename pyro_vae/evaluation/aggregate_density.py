"""Densities of codes: whole, of their single dimensions, and of the mixture over all data."""

import math

import torch
from torch.distributions import (
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyro_vae.densities import log_prob_anywhere, unwrapped

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
        self._fn, self._kept = fn, kept
        self.num_data = int(kept.sum())
        base = unwrapped(self._fn)
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
        # Written in place: small results kept in a list between the large tensors of the chunks
        # would hold on to the memory that those give back.
        num, dimensions = len(flat), math.prod(event_shape)
        given_own = torch.empty(num, dtype=torch.float64, device=device)
        log_q, log_q_j = torch.empty_like(given_own), given_own.new_empty(num, dimensions)
        for start in range(0, num, chunk_size):
            chunk = slice(start, start + chunk_size)
            given_x, by_dimension = self._pairs(flat[chunk])
            given_own[chunk] = given_x.gather(1, own[chunk]).squeeze(1)
            torch.logsumexp(given_x, 1, out=log_q[chunk])
            torch.logsumexp(by_dimension, 1, out=log_q_j[chunk])
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
    shape = (*fn.batch_shape, *fn.event_shape)
    value, base = codes.reshape(len(codes), *shape), unwrapped(fn)
    if base.event_shape:
        return _log_prob(fn, value, fn.batch_shape).reshape(codes.shape[:2])
    log_prob = _log_prob(base, value, shape)
    return log_prob.reshape(*codes.shape[:2], -1)


def _log_prob(fn: Distribution, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Log-density in float64, -inf outside the support: ``(len(value), *shape)``."""
    log_prob = log_prob_anywhere(fn, value).to(torch.float64)
    return log_prob.expand(len(value), *shape)
