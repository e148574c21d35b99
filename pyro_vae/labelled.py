"""Classes that are known in some rows of a batch, as a distribution."""

from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import constraints, kl_divergence, register_kl
from torch.nn.functional import one_hot

from pyro_vae.label_checks import check_labels

__all__ = ["Labelled", "known_labels"]


class Labelled(dist.TorchDistribution):
    """A categorical distribution where no label is known, a point mass on the label where it is.

    It makes a latent class of a semi-supervised model and of its guide. Enumerated, it has all
    classes as its support in every row. In labelled rows the log-probability of those beside the
    label is the lowest number of the dtype, whose exponential is 0: unlike -inf it can be
    multiplied by a weight of 0.

    Args:
        base: The ``Categorical`` of rows without a label.
        label: Classes, integers of shape ``(batch,)``. Those where ``labelled`` is false play
            no role.
        labelled: bool, ``(batch,)``: the rows whose label is known.

    Attributes:
        base: As given, of this batch shape.
        label: Likewise, with 0 where no label is known.
        labelled: Likewise.

    Raises:
        TypeError: If ``base`` is no ``Categorical``, ``label`` holds no integers, or ``labelled``
            no truth values.
        ValueError: If a label is not in 0 ... C-1, or shapes differ.

    Example:
        >>> base = dist.Categorical(logits=torch.zeros(2, 3))
        >>> fn = Labelled(base, torch.tensor([2, -1]), torch.tensor([True, False]))
        >>> fn.probs
        tensor([[0.0000, 0.0000, 1.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = True

    def __init__(
        self,
        base: dist.Categorical,
        label: torch.Tensor,
        labelled: torch.Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(base, dist.Categorical):
            raise TypeError(
                f"Labelled: expected a Categorical as base, got {type(base).__name__}. Pass "
                "pyro.distributions.Categorical(logits=...) over the classes."
            )
        check_labels("Labelled", "label", label, base.logits.shape[-1], labelled=labelled)
        shape = torch.broadcast_shapes(base.batch_shape, label.shape)
        self.base = base.expand(shape)
        self.label = torch.where(labelled, label.long(), 0).expand(shape)
        self.labelled = labelled.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The classes 0 ... C-1, in labelled rows too."""
        return self.base.support

    @property
    def probs(self) -> torch.Tensor:
        """Probabilities of the classes, ``(*batch, C)``."""
        probs: torch.Tensor = self.base.probs
        point = one_hot(self.label, probs.shape[-1]).to(probs)
        return torch.where(self.labelled.unsqueeze(-1), point, probs)

    @property
    def mode(self) -> torch.Tensor:
        """The label, or the most probable class."""
        return torch.where(self.labelled, self.label, self.base.mode)

    @property
    def mean(self) -> torch.Tensor:
        """NaN, as that of a ``Categorical``: classes have none."""
        mean: torch.Tensor = self.base.mean
        return mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Labelled":
        """The same distribution with a larger batch shape."""
        new: Labelled = self._get_checked_instance(Labelled, _instance)
        shape = torch.Size(batch_shape)
        new.base = self.base.expand(shape)
        new.label, new.labelled = self.label.expand(shape), self.labelled.expand(shape)
        super(Labelled, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws classes; the label where it is known."""
        return torch.where(self.labelled, self.label, self.base.sample(sample_shape))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability of classes, nats."""
        log_prob: torch.Tensor = self.base.log_prob(value)
        lowest = torch.finfo(log_prob.dtype).min
        point = torch.zeros_like(log_prob).masked_fill(value != self.label, lowest)
        return torch.where(self.labelled, point, log_prob)

    def label_log_prob(self) -> torch.Tensor:
        """Log-probability of the labels under ``base``, nats, 0 where none is known."""
        log_prob: torch.Tensor = self.base.log_prob(self.label)
        return torch.where(self.labelled, log_prob, 0.0)

    def entropy(self) -> torch.Tensor:
        """Entropy, nats, 0 in labelled rows."""
        return torch.where(self.labelled, 0.0, self.base.entropy())

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        """All classes, ``(C, *batch)``, or ``(C, 1, ...)`` with ``expand=False``."""
        support: torch.Tensor = self.base.enumerate_support(expand)
        return support


def known_labels(
    where: str, y: torch.Tensor | None, labelled: torch.Tensor | None, num_classes: int, like: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The arguments ``y`` and ``labelled`` of a semi-supervised program, checked.

    Args:
        where: The program, for the messages.
        y: Classes, or ``None`` where no row has a label.
        labelled: The rows whose label is known; all by default.
        num_classes: C.
        like: The data, a row each.

    Returns:
        Classes, 0 where none is known, and which are known: both ``(batch,)``.
    """
    if y is None:
        if labelled is not None:
            raise ValueError(
                f"{where}: expected labels y beside labelled, got None. Pass y, of any values "
                "where labelled is False, or leave both out."
            )
        return None
    check_labels(where, "y", y, num_classes, num_rows=len(like), labelled=labelled)
    if labelled is None:
        labelled = torch.ones_like(y, dtype=torch.bool)
    return torch.where(labelled, y.long(), 0), labelled


@register_kl(Labelled, Labelled)  # type: ignore[untyped-decorator]
def _kl_labelled(p: Labelled, q: Labelled) -> torch.Tensor:
    """In rows that both know alike 0, in rows that neither knows that of the bases."""
    same = torch.where(p.label == q.label, 0.0, torch.inf)
    of_point = torch.where(q.labelled, same, -q.base.log_prob(p.label))
    of_base = torch.where(q.labelled, torch.inf, kl_divergence(p.base, q.base))
    return torch.where(p.labelled, of_point, of_base)
