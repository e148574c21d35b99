"""The sites of a program that have codes, and what the model makes of codes."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints

from pyro_vae.checks import support_of
from pyro_vae.drawn_sites import unmasked
from pyro_vae.handlers import replay_values
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import Site, is_latent, sites_of

__all__ = ["choose", "code_sites", "decoded", "expected", "is_code"]

Program = Callable[..., Any]


def is_code(site: Any) -> bool:
    """Whether a guide's site is a latent of the model, not an auxiliary one behind it."""
    return is_latent(site) and not site["infer"].get("is_auxiliary", False)


def code_sites(
    guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, sample: bool = False
) -> dict[str, Site]:
    """The latents of a guide, whose values are codes that belong together.

    Args:
        guide: Any guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sample: Whether the values are draws, or means, each given those of the latents before it.
    """
    program = guide if sample else _CenterMessenger()(guide)
    with without_side_effects(guide):
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    return sites_of(trace, is_code)


def decoded(
    model: Program,
    codes: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
    moved: Collection[str] = (),
) -> tuple[Callable[[], Any], poutine.Trace]:
    """The model at these codes, bound to its arguments, and a trace of it.

    Raises:
        ValueError: If there is a code for what is no latent, or one of those ``moved`` lies
            outside the support.
    """
    program = partial(replay_values(model, codes), *args, **kwargs)
    trace = poutine.trace(_SupportMessenger(moved, where)(program)).get_trace()
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


class _CenterMessenger(Messenger):
    """Gives every latent the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg) and msg["value"] is None:
            fn = msg["fn"]
            msg["value"], msg["done"] = _center(fn, fn(*msg["args"], **msg["kwargs"])), True


def _center(fn: TorchDistribution, draw: torch.Tensor) -> torch.Tensor:
    """The mean, of a discrete distribution the mode; the draw where that does not exist."""
    fn = unmasked(fn)
    try:
        center: torch.Tensor = fn.mode if _is_discrete(fn) else fn.mean
    except NotImplementedError:
        return draw
    return center.where(center.isfinite(), draw)


def _is_discrete(fn: TorchDistribution) -> bool:
    return bool(getattr(support_of(fn), "is_discrete", False))


class _SupportMessenger(Messenger):
    """Raises where codes lie outside the support, before the model computes with them."""

    def __init__(self, names: Collection[str], where: str) -> None:
        super().__init__()
        self._names, self._where = names, where

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self._names or not is_latent(msg):
            return
        support = support_of(fn)
        if support is not None and not support.check(msg["value"]).all():
            raise ValueError(
                f"{self._where}: expected codes in the support of site '{name}', {support}, got "
                "some outside it. Stay inside, on a linear path between codes for instance, or "
                "give the model a latent over all real numbers and transform it there."
            )
