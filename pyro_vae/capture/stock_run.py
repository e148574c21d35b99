"""Loss and gradients by Pyro, with what is needed to run the same once more."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from pyro_vae.capture.comparison import compare
from pyro_vae.capture.errors import CaptureError
from pyro_vae.capture.recording import Effects
from pyro_vae.capture.surroundings import Surroundings

__all__ = ["ROOTS", "RandomState", "StockRun", "TorchRandomState", "plain_run"]

ROOTS = {
    "model": "model",
    "guide": "guide",
    "objective": "loss",
    "loss_and_grads": "loss_and_grads",
}
"""Attributes of a ``CompiledSVI`` that make its program, with the names that messages give them."""


class TorchRandomState:
    """The states of torch's generators, those of GPUs in use among them."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Puts the states back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def same_in_torch(self, other: "TorchRandomState") -> bool:
        """Whether torch's generators stand where they stood then."""
        pairs = zip([self.torch, *self.cuda], [other.torch, *other.cuda], strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


class RandomState(TorchRandomState):
    """The states of all generators a program may draw from.

    Args:
        own: Generators that the program has for itself.
    """

    def __init__(self, own: Sequence[Any] = ()) -> None:
        super().__init__()
        self.elsewhere = random.getstate(), np.random.get_state()
        self.own = [(generator, _state_of(generator)) for generator in own]

    def restore(self) -> None:
        """Puts the states back."""
        super().restore()
        random.setstate(self.elsewhere[0])
        np.random.set_state(self.elsewhere[1])
        for generator, state in self.own:
            if isinstance(generator, torch.Generator | np.random.RandomState):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state

    def same_elsewhere(self, other: "RandomState") -> bool:
        """Whether the generators of Python and numpy stand where they stood then."""
        (python, numpy), (others, of_numpy) = self.elsewhere, other.elsewhere
        same = all(np.array_equal(a, b) for a, b in zip(numpy, of_numpy, strict=True))
        owned = zip(self.own, other.own, strict=True)
        return python == others and same and all(_is_equal(a, b) for (_, a), (_, b) in owned)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return copy.deepcopy(generator.bit_generator.state)


def _is_equal(state: Any, other: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return torch.equal(state, other)
    if isinstance(state, dict):
        return all(_is_equal(value, other[key]) for key, value in state.items())
    if isinstance(state, tuple):
        return all(_is_equal(a, b) for a, b in zip(state, other, strict=True))
    return bool(np.array_equal(state, other))


class StockRun:
    """A run of Pyro's ``loss_and_grads``.

    After :meth:`rewind` the program may run again from where this run began; after
    :meth:`finish` everything is as this run left it.

    Args:
        svi: Its model, guide and loss are run.
        args: Their arguments.
        kwargs: Their keyword arguments.

    Attributes:
        owner: The attributes of ``svi``.
        loss: The loss, as the ELBO returned it.
        names: Names of its param statements.
        parameters: Their unconstrained parameters, each once.
        gradients: Theirs, ``None`` where there is none.
        replaced: Places where it put another tensor, with the old one and the new one.
        altered: Names of Python objects that it left otherwise than they were.
        iterators: Names of iterators that it may have advanced.
    """

    def __init__(self, svi: Any, args: Any, kwargs: Any) -> None:
        self.owner = vars(svi)
        store = pyro.get_param_store()
        born, around = set(store.keys()), Surroundings(self.owner, ROOTS, store.keys())
        self._around = around
        self.iterators, self._own = around.iterators, around.generators
        self._before, self._effects = RandomState(self._own), Effects()
        with self._effects:
            self.loss, self.parameters, self.gradients, self.names = _run(svi, args, kwargs)
        self._after, self._values = RandomState(self._own), self._effects.values()
        changed = [(place, place.value, place.read()) for place in around.changed()]
        self.replaced = [c for c in changed if all(type(v) is torch.Tensor for v in c[1:])]
        self.altered = [c[0].name for c in changed if c not in self.replaced]
        self.altered += [f"pyro.param('{name}')" for name in set(store.keys()) - born]

    @property
    def draws_elsewhere(self) -> bool:
        """Whether it drew random numbers of Python, of numpy, or of a generator of its own."""
        return not self._after.same_elsewhere(self._before)

    def rewind(self) -> None:
        """Back to where it began: random numbers, tensors, places."""
        self._before.restore()
        self._effects.put_back()
        self._around.clear_caches()
        for place, old, _ in self.replaced:
            place.write(old)

    def compare_end(self, precision: torch.dtype) -> None:
        """Compares where another run, from where this one began, has ended.

        Args:
            precision: That of the arithmetic.

        Raises:
            CaptureError: If it ended elsewhere.
        """
        for tensor, values in self._values:
            compare("a tensor that it changes in place", tensor, values, precision)
        if not TorchRandomState().same_in_torch(self._after):
            raise CaptureError("the graph draws other random numbers than Pyro")

    def finish(self) -> None:
        """Everything as it was at its end."""
        self._after.restore()
        for parameter in self.parameters:
            parameter.grad = None  # A capture that failed half-way has left some.
        with torch.no_grad():
            for tensor, values in self._values:
                tensor.detach().copy_(values)
        for place, _, new in self.replaced:
            place.write(new)


def plain_run(svi: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any], list[Any]]:
    """Loss, parameters and gradients by Pyro, with nothing kept."""
    return _run(svi, args, kwargs)[:3]


def _run(svi: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any], list[Any], list[str]]:
    loss, sites = _loss_and_sites(svi, args, kwargs)
    parameters = list({id(p): p for p in map(_unconstrained, sites.values())}.values())
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return loss, parameters, gradients, list(sites)


def _loss_and_sites(svi: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Runs ``loss_and_grads``: the loss, and the values of param statements by name."""
    with poutine.trace(param_only=True) as tracer:
        loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
    loss = tuple(map(_detached, loss)) if isinstance(loss, tuple) else _detached(loss)
    return loss, {name: site["value"] for name, site in tracer.trace.nodes.items()}


def _detached(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, torch.Tensor) else loss


def _unconstrained(value: Any) -> torch.Tensor:
    """The parameter behind the value of a param statement."""
    # With module_local_params the parameters of plain modules come without Pyro's mark.
    return value.unconstrained() if hasattr(value, "unconstrained") else value
