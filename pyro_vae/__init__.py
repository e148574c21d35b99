"""Variational autoencoders for Pyro, with numbers checked against exact answers."""

from pyro_vae import schedules
from pyro_vae.evaluation import LogLikelihoodEstimate, importance_weighted_log_likelihood
from pyro_vae.fit import fit
from pyro_vae.handlers import scale_kl
from pyro_vae.history import History

__version__ = "0.1.0"

__all__ = [
    "History",
    "LogLikelihoodEstimate",
    "fit",
    "importance_weighted_log_likelihood",
    "scale_kl",
    "schedules",
]
