"""Networks that turn features of a row, and latents of it, into the distribution of one site."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Transform, biject_to, constraints
from torch.nn.functional import pad

from pyro_vae.flows import ExactFlow
from pyro_vae.nets import MLP, MultivariateNormalEncoder, NormalEncoder
from pyro_vae.structure import LatentSite, ModelStructure
from pyro_vae.structure_checks import is_real

__all__ = ["SiteHead", "rows_of", "to_support"]


class SiteHead(nn.Module):
    """From features of rows, and parents, to a normal that is carried into a site's support.

    A site in further plates has its distributions there side by side: the values of one row are
    given by one output of the network.

    Args:
        site: The site.
        parents: Those it is given.
        structure: Of the model.
        num_features: Width of the features.
        hidden: Widths of the hidden layers.
        full_covariance: Whether the normal has a full covariance.

    Shapes: a list of ``(*sample, batch, width)`` to a distribution of batch ``(*sample,
    *plates)``, every leading dimension broadcasting.
    """

    def __init__(
        self,
        site: LatentSite,
        parents: Sequence[LatentSite],
        structure: ModelStructure,
        num_features: int,
        *,
        hidden: Sequence[int],
        full_covariance: bool,
    ) -> None:
        super().__init__()
        self.site = site
        shape = site.unconstrained_shape
        size, num = math.prod(shape), _num_values(site, structure)
        width = num_features + sum(
            math.prod(p.unconstrained_shape) * _num_values(p, structure) for p in parents
        )
        self._is_full = full_covariance and size > 1
        num_outputs = size + size * (size + 1) // 2 if self._is_full else 2 * size
        net = _Plated(MLP(width, hidden, num * num_outputs), site, structure)
        self.encoder = MultivariateNormalEncoder(net, size) if self._is_full else NormalEncoder(net)

    def forward(self, inputs: Sequence[torch.Tensor]) -> dist.TorchDistribution:
        """The distribution of the site."""
        leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        q: Any = self.encoder(torch.cat([x.expand(*leading, x.shape[-1]) for x in inputs], -1))
        shape, support = self.site.unconstrained_shape, self.site.support
        transforms: list[Any] = []
        if not self._is_full:
            loc, scale = (v.reshape(q.batch_shape + shape) for v in (q.mean, q.stddev))
            q = dist.Normal(loc, scale).to_event(len(shape))
        elif q.event_shape != shape:
            transforms.append(dist.transforms.ReshapeTransform(q.event_shape, shape, cache_size=1))
        if not is_real(support):
            transforms.append(to_support(support).with_cache(1))
        return ExactFlow(q, transforms) if transforms else q


class _Plated(nn.Module):
    """Puts the outputs of a network for rows into the dimensions of a site's plates."""

    def __init__(self, net: nn.Module, site: LatentSite, structure: ModelStructure) -> None:
        super().__init__()
        self.net, self._dim, self._nesting = net, structure.data.dim, structure.nesting
        sizes = {p.dim: p.size for p in site.plates if p.name != structure.data.name}
        dims = range(-structure.nesting, 0)
        self._sizes = [sizes.get(dim, 1) for dim in dims if dim != structure.data.dim]
        self._own_nesting = max(-plate.dim for plate in site.plates)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(*sample, batch, width)`` to ``(*sample, *plates, numbers of one value)``."""
        leading = x.dim() - 2
        out = self.net(x)
        out = out.reshape(*out.shape[:-1], *self._sizes, out.shape[-1] // math.prod(self._sizes))
        out = out.movedim(leading, leading + self._nesting + self._dim)
        # A program of one particle spells out no more dimensions than a site has plates.
        return out if leading else out.reshape(out.shape[self._nesting - self._own_nesting :])


def rows_of(value: torch.Tensor, event_dim: int, nesting: int, dim: int | None) -> torch.Tensor:
    """All numbers of a value that belong to a row, ``(*sample, batch, width)``.

    Args:
        value: ``(*sample, *plates, *event)``, or with plate dimensions of size 1 left out.
        event_dim: How many dimensions an event has.
        nesting: How many the plates take.
        dim: The negative one of the data; ``None`` for values that all rows share.
    """
    missing = nesting + event_dim - value.dim()
    value = value.reshape((1,) * missing + value.shape)
    leading = value.dim() - nesting - event_dim
    if dim is None:
        return value.reshape(*value.shape[:leading], 1, -1)
    value = value.movedim(dim - event_dim, leading)
    return value.reshape(*value.shape[: leading + 1], -1)


def to_support(support: Any) -> Any:
    """A bijection from the reals to a support: ``biject_to``, but for simplices a softmax.

    Torch breaks a stick there: in float32 nothing is left of it beside a large piece.
    """
    if isinstance(support, constraints.independent):
        base = to_support(support.base_constraint)
        return dist.transforms.IndependentTransform(base, support.reinterpreted_batch_ndims)
    is_simplex = isinstance(support, type(constraints.simplex))
    return _LogRatio() if is_simplex else biject_to(support)


class _LogRatio(Transform):
    """The inverse of log-ratios to the last share, after Aitchison (1982)."""

    domain, codomain, bijective = constraints.real_vector, constraints.simplex, True

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        # As torch does elsewhere: a share of zero lies outside the simplex.
        return pad(x, (0, 1)).softmax(-1).clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        log = y.log()
        return log[..., :-1] - log[..., -1:]

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return pad(x, (0, 1)).log_softmax(-1).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


def _num_values(site: LatentSite, structure: ModelStructure) -> int:
    """How many values of a site belong to a row."""
    return math.prod(plate.size for plate in site.plates if plate.name != structure.data.name)
