"""What :mod:`pyro_vae.priors` asks of the networks, transforms and tensors that it is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution, Transform, constraints

from pyro_vae.checks import support_of, support_of_numbers
from pyro_vae.isolation import without_side_effects

__all__ = [
    "check_code",
    "check_distribution",
    "check_encoder",
    "check_pseudo_inputs",
    "check_real",
    "check_transforms",
]


def check_pseudo_inputs(inputs: Any, limits: tuple[float, float] | None) -> None:
    """Raises unless ``inputs`` are rows of finite data within ``limits``."""
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        got = f"dtype {inputs.dtype}" if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise TypeError(
            f"VampPrior: expected pseudo_inputs to be a float tensor, got {got}. "
            "Convert it to the dtype of the encoder."
        )
    if inputs.dim() == 0 or not inputs.numel():
        raise ValueError(
            "VampPrior: expected at least one pseudo-input, got shape "
            f"{tuple(inputs.shape)}. Pass rows of the training data."
        )
    if not inputs.isfinite().all():
        raise ValueError(
            f"VampPrior: expected finite pseudo_inputs, got {int((~inputs.isfinite()).sum())} "
            "values that are not. Choose other rows, or fill those in."
        )
    if limits is None:
        return
    low, high = limits
    if not low < high:
        raise ValueError(
            f"VampPrior: expected limits (low, high) with low < high, got {limits}. "
            "For images in [0, 1] they are (0.0, 1.0)."
        )
    if inputs.min() < low or inputs.max() > high:
        raise ValueError(
            f"VampPrior: expected pseudo_inputs in the limits {limits}, got values in "
            f"[{float(inputs.min()):g}, {float(inputs.max()):g}]. Outside they would not learn; "
            "rescale them as the data."
        )


def check_encoder(encoder: nn.Module, inputs: torch.Tensor) -> None:
    """Raises unless ``encoder`` turns every row of ``inputs`` into one code."""
    with without_side_effects(encoder):
        try:
            fn = encoder(inputs)
        except Exception as err:
            raise ValueError(
                "VampPrior: expected pseudo_inputs that the encoder takes, got shape "
                f"{tuple(inputs.shape)}, {inputs.dtype}, {inputs.device}, on which it raises: "
                f"{err} Pass rows of the data as the guide gets them."
            ) from err
    check_distribution("VampPrior", "the encoder", fn)
    if fn.batch_shape != (len(inputs),) or not fn.event_shape:
        raise ValueError(
            f"VampPrior: expected the encoder to turn each of {len(inputs)} pseudo-inputs into one "
            f"code, got batch shape {tuple(fn.batch_shape)} and event shape "
            f"{tuple(fn.event_shape)} from pseudo_inputs of shape {tuple(inputs.shape)}. Pass them "
            "as the guide gets its data; was `.to_event(1)` forgotten in the encoder?"
        )


def check_transforms(transforms: Any) -> None:
    """Raises unless ``transforms`` are bijective transforms of torch, one or more."""
    is_sequence = isinstance(transforms, Sequence | nn.ModuleList)
    if isinstance(transforms, Transform) or not is_sequence:
        raise TypeError(
            "FlowPrior: expected a sequence of transforms or a flow, got "
            f"{type(transforms).__name__}. Pass a single transform as [transform]."
        )
    if not transforms:
        raise ValueError(
            "FlowPrior: expected at least one transform, got none. "
            "Without one the prior is a StandardNormalPrior."
        )
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"FlowPrior: expected transforms, got {type(transform).__name__} among them. "
                "Condition a conditional transform first; of zuko, pass a whole flow, "
                "zuko.flows.Flow(transforms, base)."
            )
        if not transform.bijective:
            raise ValueError(
                f"FlowPrior: expected bijective transforms, got {type(transform).__name__}, which "
                "takes several values to one. Leave it out."
            )


def check_code(site: str, fn: Any, code: torch.Tensor) -> None:
    """Raises unless ``fn`` is a distribution over one code for each row of the code above."""
    check_distribution("HierarchicalPrior", f"the network of site '{site}'", fn)
    if not fn.event_shape or fn.batch_shape != code.shape[: len(fn.batch_shape)]:
        raise ValueError(
            f"HierarchicalPrior: expected one code per row at site '{site}', got batch shape "
            f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} from the code above, "
            f"of shape {tuple(code.shape)}. Was `.to_event(1)` forgotten? It declares the "
            "dimensions of one code: dist.Normal(loc, scale).to_event(1)."
        )


def check_distribution(where: str, network: str, fn: Any) -> None:
    """Raises unless ``fn`` is a distribution."""
    if not isinstance(fn, Distribution):
        raise TypeError(
            f"{where}: expected {network} to return a distribution, got {type(fn).__name__}. "
            "Wrap it in pyro_vae.nets.NormalEncoder, with 2 * latent_dim outputs."
        )


def check_real(site: str, fn: Any) -> None:
    """Raises if a flow, or its noise, is bounded: it is then no density for all real codes."""
    support: Any = support_of(fn)
    if support is None:  # Zuko's flows declare none.
        support = None if (base := getattr(fn, "base", None)) is None else support_of(base)
    support = support_of_numbers(support)
    if support not in (None, constraints.real, constraints.real_vector):
        raise ValueError(
            f"FlowPrior: expected a flow over all real codes for site '{site}', got one that, or "
            f"whose noise, has the support {support}. Outside it there is no density; use one with "
            "normal noise, such as zuko.flows.NSF."
        )
