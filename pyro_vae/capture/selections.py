"""Choices by masks in torch's and Pyro's own code, as operations whose shapes are fixed."""

from typing import Any

import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from pyro.infer.util import Dice
from torch.overrides import TorchFunctionMode

from pyro_vae.capture.errors import outer_frame
from pyro_vae.capture.recording import Readings

__all__ = ["Selections"]

_DICE = Dice.compute_expectation.__code__
_SPLINE = _monotonic_rational_spline.__code__


class Selections(TorchFunctionMode):
    """Lets some programs be captured whose operations have shapes that depend on values.

    - Pyro's sum over enumerated values leaves out those of probability 0: here they add zeros.
    - Pyro's splines copy elements outside of their box: here all, where they are outside.
    - ``one_hot`` looks for its largest index: here that is a check of values.

    Args:
        readings: Is told what has to be true of values.
    """

    def __init__(self, readings: Readings) -> None:
        super().__init__()
        self._readings = readings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            return self._one_hot(func, *args, **kwargs)
        if func is torch.Tensor.masked_select and outer_frame().f_code is _DICE:
            values, mask = args
            return torch.where(mask, values, 0.0)
        if func is torch.Tensor.__bool__ and outer_frame().f_code is _DICE:
            return False  # Not all of them are positive.
        if func is torch.Tensor.__getitem__ and _is_mask_of_spline(args[1]):
            return args[0]
        if func is torch.Tensor.__setitem__ and _is_mask_of_spline(args[1]):
            values, mask, new = args
            values.copy_(torch.where(mask, new, values))
            return None
        return func(*args, **kwargs)

    def _one_hot(self, func: Any, tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        if num_classes < 1:
            return func(tensor, num_classes)
        is_class = (tensor >= 0) & (tensor < num_classes)
        self._readings.assumed.append((is_class.all(), True))
        classes = torch.arange(num_classes, device=tensor.device)
        return (tensor.unsqueeze(-1) == classes).to(torch.int64)


def _is_mask_of_spline(index: Any) -> bool:
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
    return is_mask and outer_frame().f_code is _SPLINE
