"""A function of tensors that is called many times, as a graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_vae.capture.comparison import compare, precision_of
from pyro_vae.capture.compilation import Compiled, compile_graph
from pyro_vae.capture.errors import CaptureError
from pyro_vae.capture.forms import TensorForm
from pyro_vae.capture.graph import Graph, capture
from pyro_vae.capture.stock_run import RandomState, TorchRandomState

__all__ = ["CapturedFunction"]


class CapturedFunction:
    """Calls a function as it is until a form of arguments comes again, then as a graph.

    The second call with arguments of a form is captured, compiled and compared with the
    function; where that fails, the function goes on as it is. The function has to be pure but
    for random numbers, and without gradients.

    Args:
        function: Takes a mapping of tensors and a number, returns a tensor.
        warn: Told why the function is not captured.
    """

    def __init__(
        self,
        function: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
        warn: Callable[[str], None],
    ) -> None:
        self._function, self._warn = function, warn
        self._graphs: dict[Any, tuple[Graph, Compiled] | None] = {}
        self._seen: set[Any] = set()

    def __call__(self, values: Mapping[str, torch.Tensor], num: int) -> torch.Tensor:
        """The function of ``values`` and ``num``."""
        form = num, tuple((name, TensorForm.of(value)) for name, value in values.items())
        known = self._graphs.get(form)
        if known is not None:
            graph, compiled = known
            state = TorchRandomState() if graph.assumes else None
            outputs = compiled([*values.values(), *graph.outside])
            if state is None or graph.holds(outputs):
                return graph.result(outputs)[0]
            state.restore()
        elif form in self._seen and form not in self._graphs:
            return self._captured(form, values, num)
        self._seen.add(form)
        return self._function(dict(values), num)

    def _captured(self, form: Any, values: Mapping[str, torch.Tensor], num: int) -> torch.Tensor:
        names, tensors, before = list(values), list(values.values()), RandomState()
        result = self._function(dict(values), num)
        after = RandomState()
        self._graphs[form] = None
        try:
            before.restore()
            graph = capture(
                lambda *inputs: [self._function(dict(zip(names, inputs, strict=True)), num)],
                tensors,
            )
            if graph.changed or graph.read:
                raise CaptureError("it changes tensors or reads numbers")
            compiled = compile_graph(graph, [*tensors, *graph.outside])
            before.restore()
            actual = graph.result(compiled([*tensors, *graph.outside]))[0]
            precision = precision_of([*tensors, *graph.outside])
            compare("the result", actual, result, precision)
            if not RandomState().same_in_torch(after):
                raise CaptureError("the graph draws other random numbers")
            self._graphs[form] = graph, compiled
        except Exception as err:  # The compiler's are of many kinds.
            self._warn(" ".join(str(err).split())[:300])
        finally:
            after.restore()
        return result
