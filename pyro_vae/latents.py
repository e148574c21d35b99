"""Into the latent space and back: encode, reconstruct, generate, interpolate, traverse.

All work on any Pyro program: codes go in by replaying them at the program's own latent site, so
the batch passed along only says how many rows there are.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.handlers import replay_values
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import is_latent, is_observed, sites_of

__all__ = ["decode", "encode", "generate", "interpolate", "reconstruct", "traverse"]

Program = Callable[..., Any]


def encode(guide: Program, *args: Any, site: str | None = None, **kwargs: Any) -> TorchDistribution:
    """The guide's distribution at a latent site, for every row of a batch.

    In a hierarchy a distribution may depend on the sample drawn at an earlier site.

    Args:
        guide: Any guide.
        *args: One batch.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of the guide.

    Returns:
        A distribution of batch shape ``(batch,)``; its ``mean`` is the code of each row.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.nets import MLP
        >>> encode(AmortizedNormal(MLP(64, [16], 2 * 3)), torch.zeros(5, 64)).mean.shape
        torch.Size([5, 3])
    """
    with without_side_effects(guide):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    found: TorchDistribution = _one(trace, _is_code, site, "encode")["fn"]
    return found


def decode(
    model: Program,
    codes: dict[str, torch.Tensor],
    *args: Any,
    site: str | None = None,
    **kwargs: Any,
) -> TorchDistribution:
    """The model's distribution of the data at given codes.

    Args:
        model: Any model.
        codes: Latent values by site; latents left out are drawn from the model.
        *args: A batch with as many rows as the codes; its values play no role.
        site: Which observed site; needed where the model has several.
        **kwargs: Keyword arguments of the model.

    Raises:
        ValueError: If the model has no latent of that name, or several observed sites.
    """
    with without_side_effects(model):
        trace = poutine.trace(replay_values(model, codes)).get_trace(*args, **kwargs)
    unknown = set(codes) - set(sites_of(trace, is_latent))
    if unknown:
        raise ValueError(
            f"decode: expected codes for the latents {list(sites_of(trace, is_latent))}, got "
            f"'{min(unknown)}'. Use the site names of the model."
        )
    found: TorchDistribution = _one(trace, is_observed, site, "decode")["fn"]
    return found


def reconstruct(
    model: Program, guide: Program, *args: Any, site: str | None = None, **kwargs: Any
) -> torch.Tensor:
    """Mean of the data (of classes: the mode) given one code from the guide: ``(batch, *event)``.

    The code of each latent is the mean of its distribution where that exists, else a sample.
    """
    return _expected(decode(model, _codes(guide, *args, **kwargs), *args, site=site, **kwargs))


def generate(
    model: Program, *args: Any, mean: bool = True, site: str | None = None, **kwargs: Any
) -> torch.Tensor:
    """New data from the prior, as many rows as the batch passed: ``(batch, *event)``.

    Args:
        model: Any model.
        *args: A batch; its number of rows counts, its values play no role.
        mean: Whether to return the mean of each datum given its code, as is usual for pictures,
            or a sample with the likelihood's noise.
        site: Which observed site; needed where the model has several.
        **kwargs: Keyword arguments of the model.

    Example:
        >>> from pyro_vae.models import LinearGaussian
        >>> generate(LinearGaussian(data_dim=64, latent_dim=2), torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    with without_side_effects(model):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        fn = _one(trace, is_observed, site, "generate")["fn"]
        drawn: torch.Tensor = _expected(fn) if mean else fn.sample()
    return drawn


def interpolate(
    model: Program,
    guide: Program,
    start: torch.Tensor,
    end: torch.Tensor,
    *,
    num_steps: int = 8,
    site: str | None = None,
) -> torch.Tensor:
    """Data along straight lines between the codes of two batches.

    Other latents stay at their codes of ``start``.

    Args:
        model: A model of one batch.
        guide: Its guide.
        start: Batch ``(batch, *event)``.
        end: Batch of the same shape.
        num_steps: Points on each line, both ends included.
        site: Which latent; needed where the guide has several.

    Returns:
        Means of the data, ``(num_steps, batch, *event)``.

    Raises:
        ValueError: If the shapes differ or ``num_steps`` is below 2.
    """
    if start.shape != end.shape or num_steps < 2:
        raise ValueError(
            f"interpolate: expected two batches of one shape and num_steps >= 2, got "
            f"{tuple(start.shape)}, {tuple(end.shape)} and {num_steps}. Pair the rows up."
        )
    codes = _codes(guide, start)
    name = _choose(codes, site, "interpolate")
    first, last = codes[name], _codes(guide, end)[name]
    weights = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
    return torch.stack(
        [_expected(decode(model, {**codes, name: first.lerp(last, w)}, start)) for w in weights]
    )


def traverse(
    model: Program,
    guide: Program,
    x: torch.Tensor,
    *,
    dims: Sequence[int] | None = None,
    values: Sequence[float] | torch.Tensor = (-3, -2, -1, 0, 1, 2, 3),
    site: str | None = None,
) -> torch.Tensor:
    """Data as one coordinate of their code moves and the others, and other latents, stay.

    Args:
        model: A model of one batch.
        guide: Its guide.
        x: Batch ``(batch, *event)``.
        dims: Which coordinates; all by default.
        values: What each is set to, in units of a standard normal prior.
        site: Which latent; needed where the guide has several.

    Returns:
        Means of the data, ``(len(dims), len(values), batch, *event)``.
    """
    codes = _codes(guide, x)
    name = _choose(codes, site, "traverse")
    code = codes[name]
    width, rows = code.shape[-1], []
    if not all(-width <= dim < width for dim in dims or ()):
        raise ValueError(
            f"traverse: expected dims in 0 ... {width - 1}, got {list(dims or ())}. "
            f"Site '{name}' has {width} coordinates."
        )
    for dim in range(width) if dims is None else dims:
        moved = [
            code.index_fill(-1, torch.tensor([dim], device=code.device), float(v)) for v in values
        ]
        rows.append(torch.stack([_expected(decode(model, {**codes, name: z}, x)) for z in moved]))
    return torch.stack(rows)


def _is_code(site: Any) -> bool:
    """Whether a guide's site is a latent of the model, not an auxiliary one behind it."""
    return is_latent(site) and not site["infer"].get("is_auxiliary", False)


def _codes(guide: Program, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A code for every latent of the guide."""
    with without_side_effects(guide):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {name: _center(s["fn"], s["value"]) for name, s in sites_of(trace, _is_code).items()}


def _one(trace: poutine.Trace, kind: Callable[[Any], bool], site: str | None, where: str) -> Any:
    """The site of that kind and name, or the only one."""
    found = sites_of(trace, kind)
    return found[_choose(found, site, where)]


def _choose(names: Collection[str], site: str | None, where: str) -> str:
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


def _expected(fn: TorchDistribution) -> torch.Tensor:
    """The mean of the data; the mode of classes, which have none; a sample where it is unknown."""
    try:
        mean: torch.Tensor = fn.mean
    except NotImplementedError:
        return fn.sample()
    return fn.mode if mean.isnan().any() else mean


def _center(fn: TorchDistribution, value: torch.Tensor) -> torch.Tensor:
    """The mean of a continuous distribution that knows it, else the sample."""
    if getattr(fn.support, "is_discrete", False):
        return value
    try:
        return fn.mean
    except NotImplementedError:
        return value
