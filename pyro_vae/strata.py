"""Draws of a mixture guide in proportion to its components, for less noise than chance leaves."""

from collections.abc import Collection
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import MixtureSameFamily

from pyro_vae.mixtures import FixedNormalMixture, stratified_components
from pyro_vae.traces import is_latent

__all__ = ["Strata", "stratified_sample"]


class Strata(Messenger):
    """Spreads the particles of a guide over the components of its first mixture in proportion.

    Only of the first, and only where it has one value a datum: two mixtures in step, or two
    values of one, would not be independent.

    Args:
        num_particles: How many particles there are in all.
        dim: Their dimension, negative, where several run at once.
        data_dims: The dimensions of the data plates, negative.
        training: Whether gradients are wanted, of which only a ``FixedNormalMixture`` keeps the
            right ones.

    Attributes:
        first: Number of the first particle of the next run.
    """

    def __init__(
        self, num_particles: int, dim: int, data_dims: Collection[int], *, training: bool = False
    ) -> None:
        super().__init__()
        self.first = 0
        self._dims = {dim, *data_dims}
        self._kind = FixedNormalMixture if training else MixtureSameFamily
        self._num_particles, self._dim = num_particles, dim
        self._offset: torch.Tensor | None = None
        self._site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        fn, num = msg["fn"], self._num_particles
        if not is_latent(msg) or msg["done"] or not isinstance(fn, self._kind):
            return
        if not can_stratify(fn, self._dims) or self._site not in (None, msg["name"]):
            return
        self._site = msg["name"]
        missing = -self._dim - len(fn.batch_shape)
        shape = (1,) * missing + fn.batch_shape
        at_once = shape[self._dim]
        if self._offset is None:
            probs = fn.mixture_distribution.probs
            of_rows = [1 if dim == len(shape) + self._dim else n for dim, n in enumerate(shape)]
            self._offset = torch.rand(of_rows, dtype=probs.dtype, device=probs.device) / num
        position = torch.arange(self.first, self.first + at_once, device=self._offset.device) / num
        position = position.to(self._offset.dtype).reshape((at_once,) + (1,) * (-self._dim - 1))
        offset = self._offset
        if missing > 0:  # A single particle, without a dimension of its own.
            position, offset = (part.reshape(part.shape[missing:]) for part in (position, offset))
        msg["value"], msg["done"] = _draw(fn, position, offset), True


def stratified_sample(fn: Any, num: int) -> torch.Tensor:
    """``num`` draws of a mixture in proportion to its components: ``(num, *batch, *event)``."""
    probs = fn.mixture_distribution.probs
    offset = torch.rand(fn.batch_shape, dtype=probs.dtype, device=probs.device) / num
    position = torch.arange(num, dtype=probs.dtype, device=probs.device) / num
    position = position.reshape((num,) + (1,) * len(fn.batch_shape))
    return _draw(fn.expand((num, *fn.batch_shape)), position, offset)


def can_stratify(fn: Any, dims: Collection[int]) -> bool:
    """Whether a distribution is a mixture, with no more batch dimensions than these.

    The gradient of learnt weights would be lost: how many particles a component gets has none.
    """
    if not isinstance(fn, MixtureSameFamily):
        return False
    shape = fn.batch_shape
    if any(shape[dim] != 1 and dim not in dims for dim in range(-len(shape), 0)):
        return False
    return not (torch.is_grad_enabled() and fn.mixture_distribution.logits.requires_grad)


def _draw(fn: Any, position: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    component = stratified_components(fn.mixture_distribution.probs, position, offset)
    if isinstance(fn, FixedNormalMixture):
        return fn.rsample_of(component)
    of_all: torch.Tensor = fn.component_distribution.sample()
    dim = len(fn.batch_shape)
    index = component.reshape(component.shape + (1,) * (of_all.dim() - dim))
    return of_all.gather(dim, index.expand(*component.shape, 1, *fn.event_shape)).squeeze(dim)
