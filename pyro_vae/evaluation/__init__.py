"""Evaluation: functions of (model, guide, data) that never touch the parameters."""

from pyro_vae.evaluation.estimate import LogLikelihoodEstimate
from pyro_vae.evaluation.likelihood import importance_weighted_log_likelihood
from pyro_vae.evaluation.weights import pareto_k

__all__ = ["LogLikelihoodEstimate", "importance_weighted_log_likelihood", "pareto_k"]
