"""The loop that every EM fit shares."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.baselines._data import check_integer

__all__ = ["check_stopping", "run_em"]

Params = TypeVar("Params")
Statistics = TypeVar("Statistics")


def check_stopping(num_steps: int, tolerance: float, where: str) -> None:
    """Raise unless the stopping rule makes sense.

    Args:
        num_steps: Largest number of EM steps.
        tolerance: Smallest gain worth another step, in nats per datum.
        where: Name of the calling function, for the error message.

    Raises:
        TypeError: If ``num_steps`` is no integer.
        ValueError: If ``num_steps`` is not positive, or ``tolerance`` is negative or NaN.

    Example:
        >>> check_stopping(100, 1e-6, "demo")
    """
    check_integer(num_steps, "num_steps", 1, None, where, "Pass for instance num_steps=1000.")
    if not tolerance >= 0.0:
        raise ValueError(
            f"{where}: expected `tolerance` of at least 0, got {tolerance}. "
            "Pass 0.0 to use up all of num_steps."
        )


def run_em(
    e_step: Callable[[Params], tuple[Statistics, Tensor]],
    m_step: Callable[[Statistics], Params],
    params: Params,
    *,
    num_steps: int,
    tolerance: float,
) -> tuple[Params, Tensor]:
    """Alternate E and M steps until the log-likelihood stops growing.

    Args:
        e_step: Maps parameters to the expected statistics and the mean log-likelihood (a 0-d
            tensor, nats per datum) *of these parameters*.
        m_step: Maps the statistics to the next parameters.
        params: Where to start.
        num_steps: Largest number of steps.
        tolerance: Stop after the first step that gains less than this, in nats per datum.

    Returns:
        The last parameters, and the mean log-likelihood after every step taken, of shape
        ``(steps_taken,)``; its last value belongs to the returned parameters.

    Example:
        >>> halve = lambda error: (error / 2, -error)
        >>> run_em(halve, lambda error: error, torch.tensor(8.0), num_steps=3, tolerance=0.0)
        (tensor(1.), tensor([-4., -2., -1.]))
    """
    statistics, previous = e_step(params)
    history = []
    for _ in range(num_steps):
        params = m_step(statistics)
        statistics, current = e_step(params)
        history.append(current)
        if current - previous < tolerance:
            break
        previous = current
    return params, torch.stack(history)
