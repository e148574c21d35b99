"""Into the latent space and back: encode, reconstruct, generate, and walks of several kinds.

All work on any Pyro program: codes go in by replaying them at the program's own latent site, so
the batch passed along, one that the program takes, only says how many rows there are.
"""

from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from typing import Any, TypeVar, overload

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.drawn_sites import DrawMessenger, moved_by
from pyro_vae.isolation import without_side_effects
from pyro_vae.latent_directions import attribute_vector, move
from pyro_vae.latent_sites import Program, choose, code_sites, decoded, expected, is_code
from pyro_vae.latent_walks import interpolate, traverse
from pyro_vae.random_walks import loop, walk
from pyro_vae.traces import Site, is_latent, is_observed, is_random, sites_of

__all__ = [
    "attribute_vector",
    "decode",
    "encode",
    "generate",
    "interpolate",
    "loop",
    "move",
    "reconstruct",
    "traverse",
    "walk",
]

Names = list[str] | tuple[str, ...] | Set[str]
"""Names of several sites (not one string, which is a collection of letters)."""
T = TypeVar("T")


def encode(guide: Program, *args: Any, site: str | None = None, **kwargs: Any) -> TorchDistribution:
    """The guide's distribution at a latent site, for every row of a batch.

    In a hierarchy a distribution may depend on the sample drawn at an earlier site; the codes of
    all other functions here are means given means.

    Args:
        guide: Any guide.
        *args: One batch.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of the guide.

    Returns:
        A distribution of batch shape ``(batch,)``; its ``mean`` is the code of each row.

    Raises:
        ValueError: If the guide has no latent of that name, or there is no ``site`` and not
            exactly one latent.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.nets import MLP
        >>> encode(AmortizedNormal(MLP(64, [16], 2 * 3)), torch.zeros(5, 64)).mean.shape
        torch.Size([5, 3])
    """
    with without_side_effects(guide):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    found = sites_of(trace, is_code)
    fn: TorchDistribution = found[choose(found, site, "encode")]["fn"]
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
        *args: A batch that the model takes, with as many rows as the codes; which values it has
            plays no role.
        site: Which site: observed, or drawn because the batch has no value for it. Needed unless
            exactly one is observed. Several names ask for a dict by site, from one run.
        **kwargs: Keyword arguments of the model.

    Returns:
        The distribution of the site, of batch shape ``(batch,)`` and the event shape of one
        datum; by site where several are asked for.

    Raises:
        ValueError: If the model has no latent or no site of that name, a site asked for is among
            the codes, or there is no ``site`` and not exactly one is observed; if a code lies
            outside the support of its latent.
    """
    with without_side_effects(model):
        _, trace = decoded(model, codes, args, kwargs, "decode", codes)
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
        sample: Whether the code of each latent is a sample, or the mean of its distribution (of
            classes the mode) where that exists, given those of the latents before it. The mean of
            a mixture may lie between its components.
        **kwargs: Keyword arguments of model and guide.

    Raises:
        ValueError: If a site asked for is not there, or there is no ``site`` and not exactly one
            is observed; if the model has not the latents of the guide.
    """
    found = code_sites(guide, args, kwargs, sample=sample)
    codes = {name: code["value"] for name, code in found.items()}
    with without_side_effects(model):
        program, trace = decoded(model, codes, args, kwargs, "reconstruct")
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
        *args: A batch that the model takes, such as zeros; its number of rows counts, which
            values it has for what is generated plays no role.
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


def _means(
    program: Callable[[], Any], trace: poutine.Trace, sites: Mapping[str, Site]
) -> dict[str, torch.Tensor]:
    """The mean of each site; its value where another of them depends on it."""
    result = {name: expected(site["fn"]) for name, site in sites.items()}
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
    return {(chosen := choose(names, name, where)): found[chosen] for name in asked}


def _one_or_all(found: dict[str, T], site: str | Names | None) -> T | dict[str, T]:
    """The value itself where one site was meant, else the dict."""
    return next(iter(found.values())) if site is None or isinstance(site, str) else found
