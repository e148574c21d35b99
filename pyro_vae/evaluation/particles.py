"""Log-weights of a model/guide pair on one batch, any number of particles in bounded memory."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.capture.function import CapturedFunction
from pyro_vae.dependence import dependent_latents
from pyro_vae.pairs import Pair
from pyro_vae.strata import Strata, can_stratify, stratified_sample
from pyro_vae.traces import (
    DataPlates,
    is_observed,
    is_random,
    masked,
    site_log_prob,
    sites_of,
)
from pyro_vae.vectorised import Values, VectorisedProgram

__all__ = ["Particles"]

# Particles drawn from the guide at a time. A constant, so that neither the chunk size nor the
# memory at hand changes which random numbers a particle gets.
_BLOCK = 16


class Particles:
    """The log-weights log p(x, z) - log q(z | x) of particles z from the guide.

    Args:
        pair: A checked execution of both.
        plates: Their data plates.
        where: The function that asks, for the messages.
        compiled: Whether to compile the model's log-density, from the second chunk on.

    Attributes:
        block: How many particles are drawn together, in proportion to the components of the
            guide's first mixture; 1 where they are independent.
    """

    def __init__(
        self, pair: Pair, plates: DataPlates, where: str, *, compiled: bool = False
    ) -> None:
        nesting = pair.max_plate_nesting
        common = plates, nesting, where, pair.latent_shapes
        self._model = VectorisedProgram(pair.model, "model", *common, pair.enumerated)
        self._score: Callable[[Values, int], torch.Tensor] = self._model.score
        if compiled:
            self._score = CapturedFunction(self._model.score, self._warn)
        self._guide = VectorisedProgram(pair.guide, "guide", *common)
        self._sites = pair.guide_sites
        self._nesting, self._plates, self._where = nesting, plates, where
        self.device = pair.device
        mixtures = [
            name for name, site in self._sites.items() if can_stratify(site["fn"], plates.dims)
        ]
        self._mixture = mixtures[0] if mixtures else None
        self.block = _BLOCK if mixtures else 1
        # Whether no distribution of the guide depends on another latent; a factor may on any.
        has_factor = bool(sites_of(pair.guide_trace, is_observed))
        self._factorises = not has_factor and (
            len(self._sites) == 1 or not dependent_latents(pair.guide, pair.guide_trace)
        )

    def log_weights(self, num_particles: int, chunk_size: int) -> Iterator[torch.Tensor]:
        """Yields ``num_particles`` log-weights in all: ``(<= chunk_size, *data)``, nats."""
        values, log_q = self._draw(min(_BLOCK, num_particles))
        num_drawn = len(log_q)
        while True:
            blocks = [(values, log_q)]
            while num_drawn < num_particles and sum(len(q) for _, q in blocks) < chunk_size:
                blocks.append(self._draw(min(_BLOCK, num_particles - num_drawn)))
                num_drawn += len(blocks[-1][1])
            values = {name: torch.cat([v[name] for v, _ in blocks]) for name in self._sites}
            log_q = torch.cat([q for _, q in blocks])
            if not len(log_q):
                return
            chunk = {name: value[:chunk_size] for name, value in values.items()}
            log_p = self._score(chunk, len(log_q[:chunk_size]))
            yield self._checked(log_p - log_q[:chunk_size], chunk)
            values = {name: value[chunk_size:] for name, value in values.items()}
            log_q = log_q[chunk_size:]

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"{self._where}: expected a model that can be compiled, but {reason}. It runs as it "
            "is; leave out compiled=True.",
            stacklevel=5,
        )

    def draw(self, num: int) -> Values:
        """Samples ``num`` particles from the guide: ``(num, *plates, *event)`` by site."""
        return self._draw(num)[0]

    def chunk_size_within(self, num_bytes: int) -> int:
        """How many particles the model can take at once within a byte budget, at least 1.

        The bytes are those of all tensors that one particle makes, an upper bound on its peak.
        """
        # The values at hand: drawing others would make the result depend on who chose the chunk.
        values = {}
        for name, site in self._sites.items():
            missing = (1,) * (1 + self._nesting - len(site["fn"].batch_shape))
            values[name] = site["value"].reshape(missing + site["value"].shape)
        with _ByteCounter() as counter:
            self._model.score_one(values, 0)
        return max(1, num_bytes // max(1, counter.num_bytes))

    def _draw(self, num: int) -> tuple[Values, torch.Tensor]:
        if not self._sites:  # All latents of the model are summed out.
            return {}, torch.zeros(num, *self._plates.sizes, device=self.device)
        if not self._factorises:
            strata = None
            if self._mixture:
                strata = Strata(num, -1 - self._nesting, self._plates.dims)
            return self._guide.draw(num, strata=strata)
        # The distributions do not depend on one another's values: the encoder's first and only
        # run has given them all.
        values: Values = {}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, site in self._sites.items():
            fn = site["fn"]
            stratified = name == self._mixture
            value = stratified_sample(fn, num) if stratified else fn.sample(torch.Size([num]))
            log_prob = masked(fn.log_prob(value), site["mask"])
            missing = (1,) * (self._nesting - len(fn.batch_shape))
            values[name] = value.reshape(num, *missing, *value.shape[1:])
            total = total + self._plates.sum_others(
                log_prob.reshape(num, *missing, *log_prob.shape[1:]), leading=1
            )
        return values, total

    def _checked(self, log_weights: torch.Tensor, values: Values) -> torch.Tensor:
        bad = log_weights.isnan() | (log_weights == torch.inf)
        if not bad.any():
            return log_weights
        particle = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        for role, program in (("guide", self._guide), ("model", self._model)):
            for name, site in sites_of(program.trace_one(values, particle), is_random).items():
                log_prob = site_log_prob(site)
                wrong = log_prob.isnan() | (log_prob.abs() == torch.inf)
                if wrong.any():
                    raise ValueError(
                        f"{self._where}: expected finite log-weights, got "
                        f"{float(log_prob[wrong][0])} as log-density of site '{name}' in the "
                        f"{role}. Look at the parameters and data that site depends on."
                    )
        raise ValueError(
            f"{self._where}: expected finite log-weights, got {int(bad.sum())} that are not. "
            "Look at the scales of the likelihood and of the guide."
        )


class _ByteCounter(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made inside, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.num_bytes += tensor.numel() * tensor.element_size()
        return result
