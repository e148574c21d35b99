"""The loop around ``svi.step``: progress, validation, history, and a stop at the first bad loss."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pyro_vae.checks import check_at_least, explained
from pyro_vae.fit_checks import Fault, Snapshot, check_trained, find_non_finite, look_at
from pyro_vae.history import History
from pyro_vae.isolation import evaluation_mode

__all__ = ["fit"]

_RESTORED = "Parameters are back at the start of this epoch, the optimizer's state is not."


class Steppable(Protocol):
    """What ``pyro.infer.SVI`` offers, and anything like it."""

    def step(self, *args: Any, **kwargs: Any) -> float: ...
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float: ...


class HasStep(Protocol):
    """A schedule: ours, or a learning-rate scheduler of Pyro."""

    def step(self) -> Any: ...


def fit(
    svi: Any,
    batches: Iterable[Any],
    num_epochs: int,
    *,
    validation: Iterable[Any] | None = None,
    schedules: Sequence[HasStep] = (),
    progress: bool = True,
) -> History:
    """Trains ``svi`` on batches and returns the course of its loss.

    A batch is what ``svi.step`` takes: a tensor, a mapping of tensors, or a tuple or list of
    several arguments. Losses are in nats per datum: the sum over all data of an epoch over
    their number, also where the last batch is short or a plate scales a subsample up. Before
    the first step model and guide are run once on the first batch, without effect on parameters
    or random numbers, to say in plain words what does not fit.

    Args:
        svi: ``pyro.infer.SVI`` or any object with its ``step`` and ``evaluate_loss``.
        batches: A collection that can be walked once an epoch, such as
            ``pyro_vae.datasets.Batches`` or a ``DataLoader``.
        num_epochs: How often.
        validation: Batches on which ``evaluate_loss`` runs after each epoch, in eval mode.
        schedules: Objects whose ``step`` is called after each training step.
        progress: Whether to show a progress bar.

    Returns:
        The history. A keyboard interrupt ends training early and returns what there is.

    Raises:
        ValueError: If the batches do not fit the programs, see the message; if there are none.
        FloatingPointError: If a training loss or a parameter is not finite. The message names
            the step and, where it can be found, the site; parameters are those of the start of
            that epoch.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> history = fit(svi, [torch.tensor([1.0, 3.0])], 100, progress=False)
        >>> round(pyro.param("loc").item(), 1)
        2.0
    """
    check_at_least("fit", "num_epochs", num_epochs, 1)
    if num_epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"fit: expected batches that can be walked {num_epochs} times, got an iterator that "
            "ends after one epoch. Pass a list, a DataLoader or pyro_vae.datasets.Batches."
        )
    history = History()
    loop = _Loop(svi, schedules)
    with _bar(batches, num_epochs, progress) as bar:
        try:
            for epoch in range(num_epochs):
                start = time.perf_counter()
                bar.set_description(f"epoch {epoch + 1}/{num_epochs}")
                loss = loop.train(batches, bar)
                validation_loss = None if validation is None else loop.validate(validation)
                history.append(loss, validation_loss, time.perf_counter() - start)
        except KeyboardInterrupt:
            history.interrupted = True
    return history


class _Loop:
    """State of a training run: how losses are normalised, and where the last epoch began."""

    def __init__(self, svi: Steppable, schedules: Sequence[HasStep]) -> None:
        self.svi = svi
        self.schedules = schedules
        self.programs = [p for n in ("model", "guide") if callable(p := getattr(svi, n, None))]
        self.num_data: dict[str, Callable[[int], float]] = {}
        self.num_steps = 0

    def train(self, batches: Iterable[Any], bar: "tqdm[Any]") -> float:
        """One epoch; returns its loss per datum."""
        snapshot = Snapshot(self.programs)
        mean = _Mean()
        for args in map(_as_arguments, batches):
            rows = _num_rows(args)
            if "batches" not in self.num_data:
                self.num_data["batches"], snapshot = look_at(self.programs, args, rows)
            loss = self.step(args, snapshot)
            for schedule in self.schedules:
                schedule.step()
            mean.add(loss / self.num_data["batches"](rows), rows)
            bar.update()
            bar.set_postfix_str(f"loss {mean.value:.3f} nats per datum", refresh=False)
        if spoilt := snapshot.spoilt():
            snapshot.restore()
            raise FloatingPointError(
                f"fit: expected finite parameters, got '{spoilt[0]}' with NaN or infinite values "
                f"after step {self.num_steps}. {_RESTORED} {Fault().fix}"
            )
        return mean.value_of("batches")

    def step(self, args: tuple[Any, ...], snapshot: Snapshot) -> float:
        """One step of SVI, which must come out finite."""
        failure = None
        try:
            result = self.svi.step(*args)
            if isinstance(result, tuple):
                raise TypeError(
                    f"fit: expected svi.step to return one loss, got {len(result)}. Wrap the "
                    "object so that its step returns the loss to follow."
                )
            loss = float(result)
        except (ValueError, RuntimeError) as err:  # Distributions refuse NaN under validation.
            failure, loss = err, math.nan
        if math.isfinite(loss):
            self.num_steps += 1
            if self.num_steps == 1:
                check_trained(self.programs, snapshot)
            return loss
        # The update may have spoilt the parameters, then only the old ones show the origin.
        after = find_non_finite(self.programs, args)
        if failure and not after.origin and not snapshot.spoilt():
            raise failure
        snapshot.restore()
        before = find_non_finite(self.programs, args)
        fault = before if before.origin else after
        raise FloatingPointError(
            f"fit: expected a finite loss, got {loss} at step {self.num_steps + 1}{fault.origin}. "
            f"{_RESTORED} {fault.fix}"
        ) from failure

    def validate(self, batches: Iterable[Any]) -> float:
        """Loss per datum over the validation batches, modules in eval mode."""
        mean = _Mean()
        with evaluation_mode(*self.programs):
            for args in map(_as_arguments, batches):
                rows = _num_rows(args)
                if "validation" not in self.num_data:
                    self.num_data["validation"], _ = look_at(self.programs, args, rows)
                with explained("fit", args):
                    loss = float(self.svi.evaluate_loss(*args))
                mean.add(loss / self.num_data["validation"](rows), rows)
        return mean.value_of("validation")


class _Mean:
    """Mean over data of a quantity that comes as means over batches."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.total, self.count = self.total + value * count, self.count + count

    @property
    def value(self) -> float:
        return self.total / self.count

    def value_of(self, name: str) -> float:
        if not self.count:
            raise ValueError(
                f"fit: expected at least one batch in {name}, got none. "
                "An iterator that was walked before is empty; pass a list or a DataLoader."
            )
        return self.value


def _as_arguments(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _num_rows(args: tuple[Any, ...]) -> int:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        raise TypeError(
            f"fit: expected batches of tensors, got {type(args[0]).__name__ if args else 'none'}. "
            "Convert the data with torch.as_tensor."
        )
    if not len(tensors[0]):
        raise ValueError(
            "fit: expected at least one row of data in every batch, got an empty one of shape "
            f"{tuple(tensors[0].shape)}. Leave empty batches out."
        )
    return len(tensors[0])


def _bar(batches: Iterable[Any], num_epochs: int, progress: bool) -> "tqdm[Any]":
    total = num_epochs * len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, unit="step", disable=not progress, leave=True, mininterval=0.5)
