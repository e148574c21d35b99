"""Random walks through the latent space that stay in the prior."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_vae.checks import check_at_least
from pyro_vae.isolation import without_side_effects
from pyro_vae.latent_paths import autoregressive_noise, periodic_noise
from pyro_vae.latent_sites import Program, choose
from pyro_vae.latent_walks import mean_of
from pyro_vae.traces import is_latent, is_point_mass

__all__ = ["loop", "walk"]

Path = Callable[[torch.Tensor], torch.Tensor]
"""From a tensor like one point, ``(*shape)``, to noise at every point, ``(num_steps, *shape)``."""


def walk(
    model: Program,
    *args: Any,
    num_steps: int,
    step_size: float = 0.3,
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Data along a random walk that stays in the prior: each of its points is a draw from it.

    The normal noise e that the latents are made of goes to sqrt(1 - s^2) e + s n, with fresh noise
    n, which leaves N(0, I) as it is: the walk never drifts to where the prior has no mass. A latent
    whose mean and scale depend on another, as in a hierarchy, follows it, and a flow bends the walk
    of its noise.

    Args:
        model: A model whose latents are normal, or transformed normals such as flows.
        *args: A batch that the model takes, with as many rows as there are to be walks; which
            values it has plays no role.
        num_steps: Points on each walk.
        step_size: s in (0, 1]. The correlation of the noise after k steps is (1 - s^2)^(k / 2).
        site: Which latent walks, by default all. Of the others the normal ones keep their noise,
            and those of another kind, such as classes, the value drawn first; that walk stays in
            the prior if these do not depend on the latent that walks. One whose value is given
            inside the model, by ``pyro.poutine.replay`` for instance, keeps it.
        **kwargs: Keyword arguments of the model.

    Returns:
        Means of the data, ``(num_steps, batch, *event)``.

    Raises:
        TypeError: If ``num_steps`` is not an integer.
        ValueError: If ``num_steps`` is below 1 or ``step_size`` out of range; if there is no such
            latent, or it is not made of normal noise; if not exactly one site is observed.

    Example:
        >>> from pyro_vae.models import LinearGaussian
        >>> walk(LinearGaussian(data_dim=64, latent_dim=2), torch.zeros(5, 64), num_steps=20).shape
        torch.Size([20, 5, 64])

    References:
        Cotter et al. (2013), MCMC methods for functions: modifying old algorithms to make them
        faster, the proposal of the preconditioned Crank-Nicolson method,
        https://arxiv.org/abs/1202.0709
    """
    check_at_least("walk", "num_steps", num_steps, 1)
    if not 0 < step_size <= 1:
        raise ValueError(
            f"walk: expected step_size in (0, 1], got {step_size:g}. At 1 every point is a fresh "
            "draw; 0.3 goes slowly."
        )

    def path(like: torch.Tensor) -> torch.Tensor:
        return autoregressive_noise(like, num_steps, step_size)

    return _means_along(path, num_steps, model, args, kwargs, site, "walk")


def loop(
    model: Program,
    *args: Any,
    num_steps: int,
    num_waves: int = 2,
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    r"""Data along a smooth closed curve through the prior, for films without an end.

    As :func:`walk`, with noise that goes once around a random closed curve,

    .. math:: e_t = K^{-1/2} \sum_{k=1}^K \cos(2 \pi k t / T) a_k + \sin(2 \pi k t / T) b_k
        \quad \text{with } a_k, b_k \sim N(0, I),

    each point of which is distributed as N(0, I), too. The point after the last is the first.

    Args:
        model: A model whose latents are normal, or transformed normals such as flows.
        *args: A batch that the model takes, with as many rows as there are to be loops; which
            values it has plays no role.
        num_steps: T, points on each loop.
        num_waves: K; the more, the more winding.
        site: Which latent moves, by default all, as in :func:`walk`.
        **kwargs: Keyword arguments of the model.

    Returns:
        Means of the data, ``(num_steps, batch, *event)``.

    Raises:
        TypeError: If ``num_steps`` or ``num_waves`` is not an integer.
        ValueError: If one of them is below 1; otherwise as :func:`walk`.
    """
    check_at_least("loop", "num_steps", num_steps, 1)
    check_at_least("loop", "num_waves", num_waves, 1)

    def path(like: torch.Tensor) -> torch.Tensor:
        return periodic_noise(like, num_steps, num_waves)

    return _means_along(path, num_steps, model, args, kwargs, site, "loop")


def _means_along(
    path: Path,
    num_steps: int,
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    site: str | None,
    where: str,
) -> torch.Tensor:
    """Means of the data as the noise of the latents goes along paths."""
    handler, means = _NoiseMessenger(path, site, where), []
    with without_side_effects(model):
        for handler.step in range(num_steps):
            trace = poutine.trace(handler(model)).get_trace(*args, **kwargs)
            if not handler.step and (site or not handler.latents):
                choose(handler.latents, site, where)
            means.append(mean_of(trace, where))
    return torch.stack(means)


class _NoiseMessenger(Messenger):
    """Makes normal latents of given noise; all else that is drawn stays as in the first run."""

    def __init__(self, path: Path, site: str | None, where: str) -> None:
        super().__init__()
        self.step, self.latents = 0, list[str]()
        self._path, self._site, self._where = path, site, where
        self._paths, self._kept = dict[str, torch.Tensor](), dict[str, Any]()

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["value"] is not None:
            return
        if name in self._kept:
            msg["value"], msg["done"] = self._kept[name], True
        if not is_latent(msg) or is_point_mass(fn):  # A point mass follows what it is made of.
            return
        if not self.step:
            self.latents.append(name)
        value = _made_of_noise(fn, lambda like: self._noise(name, like))
        if value is not None:
            msg["value"], msg["done"] = value, True
        elif self._site in (None, name):
            raise ValueError(
                f"{self._where}: expected latents made of normal noise, got {type(fn).__name__} at "
                f"site '{name}'. Name another site=..., or use pyro_vae.latents.interpolate."
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        drawn = is_latent(msg) and not is_point_mass(msg["fn"])
        if (drawn or site_is_subsample(msg)) and msg["name"] not in self._paths:
            self._kept[msg["name"]] = msg["value"]

    def _noise(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self._paths:
            still = self._site not in (None, name)
            self._paths[name] = torch.randn_like(like)[None] if still else self._path(like)
        return self._paths[name][self.step % len(self._paths[name])]  # One point if it stays.


def _made_of_noise(fn: Any, draw: Path) -> torch.Tensor | None:
    """A value of this distribution made of noise from N(0, I); ``None`` if it is not of that kind.

    Args:
        fn: Any distribution.
        draw: The noise, called with a tensor of its shape.
    """
    base: Any = fn
    shape, transforms = _shape(fn), list[Any]()
    while True:
        if isinstance(base, torch.distributions.TransformedDistribution):
            transforms = [*base.transforms, *transforms]
            base = base.base_dist
            shape = _shape(base)
        elif isinstance(base, _WRAPPERS):
            base = base.base_dist
        else:
            break
    if isinstance(base, torch.distributions.MultivariateNormal):
        noise = draw(base.loc.new_empty(shape))
        value = base.loc + (base.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    elif isinstance(base, torch.distributions.Normal):
        value = base.loc + base.scale * draw(base.loc.new_empty(shape))
    else:
        return None
    for transform in transforms:
        value = transform(value)
    return value if value.shape == _shape(fn) else None


def _shape(fn: Any) -> torch.Size:
    """Of one draw; within Pyro's distributions are some of torch, which have no ``shape``."""
    return torch.Size(fn.batch_shape + fn.event_shape)


_WRAPPERS = torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution
