"""Log-densities of a model with one scalar latent, and of its guide, at values of that latent."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_vae.checks import refuse_subsampling
from pyro_vae.drawn_sites import unmasked
from pyro_vae.evaluation.particles import Particles
from pyro_vae.evaluation.quadrature_checks import check_densities, check_scalar, latent_of
from pyro_vae.pairs import Pair, data_plates, trace_pair
from pyro_vae.traces import DataPlates, Site, is_observed, mask_of
from pyro_vae.vectorised import VectorisedProgram

__all__ = ["ScalarDensities", "prior_pair"]

_CHUNK_BYTES = 2**25


def prior_pair(model: Any, args: Any, kwargs: Any, where: str) -> tuple[Pair, Site]:
    """The model with its own prior as guide, checked, and the latent's site."""

    def hidden(site: Any) -> bool:
        if site["type"] != "sample":
            return False
        summed = getattr(site["fn"], "has_enumerate_support", False)
        return is_observed(site) or summed or site["mask"] is False

    prior = poutine.block(model, hide_fn=hidden)
    with refuse_subsampling(where):
        pair = trace_pair(model, prior, args, kwargs, where)
    site = latent_of(pair, where)
    check_scalar(where, site, data_plates(pair, where))
    return pair, site


class ScalarDensities:
    """Log-densities of the data and z on a grid, some points at a time."""

    def __init__(self, pair: Pair, prior: Pair, site: Any, where: str) -> None:
        name = site["name"]
        plates = data_plates(pair, where)
        common = plates, pair.max_plate_nesting, where, pair.latent_shapes
        enumerated = prior.enumerated
        self._joint = VectorisedProgram(_Shown(name)(pair.model), "model", *common, enumerated)
        self._masked = VectorisedProgram(pair.model, "model", *common, enumerated)
        self._guide = VectorisedProgram(_Shown(name)(pair.guide), "guide", *common)
        self._name, self._where, self._like = name, where, site["value"]
        missing = pair.max_plate_nesting - (self._like.dim() - site["fn"].event_dim)
        self._shape = (1,) * missing + tuple(self._like.shape)
        self._chunk = Particles(prior, plates, where).chunk_size_within(_CHUNK_BYTES)
        self.is_hidden = _is_hidden(pair.guide_sites[name], plates, pair.max_plate_nesting)

    def log_joint(self, z: torch.Tensor, *, strict: bool = True) -> torch.Tensor:
        """log p(x, z), a mask on z lifted: nats, ``(num, *batch)``."""
        return self._score(self._joint, z, "log p(x, z)" if strict else None)

    def log_guide(self, z: torch.Tensor, *, strict: bool = True) -> torch.Tensor:
        """log q(z | x) likewise."""
        return self._score(self._guide, z, "log q(z | x)" if strict else None)

    def log_ratio(self, z: torch.Tensor, log_joint: torch.Tensor, log_q: torch.Tensor) -> Any:
        """The log-weight of z in the ELBO, where hidden rows have neither prior nor guide."""
        if not self.is_hidden.any():
            return log_joint - log_q
        masked = self._score(self._masked, z, "log p(x, z)")
        return torch.where(self.is_hidden, masked, log_joint - log_q)

    def _score(self, program: VectorisedProgram, z: torch.Tensor, what: str | None) -> torch.Tensor:
        chunks = []
        for part in z.to(self._like.dtype).split(self._chunk):
            value = part.reshape(-1, *(1,) * len(self._shape)).expand(-1, *self._shape)
            chunks.append(program.score({self._name: value.contiguous()}, len(part)))
        log_density = torch.cat(chunks)
        if what is not None:
            check_densities(self._where, what, z, log_density)
        return log_density


class _Shown(Messenger):
    """Lifts the mask from one site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self._name:
            msg["mask"], msg["fn"] = None, unmasked(msg["fn"])


def _is_hidden(site: Any, plates: DataPlates, nesting: int) -> torch.Tensor:
    """Rows in which a mask hides the latent: bool, ``(*batch,)``."""
    mask = mask_of(site)
    shape = [1] * nesting
    for dim, size in zip(plates.dims, plates.sizes, strict=True):
        shape[dim] = size
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=site["value"].device)
    return ~mask.expand(shape).reshape(plates.sizes)
