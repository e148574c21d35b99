"""Updates: the numbers of the user's own optimizers, whatever happens to these in mid-training."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.optim as optim
import pytest
import side_by_side
import torch
from pyro.infer import SVI
from side_by_side import Training, assert_same, check_same, normal_guide, normal_model, rows, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyro_vae import CompiledSVI

PYRO: dict[str, Callable[[], Any]] = {
    "Adam": lambda: optim.Adam({"lr": 0.05}),
    "Adam, amsgrad": lambda: optim.Adam({"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}),
    "Adam, lr is a tensor": lambda: optim.Adam({"lr": torch.tensor(0.05)}),
    "AdamW": lambda: optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "SGD": lambda: optim.SGD({"lr": 0.01}),
    "SGD, momentum": lambda: optim.SGD({"lr": 0.01, "momentum": 0.9, "dampening": 0.5}),
    "RMSprop": lambda: optim.RMSprop({"lr": 0.01, "momentum": 0.5}),
    "ClippedAdam": lambda: optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.5, "lrd": 0.9}),
    "Adagrad": lambda: optim.Adagrad({"lr": 0.05}),
    "norms clipped": lambda: optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "values clipped": lambda: optim.Adam({"lr": 0.05}, {"clip_value": 0.05}),
    "options by name": lambda: optim.Adam(lambda name: {"lr": 0.1 if name == "loc" else 0.01}),
    "clips by name": lambda: optim.SGD(
        {"lr": 0.1}, lambda module, name: {"clip_norm": 0.1} if name == "loc" else {}
    ),
    "own class": lambda: optim.PyroOptim(Decaying, {"lr": 0.05}),
}


class Decaying(torch.optim.SGD):
    """Counts its steps and alters its options."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / self.num_steps
        super().step(closure)


def task(optimizer: Any, at: Callable[[int], Any] = lambda step: None) -> Training:
    def prepare(step: int) -> torch.Tensor:
        at(step)
        return rows(step)

    return Training(normal_model, normal_guide, prepare, optimizer)


@pytest.mark.parametrize("name", PYRO)
def test_optimizers_of_pyro(name: str) -> None:
    check_same(lambda: task(PYRO[name]()), 12)


class Alternating:
    """Steps by SVI and by CompiledSVI, with one optimizer."""

    def __init__(self, *programs: Any, uses: Callable[[int], bool], **options: Any) -> None:
        self.both = SVI(*programs), CompiledSVI(*programs, **options)
        self.uses, self.num_steps = uses, 0

    def step(self, *args: Any) -> Any:
        self.num_steps += 1
        return self.both[self.uses(self.num_steps)].step(*args)


@pytest.mark.parametrize("name", PYRO)
def test_svi_takes_over_and_hands_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = train(lambda: task(PYRO[name]()), 12, compiled=False)
    turns = partial(Alternating, uses=lambda n: n // 4 % 2 == 0 or n % 3 == 0)
    monkeypatch.setattr(side_by_side, "CompiledSVI", turns)
    assert_same(train(lambda: task(PYRO[name]()), 12, compiled=True), wanted)


def schedulers() -> dict[str, Any]:
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
    return {
        "exponential": optim.ExponentialLR({**adam, "gamma": 0.8}),
        "plateau": optim.ReduceLROnPlateau({**adam, "patience": 0, "factor": 0.5}),
    }


@pytest.mark.parametrize("name", ["exponential", "plateau"])
def test_schedulers_of_pyro(name: str) -> None:
    def build() -> Training:
        scheduler = schedulers()[name]
        arguments = (1.0,) if name == "plateau" else ()
        return task(scheduler, lambda step: step and scheduler.step(*arguments))

    check_same(build, 10)


def owners(optimizer: Any) -> list[torch.optim.Optimizer]:
    return list(optimizer.optim_objs.values())


def alter_options(optimizer: Any, path: Path) -> None:
    for owner in owners(optimizer):
        owner.param_groups[0].update(lr=0.2, betas=(0.5, 0.6))


def clear_state(optimizer: Any, path: Path) -> None:
    for owner in owners(optimizer):
        owner.state.clear()


def replace_moments(optimizer: Any, path: Path) -> None:
    for owner in owners(optimizer):
        for state in owner.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])


def load_state_dicts(optimizer: Any, path: Path) -> None:
    for owner in owners(optimizer):
        kept = copy.deepcopy(owner.state_dict())
        kept["state"][0]["exp_avg"] += 1.0
        owner.load_state_dict(kept)


def save_and_load(optimizer: Any, path: Path) -> None:
    optimizer.save(path / "optim")
    optimizer.load(path / "optim")
    optimizer.optim_objs.clear()


def add_hooks(optimizer: Any, path: Path) -> None:
    for owner in owners(optimizer):
        owner.register_step_pre_hook(halve)


def halve(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in owner.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def add_gradient(optimizer: Any, path: Path) -> None:
    pyro.param("loc").unconstrained().sum().backward()


@pytest.mark.parametrize(
    "alter",
    [
        alter_options,
        clear_state,
        replace_moments,
        load_state_dicts,
        save_and_load,
        add_hooks,
        add_gradient,
    ],
)
def test_what_a_user_does_to_optimizers(alter: Any, tmp_path: Path) -> None:
    def build() -> Training:
        optimizer = optim.Adam({"lr": 0.05})
        return task(optimizer, lambda step: step == 5 and alter(optimizer, tmp_path))

    check_same(build, 10)


def test_hooks_of_all_optimizers() -> None:
    def build() -> Training:
        handles = []

        def at(step: int) -> None:
            if step == 5:
                handles.append(register_optimizer_step_pre_hook(halve))
            if step == 8:
                handles.pop().remove()

        return task(optim.Adam({"lr": 0.05}), at)

    check_same(build, 9)


class Line(nn.Module):
    """A program whose parameters a torch optimizer can be given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> None:
        pyro.module("line", self)
        scale = 1.0 + self.layer(x[:, None])[:, 0].square()
        with pyro.plate("rows", len(x)):
            pyro.sample("x", pyro.distributions.Normal(0.0, scale), obs=x)


def no_guide(x: torch.Tensor) -> None:
    """Nothing is latent."""


def of_torch(make: Callable[[Line], Any], at: Callable[[int, Any], Any]) -> Training:
    line = Line()
    optimizer = make(line)

    def prepare(step: int) -> torch.Tensor:
        at(step, optimizer)
        return rows(step)

    return Training(line, no_guide, prepare, optimizer)


TORCH: dict[str, Any] = {
    "Adam": (lambda line: torch.optim.Adam(line.parameters(), lr=0.1), lambda s, o: None),
    "AdamW": (lambda line: torch.optim.AdamW(line.parameters(), lr=0.1), lambda s, o: None),
    "Adafactor": (lambda line: torch.optim.Adafactor(line.parameters()), lambda s, o: None),
    "groups": (
        lambda line: torch.optim.SGD(
            [{"params": [line.layer.weight]}, {"params": [line.layer.bias], "lr": 0.1}],
            lr=0.01,
            momentum=0.9,
        ),
        lambda s, o: None,
    ),
    "not all": (lambda line: torch.optim.Adam([line.layer.weight], lr=0.1), lambda s, o: None),
    "a rate that changes": (
        lambda line: torch.optim.SGD(line.parameters(), lr=0.1),
        lambda s, o: o.param_groups[0].update(lr=0.1 * 0.7**s),
    ),
    "hooks": (
        lambda line: torch.optim.SGD(line.parameters(), lr=0.1),
        lambda s, o: s == 5 and o.register_step_pre_hook(halve),
    ),
    "loaded": (
        lambda line: torch.optim.Adam(line.parameters(), lr=0.1),
        lambda s, o: s == 5 and o.load_state_dict(copy.deepcopy(o.state_dict())),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_optimizers_of_torch(name: str) -> None:
    check_same(lambda: of_torch(*TORCH[name]), 10)


def test_a_parameter_that_is_added_later() -> None:
    def build() -> Training:
        line = Line()
        optimizer = torch.optim.Adam([line.layer.weight], lr=0.1)

        def prepare(step: int) -> torch.Tensor:
            if step == 5:
                optimizer.add_param_group({"params": [line.layer.bias], "lr": 0.3})
            return rows(step)

        return Training(line, no_guide, prepare, optimizer)

    check_same(build, 9)
