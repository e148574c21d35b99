"""Networks for encoders and decoders: they accept any leading dimensions.

Particles add dimensions on the left, ``(*sample, batch, *event)``. Linear layers take them as
they are; convolutions and batch normalisation do not, so :class:`FlattenLeading` folds them.
Encoders hand a context on to their network, ``net(x, context)``, see ``pyro_vae.conditioning``.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import nn
from torch.nn.functional import softplus

from pyro_vae.checks import check_at_least
from pyro_vae.flows import ExactFlow
from pyro_vae.mixtures import NormalMixture

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "FlattenLeading",
    "FlowEncoder",
    "MixtureEncoder",
    "MultivariateNormalEncoder",
    "NormalEncoder",
]

# softplus underflows to 0 in float32 below -104; a scale must stay positive.
_SMALLEST_SCALE = 1e-6


class MLP(nn.Sequential):
    """Fully connected layers with an activation between them.

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers; empty for a linear map.
        out_features: Width of the output.
        activation: Class of the activation.
        dropout: Probability of dropping a hidden unit while training.

    Shapes: ``(*sample, batch, in_features)`` to ``(*sample, batch, out_features)``.

    Raises:
        ValueError: If the last dimension of the input is not ``in_features``.

    Example:
        >>> MLP(64, [32], 4)(torch.zeros(7, 5, 64)).shape
        torch.Size([7, 5, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([in_features, *hidden]):
            layers += [nn.Linear(width_in, width_out), activation()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        last = hidden[-1] if hidden else in_features
        super().__init__(*layers, nn.Linear(last, out_features))
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layers."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"MLP: expected input of width {self.in_features} in the last dimension, got "
                f"shape {tuple(x.shape)}. Flatten images with x.flatten(1)."
            )
        result: torch.Tensor = super().forward(x)
        return result


class FlattenLeading(nn.Module):
    """Lets a network made for ``(batch, *event)`` take ``(*sample, batch, *event)``.

    Args:
        net: The network.
        event_dim: Number of dimensions of one input datum, 3 for ``(channels, height, width)``.

    Example:
        >>> conv = FlattenLeading(nn.Conv2d(1, 4, 3), event_dim=3)
        >>> conv(torch.zeros(7, 5, 1, 8, 8)).shape
        torch.Size([7, 5, 4, 6, 6])
    """

    def __init__(self, net: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.net, self.event_dim = net, event_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to all leading dimensions as one batch."""
        if x.dim() < self.event_dim:
            raise ValueError(
                f"FlattenLeading: expected at least {self.event_dim} dimensions, got shape "
                f"{tuple(x.shape)}. Reshape the input to (*sample, batch, *event)."
            )
        leading = x.shape[: x.dim() - self.event_dim]
        out: torch.Tensor = self.net(x.reshape(-1, *x.shape[x.dim() - self.event_dim :]))
        return out.reshape(*leading, *out.shape[1:])


class ConvEncoder(FlattenLeading):
    """Strided convolutions, each halving height and width, then a linear map.

    Args:
        image_shape: ``(channels, height, width)``; the sides divisible by ``2 ** len(channels)``.
        channels: Output channels of the convolutions.
        out_features: Width of the output.

    Example:
        >>> ConvEncoder((1, 8, 8), [16, 32], 20)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 20])
    """

    def __init__(
        self, image_shape: tuple[int, int, int], channels: Sequence[int], out_features: int
    ) -> None:
        height, width = _smallest_sides("ConvEncoder", image_shape, channels)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise([image_shape[0], *channels]):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.ReLU()]
        last = nn.Linear(channels[-1] * height * width, out_features)
        super().__init__(nn.Sequential(*layers, nn.Flatten(), last), event_dim=3)


class ConvDecoder(FlattenLeading):
    """The mirror image of :class:`ConvEncoder`: a linear map, then transposed convolutions.

    Args:
        in_features: Width of the code.
        channels: Channels before each transposed convolution.
        image_shape: ``(channels, height, width)`` of the output.

    Example:
        >>> ConvDecoder(2, [32, 16], (1, 8, 8))(torch.zeros(7, 5, 2)).shape
        torch.Size([7, 5, 1, 8, 8])
    """

    def __init__(
        self, in_features: int, channels: Sequence[int], image_shape: tuple[int, int, int]
    ) -> None:
        height, width = _smallest_sides("ConvDecoder", image_shape, channels)
        layers: list[nn.Module] = [
            nn.Linear(in_features, channels[0] * height * width),
            nn.Unflatten(1, (channels[0], height, width)),
        ]
        for c_in, c_out in pairwise([*channels, image_shape[0]]):
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)]
        super().__init__(nn.Sequential(*layers), event_dim=1)


def _smallest_sides(
    where: str, image_shape: tuple[int, int, int], channels: Sequence[int]
) -> tuple[int, int]:
    factor = 2 ** len(channels)
    _, height, width = image_shape
    if not channels or height % factor or width % factor:
        raise ValueError(
            f"{where}: expected sides divisible by {factor} for {len(channels)} convolutions, "
            f"got {height} x {width}. Pad the images or change the number of channels."
        )
    return height // factor, width // factor


class NormalEncoder(nn.Module):
    """Turns a network's output into a diagonal normal distribution over codes.

    Args:
        net: Maps data to ``2 * latent_dim`` numbers: the locs and the raw scales.

    Example:
        >>> encoder = NormalEncoder(MLP(64, [32], 2 * 3))
        >>> q = encoder(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        """Encodes ``x`` into a distribution of batch ``(*sample, batch)``."""
        out = self.net(x, *context)
        if out.shape[-1] % 2:
            raise ValueError(
                "NormalEncoder: expected a network with an even number of outputs (loc and "
                f"scale), got {out.shape[-1]}. Give it 2 * latent_dim outputs."
            )
        loc, raw_scale = out.chunk(2, dim=-1)
        return dist.Normal(loc, softplus(raw_scale) + _SMALLEST_SCALE).to_event(1)


class MultivariateNormalEncoder(nn.Module):
    """Turns a network's output into a normal distribution with full covariance.

    Args:
        net: Maps data to ``latent_dim + latent_dim * (latent_dim + 1) / 2`` numbers: the loc
            and the rows of the lower Cholesky factor.
        latent_dim: Number of latents.

    Example:
        >>> q = MultivariateNormalEncoder(MLP(64, [32], 3 + 6), 3)(torch.zeros(5, 64))
        >>> q.covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    _row: torch.Tensor
    _column: torch.Tensor

    def __init__(self, net: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.net, self.latent_dim = net, latent_dim
        row, column = torch.tril_indices(latent_dim, latent_dim)
        self.register_buffer("_row", row, persistent=False)
        self.register_buffer("_column", column, persistent=False)

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        """Encodes ``x`` into a distribution of batch ``(*sample, batch)``."""
        out = self.net(x, *context)
        num_entries = len(self._row)
        if out.shape[-1] != self.latent_dim + num_entries:
            raise ValueError(
                f"MultivariateNormalEncoder: expected {self.latent_dim + num_entries} outputs "
                f"for latent_dim={self.latent_dim}, got {out.shape[-1]}. Give the network "
                "latent_dim + latent_dim * (latent_dim + 1) // 2 outputs."
            )
        loc, entries = out[..., : self.latent_dim], out[..., self.latent_dim :]
        raw = out.new_zeros(*out.shape[:-1], self.latent_dim, self.latent_dim)
        raw[..., self._row, self._column] = entries
        diagonal = softplus(raw.diagonal(dim1=-2, dim2=-1)) + _SMALLEST_SCALE
        scale_tril = raw.tril(-1) + diagonal.diag_embed()
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class FlowEncoder(nn.Module):
    """Turns a network's output into a normalising flow over codes.

    A standard normal goes through the transforms, bent by the context, then is shifted and
    scaled for each row. So the transforms see values of order one, whatever the size of the codes.

    Args:
        net: Maps data to ``2 * latent_dim + context_dim`` numbers: the locs, the raw scales and
            the context of the transforms.
        latent_dim: Number of latents.
        transforms: Pyro's conditional transforms, applied in this order, see ``pyro_vae.flows``.

    Example:
        >>> from pyro_vae.flows import inverse_autoregressive
        >>> transforms = inverse_autoregressive(3, context_dim=8)
        >>> q = FlowEncoder(MLP(64, [32], 2 * 3 + 8), 3, transforms)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, net: nn.Module, latent_dim: int, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        check_at_least("FlowEncoder", "latent_dim", latent_dim, 1)
        for transform in transforms:
            if not isinstance(transform, ConditionalTransformModule):
                raise TypeError(
                    "FlowEncoder: expected conditional transforms, got "
                    f"{type(transform).__name__}. Use those of pyro_vae.flows or the "
                    "conditional_* functions of pyro.distributions.transforms."
                )
        self.net, self.latent_dim = net, latent_dim
        self.transforms = nn.ModuleList(transforms)

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        """Encodes ``x`` into a distribution of batch ``(*sample, batch)``."""
        out, size = self.net(x, *context), self.latent_dim
        if out.shape[-1] <= 2 * size:
            raise ValueError(
                f"FlowEncoder: expected more than {2 * size} outputs for latent_dim={size}, got "
                f"{out.shape[-1]}. Give the network 2 * latent_dim + context_dim outputs."
            )
        loc, raw_scale, context = out.split([size, size, out.shape[-1] - 2 * size], dim=-1)
        scale = softplus(raw_scale) + _SMALLEST_SCALE
        standard = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        affine = dist.transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1)
        conditional: Iterable[Any] = self.transforms
        transforms = [transform.condition(context) for transform in conditional]
        return ExactFlow(standard, [*transforms, affine])


class MixtureEncoder(nn.Module):
    """Turns a network's output into a mixture of diagonal normal distributions over codes.

    Args:
        net: Maps data to ``num_components * (1 + 2 * latent_dim)`` numbers: the logits of the
            weights, then the locs and the raw scales of every component.
        num_components: Number of components.

    Example:
        >>> q = MixtureEncoder(MLP(64, [32], 4 * (1 + 2 * 3)), 4)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, net: nn.Module, num_components: int) -> None:
        super().__init__()
        check_at_least("MixtureEncoder", "num_components", num_components, 1)
        self.net, self.num_components = net, num_components

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        """Encodes ``x`` into a distribution of batch ``(*sample, batch)``."""
        out, num = self.net(x, *context), self.num_components
        rest = out.shape[-1] - num
        if rest <= 0 or rest % (2 * num):
            raise ValueError(
                f"MixtureEncoder: expected {num} * (1 + 2 * latent_dim) outputs for "
                f"num_components={num}, got {out.shape[-1]}. Each component takes a logit, "
                "latent_dim locs and as many scales."
            )
        logits, loc, raw_scale = out.split([num, rest // 2, rest // 2], dim=-1)
        loc, raw_scale = loc.unflatten(-1, (num, -1)), raw_scale.unflatten(-1, (num, -1))
        components = dist.Normal(loc, softplus(raw_scale) + _SMALLEST_SCALE).to_event(1)
        return NormalMixture(dist.Categorical(logits=logits), components)
