"""A linear-Gaussian pair of three modalities whose every answer is known, for tests."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_vae.baselines import MultimodalLinearGaussian

Tensors = dict[str, torch.Tensor]
WIDTHS = {"image": 5, "sound": 4, "text": 3}


class Pattern(NamedTuple):
    """One pattern of presence for all rows.

    Attributes:
        seen: Names of the modalities that are observed.
        batch: Data, with NaN in those that are not.
        present: Masks that say so; false in all rows or true in all rows.
        batch_with_none: The same pattern told by ``None``, without masks.
        batch_of_seen: The same pattern told by missing keys, without masks.
    """

    seen: tuple[str, ...]
    batch: Tensors
    present: Tensors
    batch_with_none: dict[str, torch.Tensor | None]
    batch_of_seen: Tensors


class LinearModalities:
    """code ~ N(0, I), view_m ~ N(loc_m + W_m code, scale_m^2), in a plate "rows".

    The columns of W_m / scale_m are orthogonal in each modality, so that for every set of
    observed modalities the exact posterior is a product of normals with diagonal covariance: the
    prior and one expert per modality. ``guide`` is that product, and ``exact`` knows the same
    by another way.

    Args:
        latent_dim: Up to 3, the width of the narrowest modality.
        noise: About how large the standard deviations of the noise are.
        dtype: Of the parameters and the data.
    """

    def __init__(
        self, latent_dim: int = 2, noise: float = 0.7, dtype: torch.dtype = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(11)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.latent_dim = latent_dim
        self.loc: Tensors = {}
        self.scale: Tensors = {}
        self.weight: Tensors = {}
        for name, width in WIDTHS.items():
            scale = noise * (0.3 * random(width)).exp()
            axes = torch.linalg.qr(random(width, latent_dim)).Q
            lengths = (0.5 + random(latent_dim).abs()) / noise
            self.loc[name] = random(width).to(dtype)
            self.scale[name] = scale.to(dtype)
            self.weight[name] = (scale.unsqueeze(-1) * axes * lengths).to(dtype)

    def model(
        self, batch: Mapping[str, torch.Tensor | None], present: Tensors | None = None
    ) -> Tensors:
        """Sites "code" and "view_<modality>", for the modalities that are keys of the batch."""
        values = {}
        with pyro.plate("rows", num_rows(batch, present)):
            zero = self.loc["image"].new_zeros(self.latent_dim)
            code = pyro.sample("code", dist.Normal(zero, zero + 1).to_event(1))
            for name, value in batch.items():
                loc = self.loc[name] + code @ self.weight[name].mT
                fn = dist.Normal(loc, self.scale[name]).to_event(1)
                if value is None:
                    with poutine.mask(mask=False):
                        values[name] = pyro.sample(f"view_{name}", fn)
                    continue
                seen = (present or {}).get(name, torch.ones(len(value), dtype=torch.bool))
                value = torch.where(seen.unsqueeze(-1), value, 0.0)
                with poutine.mask(mask=seen):
                    values[name] = pyro.sample(f"view_{name}", fn, obs=value)
        return values

    def guide(
        self, batch: Mapping[str, torch.Tensor | None], present: Tensors | None = None
    ) -> None:
        """The exact posterior of the code."""
        loc, scale = self.product(batch, present)
        with pyro.plate("rows", num_rows(batch, present)):
            pyro.sample("code", dist.Normal(loc, scale).to_event(1))

    def expert(self, name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likelihood p(value | code) as a normal in the code: loc and scale.

        Both have the shape ``(batch, latent_dim)``. Normalised, so it is the likelihood up to
        a factor for each row.
        """
        weight = self.weight[name] / self.scale[name].unsqueeze(-1)
        precision = weight.square().sum(0)
        loc = ((value - self.loc[name]) / self.scale[name]) @ weight / precision
        return loc, precision.rsqrt().expand_as(loc)

    def product(
        self, batch: Mapping[str, torch.Tensor | None], present: Tensors | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loc and scale of the exact posterior, ``(batch, latent_dim)`` each."""
        shape = (num_rows(batch, present), self.latent_dim)
        precision = self.loc["image"].new_ones(shape)
        weighted = torch.zeros_like(precision)
        for name, value in batch.items():
            if value is None:
                continue
            loc, scale = self.expert(name, value)
            seen = (present or {}).get(name, torch.ones(len(value), dtype=torch.bool))
            seen = seen.unsqueeze(-1)
            precision = precision + torch.where(seen, scale**-2, 0.0)
            weighted = weighted + torch.where(seen, loc * scale**-2, 0.0)
        return weighted / precision, precision.rsqrt()

    @property
    def exact(self) -> MultimodalLinearGaussian:
        """Log-likelihoods, conditionals, posteriors and predictions."""
        noise = {name: scale.square() for name, scale in self.scale.items()}
        return MultimodalLinearGaussian(self.loc, self.weight, noise)

    def data(self, batch_size: int = 6, seed: int = 5) -> Tensors:
        """Rows drawn from the model, all modalities observed."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            draws = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return draws.to(self.loc["image"])

        code = random(batch_size, self.latent_dim)
        return {
            name: loc
            + code @ self.weight[name].mT
            + self.scale[name] * random(batch_size, len(loc))
            for name, loc in self.loc.items()
        }


def num_rows(batch: Mapping[str, Any], present: Mapping[str, Any] | None = None) -> int:
    """Rows of a batch; where it has no data, of the masks."""
    columns = [value for value in batch.values() if value is not None]
    return len((columns or list((present or {}).values()))[0])


def all_patterns(batch: Tensors) -> Iterator[Pattern]:
    """Every pattern of presence of a complete batch, one for all rows: 8 for three modalities."""
    for choice in product([True, False], repeat=len(batch)):
        seen = tuple(name for name, chosen in zip(batch, choice, strict=True) if chosen)
        yield Pattern(
            seen,
            {n: x.clone() if n in seen else x * torch.nan for n, x in batch.items()},
            {n: torch.full((len(x),), n in seen) for n, x in batch.items()},
            {n: x if n in seen else None for n, x in batch.items()},
            {n: x for n, x in batch.items() if n in seen},
        )


def mixed_patterns(batch: Tensors) -> tuple[Tensors, Tensors]:
    """Row n in pattern n of ``all_patterns`` (and again from the first): NaN data, and masks."""
    choices = list(product([True, False], repeat=len(batch)))
    length = num_rows(batch)
    table = torch.tensor([choices[row % len(choices)] for row in range(length)])
    present = dict(zip(batch, table.unbind(-1), strict=True))
    nan = {n: torch.where(present[n].unsqueeze(-1), x, torch.nan) for n, x in batch.items()}
    return nan, present
