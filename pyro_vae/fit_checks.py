"""What :func:`pyro_vae.fit` looks at beside the loss: programs, names, non-finite numbers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import nn

from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import frames, is_random, site_log_prob, sites_of, trace_pair

__all__ = ["Snapshot", "check_trained", "find_non_finite", "look_at"]

Programs = Sequence[Callable[..., Any]]


def look_at(programs: Programs, args: Any, num_rows: int) -> Callable[[int], float]:
    """Checks model and guide on the first batch; says how many data a loss stands for.

    A loss sums over the plate that all local sites share. With ``plate(size=N, subsample=...)``
    it is scaled to all N data, whatever the number of rows; else it stands for the rows.
    """
    if len(programs) < 2:  # Not Pyro's SVI: nothing to look into.
        return float
    random_state = pyro.util.get_rng_state()
    try:
        with without_side_effects(*programs):
            pair = trace_pair(programs[0], programs[1], args, {}, "fit")
    finally:
        pyro.util.set_rng_state(random_state)
    local = [f for site in sites_of(pair.model_trace, is_random).values() if (f := frames(site))]
    shared = frozenset.intersection(*local) if local else frozenset()
    full_size = size = 1
    for frame in shared:
        full_size, size = full_size * (frame.full_size), size * frame.size
    if full_size != size:
        return lambda _: full_size
    per_row = size / num_rows if shared else 1.0
    return lambda rows: rows * per_row


def check_trained(programs: Programs) -> None:
    """Raises if a module's parameter got a gradient but is not the one in the param store."""
    if pyro.settings.get("module_local_params"):
        return
    trained = {id(tensor) for _, tensor in pyro.get_param_store().named_parameters()}
    for program in programs:
        if not isinstance(program, pyro.nn.PyroModule):
            continue
        for name, parameter in program.named_parameters():
            if parameter.grad is not None and id(parameter) not in trained:
                raise ValueError(
                    f"fit: expected every parameter of {type(program).__name__} to be trained, "
                    f"got '{name}' whose name in Pyro's param store belongs to another module. "
                    "Give the modules different names, or call pyro.clear_param_store() before "
                    "making a second model."
                )


def find_non_finite(programs: Programs, args: Any) -> str:
    """Says where a loss that is not finite comes from, or nothing if it cannot be found."""
    if len(programs) < 2:
        return ""
    model, guide = programs
    try:
        with without_side_effects(*programs), pyro.validation_enabled(False):
            guide_trace = poutine.trace(guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
            return _first_non_finite(guide_trace, model_trace)
    except Exception:  # The step is reported in any case.
        return ""


def _first_non_finite(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> str:
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sites_of(trace, is_random).items():
            if not torch.as_tensor(site["value"]).isfinite().all():
                what = "observed data" if site["is_observed"] else "sampled value"
                return f", with a non-finite {what} at site '{name}' of the {role}"
            if not site_log_prob(site).isfinite().all():
                return f", with a non-finite log-density at site '{name}' of the {role}"
    return ""


class Snapshot:
    """A copy of all parameters, to go back to when an update has spoilt them."""

    def __init__(self, programs: Programs) -> None:
        self._kept = [(tensor, tensor.detach().clone()) for tensor in _parameters(programs)]

    def restore(self) -> None:
        """Writes the copies back."""
        with torch.no_grad():
            for tensor, copy in self._kept:
                tensor.copy_(copy)


def _parameters(programs: Programs) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    stored = [tensor for _, tensor in pyro.get_param_store().named_parameters()]
    owned = [
        p for program in programs if isinstance(program, nn.Module) for p in program.parameters()
    ]
    for tensor in stored + owned:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
