"""Messages for models whose structure a guide cannot be made for."""

from collections.abc import Mapping
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from torch.distributions import TransformedDistribution, VonMises, constraints
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from pyro_vae.checks import support_of, support_of_numbers
from pyro_vae.traces import Plate, Site, frames, is_point_mass, mask_of, masks_elements

__all__ = [
    "check_batch_shape",
    "check_can_amortize",
    "check_same_structure",
    "check_shared",
    "check_whole",
    "choose_plate",
    "is_real",
    "plain_support",
    "raise_per_row",
    "raise_without_bijection",
]


def choose_plate(
    latents: Mapping[str, Site], observed: Mapping[str, Site], plate: str | None, where: str
) -> Plate:
    """The plate over the data: around latents and observed sites, and around all that others hold.

    Args:
        latents: The latents of one run.
        observed: The observed sites.
        plate: Its name, where the user has chosen one.
        where: Who asks, for the messages.

    Raises:
        ValueError: If there is none, or none that holds all that the others hold.
    """
    if not latents:
        raise ValueError(
            f"{where}: expected a model with latents, got none. A latent is a pyro.sample "
            "without obs=."
        )
    if not observed:
        raise ValueError(
            f"{where}: expected the model to observe data, got no observed site. "
            "Pass obs=x to pyro.sample, or use pyro.poutine.condition."
        )
    around = {name: frames(site) for name, site in {**latents, **observed}.items()}
    held = [frozenset[Plate]().union(*(around[n] for n in kind)) for kind in (latents, observed)]
    candidates = held[0] & held[1]
    if not candidates:
        raise ValueError(
            f"{where}: expected a vectorised plate around data and latents, got none around both "
            f"of latents {list(latents)} and observed sites {list(observed)}. Put them in `with "
            "pyro.plate('data', len(x)):`; for latents that all data share use Pyro's autoguides."
        )
    inside = {p: {name for name, plates in around.items() if p in plates} for p in candidates}
    names = sorted(p.name for p in candidates)
    found = [p for p in candidates if p.name == plate]
    if plate is None:
        everything = set[str]().union(*inside.values())
        found = [p for p, sites in inside.items() if sites == everything]
        # Of plates that hold the same observations, the one with more latents.
    if len(found) != 1:
        given = f"got plate='{plate}'" if plate is not None else "got several"
        raise ValueError(
            f"{where}: expected one plate over the data among {names}, {given}. Name the plate "
            f"whose rows the encoder encodes, plate='{names[0]}' for instance."
        )
    if found[0].size < 0:
        raise ValueError(
            f"{where}: expected a plate with a size, got '{found[0].name}' without. "
            f"Write pyro.plate('{found[0].name}', len(x))."
        )
    return found[0]


def check_can_amortize(site: Site, where: str) -> None:
    """Raises for a latent that no density over real numbers can stand for."""
    name, fn = site["name"], site["fn"]
    if is_point_mass(fn):
        raise ValueError(
            f"{where}: expected latents with a density, got a point mass (Delta) at site '{name}'. "
            f"Use pyro.deterministic('{name}', value) for what follows from other latents."
        )
    try:
        discrete = fn.support.is_discrete
    except NotImplementedError as err:
        raise ValueError(
            f"{where}: expected latents with a known support, got {type(fn).__name__} without one "
            f"at site '{name}'. Give its class a property `support`."
        ) from err
    if discrete and not fn.has_enumerate_support:
        raise ValueError(
            f"{where}: expected continuous latents, or discrete ones that can be summed out, got "
            f"{type(fn).__name__} with infinitely many values, or no list of them, at site "
            f"'{name}'. Integrate it out by hand, or put a continuous latent in its place."
        )
    if discrete and site["infer"].get("enumerate") != "parallel":
        raise ValueError(
            f"{where}: expected discrete latents to be summed out, got site '{name}' without "
            "that. Pass infer={'enumerate': 'parallel'} to its pyro.sample, or wrap the model "
            "in pyro.infer.config_enumerate, and train with TraceEnum_ELBO."
        )
    parts = _parts(fn)
    circular = [part for part in parts if isinstance(part, VonMises | dist.SineBivariateVonMises)]
    if circular:
        # Beyond a turn the density starts again: a bound over the reals would exceed log p(x).
        raise ValueError(
            f"{where}: expected latents with a density on their whole support, got angles with "
            f"the periodic density of {type(circular[0]).__name__}, which does not integrate to "
            f"one over the reals, at site '{name}'. Sample a pair of normals and take its angle "
            "with torch.atan2, or write a guide with dist.VonMises by hand."
        )
    for part in parts:
        if isinstance(part, TransformedDistribution) and _claims_too_much(part):
            base = type(part.base_dist).__name__
            raise ValueError(
                f"{where}: expected latents that know their support, got {part.support} at site "
                f"'{name}', of a TransformedDistribution whose transforms are said to start from "
                f"the reals, though its base has support {part.base_dist.support} ({base}). "
                "Transform the value instead of the distribution, or give a subclass of it the "
                "property `support`."
            )
    if masks_elements(site):
        raise ValueError(
            f"{where}: expected a mask over whole values of site '{name}', got one over the "
            "elements of its events. Use pyro.poutine.mask, or make the elements a plate."
        )


def is_real(support: Any) -> bool:
    """Whether a support holds all real numbers."""
    return isinstance(support_of_numbers(support), type(constraints.real))


def plain_support(support: Any) -> Any:
    """A support that mixtures share with their components, where these have one of them all."""
    if isinstance(support, constraints.independent):
        base = plain_support(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    if not isinstance(support, MixtureSameFamilyConstraint):
        return support
    base = plain_support(support.base_constraint)
    return support if _has_tensors(base) else base


def _has_tensors(support: Constraint) -> bool:
    """Whether the numbers of a support have dimensions, such as that of components."""
    values = vars(support).values()
    return any(
        _has_tensors(value)
        if isinstance(value, Constraint)
        else isinstance(value, torch.Tensor) and value.dim() > 0
        for value in values
    )


def _parts(fn: Any) -> list[Any]:
    """A distribution, and those that it is made of."""
    names = ("base_dist", "component_distribution", "component0", "component1")
    inner = [getattr(fn, name) for name in names if getattr(fn, name, None) is not None]
    return [fn, *(part for one in inner for part in _parts(one))]


def _claims_too_much(fn: TransformedDistribution) -> bool:
    """Whether transforms of all reals are applied to a part of them, and their codomain named."""
    if type(fn).support is not TransformedDistribution.support:
        return False  # A class of its own, which knows.
    support: Any = support_of(fn.base_dist)
    for transform in fn.transforms:
        if is_real(transform.domain) and not (support is None or is_real(support)):
            return True
        support = transform.codomain
    return False


def check_batch_shape(site: Site, where: str) -> None:
    """Raises unless every batch dimension of a latent belongs to a plate."""
    plated, shape = {plate.dim for plate in frames(site)}, tuple(site["fn"].batch_shape)
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in plated:
            raise ValueError(
                f"{where}: expected every batch dimension of site '{site['name']}' to be a plate, "
                f"got batch shape {shape} where dimension {dim} has no plate. Was `.to_event(1)` "
                "forgotten? It declares the dimensions of one value."
            )


def check_shared(site: Site, where: str) -> None:
    """Raises for a mask on a latent outside the data plate, which no autoguide has."""
    if mask_of(site) is not None:
        raise ValueError(
            f"{where}: expected latents outside the data plate without a mask, got one on site "
            f"'{site['name']}'. Put pyro.poutine.mask around the sites of the data plate alone."
        )


def check_whole(site: Site, plate: Plate, rows: str, where: str) -> None:
    """Raises where a plate within a datum, or across the data, is a subsample."""
    if rows != "all":
        raise ValueError(
            f"{where}: expected subsampling in the plate over the data alone, got some in plate "
            f"'{plate.name}' around site '{site['name']}'. Write pyro.plate('{plate.name}', "
            f"{plate.full_size})."
        )


def raise_per_row(name: str, support: Any, where: str) -> NoReturn:
    """For a support that depends on the row."""
    raise ValueError(
        f"{where}: expected site '{name}' to have the same support in all rows, got {support}. "
        "Sample it on a fixed range, (0, 1) for instance, and scale it afterwards."
    )


def raise_without_bijection(name: str, support: Any, where: str, err: Exception) -> NoReturn:
    """For a support that real numbers cannot be mapped to."""
    raise ValueError(
        f"{where}: expected a support that torch.distributions.biject_to knows, got {support} at "
        f"site '{name}'. Write the latent as a function of one with such a support, or register "
        "a bijection with torch.distributions.biject_to.register."
    ) from err


def check_same_structure(first: Any, other: Any, where: str, *, among: str = "runs") -> None:
    """Raises where two readings of a model differ in more than the rows of its data plate.

    Args:
        first: A ``ModelStructure``.
        other: Another one.
        where: Who asks, for the messages.
        among: Of what they were read: "runs" with other random numbers, or calls with other
            "arguments".
    """
    fix = {
        "runs": "Which sites there are may not hang on random values: mask those that do not "
        "count, or make a guide for each case.",
        "arguments": "Make one guide for each kind of arguments.",
    }[among]
    for kind in ("local", "shared", "observed", "enumerated"):
        before, after = set(getattr(first, kind)), set(getattr(other, kind))
        if before != after:
            names = " and ".join(str(sorted(sites)) for sites in (before, after))
            what = {
                "local": "latents of the data plate",
                "shared": "latents outside the data plate",
            }
            raise ValueError(
                f"{where}: expected the same {what.get(kind, f'{kind} sites')} in all {among}, got "
                f"{names}. {fix}"
            )
    if (first.data.name, first.data.dim) != (other.data.name, other.data.dim):
        plates = [f"'{s.data.name}' at dimension {s.data.dim}" for s in (first, other)]
        raise ValueError(
            f"{where}: expected the same plate over the data in all {among}, got {plates[0]} and "
            f"{plates[1]}. {fix}"
        )
    for kind in ("local", "shared"):
        for name, site in getattr(first, kind).items():
            _check_same_site(site, getattr(other, kind)[name], first.data.name, where, among, fix)


def _check_same_site(first: Any, other: Any, data: str, where: str, among: str, fix: str) -> None:
    name = first.name
    plates = [{p for p in site.plates if p.name != data} for site in (first, other)]
    if plates[0] != plates[1]:
        sizes = [{p.name: p.size for p in sorted(some)} for some in plates]
        raise ValueError(
            f"{where}: expected the same plates around site '{name}' in all {among}, got sizes "
            f"{sizes[0]} and {sizes[1]}. Only the plate over the data may change its size: pad "
            "the others, and mask what is not there."
        )
    if first.event_shape != other.event_shape:
        raise ValueError(
            f"{where}: expected site '{name}' of the same event shape in all {among}, got "
            f"{tuple(first.event_shape)} and {tuple(other.event_shape)}. {fix}"
        )
    if not _same_support(first.support, other.support):
        raise ValueError(
            f"{where}: expected site '{name}' to have one support, got {first.support} and "
            f"{other.support} in two {among}. Sample it on a fixed range and transform it: "
            "u * z with u ~ Uniform(0, 1) instead of Uniform(0, z)."
        )
    if first.masked != other.masked:
        raise ValueError(
            f"{where}: expected site '{name}' to be masked in all {among} or in none, got both. "
            "Pass a mask that is true everywhere where nothing is hidden."
        )


def _same_support(first: Any, other: Any) -> bool:
    """Whether two constraints are of the same kind and have the same numbers."""
    if type(first) is not type(other):
        return False
    if isinstance(first, torch.Tensor):
        return first.shape == other.shape and bool((first == other).all())
    if isinstance(first, Constraint):
        one, two = vars(first), vars(other)
        return one.keys() == two.keys() and all(_same_support(one[k], two[k]) for k in one)
    if isinstance(first, list | tuple):
        pairs = zip(first, other, strict=False)
        return len(first) == len(other) and all(_same_support(a, b) for a, b in pairs)
    return bool(first == other)
