"""Drawing from a program: what is given stays, what is summed out can be sampled back."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.traces import DataPlates
from pyro_vae.vectorised import VectorisedProgram

LOCS, SCALE = (-1.0, 1.0), 0.8
NUM = 4000


def program(view: bool) -> Callable[[], None]:
    """y -> z -> x; with ``view`` it cannot take particles at the left."""

    def model() -> None:
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(torch.tensor(LOCS)[y], SCALE))
            loc = z.view(3) if view else z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.0, 1.0, -1.0]))

    return model


def vectorised(model: Callable[[], None], enumerated: tuple[str, ...]) -> VectorisedProgram:
    plates = DataPlates(("data",), (-1,), (3,))
    shapes = dict.fromkeys("yz", torch.Size([3]))
    return VectorisedProgram(model, "model", plates, 1, "here", shapes, enumerated)


def posterior_of_y(z: torch.Tensor) -> torch.Tensor:
    """p(y = 1 | z)."""
    log_joint = dist.Normal(torch.tensor(LOCS), SCALE).log_prob(z.unsqueeze(-1))
    return (log_joint + torch.tensor([0.3, 0.7]).log()).softmax(-1)[..., 1]


@pytest.mark.parametrize("view", [False, True])
def test_summed_latents_are_drawn_from_their_posterior(view: bool) -> None:
    num = NUM // 10 if view else NUM
    z = torch.tensor([-0.5, 0.0, 0.8]).expand(num, 3)
    target = vectorised(program(view), ("y",))
    if view:
        with pytest.warns(UserWarning, match="here: the model does not broadcast"):
            y = target.draw_enumerated({"z": z}, num)["y"]
    else:
        y = target.draw_enumerated({"z": z}, num)["y"]
    assert y.shape == (num, 3)
    p = posterior_of_y(z[0])
    error = (p * (1 - p) / num).sqrt()
    assert ((y.double().mean(0) - p).abs() < 5 * error).all()


def test_summed_latents_follow_the_particle_they_belong_to() -> None:
    z = torch.linspace(-6, 6, NUM).unsqueeze(-1).expand(NUM, 3)
    y = vectorised(program(False), ("y",)).draw_enumerated({"z": z}, NUM)["y"]
    p = posterior_of_y(z)
    certain = (p - 0.5).abs() > 0.499
    assert certain.double().mean() > 0.3
    assert ((y == p.round())[certain]).double().mean() > 0.995


@pytest.mark.parametrize("view", [False, True])
def test_given_latents_keep_their_values(view: bool) -> None:
    z, target = torch.randn(20, 3), vectorised(program(view), ())
    if view:
        with pytest.warns(UserWarning, match="here: the model does not broadcast"):
            values, log_density = target.draw(20, {"z": z})
    else:
        values, log_density = target.draw(20, {"z": z})
    assert torch.equal(values["z"], z)
    assert values["y"].shape == (20, 3)
    loc = torch.tensor(LOCS)[values["y"]]
    x = torch.tensor([0.0, 1.0, -1.0])
    expected = (
        dist.Categorical(torch.tensor([0.3, 0.7])).log_prob(values["y"])
        + dist.Normal(loc, SCALE).log_prob(z)
        + dist.Normal(z, 1.0).log_prob(x)
    )
    torch.testing.assert_close(log_density, expected)
