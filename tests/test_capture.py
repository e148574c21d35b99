"""Capturing: whatever a program reads besides its arguments, the numbers are those of SVI."""

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from side_by_side import Course, Training, check_same, normal_guide, normal_model, rows, train
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from pyro_vae import CaptureError

FIRST_OTHER = 5  # Not 2, 4 or 8: there graphs are compared with Pyro, and all would be seen.


def model_with(read: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """A model whose prior has the scale ``read(x)``."""

    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, read(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def changing(read: Callable[[Any], Any], write: Callable[[float], Any]) -> Training:
    """``write`` is told another number from step ``FIRST_OTHER`` on."""

    def prepare(step: int) -> torch.Tensor:
        write(2.0 if step >= FIRST_OTHER else 1.0)
        return rows(step)

    return Training(model_with(read), normal_guide, prepare)


class Plain:
    """A class attribute."""

    beta = 1.0


class Slotted:
    """An attribute without a table."""

    __slots__ = ("beta",)


BETA = 1.0


def write_global(value: float) -> None:
    global BETA
    BETA = value


def in_closure() -> Training:
    beta = 1.0

    def write(value: float) -> None:
        nonlocal beta
        beta = value

    return changing(lambda x: beta, write)


def a_default() -> Training:
    def read(x: torch.Tensor, beta: float = 1.0) -> float:
        return beta

    return changing(read, lambda value: setattr(read, "__defaults__", (value,)))


def a_partial() -> Training:
    def read(x: torch.Tensor, beta: float) -> float:
        return beta

    held = partial(read, beta=1.0)
    return changing(held, lambda value: held.keywords.update(beta=value))


def an_attribute(owner: Any) -> Training:
    owner.beta = 1.0
    return changing(lambda x: owner.beta, lambda value: setattr(owner, "beta", value))


def an_entry(owner: Any, key: Any) -> Training:
    return changing(lambda x: float(owner[key]), lambda v: owner.__setitem__(key, v))


def a_set() -> Training:
    names: set[str] = set()
    return changing(
        lambda x: 2.0 if "warm" in names else 1.0, lambda v: v > 1.0 and names.add("warm")
    )


def a_handler() -> Training:
    handler = pyro.poutine.scale_messenger.ScaleMessenger(scale=1.0)
    task = changing(lambda x: 1.0, lambda value: setattr(handler, "scale", value))
    return task._replace(model=handler(task.model))


def a_function() -> Training:
    def read(x: torch.Tensor) -> Any:
        return read.beta  # type: ignore[attr-defined]

    return an_attribute(read)._replace(model=model_with(read))


NUMBERS: dict[str, Callable[[], Training]] = {
    "a global": lambda: changing(lambda x: BETA, write_global),
    "a variable of a closure": in_closure,
    "a default argument": a_default,
    "an argument of a partial": a_partial,
    "an attribute": lambda: an_attribute(SimpleNamespace()),
    "a slot": lambda: an_attribute(Slotted()),
    "an attribute of a class": lambda: an_attribute(Plain),
    "an attribute of a module": lambda: an_attribute(ModuleType("settings")),
    "an attribute of a function": a_function,
    "an attribute of a handler": a_handler,
    "an entry of a list": lambda: an_entry([1.0], 0),
    "an entry of a dict": lambda: an_entry({"beta": 1.0}, "beta"),
    "an entry of a deque": lambda: an_entry(deque([1.0]), 0),
    "an entry of an array": lambda: an_entry(np.ones(1), 0),
    "an element of a set": a_set,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change(name: str) -> None:
    assert check_same(NUMBERS[name], 8, graphs=2).warned == []


def test_a_number_that_changes_at_every_step() -> None:
    def build() -> Training:
        held = SimpleNamespace(beta=1.0)
        return changing(lambda x: held.beta, lambda v: setattr(held, "beta", held.beta + 0.1))

    course = check_same(build, 8, graphs=3, max_graphs=3)
    [warned] = course.warned
    assert "'held' of <lambda>.beta changes from step to step, and 3 graphs are kept" in warned


def counting() -> Callable[[Any], float]:
    held = SimpleNamespace(n=0)

    def read(x: torch.Tensor) -> float:
        held.n += 1
        return 1.0 + held.n

    return read


def drawing(generator: Any) -> Callable[[Any], Any]:
    return lambda x: 1.0 + generator.random()


def next_of(values: Any) -> Callable[[Any], Any]:
    return lambda x: next(values)


def of_own_generator() -> Callable[[Any], Any]:
    generator = torch.Generator().manual_seed(1)
    return lambda x: 1.0 + torch.rand((), generator=generator)


REFUSED: dict[str, tuple[Callable[[], Callable[[Any], Any]], str]] = {
    "branch": (lambda: lambda x: 2.0 if x.mean() > 1 else 1.0, "bool of a tensor"),
    "float": (lambda: lambda x: 1.0 + abs(float(x[0])), "float of a tensor"),
    "int of item": (lambda: lambda x: 1 + int(x.square().sum().item()), "int of a tensor"),
    "tolist": (lambda: lambda x: 1.0 + abs(x.tolist()[0]), "tolist of a tensor"),
    "numpy": (lambda: lambda x: 1.0 + abs(float(x.numpy()[0])), "numpy of a tensor"),
    "asarray": (lambda: lambda x: float(1 + abs(np.asarray(x)).sum()), "array of a tensor"),
    "list": (lambda: lambda x: 1.0 + torch.tensor([abs(v) for v in x]), "float of a tensor"),
    "mask": (lambda: lambda x: 1.0 + x[x > 1].sum().abs(), "shape that aten.index.Tensor"),
    "unique": (lambda: lambda x: 1.0 + len(torch.unique(x.round())), "shape that aten._unique2"),
    "equal": (lambda: lambda x: 2.0 if torch.equal(x, x.abs()) else 1.0, "reads a number"),
    "counter": (counting, "a run of it changes 'held' of read.n"),
    "random": (lambda: drawing(random), "draws random numbers of Python"),
    "own Random": (lambda: drawing(random.Random(0)), "draws random numbers of Python"),
    "own numpy": (lambda: drawing(np.random.default_rng(0)), "draws random numbers of Python"),
    "own torch": (of_own_generator, "draws random numbers of Python"),
    "iterator": (lambda: next_of(iter([1.0, 1.0, 3.0] * 9)), "an iterator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_no_graph_holds(name: str) -> None:
    make, reason = REFUSED[name]

    def build() -> Training:
        random.seed(0)
        return Training(model_with(make()), normal_guide, rows)

    [warned] = check_same(build, 6, graphs=0).warned
    assert reason in warned
    if "tensor" in reason or "shape" in reason:
        assert f"{__file__}:" in warned
        assert "after site 'rows'" in warned
    with pytest.raises(CaptureError, match="expected a program that a graph can hold"):
        train(build, 6, compiled=True, strict=True)


def test_a_tensor_of_which_a_number_is_read() -> None:
    held = torch.ones(())
    task = changing(lambda x: float(held), held.fill_)
    check_same(lambda: task, 8, graphs=2)


INPLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda held: held.mul_(1.1),
    "detached": lambda held: held.detach().mul_(1.1),
    "its data": lambda held: held.data.mul_(1.1),
}


@pytest.mark.parametrize("name", INPLACE)
def test_tensors_that_the_program_changes(name: str) -> None:
    def build() -> Training:
        held = torch.ones(())

        def read(x: torch.Tensor) -> torch.Tensor:
            INPLACE[name](held)
            return held.clone()

        return Training(model_with(read), normal_guide, rows)

    check_same(build)


def test_indices() -> None:
    def build() -> Training:
        x, held = rows(0, 20), torch.arange(20.0) + 1.0

        def model(_: Any) -> None:
            loc = pyro.param("loc", torch.zeros(20))
            with pyro.plate("rows", 20, subsample_size=5) as chosen:
                pyro.sample("x", dist.Normal(loc[chosen], held[chosen]), obs=x[chosen])

        return Training(model, lambda _: None, rows)

    check_same(build)


def test_auto_guides() -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    check_same(lambda: Training(model, AutoNormal(model), rows))


class Net(pyro.nn.PyroModule):
    """Layers that keep statistics and draw masks."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(z[..., None])[..., 0], 1.0), obs=x)


def slope_guide(x: torch.Tensor) -> None:
    slope = pyro.param("slope", torch.ones(()))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


def replace_buffers(net: Any, step: int) -> None:
    if step == FIRST_OTHER:
        net[1].running_mean = torch.ones(3)
        net[1].running_var = torch.full((3,), 5.0)
    net.train(step < FIRST_OTHER + 2)


ALTERED: dict[str, Callable[[Any, int], Any]] = {
    "eval now and then": lambda net, step: net.train(step % 4 < 3),
    "momentum": lambda net, step: setattr(net[1], "momentum", 0.1 if step < 5 else 0.5),
    "weight": lambda net, s: s == 5 and setattr(net[0], "weight", nn.Parameter(torch.ones(3, 1))),
    "layer": lambda net, step: step == 5 and net.__setitem__(3, nn.Linear(3, 1)),
    "buffers": replace_buffers,
    "data": lambda net, step: step == 5 and net[0].weight.data.fill_(0.5),
    "hook": lambda net, s: s == 5 and net[0].register_forward_hook(lambda m, i, out: 2 * out),
    "gradient's hook": lambda net, s: s == 5 and net[3].weight.register_hook(lambda g: 0 * g),
    "backward hook": lambda net, s: (
        s == 5 and net[3].register_full_backward_hook(lambda m, i, o: tuple(0 * g for g in i))
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_modules_that_change(name: str) -> None:
    def build() -> Training:
        model = Net()

        def prepare(step: int) -> torch.Tensor:
            ALTERED[name](model.net, step)
            return rows(step)

        return Training(model, slope_guide, prepare)

    check_same(build, 8, graphs=1 if name == "data" else 2)


def test_parameters_that_are_frozen_for_a_while() -> None:
    def build() -> Training:
        def prepare(step: int) -> torch.Tensor:
            if step:
                pyro.param("loc").unconstrained().requires_grad_(not 5 <= step < 7)
            return rows(step)

        return Training(normal_model, normal_guide, prepare)

    check_same(build, 10, graphs=2)


def test_hooks_of_all_modules() -> None:
    def build() -> Training:
        model, handles = Net(), []

        def double(module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
            return 2 * output if isinstance(module, nn.Linear) else None

        def prepare(step: int) -> torch.Tensor:
            if step == FIRST_OTHER:
                handles.append(register_module_forward_hook(double))
            if step == FIRST_OTHER + 2:
                handles.pop().remove()
            return rows(step)

        return Training(model, slope_guide, prepare)

    check_same(build, 8, graphs=2)


def test_a_loss_that_fails_after_its_gradients() -> None:
    def loss(model: Any, guide: Any, x: torch.Tensor) -> float:
        value = Trace_ELBO().differentiable_loss(model, guide, x)
        value.backward()
        return float(value)

    course: Course = check_same(
        lambda: Training(normal_model, normal_guide, rows, None, loss), 6, 0
    )
    assert "float of a tensor" in course.warned[0]
