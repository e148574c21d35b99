"""Every test, and every doctest, starts from the same global state and has to leave it so.

These are hooks, not a fixture, so that a fixture of a whole module is made in the same state as
the tests that use it, and so that they reach the doctests outside this folder.
"""

import sys
from collections.abc import Callable, Generator
from typing import Any

import matplotlib
import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

matplotlib.use("Agg")


def _torch_module_hooks() -> dict[str, list[int]]:
    """Keys of the hooks that torch applies to every module, by the name of their registry."""
    return {
        name: list(registry)
        for name, registry in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and isinstance(registry, dict)
    }


def _remove_torch_module_hooks(kept: dict[str, list[int]]) -> None:
    for name, keys in kept.items():
        registry = getattr(torch.nn.modules.module, name)
        for key in [key for key in registry if key not in keys]:
            del registry[key]


def _figures() -> list[int]:
    """Numbers of the open figures, without importing pyplot for their sake."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return pyplot.get_fignums() if pyplot else []


def _close_figures(kept: list[int]) -> None:
    for number in _figures():
        if number not in kept:
            sys.modules["matplotlib.pyplot"].close(number)


def _set_handlers(kept: list[Any]) -> None:
    _PYRO_STACK[:] = kept


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        changed = [key for key in after if after[key] != before[key]]
        before = {key: before[key] for key in changed}
        after = {key: after[key] for key in changed}
    return f"was {before}, is {after}"


# What is watched: how to read it and how to put it back.
# Pyro's settings hold the validation flags, its own and torch's.
_GLOBAL_STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "thread count": (torch.get_num_threads, torch.set_num_threads),
    "torch module hooks": (_torch_module_hooks, _remove_torch_module_hooks),
    "pyro settings": (pyro.settings.get, lambda kept: pyro.settings.set(**kept)),
    "pyro handlers": (lambda: list(_PYRO_STACK), _set_handlers),
    "open figures": (_figures, _close_figures),
}


class GlobalState:
    """Sets the state before the fixtures of a test, and compares it after they are gone."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        # A doctest shows what a reader gets, who has torch's default dtype.
        is_doctest = isinstance(item, pytest.DoctestItem)
        torch.set_default_dtype(torch.float32 if is_doctest else torch.float64)
        pyro.enable_validation(True)
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        self.before = {name: read() for name, (read, _) in _GLOBAL_STATE.items()}
        yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        try:
            yield
        finally:
            pyro.clear_param_store()
            changes = []
            for name, (read, restore) in _GLOBAL_STATE.items():
                before, after = self.before[name], read()
                if after != before:
                    restore(before)
                    changes.append(f"{name}: {_difference(before, after)}")
            if changes:
                pytest.fail("global state left changed: " + "; ".join(changes), pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin by hand: hooks of a conftest reach only the tests in its folder."""
    # Tensors in tests are tiny: several threads would only wait for one another.
    torch.set_num_threads(1)
    config.pluginmanager.register(GlobalState(), "global state")
