"""Running programs without a trace."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

from pyro_vae import scale_kl
from pyro_vae.isolation import Evaluating, evaluation_mode, root_modules, without_side_effects


class Net(PyroModule):
    """A program that notes the modes it runs in."""

    def __init__(self) -> None:
        super().__init__("net")
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2)
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, self.dropout.training, self.norm.training))
        return self.norm(self.dropout(x))

    def guide(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)

    def reads_its_mode(self) -> bool:
        return self.training or self.dropout.training


def with_net(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x)


WAYS: dict[str, Callable[[Net], Callable[[torch.Tensor], Any]]] = {
    "module": lambda net: net,
    "closure": lambda net: lambda x: net(x),
    "partial": lambda net: partial(with_net, net),
    "keyword partial": lambda net: partial(lambda x, net: net(x), net=net),
    "handler": lambda net: poutine.scale(net, scale=2.0),
    "two handlers": lambda net: scale_kl(poutine.mask(net, mask=True), 0.5),
    "bound method": lambda net: net.guide,
    "handler around a method": lambda net: poutine.block(net.guide),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("named", [False, True])
def test_modules_run_in_eval_mode_and_go_back(way: str, named: bool) -> None:
    net, x = Net(), torch.randn(8, 2) + 3
    program = WAYS[way](net)
    with evaluation_mode(*[program] * named):
        out = program(x)
    assert net.modes == [(False, False, False)]
    torch.testing.assert_close(out.detach(), x / (1 + 1e-5) ** 0.5)
    assert net.norm.running_mean.tolist() == [0.0, 0.0]
    assert all(module.training for module in net.modules())
    program(x)
    assert net.modes[-1] == (True, True, True)


def test_a_method_that_calls_no_module() -> None:
    net = Net()
    for method in (net.reads_its_mode, poutine.mask(net.reads_its_mode, mask=True)):
        with evaluation_mode(method):
            assert not method()
        assert method()


@pytest.mark.parametrize("named", [False, True])
def test_a_module_in_eval_mode_stays_there(named: bool) -> None:
    net = Net()
    net.dropout.eval()
    with evaluation_mode(*[net] * named):
        net(torch.zeros(4, 2))
    assert (net.training, net.dropout.training, net.norm.training) == (True, False, True)


def test_nested_blocks() -> None:
    net = Net()
    with evaluation_mode(net):
        with evaluation_mode(net):
            net(torch.zeros(4, 2))
        net(torch.zeros(4, 2))
    assert net.modes == [(False, False, False)] * 2
    assert net.training


def test_an_exception_restores_everything() -> None:
    net = Net()
    store_before = list(pyro.get_param_store())
    stack_before = list(_PYRO_STACK)

    def fails() -> None:
        pyro.param("born", torch.zeros(1))
        net(torch.zeros(4, 2))
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), without_side_effects(net):
        fails()
    assert all(module.training for module in net.modules())
    assert torch.is_grad_enabled()
    assert list(pyro.get_param_store()) == store_before
    assert stack_before == _PYRO_STACK
    net(torch.zeros(4, 2))  # No hook is left behind.
    assert net.modes == [(False, False, False), (True, True, True)]


def test_only_new_parameters_are_removed() -> None:
    old = pyro.param("old", torch.tensor(1.0))
    with without_side_effects():
        assert not torch.is_grad_enabled()
        pyro.param("old")
        pyro.param("new", torch.tensor(2.0), constraint=dist.constraints.positive)
        assert "new" in pyro.get_param_store()
    assert list(pyro.get_param_store()) == ["old"]
    assert pyro.param("old") is old
    assert old.requires_grad
    assert "new" not in pyro.get_param_store()._constraints


def test_handlers_of_training_are_told() -> None:
    def told() -> bool:
        return any(isinstance(handler, Evaluating) for handler in _PYRO_STACK)

    assert not told()
    with without_side_effects():
        assert told()
    assert not told()


def test_root_modules() -> None:
    net, other = Net(), nn.Linear(1, 1)
    assert list(root_modules(net)) == [net]
    assert list(root_modules(net.guide)) == [net]
    assert list(root_modules(scale_kl(partial(with_net, net), 2.0))) == [net]
    assert list(root_modules(poutine.mask(scale_kl(net, 2.0), mask=True))) == [net]
    assert list(root_modules(partial(print, other, 3))) == [other]
    assert list(root_modules(lambda x: net(x))) == [net]
    assert list(root_modules(lambda x: net.guide(x))) == [net]
    nets = {"a": net, "b": [other]}
    assert list(root_modules(lambda x: nets["a"](x))) == [net, other]

    def helper(x: torch.Tensor) -> torch.Tensor:
        return other(x)

    assert list(root_modules(lambda x: helper(x))) == [other]
    assert list(root_modules(lambda x: not_defined_yet(x))) == []  # noqa: F821
    assert list(root_modules([].append)) == []
