"""Amortized guides. Import them as ``pyro_vae.guides``."""

from pyro_vae.guides.auto import AmortizedAutoGuide
from pyro_vae.guides.categorical import AmortizedCategorical, AmortizedOneHot
from pyro_vae.guides.codes import NearestCode
from pyro_vae.guides.flow import AmortizedFlow
from pyro_vae.guides.gaussian_mixture import ExactGaussianMixture
from pyro_vae.guides.hierarchical import AmortizedBottomUp, AmortizedLadder
from pyro_vae.guides.interplay import AmortizedInterplay
from pyro_vae.guides.linear_gaussian import ExactLinearGaussian
from pyro_vae.guides.mixture import AmortizedMixture
from pyro_vae.guides.multimodal import AmortizedSet, ProductOfExperts
from pyro_vae.guides.multimodal_mixtures import MixtureOfExperts, MixtureOfProducts
from pyro_vae.guides.semi_supervised import AmortizedSemiSupervised
from pyro_vae.guides.vae import AmortizedMultivariateNormal, AmortizedNormal

__all__ = [
    "AmortizedAutoGuide",
    "AmortizedBottomUp",
    "AmortizedCategorical",
    "AmortizedFlow",
    "AmortizedInterplay",
    "AmortizedLadder",
    "AmortizedMixture",
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "AmortizedOneHot",
    "AmortizedSemiSupervised",
    "AmortizedSet",
    "ExactGaussianMixture",
    "ExactLinearGaussian",
    "MixtureOfExperts",
    "MixtureOfProducts",
    "NearestCode",
    "ProductOfExperts",
]
