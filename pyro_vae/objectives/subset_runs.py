"""What a pair of programs is called with on a subset of the modalities, and under what handlers."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_vae.modalities import Batch, Observed, Present
from pyro_vae.traces import frames, is_random

__all__ = [
    "Arguments",
    "Given",
    "Replaced",
    "Rows",
    "SubsetRun",
    "hiding",
    "restricted",
    "weighted",
]

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Given:
    """What the programs are called with.

    Attributes:
        seen: What is observed.
        batch: Data by modality.
        present: Rows in which they are observed.
        kwargs: Other arguments.
    """

    seen: Observed
    batch: Batch
    present: Present | None
    kwargs: dict[str, Any]

    @property
    def observed(self) -> tuple[str, ...]:
        """Modalities that are observed in some row."""
        return tuple(self.seen.values)

    def only(self, names: Iterable[str]) -> Arguments:
        """Arguments that tell of these modalities alone."""
        return restricted(self.batch, self.present, names)


@dataclass(frozen=True)
class Rows:
    """Which rows count.

    Attributes:
        dim: Dimension of the plate over them, negative.
        mask: bool, ``(batch,)``.
    """

    dim: int
    mask: torch.Tensor


@dataclass(frozen=True)
class SubsetRun:
    """How to run the programs on one subset.

    Attributes:
        names: What the guide sees.
        all_names: What the model sees.
        private: Latents that come from elsewhere than the guide that sees the subset.
        from_prior: Those of them that come from the model's prior.
        rows: Which rows count; ``None`` for all.
        weight: A positive number for all rows, or with ``rows`` ``(batch,)``.
    """

    names: tuple[str, ...]
    all_names: tuple[str, ...]
    private: frozenset[str] = frozenset()
    from_prior: frozenset[str] = frozenset()
    rows: Rows | None = None
    weight: float | torch.Tensor = 1.0


def restricted(batch: Batch, present: Present | None, names: Iterable[str]) -> Arguments:
    """Arguments that say the same of some modalities, and nothing of others.

    Without masks the programs are called with the batch alone.
    """
    names = tuple(names)
    some = {name: batch[name] for name in names if name in batch}
    if present is None:
        return (some,)
    return some, {name: present[name] for name in names if name in present}


class _Rows(Messenger):
    """Masks and scales what lies in the plate over the rows."""

    def __init__(self, rows: Rows, weight: float | torch.Tensor) -> None:
        super().__init__()
        self._rows, self._weight = rows, weight

    def _pyro_sample(self, msg: Any) -> None:
        rows = self._rows
        size = len(rows.mask)
        if not is_random(msg) or (rows.dim, size) not in {(f.dim, f.size) for f in frames(msg)}:
            return
        shape = (size,) + (1,) * (-rows.dim - 1)
        mask = rows.mask.reshape(shape)
        msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]
        weight = self._weight
        if isinstance(weight, torch.Tensor):
            weight = weight.reshape(shape)
        msg["scale"] = msg["scale"] * weight


class Replaced(Messenger):
    """Samples some sites from other distributions."""

    def __init__(self, fns: dict[str, Any]) -> None:
        super().__init__()
        self._fns = fns

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = self._fns.get(msg["name"], msg["fn"])


def weighted(run: SubsetRun) -> Any:
    """Counts the rows of a subset, with their weight."""
    if run.rows is not None:
        return _Rows(run.rows, run.weight)
    return nullcontext() if run.weight == 1 else poutine.scale(scale=run.weight)


def hiding(hidden: Callable[[str], bool]) -> Any:
    """Keeps samples from handlers further out; parameters are seen."""
    return poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and hidden(str(msg["name"])))
