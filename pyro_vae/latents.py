"""Into the latent space and back: encode, reconstruct, generate, interpolate, traverse.

All work on any Pyro program: codes go in by replaying them at the program's own latent site, so
the batch passed along only says how many rows there are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeVar, overload

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.drawn_sites import DrawMessenger, moved_by, unmasked
from pyro_vae.handlers import replay_values
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import Site, is_latent, is_observed, is_random, sites_of

__all__ = ["decode", "encode", "generate", "interpolate", "reconstruct", "traverse"]

Program = Callable[..., Any]
Names = list[str] | tuple[str, ...] | Set[str]
"""Names of several sites (not one string, which is a collection of letters)."""
T = TypeVar("T")


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
    found = sites_of(trace, _is_code)
    fn: TorchDistribution = found[_choose(found, site, "encode")]["fn"]
    return fn


@overload
def decode(
    model: Program,
    codes: Mapping[str, torch.Tensor],
    *args: Any,
    site: str | None = None,
    **kwargs: Any,
) -> TorchDistribution: ...


@overload
def decode(
    model: Program, codes: Mapping[str, torch.Tensor], *args: Any, site: Names, **kwargs: Any
) -> dict[str, TorchDistribution]: ...


def decode(
    model: Program,
    codes: Mapping[str, torch.Tensor],
    *args: Any,
    site: str | Names | None = None,
    **kwargs: Any,
) -> TorchDistribution | dict[str, TorchDistribution]:
    """The model's distribution of the data at given codes.

    Args:
        model: Any model.
        codes: Latent values by site; latents left out are drawn from the model.
        *args: A batch with as many rows as the codes; its values play no role.
        site: Which site: observed, or drawn because the batch has no value for it. Needed unless
            exactly one is observed. Several names ask for a dict by site, from one run.
        **kwargs: Keyword arguments of the model.

    Raises:
        ValueError: If the model has no latent or no site of that name, a site asked for is among
            the codes, or there is no ``site`` and not exactly one is observed.
    """
    with without_side_effects(model):
        _, trace = _decoded(model, codes, args, kwargs, "decode")
    sites = _data_sites(trace, site, "decode", codes)
    return _one_or_all({name: found["fn"] for name, found in sites.items()}, site)


@overload
def reconstruct(
    model: Program,
    guide: Program,
    *args: Any,
    site: str | None = None,
    sample: bool = False,
    **kwargs: Any,
) -> torch.Tensor: ...


@overload
def reconstruct(
    model: Program, guide: Program, *args: Any, site: Names, sample: bool = False, **kwargs: Any
) -> dict[str, torch.Tensor]: ...


def reconstruct(
    model: Program,
    guide: Program,
    *args: Any,
    site: str | Names | None = None,
    sample: bool = False,
    **kwargs: Any,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Mean of the data (of classes: the mode) given one code from the guide: ``(batch, *event)``.

    A site without a value in the batch comes from the model at the codes that the guide makes of
    the rest: from one modality to another, ``reconstruct(model, guide, {"image": x, "label":
    None}, site="x_label")``. Values that depend on such a site do not act back on it; where
    another of the sites asked for depends on it, its result is the value drawn.

    Args:
        model: Any model.
        guide: Its guide.
        *args: One batch.
        site: Which site: observed, or drawn because the batch has no value for it. Needed unless
            exactly one is observed. Several names ask for a dict by site, from one run.
        sample: Whether the code of each latent is a sample, or the mean of its distribution where
            that exists. The mean of a mixture may lie between its components.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        ValueError: As for ``decode``.
    """
    codes = _codes(guide, args, kwargs, sample=sample)
    with without_side_effects(model):
        program, trace = _decoded(model, codes, args, kwargs, "reconstruct")
        sites = _data_sites(trace, site, "reconstruct", codes)
        return _one_or_all(_means(program, trace, sites), site)


@overload
def generate(
    model: Program, *args: Any, mean: bool = True, site: str | None = None, **kwargs: Any
) -> torch.Tensor: ...


@overload
def generate(
    model: Program, *args: Any, mean: bool = True, site: Names, **kwargs: Any
) -> dict[str, torch.Tensor]: ...


def generate(
    model: Program,
    *args: Any,
    mean: bool = True,
    site: str | Names | None = None,
    **kwargs: Any,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """New data from the prior, as many rows as the batch passed: ``(batch, *event)``.

    Args:
        model: Any model.
        *args: A batch; its number of rows counts, the values of what is generated play no role.
        mean: Whether to return the mean of each datum given its code (of classes the mode), as is
            usual for pictures, or a sample with the likelihood's noise.
        site: Which site: observed, or drawn because the batch has no value for it. Needed unless
            exactly one is observed. Several names ask for a dict by site: all from one run, with
            the same latents. Where one of them depends on another, as a picture may on its class,
            the other's result is the very value drawn.
        **kwargs: Keyword arguments of the model.

    Raises:
        ValueError: If the model has no such site, or there is no ``site`` and not exactly one is
            observed.

    Example:
        >>> from pyro_vae.models import LinearGaussian
        >>> generate(LinearGaussian(data_dim=64, latent_dim=2), torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    several = () if site is None or isinstance(site, str) else site
    program = partial(DrawMessenger(several)(model), *args, **kwargs)
    with without_side_effects(model):
        trace = poutine.trace(program).get_trace()
        sites = _data_sites(trace, site, "generate")
        if mean:
            return _one_or_all(_means(program, trace, sites), site)
        drawn = {n: s["value"] if is_latent(s) else s["fn"].sample() for n, s in sites.items()}
    return _one_or_all(drawn, site)


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
    codes = _codes(guide, (start,))
    name = _choose(codes, site, "interpolate")
    first, last = codes[name], _codes(guide, (end,))[name]
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
    codes = _codes(guide, (x,))
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


def _codes(
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
        for name, site in sites_of(trace, _is_code).items()
    }


def _decoded(
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


def _means(
    program: Callable[[], Any], trace: poutine.Trace, sites: Mapping[str, Site]
) -> dict[str, torch.Tensor]:
    """The mean of each site; its value where another of them depends on it."""
    result = {name: _expected(site["fn"]) for name, site in sites.items()}
    drawn = {name: result[name] for name, site in sites.items() if is_latent(site)}
    if len(sites) > 1 and drawn and moved_by(program, trace, drawn, sites):
        for name, mean in drawn.items():
            if moved_by(program, trace, {name: mean}, sites):
                result[name] = sites[name]["value"]
    return result


def _data_sites(
    trace: poutine.Trace, site: str | Names | None, where: str, codes: Collection[str] = ()
) -> dict[str, Site]:
    """The sites asked for, of those that are observed or drawn; or the only observed one."""
    found = sites_of(trace, is_observed if site is None else is_random)
    names = [name for name in found if name not in codes]
    asked = [site] if site is None or isinstance(site, str) else site
    return {(chosen := _choose(names, name, where)): found[chosen] for name in asked}


def _one_or_all(found: dict[str, T], site: str | Names | None) -> T | dict[str, T]:
    """The value itself where one site was meant, else the dict."""
    return next(iter(found.values())) if site is None or isinstance(site, str) else found


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
    fn = unmasked(fn)
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
