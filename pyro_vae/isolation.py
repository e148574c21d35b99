"""Running a user's programs without a trace: modes, gradients and the param store are kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["Evaluating", "evaluation_mode", "root_modules", "without_side_effects"]


class Evaluating(Messenger):
    """Tells the handlers of training that their weights do not count."""


def root_modules(program: Callable[..., Any]) -> Iterator[nn.Module]:
    """Modules that can be seen from outside: the program, what it wraps, what it is bound to."""
    if isinstance(program, nn.Module):
        yield program
    elif isinstance(program, partial):
        # Pyro's handlers are partials of (handler, program), shown twice: outside and in `func`.
        nested = isinstance(program.func, partial)
        for part in (program.func,) if nested else (program.func, *program.args):
            if callable(part):
                yield from root_modules(part)
    elif isinstance(getattr(program, "__self__", None), nn.Module):
        yield program.__self__  # type: ignore[attr-defined]


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
