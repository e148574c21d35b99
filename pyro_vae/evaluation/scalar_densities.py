"""Log-densities of a model with one scalar latent, and of its guide, at values of that latent."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger

from pyro_vae.checks import refuse_subsampling, support_of
from pyro_vae.drawn_sites import unmasked
from pyro_vae.evaluation.particles import Particles
from pyro_vae.evaluation.quadrature_checks import check_densities, check_scalar, latent_of
from pyro_vae.pairs import Pair, data_plates, trace_pair
from pyro_vae.traces import DataPlates, Site, is_observed, layers, mask_of
from pyro_vae.vectorised import VectorisedProgram

__all__ = ["ScalarDensities", "prior_pair", "within_support"]

_CHUNK_BYTES = 2**25
# Their support is that of what they hold.
_WRAPPERS = torch.distributions.Independent, ExpandedDistribution


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
        self._support = support_of(unmasked(pair.guide_sites[name]["fn"]))
        self._chunk = Particles(prior, plates, where).chunk_size_within(_CHUNK_BYTES)
        self.is_hidden = _is_hidden(pair.guide_sites[name], plates, pair.max_plate_nesting)

    def log_joint(self, z: torch.Tensor, *, strict: bool = True) -> torch.Tensor:
        """log p(x, z), a mask on z lifted: nats, ``(num, *batch)``."""
        return self._score(self._joint, z, "log p(x, z)" if strict else None)

    def log_guide(self, z: torch.Tensor, *, strict: bool = True) -> torch.Tensor:
        """log q(z | x) likewise; -inf outside the guide's support."""
        what = "log q(z | x)" if strict else None
        return self._score(self._guide, z, what, self._support)

    def guide_goes_beyond(self, z: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
        """Rows whose guide has mass where the latent has no prior density: bool, ``(*batch,)``.

        Args:
            z: Points within the bounds; those on the other side are their mirror images.
            bounds: Ends of the support of the prior.
        """
        found = torch.zeros_like(self.is_hidden)
        for end in bounds:
            if math.isfinite(end):
                mirrored = (2 * end - z).to(self._like.dtype).to(torch.float64)
                outside = mirrored[(mirrored < bounds[0]) | (mirrored > bounds[1])]
                log_q = self.log_guide(outside, strict=False)
                found |= (log_q.exp() > 0).any(0)
        return found & ~self.is_hidden

    def log_ratio(self, z: torch.Tensor, log_joint: torch.Tensor, log_q: torch.Tensor) -> Any:
        """The log-weight of z in the ELBO, where hidden rows have neither prior nor guide."""
        if not self.is_hidden.any():
            return log_joint - log_q
        masked = self._score(self._masked, z, "log p(x, z)")
        return torch.where(self.is_hidden, masked, log_joint - log_q)

    def _score(
        self, program: VectorisedProgram, z: torch.Tensor, what: str | None, support: Any = None
    ) -> torch.Tensor:
        chunks = []
        for part in z.to(self._like.dtype).split(self._chunk):
            value = part.reshape(-1, *(1,) * len(self._shape)).expand(-1, *self._shape)
            if support is None:
                chunks.append(program.score({self._name: value.contiguous()}, len(part)))
                continue
            # Outside some distributions give NaN and some a number.
            inside = support.check(value)
            inside = inside.reshape(inside.shape + (1,) * support.event_dim)
            score = program.score({self._name: value.where(inside, self._like)}, len(part))
            chunks.append(torch.where(inside.reshape(score.shape), score, -torch.inf))
        log_density = torch.cat(chunks)
        if what is not None:
            check_densities(self._where, what, z, log_density)
        return log_density


def within_support(model: Any) -> Any:
    """The model with log-densities of -inf where data are outside a support that may move with z.

    Others are the same for all z: data outside them are refused when the model is traced.
    """
    return _WithinSupport()(model)


class _WithinSupport(Messenger):
    """Replaces the distributions of observed sites whose support has parameters."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_observed(msg) or not isinstance(msg["value"], torch.Tensor):
            return
        parts = layers(msg["fn"])
        if any(isinstance(part, dist.MaskedDistribution) for part in parts):
            return  # It has values that are not to be looked at.
        own = [type(part).support for part in parts if not isinstance(part, _WRAPPERS)]
        if any(isinstance(support, property) for support in own):
            msg["fn"] = _Within(msg["fn"])


class _Within(dist.TorchDistribution):
    """A distribution whose log-density is -inf outside its support. It declares no support."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        support, log_prob = support_of(self._fn), self._fn.log_prob(value)
        if support is None:
            return log_prob
        return torch.where(support.check(value), log_prob, -torch.inf)


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
