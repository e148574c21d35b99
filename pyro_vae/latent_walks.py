"""Walks through the latent space: lines between codes, and one coordinate at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.checks import support_of
from pyro_vae.isolation import without_side_effects
from pyro_vae.latent_sites import Program, choose, codes_of, decoded, expected
from pyro_vae.traces import is_observed, sites_of

__all__ = ["interpolate", "traverse"]


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
        ValueError: If the shapes differ or ``num_steps`` is below 2; if the guide has no such
            latent, or several and no ``site``, or if it is discrete; if not exactly one site is
            observed.
    """
    if start.shape != end.shape or num_steps < 2:
        raise ValueError(
            f"interpolate: expected two batches of one shape and num_steps >= 2, got "
            f"{tuple(start.shape)}, {tuple(end.shape)} and {num_steps}. Pair the rows up."
        )
    codes = codes_of(guide, (start,))
    name = choose(codes, site, "interpolate")
    _posterior(guide, start, name, "interpolate")
    first, last = codes[name], codes_of(guide, (end,))[name]
    weights = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
    line = [{**codes, name: first.lerp(last, w)} for w in weights]
    return torch.stack([_mean(model, point, start, "interpolate") for point in line])


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

    Raises:
        ValueError: If a coordinate is not there; if the guide has no such latent, or several and
            no ``site``; if it is discrete, or has not one event dimension; if not exactly one
            site is observed.
    """
    codes = codes_of(guide, (x,))
    name = choose(codes, site, "traverse")
    event_shape = tuple(_posterior(guide, x, name, "traverse").event_shape)
    if len(event_shape) != 1:
        raise ValueError(
            f"traverse: expected one event dimension at site '{name}', its coordinates, got event "
            f"shape {event_shape}. Declare it in model and guide, with .to_event(1) for instance."
        )
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
        rows.append(torch.stack([_mean(model, {**codes, name: z}, x, "traverse") for z in moved]))
    return torch.stack(rows)


def _posterior(guide: Program, x: torch.Tensor, name: str, where: str) -> TorchDistribution:
    """The guide's distribution at a site, along which one can walk."""
    with without_side_effects(guide):
        site: Any = poutine.trace(guide).get_trace(x).nodes[name]
    fn: TorchDistribution = site["fn"]
    if getattr(support_of(fn), "is_discrete", False):
        raise ValueError(
            f"{where}: expected a continuous latent at site '{name}', got {type(fn).__name__}, "
            "between whose values there is nothing. Decode each value with pyro_vae.latents.decode."
        )
    return fn


def _mean(
    model: Program, codes: Mapping[str, torch.Tensor], x: torch.Tensor, where: str
) -> torch.Tensor:
    """Mean of the only observed site at these codes, ``(batch, *event)``."""
    with without_side_effects(model):
        _, trace = decoded(model, codes, (x,), {}, where)
    observed = sites_of(trace, is_observed)
    if len(observed) != 1:
        raise ValueError(
            f"{where}: expected a model with one observed site, got {list(observed)}. Decode the "
            "points yourself, with pyro_vae.latents.decode(model, codes, x, site=...)."
        )
    return expected(next(iter(observed.values()))["fn"])
