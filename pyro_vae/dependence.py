"""Which latents of a program depend on one another's values."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.util import site_is_subsample

from pyro_vae.densities import unchecked
from pyro_vae.traces import Site, is_latent, sites_of

__all__ = ["dependent_latents", "provenance"]


def provenance(program: Callable[[], Any]) -> dict[str, frozenset[str]]:
    """For every latent of a program, the latents that its distribution is computed from.

    Values are followed through one run. Some operations stop this: they raise, or lose track
    where values are written into another tensor.
    """
    with TrackProvenance():
        trace = poutine.trace(program).get_trace()
    latents = sites_of(trace, is_latent)
    return {
        name: get_provenance(site["fn"].log_prob(detach_provenance(site["value"]))) & set(latents)
        for name, site in latents.items()
    }


def dependent_latents(program: Callable[[], Any], trace: poutine.Trace) -> set[str]:
    """The latents whose distribution is not fixed by the arguments of the program.

    They depend on another latent's value, or on random numbers drawn outside any site. Beside
    the provenance of the values, the program's distributions in two runs are compared.

    Args:
        program: A model or guide, bound to its arguments; side effects are the caller's concern.
        trace: A trace of it.
    """
    latents = sites_of(trace, is_latent)
    found = set[str]()
    if len(latents) > 1:
        try:
            found = {name for name, others in provenance(program).items() if others}
        except Exception:  # Not knowing: the second run tells.
            pass
    rows = poutine.Trace()
    for name, site in sites_of(trace, site_is_subsample).items():
        rows.add_node(name, **site)
    again = poutine.trace(poutine.replay(program, trace=rows)).get_trace()
    for name, site in latents.items():
        other: Site = again.nodes[name]
        # A support may move with another latent.
        first, second = (unchecked(s["fn"]).log_prob(site["value"]) for s in (site, other))
        tolerance = torch.finfo(first.dtype).eps ** 0.5
        if not torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True):
            found.add(name)
    return found
