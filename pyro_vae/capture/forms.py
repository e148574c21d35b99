"""The forms of arguments: what a graph is made for."""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch.utils._pytree import TreeSpec

__all__ = ["Form", "TensorForm", "form_of"]

_PLAIN = (
    *(int, float, complex, str, bytes, bool, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.Size),
)


class TensorForm(NamedTuple):
    """What a graph depends on in a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorForm":
        """The form of a tensor."""
        strides = tensor.stride()
        return TensorForm(tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad)


class Form(NamedTuple):
    """What a graph depends on in the arguments of a step and in the settings of the libraries."""

    spec: TreeSpec
    leaves: tuple[Any, ...]
    settings: tuple[Any, ...]

    def __str__(self) -> str:
        shown = [
            str(tuple(leaf.shape)) if isinstance(leaf, TensorForm) else repr(leaf[1])
            for leaf in self.leaves
        ]
        return ", ".join(shown) or "none"


def form_of(leaves: Sequence[Any], spec: TreeSpec) -> Form | None:
    """The form of arguments; ``None`` if one is neither a tensor nor a plain value."""
    forms: list[Any] = []
    for leaf in leaves:
        if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout is torch.strided:
            forms.append(TensorForm.of(leaf))
        elif isinstance(leaf, _PLAIN):
            forms.append((type(leaf), leaf))  # 1, 1.0 and True are equal.
        else:
            return None
    settings = (
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        pyro.settings.get("module_local_params"),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )
    return Form(spec, tuple(forms), settings)
