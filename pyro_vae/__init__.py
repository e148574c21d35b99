"""Variational autoencoders for Pyro, with numbers checked against exact answers."""

from pyro_vae import (
    baselines,
    conditioning,
    datasets,
    evaluation,
    guides,
    latents,
    likelihoods,
    models,
    nets,
    objectives,
    priors,
    schedules,
)
from pyro_vae.compiled_svi import CaptureError, CompiledSVI
from pyro_vae.evaluation import LogLikelihoodEstimate, importance_weighted_log_likelihood
from pyro_vae.fit import fit
from pyro_vae.handlers import mask_missing, scale_kl
from pyro_vae.history import History
from pyro_vae.inference_data import to_inference_data

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CompiledSVI",
    "History",
    "LogLikelihoodEstimate",
    "baselines",
    "conditioning",
    "datasets",
    "evaluation",
    "fit",
    "guides",
    "importance_weighted_log_likelihood",
    "latents",
    "likelihoods",
    "mask_missing",
    "models",
    "nets",
    "objectives",
    "priors",
    "scale_kl",
    "schedules",
    "to_inference_data",
]
