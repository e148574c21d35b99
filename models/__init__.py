"""Generative models. Import them as ``pyro_vae.models``."""

from pyro_vae.models.conditional import ConditionalVAE
from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.models.hierarchical import HierarchicalVAE
from pyro_vae.models.interplay import InterplayVAE
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.multimodal import MultimodalVAE
from pyro_vae.models.semi_supervised import SemiSupervisedVAE
from pyro_vae.models.vae import VAE

__all__ = [
    "VAE",
    "ConditionalVAE",
    "GaussianMixture",
    "HierarchicalVAE",
    "InterplayVAE",
    "LinearGaussian",
    "MultimodalVAE",
    "SemiSupervisedVAE",
]
