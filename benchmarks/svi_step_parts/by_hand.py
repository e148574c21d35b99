"""Losses as one would write them in plain torch for one model alone."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

__all__ = ["ByHand", "linear_by_hand", "vae_by_hand"]

ByHand = tuple[Callable[[torch.Tensor], torch.Tensor], list[nn.Parameter]]
"""The loss of a batch, summed over rows, and what it trains."""

_SMALLEST_SCALE = 1e-6


def vae_by_hand(encoder: nn.Module, decoder: nn.Module) -> ByHand:
    """The negative ELBO of binary pixels, with the KL in closed form."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        z, kl = _draw(encoder(x))
        return binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl

    return loss, [*encoder.parameters(), *decoder.parameters()]


def linear_by_hand(encoder: nn.Module, data_dim: int, latent_dim: int) -> ByHand:
    """The negative ELBO of probabilistic PCA, with the KL in closed form."""
    weight = nn.Parameter(torch.randn(data_dim, latent_dim) / latent_dim**0.5)
    loc, log_scale = nn.Parameter(torch.zeros(data_dim)), nn.Parameter(torch.zeros(()))

    def loss(x: torch.Tensor) -> torch.Tensor:
        z, kl = _draw(encoder(x))
        residual = (x - torch.addmm(loc, z, weight.T)) * (-log_scale).exp()
        normalizer = x.numel() * (log_scale + 0.5 * math.log(2 * math.pi))
        return 0.5 * residual.square().sum() + normalizer + kl

    return loss, [*encoder.parameters(), weight, loc, log_scale]


def _draw(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and their KL, summed, from the locs and raw scales that the encoder returns."""
    loc, raw_scale = output.chunk(2, -1)
    scale = softplus(raw_scale) + _SMALLEST_SCALE
    kl = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
    return loc + scale * torch.randn_like(loc), kl
