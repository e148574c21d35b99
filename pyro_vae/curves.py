"""A fixed curve in the plane: the decoder of a nonlinear model that can be looked at."""

import torch
from torch import nn

__all__ = ["Trochoid"]


class Trochoid(nn.Module):
    r"""A curve with loops, :math:`f(z) = (p\,\omega z - r \sin \omega z,\; -r \cos \omega z)`.

    The path of a point on a spoke, longer than the radius, of a wheel that rolls along a line. A
    smooth decoder without parameters: with noise and a prior on z it makes data whose posterior
    is known by quadrature, with one mode at most x, two where the curve crosses itself, at
    :math:`p\,\omega z = r \sin \omega z`, and more inside a loop.

    Args:
        pitch: p, the radius of the wheel. Where it is below ``radius`` the curve has loops, and
            the larger their ratio the wider.
        radius: r, the length of the spoke.
        frequency: Omega, the angle by which the wheel turns as z grows by one.

    Shapes: ``(*sample, batch, 1)`` to ``(*sample, batch, 2)``.

    Raises:
        ValueError: If an argument is not positive; if codes do not have one number each.

    Example:
        >>> from pyro_vae.likelihoods import Normal
        >>> from pyro_vae.models import VAE
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> model = VAE(Trochoid(), Normal(0.3), StandardNormalPrior(1))
        >>> model(torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    References:
        Prince (2023), Understanding deep learning, section 17.1.2, for the kind of model.
    """

    def __init__(self, pitch: float = 0.6, radius: float = 2.0, frequency: float = 2.0) -> None:
        super().__init__()
        for name, value in {"pitch": pitch, "radius": radius, "frequency": frequency}.items():
            if not value > 0:
                raise ValueError(
                    f"Trochoid: expected {name} > 0, got {value}. The other direction is a "
                    "reflection of the curve."
                )
        self.pitch, self.radius, self.frequency = pitch, radius, frequency

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Points of the curve."""
        if z.dim() == 0 or z.shape[-1] != 1:
            raise ValueError(
                f"Trochoid: expected codes of shape (*sample, batch, 1), got {tuple(z.shape)}. "
                "A curve has one coordinate: StandardNormalPrior(1), or z.unsqueeze(-1)."
            )
        angle = self.frequency * z
        x = self.pitch * angle - self.radius * angle.sin()
        return torch.cat([x, -self.radius * angle.cos()], -1)

    def extra_repr(self) -> str:
        """What ``repr`` says of the module."""
        return f"pitch={self.pitch}, radius={self.radius}, frequency={self.frequency}"
