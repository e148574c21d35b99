"""Evaluation: functions of (model, guide, data) that never touch the parameters."""

from pyro_vae.evaluation.active_units import ActiveUnits, active_units
from pyro_vae.evaluation.aggregate import AggregatePosterior, aggregate_posterior
from pyro_vae.evaluation.calibration import Calibration, calibration
from pyro_vae.evaluation.class_posterior import ClassPosterior, class_posterior
from pyro_vae.evaluation.codebook_usage import CodebookUsage, codebook_usage
from pyro_vae.evaluation.coherence import Coherence, coherence
from pyro_vae.evaluation.collapse import LatentUse, PosteriorCollapse, posterior_collapse
from pyro_vae.evaluation.conditional import conditional_log_likelihood
from pyro_vae.evaluation.dci import DCIScore, dci
from pyro_vae.evaluation.disentanglement import (
    GapScore,
    code_factor_information,
    mutual_information_gap,
    sap_score,
)
from pyro_vae.evaluation.elbo_terms import ElboTerms, elbo_terms
from pyro_vae.evaluation.estimate import LogLikelihoodEstimate
from pyro_vae.evaluation.fixed_factor import (
    FixedFactorScore,
    beta_vae_score,
    factor_vae_score,
)
from pyro_vae.evaluation.labelled import Rate
from pyro_vae.evaluation.latent_classification import (
    LatentClassification,
    latent_classification,
)
from pyro_vae.evaluation.likelihood import importance_weighted_log_likelihood
from pyro_vae.evaluation.quadrature import (
    GridElbo,
    GridPosterior,
    quadrature,
    quadrature_elbo,
)
from pyro_vae.evaluation.rate_distortion import RateDistortionPoint, rate_distortion
from pyro_vae.evaluation.weights import pareto_k

__all__ = [
    "ActiveUnits",
    "AggregatePosterior",
    "Calibration",
    "ClassPosterior",
    "CodebookUsage",
    "Coherence",
    "DCIScore",
    "ElboTerms",
    "FixedFactorScore",
    "GapScore",
    "GridElbo",
    "GridPosterior",
    "LatentClassification",
    "LatentUse",
    "LogLikelihoodEstimate",
    "PosteriorCollapse",
    "Rate",
    "RateDistortionPoint",
    "active_units",
    "aggregate_posterior",
    "beta_vae_score",
    "calibration",
    "class_posterior",
    "code_factor_information",
    "codebook_usage",
    "coherence",
    "conditional_log_likelihood",
    "dci",
    "elbo_terms",
    "factor_vae_score",
    "importance_weighted_log_likelihood",
    "latent_classification",
    "mutual_information_gap",
    "pareto_k",
    "posterior_collapse",
    "quadrature",
    "quadrature_elbo",
    "rate_distortion",
    "sap_score",
]
