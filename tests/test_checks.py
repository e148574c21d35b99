"""Messages for input that cannot be right, where no public function's test reaches them."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.checks import (
    check_arguments,
    check_at_least,
    check_batch,
    check_data,
    check_values,
    explained,
)


def test_check_at_least() -> None:
    check_at_least("f", "n", 2, 2)
    with pytest.raises(ValueError, match=r"f: expected n >= 2, got 1. Pass n=2 or more."):
        check_at_least("f", "n", 1, 2)
    for wrong in (True, 2.0, "2", None):
        match = f"f: expected an integer n, got {type(wrong).__name__}. Pass n=2 or more."
        with pytest.raises(TypeError, match=match):
            check_at_least("f", "n", wrong, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("event_shape", [(4,), (-1,), (1, 8, 8), (-1, 8, -1), ()])
def test_check_data_takes_what_fits(event_shape: tuple[int, ...]) -> None:
    x = torch.zeros(3, *(4 if n < 0 else n for n in event_shape))
    check_data("f", "x", x, event_shape)
    check_batch("f", "x", x)


def test_check_data_refuses_the_rest() -> None:
    with pytest.raises(TypeError, match=r"f: expected x to be a tensor of shape \(batch, 4\)"):
        check_data("f", "x", [[1.0]], (4,))
    for wrong in (torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(())):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"x of shape \(batch, 4\), got {shape}.*unsqueeze"):
            check_data("f", "x", wrong, (4,))
    with pytest.raises(ValueError, match=r"x of shape \(batch, any, 3\), got"):
        check_data("f", "x", torch.zeros(2, 5, 4), (-1, 3))
    with pytest.raises(ValueError, match=r"x of shape \(batch,\), got"):
        check_data("f", "x", torch.zeros(2, 5), ())
    for empty in (torch.zeros(0, 4), torch.zeros(0, 1, 8, 8), torch.zeros(0)):
        with pytest.raises(ValueError, match="f: expected at least one row in x, got an empty"):
            check_batch("f", "x", empty)


def test_check_arguments_looks_into_containers() -> None:
    check_arguments("f", ((torch.zeros(2), 3), {"y": [torch.zeros(1)], "z": None}))
    with pytest.raises(ValueError, match=r"f: expected at least one row of data.*\(0, 3\)"):
        check_arguments("f", ((), {"y": [{"deep": torch.zeros(0, 3)}]}))


def test_check_values_takes_what_fits() -> None:
    check_values("f", "x", dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.ones(2, 3))
    check_values("f", "x", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1), torch.ones(2, 3))
    check_values("f", "x", dist.Dirichlet(torch.ones(3)), torch.ones(2, 3) / 3)
    check_values("f", "x", dist.Poisson(torch.ones(3)), torch.tensor([0, 3, 5]))


def test_check_values_under_a_mask() -> None:
    fn = dist.Bernoulli(0.5 * torch.ones(3)).to_event(1)
    x = torch.tensor([[0.0, 1.0, 1.0], [math.nan, 7.0, 0.3]])
    check_values("f", "x", fn, x, torch.tensor([True, False]))
    check_values("f", "x", fn, x, False)
    check_values("f", "x", dist.Bernoulli(0.5 * torch.ones(3)).mask(False), x)
    with pytest.raises(ValueError, match="f: expected finite data at site 'x', got 1 NaN and 0"):
        check_values("f", "x", fn, x, torch.tensor([False, True]))
    x[1, 0] = 1.0
    match = r"values 0 and 1 at site 'x' under a Bernoulli, got values in \[0.3, 7\]"
    with pytest.raises(ValueError, match=match):
        check_values("f", "x", fn, x, torch.tensor([False, True]))
    with pytest.raises(ValueError, match="values 0 and 1 at site 'x'"):
        check_values("f", "x", fn, x, True)


def test_check_values_of_a_factor_under_a_mask() -> None:
    """It has a density and no value."""
    value = torch.zeros(3, 0)
    fn = dist.Unit(torch.zeros(3))
    check_values("me", "f", fn, value, torch.tensor([True, False, True]))


def test_check_values_outside_the_support() -> None:
    match = r"f: expected values at site 'x' in the support .* of Beta, got values in \[-1, 0.5\]"
    with pytest.raises(ValueError, match=match):
        check_values("f", "x", dist.Beta(torch.ones(2), 1.0), torch.tensor([-1.0, 0.5]))


def test_explained_leaves_other_errors_alone() -> None:
    for error in (ValueError("mine"), KeyError("mine")):
        with pytest.raises(type(error), match="mine") as caught, explained("f"):
            raise error
        assert caught.value is error
