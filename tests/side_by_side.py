"""The same training with ``pyro.infer.SVI`` and with ``CompiledSVI``, compared step by step."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import CompiledSVI


class Training(NamedTuple):
    """What to train: programs, optimizer, loss, and the arguments of each step.

    ``prepare(step)`` may also change what the programs read, as a user's loop would.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    prepare: Callable[[int], Any]
    optim: Any = None
    loss: Any = None


class Course(NamedTuple):
    """What a training did: losses, parameters and next random number after each step."""

    losses: list[Any]
    parameters: list[dict[str, torch.Tensor]]
    random: list[torch.Tensor]
    svi: Any
    warned: list[str]


class ByHand:
    """Steps of an optimizer of torch, written as in torch's tutorials."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any) -> None:
        self.programs, self.optim, self.loss = (model, guide), optim, loss

    def step(self, *args: Any, **kwargs: Any) -> float:
        for group in self.optim.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        loss = self.loss.loss_and_grads(*self.programs, *args, **kwargs)
        self.optim.step()
        return float(loss)


def train(build: Callable[[], Training], num_steps: int, compiled: bool, **options: Any) -> Course:
    """Trains from a fresh start; with ``compiled`` by ``CompiledSVI`` without compiler."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    task = build()
    optim = task.optim or pyro.optim.Adam({"lr": 0.05})
    programs = (task.model, task.guide, optim, task.loss or Trace_ELBO())
    if compiled:
        svi: Any = CompiledSVI(*programs, **{"mode": "graph", **options})
    else:
        svi = ByHand(*programs) if isinstance(optim, torch.optim.Optimizer) else SVI(*programs)
    course = Course([], [], [], svi, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(num_steps):
            given = task.prepare(step)
            args, kwargs = given if isinstance(given, tuple) else ((given,), {})
            course.losses.append(svi.step(*args, **kwargs))
            store = pyro.get_param_store()
            course.parameters.append({n: store[n].detach().clone() for n in store})
            course.random.append(torch.get_rng_state())
    course.warned.extend(str(w.message) for w in caught)
    return course


def assert_same(actual: Course, wanted: Course) -> None:
    """Compares every step: losses and parameters to rounding, random numbers exactly."""
    assert len(actual.losses) == len(wanted.losses)
    for step, (loss, expected) in enumerate(zip(actual.losses, wanted.losses, strict=True)):
        assert type(loss) is type(expected)
        torch.testing.assert_close(
            torch.tensor(loss), torch.tensor(expected), rtol=1e-8, atol=1e-10, msg=f"loss {step}"
        )
    for step, (mine, theirs) in enumerate(zip(actual.parameters, wanted.parameters, strict=True)):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            torch.testing.assert_close(
                value, theirs[name], rtol=1e-7, atol=1e-10, msg=f"'{name}' after step {step}"
            )
    for step, (mine_, theirs_) in enumerate(zip(actual.random, wanted.random, strict=True)):
        assert torch.equal(mine_, theirs_), f"random numbers after step {step}"


def check_same(
    build: Callable[[], Training], num_steps: int = 9, graphs: int | None = 1, **options: Any
) -> Course:
    """Trains both ways, compares, and returns what ``CompiledSVI`` did.

    Args:
        build: Makes everything anew.
        num_steps: How many steps.
        graphs: How many graphs there have to be in the end.
        options: For ``CompiledSVI``.
    """
    wanted = train(build, num_steps, compiled=False)
    actual = train(build, num_steps, compiled=True, **options)
    assert_same(actual, wanted)
    if graphs is not None:
        assert len(actual.svi.graphs) == graphs, (actual.svi.summary(), actual.warned)
    return actual


def normal_model(x: torch.Tensor) -> None:
    """A latent for each row, two parameters."""
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x: torch.Tensor) -> None:
    """Amortised by a slope."""
    slope = pyro.param("slope", torch.ones(()))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def rows(step: int, num_rows: int = 4) -> torch.Tensor:
    """Data of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num_rows, generator=generator) + 1.0
