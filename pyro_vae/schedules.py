"""Values that change while training: each owns a 0-d tensor and updates it in place.

A captured graph, ``scale_kl`` or an objective holds the tensor, so all see the new value.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch

__all__ = ["Constant", "Cyclical", "LinearWarmup", "Schedule", "Weight", "weight_of"]


@runtime_checkable
class HasValue(Protocol):
    """Anything with a 0-d tensor ``value``, such as a schedule."""

    value: torch.Tensor


Weight = float | torch.Tensor | HasValue
"""What a user may pass as the weight of a term."""


def weight_of(where: str, name: str, weight: Weight) -> float | torch.Tensor:
    """The number, or the 0-d tensor itself: a schedule updates its own in place.

    Raises:
        TypeError: If ``weight`` is no number, tensor or schedule.
        ValueError: If it is negative, not finite or not 0-d.
    """
    value = weight.value if isinstance(weight, HasValue) else weight
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        raise TypeError(
            f"{where}: expected {name} to be a number, a 0-d tensor or a schedule, got "
            f"{type(weight).__name__}. Pass {name}=0.5, for instance."
        )
    if isinstance(value, torch.Tensor) and value.dim() != 0:
        raise ValueError(
            f"{where}: expected a 0-d tensor {name}, got shape {tuple(value.shape)}. "
            "Use pyro.poutine.mask or pyro.poutine.scale for weights per datum."
        )
    if not 0 <= float(value) < math.inf:
        raise ValueError(
            f"{where}: expected a finite {name} >= 0, got {float(value)}. "
            "0 switches a term off, 1 leaves it as it is."
        )
    return value


class Schedule(ABC):
    """A number that depends on how many steps were taken.

    Attributes:
        value: 0-d float64 tensor on the CPU (which multiplies tensors of any dtype and device).
    """

    def __init__(self) -> None:
        self.num_steps_taken = 0
        self.value = torch.tensor(self._at(0), dtype=torch.float64)

    @abstractmethod
    def _at(self, step: int) -> float:
        """The value after ``step`` steps."""

    def _move_to(self, step: int) -> None:
        self.num_steps_taken = step
        self.value.fill_(self._at(step))

    def step(self) -> None:
        """Advances by one training step."""
        self._move_to(self.num_steps_taken + 1)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs: the number of steps taken."""
        return {"num_steps_taken": self.num_steps_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the step of a saved state; the tensor stays the same object.

        Raises:
            ValueError: If ``state`` does not come from ``state_dict``.
        """
        if "num_steps_taken" not in state:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: expected the key 'num_steps_taken', "
                f"got {sorted(state)}. Pass what state_dict() returned."
            )
        self._move_to(int(state["num_steps_taken"]))


class Constant(Schedule):
    """The same value for ever.

    Example:
        >>> Constant(4.0).value
        tensor(4., dtype=torch.float64)
    """

    def __init__(self, value: float) -> None:
        self._constant = float(value)
        super().__init__()

    def _at(self, step: int) -> float:
        return self._constant


class LinearWarmup(Schedule):
    """From ``start`` to ``end`` in a straight line over ``num_steps``, then constant.

    Example:
        >>> beta = LinearWarmup(num_steps=4)
        >>> for _ in range(3):
        ...     beta.step()
        >>> beta.value
        tensor(0.7500, dtype=torch.float64)

    References:
        Bowman et al. (2016), Generating sentences from a continuous space, section 3.1;
        Sonderby et al. (2016), Ladder variational autoencoders, section 2.3.
    """

    def __init__(self, num_steps: int, *, start: float = 0.0, end: float = 1.0) -> None:
        if num_steps < 1:
            raise ValueError(
                f"LinearWarmup: expected num_steps >= 1, got {num_steps}. "
                "Use Constant for a value that does not change."
            )
        self.num_steps, self.start, self.end = num_steps, float(start), float(end)
        super().__init__()

    def _at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.num_steps, 1.0)


class Cyclical(Schedule):
    """Warm-up again and again: each cycle rises over its first part and then rests at ``end``.

    Args:
        cycle_length: Steps in one cycle.
        num_cycles: After this many cycles the value stays at ``end``; ``None`` for no end.
        ramp: Fraction of a cycle spent rising, in (0, 1].
        start: Value at the beginning of each cycle.
        end: Value at the top.

    Example:
        >>> beta = Cyclical(cycle_length=4, ramp=0.5)
        >>> values = []
        >>> for _ in range(6):
        ...     values.append(float(beta.value))
        ...     beta.step()
        >>> values
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]

    References:
        Fu et al. (2019), Cyclical annealing schedule, equation 6.
    """

    def __init__(
        self,
        cycle_length: int,
        *,
        num_cycles: int | None = None,
        ramp: float = 0.5,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        if cycle_length < 1 or (num_cycles is not None and num_cycles < 1):
            raise ValueError(
                f"Cyclical: expected cycle_length >= 1 and num_cycles >= 1, got {cycle_length} "
                f"and {num_cycles}. Give the length of a cycle in training steps."
            )
        if not 0 < ramp <= 1:
            raise ValueError(
                f"Cyclical: expected ramp in (0, 1], got {ramp}. It is a fraction of a cycle."
            )
        self.cycle_length, self.num_cycles, self.ramp = cycle_length, num_cycles, ramp
        self.start, self.end = float(start), float(end)
        super().__init__()

    def _at(self, step: int) -> float:
        cycle, position = divmod(step, self.cycle_length)
        if self.num_cycles is not None and cycle >= self.num_cycles:
            return self.end
        risen = min(position / self.cycle_length / self.ramp, 1.0)
        return self.start + (self.end - self.start) * risen
