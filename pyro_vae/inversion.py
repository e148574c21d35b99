"""In which order, and given what, a guide has to sample latents to miss no dependence."""

from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from typing import Any

from pyro.infer.inspect import get_dependencies

from pyro_vae.drawn_sites import moved_by
from pyro_vae.structure import Reading
from pyro_vae.traces import is_random, sites_of

__all__ = ["faithful_inverse", "model_parents"]


def model_parents(reading: Reading) -> dict[str, frozenset[str]]:
    """The latents that the distribution of each random site is computed from.

    Values are followed through a run by Pyro's ``get_dependencies``. Some operations stop or
    lose them, writing into another tensor for instance, so the latents are also changed one at a
    time, which shows in the distributions further on.

    Args:
        reading: Of two runs at least.

    Returns:
        By site, latent or observed, in the model's order, side effects being the caller's concern.
    """
    first, second = reading.traces[:2]
    structure = reading.structure
    latents = {*structure.local, *structure.shared, *structure.enumerated}
    names = list(sites_of(first, is_random))
    parents = {name: set[str]() for name in names}
    try:
        followed = get_dependencies(reading.program)["prior_dependencies"]
    except Exception:  # Not knowing: changing the values tells.
        followed = {}
    for name, others in followed.items():  # type: ignore[attr-defined]
        if name in parents:
            parents[name] |= set(others) & latents - {name}
    for place, name in enumerate(names):
        if name not in latents:
            continue
        among = [n for n in names[place + 1 :] if name not in parents[n]]
        value: dict[str, Any] = {name: second.nodes[name]["value"]}
        for child in moved_by(reading.program, first, value, among) if among else ():
            parents[child].add(name)
    return {name: frozenset(found) for name, found in parents.items()}


def faithful_inverse(
    parents: Mapping[str, Collection[str]],
    latents: Collection[str],
    *,
    summed_out: Collection[str] = (),
    given: Collection[str] = (),
    repeated: Mapping[str, int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The latents in the order in which a guide samples them, each with its parents there.

    Variable elimination is simulated on the moralised graph: a latent goes when those above it in
    the model are gone, among several the one that adds the fewest edges. What it then still
    touches are its parents in the guide, which samples in the reverse order. So the guide asserts
    no independence between latents that the model's posterior lacks; of values of one latent side
    by side in a plate nothing is said here. The data are parents of all.

    A latent that a row has many of, one for each word of a text, goes before those that it has
    one of: given these its values may be independent, which they are not once these are gone.

    Args:
        parents: By random site, latent or observed, the latents it depends on in the model.
        latents: Those that the guide samples, in the model's order.
        summed_out: Latents that it does not sample, eliminated first.
        given: Latents that it has sampled before, never eliminated.
        repeated: By latent, the number of plates around it beside that of the data; 0 by default.

    Example:
        >>> above = {"z3": (), "z2": ("z3",), "z1": ("z2",), "x": ("z1",)}
        >>> faithful_inverse(above, ["z3", "z2", "z1"])
        {'z1': (), 'z2': ('z1',), 'z3': ('z2',)}

    References:
        Webb et al. (2018), Faithful inversion of generative models for effective amortized
        inference, algorithm 1, from the top down, https://arxiv.org/abs/1712.00287. Its inverses
        have single observations as parents; here each latent has them all.
    """
    everything, depth = {*latents, *summed_out, *given}, repeated or {}
    touches: dict[str, set[str]] = {name: set() for name in everything}
    for name, above in parents.items():
        family = ({name, *above}) & everything
        _connect(touches, family)
    for name in summed_out:
        _eliminate(touches, name)
    left, inverse = list(latents), dict[str, set[str]]()
    while left:
        most = max(depth.get(name, 0) for name in left)
        inner = [name for name in left if depth.get(name, 0) == most]
        tops = [name for name in inner if not set(parents[name]) & set(inner)]
        name = min(tops, key=lambda top: _fill(touches, top))  # The first of equals.
        left.remove(name)
        inverse[name] = _eliminate(touches, name)
    order = [*given, *reversed(inverse)]
    return {name: tuple(sorted(inverse[name], key=order.index)) for name in reversed(inverse)}


def _connect(touches: dict[str, set[str]], names: Iterable[str]) -> None:
    for first, second in combinations(names, 2):
        touches[first].add(second)
        touches[second].add(first)


def _fill(touches: dict[str, set[str]], name: str) -> int:
    """How many edges eliminating a variable would add."""
    pairs = combinations(touches[name], 2)
    return sum(second not in touches[first] for first, second in pairs)


def _eliminate(touches: dict[str, set[str]], name: str) -> set[str]:
    """Takes a variable out, connects what it touched, and returns that."""
    neighbours = touches.pop(name)
    for other in neighbours:
        touches[other].discard(name)
    _connect(touches, neighbours)
    return neighbours
