"""The programs of the benchmark: model and guide, data, and where there is one the loss by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO, JitTrace_ELBO, JitTraceEnum_ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.datasets import Batches, drop_modalities
from pyro_vae.guides import (
    AmortizedBottomUp,
    AmortizedNormal,
    AmortizedSemiSupervised,
    ProductOfExperts,
)
from pyro_vae.likelihoods import Bernoulli, Categorical, Normal
from pyro_vae.models import (
    VAE,
    HierarchicalVAE,
    LinearGaussian,
    MultimodalVAE,
    SemiSupervisedVAE,
)
from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder
from pyro_vae.priors import StandardNormalPrior
from svi_step_parts.by_hand import ByHand, linear_by_hand, vae_by_hand

__all__ = ["NUM_BATCHES", "Program", "programs"]

NUM_BATCHES = 50
CLASSES = 10


@dataclass(frozen=True)
class Program:
    """A line of the table.

    Attributes:
        title: What it is called there.
        make: New model and guide.
        data: What a step takes, with the rows of all batches.
        batch_size: Rows in a batch.
        elbo: The objective.
        jit: Pyro's traced objective, where it takes this program.
        by_hand: The same in plain torch, where one would write that.
        sizes: For the same program in numpyro, where there is one.
    """

    title: str
    make: Callable[[], tuple[Any, Any]]
    data: tuple[Any, ...]
    batch_size: int
    elbo: Callable[[], ELBO] = Trace_ELBO
    jit: Callable[[], ELBO] | None = lambda: JitTrace_ELBO(ignore_jit_warnings=True)
    by_hand: Callable[[], ByHand] | None = None
    sizes: dict[str, int] | None = None

    def batches(self) -> list[tuple[Any, ...]]:
        """The batches in order."""
        batches = Batches(*self.data, batch_size=self.batch_size, shuffle=False)
        return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


def programs(tiny: bool) -> dict[str, Program]:
    """The lines of the table by name; ``tiny`` ones take no time and show nothing."""
    side, width = (8, 16) if tiny else (28, 200)
    num_pixels, batch, latent_dim = side * side, *((4, 5) if tiny else (32, 50))
    x = pixels(NUM_BATCHES * batch, num_pixels)
    return {
        "mlp-200": _mlp(x, width, latent_dim, batch),
        "mlp-400": _mlp(
            pixels(NUM_BATCHES * 8 * batch, num_pixels), 2 * width, latent_dim, 8 * batch
        ),
        "conv": _convolutional(x.reshape(-1, 1, side, side), [4, 8] if tiny else [32, 64], batch),
        "hierarchical": _hierarchical(x, [8, 4, 2] if tiny else [32, 16, 8], width, batch),
        "multimodal": _multimodal(x, width, batch),
        "semi": _semi_supervised(x, width, batch),
        "ppca": _ppca(5 if tiny else 64, 2 if tiny else 10, 4 if tiny else 100),
    }


def pixels(num_rows: int, num_pixels: int) -> torch.Tensor:
    """Binary images of noise: how long a step takes does not depend on what they show."""
    return (torch.rand(num_rows, num_pixels) < 0.3).float()


def _mlp(x: torch.Tensor, hidden: int, latent_dim: int, batch: int) -> Program:
    num_pixels = x.shape[1]

    def networks() -> tuple[nn.Module, nn.Module]:
        encoder = MLP(num_pixels, [hidden], 2 * latent_dim)
        return encoder, MLP(latent_dim, [hidden], num_pixels)

    sizes = {"num_pixels": num_pixels, "hidden": hidden, "latent_dim": latent_dim}
    return _vae(f"MLP VAE, {hidden} hidden, batch {batch}", networks, x, latent_dim, batch, sizes)


def _convolutional(x: torch.Tensor, channels: list[int], batch: int) -> Program:
    latent_dim = 4 * channels[0]

    def networks() -> tuple[nn.Module, nn.Module]:
        shape = (1, x.shape[-2], x.shape[-1])
        encoder = ConvEncoder(shape, channels, 2 * latent_dim)
        return encoder, ConvDecoder(latent_dim, channels[::-1], shape)

    title = f"convolutional VAE, batch {batch}"
    return _vae(title, networks, x, latent_dim, batch, None)


def _vae(
    title: str,
    networks: Callable[[], tuple[nn.Module, nn.Module]],
    x: torch.Tensor,
    latent_dim: int,
    batch: int,
    sizes: dict[str, int] | None,
) -> Program:
    def make() -> tuple[Any, Any]:
        encoder, decoder = networks()
        likelihood = Bernoulli(event_dim=x.dim() - 1)
        return VAE(decoder, likelihood, StandardNormalPrior(latent_dim)), AmortizedNormal(encoder)

    return Program(title, make, (x,), batch, by_hand=lambda: vae_by_hand(*networks()), sizes=sizes)


def _hierarchical(x: torch.Tensor, latent_dims: list[int], hidden: int, batch: int) -> Program:
    def make() -> tuple[Any, Any]:
        first, num_pixels = latent_dims[0], x.shape[1]
        decoder = MLP(first, [hidden], num_pixels)
        model = HierarchicalVAE(latent_dims, decoder, Bernoulli(), hidden=[hidden // 2])
        widths = [num_pixels, *latent_dims]
        networks = [
            MLP(below, [hidden // (1 if layer == 0 else 2)], 2 * above)
            for layer, (below, above) in enumerate(zip(widths, latent_dims, strict=False))
        ]
        return model, AmortizedBottomUp(networks)

    return Program(f"three layers of latents, batch {batch}", make, (x,), batch)


def _multimodal(x: torch.Tensor, hidden: int, batch: int) -> Program:
    labels, latent_dim = torch.randint(CLASSES, (len(x),)), 20
    data = {"image": x, "sound": torch.randn(len(x), 100), "label": labels}
    widths = {"image": x.shape[1], "sound": 100, "label": CLASSES}

    def encoder(name: str) -> nn.Module:
        first = nn.Embedding if name == "label" else nn.Linear
        last = nn.Linear(hidden, 2 * latent_dim)
        return nn.Sequential(first(widths[name], hidden), nn.ReLU(), last)

    def make() -> tuple[Any, Any]:
        likelihoods = {"image": Bernoulli(), "sound": Normal(1.0), "label": Categorical(0)}
        decoders = {name: MLP(latent_dim, [hidden], width) for name, width in widths.items()}
        model = MultimodalVAE(decoders, likelihoods, StandardNormalPrior(latent_dim))
        return model, ProductOfExperts({name: encoder(name) for name in widths}, latent_dim)

    title = f"product of experts, 3 modalities, batch {batch}"
    present = drop_modalities(data, 0.3)
    return Program(title, make, (data, present), batch, jit=None)  # It takes tensors alone.


def _semi_supervised(x: torch.Tensor, hidden: int, batch: int) -> Program:
    y, labelled = torch.randint(CLASSES, (len(x),)), torch.rand(len(x)) < 0.2
    latent_dim, num_pixels = 20, x.shape[1]

    def make() -> tuple[Any, Any]:
        decoder = MLP(latent_dim + CLASSES, [hidden], num_pixels)
        encoder = MLP(num_pixels + CLASSES, [hidden], 2 * latent_dim)
        model = SemiSupervisedVAE(
            Concatenate(decoder, embed=OneHot(CLASSES)),
            Bernoulli(),
            StandardNormalPrior(latent_dim),
            CLASSES,
        )
        classifier = MLP(num_pixels, [hidden], CLASSES)
        encoder_of_both = Concatenate(encoder, embed=OneHot(CLASSES))
        return model, AmortizedSemiSupervised(classifier, encoder_of_both, CLASSES)

    return Program(
        f"semi-supervised, 10 classes summed, batch {batch}",
        make,
        (x, y, labelled),
        batch,
        elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
        jit=lambda: JitTraceEnum_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
    )


def _ppca(data_dim: int, latent_dim: int, batch: int) -> Program:
    x = torch.randn(NUM_BATCHES * batch, data_dim)

    def encoder() -> nn.Module:
        return MLP(data_dim, [], 2 * latent_dim)

    return Program(
        f"probabilistic PCA, {data_dim} dimensions, batch {batch}",
        lambda: (LinearGaussian(data_dim, latent_dim), AmortizedNormal(encoder())),
        (x,),
        batch,
        by_hand=lambda: linear_by_hand(encoder(), data_dim, latent_dim),
        sizes={"data_dim": data_dim, "latent_dim": latent_dim},
    )
