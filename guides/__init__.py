"""Amortized guides. Import them as ``pyro_vae.guides``."""

from pyro_vae.guides.gaussian_mixture import ExactGaussianMixture
from pyro_vae.guides.linear_gaussian import ExactLinearGaussian
from pyro_vae.guides.vae import AmortizedMultivariateNormal, AmortizedNormal

__all__ = [
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "ExactGaussianMixture",
    "ExactLinearGaussian",
]
