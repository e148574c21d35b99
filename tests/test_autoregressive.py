"""Which output depends on which input, by the Jacobian."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.autoregressive import AutoregressiveNet


def dependence(net: AutoregressiveNet, num_points: int = 20) -> Tensor:
    """Whether output i depends on variable j at any of some points, shape ``(N, N)``."""
    num, width = net.num_variables, net.in_features

    def jacobian(x: Tensor) -> Tensor:
        full = torch.autograd.functional.jacobian(net, x)
        return full.reshape(num, net.out_features, num, width).abs().sum((1, 3))

    return sum(jacobian(x) for x in torch.randn(num_points, num * width)) > 0  # type: ignore[return-value]


@pytest.mark.parametrize("in_features", [1, 3])
@pytest.mark.parametrize("out_features", [1, 2])
@pytest.mark.parametrize("hidden", [[], [4], [7], [16, 5], [6, 4, 9]])
def test_output_depends_on_all_variables_before_and_no_other(
    hidden: list[int], out_features: int, in_features: int
) -> None:
    net = AutoregressiveNet(
        5, hidden, in_features=in_features, out_features=out_features, activation=nn.Tanh
    )
    assert torch.equal(dependence(net), torch.ones(5, 5).tril(-1).bool())


def test_each_number_of_a_variable_reaches_each_output_feature() -> None:
    net = AutoregressiveNet(3, [8], in_features=2, out_features=4, activation=nn.Tanh)
    jacobian = torch.autograd.functional.jacobian(net, torch.randn(6)).reshape(3, 4, 3, 2)
    expected = torch.ones(3, 3).tril(-1).bool()[:, None, :, None].expand(3, 4, 3, 2)
    assert torch.equal(jacobian != 0, expected)


def test_values_are_those_of_dense_networks_of_the_variables_before() -> None:
    # Output i, from a network whose later inputs are replaced by anything.
    net = AutoregressiveNet(4, [10, 10], out_features=2)
    x = torch.randn(7, 4)
    for index in range(4):
        other = x.clone()
        other[:, index:] = torch.randn(7, 4 - index)
        assert torch.equal(net(other)[:, : index + 1], net(x)[:, : index + 1])


@pytest.mark.parametrize("hidden", [[], [1], [3, 2]])
def test_one_variable_has_constant_outputs(hidden: list[int]) -> None:
    net = AutoregressiveNet(1, hidden, out_features=3)
    out = net(torch.randn(5, 1))
    assert out.shape == (5, 1, 3)
    assert torch.equal(out, out[:1].expand_as(out))
    out.sum().backward()
    assert (net.layers[-1].bias.grad != 0).all()


def test_outputs_stand_beside_their_variable() -> None:
    net = AutoregressiveNet(3, [], out_features=2)
    with torch.no_grad():
        net.layers[0].bias.copy_(torch.arange(6.0))
    assert torch.equal(net(torch.zeros(3)), torch.arange(6.0).reshape(3, 2))


def test_leading_dimensions() -> None:
    net = AutoregressiveNet(3, [4], in_features=2)
    x = torch.randn(7, 5, 6)
    out = net(x)
    assert out.shape == (7, 5, 3, 2)
    torch.testing.assert_close(out[2, 4], net(x[2, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_its_dtype_and_its_state_dict(dtype: torch.dtype) -> None:
    net, other = (AutoregressiveNet(3, [4]).to(dtype) for _ in range(2))
    x = torch.randn(5, 3, dtype=dtype)
    assert net(x).dtype == dtype
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


def test_every_parameter_gets_a_gradient() -> None:
    net = AutoregressiveNet(4, [8, 8], activation=nn.Tanh)
    net(torch.randn(5, 4)).square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in net.parameters())


@pytest.mark.parametrize("name", ["num_variables", "in_features", "out_features"])
def test_bad_sizes_are_refused(name: str) -> None:
    sizes: dict[str, Any] = {"num_variables": 3, "hidden": [4]}
    with pytest.raises(ValueError, match=f"AutoregressiveNet: expected {name} >= 1, got 0"):
        AutoregressiveNet(**sizes | {name: 0})
    with pytest.raises(TypeError, match=f"expected an integer {name}, got float"):
        AutoregressiveNet(**sizes | {name: 2.0})


def test_narrow_layers_are_refused() -> None:
    AutoregressiveNet(4, [3])
    with pytest.raises(ValueError, match="AutoregressiveNet: expected hidden >= 3, got 2"):
        AutoregressiveNet(4, [8, 2])
    with pytest.raises(ValueError, match="expected hidden >= 1, got 0"):
        AutoregressiveNet(1, [0])


@pytest.mark.parametrize("shape", [(), (3,), (5, 3), (5, 8)])
def test_input_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    net = AutoregressiveNet(3, [4], in_features=2)
    with pytest.raises(ValueError, match="expected input of width 6 in the last dimension, got"):
        net(torch.zeros(shape))
