"""``CompiledSVI``: a drop-in for ``pyro.infer.SVI`` that runs captured graphs."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
)
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vae.capture.errors import CaptureError
from pyro_vae.capture.forms import Form, form_of
from pyro_vae.capture.step import CapturedStep, capture_step
from pyro_vae.capture.stock_run import StockRun, plain_run
from pyro_vae.updates import Update

__all__ = ["CaptureError", "CompiledSVI"]

logger = logging.getLogger(__name__)

_JIT_ELBOS = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class CompiledSVI:
    r"""Takes the steps of ``pyro.infer.SVI`` from graphs captured once.

    The first step is Pyro's own. The second runs loss and gradient once more to record their
    tensor operations, hands the graph to torch's compiler, and compares what it returns with
    Pyro under the same random numbers; from then on a step is one call of the graph and one
    update of all parameters. Parameters stay where they were, in the param store and the
    modules, and random numbers are those that Pyro would draw.

    A program has to be static: the same operations for all data of one shape. Where it is not,
    :class:`CompiledSVI` says why and takes Pyro's steps, see ``docs/compiled.md``.

    Args:
        model: The model.
        guide: The guide.
        optim: An optimizer of Pyro, or one of torch that was given the parameters.
        loss: An ELBO, one of our objectives, or a function ``loss(model, guide, *args)``.
        loss_and_grads: With a function as loss, a function that returns the loss and leaves
            gradients in ``.grad``; without it, the loss is differentiated.
        mode: ``"inductor"`` to compile graphs, ``"graph"`` to run their operations one by one,
            which needs no compiler and starts at once.
        strict: Whether to raise where a program cannot be captured.
        max_graphs: How many graphs to keep, one for each shape of the arguments. Further shapes
            run uncompiled.

    Attributes:
        graphs: The graphs so far, with the seconds it took to capture and to compile them.

    Raises:
        CaptureError: With ``strict``, where a program cannot be captured.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> optim = pyro.optim.Adam({"lr": 0.1})
        >>> svi = CompiledSVI(model, lambda x: None, optim, Trace_ELBO(), mode="graph")
        >>> for _ in range(100):
        ...     loss = svi.step(torch.tensor([1.0, 3.0]))
        >>> round(pyro.param("loc").item(), 1)
        2.0
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim | torch.optim.Optimizer,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        mode: Literal["inductor", "graph"] = "inductor",
        strict: bool = False,
        max_graphs: int = 8,
    ) -> None:
        if not isinstance(optim, PyroOptim | torch.optim.Optimizer):
            raise TypeError(
                f"CompiledSVI: expected optim to be an optimizer of pyro.optim or torch.optim, got "
                f"{type(optim).__name__}. Pass pyro.optim.Adam({{'lr': 1e-3}})."
            )
        if mode not in ("inductor", "graph"):
            raise ValueError(
                f"CompiledSVI: expected mode 'inductor' or 'graph', got {mode!r}. "
                "'inductor' compiles, 'graph' needs no compiler."
            )
        if max_graphs < 1:
            raise ValueError(
                f"CompiledSVI: expected max_graphs >= 1, got {max_graphs}. Use pyro.infer.SVI to "
                "run without graphs."
            )
        self.model, self.guide, self.optim = model, guide, optim
        self.mode, self.strict, self.max_graphs = mode, strict, max_graphs
        self.graphs: list[CapturedStep] = []
        self.objective = loss
        of_elbo = issubclass(type(loss), ELBO)
        self.loss: Callable[..., Any] = loss.loss if of_elbo else loss
        self.loss_and_grads: Callable[..., Any] = (
            loss.loss_and_grads if of_elbo else loss_and_grads or _gradients_of(loss)
        )
        self._update, self._update_by = Update(optim), optim
        self._by_form: dict[Form, list[CapturedStep]] = {}
        self._failures: dict[Form, int] = {}
        self._refused: set[Form] = set()
        self._warned: set[str] = set()
        self._num_steps = 0
        self._last: CapturedStep | None = None
        self._graded: dict[int, torch.Tensor] = {}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One gradient step on a batch.

        Returns:
            The loss as a float, nats, summed over all data, as ``SVI.step`` returns it.
        """
        loss = self.step_tensor(*args, **kwargs)
        return type(loss)(map(_item, loss)) if isinstance(loss, tuple) else _item(loss)

    def step_tensor(self, *args: Any, **kwargs: Any) -> Any:
        """One gradient step, without waiting for it on a GPU.

        Returns:
            The loss as a 0-d tensor on the device, without gradient.
        """
        self._last = None
        leaves, spec = tree_flatten((args, kwargs))
        form = form_of(leaves, spec)
        if form is not None and not _PYRO_STACK and form not in self._refused:
            for known in self._by_form.get(form, ()):
                if known.changed_place() is None:
                    return self._run(known, leaves, args, kwargs)
            if self._num_steps:  # Parameters are born, and first looks taken, in the first step.
                return self._first_run(form, leaves, args, kwargs)
        elif form is None:
            self._refuse(None, "an argument is neither a tensor nor a plain number or string")
        return self._stock_step(args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss on a batch, a float, nats; no parameter moves."""
        with torch.no_grad():
            loss = self.loss(self.model, self.guide, *args, **kwargs)
        if isinstance(loss, tuple):
            return type(loss)(map(torch_item, loss))
        return torch_item(loss)

    def epoch(
        self,
        *data: Any,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        schedules: Sequence[Any] = (),
    ) -> torch.Tensor:
        """One pass over data in memory, a step for every batch.

        Args:
            data: What ``step`` takes, with all rows: tensors of one length, or mappings of them.
            batch_size: Rows in a batch.
            shuffle: Whether to draw a new order of the rows, from torch's global generator.
            drop_last: Whether to leave out a last batch that is shorter.
            schedules: Objects whose ``step`` is called after each step, as in ``fit``.

        Returns:
            The losses of the steps, ``(num_batches,)``, as ``step`` returns them.

        Raises:
            ValueError: If there is no row, or if tensors have different lengths.
        """
        leaves, spec = tree_flatten(data)
        num_rows = _num_rows(leaves)
        if batch_size < 1:
            raise ValueError(
                f"CompiledSVI.epoch: expected batch_size >= 1, got {batch_size}. Give the number "
                "of rows in a batch."
            )
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        order = torch.randperm(num_rows) if shuffle else torch.arange(num_rows)
        batches = order.to(device).split(batch_size)
        if drop_last and num_rows % batch_size:
            batches = batches[:-1]
        losses, known, num_known = [], None, 0
        for rows in batches:
            batch = [_rows(leaf, rows) for leaf in leaves]
            args = tree_unflatten(batch, spec)
            # After a graph nothing has changed that a program reads, but for schedules.
            if known is not None and len(rows) == num_known and not schedules:
                loss = self._run(known, batch, args, {})
            else:
                loss = self.step_tensor(*args)
                num_known = len(rows)
            known = self._last
            losses.append(torch.as_tensor(loss))
            for schedule in schedules:
                schedule.step()
        if not losses:
            raise ValueError(
                f"CompiledSVI.epoch: expected at least one batch of {batch_size} rows, got "
                f"{num_rows} rows. Make batches smaller, or drop_last=False."
            )
        result = torch.stack(losses)
        warn_if_nan(result, "loss")
        return result

    def summary(self) -> str:
        """What was captured: a line for each graph, with its seconds."""
        if not self.graphs:
            return "no graph so far"
        return "\n".join(str(graph) for graph in self.graphs)

    def _run(self, known: CapturedStep, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        self._last = None
        if known.is_due_for_check():
            return self._checked_run(known, leaves, args, kwargs)
        result = known(leaves)
        if result is None:  # A check of values came out otherwise: Pyro says why, or goes on.
            return self._stock_step(args, kwargs)
        loss, gradients = result
        self._apply(known.parameters(), gradients)
        self._last = known
        return loss

    def _first_run(self, form: Form, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """Pyro's step, of which a graph is made on the way."""
        if len(self.graphs) >= self.max_graphs:
            self._refuse(form, self._too_many(form))
            return self._stock_step(args, kwargs)
        if isinstance(self.objective, _JIT_ELBOS):
            self._refuse(form, "torch.jit compiles its loss. Pass the ELBO without 'Jit'")
            return self._stock_step(args, kwargs)
        stock = StockRun(self, args, kwargs)
        try:
            captured = capture_step(self, stock, form, leaves, self._warn)
        except CaptureError as err:
            self._failures[form] = self._failures.get(form, 0) + 1
            # What the first runs on a form alter may be caches; then the next ones do not.
            if not stock.altered or self._failures[form] > 2:
                self._refuse(form, str(err), err)
        else:
            self.graphs.append(captured)
            self._by_form.setdefault(form, []).append(captured)
            logger.info("%s", captured)
        finally:
            stock.finish()
        return self._after(stock)

    def _checked_run(self, known: CapturedStep, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """Pyro's step, with which a graph is compared that was used for some time."""
        stock = StockRun(self, args, kwargs)
        try:
            known.compare(stock, leaves)
        except CaptureError as err:
            self._by_form[known.form].remove(known)
            self.graphs.remove(known)
            self._refuse(
                known.form,
                f"{err}. This was found at step {known.num_steps} of the graph; the steps since "
                f"step {known.last_check} may be wrong",
                err,
            )
        finally:
            stock.finish()
        return self._after(stock)

    def _stock_step(self, args: Any, kwargs: Any) -> Any:
        loss, parameters, gradients = plain_run(self, args, kwargs)
        self._apply(parameters, gradients)
        self._num_steps += 1
        return loss

    def _after(self, stock: StockRun) -> Any:
        self._apply(stock.parameters, stock.gradients)
        self._num_steps += 1
        return stock.loss

    def _apply(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Updates the parameters; one that had a gradient before has a zero one now, as in SVI."""
        moved, by = [], []
        adds = isinstance(self.optim, PyroOptim)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if adds and parameter.grad is not None:  # The user's own, which SVI adds to its.
                gradient = parameter.grad if gradient is None else parameter.grad + gradient
                parameter.grad = None
            if gradient is None:
                if id(parameter) not in self._graded:
                    continue
                gradient = torch.zeros_like(parameter)
            else:
                self._graded.setdefault(id(parameter), parameter)
            moved.append(parameter)
            by.append(gradient)
        if moved:
            if self._update_by is not self.optim:  # A user put another one in its place.
                self._update, self._update_by = Update(self.optim), self.optim
            self._update(moved, by)

    def _refuse(self, form: Form | None, reason: str, cause: Exception | None = None) -> None:
        """Goes on with Pyro's steps for arguments of a form, or raises."""
        if form is not None:
            self._refused.add(form)
        message = f"CompiledSVI: expected a program that a graph can hold, but {reason}."
        if self.strict:
            raise CaptureError(message + " Use pyro.infer.SVI, or strict=False.") from cause
        self._warn(message + " These steps are taken by Pyro, uncompiled.")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=5)

    def _too_many(self, form: Form) -> str:
        changing = [g.changed_place() for g in self._by_form.get(form, ())]
        named = next((name for name in changing if name), None)
        if named is not None:
            return (
                f"{named} changes from step to step, and {self.max_graphs} graphs are kept. Make "
                "it a tensor that is updated in place"
            )
        return (
            f"its arguments have more forms than the {self.max_graphs} graphs that are kept. Use "
            "batches of one shape and tensors instead of numbers, or raise max_graphs"
        )


def _gradients_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """What SVI does with a loss that is a function."""

    def loss_and_grads(*args: Any, **kwargs: Any) -> Any:
        value = loss(*args, **kwargs)
        if getattr(value, "requires_grad", False):
            value.backward(retain_graph=True)
        return value

    return loss_and_grads


def _item(loss: Any) -> float:
    value = torch_item(loss)
    warn_if_nan(value, "loss")
    return value


def _num_rows(leaves: Sequence[Any]) -> int:
    lengths = {len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
    if len(lengths) != 1 or not max(lengths):
        raise ValueError(
            f"CompiledSVI.epoch: expected tensors with the same number of rows, at least 1, got "
            f"{sorted(lengths)}. Give all data, with examples along the first dimension."
        )
    return lengths.pop()


def _rows(leaf: Any, rows: torch.Tensor) -> Any:
    return leaf.index_select(0, rows) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf
