"""Sites that are drawn although data exist for them, and what depends on their values."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.poutine.messenger import Messenger

from pyro_vae.densities import unchecked
from pyro_vae.handlers import replay_values
from pyro_vae.traces import is_latent, is_observed, sites_of

__all__ = ["DrawMessenger", "moved_by", "unmasked"]


class DrawMessenger(Messenger):
    """Draws observed sites, whatever value they have. A factor has none to draw.

    Args:
        names: Which sites; by default all.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: Any) -> None:
        wanted = self._names is None or msg["name"] in self._names
        if wanted and is_observed(msg) and not isinstance(msg["fn"], Unit):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def moved_by(
    program: Callable[[], Any],
    trace: poutine.Trace,
    values: Mapping[str, torch.Tensor],
    among: Collection[str],
) -> list[str]:
    """The sites ``among`` these whose distribution changes with the values of latents.

    Args:
        program: A model bound to its arguments.
        trace: A trace of it.
        values: Other values of some of its latents; all others stay as they are in the trace.
        among: The sites in question.
    """
    kept = {name: site["value"] for name, site in sites_of(trace, is_latent).items()}

    def moved(changes: Mapping[str, torch.Tensor]) -> list[str]:
        again = poutine.trace(replay_values(program, {**kept, **changes})).get_trace()
        return [n for n in among if not _same(trace.nodes[n]["fn"], again.nodes[n]["fn"])]

    found = moved(values)
    # Random numbers drawn outside any site move a distribution too, whatever the values.
    by_themselves = moved({}) if found else []
    return [name for name in found if name not in by_themselves]


def _same(first: Any, second: Any) -> bool:
    """Whether two distributions of a site are equal, judged at a draw from the first."""
    first, second = unchecked(unmasked(first)), unchecked(unmasked(second))
    x = first.sample()  # What is observed may be a mark for "missing".
    before, after = first.log_prob(x), second.log_prob(x)
    tolerance = torch.finfo(before.dtype).eps ** 0.5
    return torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True)


def unmasked(fn: Any) -> Any:
    """A distribution without masks around it, which hide its mode and its densities."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn
