"""Why a program cannot be captured, said with the site and the line where it happens."""

import sys
from types import FrameType

from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger

__all__ = ["CaptureError", "calling_line", "is_library", "outer_frame", "where_now"]

_LIBRARIES = {"torch", "pyro", "pyro_vae", "opt_einsum"}
_MACHINERY = (
    "contextlib",
    "pyro_vae.capture",
    "torch._compile",
    "torch._dynamo",
    "torch._higher_order_ops",
    "torch._ops",
    "torch._tensor",
    "torch.autograd",
    "torch.fx",
    "torch.overrides",
    "torch.utils",
)


class CaptureError(RuntimeError):
    """A program whose structure depends on values, or that does what no graph can hold."""


def is_library(module: str) -> bool:
    """Whether a module belongs to torch, Pyro or this package."""
    return module.partition(".")[0] in _LIBRARIES


def outer_frame() -> FrameType:
    """The innermost frame that is not part of the machinery of capturing."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _name(frame).startswith(_MACHINERY):
        frame = frame.f_back
    return frame


def calling_line() -> str:
    """File and line of the innermost frame of the user's, else of a library."""
    innermost = outer_frame()
    frame: FrameType | None = innermost
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    # A program is called from within `step`, so what lies outside it is not to blame.
    if frame is None or _holds_step(frame, innermost):
        frame = innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: FrameType) -> bool:
    """Whether a frame is of a library or of machinery; code that torch.fx writes has no name."""
    name = _name(frame)
    return not name or is_library(name) or name.startswith(_MACHINERY)


def _name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _holds_step(frame: FrameType, innermost: FrameType) -> bool:
    """Whether ``frame`` is outside of the call that captures."""
    inner: FrameType | None = innermost
    while inner is not None and inner is not frame:
        if _name(inner) == "pyro_vae.compiled_svi":
            return True
        inner = inner.f_back
    return False


def where_now() -> str:
    """The line that runs, and the sample site before it, as part of a sentence."""
    last = None
    for handler in _PYRO_STACK:
        if isinstance(handler, TraceMessenger):
            names = [n for n, s in handler.trace.nodes.items() if s["type"] == "sample"]
            last = names[-1] if names else last
    site = f", after site '{last}'" if last is not None else ""
    return f"{calling_line()}{site}"
