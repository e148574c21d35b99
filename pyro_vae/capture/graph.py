"""One execution of a function as a graph of tensor operations, by ``make_fx``.

Every tensor that the function finds outside, its parameters first of all, becomes an input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.capture.errors import CaptureError, is_library, where_now
from pyro_vae.capture.recording import Effects, Readings, Shapes, memory_of
from pyro_vae.capture.selections import Selections

__all__ = ["Graph", "capture"]


@dataclass(frozen=True)
class Graph:
    """A captured function of tensors.

    Attributes:
        module: Takes ``[*inputs, *outside]`` and returns the tensors of the result, then
            whether what was assumed of values holds, a 0-d bool, if anything was, then random
            numbers that nothing uses.
        outside: The tensors it found outside of its inputs.
        read: Tensors of which it read a number, with the values then.
        changed: Which of ``[*inputs, *outside]`` it changes in place, by position.
        assumes: Whether it assumed anything of values.
    """

    module: fx.GraphModule
    outside: list[torch.Tensor]
    read: list[tuple[torch.Tensor, torch.Tensor]]
    changed: list[int]
    assumes: bool
    _num_returned: int
    _constants: dict[int, Any]

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether what it assumes of values was true, from what ``module`` returned."""
        return bool(tensors[self._num_returned])

    def result(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The result of the function, from what ``module`` returned."""
        leaves: list[Any] = list(tensors[: self._num_returned])
        for position, constant in self._constants.items():
            leaves.insert(position, constant)
        return leaves

    @property
    def num_operations(self) -> int:
        """How many operations it has."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def capture(function: Callable[..., list[Any]], inputs: Sequence[torch.Tensor]) -> Graph:
    """Runs ``function(*inputs)`` once and records it; changes of tensors are taken back.

    Args:
        function: Takes tensors, returns a list of tensors and constants.
        inputs: What it is given. A tensor that it also finds outside counts as another one.

    Raises:
        CaptureError: If it depends on values in a way that no graph holds.
    """
    # Aliases: a program may know the same tensor as a global, which does not change with them.
    given = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    effects = Effects()
    readings = Readings(effects)
    result: dict[str, Any] = {}

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        readings.start(tensors)
        with Shapes(), effects:
            leaves = function(*tensors)
            returned = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
            result["num"] = len(returned)
            result["constants"] = {
                i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)
            }
            if readings.assumed:
                returned.append(torch.stack([holds for holds, _ in readings.assumed]).all())
            return returned

    try:
        with readings, Selections(readings):
            module = make_fx(flat)(*given)
    except CaptureError as err:  # Pyro appends the shapes of the trace, line by line.
        raise CaptureError(str(err).partition("\n")[0]) from err
    except Exception as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        if "get value out of a tracing tensor" in reason:
            reason = "the program reads a number that depends on its data or parameters"
        raise CaptureError(f"{reason[:400]}, {_line_of(err)}") from err
    finally:
        effects.put_back()
    outside = _lift(module)
    memory = {memory_of(tensor) for tensor, _ in effects.before.values()}
    changed = [i for i, t in enumerate([*given, *outside]) if memory_of(t) in memory]
    return Graph(
        module,
        outside,
        readings.read,
        changed,
        bool(readings.assumed),
        result["num"],
        result["constants"],
    )


def _line_of(err: BaseException) -> str:
    """The user's line in a traceback, as part of a sentence."""
    line = where_now()
    trace = err.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if not is_library(module):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"at {line}"


def _lift(module: fx.GraphModule) -> list[torch.Tensor]:
    """Makes every tensor from outside an input, and returns them in order.

    Literals such as ``torch.tensor(3.0)`` stay constants: they are copied where they stand.
    Random numbers that nothing uses are drawn all the same, as the program does.
    """
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    inputs: dict[int, fx.Node] = {}
    outside: list[torch.Tensor] = []
    literal = torch.ops.aten.lift_fresh_copy.default
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        if all(user.target is literal for user in node.users):
            continue
        tensor = getattr(module, str(node.target))
        if id(tensor) not in inputs:
            with graph.inserting_before(first):
                inputs[id(tensor)] = graph.placeholder(f"outside_{len(outside)}")
            inputs[id(tensor)].meta["val"] = tensor
            outside.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.erase_node(node)
    for placeholder in reversed(placeholders):  # The function's own inputs come first.
        next(iter(graph.nodes)).prepend(placeholder)
    _keep_random(graph)
    _count_truths(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return outside


def _keep_random(graph: fx.Graph) -> None:
    """Returns random numbers that nothing uses, last of all: no compiler shall drop them."""
    [end] = [node for node in graph.nodes if node.op == "output"]
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_effect = node.op == "call_function" and _is_mutable(node.target)
        if node is end or is_effect or node in needed:
            needed.update(node.all_input_nodes)
            if is_effect:
                needed.add(node)
    unused = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node not in needed
        and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    end.args = ([*end.args[0], *unused],)


def _count_truths(graph: fx.Graph) -> None:
    """Asks whether all of many values are true by counting: compilers have fast sums of floats."""
    slow = (torch.ops.aten._is_all_true.default, torch.ops.aten.all.default)
    for node in [node for node in graph.nodes if node.target in slow]:
        values = node.args[0].meta.get("val")
        if not isinstance(values, torch.Tensor) or not 64 < values.numel() < 2**24:
            continue
        with graph.inserting_before(node):
            aten, is_false = torch.ops.aten, node.args[0]
            if values.dtype != torch.bool:
                is_false = graph.call_function(aten.ne.Scalar, (is_false, 0))
            is_false = graph.call_function(aten.logical_not.default, (is_false,))
            floats = graph.call_function(
                aten._to_copy.default, (is_false,), {"dtype": torch.float32}
            )
            count = graph.call_function(aten.sum.default, (floats,))
            node.replace_all_uses_with(graph.call_function(aten.eq.Scalar, (count, 0)))
        graph.erase_node(node)


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable
