"""Which modalities of a batch are observed in which rows. Nothing here changes the batch."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_mask
from torch import nn

from pyro_vae.checks import check_batch, check_data, check_values
from pyro_vae.handlers import MaskMissingMessenger

__all__ = [
    "Batch",
    "Observed",
    "Present",
    "as_module",
    "check_names",
    "check_row_mask",
    "modules_by_name",
    "observe",
    "observed_of",
]

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

    def mask(self, name: str) -> torch.Tensor:
        """Rows in which a modality is observed, bool, ``(batch,)``."""
        mask = self.masks[name]
        if mask is None:
            mask = torch.ones(self.num_rows, dtype=torch.bool, device=self.device)
        return mask


def observed_of(
    where: str, names: Collection[str] | None, batch: Batch, present: Present | None = None
) -> Observed:
    """Reads the arguments of a multimodal program.

    Args:
        where: The program, for the messages.
        names: Its modalities; ``None`` for every key of ``batch`` and ``present``.
        batch: Data by modality.
        present: Rows in which they are observed.

    Raises:
        TypeError: If ``batch`` or ``present`` is no mapping, data are no tensor, or a mask is
            not bool.
        ValueError: If a modality is unknown; numbers of rows differ; a mask has another shape;
            a mask says that data are observed which are not given; or there are no rows.
    """
    present = {} if present is None else present
    _check_mapping(where, "batch", batch)
    _check_mapping(where, "present", present)
    if names is None:
        names = list(dict.fromkeys([*batch, *present]))
    for what, keys in {"batch": batch, "present": present}.items():
        check_names(where, what, keys, names)
    values: dict[str, torch.Tensor] = {}
    for name in names:
        value = batch.get(name)
        if value is not None:
            check_batch(where, f"batch['{name}']", value)
            values[name] = value
    lengths = {f"batch['{name}']": len(value) for name, value in values.items()}
    for name, mask in present.items():
        check_row_mask(where, f"present['{name}']", mask)
        lengths[f"present['{name}']"] = len(mask)
    if not lengths:
        raise ValueError(
            f"{where}: expected data of at least one modality{_among(names)}, got none, so that "
            "the number of rows is not known. For rows with nothing observed pass masks: "
            f"present={{'{next(iter(names), 'image')}': torch.zeros(num_rows, dtype=torch.bool)}}."
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


def _check_mapping(where: str, what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{where}: expected {what} to be a mapping from modality to tensor, got "
            f"{type(value).__name__}. Write {{'image': ...}}."
        )


def check_names(where: str, what: str, given: Iterable[str], names: Collection[str]) -> None:
    """Raises if one of ``given`` is not among the modalities ``names``."""
    for name in given:
        if name not in names:
            raise ValueError(
                f"{where}: expected modalities among {list(names)} in {what}, got {name!r}. "
                "Use the names that the program was made with."
            )


def _among(names: Collection[str]) -> str:
    return f" among {list(names)}" if names else ""


def check_row_mask(where: str, what: str, mask: Any) -> None:
    """Raises unless ``mask`` says something about each row: bool, ``(batch,)``."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(
            f"{where}: expected {what} to be a bool tensor of shape (batch,), got {got}. Write "
            "torch.tensor([True, False, ...])."
        )
    if mask.dim() != 1 or not len(mask):
        raise ValueError(
            f"{where}: expected {what} of shape (batch,) with at least one row, got "
            f"{tuple(mask.shape)}. It has one entry for each row."
        )


class _Function(nn.Module):
    """A function where a module is wanted."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def as_module(where: str, what: str, fn: Any) -> nn.Module:
    """A module, or a function wrapped in one.

    Raises:
        TypeError: If ``fn`` cannot be called.
    """
    if not callable(fn):
        raise TypeError(
            f"{where}: expected {what} to be a module or a function, got {type(fn).__name__}. See "
            "the docstring for what it is called with."
        )
    return fn if isinstance(fn, nn.Module) else _Function(fn)


def observe(where: str, name: str, fn: TorchDistribution, seen: Observed) -> torch.Tensor:
    """The site ``"x_<modality>"`` of what a row has of a modality; drawn where that is unknown.

    Args:
        where: The model, for the messages.
        name: The modality.
        fn: Its distribution.
        seen: The batch.

    Returns:
        The data as given, or what was drawn: ``(*sample, batch, *event)``.

    Raises:
        ValueError: If the data do not fit the distribution.
    """
    site, value = f"x_{name}", seen.values.get(name)
    if value is None:  # Without density, and a guide needs no site for it.
        with poutine.mask(mask=False):
            drawn: torch.Tensor = pyro.sample(site, fn)
        return drawn
    try:
        check_data(where, f"batch['{name}']", value, tuple(fn.event_shape))
    except ValueError as err:
        if value.dim() <= len(fn.event_shape):
            err.add_note(
                "The likelihood counts those dimensions as one datum: a single number or label "
                "for each row takes event_dim=0, Categorical(event_dim=0) for instance."
            )
        raise
    mask, outer = seen.masks[name], get_mask()
    if is_validation_enabled():
        masks = [m for m in (mask, outer) if m is not None]
        try:
            check_values(where, site, fn, value, reduce(and_, masks) if masks else None)
        except ValueError as err:
            err.add_note(f"Say in which rows it is missing with present={{'{name}': mask}}.")
            raise
    with Messenger() if mask is None else MaskMissingMessenger({site: mask}):
        observed: torch.Tensor = pyro.sample(site, fn, obs=value)
    return observed


def modules_by_name(where: str, what: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Modules by modality, with a plain message where there is none or torch refuses a name."""
    if isinstance(modules, nn.ModuleDict):
        modules = dict(modules.items())
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
