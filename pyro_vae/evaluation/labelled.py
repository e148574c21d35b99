"""A labelled batch of several modalities: its checks, subsets of it, rates of being right."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from pyro_vae.modalities import Batch, Present, observed_of

__all__ = ["LabelledBatch", "Rate", "check_names", "subsets_of", "table"]

_MOST_MODALITIES = 4


@dataclass(frozen=True)
class Rate:
    """A fraction of rows, and how far another sample of rows would move it.

    Attributes:
        value: In 0 ... 1; NaN if there are no rows.
        standard_error: Over the rows; for one outcome a row that of a binomial,
            sqrt(p (1 - p) / n). It is 0 where all rows agree, and NaN for fewer than two rows.
        num_rows: n.
    """

    value: float
    standard_error: float
    num_rows: int

    @classmethod
    def of(cls, outcomes: torch.Tensor) -> "Rate":
        """From one outcome in 0 ... 1 for each row, ``(rows,)``."""
        outcomes = outcomes.to("cpu", torch.float64)
        num = len(outcomes)
        error = float(outcomes.std(correction=0)) / num**0.5 if num > 1 else math.nan
        return cls(float(outcomes.mean()) if num else math.nan, error, num)

    def cells(self) -> tuple[str, str, str]:
        """The three numbers for a table."""
        return f"{self.value:.3f}", f"{self.standard_error:.3f}", str(self.num_rows)


class LabelledBatch:
    """A batch of modalities with labels, checked.

    Args:
        where: The function that asks, for the messages.
        batch: Data ``(batch, *event)`` by modality.
        labels: Classes 0, 1, ..., integers of shape ``(batch,)``.
        present: bool ``(batch,)`` by modality; one without a key is present in all rows.

    Raises:
        TypeError: If something is of the wrong type.
        ValueError: If there are fewer than two modalities, a shape does not fit, a label is
            negative, or ``present`` names an unknown modality.
    """

    def __init__(
        self, where: str, batch: Batch, labels: torch.Tensor, present: Present | None
    ) -> None:
        seen = observed_of(where, batch, batch, present)
        if len(batch) < 2:
            raise ValueError(
                f"{where}: expected at least two modalities in the batch, got {list(batch)}. "
                "There is nothing to compare a single one with."
            )
        if seen.unknown:
            raise ValueError(
                f"{where}: expected real data of every modality, got None for "
                f"'{seen.unknown[0]}'. Leave the key out, or mark missing rows with present."
            )
        _check_labels(where, labels, seen.num_rows)
        self.data, self.labels, self.present = seen.values, labels, present

    def rows(self, given: Collection[str]) -> torch.Tensor:
        """Which rows have all of these modalities: bool ``(batch,)`` on the CPU."""
        rows = torch.ones(len(self.labels), dtype=torch.bool)
        for name in given:
            if self.present is not None and name in self.present:
                rows = rows & self.present[name].cpu()
        return rows

    def only(self, given: Collection[str], rows: torch.Tensor) -> tuple[Batch, Any]:
        """These modalities in these rows, the others ``None``: arguments of a program."""
        batch = {
            name: x[rows.to(x.device)] if name in given else None for name, x in self.data.items()
        }
        if self.present is None:
            return batch, None
        masks = {name: mask for name, mask in self.present.items() if name in given}
        return batch, {name: mask[rows.to(mask.device)] for name, mask in masks.items()}


def subsets_of(
    where: str, names: Collection[str], given: Collection[tuple[str, ...]] | None, *, proper: bool
) -> list[tuple[str, ...]]:
    """The subsets asked for, by default all that are not empty, small ones first.

    Args:
        where: The function that asks, for the messages.
        names: The modalities.
        given: The subsets asked for.
        proper: Whether the set of all is left out.

    Raises:
        TypeError: If ``given`` does not hold tuples.
        ValueError: If one is empty, repeats or is not among the ``names``, or is the set of all
            where that is left out; if all are asked for and there are too many.
    """
    most = len(names) - proper
    if given is None:
        if len(names) > _MOST_MODALITIES:
            num = sum(math.comb(len(names), size) for size in range(1, most + 1))
            raise ValueError(
                f"{where}: expected at most {_MOST_MODALITIES} modalities where all their subsets "
                f"are given in turn, got {len(names)} with {num} subsets. Choose the subsets you "
                f"need, for instance given=[('{next(iter(names))}',)]."
            )
        sizes = range(1, most + 1)
        return [subset for size in sizes for subset in combinations(names, size)]
    for subset in given:
        if not isinstance(subset, tuple):
            raise TypeError(
                f"{where}: expected given to hold tuples of names, got {type(subset).__name__}. "
                "One modality alone is ('name',), with the comma."
            )
        check_names(where, f"given={subset}", subset, names)
        if not 0 < len(set(subset)) == len(subset) <= most:
            raise ValueError(
                f"{where}: expected subsets of 1 to {most} different modalities, got {subset}. "
                f"Choose from {list(names)}."
            )
    return list(given)


def check_names(where: str, what: str, names: Collection[str], modalities: Collection[str]) -> None:
    """Raises unless all ``names`` are modalities."""
    if unknown := [name for name in names if name not in modalities]:
        raise ValueError(
            f"{where}: expected names of modalities {list(modalities)} in {what}, got "
            f"'{unknown[0]}'. Use the keys of the batch."
        )


def table(rows: Sequence[tuple[str, ...]], num_left: int) -> str:
    """Lines of a table, the first ``num_left`` columns set to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _check_labels(where: str, labels: Any, num_rows: int) -> None:
    kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
    if not isinstance(labels, torch.Tensor) or not _holds_integers(labels):
        raise TypeError(
            f"{where}: expected labels to be a tensor of integers, got {kind}. Pass the class of "
            "each row, 0, 1, ...; labels.long() if they are whole numbers."
        )
    if labels.shape != (num_rows,):
        raise ValueError(
            f"{where}: expected labels of shape ({num_rows},), got {tuple(labels.shape)}. Give "
            "one class for each row."
        )
    if (labels < 0).any():
        raise ValueError(
            f"{where}: expected classes 0, 1, ... as labels, got {int(labels.min())}. Leave rows "
            "without a label out."
        )


def _holds_integers(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
