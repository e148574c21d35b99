"""The codes a program gives a whole data set: one latent site, checked, a row for each datum."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution

from pyro_vae.checks import check_arguments, explained, refuse_subsampling
from pyro_vae.dependence import dependent_latents
from pyro_vae.handlers import stop_after
from pyro_vae.traces import Site, frames, is_latent, mask_of, masks_elements, sites_of

__all__ = ["CodeSite"]


class CodeSite:
    """A latent site of a program that runs on a whole data set.

    Args:
        program: A model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: Which latent; ``None`` for the only one.
        where: The function that asks, for the messages.
        role: "model" or "guide", for the messages.

    Attributes:
        name: Name of the site.
        fn: Its distribution, with one batch dimension that is not 1, that of the N data.
        kept: Which rows are data: those that no mask leaves out, ``(N,)``.
        is_fixed: Whether the arguments fix the distribution, whatever else is drawn.

    Raises:
        ValueError: If the data are empty, subsampled at random or all masked out; the program
            has no such latent, or several and ``name`` is ``None``; the site is not in exactly
            one plate, or a mask divides a code.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        name: str | None,
        where: str,
        role: str,
    ) -> None:
        self._program, self._args, self._kwargs = program, args, kwargs
        self._where, self._role = where, role
        check_arguments(where, (args, kwargs))
        trace = self._run(name)
        self.name = self._choose(trace, name)
        site: Site = trace.nodes[self.name]
        self._check_plate(site)
        self.fn: TorchDistribution = site["fn"]
        self.kept = self._kept(site)
        dependent = dependent_latents(lambda: self._run(name), trace)
        self.is_fixed = self.name not in dependent

    def run(self) -> Site:
        """Runs the program once more and returns the site, with other draws of all latents."""
        return self._run(self.name).nodes[self.name]

    def _run(self, until: str | None) -> poutine.Trace:
        """A trace that ends at that site: a decoder behind it need not see all the data."""
        with (
            explained(self._where, (self._args, self._kwargs)),
            refuse_subsampling(self._where),
            poutine.trace() as tracer,
            stop_after([until] if until else []),
        ):
            self._program(*self._args, **self._kwargs)
        return tracer.trace

    def _choose(self, trace: poutine.Trace, name: str | None) -> str:
        # Auxiliary latents are no part of the model: something else is made of them.
        latents = sites_of(trace, lambda s: is_latent(s) and not s["infer"].get("is_auxiliary"))
        if name is None and len(latents) == 1:
            return next(iter(latents))
        if name is None or name not in latents:
            got = "none" if name is None else f"'{name}'"
            raise ValueError(
                f"{self._where}: expected site to be one of the {self._role}'s latents "
                f"{list(latents)}, got {got}. Name the site you mean with site=..."
            )
        return name

    def _check_plate(self, site: Site) -> None:
        plates, batch_shape = frames(site), site["fn"].batch_shape
        if len(plates) != 1 or math.prod(batch_shape) != next(iter(plates)).size:
            raise ValueError(
                f"{self._where}: expected site '{self.name}' of the {self._role} in one plate, "
                f"that over the data, and no other batch dimension, got plates "
                f"{sorted(f.name for f in plates)} and batch shape {tuple(batch_shape)}. Put it "
                "in `with pyro.plate('data', len(x)):` and declare the dimensions of one code "
                "with .to_event(1)."
            )

    def _kept(self, site: Site) -> torch.Tensor:
        if masks_elements(site):
            raise ValueError(
                f"{self._where}: expected a mask over whole codes at site '{self.name}' "
                f"of the {self._role}, got one over their dimensions. Apply .mask(...) "
                "after .to_event(...)."
            )
        kept = torch.ones(site["fn"].batch_shape, dtype=torch.bool, device=site["value"].device)
        if (mask := mask_of(site)) is not None:
            kept = kept & mask
        if not kept.any():
            raise ValueError(
                f"{self._where}: expected at least one row of data at site '{self.name}' of the "
                f"{self._role}, got a mask that leaves out all {kept.numel()}. Look at the mask."
            )
        return kept.reshape(-1)
