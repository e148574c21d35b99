"""Priors of the code that are called with a context: a class, a vector, an image."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.checks import support_of
from pyro_vae.prior_checks import check_distribution
from pyro_vae.program import Program

__all__ = ["ConditionalPrior", "Unconditional"]


class ConditionalPrior(Program):
    """z ~ p(z | y), learnt.

    Args:
        encoder: From the context to a distribution over one code for each row, such as
            ``NormalEncoder(nn.Sequential(OneHot(10), MLP(10, [], 2 * 2)))``; any encoder of
            ``pyro_vae.nets`` will do.
        site: Name of the sample site.

    Returns (when called with a context inside a plate): the code, ``(*sample, batch,
    latent_dim)``.

    Attributes:
        encoder: As given.

    Raises:
        TypeError: When called, if the encoder does not return a distribution.
        ValueError: When called, if the encoder does not make one code for each row.

    Example:
        >>> from pyro_vae.conditioning import OneHot
        >>> from pyro_vae.nets import MLP, NormalEncoder
        >>> prior = ConditionalPrior(NormalEncoder(nn.Sequential(OneHot(10), MLP(10, [], 2 * 3))))
        >>> with pyro.plate("data", 5):
        ...     prior(torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([5, 3])

    References:
        Sohn et al. (2015), Learning structured output representation using deep conditional
        generative models, section 4.
    """

    def __init__(self, encoder: nn.Module, *, site: str = "z") -> None:
        super().__init__()
        self.encoder, self.site = encoder, site

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        fn = self.encoder(context)
        _check_rows(fn, context)
        code: torch.Tensor = pyro.sample(self.site, fn)
        return code


class Unconditional(Program):
    """A prior that is called with a context and ignores it: p(z | y) = p(z).

    Args:
        prior: A prior without context, see ``pyro_vae.priors``.

    Returns (when called with a context inside a plate): the code of ``prior``.

    Example:
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> prior = Unconditional(StandardNormalPrior(3))
        >>> with pyro.plate("data", 5):
        ...     prior(torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([5, 3])

    References:
        Kingma et al. (2014), Semi-supervised learning with deep generative models, equation 2.
    """

    def __init__(self, prior: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, context: Any) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        return self.prior()


def _check_rows(fn: Any, context: torch.Tensor) -> None:
    check_distribution("ConditionalPrior", "the encoder", fn)
    # A single categorical code has no event dimension; a real one without is a forgotten one.
    has_code = fn.event_shape or getattr(support_of(fn), "is_discrete", False)
    has_rows = fn.batch_shape or not context.dim()
    if not has_code or not has_rows or fn.batch_shape != context.shape[: len(fn.batch_shape)]:
        raise ValueError(
            "ConditionalPrior: expected one code for each row of the context, got batch shape "
            f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} from a context of "
            f"shape {tuple(context.shape)}. Was `.to_event(1)` forgotten? It declares the "
            "dimensions of one code: dist.Normal(loc, scale).to_event(1)."
        )
