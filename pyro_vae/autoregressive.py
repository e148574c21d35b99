"""A network whose i-th output depends on the variables before the i-th alone."""

from collections.abc import Sequence

import torch
from pyro.nn import MaskedLinear
from torch import nn

from pyro_vae.checks import check_at_least

__all__ = ["AutoregressiveNet"]


class AutoregressiveNet(nn.Module):
    """Masked layers: output i is a function of the variables 0 ... i-1.

    Args:
        num_variables: N, in the order in which they depend on one another.
        hidden: Widths of the hidden layers, each at least N - 1 so that no variable is lost.
        in_features: Numbers that make up one variable: 1, or K for one-hot vectors.
        out_features: Outputs for each variable, such as loc and raw scale.
        activation: Class of the activation.
        dropout: Probability of dropping a hidden unit while training.

    Shapes: ``(*sample, batch, N * in_features)`` to ``(*sample, batch, N, out_features)``.

    Raises:
        ValueError: If a hidden layer is too narrow, or the input of another width.

    Example:
        >>> net = AutoregressiveNet(4, [16], out_features=2)
        >>> net(torch.zeros(5, 4)).shape
        torch.Size([5, 4, 2])

    References:
        Germain et al. (2015), MADE: masked autoencoder for distribution estimation,
        https://arxiv.org/abs/1502.03509. Hidden units are dealt out evenly instead of at random.
    """

    def __init__(
        self,
        num_variables: int,
        hidden: Sequence[int],
        *,
        in_features: int = 1,
        out_features: int = 2,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        where = "AutoregressiveNet"
        check_at_least(where, "num_variables", num_variables, 1)
        check_at_least(where, "in_features", in_features, 1)
        check_at_least(where, "out_features", out_features, 1)
        for width in hidden:
            check_at_least(where, "hidden", width, max(num_variables - 1, 1))
        super().__init__()
        self.num_variables, self.out_features = num_variables, out_features
        self.in_features = in_features
        # How many variables a unit may see: inputs are seen by units of a higher number, hidden
        # units pass on what they see, and output i sees i variables.
        seen = torch.arange(num_variables).repeat_interleave(in_features) + 1
        layers: list[nn.Module] = []
        for width in hidden:
            units = torch.arange(width) % max(num_variables - 1, 1) + 1
            layers += [_masked(seen, units), activation()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            seen = units
        outputs = torch.arange(num_variables).repeat_interleave(out_features)
        self.layers = nn.Sequential(*layers, _masked(seen, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layers."""
        width = self.num_variables * self.in_features
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(
                f"AutoregressiveNet: expected input of width {width} in the last dimension, got "
                f"shape {tuple(x.shape)}. Put the numbers of all variables side by side."
            )
        out: torch.Tensor = self.layers(x)
        return out.unflatten(-1, (self.num_variables, self.out_features))


def _masked(seen: torch.Tensor, units: torch.Tensor) -> nn.Module:
    """A layer in which a unit sees the inputs that see no more variables than it may."""
    mask = (seen <= units.unsqueeze(-1)).to(torch.get_default_dtype())
    return MaskedLinear(len(seen), len(units), mask)
