"""From a graph to something that runs fast: torch's inductor, or the operations one by one."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vae.capture.graph import Graph

__all__ = ["Compiled", "compile_graph", "interpret"]

Compiled = Callable[[Sequence[torch.Tensor]], Any]


def compile_graph(graph: Graph, inputs: Sequence[torch.Tensor]) -> Compiled:
    """Compiles a graph for inputs of one form; raises what the compiler raises.

    Random numbers are drawn by torch's own kernels: the stream is that of the program, and on a
    CPU they are faster than generated ones.
    """
    from torch import _inductor

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = _inductor.compile(
            copy.deepcopy(graph.module),
            [tensor.detach() for tensor in inputs],
            options={"fallback_random": True, "reorder_for_peak_memory": False},
        )
    return lambda tensors: compiled(*tensors)


def interpret(graph: Graph) -> Compiled:
    """Runs a graph operation by operation, without a compiler."""
    module = graph.module
    return lambda tensors: module(*tensors)
