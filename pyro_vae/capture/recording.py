"""What a program does with values while it is captured: numbers it reads, tensors it changes."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.capture.errors import CaptureError, is_library, outer_frame, where_now

__all__ = ["Effects", "Readings", "memory_of"]

_NAN_CHECKS = {pyro.util.warn_if_nan.__code__, pyro.util.warn_if_inf.__code__}
# Their schemas do not say that they update the running statistics.
_BATCH_NORMS = {
    getattr(torch.ops.aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
}
_RUNNING = {"running_mean", "running_var"}
_PARAMETER_CHECK = torch.distributions.Distribution.__init__.__code__
_NUMBERS: dict[Any, Callable[[Any], Any]] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: operator.index,
    torch.Tensor.__float__: float,
    torch.Tensor.tolist: lambda value: value.tolist(),
    torch.Tensor.numpy: lambda value: value.numpy(),
    torch.Tensor.__array__: lambda value: value.numpy(),
    torch.Tensor.__dlpack__: lambda value: value.__dlpack__(),
}
_IN_C = {  # These look into the memory, where no trace sees them.
    *(torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
}
_OF_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class Effects(TorchDispatchMode):
    """Keeps what tensors held before an operation changed them, if they were there before.

    Attributes:
        before: The tensors that changed, with copies of what they held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: dict[int, torch.Tensor] = {}  # Kept alive, so that no id comes twice.
        self._is_new: dict[int, bool] = {}  # By memory: `x.detach()` is new, its memory is not.
        self._held: list[torch.Tensor] = []

    def is_made_here(self, tensor: torch.Tensor) -> bool:
        """Whether an operation of this run returned the tensor."""
        return id(tensor) in self._made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # It is given a literal.
            self._note([args, kwargs], is_new=False)
        if func._schema.is_mutable or func in _BATCH_NORMS:
            self._keep(func, args, kwargs)
        result = func(*args, **kwargs)
        self._note(result, is_new=True)
        for tensor in _tensors(result):
            if id(tensor) not in self.before:
                self._made[id(tensor)] = tensor
        return result

    def _note(self, value: Any, *, is_new: bool) -> None:
        for tensor in _tensors(value):
            if memory_of(tensor) not in self._is_new:
                self._is_new[memory_of(tensor)] = is_new
                self._held.append(tensor)

    def _keep(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for position, argument in enumerate(func._schema.arguments):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if not is_write and argument.name not in _RUNNING:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                base = tensor if tensor._base is None else tensor._base
                for changed in (tensor, base):
                    if not self._is_new[memory_of(tensor)] and id(changed) not in self.before:
                        self.before[id(changed)] = changed, changed.detach().clone()

    def put_back(self) -> None:
        """Gives every changed tensor its values from before."""
        with torch.no_grad():
            for tensor, values in self.before.values():
                tensor.detach().copy_(values)

    def values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The changed tensors, with copies of what they hold now."""
        return [(tensor, tensor.detach().clone()) for tensor, _ in self.before.values()]


class Shapes(TorchDispatchMode):
    """Refuses operations whose shapes depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        depends = torch.Tag.dynamic_output_shape in func.tags
        if _selects(func, args) or (depends and func is not torch.ops.aten.index.Tensor):
            raise CaptureError(
                f"the shape that {func} returns depends on values, at {where_now()}. Use "
                "torch.where, a mask, or a fixed number of rows"
            )
        return func(*args, **(kwargs or {}))


def _selects(func: Any, args: Sequence[Any]) -> bool:
    """Whether rows are chosen by a mask, so that their number depends on values."""
    aten = torch.ops.aten
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (func.overloadpacket is aten.index or args[2].dim() > 0)


class Readings(TorchFunctionMode):
    """Answers a program that asks for the number in a tensor.

    A number that leaves the graph would be fixed for ever. So

    - ``.item()`` returns the number as a tensor without gradient, which stays in the graph;
    - truth values that torch, Pyro or this package ask for are their checks of values: they are
      answered as they come out now, and kept in ``assumed`` for the graph to compute again (but
      for the parameters of distributions, where a NaN in the loss tells as much);
    - numbers in tensors from outside are answered, and kept in ``read`` for a guard;
    - everything else is data-dependent: it raises.

    Attributes:
        assumed: Truth values of the program, with the answers it was given.
        read: Tensors from outside, with copies of the values that were read.
    """

    def __init__(self, effects: Effects) -> None:
        super().__init__()
        self.assumed: list[tuple[torch.Tensor, bool]] = []
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._effects = effects
        self._inputs: dict[int, torch.Tensor] = {}
        self._answering = False

    def start(self, inputs: Sequence[torch.Tensor]) -> None:
        """Tells which tensors are the arguments of the program."""
        self._inputs = {id(tensor): tensor for tensor in inputs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._answering:
            return func(*args, **kwargs)
        if func is torch.Tensor.item:
            return self._item(args[0])
        if func is torch.Tensor.register_hook and args[1].__module__ == "pyro.util":
            return None  # Pyro looks for NaN in gradients, where this mode does not reach.
        if func in _NUMBERS:
            return self._number(func, args[0])
        if func in _OF_LISTS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and not any(leaf is given for given in args):
                    self._number(torch.Tensor.__float__, leaf)  # As `torch.tensor([x, y])` does.
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise CaptureError(f"the program sets the data of a tensor at {where_now()}")
        return func(*args, **kwargs)

    def _item(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point():
            return self._number(torch.Tensor.__int__, tensor)
        # A Python number has double precision, and takes part in promotion as a 0-d tensor.
        return tensor.detach().reshape(()).double()

    def _number(self, func: Any, tensor: torch.Tensor) -> Any:
        frame = outer_frame()
        if func is torch.Tensor.__bool__ and frame.f_code in _NAN_CHECKS:
            return False  # The loss is looked at when it is read.
        if not self._effects.is_made_here(tensor) and id(tensor) not in self._inputs:
            self.read.append((tensor, tensor.detach().clone()))
            with _outside():
                return _NUMBERS[func](tensor.detach())
        literal = self._literal(func, tensor)
        if literal is not None:
            return literal
        by_library = is_library(str(frame.f_globals.get("__name__", "")))
        if not by_library or func not in (torch.Tensor.__bool__, torch.Tensor.__int__):
            name = getattr(func, "__name__", str(func)).strip("_")
            raise CaptureError(
                f"the program reads a number that depends on its data or parameters "
                f"({name} of a tensor of shape {tuple(tensor.shape)}) at {where_now()}. Use "
                "torch.where instead of a branch, and tensors instead of Python numbers"
            )
        with _outside():
            value = _NUMBERS[func](tensor.detach())
        if value is True and frame.f_code is _PARAMETER_CHECK:
            return True  # Parameters that are illegal later make the loss NaN, or are data.
        self.assumed.append((tensor.detach() == value, True))
        return value

    def _literal(self, func: Any, tensor: torch.Tensor) -> Any:
        """The number where it was written in the program, as in ``torch.tensor(3)``."""
        self._answering = True
        try:
            if func in _IN_C:
                tensor.detach().sum().item()  # Raises where the memory is not that of a literal.
            return _NUMBERS[func](tensor)
        except (RuntimeError, TypeError):  # make_fx: a value out of a tracing tensor.
            return None
        finally:
            self._answering = False


def memory_of(tensor: torch.Tensor) -> int:
    """Identifies the memory of a tensor, which others may share."""
    is_strided = tensor.layout is torch.strided
    return int(tensor.untyped_storage()._cdata) if is_strided else id(tensor)


@contextmanager
def _outside() -> Iterator[None]:
    """Operations inside the block are no part of the graph."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
