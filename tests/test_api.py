"""The public names, where DESIGN.md says, documented and listed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import pyro_vae

NAMES = {
    "pyro_vae": [
        "CaptureError",
        "CompiledSVI",
        "History",
        "LogLikelihoodEstimate",
        "fit",
        "importance_weighted_log_likelihood",
        "mask_missing",
        "scale_kl",
        "to_inference_data",
    ],
    "pyro_vae.schedules": ["Constant", "Cyclical", "LinearWarmup"],
    "pyro_vae.models": [
        "ConditionalVAE",
        "GaussianMixture",
        "HierarchicalVAE",
        "InterplayVAE",
        "LinearGaussian",
        "MultimodalVAE",
        "SemiSupervisedVAE",
        "VAE",
    ],
    "pyro_vae.guides": [
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
    ],
    "pyro_vae.objectives": [
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
    ],
    "pyro_vae.evaluation": [
        "active_units",
        "aggregate_posterior",
        "beta_vae_score",
        "calibration",
        "class_posterior",
        "codebook_usage",
        "coherence",
        "conditional_log_likelihood",
        "dci",
        "elbo_terms",
        "factor_vae_score",
        "latent_classification",
        "mutual_information_gap",
        "posterior_collapse",
        "quadrature",
        "quadrature_elbo",
        "rate_distortion",
        "sap_score",
    ],
    "pyro_vae.priors": [
        "AutoregressiveCodePrior",
        "CategoricalPrior",
        "ConditionalPrior",
        "FlowPrior",
        "GaussianMixturePrior",
        "HierarchicalPrior",
        "InterplayPrior",
        "OneHotPrior",
        "StandardNormalPrior",
        "Unconditional",
        "UniformCodePrior",
        "VampPrior",
    ],
    "pyro_vae.experts": ["mixture_log_prob", "product_of_normals"],
    "pyro_vae.handlers": ["mask_missing", "scale_kl"],
    "pyro_vae.likelihoods": [
        "Bernoulli",
        "Categorical",
        "ContinuousBernoulli",
        "HeteroscedasticNormal",
        "NegativeBinomial",
        "Normal",
        "Poisson",
    ],
    "pyro_vae.nets": ["MLP", "ConvDecoder", "ConvEncoder"],
    "pyro_vae.autoregressive": ["AutoregressiveNet"],
    "pyro_vae.codebook": ["Codebook"],
    "pyro_vae.conditioning": ["Concatenate", "Embed", "FiLM", "OneHot"],
    "pyro_vae.labelled": ["Labelled"],
    "pyro_vae.one_hot": ["OneHotStraightThrough"],
    "pyro_vae.baselines": [
        "MADE",
        "Autoencoder",
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
    ],
    "pyro_vae.datasets": [
        "Batches",
        "binarize",
        "drop_modalities",
        "load_digits",
        "load_mnist",
        "load_sprites",
        "load_svhn",
        "mask_labels",
        "pair_by_class",
    ],
    "pyro_vae.latents": [
        "attribute_vector",
        "decode",
        "encode",
        "generate",
        "interpolate",
        "loop",
        "move",
        "reconstruct",
        "traverse",
        "walk",
    ],
    "pyro_vae.inference_data": ["to_inference_data"],
}
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(pyro_vae.__path__, prefix="pyro_vae.")
)


def own_names(module: ModuleType) -> list[str]:
    """Public functions and classes that are defined in the module itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module] if not hasattr(found, name)]
    assert missing == []
    assert set(NAMES[module]) <= set(found.__all__)


def test_modules_are_found() -> None:
    assert {"pyro_vae.models.vae", "pyro_vae.guides.vae", "pyro_vae.fit"} <= set(MODULES)


@pytest.mark.parametrize("name", ["pyro_vae", *MODULES])
def test_all_is_sorted_and_complete(name: str) -> None:
    module = sys.modules.get(name) or importlib.import_module(name)
    listed = module.__all__
    # Constants, classes, functions, as ruff's RUF022 sorts: then by name, as case tells.
    assert len(set(listed)) == len(listed)
    assert listed == sorted(listed, key=order)
    assert [entry for entry in listed if not hasattr(module, entry)] == []
    if not hasattr(module, "__path__"):
        assert [entry for entry in listed if entry.startswith("_")] == []


def order(name: str) -> tuple[int, str]:
    """SCREAMING_CASE first, CamelCase next, the others last."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("name", ["pyro_vae", *MODULES])
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for entry in module.__all__:
        value = vars(module)[entry]
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        assert value.__doc__, entry
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            if not method.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(getattr(value, method)), f"{entry}.{method}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_nothing_public_is_left_out(name: str) -> None:
    module = importlib.import_module(name)
    private_protocols = {"HasStep", "HasValue", "Steppable"}  # Types of arguments.
    assert set(own_names(module)) - private_protocols <= set(module.__all__)


def test_fit_is_the_function_and_its_module_is_importable() -> None:
    assert inspect.isfunction(pyro_vae.fit)
    assert inspect.ismodule(importlib.import_module("pyro_vae.fit"))
    assert inspect.isfunction(pyro_vae.fit)


def test_version() -> None:
    assert pyro_vae.__version__.count(".") == 2


def test_import_is_light_and_without_side_effects() -> None:
    code = """
import sys, torch, pyro
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(),
          pyro.settings.get())
import pyro_vae, pyro_vae.plots, pyro_vae.datasets, pyro_vae.models, pyro_vae.guides
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(),
         pyro.settings.get())
assert before == after
assert not list(pyro.get_param_store())
heavy = {"arviz", "matplotlib.pyplot", "pandas", "sklearn", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_all_programs_are_modules() -> None:
    for name in ("pyro_vae.models", "pyro_vae.guides"):
        module = importlib.import_module(name)
        for entry in module.__all__:
            program = getattr(module, entry)
            if not isinstance(program, type):  # A function that composes one.
                program = inspect.signature(program).return_annotation
            assert issubclass(program, torch.nn.Module)
