"""Objectives for ``pyro.infer.SVI``: each reports the true negative bound as its loss."""

from pyro_vae.objectives.capacity import TraceCapacity_ELBO
from pyro_vae.objectives.classification import TraceClassification_ELBO
from pyro_vae.objectives.dip import TraceDIP_ELBO
from pyro_vae.objectives.expert_kl import TraceExpertKL_ELBO
from pyro_vae.objectives.factor import TraceFactor_ELBO
from pyro_vae.objectives.free_bits import TraceFreeBits_ELBO
from pyro_vae.objectives.geco import TraceGECO_ELBO
from pyro_vae.objectives.interplay import TraceInterplay_ELBO
from pyro_vae.objectives.iwae import TraceIWAE_ELBO
from pyro_vae.objectives.mmd import TraceMMD_ELBO
from pyro_vae.objectives.subsets import TraceSubsets_ELBO
from pyro_vae.objectives.total_correlation import TraceTotalCorrelation_ELBO
from pyro_vae.objectives.vq import TraceVQ_ELBO

__all__ = [
    "TraceCapacity_ELBO",
    "TraceClassification_ELBO",
    "TraceDIP_ELBO",
    "TraceExpertKL_ELBO",
    "TraceFactor_ELBO",
    "TraceFreeBits_ELBO",
    "TraceGECO_ELBO",
    "TraceIWAE_ELBO",
    "TraceInterplay_ELBO",
    "TraceMMD_ELBO",
    "TraceSubsets_ELBO",
    "TraceTotalCorrelation_ELBO",
    "TraceVQ_ELBO",
]
