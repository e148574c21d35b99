"""Rate and distortion against the closed form of the linear-Gaussian beta-VAE."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.evaluation import ElboTerms, RateDistortionPoint, elbo_terms, rate_distortion
from pyro_vae.handlers import scale_kl

NOISE = 1.5
# Orthogonal rows, so that the best q is diagonal for every beta.
WEIGHT = torch.tensor([[1.0, 2.0, 0.0], [2.0, -1.0, 0.0]], dtype=torch.float64)
WHERE = "rate_distortion: "


def rows(num: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(num, 3, generator=generator, dtype=torch.float64)


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, NOISE).to_event(1), obs=x)


def best(x: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the q that minimises D + beta R: p(z) p(x | z)^(1 / beta)."""
    precision = 1 + WEIGHT.square().sum(1) / (beta * NOISE**2)
    return x @ WEIGHT.T / (beta * NOISE**2) / precision, 1 / precision


def best_guide(beta: float) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        loc, variance = best(x, beta)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, variance.sqrt()).to_event(1))

    return guide


def exact(x: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rate and distortion of each row in closed form."""
    loc, variance = best(x, beta)
    rate = (variance + loc.square() - 1 - variance.log()).sum(1) / 2
    square = (x - loc @ WEIGHT).square().sum(1) + (variance * WEIGHT.square().sum(1)).sum()
    return rate, square / (2 * NOISE**2) + 3 * math.log(NOISE * math.sqrt(2 * math.pi))


def pairs(*betas: float) -> dict[float, tuple[Any, Any]]:
    return {beta: (model, best_guide(beta)) for beta in betas}


def test_the_linear_gaussian_curve() -> None:
    x = rows()
    points = rate_distortion(pairs(4.0, 0.2, 1), x.repeat(500, 1), num_particles=2)
    assert [point.beta for point in points] == [0.2, 1, 4.0]
    for point in points:
        rate, distortion = exact(x, point.beta)
        assert point.rate == pytest.approx(float(rate.mean()))
        terms = elbo_terms(model, best_guide(point.beta), x.repeat(500, 1), num_particles=2)
        noise = terms.distortion.reshape(500, 6).mean(1).std() / 500**0.5
        assert abs(point.distortion - float(distortion.mean())) < 5 * noise < 0.2
        assert point.elbo == pytest.approx(-point.rate - point.distortion)
        assert point.num_data == 3000


def test_the_slope_of_the_curve_is_beta() -> None:
    """dD/dR = -beta along the optima: the numbers leave the weight of training out."""
    x, step = rows().repeat(2000, 1), 0.3

    def at(beta: float) -> RateDistortionPoint:
        pyro.set_rng_seed(0)  # Common random numbers: the difference is nearly free of noise.
        return rate_distortion(pairs(beta), x, num_particles=10)[0]

    low, high = at(2.0 - step), at(2.0 + step)
    slope = (high.distortion - low.distortion) / (high.rate - low.rate)
    (r0, d0), (r1, d1) = exact(rows(), 2.0 - step), exact(rows(), 2.0 + step)
    exact_slope = float((d1 - d0).mean() / (r1 - r0).mean())
    assert exact_slope == pytest.approx(-2, abs=0.05)
    assert slope == pytest.approx(exact_slope, abs=0.05)


def test_the_elbo_at_beta_one_is_the_log_likelihood() -> None:
    x = rows()
    (point,) = rate_distortion(pairs(1.0), x.repeat(500, 1), num_particles=2)
    marginal = dist.MultivariateNormal(torch.zeros(3), WEIGHT.T @ WEIGHT + NOISE**2 * torch.eye(3))
    terms = elbo_terms(model, best_guide(1.0), x.repeat(500, 1), num_particles=2)
    noise = float(terms.elbo.reshape(500, 6).mean(1).std()) / 500**0.5
    assert point.elbo == pytest.approx(float(marginal.log_prob(x).mean()), abs=5 * noise)


def test_the_weights_of_training_do_not_count() -> None:
    guide = best_guide(4.0)
    scaled = {4.0: (scale_kl(model, 4.0), scale_kl(guide, 4.0))}
    pyro.set_rng_seed(0)
    expected = rate_distortion({4.0: (model, guide)}, rows())
    pyro.set_rng_seed(0)
    assert rate_distortion(scaled, rows()) == expected


def test_settings_and_keywords_reach_the_programs() -> None:
    def shifted(x: torch.Tensor, shift: float) -> None:
        model(x + shift)

    def guide(x: torch.Tensor, shift: float) -> None:
        best_guide(1.0)(x + shift)

    (point,) = rate_distortion({1.0: (shifted, guide)}, rows(), shift=0.5, num_particles=1)
    assert point.rate == pytest.approx(float(exact(rows() + 0.5, 1.0)[0].mean()))
    with pytest.raises(ValueError, match="elbo_terms: expected num_particles >= 1, got 0"):
        rate_distortion(pairs(1.0), rows(), num_particles=0)
    with pytest.raises(ValueError, match="elbo_terms: expected chunk_size >= 1, got 0"):
        rate_distortion(pairs(1.0), rows(), chunk_size=0)


def test_standard_errors_are_over_the_data() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 50.0])
    is_data = torch.tensor([True, True, True, False])
    terms = ElboTerms({"x": -2 * values}, {"z": values}, frozenset(), is_data, 1)
    point = RateDistortionPoint.of(0.5, terms)
    error = 7**0.5 / 3**0.5  # The variance of 1, 2, 6 is 7.
    expected = {"rate": 3.0, "distortion": 6.0, "elbo": -9.0}
    for factor, (name, mean) in zip((1, 2, 3), expected.items(), strict=True):
        assert getattr(point, name) == pytest.approx(mean)
        assert getattr(point, f"{name}_standard_error") == pytest.approx(factor * error)
    assert (point.beta, point.num_data) == (0.5, 3)


def test_one_datum_and_none() -> None:
    (point,) = rate_distortion(pairs(1.0), rows(1))
    assert math.isnan(point.rate_standard_error)
    none = [poutine.mask(program, mask=torch.tensor(False)) for program in (model, best_guide(1.0))]
    with pytest.raises(ValueError, match="expected at least one row of data, got a mask that leav"):
        rate_distortion({1.0: (none[0], none[1])}, rows())


def test_padding_rows_are_no_data() -> None:
    seen = torch.arange(6) < 4
    guide = best_guide(1.0)
    masked = {1.0: (poutine.mask(model, mask=seen), poutine.mask(guide, mask=seen))}
    (point,) = rate_distortion(masked, rows())
    assert point.rate == pytest.approx(float(exact(rows()[:4], 1.0)[0].mean()))
    assert point.num_data == 4


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({}, ValueError, "expected at least one pair, got none"),
        ({"1": (model, model)}, TypeError, "expected the keys of pairs to be numbers, .* got str"),
        (
            {True: (model, model)},
            TypeError,
            "expected the keys of pairs to be numbers, .* got bool",
        ),
        ({-1.0: (model, model)}, ValueError, "expected finite betas >= 0, got -1.0"),
        ({math.nan: (model, model)}, ValueError, "expected finite betas >= 0, got nan"),
        ({1.0: model}, TypeError, "expected a model and a guide for beta = 1.0, got function"),
        ({1.0: (model,)}, TypeError, "expected a model and a guide for beta = 1.0, got tuple"),
    ],
)
def test_pairs(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=WHERE + message):
        rate_distortion(bad, rows())
