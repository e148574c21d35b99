"""Exact and EM answers to hold a variational autoencoder against, and networks without latents.

Each closed-form or EM fit takes a data matrix and returns a result with ``log_prob(x)`` in nats per
row, the exact ``posterior(x)`` and ``sample(num_samples)``. All of it is computed in float64.
Autoencoders have no density; ``MADE`` has one and no latents.
``MultimodalLinearGaussian``, the fit of ``canonical_correlation``, takes a batch by modality for x,
and each row may lack some.
"""

from pyro_vae.baselines.autoencoder import Autoencoder, fit_autoencoder
from pyro_vae.baselines.canonical_correlation import CanonicalCorrelation, canonical_correlation
from pyro_vae.baselines.factor_analysis import factor_analysis_em
from pyro_vae.baselines.gaussian_mixture import (
    GaussianMixtureFit,
    gaussian,
    gaussian_mixture_em,
)
from pyro_vae.baselines.linear_autoencoder import linear_autoencoder, principal_angles
from pyro_vae.baselines.linear_gaussian import LinearGaussianFit
from pyro_vae.baselines.made import MADE, fit_made
from pyro_vae.baselines.multimodal_linear_gaussian import MultimodalLinearGaussian
from pyro_vae.baselines.ppca import ppca, ppca_em

__all__ = [
    "MADE",
    "Autoencoder",
    "CanonicalCorrelation",
    "GaussianMixtureFit",
    "LinearGaussianFit",
    "MultimodalLinearGaussian",
    "canonical_correlation",
    "factor_analysis_em",
    "fit_autoencoder",
    "fit_made",
    "gaussian",
    "gaussian_mixture_em",
    "linear_autoencoder",
    "ppca",
    "ppca_em",
    "principal_angles",
]
