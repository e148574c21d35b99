"""Which subsets of the modalities count, in which rows, and how much."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from pyro.distributions.util import is_validation_enabled

from pyro_vae.modalities import Observed

__all__ = [
    "MOST_SUBSETS",
    "Subset",
    "SubsetWishes",
    "check_choice",
    "checked_subsets",
    "rows_and_weight",
    "subsets_of",
]

_MOST_ENUMERATED = 10

MOST_SUBSETS = 2**_MOST_ENUMERATED
"""More than "all" subsets can be: so many are worth a memory."""

_KINDS = ("joint+single", "single", "all")

SubsetWishes = str | tuple[frozenset[str], ...]
"""One of the kinds, or subsets that were listed."""


@dataclass(frozen=True)
class Subset:
    """Modalities that the guide sees.

    Attributes:
        names: Those of them that the batch holds.
        whole: Whether it counts only in rows that hold all of it, or stands for what is left.
        trains: Whether it is a term of the training loss.
        reports: Whether it is a term of the reported loss.
    """

    names: tuple[str, ...]
    whole: bool = True
    trains: bool = True
    reports: bool = False

    def rows(self, seen: Observed) -> torch.Tensor:
        """Where it counts, bool, ``(batch,)``."""
        masks = torch.stack([seen.mask(name) for name in self.names])
        return masks.all(0) if self.whole else masks.any(0)


def subsets_of(
    where: str, wanted: SubsetWishes, seen: Observed, *, average: bool, num_random: int
) -> list[Subset]:
    """The subsets of a batch, without those of which nothing is observed.

    Args:
        where: Who asks, for the messages.
        wanted: Which subsets.
        seen: What is observed.
        average: Whether bounds of everything are averaged over subsets that are observed as a
            whole. Else bounds of subsets are added, and the joint one is reported, the first.
        num_random: How many others are drawn.

    Raises:
        ValueError: If a listed modality is unknown, or if there are too many to enumerate.
    """
    observed = tuple(seen.values)
    if isinstance(wanted, str):
        found = _named_subsets(where, wanted, observed, whole=average, num_random=num_random)
    else:
        _check_known(where, wanted, seen)
        listed = [(tuple(n for n in observed if n in names), len(names)) for names in wanted]
        found = [
            Subset(names, whole=average)
            for names, size in listed
            if names and (len(names) == size or not average)
        ]
    if average:
        return [replace(subset, reports=True) for subset in found]
    # The joint bound is reported, once, whether or not it is a term of the sum.
    same = (s for s in found if s.names == observed and not (s.whole and _has_masks(seen)))
    first = next(same, None)
    others = [s for s in found if s is not first]
    joint = first or Subset(observed, whole=False, trains=False)
    return [replace(joint, reports=True), *others] if observed else []


def _named_subsets(
    where: str, wanted: str, observed: tuple[str, ...], *, whole: bool, num_random: int
) -> list[Subset]:
    num = len(observed)
    if wanted == "all":
        if num > _MOST_ENUMERATED:
            raise ValueError(
                f"{where}: expected at most {_MOST_ENUMERATED} modalities for subsets='all', got "
                f"{num}, which have {2**num - 1:,}. Draw some of them, subsets='joint+single' "
                "with num_random=20, or list them."
            )
        sizes = range(num, 0, -1)
        return [Subset(names) for size in sizes for names in combinations(observed, size)]
    single = [Subset((name,)) for name in observed]
    if wanted == "single":
        return single
    joint = [Subset(observed, whole=False)] if observed else []
    drawn = _draw_subsets(observed, num_random)
    return [*joint, *single, *(Subset(names, whole=whole) for names in drawn)]


def _draw_subsets(names: tuple[str, ...], num: int) -> list[tuple[str, ...]]:
    """Different subsets, of more than one modality and not all, or all there are of these."""
    num = min(num, 2 ** len(names) - len(names) - 2)
    found: dict[tuple[str, ...], None] = {}
    while len(found) < num:
        members = (torch.rand(len(names)) < 0.5).tolist()
        drawn = tuple(name for name, member in zip(names, members, strict=True) if member)
        if 1 < len(drawn) < len(names):
            found[drawn] = None
    return list(found)


def rows_and_weight(
    where: str, subsets: Sequence[Subset], seen: Observed, *, average: bool
) -> tuple[list[torch.Tensor | None], float | torch.Tensor]:
    """In which rows each subset counts, and how much any of them counts there.

    Args:
        where: Who asks, for the messages.
        subsets: The subsets.
        seen: What is observed.
        average: Whether to average over the subsets, or to add them up.

    Returns:
        For each subset bool, ``(batch,)``, or ``None`` for all rows; a number for all rows, or
        ``(batch,)``.

    Raises:
        ValueError: If a row with data would have no part in the average. Of masks only where
            Pyro validates, because it waits for the device.
    """
    if not _has_masks(seen):
        if average and seen.values and not subsets:
            _raise_not_covered(where, seen.num_rows)
        return [None] * len(subsets), 1 / len(subsets) if average and subsets else 1.0
    rows = [subset.rows(seen) for subset in subsets]
    if not average:
        return [*rows], 1.0
    nothing = torch.zeros(seen.num_rows, dtype=torch.bool, device=seen.device)
    count = torch.stack([nothing, *rows]).sum(0)
    if is_validation_enabled():
        anything = torch.stack([seen.mask(name) for name in seen.values]).any(0)
        if missed := int((anything & (count == 0)).sum()):
            _raise_not_covered(where, missed)
    return [*rows], 1 / count.clamp(min=1).to(_dtype_of(seen))


def _has_masks(seen: Observed) -> bool:
    return any(mask is not None for mask in seen.masks.values())


def _dtype_of(seen: Observed) -> torch.dtype:
    dtypes = (value.dtype for value in seen.values.values() if value.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _raise_not_covered(where: str, num_rows: int) -> None:
    raise ValueError(
        f"{where}: expected for each row with data a subset that is observed as a whole, got none "
        f"for {num_rows} rows, for which there would be no bound. Add each modality alone to "
        "subsets."
    )


def _check_known(where: str, wanted: tuple[frozenset[str], ...], seen: Observed) -> None:
    known = [*seen.values, *seen.unknown]
    for name in (name for names in wanted for name in names):
        if name not in known:
            raise ValueError(
                f"{where}: expected modalities among {known} in subsets, got {name!r}. Use the "
                "keys of the batch, where None stands for a modality that this batch lacks."
            )


def check_choice(where: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{where}: expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}. "
            f"Leave it out for {choices[0]!r}."
        )


def checked_subsets(where: str, subsets: Any) -> SubsetWishes:
    """What was asked for, where it may be; listed subsets as sets."""
    if isinstance(subsets, str):
        check_choice(where, "subsets", subsets, _KINDS)
        return subsets
    if not isinstance(subsets, Sequence) or any(
        isinstance(names, str) or not isinstance(names, Collection) for names in subsets
    ):
        raise TypeError(
            f"{where}: expected subsets to be one of {list(_KINDS)} or a list of tuples of names, "
            f"got {subsets!r}. Write [('image',), ('image', 'label')]."
        )
    listed = tuple(map(frozenset, subsets))
    if not listed or not all(listed) or len(set(listed)) < len(listed):
        raise ValueError(
            f"{where}: expected different subsets with at least one modality each, got "
            f"{list(subsets)}. Name each subset once."
        )
    return listed
