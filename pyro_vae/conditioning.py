"""Networks that depend on a context: a class, a vector, an image.

A conditional network is called as ``net(h, context)``. Leading dimensions broadcast, ``(*sample,
batch, *event)``, so that particles and enumerated classes may stand on either side.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from pyro_vae.checks import check_at_least
from pyro_vae.label_checks import check_labels, is_integer

__all__ = ["Concatenate", "Embed", "FiLM", "OneHot"]


class OneHot(nn.Module):
    """Turns classes into one-hot vectors; takes one-hot vectors as they are.

    Args:
        num_classes: C.

    Shapes: integers ``(*sample, batch)``, or one-hot rows ``(*sample, batch, C)`` of floats, to
    ``(*sample, batch, C)`` of the default dtype, or that of the rows. Floats in one dimension are
    refused: whether they are one row or a class for each row cannot be seen.

    Raises:
        TypeError: If the classes are neither integers nor rows of floats.
        ValueError: If a class is not in 0 ... C-1, or a row is not one-hot.

    Example:
        >>> OneHot(3)(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    _eye: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        check_at_least("OneHot", "num_classes", num_classes, 1)
        super().__init__()
        self.num_classes = num_classes
        # A buffer follows the module to other devices and dtypes.
        self.register_buffer("_eye", torch.eye(num_classes), persistent=False)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Encodes classes."""
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            self._check_one_hot(y)
            return y
        check_labels("OneHot", "y", y, self.num_classes)
        return self._eye[y.long()]

    def _check_one_hot(self, y: torch.Tensor) -> None:
        right = y.dim() > 1 and y.shape[-1] == self.num_classes
        if not right or not bool((((y == 0) | (y == 1)).all(-1) & (y.sum(-1) == 1)).all()):
            raise ValueError(
                f"OneHot: expected classes as integers, or one-hot rows of {self.num_classes} "
                f"floats with a single 1, shape (batch, {self.num_classes}), got other floats, of "
                f"shape {tuple(y.shape)}. Pass integer classes, y.long() or y.argmax(-1)."
            )

    def extra_repr(self) -> str:
        """For ``repr``."""
        return str(self.num_classes)


class Embed(nn.Module):
    """Turns classes into learnt vectors.

    Args:
        num_classes: C.
        embedding_dim: Length of a vector.

    Shapes: integers ``(*sample, batch)`` to ``(*sample, batch, embedding_dim)``.

    Raises:
        TypeError: If the classes are no integers.
        ValueError: If a class is not in 0 ... C-1.

    Example:
        >>> Embed(10, 4)(torch.tensor([2, 0, 9])).shape
        torch.Size([3, 4])
    """

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        check_at_least("Embed", "num_classes", num_classes, 1)
        check_at_least("Embed", "embedding_dim", embedding_dim, 1)
        super().__init__()
        self.vectors = nn.Embedding(num_classes, embedding_dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Looks the vectors up."""
        check_labels("Embed", "y", y, self.vectors.num_embeddings)
        result: torch.Tensor = self.vectors(y.long())
        return result


class Concatenate(nn.Module):
    """Puts the context beside the input of a network: ``net(cat([h, embed(context)], -1))``.

    Args:
        net: Network whose input is as wide as both together.
        embed: From the context to features ``(*sample, batch, features)``; by default the context
            is taken as it is.

    Shapes: h ``(*sample, batch, width)`` and features ``(*sample, batch, features)``, whose
    leading dimensions broadcast, to what ``net`` returns.

    Raises:
        TypeError: If the context without ``embed`` holds integers.
        ValueError: If leading dimensions do not broadcast, or a context of floats has one
            dimension beside an input with rows.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> decoder = Concatenate(MLP(2 + 10, [16], 64), embed=OneHot(10))
        >>> decoder(torch.zeros(7, 5, 2), torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([7, 5, 64])
    """

    def __init__(self, net: nn.Module, *, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.embed = net, embed

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Applies the network to both."""
        features = _features("Concatenate", h, context, self.embed)
        leading = torch.broadcast_shapes(h.shape[:-1], features.shape[:-1])
        parts = [part.expand(*leading, part.shape[-1]) for part in (h, features)]
        result: torch.Tensor = self.net(torch.cat(parts, -1))
        return result


class FiLM(nn.Module):
    r"""Fully connected layers whose hidden units the context scales and shifts.

    .. math:: h_l = \sigma\big((1 + \gamma_l(c)) \odot (W_l h_{l-1} + b_l) + \beta_l(c)\big)

    The maps to scale and shift are linear and start at zero, so that the context plays no role
    at first. They learn from the first step on, and with them what ``embed`` learns from the
    second.

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers, one or more.
        out_features: Width of the output.
        context_features: Width of the context's features.
        embed: From the context to features; by default the context is taken as it is.
        activation: Class of the activation.

    Shapes: h ``(*sample, batch, in_features)`` and features ``(*sample, batch,
    context_features)``, whose leading dimensions broadcast, to ``(*sample, batch, out_features)``.

    Raises:
        TypeError: If the context without ``embed`` holds integers.
        ValueError: If there is no hidden layer, or a width is another one; as in
            :class:`Concatenate`.

    Example:
        >>> film = FiLM(2, [16, 16], 64, context_features=10, embed=OneHot(10))
        >>> film(torch.zeros(7, 5, 2), torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([7, 5, 64])

    References:
        Perez et al. (2018), FiLM: visual reasoning with a general conditioning layer, equation 2,
        https://arxiv.org/abs/1709.07871. The 1 in front of the scale is theirs, too.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        context_features: int,
        *,
        embed: nn.Module | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        if not hidden:
            raise ValueError(
                "FiLM: expected one or more hidden layers, got none. The context acts on hidden "
                "units; for a linear map of both use Concatenate."
            )
        super().__init__()
        self.in_features, self.context_features = in_features, context_features
        self.embed, self.activation = embed, activation()
        self.layers = nn.ModuleList(
            nn.Linear(*widths) for widths in pairwise([in_features, *hidden])
        )
        self.modulations = nn.ModuleList(nn.Linear(context_features, 2 * n) for n in hidden)
        self.last = nn.Linear(hidden[-1], out_features)
        for modulation in self.modulations:
            for parameter in modulation.parameters():
                nn.init.zeros_(parameter)

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Applies the layers."""
        features = _features("FiLM", h, context, self.embed)
        for name, part, width in (
            ("input", h, self.in_features),
            ("context", features, self.context_features),
        ):
            if part.shape[-1] != width:
                raise ValueError(
                    f"FiLM: expected {name} of width {width} in the last dimension, got shape "
                    f"{tuple(part.shape)}. Flatten images with x.flatten(1)."
                )
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(features).chunk(2, dim=-1)
            h = self.activation((1 + scale) * layer(h) + shift)
        result: torch.Tensor = self.last(h)
        return result


def _features(
    where: str, h: torch.Tensor, context: torch.Tensor, embed: nn.Module | None
) -> torch.Tensor:
    """The context as features whose leading dimensions broadcast with those of ``h``."""
    if embed is None and (not isinstance(context, torch.Tensor) or is_integer(context)):
        got = getattr(context, "dtype", type(context).__name__)
        raise TypeError(
            f"{where}: expected a context of floats, got {got}. For classes give "
            "embed=OneHot(num_classes) or embed=Embed(num_classes, dim); pass numbers, also rows "
            "that are one-hot, as context.float()."
        )
    features: torch.Tensor = context if embed is None else embed(context)
    if not features.dim():
        raise ValueError(
            f"{where}: expected a context with features in its last dimension, got a single "
            "number. Give each row a vector; context.reshape(-1, 1) makes one of a number a row."
        )
    numbers = isinstance(context, torch.Tensor) and context.is_floating_point()
    if numbers and features.dim() < 2 <= h.dim():  # A class without rows means all of them.
        raise ValueError(
            f"{where}: expected a context with a row of features for each row, got floats of shape "
            f"{tuple(context.shape)} beside an input of shape {tuple(h.shape)}. Of one number for "
            "each row context.unsqueeze(-1) makes rows; one row for all is context.unsqueeze(0)."
        )
    try:
        torch.broadcast_shapes(h.shape[:-1], features.shape[:-1])
    except RuntimeError as err:
        raise ValueError(
            f"{where}: expected context and input with the same rows, got features of shape "
            f"{tuple(features.shape)} beside an input of shape {tuple(h.shape)}. Give each row its "
            "context: classes are integers of shape (batch,). Both have one dimension of features, "
            "so flatten images with x.flatten(1)."
        ) from err
    return features
