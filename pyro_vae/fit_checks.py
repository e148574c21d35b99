"""What :func:`pyro_vae.fit` looks at beside the loss: programs, names, non-finite numbers."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch.nn.parameter import is_lazy

from pyro_vae.checks import NOT_FINITE_FIX
from pyro_vae.isolation import root_modules, same_random_numbers_again, without_side_effects
from pyro_vae.pairs import trace_pair
from pyro_vae.traces import (
    frames,
    is_latent,
    is_observed,
    is_random,
    masked,
    plates_over_data,
    site_log_prob,
    sites_of,
)

__all__ = ["Fault", "Snapshot", "check_trained", "find_non_finite", "look_at"]

Programs = Sequence[Callable[..., Any]]


def look_at(
    programs: Programs, args: Any, num_rows: int
) -> tuple[Callable[[int], float], "Snapshot"]:
    """Checks model and guide on a batch, without side effects.

    Returns:
        How many data the loss of a batch with some number of rows stands for, and a copy of the
        parameters, those included that are born when the programs run.
    """
    if len(programs) < 2:  # Not Pyro's SVI: nothing to look into.
        return float, Snapshot(programs)
    with same_random_numbers_again(), without_side_effects(*programs):
        pair = trace_pair(programs[0], programs[1], args, {}, "fit")
        return _num_data(pair.model_trace, num_rows), Snapshot(programs)


def _num_data(model_trace: poutine.Trace, num_rows: int) -> Callable[[int], float]:
    """A loss sums over the plate that all local sites share.

    With ``plate(size=N, subsample=...)`` it is scaled to all N data, whatever the number of rows;
    else it stands for the rows.
    """
    random, observed = sites_of(model_trace, is_random), sites_of(model_trace, is_observed)
    shared = plates_over_data(map(frames, random.values()), map(frames, observed.values()))
    full_size, size = prod(f.full_size for f in shared), prod(f.size for f in shared)
    if full_size != size:
        return lambda _: full_size
    per_row = size / num_rows if shared else 1.0
    return lambda rows: rows * per_row


def check_trained(programs: Programs, snapshot: "Snapshot") -> None:
    """Looks for modules that a step should have trained and did not.

    Args:
        programs: Model and guide.
        snapshot: What they were before the step.

    Raises:
        ValueError: If a parameter of a ``PyroModule`` got a gradient but is not the one in the
            param store. A plain module may be left out on purpose, so that is a warning.
    """
    if pyro.settings.get("module_local_params"):
        return
    trained = {id(tensor) for _, tensor in pyro.get_param_store().named_parameters()}
    for root in (root for program in programs for root in root_modules(program)):
        for name, parameter in root.named_parameters():
            if parameter.grad is None or id(parameter) in trained | snapshot.graded:
                continue
            before = snapshot.before(parameter)
            if before is not None and not parameter.equal(before):
                continue  # Another optimizer moves it.
            what = f"every parameter of {type(root).__name__} to be trained, got '{name}'"
            if isinstance(root, pyro.nn.PyroModule):
                raise ValueError(
                    f"fit: expected {what} which is not in Pyro's param store under its name: it "
                    "belongs to another module, or the module was not called as a whole. Give the "
                    "modules different names, or call pyro.clear_param_store() before training a "
                    "second model or a copy."
                )
            warnings.warn(
                f"fit: expected {what} that gets a gradient and is not in Pyro's param store. "
                "Register the module with pyro.module under a name of its own, or set "
                "requires_grad_(False) if it is meant to stay as it is.",
                stacklevel=4,
            )
            break


class Fault(NamedTuple):
    """Where a loss that is not finite comes from, as part of a sentence, and what to do."""

    origin: str = ""
    fix: str = "Try a smaller learning rate or gradient clipping."


def find_non_finite(programs: Programs, args: Any) -> Fault:
    """Looks for the first non-finite number; the origin is empty if it cannot be found."""
    if len(programs) < 2:
        return Fault()
    model, guide = programs
    try:
        with without_side_effects(*programs), pyro.validation_enabled(False):
            guide_trace = poutine.trace(guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
            return _first_non_finite(guide_trace, model_trace)
    except Exception:  # The step is reported in any case.
        return Fault()


def _first_non_finite(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> Fault:
    for name, site in sites_of(model_trace, is_observed).items():
        spoilt = ~torch.as_tensor(site["value"]).isfinite()
        if event_dim := site["fn"].event_dim:
            spoilt = spoilt.flatten(-event_dim).any(-1)
        if masked(spoilt.double(), site["mask"]).any():
            origin = f", with non-finite observed data at site '{name}' of the model"
            return Fault(origin, NOT_FINITE_FIX)
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sites_of(trace, is_random).items():
            if is_latent(site) and not torch.as_tensor(site["value"]).isfinite().all():
                return Fault(f", with non-finite sampled values at site '{name}' of the {role}")
            if not site_log_prob(site).isfinite().all():
                return Fault(f", with a non-finite log-density at site '{name}' of the {role}")
    return Fault()


class Snapshot:
    """A copy of all parameters and buffers, to go back to when an update has spoilt them.

    Attributes:
        graded: Ids of the parameters that had a gradient already.
    """

    def __init__(self, programs: Programs) -> None:
        self._stored = {name: (t, t.detach().clone()) for name, t in _stored().items()}
        in_store = {id(tensor) for tensor, _ in self._stored.values()}
        owned = list(_owned(programs))
        self.graded = {id(tensor) for _, tensor in owned if tensor.grad is not None}
        self._owned = [
            (name, tensor, tensor.detach().clone())
            for name, tensor in owned
            if id(tensor) not in in_store
        ]

    def before(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The copy of a module's parameter."""
        return next((copy for _, kept, copy in self._owned if kept is tensor), None)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Names, tensors and their copies."""
        yield from self._owned
        stored = _stored()
        for name, (tensor, copy) in self._stored.items():
            yield name, tensor, copy
            if stored.get(name, tensor) is not tensor:  # Born again after the first look.
                yield name, stored[name], copy

    def spoilt(self) -> list[str]:
        """Names of what was finite and is no longer."""
        return [
            name
            for name, tensor, copy in self._tensors()
            if copy.isfinite().all() and not tensor.isfinite().all()
        ]

    def restore(self) -> None:
        """Writes the copies back."""
        with torch.no_grad():
            for _, tensor, copy in self._tensors():
                if not tensor.equal(copy):
                    tensor.copy_(copy)


def _stored() -> dict[str, torch.Tensor]:
    """The unconstrained parameters in Pyro's store."""
    return dict(pyro.get_param_store().named_parameters())


def _owned(programs: Programs) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the modules that can be seen from outside."""
    for root in (root for program in programs for root in root_modules(program)):
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            if not is_lazy(tensor):  # It has no values before the first run.
                yield name, tensor
