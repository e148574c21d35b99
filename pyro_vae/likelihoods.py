"""From a decoder's output to the distribution of the data.

Each is a small module: ``pyro.sample("x", likelihood(decoder(z)), obs=x)`` works in any program.
Outputs are unconstrained numbers of shape ``(*sample, batch, *event)``; the last ``event_dim``
dimensions make up one datum.
"""

import math

import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_vae.distributions import LogPoisson, StableContinuousBernoulli

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "HeteroscedasticNormal",
    "NegativeBinomial",
    "Normal",
    "Poisson",
]


class _Likelihood(nn.Module):
    """Abstract: a likelihood over ``event_dim`` dimensions."""

    def __init__(self, event_dim: int = 1) -> None:
        super().__init__()
        self.event_dim = event_dim

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}"


class Bernoulli(_Likelihood):
    """Binary data; the output holds logits.

    Example:
        >>> Bernoulli()(torch.zeros(5, 64)).log_prob(torch.ones(5, 64)).shape
        torch.Size([5])
    """

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps logits ``(*sample, batch, *event)`` to a distribution."""
        return dist.Bernoulli(logits=output).to_event(self.event_dim)


class ContinuousBernoulli(_Likelihood):
    """Data in [0, 1], such as grey values; the output holds logits.

    References:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli,
        https://arxiv.org/abs/1907.06845
    """

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps logits ``(*sample, batch, *event)`` to a distribution."""
        return StableContinuousBernoulli(logits=output).to_event(self.event_dim)


class Normal(_Likelihood):
    """Real data with noise that does not depend on the code; the output is the mean.

    Args:
        scale: Standard deviation, a number or a tensor that broadcasts with one datum (so a
            tensor of the datum's shape gives each dimension its own noise).
        learn: Whether ``scale`` is only the start of a parameter.
        event_dim: Number of dimensions of one datum.

    Raises:
        ValueError: If ``scale`` is not positive.

    Example:
        >>> one_per_pixel = Normal(torch.ones(64), learn=True)
        >>> one_per_pixel(torch.zeros(5, 64)).event_shape, one_per_pixel.scale.shape
        (torch.Size([64]), torch.Size([64]))
    """

    log_scale: torch.Tensor

    def __init__(
        self, scale: float | torch.Tensor = 1.0, *, learn: bool = False, event_dim: int = 1
    ) -> None:
        super().__init__(event_dim)
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if not (scale > 0).all() or not scale.isfinite().all():
            raise ValueError(
                f"likelihoods.Normal: expected a positive, finite scale, got {float(scale.min())} "
                "at least. A standard deviation of 1 is a safe start with learn=True."
            )
        log_scale = scale.log()
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> torch.Tensor:
        """Standard deviation of the noise."""
        return self.log_scale.exp()

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps means ``(*sample, batch, *event)`` to a distribution."""
        return dist.Normal(output, self.scale).to_event(self.event_dim)


class HeteroscedasticNormal(_Likelihood):
    """Real data with predicted noise: the output holds means and raw scales, side by side.

    Args:
        min_scale: Smallest standard deviation. Without a floor the likelihood has no maximum:
            the density grows without bound where a datum is hit exactly.
        event_dim: Number of dimensions of one datum.

    Shapes: ``(*sample, batch, *event[:-1], 2 * event[-1])`` to events of shape ``event``.
    """

    def __init__(self, min_scale: float = 1e-3, event_dim: int = 1) -> None:
        super().__init__(event_dim)
        if not min_scale > 0:
            raise ValueError(
                f"HeteroscedasticNormal: expected min_scale > 0, got {min_scale}. Choose it in "
                "the units of the data, for instance a tenth of their resolution."
            )
        self.min_scale = min_scale

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps means and raw scales to a distribution."""
        if output.shape[-1] % 2:
            raise ValueError(
                "HeteroscedasticNormal: expected an even number of outputs (means and scales), "
                f"got {output.shape[-1]}. Give the decoder twice the width of the data."
            )
        loc, raw_scale = output.chunk(2, dim=-1)
        return dist.Normal(loc, softplus(raw_scale) + self.min_scale).to_event(self.event_dim)


class Categorical(_Likelihood):
    """Classes 0 ... C-1 in every dimension; the output has the C logits in one more dimension.

    Shapes: ``(*sample, batch, *event, C)`` to events of shape ``event`` (integers).
    """

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps logits to a distribution."""
        return dist.Categorical(logits=output).to_event(self.event_dim)


class Poisson(_Likelihood):
    """Counts; the output holds log-rates."""

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps log-rates ``(*sample, batch, *event)`` to a distribution."""
        return LogPoisson(output).to_event(self.event_dim)


class NegativeBinomial(_Likelihood):
    """Overdispersed counts: mean m and variance m + m^2 / r; the output holds log m.

    Args:
        event_shape: Shape of one datum; each of its dimensions learns its own r.
        inverse_dispersion: Start of r; large values approach the Poisson.

    Example:
        >>> fn = NegativeBinomial((3,), inverse_dispersion=2.0)(torch.zeros(5, 3))
        >>> bool(torch.allclose(fn.mean, torch.ones(5, 3)))
        True
        >>> bool(torch.allclose(fn.variance, torch.full((5, 3), 1.5)))
        True
    """

    def __init__(self, event_shape: tuple[int, ...], inverse_dispersion: float = 1.0) -> None:
        super().__init__(len(event_shape))
        if not inverse_dispersion > 0:
            raise ValueError(
                "NegativeBinomial: expected inverse_dispersion > 0, got "
                f"{inverse_dispersion}. Use Poisson for counts without overdispersion."
            )
        start = math.log(inverse_dispersion)
        self.log_inverse_dispersion = nn.Parameter(torch.full(event_shape, start))

    def forward(self, output: torch.Tensor) -> dist.TorchDistribution:
        """Maps log-means ``(*sample, batch, *event)`` to a distribution."""
        logits = output - self.log_inverse_dispersion  # of m / (m + r)
        fn = dist.NegativeBinomial(self.log_inverse_dispersion.exp(), logits=logits)
        return fn.to_event(self.event_dim)
