"""Running a user's programs without a trace: modes, gradients and the param store are kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars
from types import FunctionType, MethodType
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = [
    "Evaluating",
    "evaluation_mode",
    "root_modules",
    "same_random_numbers_again",
    "without_side_effects",
]


class Evaluating(Messenger):
    """Tells the handlers of training that their weights do not count."""


def root_modules(program: Any) -> Iterator[nn.Module]:
    """Modules that can be seen from outside a program.

    They are the program itself, what it wraps or is bound to, and what a plain function names:
    in its closure, its globals, or functions beside it that it calls.
    """
    yield from _reachable(program, set(), depth=8)


def _reachable(part: Any, seen: set[int], depth: int) -> Iterator[nn.Module]:
    if id(part) in seen or not depth:
        return
    seen.add(id(part))
    if isinstance(part, nn.Module):
        yield part
        return
    for inner in _inside(part):
        if isinstance(inner, nn.Module | partial | MethodType | FunctionType | dict | list | tuple):
            yield from _reachable(inner, seen, depth - 1)


def _inside(part: Any) -> list[Any]:
    """What a program or a container of modules holds; long containers hold data."""
    if isinstance(part, partial):  # Pyro's handlers are partials of (handler, program).
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, MethodType):
        bound = part.__self__
        held = [] if isinstance(bound, nn.Module) else getattr(bound, "__dict__", {}).values()
        return [bound, part.__func__, *held]
    if isinstance(part, FunctionType):
        try:
            named = getclosurevars(part)
        except ValueError:  # A name in the closure has no value yet.
            return []
        values = [*named.nonlocals.values(), *named.globals.values()]
        return [v for v in values if not _is_elsewhere(v, part)]
    if isinstance(part, dict | list | tuple) and len(part) <= 1000:
        return list(part.values() if isinstance(part, dict) else part)
    return []


def _is_elsewhere(value: Any, function: FunctionType) -> bool:
    """Whether a value is a function of another module, a library's for instance."""
    return isinstance(value, FunctionType) and value.__module__ != function.__module__


@contextmanager
def evaluation_mode(*programs: Callable[..., Any]) -> Iterator[None]:
    """Puts every module that runs inside the block in eval mode, and back at its end.

    A program may be a plain function that reaches its modules through a closure. So besides the
    modules that can be seen from outside, each one is switched, with its parts, at the moment it
    is called.
    """
    switched: list[nn.Module] = []

    def switch(module: nn.Module, *_: Any) -> None:
        if module.training:  # Asked at every call, so the parts are walked only then.
            switched.extend(part for part in module.modules() if part.training)
            for part in module.modules():
                part.training = False

    hook = register_module_forward_pre_hook(switch)
    try:
        for program in programs:
            for root in root_modules(program):
                for module in root.modules():
                    switch(module)
        yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True


@contextmanager
def without_side_effects(*programs: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode without gradients; parameters born inside the block go at its end."""
    store = pyro.get_param_store()
    # Its own deletion forgets a tensor's name altogether where the tensor has two.
    tables: list[dict[Any, Any]] = [store._params, store._constraints, store._param_to_name]
    before = [dict(table) for table in tables]
    with torch.no_grad(), evaluation_mode(*programs), Evaluating():
        try:
            yield
        finally:
            for table, entries in zip(tables, before, strict=True):
                table.clear()
                table.update(entries)


@contextmanager
def same_random_numbers_again() -> Iterator[None]:
    """Puts the random states of torch (all its devices), Python and numpy back."""
    state = pyro.util.get_rng_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)
