"""Paths through codes and through normal noise: tensors in, tensors out, no programs."""

import torch

__all__ = ["autoregressive_noise", "great_circle", "periodic_noise"]


def great_circle(start: torch.Tensor, end: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Codes on the great circle from one direction to another, of interpolated norm.

    With the directions u and v of both ends, the angle :math:`\theta` between them and a weight w,

    .. math:: \bigl((1 - w) |a| + w |b|\bigr)
        \frac{\sin((1 - w) \theta)\, u + \sin(w \theta)\, v}{\sin \theta},

    which tends to the straight line as :math:`\theta` goes to 0. A code at the origin has no
    direction; it takes that of the other end.

    Args:
        start: a, of shape ``(*batch, d)``.
        end: b, of the same shape.
        weights: In 0 ... 1, ``(num,)``.

    Returns:
        ``(num, *batch, d)``; at the weights 0 and 1 the very codes given.

    Raises:
        ValueError: If two codes are opposite, to within rounding.

    Example:
        >>> great_circle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.5]))
        tensor([[1.4142, 1.4142]])

    References:
        Shoemake (1985), Animating rotation with quaternion curves.
        White (2016), Sampling generative networks, https://arxiv.org/abs/1609.04468;
        he gives the codes themselves, not their directions, these weights, which is the same
        where their norms are equal.
    """
    u, v = _direction(start, end), _direction(end, start)
    chord, middle = _norm(u - v), _norm(u + v)
    opposite = (middle < torch.finfo(start.dtype).eps ** 0.5) & (chord > 1)
    if opposite.any():
        raise ValueError(
            f"interpolate: expected codes that are not opposite, got {int(opposite.sum())} pairs "
            "that are, between which no great circle is the shortest. Use path='linear'."
        )
    angle = 2 * torch.atan2(chord, middle)  # Exact for small angles, unlike the arc cosine.
    w = weights.reshape(-1, *[1] * start.dim())
    radius = _norm(start).lerp(_norm(end), w)
    path = radius * (_share(1 - w, angle) * u + _share(w, angle) * v)
    return path.where(w != 0, start).where(w != 1, end)


def _share(w: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """sin(w angle) / sin(angle), which is w at angle 0."""
    return w * torch.sinc(w * angle / torch.pi) / torch.sinc(angle / torch.pi)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Norms whose squares neither overflow nor underflow."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return largest * torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)


def _direction(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The unit vector along ``x``, or along ``other`` where ``x`` is 0."""
    x = x.where(_norm(x) > 0, other)
    return x / _norm(x).clamp(min=torch.finfo(x.dtype).tiny)


def autoregressive_noise(like: torch.Tensor, num_steps: int, step_size: float) -> torch.Tensor:
    """A random walk that stays in N(0, I): e' = sqrt(1 - s^2) e + s n with fresh noise n.

    Args:
        like: Shape, dtype and device of one step, ``(*shape)``.
        num_steps: Points, the first of them a draw from N(0, I), as are all others.
        step_size: s in (0, 1]; the correlation after k steps is (1 - s^2)^(k / 2).

    Returns:
        ``(num_steps, *shape)``.
    """
    fresh = torch.randn(num_steps, *like.shape, dtype=like.dtype, device=like.device)
    path = [fresh[0]]
    for noise in fresh[1:]:
        path.append((1 - step_size**2) ** 0.5 * path[-1] + step_size * noise)
    return torch.stack(path)


def periodic_noise(like: torch.Tensor, num_steps: int, num_waves: int) -> torch.Tensor:
    r"""A smooth closed random curve, each point of which is distributed as N(0, I).

    .. math:: e_t = K^{-1/2} \sum_{k=1}^K \cos(2 \pi k t / T) a_k + \sin(2 \pi k t / T) b_k
        \quad \text{with } a_k, b_k \sim N(0, I).

    Args:
        like: Shape, dtype and device of one step, ``(*shape)``.
        num_steps: T, points of one turn; the one after the last would be the first.
        num_waves: K; the more, the more winding.

    Returns:
        ``(num_steps, *shape)``.
    """
    waves = torch.arange(1, num_waves + 1, dtype=like.dtype, device=like.device)
    turns = torch.arange(num_steps, dtype=like.dtype, device=like.device) / num_steps
    phases = 2 * torch.pi * turns[:, None] * waves
    noise = torch.randn(2, num_waves, *like.shape, dtype=like.dtype, device=like.device)
    path = torch.tensordot(torch.stack([phases.cos(), phases.sin()]), noise, ([0, 2], [0, 1]))
    return path / num_waves**0.5
