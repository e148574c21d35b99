"""What is asked of distributions beyond torch's interface: parts, copies, KLs. No traces."""

from copy import copy
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch.distributions import Distribution, Independent, kl_divergence

from pyro_vae.checks import support_of
from pyro_vae.traces import is_point_mass

__all__ = ["closed_form_kl", "elementwise", "log_prob_anywhere", "unchecked", "unwrapped"]


def unwrapped(fn: Distribution) -> Distribution:
    """A distribution without declarations of events, masks and copies around it."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def unchecked(fn: Any) -> Any:
    """A copy of a distribution that evaluates its formula for values outside its support too."""
    fn = copy(fn)
    if hasattr(fn, "base_dist"):
        fn.base_dist = unchecked(fn.base_dist)
    fn._validate_args = False  # After the copy below it: Independent hands this on.
    return fn


def log_prob_anywhere(fn: Distribution, value: torch.Tensor) -> torch.Tensor:
    """Log-density, nats, -inf outside the support, which may differ from row to row."""
    log_prob: torch.Tensor = unchecked(fn).log_prob(value)
    support = support_of(fn)
    return log_prob if support is None else log_prob.where(support.check(value), -torch.inf)


def elementwise(fn: Distribution) -> Distribution | None:
    """The distribution of the single elements of an event, if they are independent."""
    if isinstance(fn, Independent):
        return elementwise(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        base, mask = elementwise(fn.base_dist), fn._mask
        if isinstance(mask, torch.Tensor):
            mask = mask.reshape(mask.shape + (1,) * fn.event_dim)
        return None if base is None else MaskedDistribution(base, mask)
    return None if fn.event_shape else fn


def closed_form_kl(q: Distribution, p: Distribution) -> torch.Tensor | None:
    """KL(q || p), nats, or ``None`` where no formula is known.

    A point mass has none: Pyro's formula forgets the density that its guides put there.
    """
    if is_point_mass(q):
        return None
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return kl if isinstance(kl, torch.Tensor) else None  # 0.0 where .mask(False) hides all.
