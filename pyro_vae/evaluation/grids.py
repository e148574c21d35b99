"""Grids on which integrals over one variable are sums, and how far these may be off."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import biject_to, constraints

from pyro_vae.checks import support_of, support_of_numbers

__all__ = ["Coordinate", "Grid", "bounds_of", "trapezoid_weights"]

# In nats below the largest value: what lies lower is no part of an integral.
_CUT = 40.0
# How far the first look reaches: standard deviations of a prior on the real line, or nats of the
# logarithm or logit of a code where that is bounded.
_REACH_REAL, _REACH_BOUNDED = 1e4, 80.0
# Nats by which a parabola through the points around a maximum may exceed it.
_RESOLVED = 0.5
# Orders of the differences that tell a jump from what is smooth.
_ORDERS = 2, 4, 8, 16
# In units of the last place: changes that may be rounding are no jumps.
_ROUNDING = 64.0


def bounds_of(fn: Any, where: str, site: str) -> tuple[float, float]:
    """The ends of the support of a scalar distribution, infinite ones included.

    Raises:
        ValueError: If the support is no interval, or not the same for all rows.
    """
    support = support_of_numbers(support_of(fn))
    if support is None or support is constraints.real:
        return -math.inf, math.inf
    ends = []
    for name, default in (("lower_bound", -math.inf), ("upper_bound", math.inf)):
        end = torch.as_tensor(getattr(support, name, default), dtype=torch.float64)
        if (end != end.flatten()[0]).any():
            raise ValueError(
                f"{where}: expected one support for all rows at site '{site}', got a {name} "
                f"between {float(end.min()):g} and {float(end.max()):g}. Evaluate each group of "
                "rows that shares a support alone."
            )
        ends.append(float(end.flatten()[0]))
    if ends == [-math.inf, math.inf]:
        raise ValueError(
            f"{where}: expected a site whose support is the real line or an interval, got "
            f"{support} at site '{site}'. Reparameterise the site to one of these."
        )
    return ends[0], ends[1]


def trapezoid_weights(coordinate: torch.Tensor) -> torch.Tensor:
    """Weights of the trapezoidal rule at the points of a monotone ``(num,)``."""
    steps = coordinate.diff().abs()
    zero = steps.new_zeros(1)
    return (torch.cat([zero, steps]) + torch.cat([steps, zero])) / 2


@dataclass(frozen=True)
class Grid:
    """Points of a variable z, and the rule for integrals over it.

    The rule is the trapezoidal one in a coordinate t with z = z(t).

    Attributes:
        points: z in ascending order, ``(num,)``, float64.
        coordinate: t of the points, monotone, ``(num,)``.
        log_slope: log |dz / dt|, ``(num,)``.
        gaps: What lies between the first and the last point and the ends of the support; ``inf``
            for an end at infinity, also of t.
        eps: Rounding of the dtype in which densities are computed.
    """

    points: torch.Tensor
    coordinate: torch.Tensor
    log_slope: torch.Tensor
    gaps: tuple[float, float] = (math.inf, math.inf)
    eps: float = 0.0

    def weights(self, every: int = 1) -> torch.Tensor:
        """Weight of each point, ``(num,)``; 0 for all but ``every`` other point and the last."""
        num = len(self.points)
        kept = torch.arange(num, device=self.points.device)
        kept = kept[(kept % every == 0) | (kept == num - 1)]
        weights = torch.zeros_like(self.points)
        weights[kept] = trapezoid_weights(self.coordinate[kept]) * self.log_slope[kept].exp()
        return weights

    def log_integral(self, log_f: torch.Tensor, every: int = 1) -> torch.Tensor:
        """Logarithm of the integral of exp(log_f): ``(num, *batch)`` to ``(*batch,)``."""
        return (log_f + _beside(self.weights(every).log(), log_f)).logsumexp(0)

    def integral(self, f: torch.Tensor, every: int = 1) -> torch.Tensor:
        """Integral of f: ``(num, *batch)`` to ``(*batch,)``."""
        weights = _beside(self.weights(every), f)
        return torch.where(weights > 0, f * weights, 0.0).sum(0)  # f may be infinite.

    def log_tails(self, log_f: torch.Tensor) -> torch.Tensor:
        """Logarithm of what exp(log_f) may have beyond both ends: ``(*batch,)``.

        Towards infinity it is taken to fall as it does between the last two points, or, where it
        hardly does, to go on for as long as the grid is.
        """
        log_f = log_f + _beside(self.log_slope, log_f)
        steps = self.coordinate.diff().abs()
        length = steps.sum()
        ends = []
        for end, beside, step, gap in ((0, 1, 0, self.gaps[0]), (-1, -2, -1, self.gaps[1])):
            if gap < math.inf:
                missing = log_f[end] + math.log(max(gap, 1e-300))
            else:
                fall = (log_f[end] - log_f[beside]).clamp(max=0.0)
                missing = log_f[end] + (steps[step] / fall.expm1().abs()).clamp(max=length).log()
            ends.append(torch.where(log_f[end] == -torch.inf, -torch.inf, missing))
        return torch.logaddexp(*ends)

    def coarseness(self, log_f: torch.Tensor) -> torch.Tensor:
        """By how much exp(log_f) may rise between the points, nats, ``(*batch,)``; 0 if resolved.

        Seen from parabolas through the points around each maximum that may count.
        """
        log_f = log_f + _beside(self.log_slope, log_f)
        rise = (_vertices(log_f) - log_f).nan_to_num(0.0)
        counts = (rise > _RESOLVED) & (_ceilings(log_f) > log_f.amax(0) - _CUT)
        return torch.where(counts, rise, 0.0).amax(0)

    def roughness(self, f: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What jumps of f may cost its integral, ``(*batch,)``: about 0 where f is smooth.

        A jump by J between two points at distance h costs up to h J / 2, up or down as it lies
        between them, so that costs of several must not be set off against one another. It is told
        from a slope by its neighbours: differences of high order remove what is smooth.

        Args:
            f: Finite, ``(num, *batch)``.
            scale: The numbers that it is computed from, whose rounding is no jump, likewise.
        """
        dz = _beside(self.log_slope.exp(), f)
        f, rounding = f * dz, _ROUNDING * self.eps * scale * dz
        steps = _beside(self.coordinate.diff().abs(), f)
        rounding = rounding[1:] + rounding[:-1]
        slopes, costs = f.diff(dim=0) / steps, []
        for order in _ORDERS:
            first, last = (
                slope.unsqueeze(0).expand(order // 2, *slope.shape)
                for slope in (slopes[0], slopes[-1])
            )
            bends = torch.cat([first, slopes, last]).diff(order, dim=0)
            jumps = bends.abs() / math.comb(order, order // 2) * steps
            costs.append((torch.where(jumps > rounding, jumps, 0.0) * steps / 2).sum(0))
        return torch.stack(costs).amin(0)

    def log_roughness(self, log_f: torch.Tensor) -> torch.Tensor:
        """The change of :meth:`log_integral` by :meth:`roughness`, nats, ``(*batch,)``."""
        top = log_f.amax(0).nan_to_num(0.0)
        f = (log_f - top).exp()
        scale = torch.where(f > 0, f * (1 + log_f.abs()), 0.0)
        share = self.roughness(f, scale) / (self.log_integral(log_f) - top).exp()
        return -torch.log1p(-share.clamp(max=1.0))


class Coordinate:
    """z = T(loc + scale sinh t), with T from the real line onto an interval.

    Densities fall so fast at both ends of t that the trapezoidal rule converges exponentially for
    smooth integrands, whatever T: this is the double exponential rule.

    Args:
        bounds: Ends of the interval, also infinite ones.
        loc: A point inside it, near which to look closest.
        scale: Width around it, for an infinite interval.
        like: A tensor of the dtype and device of the points.
        where: The function that asks, for the messages.

    References:
        Takahasi and Mori (1974), Double exponential formulas for numerical integration.
    """

    def __init__(
        self,
        bounds: tuple[float, float],
        loc: float,
        scale: float,
        *,
        like: torch.Tensor,
        where: str,
    ) -> None:
        low, high = bounds
        self._bounds, self._like, self._where = bounds, like, where
        constraint: Any = constraints.real
        if math.isfinite(low) and math.isfinite(high):
            constraint = constraints.interval(low, high)
        elif math.isfinite(low):
            constraint = constraints.greater_than(low)
        elif math.isfinite(high):
            constraint = constraints.less_than(high)
        self._transform = biject_to(constraint)
        inner = torch.tensor(loc, dtype=torch.float64, device=like.device)
        self._loc = self._transform.inv(inner)
        is_real = constraint is constraints.real
        self._scale = scale if is_real else 1.0
        self.reach = math.asinh(_REACH_REAL if is_real else _REACH_BOUNDED)

    def grid(self, start: float, stop: float, num: int) -> Grid:
        """About ``num`` points, equally spaced in t; those that the dtype can tell apart."""
        t = torch.linspace(start, stop, num, dtype=torch.float64, device=self._like.device)
        u = self._loc + self._scale * t.sinh()
        z = self._transform(u)
        log_slope = self._transform.log_abs_det_jacobian(u, z) + (self._scale * t.cosh()).log()
        if z[-1] < z[0]:
            t, z, log_slope = t.flip(0), z.flip(0), log_slope.flip(0)
        rounded = z.to(self._like.dtype).to(torch.float64)
        kept = (rounded > self._bounds[0]) & (rounded < self._bounds[1])
        kept[1:] &= rounded[1:] > rounded[:-1]
        if kept.sum() < 5:
            raise ValueError(
                f"{self._where}: expected a latent whose dtype tells its values apart, got "
                f"{self._like.dtype} between {float(z[0]):g} and {float(z[-1]):g}. Run the model "
                "in torch.float64, or measure the latent on another scale."
            )
        eps = torch.finfo(self._like.dtype).eps
        return Grid(rounded[kept], t[kept], log_slope[kept], eps=eps)

    def range_of(
        self, log_densities: Callable[[torch.Tensor], Sequence[torch.Tensor]], num: int
    ) -> tuple[float, float]:
        """The t between which lies all that counts of some densities.

        Args:
            log_densities: From points ``(num,)`` to log-densities ``(num, *batch)``.
            num: Points of every look; each is closer than the one before.
        """
        start, stop = -self.reach, self.reach
        while True:
            grid = self.grid(start, stop, num)
            counts = torch.zeros(len(grid.points), dtype=torch.bool, device=grid.points.device)
            for log_f in log_densities(grid.points):
                # A decoder may overflow far out.
                log_f = log_f.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
                log_f = (log_f + _beside(grid.log_slope, log_f)).flatten(1)
                counts |= (_ceilings(log_f) > log_f.amax(0) - _CUT).any(1)
            index = counts.nonzero().squeeze(1)
            if not len(index):
                return start, stop  # Nowhere a number: the densities on this range will say so.
            first, last = max(int(index[0]) - 1, 0), min(int(index[-1]) + 1, len(counts) - 1)
            ends = sorted(float(grid.coordinate[i]) for i in (first, last))
            is_close = ends[1] - ends[0] > (stop - start) / 2
            start, stop = ends
            if is_close or len(grid.points) < num // 2:
                return start, stop


def _vertices(log_f: torch.Tensor) -> torch.Tensor:
    """``log_f``, ``(num, *batch)``, with maxima raised to what lies between the points.

    That is the vertex of the parabola through a maximum and its neighbours.
    """
    before, here, after = log_f[:-2], log_f[1:-1], log_f[2:]
    bend = 2 * here - before - after
    is_peak = (here >= before) & (here >= after) & (bend > 0) & bend.isfinite()
    vertex = here + (after - before).square() / (8 * bend)
    raised = log_f.clone()
    raised[1:-1] = torch.where(is_peak, vertex, here)
    return raised


def _ceilings(log_f: torch.Tensor) -> torch.Tensor:
    """``log_f``, ``(num, *batch)``, with maxima raised to what may lie between the points.

    That is a cusp, which a parabola falls short of: its sides go on as steeply as they do around
    the maximum.
    """
    raised = log_f.clone()
    here = log_f[2:-2]
    is_peak = (here >= log_f[1:-3]) & (here >= log_f[3:-1])
    falls = log_f.diff(dim=0).abs().nan_to_num(0.0, 0.0)
    steepest = torch.stack([falls[i : len(falls) - 3 + i] for i in range(4)]).amax(0)
    raised[2:-2] = torch.where(is_peak, here + steepest, here)
    return torch.maximum(raised, _vertices(log_f))  # At the ends too.


def _beside(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``(num,)`` in as many dimensions as ``(num, *batch)``."""
    return values.reshape(-1, *(1,) * (other.dim() - 1))
