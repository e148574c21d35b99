"""The limit: the matrix products and convolutions of a step, alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["products_of"]

aten = torch.ops.aten


def products_of(step: Callable[[], object]) -> Callable[[], None]:
    """All products that a step takes, forward and backward, as one function.

    They read what the step read, and matrix products write to memory that is kept, so that nothing
    but the products themselves takes time.
    """
    recording = _Recording()
    with recording:
        step()
    calls = recording.calls

    def run() -> None:
        with torch.no_grad():
            for function, args, kwargs in calls:
                function(*args, **kwargs)

    return run


class _Recording(TorchDispatchMode):
    """Records products and what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.addmm.default or func is aten.baddbmm.default:  # Without the sum.
            product = torch.mm if func is aten.addmm.default else torch.bmm
            self.calls.append((product, args[1:], {"out": torch.empty_like(result)}))
        elif func is aten.mm.default or func is aten.bmm.default:
            product = torch.mm if func is aten.mm.default else torch.bmm
            self.calls.append((product, args, {"out": torch.empty_like(result)}))
        elif func in (aten.convolution.default, aten.convolution_backward.default):
            self.calls.append((func, args, kwargs or {}))
        return result
