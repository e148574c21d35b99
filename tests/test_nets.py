"""Networks: shapes with any leading dimensions, the same numbers as row by row, errors."""

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.flows import inverse_autoregressive, neural_spline
from pyro_vae.nets import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    FlattenLeading,
    FlowEncoder,
    MixtureEncoder,
    MultivariateNormalEncoder,
    NormalEncoder,
)

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "MLP": (lambda: MLP(3, [7, 5], 4), (3,), (4,)),
    "linear": (lambda: MLP(3, [], 4), (3,), (4,)),
    "ConvEncoder": (lambda: ConvEncoder((2, 8, 12), [3, 4], 5), (2, 8, 12), (5,)),
    "ConvDecoder": (lambda: ConvDecoder(3, [4, 3], (2, 8, 12)), (3,), (2, 8, 12)),
    "FlattenLeading": (
        lambda: FlattenLeading(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten()), event_dim=2),
        (2, 5),
        (12,),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("leading", [(1,), (6,), (2, 6), (1, 1), (4, 2, 3)])
def test_any_leading_dimensions(name: str, leading: tuple[int, ...]) -> None:
    make, event_in, event_out = NETS[name]
    net, x = make(), torch.randn(*leading, *event_in)
    out = net(x)
    assert out.shape == (*leading, *event_out)
    flat = x.reshape(-1, *event_in)
    one_by_one = torch.cat([net(row.unsqueeze(0)) for row in flat])
    torch.testing.assert_close(out.reshape(-1, *event_out), one_by_one)


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    make, event_in, _ = NETS[name]
    net = make()
    net(torch.randn(20, *event_in)).square().sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, parameter_name


def test_mlp_layers() -> None:
    assert [type(layer) for layer in MLP(3, [7], 4)] == [nn.Linear, nn.ReLU, nn.Linear]
    layers = MLP(3, [7, 5], 4, activation=nn.Tanh, dropout=0.25)
    assert [type(layer) for layer in layers] == [
        *(nn.Linear, nn.Tanh, nn.Dropout),
        *(nn.Linear, nn.Tanh, nn.Dropout),
        nn.Linear,
    ]
    assert layers[2].p == 0.25
    assert [tuple(layer.weight.shape) for layer in (layers[0], layers[3], layers[6])] == [
        (7, 3),
        (5, 7),
        (4, 5),
    ]


def test_mlp_of_the_wrong_width() -> None:
    match = r"MLP: expected input of width 3 in the last dimension, got shape \(5, 4\).*flatten"
    with pytest.raises(ValueError, match=match):
        MLP(3, [7], 4)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"MLP: expected input of width 3 .* got shape \(\)"):
        MLP(3, [7], 4)(torch.zeros(()))


def test_flatten_leading_of_too_few_dimensions() -> None:
    match = r"FlattenLeading: expected at least 3 dimensions, got shape \(5, 4\)"
    with pytest.raises(ValueError, match=match):
        FlattenLeading(nn.Identity(), event_dim=3)(torch.zeros(5, 4))


def test_batch_norm_counts_particles_and_rows_alike() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 5, 3)
    out = FlattenLeading(norm, event_dim=1)(x)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(3), atol=1e-8, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 1)))


@pytest.mark.parametrize(("shape", "channels"), [((1, 8, 8), [2, 3]), ((1, 12, 8), [2])])
def test_convolutions_mirror_one_another(shape: tuple[int, int, int], channels: list[int]) -> None:
    encoder, decoder = ConvEncoder(shape, channels, 2), ConvDecoder(2, channels[::-1], shape)
    assert decoder(encoder(torch.rand(5, *shape))).shape == (5, *shape)


@pytest.mark.parametrize(("shape", "channels"), [((1, 28, 28), [2, 3, 4]), ((1, 8, 6), [2, 3])])
def test_sides_that_cannot_be_halved(shape: tuple[int, int, int], channels: list[int]) -> None:
    match = f"expected sides divisible by {2 ** len(channels)} .*got {shape[1]} x {shape[2]}"
    with pytest.raises(ValueError, match=f"ConvEncoder: {match}"):
        ConvEncoder(shape, channels, 4)
    with pytest.raises(ValueError, match=f"ConvDecoder: {match}"):
        ConvDecoder(4, channels, shape)
    with pytest.raises(ValueError, match="ConvEncoder: expected"):
        ConvEncoder(shape, [], 4)


@pytest.mark.parametrize("leading", [(5,), (3, 5)])
def test_encoders_return_distributions(leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 4)
    for q in (
        NormalEncoder(MLP(4, [7], 6))(x),
        MultivariateNormalEncoder(MLP(4, [7], 9), 3)(x),
        FlowEncoder(MLP(4, [7], 8), 3, inverse_autoregressive(3, 2))(x),
        FlowEncoder(MLP(4, [7], 8), 3, neural_spline(3, 2))(x),
        FlowEncoder(MLP(4, [7], 8), 3, [dist.transforms.conditional_spline(3, 2)])(x),
        MixtureEncoder(MLP(4, [7], 2 * (1 + 2 * 3)), 2)(x),
    ):
        assert q.batch_shape == leading
        assert q.event_shape == (3,)
        assert q.has_rsample
        assert q.log_prob(q.rsample()).shape == leading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_stay_positive(dtype: torch.dtype) -> None:
    """softplus underflows to 0 where a network is very sure."""
    out = torch.tensor([[0.0, 0.0, -1e4, -1e4]], dtype=dtype)
    assert (NormalEncoder(nn.Identity())(out).stddev > 0).all()
    out = torch.tensor([[0.0, 0.0, -1e4, 3.0, -1e4]], dtype=dtype)
    tril = MultivariateNormalEncoder(nn.Identity(), 2)(out).scale_tril
    mixture = MixtureEncoder(nn.Identity(), 1)(out[:, [0, 1, 2]])
    assert (mixture.component_distribution.base_dist.scale > 0).all()
    flow = FlowEncoder(nn.Identity(), 1, [])(out[:, [0, 2, 3]])
    assert flow.log_prob(torch.zeros(1, 1, dtype=dtype)).isfinite().all()
    assert (tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert tril[0, 1, 0] == 3.0
    assert tril[0, 0, 1] == 0.0


def test_encoders_of_the_wrong_width() -> None:
    with pytest.raises(ValueError, match="NormalEncoder: expected a network with an even number "):
        NormalEncoder(MLP(4, [], 5))(torch.zeros(2, 4))
    match = "MultivariateNormalEncoder: expected 9 outputs for latent_dim=3, got 8"
    with pytest.raises(ValueError, match=match):
        MultivariateNormalEncoder(MLP(4, [], 8), 3)(torch.zeros(2, 4))
    mixture = "MixtureEncoder: expected 3 .* outputs for num_components=3, got"
    for width in (3, 8, 12):
        with pytest.raises(ValueError, match=f"{mixture} {width}"):
            MixtureEncoder(MLP(4, [], width), 3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="MixtureEncoder: expected num_components >= 1, got 0"):
        MixtureEncoder(MLP(4, [], 8), 0)
    match = "FlowEncoder: expected more than 6 outputs for latent_dim=3, got 6"
    with pytest.raises(ValueError, match=match):
        FlowEncoder(MLP(4, [], 6), 3, inverse_autoregressive(3, 2))(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="FlowEncoder: expected latent_dim >= 1, got 0"):
        FlowEncoder(MLP(4, [], 6), 0, [])
    match = "FlowEncoder: expected conditional transforms, got AffineAutoregressive"
    with pytest.raises(TypeError, match=match):
        FlowEncoder(MLP(4, [], 6), 2, [dist.transforms.affine_autoregressive(2)])


def test_a_mixture_is_what_its_network_says() -> None:
    out = torch.tensor([[0.3, -0.4, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    q = MixtureEncoder(nn.Identity(), 2)(out)
    normal = q.component_distribution.base_dist
    torch.testing.assert_close(normal.loc, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    scale = nn.functional.softplus(torch.tensor([[[5.0, 6.0], [7.0, 8.0]]]))
    torch.testing.assert_close(normal.scale, scale, rtol=0, atol=2e-6)
    torch.testing.assert_close(q.mixture_distribution.probs, out[:, :2].softmax(-1))


def test_a_flow_without_transforms_is_a_normal() -> None:
    out, z = torch.randn(6, 7), torch.randn(6, 3)
    q = FlowEncoder(nn.Identity(), 3, [])(out)
    torch.testing.assert_close(q.log_prob(z), NormalEncoder(nn.Identity())(out[:, :6]).log_prob(z))
