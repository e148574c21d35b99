"""Networks with a context: shapes, broadcasting, formulas by hand, errors."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_vae.conditioning import Concatenate, Embed, FiLM, OneHot
from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.nets import MLP, ConvEncoder, NormalEncoder

C = 3
Y = torch.tensor([2, 0, 1, 1, 0])

NETS: dict[str, Callable[[], nn.Module]] = {
    "concatenated one-hot": lambda: Concatenate(MLP(2 + C, [7], 4), embed=OneHot(C)),
    "concatenated vectors": lambda: Concatenate(MLP(2 + 6, [7], 4), embed=Embed(C, 6)),
    "FiLM, one-hot": lambda: woken(FiLM(2, [7, 5], 4, C, embed=OneHot(C))),
    "FiLM, vectors": lambda: woken(FiLM(2, [7], 4, 6, embed=Embed(C, 6), activation=nn.Tanh)),
}


def woken(film: FiLM) -> FiLM:
    """With the maps to scale and shift away from their start at zero."""
    for modulation in film.modulations:
        for parameter in modulation.parameters():
            nn.init.normal_(parameter)
    return film


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return NETS[request.param]()


# Classes.


def test_one_hot() -> None:
    one_hot = OneHot(C)
    assert one_hot(Y).tolist() == torch.eye(C)[Y].tolist()
    assert one_hot(Y).dtype == torch.float64
    assert one_hot.float()(Y).dtype == torch.float32
    assert one_hot(Y.int()).equal(one_hot(Y))
    assert one_hot(Y.to(torch.uint8)).equal(one_hot(Y))
    assert one_hot(torch.arange(C).unsqueeze(1)).shape == (C, 1, C)
    assert one_hot(torch.tensor(1)).tolist() == [0, 1, 0]
    assert not one_hot.state_dict()
    assert repr(one_hot) == "OneHot(3)"


def test_one_hot_takes_rows_that_are_one_hot() -> None:
    rows = torch.eye(C)[Y].expand(4, 5, C)
    assert OneHot(C)(rows) is rows


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([[0.5, 0.5, 0.0]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[2.0, -1.0, 0.0]]),
        torch.tensor([[1.0, float("nan"), 0.0]]),
        torch.tensor([0.0, 1.0, 0.0]),  # one row, or three classes as floats
        torch.eye(4),
        torch.tensor(1.0),
        torch.tensor([2.0, 0.0, 1.0, 1.0]),  # classes as floats
    ],
)
def test_rows_that_are_not_one_hot(rows: torch.Tensor) -> None:
    match = r"OneHot: expected classes as integers, or one-hot rows of 3 .*y.long\(\) or y.argmax"
    with pytest.raises(ValueError, match=match):
        OneHot(C)(rows)


def test_embed() -> None:
    embed = Embed(C, 4)
    assert embed(Y).equal(embed.vectors.weight[Y])
    assert embed(Y.int()).equal(embed(Y))
    assert embed(torch.arange(C).unsqueeze(1)).shape == (C, 1, 4)
    embed(torch.tensor([2, 2])).sum().backward()
    assert embed.vectors.weight.grad[:, 0].tolist() == [0, 0, 2]


@pytest.mark.parametrize("module", [OneHot(C), Embed(C, 4)])
def test_what_is_no_class(module: nn.Module) -> None:
    where = type(module).__name__
    for bad in (-1, C):
        match = rf"{where}: expected classes 0 \.\.\. 2 in y, got {bad}"
        with pytest.raises(ValueError, match=match):
            module(torch.tensor([0, bad]))
    with pytest.raises(
        TypeError, match=rf"{where}: expected y of integers.*torch.bool. y.long\(\)"
    ):
        module(Y > 0)
    with pytest.raises(TypeError, match=f"{where}: expected y to be a tensor.*got list"):
        module([0, 1])
    if isinstance(module, Embed):
        with pytest.raises(TypeError, match="Embed: expected y of integers.*float64"):
            module(Y.double())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OneHot(0), "OneHot: expected num_classes >= 1, got 0"),
        (lambda: OneHot(2.0), "OneHot: expected an integer num_classes, got float"),
        (lambda: Embed(0, 2), "Embed: expected num_classes >= 1, got 0"),
        (lambda: Embed(2, 0), "Embed: expected embedding_dim >= 1, got 0"),
    ],
)
def test_sizes_that_cannot_be(make: Callable[[], Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make()


# Leading dimensions.


@pytest.mark.parametrize(
    ("of_h", "of_y"),
    [
        ((5,), (5,)),
        ((1,), (1,)),
        ((7, 5), (5,)),  # particles
        ((5,), (C, 1)),  # enumerated classes
        ((C, 7, 5), (C, 1, 1)),  # both, a code for each class
        ((7, 5), (C, 1, 1)),  # both, one code for all
        ((7, 5), (7, 5)),
        ((), ()),
    ],
)
def test_leading_dimensions_broadcast(
    net: nn.Module, of_h: tuple[int, ...], of_y: tuple[int, ...]
) -> None:
    h, y = torch.randn(*of_h, 2), torch.randint(C, of_y)
    out = net(h, y)
    leading = torch.broadcast_shapes(of_h, of_y)
    assert out.shape == (*leading, 4)
    rows, classes = h.expand(*leading, 2).reshape(-1, 2), y.expand(leading).reshape(-1)
    alone = [net(rows[i : i + 1], classes[i : i + 1]) for i in range(len(rows))]
    torch.testing.assert_close(out.reshape(-1, 4), torch.cat(alone))


def test_the_context_matters(net: nn.Module) -> None:
    h = torch.randn(5, 2)
    assert ((net(h, Y) - net(h, (Y + 1) % C)).abs().amax(-1) > 1e-6).all()


def test_every_parameter_gets_a_gradient(net: nn.Module) -> None:
    net(torch.randn(40, 2), torch.arange(40) % C).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", NETS)
def test_a_state_dict_brings_the_same_numbers(name: str, tmp_path: Any) -> None:
    net, other, h = NETS[name](), NETS[name](), torch.randn(5, 2)
    assert not torch.allclose(net(h, Y), other(h, Y))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert net(h, Y).equal(other(h, Y))


def test_float32(net: nn.Module) -> None:
    h = torch.randn(5, 2)
    expected = net(h, Y)
    out = net.float()(h.float(), Y)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


# Formulas.


def test_concatenate_is_a_linear_map_of_both() -> None:
    net = Concatenate(nn.Linear(2 + C, 4), embed=OneHot(C))
    h = torch.randn(5, 2)
    weight = net.net.weight
    expected = h @ weight[:, :2].T + weight[:, 2:].T[Y] + net.net.bias
    torch.testing.assert_close(net(h, Y), expected)


def test_concatenate_of_floats_as_they_are() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    h, context = torch.randn(7, 5, 2), torch.randn(5, 3)
    out = Concatenate(Both())(h, context)
    assert out[..., :2].equal(h)
    assert out[..., 2:].equal(context.expand(7, 5, 3))


def test_film_by_hand() -> None:
    film = woken(FiLM(2, [3, 4], 2, 2, activation=nn.Tanh))
    h, context = torch.randn(5, 2), torch.randn(5, 2)
    expected = h
    for layer, modulation in zip(film.layers, film.modulations, strict=True):
        both = context @ modulation.weight.T + modulation.bias
        width = both.shape[1] // 2
        before = expected @ layer.weight.T + layer.bias
        expected = torch.tanh(before + both[:, :width] * before + both[:, width:])
    expected = expected @ film.last.weight.T + film.last.bias
    torch.testing.assert_close(film(h, context), expected)


def test_film_starts_as_a_network_without_context() -> None:
    film = FiLM(2, [7, 5], 4, C, embed=OneHot(C))
    mlp = MLP(2, [7, 5], 4)
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    for layer, other in zip(layers, [*film.layers, film.last], strict=True):
        layer.load_state_dict(other.state_dict())
    h = torch.randn(5, 2)
    torch.testing.assert_close(film(h, Y), mlp(h))
    film(h, Y).square().sum().backward()
    for name, parameter in film.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_what_film_embeds_learns_from_the_second_step() -> None:
    film = FiLM(2, [7], 4, 6, embed=Embed(C, 6))
    optimizer = torch.optim.SGD(film.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        film(torch.randn(5, 2), Y).square().sum().backward()
        moved.append(bool((film.embed.vectors.weight.grad != 0).any()))
        optimizer.step()
    assert moved == [False, True]


def test_an_image_as_context() -> None:
    embed = ConvEncoder((1, 8, 4), [3], 5)
    context = torch.rand(5, 1, 8, 4)
    h = torch.randn(7, 5, 2)
    for net in (
        Concatenate(MLP(2 + 5, [7], 4), embed=embed),
        woken(FiLM(2, [7], 4, 5, embed=embed)),
    ):
        out = net(h, context)
        assert out.shape == (7, 5, 4)
        torch.testing.assert_close(out[3, 2:3], net(h[3, 2:3], context[2:3]))


# In plain Pyro programs.


@pytest.mark.parametrize("name", NETS)
def test_particles_need_no_fallback(name: str) -> None:
    """All particles at once, in a program of other names; a fallback would warn."""
    decoder, encoder = NETS[name](), NormalEncoder(NETS[name]())

    def model(pair: torch.Tensor, kind: torch.Tensor) -> None:
        with pyro.plate("rows", len(pair)):
            code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "pair", dist.Normal(decoder(code, kind)[..., :2], 1.0).to_event(1), obs=pair
            )

    def guide(pair: torch.Tensor, kind: torch.Tensor) -> None:
        with pyro.plate("rows", len(pair)):
            pyro.sample("code", encoder(pair, kind))

    x = torch.randn(5, 2)
    estimate = importance_weighted_log_likelihood(model, guide, x, Y, num_particles=30)
    assert estimate.log_likelihood.isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_an_enumerated_class_is_summed_out(name: str) -> None:
    """By hand: the likelihood of a mixture over the classes."""
    net = NETS[name]()
    x, fixed = torch.randn(5, 4), torch.randn(5, 2)

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.2, 0.3])))
            pyro.sample("x", dist.Normal(net(fixed, kind), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pass

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), guide, x)
    of_class = [
        dist.Normal(net(fixed, torch.full((5,), label)).detach(), 1.0).to_event(1).log_prob(x).exp()
        for label in range(C)
    ]
    expected = (0.5 * of_class[0] + 0.2 * of_class[1] + 0.3 * of_class[2]).log().sum()
    assert loss == pytest.approx(-float(expected))


def test_svi_trains_the_maps_of_film() -> None:
    net = FiLM(1, [7], 2, C, embed=OneHot(C))
    x = torch.eye(2)[Y % 2]

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(net(torch.ones(5, 1), Y), 0.1).to_event(1), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    before = svi.evaluate_loss(x)
    for _ in range(50):
        svi.step(x)
    assert svi.evaluate_loss(x) < before - 10
    assert net.modulations[0].weight.abs().max() > 0.1


# Errors.


@pytest.mark.parametrize("make", [lambda: Concatenate(MLP(3, [], 4)), lambda: FiLM(2, [3], 4, 1)])
def test_classes_without_an_embedding(make: Callable[[], nn.Module]) -> None:
    net = make()
    match = (
        rf"{type(net).__name__}: expected a context of floats, got (torch.int64|list)"
        r".*OneHot.*rows that are one-hot, as context.float\(\)"
    )
    for context in (Y, nn.functional.one_hot(Y), [0.0]):
        with pytest.raises(TypeError, match=match):
            net(torch.randn(5, 2), context)


@pytest.mark.parametrize("name", NETS)
def test_contexts_of_other_rows(name: str) -> None:
    net = NETS[name]()
    where = type(net).__name__
    match = rf"{where}: expected context and input with the same rows, got features of shape \(4, "
    with pytest.raises(ValueError, match=match):
        net(torch.randn(5, 2), Y[:4])


@pytest.mark.parametrize("make", [lambda: Concatenate(MLP(3, [], 4)), lambda: FiLM(2, [3], 4, 1)])
def test_a_single_number(make: Callable[[], nn.Module]) -> None:
    net = make()
    match = rf"{type(net).__name__}: expected a context with features .*got a single number"
    with pytest.raises(ValueError, match=match):
        net(torch.randn(5, 2), torch.tensor(0.5))


@pytest.mark.parametrize("make", [lambda: Concatenate(MLP(5, [], 4)), lambda: FiLM(2, [3], 4, 3)])
def test_a_number_for_each_row(make: Callable[[], nn.Module]) -> None:
    """Of three rows, it must not be taken for three features of all rows."""
    net, context = make(), torch.randn(3)
    match = rf"{type(net).__name__}: expected a context with a row of features for each row, got "
    with pytest.raises(ValueError, match=match + r"floats of shape \(3,\) .*context.unsqueeze\(-1"):
        net(torch.randn(3, 2), context)
    one_for_all = net(torch.randn(3, 2), context.unsqueeze(0))  # as the message says
    assert one_for_all.shape == (3, 4)
    assert net(torch.randn(2), context).shape == (4,)  # one row of both


def test_an_image_that_is_not_flat() -> None:
    match = r"same rows, got features of shape \(5, 1, 8, 4\).*flatten images with x.flatten\(1\)"
    with pytest.raises(ValueError, match=match):
        Concatenate(MLP(2 + 32, [], 4))(torch.randn(5, 2), torch.rand(5, 1, 8, 4))


def test_film_of_other_widths() -> None:
    film = FiLM(2, [7], 4, 3)
    match = r"FiLM: expected input of width 2 in the last dimension, got shape \(5, 3\)"
    with pytest.raises(ValueError, match=match):
        film(torch.randn(5, 3), torch.randn(5, 3))
    match = r"FiLM: expected context of width 3 in the last dimension, got shape \(5, 2\)"
    with pytest.raises(ValueError, match=match):
        film(torch.randn(5, 2), torch.randn(5, 2))


def test_film_without_hidden_layers() -> None:
    match = "FiLM: expected one or more hidden layers, got none.*Concatenate"
    with pytest.raises(ValueError, match=match):
        FiLM(2, [], 4, 3)
