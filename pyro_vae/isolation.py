"""Running a user's programs without a trace: modes, gradients and the param store are kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from inspect import getclosurevars
from types import FunctionType, MethodType
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["Evaluating", "evaluation_mode", "root_modules", "without_side_effects"]


class Evaluating(Messenger):
    """Tells the handlers of training that their weights do not count."""


def root_modules(program: Any) -> Iterator[nn.Module]:
    """Modules that can be seen from outside a program.

    They are the program itself, what it wraps or is bound to, and what a plain function names:
    in its closure, its globals, or functions beside it that it calls.
    """
    yield from _reachable(program, set())


def _reachable(part: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, nn.Module):
        yield part
        return
    inner: list[Any] = []
    if isinstance(part, partial):  # Pyro's handlers are partials of (handler, program).
        inner = [part.func, *part.args, *part.keywords.values()]
    elif isinstance(part, MethodType):
        inner = [part.__self__, part.__func__]
    elif isinstance(part, FunctionType):
        with suppress(ValueError):  # A name in the closure may have no value yet.
            inner = _named_by(part)
    elif isinstance(part, Mapping):
        inner = list(part.values())
    elif isinstance(part, list | tuple):
        inner = list(part)
    for other in inner:
        yield from _reachable(other, seen)


def _named_by(function: FunctionType) -> list[Any]:
    """What a function names that may lead to a module: libraries' functions do not."""
    named = getclosurevars(function)
    values = [*named.nonlocals.values(), *named.globals.values()]
    return [
        value
        for value in values
        if isinstance(value, nn.Module | partial | MethodType | Mapping | list | tuple)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    ]


@contextmanager
def evaluation_mode(*programs: Callable[..., Any]) -> Iterator[None]:
    """Puts every module that runs inside the block in eval mode, and back at its end.

    A program may be a plain function that reaches its modules through a closure. So besides the
    modules that can be seen from outside, each one is switched, with its parts, at the moment it
    is called.
    """
    switched: list[nn.Module] = []

    def switch(module: nn.Module, *_: Any) -> None:
        if module.training:
            switched.extend(part for part in module.modules() if part.training)
            for part in module.modules():
                part.training = False

    for program in programs:
        for root in root_modules(program):
            for module in root.modules():
                switch(module)
    hook = register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True


@contextmanager
def without_side_effects(*programs: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode without gradients; parameters born inside the block go at its end."""
    store = pyro.get_param_store()
    before = set(store.keys())
    with torch.no_grad(), evaluation_mode(*programs), Evaluating():
        try:
            yield
        finally:
            for name in set(store.keys()) - before:
                del store[name]
