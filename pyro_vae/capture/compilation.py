"""From a graph to something that runs fast: torch's inductor, or the operations one by one."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vae.capture.forms import TensorForm
from pyro_vae.capture.graph import Graph

__all__ = ["Compiled", "compile_graph", "interpret"]

Compiled = Callable[[Sequence[torch.Tensor]], Any]

_MAX_KEPT = 32
# Tensors are inputs of a graph, so what was compiled serves other tensors, such as those of the
# next batch. Between processes the inductor keeps files.
_kept: OrderedDict[Any, Compiled] = OrderedDict()


def compile_graph(graph: Graph, inputs: Sequence[torch.Tensor]) -> Compiled:
    """Compiles a graph for inputs of one form; raises what the compiler raises.

    Random numbers are drawn by torch's own kernels: the stream is that of the program, and on a
    CPU they are faster than generated ones.
    """
    key = _key(graph, inputs)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    from torch import _inductor

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = _inductor.compile(
            copy.deepcopy(graph.module),
            [tensor.detach() for tensor in inputs],
            options={"fallback_random": True, "reorder_for_peak_memory": False},
        )
    _kept[key] = lambda tensors: compiled(*tensors)
    if len(_kept) > _MAX_KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _key(graph: Graph, inputs: Sequence[torch.Tensor]) -> Any:
    """Equal for graphs that compute the same from inputs of the same forms."""
    literals = [
        (str(node.target), getattr(graph.module, str(node.target)))
        for node in graph.module.graph.nodes
        if node.op == "get_attr"
    ]
    values = tuple((name, TensorForm.of(t), str(t.tolist())) for name, t in literals)
    forms = tuple(map(TensorForm.of, inputs))
    return graph.module.code, values, forms, torch.get_num_threads()


def interpret(graph: Graph) -> Compiled:
    """Runs a graph operation by operation, without a compiler."""
    module = graph.module
    return lambda tensors: module(*tensors)
