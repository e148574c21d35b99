"""Variances of mean codes, against closed forms and estimates without bias."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions.transforms import ExpTransform

from pyro_vae.evaluation import ActiveUnits, active_units
from pyro_vae.guides import AmortizedNormal, ExactGaussianMixture, ExactLinearGaussian
from pyro_vae.handlers import scale_kl
from pyro_vae.models import GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP

WEIGHT = torch.tensor([[1.0, 0.0, 0.05], [0.5, 0.0, -0.05]], dtype=torch.float64)


def rows(num: int = 12) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(4))


def guide(images: torch.Tensor) -> None:
    """Three units: the second one knows nothing of the data, the third one hardly anything."""
    with pyro.plate("images", len(images)):
        pyro.sample("code", dist.Normal(images @ WEIGHT.to(images), 1.0).to_event(1))


def hierarchy(x: torch.Tensor) -> None:
    """E[top | x] = x @ WEIGHT, of which a single draw of the middle shows little."""
    with pyro.plate("rows", len(x)):
        middle = pyro.sample("middle", dist.Normal(x @ WEIGHT.to(x), 2.0).to_event(1))
        pyro.sample("top", dist.Normal(middle, 0.1).to_event(1))


def variance(values: torch.Tensor) -> torch.Tensor:
    """By its definition, in a loop over the rows."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def assert_unbiased(guide: Any, x: torch.Tensor, expected: torch.Tensor, **kwargs: Any) -> None:
    """Compares the mean of many short runs, within five of its standard errors."""
    num = 100
    estimates = torch.stack([active_units(guide, x, **kwargs).variances for _ in range(num)])
    error = estimates.std(0) / num**0.5
    assert ((estimates.mean(0) - expected).abs() < 5 * error).all()


# Exact means.


def test_variance_of_the_means() -> None:
    x = rows()
    units = active_units(guide, x)
    torch.testing.assert_close(units.variances, variance(x @ WEIGHT))
    assert units.active.tolist() == [True, False, False]
    assert units.count == 1
    assert units.threshold == 0.01


def test_standard_error_over_the_data() -> None:
    x = rows()
    loc = x @ WEIGHT
    squares = (loc - loc.mean(0)).square()
    error = (squares - squares.mean(0)).square().sum(0).div(11).div(12).sqrt()
    torch.testing.assert_close(active_units(guide, x).standard_error, error)


def test_the_threshold_is_a_bound_of_the_variance() -> None:
    x = rows()
    third = float(variance(x @ WEIGHT)[2])
    assert active_units(guide, x, threshold=third * 0.999).count == 2
    assert active_units(guide, x, threshold=third).count == 1
    assert active_units(guide, x, threshold=0.0).count == 2


def test_exact_posterior_of_the_linear_gaussian() -> None:
    model, x = LinearGaussian(data_dim=4, latent_dim=3), torch.randn(20, 4)
    with torch.no_grad():
        expected = variance(model.posterior(x).mean)
    units = active_units(ExactLinearGaussian(model), x)
    torch.testing.assert_close(units.variances, expected)
    assert not units.variances.requires_grad


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_codes_of_any_shape(shape: tuple[int, ...]) -> None:
    loc = torch.randn(6, *shape)

    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(len(shape)))

    units = active_units(program, rows(6))
    torch.testing.assert_close(units.variances, variance(loc))
    assert units.active.shape == shape


def test_a_plate_of_another_dimension() -> None:
    def wide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-3):
            pyro.sample("z", dist.Normal((x @ WEIGHT)[:, None, None], 1.0).to_event(1))

    torch.testing.assert_close(active_units(wide, rows()).variances, variance(rows() @ WEIGHT))


def test_a_mixture_knows_its_mean() -> None:
    def program(x: torch.Tensor) -> None:
        parts = dist.Normal(torch.stack([x, x + 1], 1), 1.0).to_event(1)
        weights = torch.softmax(x, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), parts))

    x = rows()
    torch.testing.assert_close(
        active_units(program, x).variances, variance(x + torch.softmax(x, -1)[:, 1:])
    )


def test_float32_accumulates_in_float64() -> None:
    """Rows far from 0 would lose their variance in float32."""
    x = 1000 + torch.arange(64, dtype=torch.float32).unsqueeze(-1).expand(64, 2) / 64

    def far(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    units = active_units(far, x)
    assert units.variances.dtype == torch.float64
    torch.testing.assert_close(units.variances, variance(x.double()), rtol=1e-12, atol=0.0)


def test_rows_masked_out_are_no_data() -> None:
    x, mask = rows(), torch.arange(12) % 3 > 0

    def inner(x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("code", dist.Normal(x @ WEIGHT, 1.0).to_event(1).mask(mask))

    expected = active_units(guide, x[mask])
    for masked in (inner, poutine.mask(guide, mask)):
        units = active_units(masked, x)
        torch.testing.assert_close(units.variances, expected.variances)
        torch.testing.assert_close(units.standard_error, expected.standard_error)
    units = active_units(poutine.mask(hierarchy, mask), x, site="middle")
    torch.testing.assert_close(units.variances, expected.variances)


def test_keyword_arguments_and_scales() -> None:
    def weighted(x: torch.Tensor, weight: float) -> None:
        guide(weight * x)

    expected = active_units(guide, 2 * rows())
    for program in (weighted, scale_kl(weighted, 4.0)):
        units = active_units(program, rows(), weight=2.0)
        torch.testing.assert_close(units.variances, expected.variances)


# Means over samples.


@pytest.mark.parametrize("num_samples", [2, 5])
def test_a_hierarchy_without_bias(num_samples: int) -> None:
    """Plain averages over S would be too large by 4 / S."""
    x = rows()
    expected = variance(x @ WEIGHT)
    assert_unbiased(hierarchy, x, expected, site="top", num_samples=num_samples)
    exact = active_units(hierarchy, x, site="middle")
    torch.testing.assert_close(exact.variances, expected)


def test_a_hierarchy_from_many_samples() -> None:
    x = rows(400)
    units = active_units(hierarchy, x, site="top", num_samples=1000)
    loc = x @ WEIGHT
    # Given the data: the noise of the means, 4 / S in each row, and twice its cross term.
    error = (2 * (4 / 1000) ** 2 / 400 + 4 * (4 / 1000) * variance(loc) / 400).sqrt()
    assert ((units.variances - variance(loc)).abs() < 5 * error).all()
    assert units.count == 1


def test_noise_that_all_rows_share_does_not_vary_over_the_data() -> None:
    """It moves all means of a run alike: the estimate is exact."""

    def program(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x @ WEIGHT + shift, 1.0).to_event(1))

    x = rows()
    units = active_units(program, x, site="z", num_samples=3)
    torch.testing.assert_close(units.variances, variance(x @ WEIGHT))


def test_conditional_means_take_the_place_of_samples() -> None:
    """The noise of the last site plays no role."""

    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(x @ WEIGHT, 1e-9).to_event(1))
            pyro.sample("last", dist.Normal(first, 100.0).to_event(1))

    x = rows()
    units = active_units(program, x, site="last", num_samples=2)
    torch.testing.assert_close(units.variances, variance(x @ WEIGHT), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("upstream", [False, True])
def test_a_distribution_without_a_mean(upstream: bool) -> None:
    """exp(u) of a normal u has the mean exp(loc + scale^2 / 2), which torch does not know."""

    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            if upstream:
                x = pyro.sample("up", dist.Normal(x, 0.3).to_event(1))
            fn = dist.TransformedDistribution(dist.Normal(x, 0.5), [ExpTransform()])
            pyro.sample("z", fn.to_event(1))

    x = rows() / 2
    total = 0.25 + 0.09 * upstream
    expected = variance((x + total / 2).exp())
    assert_unbiased(program, x, expected, site="z", num_samples=3)


def test_a_discrete_latent_upstream() -> None:
    """Some labels are certain, so that draws alone would not show the dependence."""
    prob = torch.tensor([1e-13, 0.3, 0.9, 1 - 1e-13])

    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", 4):
            label = pyro.sample("label", dist.Bernoulli(prob))
            pyro.sample("z", dist.Normal(3 * label, 0.5))

    assert_unbiased(program, torch.zeros(4), variance(3 * prob), site="z", num_samples=3)


def test_an_automatic_guide() -> None:
    """Its latent is a point mass on an auxiliary sample."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

    auto, x = AutoNormal(model, init_scale=0.5), rows()
    auto(x)
    with torch.no_grad():
        auto.locs.z.copy_(x)
    assert_unbiased(auto, x, variance(x), num_samples=3)


# What it leaves alone, and what it says.


def test_evaluation_leaves_everything_as_it_was() -> None:
    encoder = MLP(2, [16], 4, dropout=0.5)
    amortized = AmortizedNormal(encoder)
    same = rows(1).expand(20, 2).clone()
    units = active_units(amortized, same)
    assert units.count == 0  # In train mode dropout would make identical rows differ.
    assert encoder.training
    net = nn.Linear(2, 2)

    def plain(x: torch.Tensor) -> None:
        loc = pyro.module("plain", net)(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(loc, pyro.param("scale", torch.ones(2))).to_event(1))

    assert not active_units(plain, rows()).variances.requires_grad
    assert not list(pyro.get_param_store().keys())


def test_in_words() -> None:
    units = ActiveUnits(torch.tensor([0.5, 0.02, 0.0]), torch.zeros(3), threshold=0.02)
    assert str(units) == ("1 of 3 units active (variance of their mean over the data above 0.02)")


def test_arguments() -> None:
    x = rows()
    with pytest.raises(ValueError, match="active_units: expected num_samples >= 2, got 1"):
        active_units(guide, x, num_samples=1)
    with pytest.raises(TypeError, match="expected an integer num_samples, got float"):
        active_units(guide, x, num_samples=2.0)
    for threshold in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a finite threshold >= 0, got"):
            active_units(guide, x, threshold=threshold)
    with pytest.raises(ValueError, match="active_units: expected at least one row of data"):
        active_units(guide, x[:0])
    with pytest.raises(ValueError, match="expected at least two rows of data at site 'code'"):
        active_units(guide, x[:1])
    with pytest.raises(ValueError, match="expected at least two rows of data at site 'code'"):
        active_units(poutine.mask(guide, torch.arange(12) == 3), x)


def test_which_site() -> None:
    with pytest.raises(ValueError, match=r"the guide's latents \['middle', 'top'\], got none"):
        active_units(hierarchy, rows())
    with pytest.raises(ValueError, match=r"the guide's latents \['middle', 'top'\], got 'z'"):
        active_units(hierarchy, rows(), site="z")


def test_latents_without_a_mean() -> None:
    with pytest.raises(ValueError, match="got the discrete site 'z', whose values have no mean"):
        active_units(ExactGaussianMixture(GaussianMixture(2, 3)), rows())

    def cauchy(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Cauchy(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected finite means at site 'z', got 24 of 24"):
        active_units(cauchy, rows())


def test_plates_and_subsamples() -> None:
    def bare(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected site 'z' of the guide in one plate"):
        active_units(bare, rows())

    def subsampled(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=3) as index:
            pyro.sample("z", dist.Normal(x[index], 1.0).to_event(1))

    with pytest.raises(ValueError, match="active_units: .* got a random subsample of 3 of 12"):
        active_units(subsampled, rows())
