"""What programs read besides their arguments: attributes, closures, globals, parameters.

A graph holds Python's numbers as they were. So everything a program can reach is listed once;
before each step the list is compared, and tensors are taken from where the program finds them.
"""

import enum
import numbers
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.capture.errors import is_library

__all__ = ["Place", "Surroundings"]

_MAX_PLACES = 20_000
_MAX_LENGTH = 256  # Longer containers hold data.
_KEPT = {"training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
# What every module has: of no interest, or a table of its own.
_INTERNAL = (set(nn.Module().__dict__) | set(pyro.nn.PyroModule().__dict__)) - _KEPT
_MISSING = object()
_LENGTH = object()  # In the place of a key: the number of entries.


class Place:
    """Where Python keeps a value: an entry of a container, or an attribute.

    Attributes:
        name: What a user would write.
        value: What was there when it was last looked at.
    """

    __slots__ = ("_key", "_owner", "_writes", "name", "value")

    def __init__(self, name: str, owner: Any, key: Any, value: Any) -> None:
        self.name, self.value = name, value
        self._owner, self._key = owner, key

    def read(self) -> Any:
        """What is there now."""
        owner = self._owner
        if self._key is _LENGTH:
            return len(owner)
        if isinstance(owner, dict):
            return owner.get(self._key, _MISSING)
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
        roots: Objects by name: model, guide, loss.
        stored: Names of parameters in Pyro's store that they use.

    Attributes:
        places: Where their values are kept.
    """

    def __init__(self, roots: dict[str, Any], stored: Iterable[str]) -> None:
        self.places: list[Place] = []
        self._seen: dict[int, Any] = {}
        for name, root in roots.items():
            self._visit(name, root, 12)
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
        self._others: list[Place] = []
        for place in self.places:
            owner, key = place.where
            if key is _LENGTH:
                self._lengths.append((owner, place.value))
            elif isinstance(owner, dict):
                self._tables.append((place, owner, key))
            else:
                self._others.append(place)

    def _add(self, name: str, owner: Any, key: Any, value: Any) -> None:
        self.places.append(Place(name, owner, key, value))

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if not depth or id(value) in self._seen or len(self.places) > _MAX_PLACES:
            return
        if _is_plain(value) or isinstance(value, torch.Tensor | type | ModuleType):
            return
        self._seen[id(value)] = value
        for inner_name, owner, key, inner in _inside(name, value):
            if owner is not None:
                self._add(inner_name, owner, key, inner)
            self._visit(inner_name, inner, depth - 1)

    def changed(self) -> list[Place]:
        """The places that hold something else by now."""
        for place, owner, key in self._tables:  # A step in a thousand changes anything.
            if owner.get(key) is not place.value:
                break
        else:
            if all(len(owner) == length for owner, length in self._lengths):
                if all(place.read() is place.value for place in self._others):
                    return []
        return [
            p for p in self.places if (now := p.read()) is not p.value and not _same(now, p.value)
        ]

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
    return type(first) is type(second) and _is_plain(first) and bool(first == second)


Found = Iterator[tuple[str, Any, Any, Any]]
"""Names, owners, keys and values; no owner where the value cannot be replaced."""


def _inside(name: str, value: Any) -> Found:
    if isinstance(value, dict):
        yield from _entries(name, value, value.items(), "[{!r}]")
    elif isinstance(value, list):
        yield from _entries(name, value, enumerate(value), "[{!r}]")
    elif isinstance(value, tuple | set | frozenset):
        for i, inner in enumerate(value if len(value) <= _MAX_LENGTH else ()):
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
            prefix = name if is_module and key in _KEPT - {"training"} else f"{name}.{key}"
            yield prefix, table, key, inner
    for base in type(value).__mro__:
        if not is_library(base.__module__) and base.__module__ != "builtins":
            for method in list(vars(base).values()):
                function = getattr(method, "fget", None) or getattr(method, "__func__", method)
                if isinstance(function, FunctionType):
                    yield f"{name}.{function.__name__}", None, None, function


def _of_function(name: str, function: FunctionType) -> Found:
    label = function.__name__
    yield name, None, None, function.__defaults__
    yield name, None, None, function.__kwdefaults__
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            yield f"'{variable}' of {label}", cell, "cell_contents", cell.cell_contents
        except ValueError:  # The name has no value yet.
            continue
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield name, None, None, wrapped
    if is_library(function.__module__ or ""):
        return
    names, table = _names(function.__code__), function.__globals__
    for variable in names:
        if variable not in table:
            continue
        inner = table[variable]
        if not isinstance(inner, ModuleType):
            yield f"'{variable}'", table, variable, inner
        elif _is_users(inner):  # config.beta
            for attribute in names:
                if attribute in vars(inner):
                    path = f"'{variable}.{attribute}'"
                    yield path, vars(inner), attribute, vars(inner)[attribute]


def _is_users(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None) or ""
    parts = ("site-packages", "dist-packages", "/lib/python")
    return bool(path) and not is_library(module.__name__) and not any(p in path for p in parts)


def _names(code: CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _names(constant)
    return list(dict.fromkeys(names))
