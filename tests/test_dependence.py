"""Which latents depend on which: values followed, and draws compared."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_vae.dependence import dependent_latents, provenance

X = torch.randn(6, 2)


def chain() -> None:
    with pyro.plate("rows", 6):
        a = pyro.sample("a", dist.Normal(X[:, 0], 1.0))
        b = pyro.sample("b", dist.Normal(a * 2, 1.0))
        pyro.sample("c", dist.Normal(X[:, 1], 1.0))
        pyro.sample("d", dist.Normal(0.0, b.exp()))
        pyro.sample("x", dist.Normal(b, 1.0), obs=X[:, 0])


def dependent(program: Any) -> set[str]:
    return dependent_latents(program, poutine.trace(program).get_trace())


def test_values_are_followed() -> None:
    found = {name: set(others) for name, others in provenance(chain).items()}
    assert found == {"a": set(), "b": {"a"}, "c": set(), "d": {"b"}}
    assert dependent(chain) == {"b", "d"}


def test_a_support_that_moves() -> None:
    def program() -> None:
        low = torch.zeros(6)
        with pyro.plate("rows", 6):
            low[:] = pyro.sample("a", dist.Normal(X[:, 0], 1.0))
            pyro.sample("b", dist.Uniform(low, low + 0.1))

    assert dependent(program) == {"b"}


def test_random_numbers_outside_any_site() -> None:
    def program() -> None:
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Normal(torch.randn(6), 1.0))

    assert dependent(program) == {"z"}


def test_the_same_rows_are_compared() -> None:
    def program() -> None:
        with pyro.plate("rows", 6, subsample_size=2) as rows:
            pyro.sample("a", dist.Normal(X[rows, 0], 0.1))
            pyro.sample("b", dist.Normal(X[rows, 1], 0.1))

    assert dependent(program) == set()
