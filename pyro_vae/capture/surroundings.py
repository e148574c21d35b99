"""What programs read besides their arguments: attributes, closures, globals, parameters.

A graph holds Python's numbers as they were. So everything a program can reach is listed once;
before each step the list is compared, and tensors are taken from where the program finds them.
"""

import enum
import io
import numbers
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn
from torch.distributions.transforms import Transform

from pyro_vae.capture.errors import is_library

__all__ = ["Place", "Surroundings"]

_MAX_PLACES = 20_000
_MAX_LENGTH = 256  # Longer containers hold data.
_KEPT = {
    *("training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
}
# What every module has: of no interest, or a table of its own.
_INTERNAL = (set(nn.Module().__dict__) | set(pyro.nn.PyroModule().__dict__)) - _KEPT
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MISSING = object()
_LENGTH = object()  # In the place of a key: the number of entries.
_CONTENT = object()  # In the place of a key: all that is inside.


class Place:
    """Where Python keeps a value: an entry of a container, or an attribute.

    Attributes:
        name: What a user would write.
        value: What was there when it was last looked at.
    """

    __slots__ = ("_key", "_owner", "name", "value")

    def __init__(self, name: str, owner: Any, key: Any, value: Any) -> None:
        self.name, self.value = name, value
        self._owner, self._key = owner, key

    def read(self) -> Any:
        """What is there now."""
        owner = self._owner
        if self._key is _LENGTH:
            return len(owner)
        if self._key is _CONTENT:
            return _content(owner)
        if isinstance(owner, dict):
            return owner.get(self._key, _MISSING)
        if isinstance(owner, type):
            return owner.__dict__.get(self._key, _MISSING)
        if isinstance(owner, list):
            return owner[self._key] if self._key < len(owner) else _MISSING
        return getattr(owner, self._key, _MISSING)

    @property
    def where(self) -> tuple[Any, Any]:
        """The owner, and what it knows the value by."""
        return self._owner, self._key

    def is_where(self, other: "Place") -> bool:
        """Whether both are the same place."""
        return self._owner is other._owner and self._key == other._key

    def move(self, owner: Any) -> None:
        """The same place of another owner."""
        self._owner, self.value = owner, self.value if self._key is _LENGTH else owner[self._key]

    def write(self, value: Any) -> None:
        """Puts a value there."""
        if isinstance(self._owner, dict | list):
            self._owner[self._key] = value
        else:
            setattr(self._owner, self._key, value)
        self.value = value


class Surroundings:
    """Everything that some objects can reach, and what was there.

    Args:
        owner: The table that holds model, guide and loss, which may get others there.
        roots: Their keys in that table, and the names to show.
        stored: Names of parameters in Pyro's store that they use.

    Attributes:
        places: Where their values are kept.
        generators: Random generators among them.
        iterators: The names of iterators among them.
    """

    def __init__(self, owner: dict[str, Any], roots: dict[str, str], stored: Iterable[str]) -> None:
        self.places: list[Place] = []
        self.generators: list[Any] = []
        self.iterators: list[str] = []
        self._caches: list[dict[str, Any]] = []
        self._seen: dict[int, Any] = {}
        for key, name in roots.items():
            self._add(name, owner, key, owner[key])
            self._visit(name, owner[key], 12)
        for name, registry in vars(nn.modules.module).items():
            if name.startswith("_global_") and isinstance(registry, dict):
                self._visit(f"torch.nn.modules.module.{name}", registry, 12)
        table = pyro.get_param_store()._params
        self._add("the parameter store", pyro.get_param_store(), "_params", table)
        for name in stored:
            if name in table:
                self._add(f"pyro.param('{name}')", table, name, table[name])
        self._seen.clear()
        self._sort()

    def _sort(self) -> None:
        """For speed: entries of tables, lengths, and what is kept in other ways."""
        self._tables: list[tuple[Place, dict[Any, Any], Any]] = []
        self._lengths: list[tuple[Any, int]] = []
        self._contents: list[Place] = []
        self._others: list[Place] = []
        for place in self.places:
            owner, key = place.where
            if key is _LENGTH:
                self._lengths.append((owner, place.value))
            elif key is _CONTENT:
                self._contents.append(place)
            elif isinstance(owner, dict):
                self._tables.append((place, owner, key))
            else:
                self._others.append(place)

    def _add(self, name: str, owner: Any, key: Any, value: Any) -> None:
        self.places.append(Place(name, owner, key, value))

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if not depth or id(value) in self._seen or len(self.places) > _MAX_PLACES:
            return
        if _is_plain(value) or isinstance(value, torch.Tensor | ModuleType):
            return
        self._seen[id(value)] = value
        if isinstance(value, Transform):
            self._caches.append(vars(value))
        if isinstance(value, _GENERATORS):
            self.generators.append(value)
            return
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.iterators.append(name)
            return
        for inner_name, owner, key, inner in _inside(name, value):
            if owner is not None:
                self._add(inner_name, owner, key, inner)
            self._visit(inner_name, inner, depth - 1)

    def clear_caches(self) -> None:
        """Makes transforms forget their last values, which a graph does not replace."""
        for table in self._caches:
            if "_cached_x_y" in table:
                table["_cached_x_y"] = None, None

    def changed(self) -> list[Place]:
        """The places that hold something else by now."""
        for place, owner, key in self._tables:  # A step in a thousand changes anything.
            if owner.get(key) is not place.value:
                break
        else:
            if all(len(owner) == length for owner, length in self._lengths):
                if all(place.read() is place.value for place in self._others) and all(
                    _same(place.read(), place.value) for place in self._contents
                ):
                    return []
        changed = []
        for place in list(self.places):
            if (now := place.read()) is not place.value:
                if not _same(now, place.value):
                    changed.append(place)
                elif isinstance(now, dict):
                    self._move(place, now)
        return changed

    def _move(self, place: Place, table: dict[Any, Any]) -> None:
        """Looks from now on at an equal dictionary that has taken the place of another."""
        for inner in self.places:
            if inner.where[0] is place.value:
                inner.move(table)
        place.value = table
        self._sort()

    def same_place(self, other: Place) -> Place:
        """The place of this list that is another list's ``other``."""
        return next((p for p in self.places if p.is_where(other)), other)

    def places_of(self, tensors: Iterable[torch.Tensor]) -> dict[int, Place]:
        """Where tensors are found, by id; those that are found nowhere have no entry."""
        wanted = set(map(id, tensors))
        found: dict[int, Place] = {}
        for place in self.places:
            if id(place.value) in wanted:
                found.setdefault(id(place.value), place)
        return found


def _is_plain(value: Any) -> bool:
    plain = numbers.Number | str | bytes | enum.Enum | torch.dtype | torch.device | torch.Size
    return value is None or isinstance(value, plain)


def _same(first: Any, second: Any) -> bool:
    """Whether two values mean the same to a program."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return all(a is b or _same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, MethodType) and isinstance(second, MethodType):
        return first == second
    if isinstance(first, frozenset) and isinstance(second, frozenset):
        return first == second
    if isinstance(first, dict) and isinstance(second, dict) and len(first) <= _MAX_LENGTH:
        return first.keys() == second.keys() and all(
            first[key] is second[key] or _same(first[key], second[key]) for key in first
        )
    if type(first) is type(second) is pyro.plate:  # Auto guides make theirs anew at each run.
        return _of_plate(first) == _of_plate(second)
    return type(first) is type(second) and _is_plain(first) and bool(first == second)


def _of_plate(plate: Any) -> tuple[Any, ...]:
    return plate.name, plate.size, plate.subsample_size, plate.dim


def _content(value: Any) -> Any:
    """A copy that can be compared."""
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return frozenset(value) if isinstance(value, set) else tuple(value)


Found = Iterator[tuple[str, Any, Any, Any]]
"""Names, owners, keys and values; no owner where the value cannot be replaced."""


def _inside(name: str, value: Any) -> Found:
    if isinstance(value, dict):
        yield from _entries(name, value, value.items(), "[{!r}]")
    elif isinstance(value, list):
        yield from _entries(name, value, enumerate(value), "[{!r}]")
    elif isinstance(value, type):
        yield from _of_class(name, value)
    elif isinstance(value, np.ndarray):
        if value.size <= _MAX_LENGTH:
            yield name, value, _CONTENT, _content(value)
    elif isinstance(value, tuple | set | frozenset | deque):
        if isinstance(value, set | deque) and len(value) <= _MAX_LENGTH:
            yield name, value, _CONTENT, _content(value)
        for i, inner in enumerate(list(value) if len(value) <= _MAX_LENGTH else ()):
            yield f"{name}[{i}]", None, None, inner
    elif isinstance(value, partial):
        yield f"{name}", None, None, value.func
        yield f"{name}.args", None, None, value.args
        yield f"{name}.keywords", None, None, value.keywords
    elif isinstance(value, MethodType):
        yield name, None, None, value.__self__
        yield name, None, None, value.__func__
    elif isinstance(value, FunctionType):
        yield from _of_function(name, value)
    elif not isinstance(value, BuiltinFunctionType):
        yield from _of_instance(name, value)


def _entries(name: str, owner: Any, items: Iterable[tuple[Any, Any]], form: str) -> Found:
    yield f"len({name})", owner, _LENGTH, len(owner)
    if len(owner) <= _MAX_LENGTH:
        for key, inner in list(items):
            yield name + form.format(key), owner, key, inner


def _of_instance(name: str, value: Any) -> Found:
    table = getattr(value, "__dict__", None)
    if isinstance(table, dict):
        is_module = isinstance(value, nn.Module)
        for key, inner in list(table.items()):
            if is_module and key in _INTERNAL:
                continue
            if isinstance(value, Transform) and key.startswith("_cache") and key != "_cache_size":
                continue  # Of one pair of values, which `clear_caches` makes it forget.
            prefix = name if is_module and key in _KEPT - {"training"} else f"{name}.{key}"
            yield prefix, table, key, inner
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if not is_library(base.__module__) and hasattr(value, key):
                yield f"{name}.{key}", value, key, getattr(value, key)
    yield from _of_class(name, type(value))


def _of_class(name: str, value: type) -> Found:
    for base in value.__mro__:
        module = sys.modules.get(base.__module__)
        if module is None or not _is_users(module):
            continue
        for key, inner in list(vars(base).items()):
            function = getattr(inner, "fget", None) or getattr(inner, "__func__", inner)
            if isinstance(function, FunctionType):
                yield f"{name}.{key}", base, key, inner
                yield f"{name}.{key}", None, None, function
            elif not key.startswith("__") and not isinstance(inner, MemberDescriptorType):
                yield f"{name}.{key}", base, key, inner


def _of_function(name: str, function: FunctionType) -> Found:
    label = function.__name__
    yield f"a default of {label}", function, "__defaults__", function.__defaults__
    yield f"a default of {label}", function, "__kwdefaults__", function.__kwdefaults__
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            inner = cell.cell_contents
        except ValueError:  # The name has no value yet.
            continue
        yield f"'{variable}' of {label}", cell, "cell_contents", inner
        if isinstance(inner, ModuleType):
            yield from _of_module(f"{variable}", inner, _names(function.__code__), 3)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield name, None, None, wrapped
    if is_library(function.__module__ or ""):
        return
    yield from _entries(label, vars(function), vars(function).items(), ".{}")
    names, table = _names(function.__code__), function.__globals__
    for variable in names:
        inner = table.get(variable, sys.modules.get(variable, _MISSING))
        if isinstance(inner, ModuleType):
            yield from _of_module(variable, inner, names, 3)
        elif inner is not _MISSING:
            yield f"'{variable}'", table, variable, inner


def _of_module(name: str, module: ModuleType, names: list[str], depth: int) -> Found:
    """What a program that uses some names can mean by "config.beta"."""
    if not depth or not _is_users(module):
        return
    for attribute in names:
        inner = vars(module).get(attribute, _MISSING)
        if isinstance(inner, ModuleType):
            yield from _of_module(f"{name}.{attribute}", inner, names, depth - 1)
        elif inner is not _MISSING:
            yield f"'{name}.{attribute}'", vars(module), attribute, inner


def _is_users(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None) or ""
    parts = ("site-packages", "dist-packages", "/lib/python")
    known = module.__name__.partition(".")[0] in sys.stdlib_module_names
    return not known and not is_library(module.__name__) and not any(p in path for p in parts)


def _names(code: CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _names(constant)
    return list(dict.fromkeys(names))
