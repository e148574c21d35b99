"""Which modalities of a batch are observed in which rows. Nothing here changes the batch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_vae.checks import check_batch

__all__ = ["Batch", "Observed", "Present", "modules_by_name", "observed_of", "where_seen"]

Batch = Mapping[str, torch.Tensor | None]
"""Data by modality, ``(batch, *event)`` each. A missing key or ``None``: not observed."""

Present = Mapping[str, torch.Tensor]
"""Rows in which a modality is observed, bool, ``(batch,)``. A missing key: in all rows."""


@dataclass(frozen=True)
class Observed:
    """What a batch says, checked.

    Attributes:
        num_rows: Number of rows.
        values: The data by modality, as given, in the order of the program's modalities.
        masks: Rows in which a modality is observed, ``(batch,)``; ``None`` for all of them.
        unknown: Modalities given as ``None``, to be drawn from the model.
        device: Where the rows live.
    """

    num_rows: int
    values: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor | None]
    unknown: tuple[str, ...]
    device: torch.device

    def filled(self, name: str) -> torch.Tensor:
        """Data of a modality with zeros in the rows where it is not observed."""
        value, mask = self.values[name], self.masks[name]
        if mask is None:
            return value
        return torch.where(
            mask.reshape(mask.shape + (1,) * (value.dim() - 1)), value, value.new_zeros(())
        )

    @property
    def anything(self) -> torch.Tensor | None:
        """Rows in which a modality is observed, ``(batch,)``; ``None`` for all of them."""
        if any(mask is None for mask in self.masks.values()):
            return None
        nothing = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        masks = [mask for mask in self.masks.values() if mask is not None]
        return reduce(or_, masks, nothing)

    def mask(self, name: str) -> torch.Tensor:
        """Rows in which a modality is observed, bool, ``(batch,)``."""
        mask = self.masks[name]
        if mask is None:
            mask = torch.ones(self.num_rows, dtype=torch.bool, device=self.device)
        return mask


def observed_of(
    where: str, names: Collection[str], batch: Batch, present: Present | None = None
) -> Observed:
    """Reads the arguments of a multimodal program.

    Args:
        where: The program, for the messages.
        names: Its modalities.
        batch: Data by modality.
        present: Rows in which they are observed.

    Raises:
        TypeError: If ``batch`` or ``present`` is no mapping, data are no tensor, or a mask is
            not bool.
        ValueError: If a modality is unknown; numbers of rows differ; a mask has another shape;
            a mask says that data are observed which are not given; or there are no rows.
    """
    _check_mapping(where, "batch", batch, names)
    present = {} if present is None else present
    _check_mapping(where, "present", present, names)
    values: dict[str, torch.Tensor] = {}
    for name in names:
        value = batch.get(name)
        if value is not None:
            check_batch(where, f"batch['{name}']", value)
            values[name] = value
    lengths = {f"batch['{name}']": len(value) for name, value in values.items()}
    for name, mask in present.items():
        _check_mask(where, name, mask)
        lengths[f"present['{name}']"] = len(mask)
    if not lengths:
        raise ValueError(
            f"{where}: expected data of at least one of the modalities {list(names)}, got none, "
            "so that the number of rows is not known. For rows with nothing observed pass masks: "
            f"present={{'{next(iter(names))}': torch.zeros(num_rows, dtype=torch.bool)}}."
        )
    (first, num_rows), *others = lengths.items()
    for other, length in others:
        if length != num_rows:
            raise ValueError(
                f"{where}: expected the same number of rows everywhere, got {num_rows} in {first} "
                f"and {length} in {other}. Row n of all modalities is one datum; mark what is "
                "missing with present."
            )
    for name, mask in present.items():
        if name not in values and mask.any():
            raise ValueError(
                f"{where}: expected data of modality '{name}', which present['{name}'] says is "
                f"observed, got none in batch. Add batch['{name}'], or leave the mask out."
            )
    device = next(iter((values or present).values())).device
    masks = {name: present.get(name) for name in values}
    unknown = tuple(name for name in names if name in batch and batch[name] is None)
    return Observed(num_rows, values, masks, unknown, device)


def _check_mapping(where: str, what: str, value: Any, names: Collection[str]) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{where}: expected {what} to be a mapping from modality to tensor, got "
            f"{type(value).__name__}. Write {{'{next(iter(names))}': ...}}."
        )
    for name in value:
        if name not in names:
            raise ValueError(
                f"{where}: expected modalities among {list(names)} in {what}, got {name!r}. "
                "Use the names that the program was made with."
            )


def _check_mask(where: str, name: str, mask: Any) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(
            f"{where}: expected present['{name}'] to be a bool tensor of shape (batch,), got "
            f"{got}. Write torch.tensor([True, False, ...])."
        )
    if mask.dim() != 1 or not len(mask):
        raise ValueError(
            f"{where}: expected present['{name}'] of shape (batch,) with at least one row, got "
            f"{tuple(mask.shape)}. It says for each row whether the modality is observed."
        )


def where_seen(mask: torch.Tensor | None) -> Any:
    """Hides latents in the rows that say nothing about them, on both sides alike."""
    return Messenger() if mask is None else MaskMessenger(mask)  # type: ignore[arg-type]


def modules_by_name(where: str, what: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Modules by modality, with a plain message where there is none or torch refuses a name."""
    if not isinstance(modules, Mapping) or not modules:
        got = "none" if isinstance(modules, Mapping) else type(modules).__name__
        raise ValueError(
            f"{where}: expected {what} by modality, at least one, got {got}. "
            "Write {'image': network, 'label': network}."
        )
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{where}: expected a module for modality {name!r} in {what}, got "
                f"{type(module).__name__}. Wrap a function in a module of its own."
            )
    try:
        return nn.ModuleDict(modules)
    except (KeyError, TypeError) as err:
        raise ValueError(
            f"{where}: expected names of modalities that can be names of modules, got "
            f"{list(modules)}: {err.args[0]}. Choose names without dots that are no methods of "
            "torch.nn.ModuleDict."
        ) from err
