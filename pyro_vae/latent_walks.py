"""Walks through the latent space that start from data: between codes, and along coordinates."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.checks import refuse_subsampling, support_of
from pyro_vae.isolation import without_side_effects
from pyro_vae.latent_paths import great_circle
from pyro_vae.latent_sites import Program, choose, code_sites, decoded, expected
from pyro_vae.traces import is_observed, sites_of

__all__ = ["codes_at", "interpolate", "mean_at", "mean_of", "numbers", "traverse"]


def interpolate(
    model: Program,
    guide: Program,
    start: torch.Tensor,
    end: torch.Tensor,
    *args: Any,
    num_steps: int = 8,
    path: Literal["linear", "spherical"] = "linear",
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Data along paths between the codes of two batches.

    Other latents stay at their codes of ``start``.

    Args:
        model: Any model.
        guide: Its guide.
        start: Batch ``(batch, *event)``.
        end: Batch of the same shape.
        *args: Further arguments of both programs, such as a class, the same at both ends.
        num_steps: Points on each path, both ends included.
        path: "linear", or "spherical": along a great circle, while the norm goes evenly from one
            to the other. Draws from N(0, I) in d dimensions have norms close to sqrt(d), and on a
            straight line between two of them the norm falls to about sqrt(d / 2).
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of both programs.

    Returns:
        Means of the data, ``(num_steps, batch, *event)``.

    Raises:
        ValueError: If the shapes differ or ``num_steps`` is below 2; if there is no such path, or
            it is spherical between opposite codes; if the guide has no such latent, or several and
            no ``site``, or if it is discrete; if the path leaves its support, as a spherical one
            does on a simplex; if not exactly one site is observed, or a plate draws its rows at
            random.

    References:
        Shoemake (1985), Animating rotation with quaternion curves.
        White (2016), Sampling generative networks, https://arxiv.org/abs/1609.04468
    """
    if start.shape != end.shape or num_steps < 2:
        raise ValueError(
            f"interpolate: expected two batches of one shape and num_steps >= 2, got "
            f"{tuple(start.shape)}, {tuple(end.shape)} and {num_steps}. Pair the rows up."
        )
    if path not in ("linear", "spherical"):
        raise ValueError(
            f"interpolate: expected path 'linear' or 'spherical', got {path!r}. A linear one is "
            "straight, a spherical one keeps the norm between those of its ends."
        )
    codes, name, fn = codes_at(guide, (start, *args), kwargs, site, "interpolate")
    first, last = codes[name], codes_at(guide, (end, *args), kwargs, name, "interpolate")[0][name]
    weights = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
    if path == "linear":
        points = torch.stack([first.lerp(last, w) for w in weights])
    else:
        a, b = (z.reshape(*z.shape[: z.dim() - fn.event_dim], -1) for z in (first, last))
        points = great_circle(a, b, weights).reshape(num_steps, *first.shape)
    moved = [{**codes, name: z} for z in points]
    return mean_at(model, moved, (start, *args), kwargs, "interpolate", name)


def traverse(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    dims: Sequence[int] | torch.Tensor | None = None,
    values: Sequence[float] | torch.Tensor = (-3, -2, -1, 0, 1, 2, 3),
    site: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Data as one coordinate of their code moves and the others, and other latents, stay.

    Args:
        model: Any model.
        guide: Its guide.
        x: One batch, ``(batch, *event)``.
        *args: Further arguments of both programs, such as a class.
        dims: Which coordinates; all by default.
        values: What each is set to, in units of a standard normal prior.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of both programs.

    Returns:
        Means of the data, ``(len(dims), len(values), batch, *event)``.

    Raises:
        TypeError: If a coordinate is no integer.
        ValueError: If there is no value or coordinate, or no such one; if the guide has no such
            latent, or several and no ``site``; if it is discrete, or has not one event dimension;
            if a code leaves the support; if not exactly one site is observed, or a plate draws
            its rows at random.
    """
    steps = numbers("traverse", "values", values)
    codes, name, fn = codes_at(guide, (x, *args), kwargs, site, "traverse")
    event_shape = tuple(fn.event_shape)
    if len(event_shape) != 1:
        raise ValueError(
            f"traverse: expected one event dimension at site '{name}', its coordinates, got event "
            f"shape {event_shape}. Declare it in model and guide, with .to_event(1) for instance."
        )
    code = codes[name]
    width, rows = code.shape[-1], []
    chosen = list(range(width)) if dims is None else [index(dim) for dim in dims]
    if not chosen or not all(-width <= dim < width for dim in chosen):
        raise ValueError(
            f"traverse: expected one or more dims in 0 ... {width - 1}, got {chosen}. "
            f"Site '{name}' has {width} coordinates; leave dims out for all."
        )
    for dim in chosen:
        at = torch.tensor([dim], device=code.device)
        moved = [{**codes, name: code.index_fill(-1, at, value)} for value in steps]
        rows.append(mean_at(model, moved, (x, *args), kwargs, "traverse", name))
    return torch.stack(rows)


def codes_at(
    guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], site: str | None, where: str
) -> tuple[dict[str, torch.Tensor], str, TorchDistribution]:
    """A code for every latent, and the name and distribution of the one that is to move.

    Args:
        guide: Any guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        site: Which latent is to move; ``None`` for the only one.
        where: The function that asks, for the messages.

    Raises:
        ValueError: If there is no such latent, or several and no ``site``; if it is discrete; if
            a plate draws its rows at random.
    """
    with refuse_subsampling(where):
        sites = code_sites(guide, args, kwargs)
    name = choose(sites, site, where)
    fn: TorchDistribution = sites[name]["fn"]
    if getattr(support_of(fn), "is_discrete", False):
        raise ValueError(
            f"{where}: expected a continuous latent at site '{name}', got {type(fn).__name__}, "
            "between whose values there is nothing. Decode each value with pyro_vae.latents.decode."
        )
    return {other: found["value"] for other, found in sites.items()}, name, fn


def mean_at(
    model: Program,
    points: Sequence[Mapping[str, torch.Tensor]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
    site: str,
) -> torch.Tensor:
    """Means of the only observed site at these codes, ``(len(points), batch, *event)``.

    Args:
        model: Any model.
        points: Codes of all latents, at each point.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        where: The function that asks, for the messages.
        site: The latent that moved, whose codes must be in its support.
    """
    means = []
    for codes in points:
        with without_side_effects(model), refuse_subsampling(where):
            means.append(mean_of(decoded(model, codes, args, kwargs, where, [site])[1], where))
    return torch.stack(means)


def numbers(where: str, name: str, values: Sequence[float] | torch.Tensor) -> list[float]:
    """The values of an argument, which has to be a list of one or more."""
    found = torch.as_tensor(values, dtype=torch.float64)
    if found.dim() != 1 or not len(found):
        raise ValueError(
            f"{where}: expected one or more {name}, a list or tensor in one dimension, got shape "
            f"{tuple(found.shape)}. Pass {name}=[-1, 0, 1], for instance."
        )
    result: list[float] = found.tolist()
    return result


def mean_of(trace: poutine.Trace, where: str) -> torch.Tensor:
    """Mean of the only observed site of a model, ``(batch, *event)``."""
    observed = sites_of(trace, is_observed)
    if len(observed) != 1:
        raise ValueError(
            f"{where}: expected a model with one observed site, got {list(observed)}. Hide the "
            "others, with pyro.poutine.block(model, hide=[...])."
        )
    return expected(next(iter(observed.values()))["fn"])
