"""Evaluation with a compiled model, and functions that cannot be compiled."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import guides, importance_weighted_log_likelihood, likelihoods, models, nets, priors
from pyro_vae.capture import function
from pyro_vae.capture.compilation import interpret
from pyro_vae.capture.function import CapturedFunction


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Graphs run operation by operation; the list counts them."""
    graphs: list[object] = []

    def keep(graph, inputs):
        graphs.append(graph)
        return interpret(graph)

    monkeypatch.setattr(function, "compile_graph", keep)
    return graphs


def fail(reason: str) -> None:
    raise AssertionError(reason)


def pair() -> tuple[models.VAE, guides.AmortizedNormal]:
    decoder, prior = nets.MLP(2, [5], 4), priors.StandardNormalPrior(2)
    return models.VAE(decoder, likelihoods.Bernoulli(), prior), guides.AmortizedNormal(
        nets.MLP(4, [5], 4)
    )


def both_ways(*programs, **options):
    """The estimate as it is and compiled, from the same random numbers."""
    estimates = []
    for compiled in (False, True):
        pyro.set_rng_seed(3)
        estimates.append(
            importance_weighted_log_likelihood(*programs, compiled=compiled, **options)
        )
    return estimates


@pytest.mark.parametrize("chunk_size", [7, 10])
def test_likelihood_is_the_same(without_compiler: list[object], chunk_size: int) -> None:
    model, guide = pair()
    x = torch.bernoulli(torch.full((6, 4), 0.5))
    first, second = both_ways(model, guide, x, num_particles=45, chunk_size=chunk_size)
    assert len(without_compiler) == 1
    torch.testing.assert_close(second.log_likelihood, first.log_likelihood, rtol=1e-12, atol=0)
    torch.testing.assert_close(second.standard_error, first.standard_error, rtol=1e-9, atol=0)


def test_likelihood_by_the_compiler() -> None:
    model, guide = pair()
    x = torch.bernoulli(torch.full((6, 4), 0.5))
    first, second = both_ways(model, guide, x, num_particles=64, chunk_size=16)
    torch.testing.assert_close(second.log_likelihood, first.log_likelihood, rtol=1e-12, atol=0)


def test_what_depends_on_values_runs_as_it_is(without_compiler: list[object]) -> None:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z if z.sum() > 0 else -z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.tensor([0.5, 1.0])
    values = []
    for compiled in (False, True):
        pyro.set_rng_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values.append(
                importance_weighted_log_likelihood(
                    model, guide, x, num_particles=40, chunk_size=10, compiled=compiled
                ).log_likelihood
            )
        messages = [str(w.message) for w in caught]
    assert any("test_captured_function.py" in m and "compiled=True" in m for m in messages)
    assert values[0].equal(values[1])
    assert without_compiler == []


def test_a_graph_serves_its_form_only(without_compiler: list[object]) -> None:
    calls = []

    def double(values, num):
        calls.append(num)
        return values["z"] * num

    captured = CapturedFunction(double, fail)
    for num, size in [(2, 3), (2, 3), (2, 3), (2, 3), (3, 3), (2, 4)]:
        z = torch.randn(size)
        assert captured({"z": z}, num).equal(z * num)
    # Once as it is; once as it is and once captured; then the graph; then other forms.
    assert calls == [2, 2, 2, 3, 2]


def test_a_wrong_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph, inputs):
        return lambda tensors: [out + 1 for out in interpret(graph)(tensors)]

    monkeypatch.setattr(function, "compile_graph", wrong)
    reasons: list[str] = []
    captured = CapturedFunction(lambda values, num: values["z"] * num, reasons.append)
    z = torch.tensor([1.0, 2.0])
    assert all(captured({"z": z}, 2).equal(2 * z) for _ in range(4))
    assert len(reasons) == 1
    assert "is not what the program computes" in reasons[0]


def test_random_numbers_go_on(without_compiler: list[object]) -> None:
    captured = CapturedFunction(lambda values, num: values["z"] + torch.randn(num), fail)
    z = torch.zeros(3)
    pyro.set_rng_seed(0)
    drawn = torch.stack([captured({"z": z}, 3) for _ in range(4)])
    pyro.set_rng_seed(0)
    assert drawn.equal(torch.stack([torch.randn(3) for _ in range(4)]))
