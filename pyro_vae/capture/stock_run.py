"""Loss and gradients by Pyro, with what is needed to run the same once more."""

import random
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from pyro_vae.capture.comparison import compare
from pyro_vae.capture.errors import CaptureError
from pyro_vae.capture.recording import Effects
from pyro_vae.capture.surroundings import Surroundings

__all__ = ["RandomState", "StockRun", "loss_and_sites", "unconstrained"]


class RandomState:
    """The states of all generators a program may draw from."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.elsewhere = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Puts the states back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.elsewhere[0])
        np.random.set_state(self.elsewhere[1])

    def same_in_torch(self, other: "RandomState") -> bool:
        """Whether torch's generators stand where they stood then."""
        pairs = zip([self.torch, *self.cuda], [other.torch, *other.cuda], strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def same_elsewhere(self, other: "RandomState") -> bool:
        """Whether the generators of Python and numpy stand where they stood then."""
        (python, numpy), (others, of_numpy) = self.elsewhere, other.elsewhere
        same = all(np.array_equal(a, b) for a, b in zip(numpy, of_numpy, strict=True))
        return python == others and same


class StockRun:
    """A run of Pyro's ``loss_and_grads``.

    After :meth:`rewind` the program may run again from where this run began; after
    :meth:`finish` everything is as this run left it.

    Args:
        svi: Its model, guide and loss are run.
        args: Their arguments.
        kwargs: Their keyword arguments.

    Attributes:
        loss: The loss, as the ELBO returned it.
        names: Names of its param statements.
        parameters: Their unconstrained parameters, each once.
        gradients: Theirs, ``None`` where there is none.
        replaced: Places where it put another tensor, with the old one and the new one.
        altered: Names of Python objects that it left otherwise than they were.
    """

    def __init__(self, svi: Any, args: Any, kwargs: Any) -> None:
        self.roots = {"model": svi.model, "guide": svi.guide, "loss": svi.objective}
        store = pyro.get_param_store()
        born, around = set(store.keys()), Surroundings(self.roots, store.keys())
        self._before, self._effects = RandomState(), Effects()
        with self._effects:
            self.loss, sites = loss_and_sites(svi, args, kwargs)
        self._after, self._values = RandomState(), self._effects.values()
        self.names = list(sites)
        self.parameters = list({id(p): p for p in map(unconstrained, sites.values())}.values())
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        changed = [(place, place.value, place.read()) for place in around.changed()]
        self.replaced = [c for c in changed if all(type(v) is torch.Tensor for v in c[1:])]
        self.altered = [c[0].name for c in changed if c not in self.replaced]
        self.altered += [f"pyro.param('{name}')" for name in set(store.keys()) - born]

    @property
    def draws_elsewhere(self) -> bool:
        """Whether it drew random numbers of Python or numpy."""
        return not self._after.same_elsewhere(self._before)

    def rewind(self) -> None:
        """Back to where it began: random numbers, tensors, places."""
        self._before.restore()
        self._effects.put_back()
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
        if not RandomState().same_in_torch(self._after):
            raise CaptureError("the graph draws other random numbers than Pyro")

    def finish(self) -> None:
        """Everything as it was at its end."""
        self._after.restore()
        with torch.no_grad():
            for tensor, values in self._values:
                tensor.detach().copy_(values)
        for place, _, new in self.replaced:
            place.write(new)


def loss_and_sites(svi: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Runs ``loss_and_grads``: the loss, and the values of param statements by name."""
    with poutine.trace(param_only=True) as tracer:
        loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
    loss = tuple(map(_detached, loss)) if isinstance(loss, tuple) else _detached(loss)
    return loss, {name: site["value"] for name, site in tracer.trace.nodes.items()}


def _detached(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, torch.Tensor) else loss


def unconstrained(value: Any) -> torch.Tensor:
    """The parameter behind the value of a param statement."""
    # With module_local_params the parameters of plain modules come without Pyro's mark.
    return value.unconstrained() if hasattr(value, "unconstrained") else value
