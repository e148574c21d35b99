"""The sites of a program that have codes, and what the model makes of codes."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch.distributions import constraints

from pyro_vae.checks import support_of
from pyro_vae.drawn_sites import unmasked
from pyro_vae.handlers import replay_values
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import is_latent, sites_of

__all__ = ["choose", "codes_of", "decoded", "expected", "is_code"]

Program = Callable[..., Any]


def is_code(site: Any) -> bool:
    """Whether a guide's site is a latent of the model, not an auxiliary one behind it."""
    return is_latent(site) and not site["infer"].get("is_auxiliary", False)


def codes_of(
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    sample: bool = False,
) -> dict[str, torch.Tensor]:
    """A code for every latent of the guide."""
    with without_side_effects(guide):
        trace = poutine.trace(guide).get_trace(*args, **(kwargs or {}))
    return {
        name: site["value"] if sample else _center(site["fn"], site["value"])
        for name, site in sites_of(trace, is_code).items()
    }


def decoded(
    model: Program,
    codes: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
) -> tuple[Callable[[], Any], poutine.Trace]:
    """The model at these codes, bound to its arguments, and a trace of it."""
    program = partial(replay_values(model, codes), *args, **kwargs)
    trace = poutine.trace(program).get_trace()
    unknown = set(codes) - set(sites_of(trace, is_latent))
    if unknown:
        raise ValueError(
            f"{where}: expected codes for the latents {list(sites_of(trace, is_latent))}, got "
            f"'{min(unknown)}'. Use the site names of the model."
        )
    return program, trace


def choose(names: Collection[str], site: str | None, where: str) -> str:
    """The name asked for, or the only one."""
    if site is None and len(names) == 1:
        return next(iter(names))
    if site is None or site not in names:
        got = "none" if site is None else f"'{site}'"
        raise ValueError(
            f"{where}: expected site to be one of {list(names)}, got {got}. "
            "Name the site you mean with site=..."
        )
    return site


def expected(fn: TorchDistribution) -> torch.Tensor:
    """The mean of the data; of classes, also one-hot ones, the mode; a sample where unknown."""
    fn = unmasked(fn)
    support = support_of(fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.one_hot:  # Its mean is a vector of probabilities.
        return fn.mode
    try:
        mean: torch.Tensor = fn.mean
    except NotImplementedError:
        return fn.sample()
    return fn.mode if mean.isnan().any() else mean


def _center(fn: TorchDistribution, value: torch.Tensor) -> torch.Tensor:
    """The mean of a continuous distribution that knows it, else the sample."""
    if getattr(support_of(fn), "is_discrete", False):
        return value
    try:
        return fn.mean
    except NotImplementedError:
        return value
