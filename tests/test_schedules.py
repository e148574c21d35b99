"""Schedules: values at each step, one tensor for ever, saving and resuming."""

from collections.abc import Callable

import pytest
import torch

from pyro_vae.schedules import Constant, Cyclical, LinearWarmup, Schedule


def values(schedule: Schedule, num_steps: int) -> list[float]:
    result = []
    for _ in range(num_steps):
        result.append(float(schedule.value))
        schedule.step()
    return result


ALL: dict[str, Callable[[], Schedule]] = {
    "constant": lambda: Constant(0.25),
    "warm-up": lambda: LinearWarmup(5, start=0.1, end=2.0),
    "cyclical": lambda: Cyclical(4, num_cycles=2, ramp=0.75, start=0.1, end=2.0),
}


def test_constant() -> None:
    assert values(Constant(0.25), 4) == [0.25] * 4
    assert values(Constant(3), 2) == [3.0, 3.0]


def test_linear_warmup() -> None:
    assert values(LinearWarmup(4), 7) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert values(LinearWarmup(2, start=4.0, end=1.0), 4) == [4.0, 2.5, 1.0, 1.0]
    assert values(LinearWarmup(1), 3) == [0.0, 1.0, 1.0]


def test_cyclical() -> None:
    assert values(Cyclical(4), 10) == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    assert values(Cyclical(4, ramp=1.0), 6) == [0.0, 0.25, 0.5, 0.75, 0.0, 0.25]
    assert values(Cyclical(2, num_cycles=2, start=1.0, end=3.0), 7) == [1, 3, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("name", ALL)
def test_the_tensor_is_the_same_for_ever(name: str) -> None:
    schedule = ALL[name]()
    value = schedule.value
    assert value.dim() == 0
    assert value.dtype == torch.float64
    assert not value.requires_grad
    for _ in range(3):
        schedule.step()
    schedule.load_state_dict({"num_steps_taken": 2})
    assert schedule.value is value


@pytest.mark.parametrize("name", ALL)
def test_saving_and_resuming(name: str) -> None:
    first, second = ALL[name](), ALL[name]()
    values(first, 3)
    state = first.state_dict()
    rest = values(first, 9)
    assert state == {"num_steps_taken": 3}  # not changed by the steps that followed
    second.load_state_dict(state)
    assert second.num_steps_taken == 3
    assert values(second, 9) == rest


def test_the_default_dtype_does_not_matter() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        assert LinearWarmup(3).value.dtype == torch.float64
        assert (LinearWarmup(3, start=0.5).value * torch.ones(2)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float64)


def test_a_foreign_state() -> None:
    with pytest.raises(ValueError, match=r"LinearWarmup.load_state_dict: expected the key 'num_s"):
        LinearWarmup(3).load_state_dict({"epoch": 3})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="LinearWarmup: expected num_steps >= 1, got 0"):
        LinearWarmup(0)
    with pytest.raises(ValueError, match="Cyclical: expected cycle_length >= 1 .* got 0 and None"):
        Cyclical(0)
    with pytest.raises(ValueError, match="num_cycles >= 1, got 4 and 0"):
        Cyclical(4, num_cycles=0)
    for ramp in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=r"Cyclical: expected ramp in \(0, 1\], got"):
            Cyclical(4, ramp=ramp)


def test_schedule_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Schedule()  # type: ignore[abstract]
