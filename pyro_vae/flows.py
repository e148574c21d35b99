"""Normalising flows, of noise alone or given a context: exact densities, whatever was cached.

For a guide a flow is a list of Pyro's conditional transforms; the functions make the usual two.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from math import expm1, log
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import (
    ConditionalAffineAutoregressive,
    ConditionalSplineAutoregressive,
)
from pyro.nn import ConditionalAutoRegressiveNN
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_vae.checks import check_at_least
from pyro_vae.isolation import without_side_effects

__all__ = [
    "ExactFlow",
    "ForeignFlow",
    "TransformedNormal",
    "inverse_autoregressive",
    "neural_spline",
]

# Of the last layer's weights: a flow starts close to the identity, and every layer can learn.
_SMALL = 0.01
_MIN_DERIVATIVE = 1e-3  # Pyro's splines add it to every slope.


class ExactFlow(dist.TransformedDistribution):  # type: ignore[misc]
    """A transformed distribution that trusts the caches of its transforms only where they hold.

    A transform remembers its last input and output, so that scoring a sample just drawn costs
    nothing. Torch takes them for any tensor that *is* the output: also when it was drawn without
    gradients and is now scored with them, which loses the gradients of the inverse, and after it
    has been changed in place. Such values, and all others, are inverted here.

    Example:
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> q = ExactFlow(base, [dist.transforms.AffineTransform(1.0, 2.0, event_dim=1)])
        >>> q.log_prob(q.rsample()).shape
        torch.Size([])
    """

    _drawn: tuple[torch.Tensor | None, int] = (None, 0)

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: ``(*sample_shape, *batch, *event)``."""
        return self._remember(super().rsample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws without gradients."""
        return self._remember(super().sample(sample_shape))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density in nats: ``(*sample, *batch)``."""
        drawn, version = self._drawn
        has_graph = value.grad_fn is not None or not torch.is_grad_enabled()
        if value is not drawn or value._version != version or not has_graph:
            value = value.view_as(value)  # The same numbers, another object: no cache knows it.
        log_prob: torch.Tensor = super().log_prob(value)
        return log_prob

    def _remember(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_inference():  # Those tell no version.
            self._drawn = value, value._version
        return value


class ForeignFlow(dist.TorchDistribution):
    """A distribution over real codes of another library, such as zuko, as one of Pyro's.

    Args:
        fn: Anything with torch's interface for distributions.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = torch.distributions.constraints.real_vector

    def __init__(self, fn: Distribution) -> None:
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)
        self.fn, self.has_rsample = fn, fn.has_rsample

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: ``(*sample_shape, *batch, *event)``."""
        return self.fn.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.fn.sample(torch.Size(sample_shape))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density in nats: ``(*sample, *batch)``."""
        log_prob: torch.Tensor = self.fn.log_prob(value)
        return log_prob


class TransformedNormal(nn.Module):
    """Normal noise after some transforms; called, it returns the distribution of one code.

    Args:
        latent_dim: Number of latents.
        transforms: Of torch or Pyro, in the order in which they are applied to noise.
        site: Name of the site, for the messages.

    Raises:
        ValueError: If a transform cannot be inverted, or does not take codes of that width.
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, latent_dim: int, transforms: Iterable[Transform], site: str) -> None:
        super().__init__()
        self.transforms = list(transforms)
        # An inverse or a composition is no module itself, even if what it is made of is one.
        self.networks = nn.ModuleList()
        for part in _parts(self.transforms, set()):
            if isinstance(part, nn.Module) and part not in set(self.networks.modules()):
                self.networks.append(part)
        # Where the networks are: they may have been moved already.
        like = next(self.parameters(), torch.zeros(()))
        self.register_buffer("loc", like.new_zeros(latent_dim), persistent=False)
        self.register_buffer("scale", like.new_ones(latent_dim), persistent=False)
        self._check_density(site)

    def forward(self) -> ExactFlow:
        """The distribution of one code."""
        return ExactFlow(dist.Normal(self.loc, self.scale).to_event(1), self.transforms)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, which cannot keep the graphs that the transforms remember."""
        for part in _parts(self.transforms, set()):
            for name in [n for n in vars(part) if n.startswith("_cache") and n != "_cache_size"]:
                vars(part)[name] = (None, None) if name == "_cached_x_y" else None
        return self.__dict__.copy()

    def _check_density(self, site: str) -> None:
        code, kinds = self.loc, [type(t).__name__ for t in self.transforms]
        with without_side_effects(self):
            try:
                for transform in self.transforms:
                    code = transform(code)
                self().log_prob(code)
            except (KeyError, NotImplementedError) as err:
                raise ValueError(
                    f"FlowPrior: expected transforms that Pyro can invert for site '{site}', got "
                    f"{kinds}, where it cannot, so that the codes of a guide have no density. "
                    "Use others, such as affine_coupling or spline_autoregressive."
                ) from err
            except (IndexError, RuntimeError, ValueError) as err:
                raise ValueError(
                    f"FlowPrior: expected transforms of {len(self.loc)} latents for site "
                    f"'{site}', got {kinds}, which fail on a code of shape "
                    f"{tuple(self.loc.shape)}: {err}. Make them for latent_dim={len(self.loc)}."
                ) from err


def inverse_autoregressive(
    latent_dim: int, context_dim: int, *, num_transforms: int = 2, hidden: Sequence[int] = (64,)
) -> list[nn.Module]:
    r"""Transforms of an inverse autoregressive flow: fast to sample and to score its samples.

    .. math:: y_i = \sigma_i x_i + (1 - \sigma_i) m_i,
        \qquad (m_i, \sigma_i) \text{ from } (x_1, \dots, x_{i-1}, h)

    Other values are scored by inversion, which runs each network ``latent_dim`` times.

    Args:
        latent_dim: Number of latents.
        context_dim: Width of the context h.
        num_transforms: How many; every second one runs through the latents in reverse.
        hidden: Widths of the hidden layers of each network, at least ``latent_dim``.

    Example:
        >>> len(inverse_autoregressive(3, context_dim=8))
        2

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        section 4 and algorithm 1, https://arxiv.org/abs/1606.04934
    """
    networks = _networks(
        "inverse_autoregressive", latent_dim, context_dim, num_transforms, hidden, [1, 1]
    )
    return [ConditionalAffineAutoregressive(network, stable=True) for network in networks]


def neural_spline(
    latent_dim: int,
    context_dim: int,
    *,
    num_transforms: int = 2,
    hidden: Sequence[int] = (64,),
    num_bins: int = 8,
    bound: float = 3.0,
) -> list[nn.Module]:
    """Transforms of an autoregressive flow of linear rational splines: any monotone shape.

    Args:
        latent_dim: Number of latents.
        context_dim: Width of the context.
        num_transforms: How many; every second one runs through the latents in reverse.
        hidden: Widths of the hidden layers of each network, at least ``latent_dim``.
        num_bins: Pieces of each spline.
        bound: Each spline bends the interval from ``-bound`` to ``bound`` and leaves the rest.

    Example:
        >>> len(neural_spline(3, context_dim=8, num_transforms=1))
        1

    References:
        Durkan et al. (2019), Neural spline flows, section 3; Dolatabadi et al. (2020),
        Invertible generative modeling using linear rational splines.
    """
    check_at_least("neural_spline", "num_bins", num_bins, 2)
    if not bound > 0:
        raise ValueError(
            f"neural_spline: expected bound > 0, got {bound}. The flow starts from a standard "
            "normal, which 3 covers."
        )
    widths = [num_bins, num_bins, num_bins - 1, num_bins]
    networks = _networks("neural_spline", latent_dim, context_dim, num_transforms, hidden, widths)
    for network in networks:
        # The slopes at the knots start at 1, where the bins' equal sides make the identity.
        bias = network.last.bias.data.view(sum(widths), latent_dim)
        bias[2 * num_bins : 3 * num_bins - 1] = log(expm1(1 - _MIN_DERIVATIVE))
    return [
        ConditionalSplineAutoregressive(latent_dim, network, count_bins=num_bins, bound=bound)
        for network in networks
    ]


class _Network(ConditionalAutoRegressiveNN):
    """Pyro's, checked, and for data of another dtype than the default one."""

    @property
    def last(self) -> nn.Linear:
        """The layer whose outputs are the parameters of the transform."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> Any:
        """Parameters of the transform of ``x``, of shape ``(*leading, latent_dim)`` each."""
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"FlowEncoder: expected a context of width {self.context_dim} for the "
                f"transforms, got {context.shape[-1]}. Give the network "
                f"2 * {self.input_dim} + {self.context_dim} outputs."
            )
        if x.shape[-1] != self.input_dim:
            raise ValueError(
                f"FlowEncoder: expected {self.input_dim} latents as the transforms do, got "
                f"{x.shape[-1]}. Give both the same latent_dim."
            )
        return super().forward(x.to(context.dtype), context)  # An inverse starts at zeros.


def _networks(
    where: str,
    latent_dim: int,
    context_dim: int,
    num_transforms: int,
    hidden: Sequence[int],
    param_dims: list[int],
) -> list[_Network]:
    check_at_least(where, "latent_dim", latent_dim, 1)
    check_at_least(where, "context_dim", context_dim, 1)
    check_at_least(where, "num_transforms", num_transforms, 1)
    if not hidden or min(hidden) < latent_dim:
        raise ValueError(
            f"{where}: expected hidden layers of at least latent_dim={latent_dim} units, got "
            f"{list(hidden)}. In narrower ones some latent would depend on no other."
        )
    order: Any = torch.arange(latent_dim)
    networks = []
    for _ in range(num_transforms):
        with warnings.catch_warnings():  # One latent depends on the context alone, as it should.
            warnings.filterwarnings("ignore", message="ConditionalAutoRegressiveNN input_dim = 1")
            network = _Network(
                latent_dim,
                context_dim,
                list(hidden),
                param_dims=param_dims,
                permutation=order,
                nonlinearity=nn.ELU(),
            )
        network.last.weight.data.mul_(_SMALL)
        network.last.bias.data.zero_()
        networks.append(network)
        order = order.flip(0)
    return networks


def _parts(held: Any, seen: set[int]) -> Iterator[Transform]:
    """The transforms in a transform or a container, the outermost first."""
    if isinstance(held, dict | list | tuple):
        for item in held.values() if isinstance(held, dict) else held:
            yield from _parts(item, seen)
    elif isinstance(held, Transform) and id(held) not in seen:
        seen.add(id(held))
        yield held
        yield from _parts(vars(held), seen)
