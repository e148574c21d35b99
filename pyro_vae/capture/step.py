"""One step of SVI as a graph: captured beside a run of Pyro, compared with it, repeated."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from pyro_vae.capture.comparison import compare, precision_of, size_of
from pyro_vae.capture.compilation import Compiled, compile_graph, interpret
from pyro_vae.capture.errors import CaptureError
from pyro_vae.capture.forms import Form, TensorForm
from pyro_vae.capture.graph import Graph, capture
from pyro_vae.capture.stock_run import ROOTS, StockRun, TorchRandomState, plain_run
from pyro_vae.capture.surroundings import Surroundings

__all__ = ["CapturedStep", "capture_step"]


def capture_step(
    svi: Any, stock: StockRun, form: Form, leaves: Sequence[Any], warn: Callable[[str], None]
) -> "CapturedStep":
    """Captures the step that Pyro took, compiles it, and compares the two.

    Args:
        svi: Model, guide and loss.
        stock: Pyro's run.
        form: The form of the arguments.
        leaves: The leaves of the arguments.
        warn: Told if the compiler fails.

    Raises:
        CaptureError: If the program does what no graph holds, or the numbers differ.
    """
    if stock.altered:
        raise CaptureError(
            f"a run of it changes {stock.altered[0]}, which a graph would not. Keep numbers that "
            "change in tensors that are updated in place"
        )
    if stock.draws_elsewhere:
        raise CaptureError(
            "it draws random numbers of Python, numpy or a generator of its own, which would be "
            "the same for ever. Use those of torch's global generator"
        )
    if stock.iterators:
        raise CaptureError(
            f"it can advance {stock.iterators[0]}, an iterator, which a graph would not. Pass its "
            "values as arguments"
        )
    start = time.perf_counter()
    stock.rewind()
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    graph = capture(lambda *tensors: _run(svi, stock, form.spec, leaves, tensors), inputs)
    stock.rewind()  # The run has replaced tensors by those of the graph.
    step = CapturedStep(graph, stock, form)
    step.capture_seconds = time.perf_counter() - start
    if svi.mode == "inductor":
        step.compile(stock, leaves, warn)
    else:
        step.compare(stock, leaves)
    step.compile_seconds = time.perf_counter() - start - step.capture_seconds
    return step


def _run(svi: Any, stock: StockRun, spec: TreeSpec, leaves: Any, tensors: Any) -> list[Any]:
    """Loss, gradients and replaced tensors of a run on other tensors."""
    given = iter(tensors)
    filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(filled, spec)
    loss, parameters, gradients = plain_run(svi, args, kwargs)
    by_id = dict(zip(map(id, parameters), gradients, strict=True))
    if by_id.keys() != set(map(id, stock.parameters)):
        raise CaptureError("its param statements are not the same in every run")
    losses = loss if isinstance(loss, tuple) else (loss,)
    ordered = [by_id[id(parameter)] for parameter in stock.parameters]
    return [*losses, *ordered, *(place.read() for place, _, _ in stock.replaced)]


class CapturedStep:
    """A step as a graph, and what has to stay as it was for the graph to be right.

    Attributes:
        form: The form of the arguments it is for.
        backend: ``"inductor"``, or ``"graph"`` where operations run one by one.
        num_steps: How often it was used.
        last_check: At which use it was compared with Pyro last.
        capture_seconds: What it took to capture.
        compile_seconds: What it took to compile and compare.
    """

    capture_seconds = compile_seconds = 0.0

    def __init__(self, graph: Graph, stock: StockRun, form: Form) -> None:
        self.graph, self.form, self.backend = graph, form, "graph"
        self.num_steps = self.last_check = 1
        self._compiled: Compiled = interpret(graph)
        self._around = Surroundings(stock.owner, ROOTS, stock.names)
        places = self._around.places_of([*graph.outside, *stock.parameters])
        self._outside = [(tensor, places.get(id(tensor))) for tensor in graph.outside]
        self._parameters = [(tensor, places.get(id(tensor))) for tensor in stock.parameters]
        self._precision = precision_of([*graph.outside, *stock.parameters])
        self._make_loss = type(stock.loss) if isinstance(stock.loss, tuple) else None
        self._replaced = [self._around.same_place(place) for place, _, _ in stock.replaced]
        self._forms = {
            place: TensorForm.of(place.value)
            for place in [*places.values(), *self._replaced]
            if place is not None
        }
        self._twins = {
            place: [p for p in self._around.places if p.value is place.value and p is not place]
            for place in self._forms
        }
        self._traits = [_traits(tensor) for tensor in self._tensors()]
        self._num_tensors = len(set(map(id, self._tensors())))
        self._all_places = [place for _, place in [*self._outside, *self._parameters]]

    def __str__(self) -> str:
        return (
            f"arguments {self.form}: {self.graph.num_operations} operations, captured in "
            f"{self.capture_seconds:.1f} s, compiled and compared in {self.compile_seconds:.1f} s "
            f"({self.backend})"
        )

    def changed_place(self) -> str | None:
        """The name of something the program reads that is no longer as it was, if any."""
        changed = self._around.changed()
        for place in changed:
            now = place.read()
            form = self._forms.get(place)
            if form is None or type(now) is not type(place.value) or TensorForm.of(now) != form:
                return place.name
            if any(other.read() is not now for other in self._twins[place]):
                return place.name  # What was one tensor in two places is not any more.
        for place in changed:
            place.value = place.read()  # Another tensor of the same form: it is taken from there.
        tensors = self._tensors()
        if changed and len(set(map(id, tensors))) < self._num_tensors:
            return changed[0].name  # Two tensors have become one.
        for tensor, traits, at in zip(tensors, self._traits, self._all_places, strict=True):
            if _traits(tensor) != traits:
                return f"the form of {'a tensor' if at is None else at.name}"
        if not all(torch.equal(tensor, values) for tensor, values in self.graph.read):
            return "a tensor of which it reads the number"
        return None

    def _tensors(self) -> list[torch.Tensor]:
        return [t if p is None else p.value for t, p in [*self._outside, *self._parameters]]

    def parameters(self) -> list[torch.Tensor]:
        """The unconstrained parameters, from where they are kept."""
        return [tensor if place is None else place.value for tensor, place in self._parameters]

    def is_due_for_check(self) -> bool:
        """Counts a use; true at the second, fourth, eighth, ... one.

        Programs may depend on what nobody can see from outside.
        """
        self.num_steps += 1
        return self.num_steps & (self.num_steps - 1) == 0

    def __call__(self, leaves: Sequence[Any]) -> tuple[Any, list[torch.Tensor | None]] | None:
        """Loss and gradients; ``None``, and nothing done, if values are not as was assumed."""
        tensors = self._inputs(leaves)
        if self.graph.assumes:
            state = TorchRandomState()
            kept = [(tensors[i], tensors[i].detach().clone()) for i in self.graph.changed]
        outputs = None
        try:
            with torch.no_grad():
                outputs = self._compiled(tensors)
        except (RuntimeError, IndexError):  # An index that is out of range, for instance.
            if not self.graph.assumes:
                raise
        if outputs is None or (self.graph.assumes and not self.graph.holds(outputs)):
            state.restore()
            with torch.no_grad():
                for tensor, values in kept:
                    tensor.detach().copy_(values)
            return None
        self._around.clear_caches()
        result = self.graph.result(outputs)
        last = len(result) - len(self._replaced)
        for place, value in zip(self._replaced, result[last:], strict=True):
            place.write(value)
        first = last - len(self._parameters)
        loss = result[0] if self._make_loss is None else self._make_loss(result[:first])
        return loss, result[first:last]

    def _inputs(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for tensor, place in self._outside:
            tensors.append(tensor if place is None else place.value)
        return tensors

    def compile(self, stock: StockRun, leaves: Sequence[Any], warn: Callable[[str], None]) -> None:
        """Compiles the graph; where that fails it stays as it is.

        Raises:
            CaptureError: If it does not return what Pyro returned.
        """
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        try:
            compiled = compile_graph(self.graph, [*tensors, *self.graph.outside])
            self._compiled, self.backend = compiled, "inductor"
            self.compare(stock, leaves)
        except Exception as err:
            self._compiled, self.backend = interpret(self.graph), "graph"
            self.compare(stock, leaves)
            reason = " ".join(str(err).split())[:300]
            warn(
                f"CompiledSVI: expected torch's compiler to work, got {type(err).__name__}: "
                f"{reason}. The captured graph runs without it, more slowly. Install g++, or "
                "choose mode='graph'."
            )

    def compare(self, stock: StockRun, leaves: Sequence[Any]) -> None:
        """Compares the graph with Pyro's run, from where that began.

        Raises:
            CaptureError: If loss, gradients or effects differ.
        """
        stock.rewind()
        for place in self._around.changed():
            if place in self._forms:
                place.value = place.read()
        result = self(leaves)
        if result is None:
            return  # Pyro's own checks had their say.
        losses, wanted = (x if isinstance(x, tuple) else (x,) for x in (result[0], stock.loss))
        for actual, expected in zip(losses, wanted, strict=True):
            compare("the loss", actual, expected, self._precision)
        largest = max((size_of(g) for g in stock.gradients if g is not None), default=0.0)
        for name, actual, expected in zip(stock.names, result[1], stock.gradients, strict=False):
            if (actual is None) != (expected is None):
                raise CaptureError(f"the gradient of '{name}' exists on one side only")
            if actual is not None:
                compare(f"the gradient of '{name}'", actual, expected, self._precision, largest)
        for place, _, new in stock.replaced:
            compare(place.name, place.read(), new, self._precision)
        stock.compare_end(self._precision)
        self.last_check = self.num_steps


def _traits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What may change of a tensor that stays the same object."""
    hooks = tensor._backward_hooks
    return (
        tensor.requires_grad,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        hooks and tuple(hooks),
        getattr(tensor, "_post_accumulate_grad_hooks", None) and True,
    )
