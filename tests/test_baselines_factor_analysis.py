import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

from pyro_vae.baselines import factor_analysis_em, ppca


def factor_data(num_rows: int = 500, num_columns: int = 8, latent_dim: int = 2) -> Tensor:
    noise = torch.randn(num_rows, num_columns) * torch.linspace(0.3, 3.0, num_columns)
    z = torch.randn(num_rows, latent_dim)
    return z @ (2.0 * torch.randn(latent_dim, num_columns)) + noise + 5.0


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_agrees_with_scikit_learn(latent_dim: int) -> None:
    x = factor_data(latent_dim=latent_dim)
    # Its tolerance is a gain summed over the rows.
    reference = FactorAnalysis(latent_dim, tol=1e-9, max_iter=20_000, svd_method="lapack")
    reference.fit(x.numpy())
    fit = factor_analysis_em(x, latent_dim, num_steps=20_000, tolerance=1e-13)
    expected = torch.as_tensor(reference.score_samples(x.numpy()))
    torch.testing.assert_close(fit.log_prob(x), expected, rtol=0, atol=1e-4)
    assert fit.log_likelihoods[-1] >= expected.mean() - 1e-8
    covariance = fit.weight @ fit.weight.mT + fit.noise_variance.diag()
    torch.testing.assert_close(
        covariance, torch.as_tensor(reference.get_covariance()), atol=1e-3, rtol=0
    )
    z = fit.posterior(x).mean
    theirs = torch.as_tensor(reference.transform(x.numpy()))
    torch.testing.assert_close(z @ z.mT, theirs @ theirs.mT, rtol=0, atol=1e-3)


def test_first_steps_agree_with_the_published_update() -> None:
    x = factor_data()
    covariance = x.mT.cov(correction=0)
    before = factor_analysis_em(x, 2, num_steps=1)
    after = factor_analysis_em(x, 2, num_steps=2, tolerance=0.0)
    weight, noise = before.weight, before.noise_variance
    beta = weight.mT @ torch.linalg.inv(weight @ weight.mT + noise.diag())
    second = torch.eye(2) - beta @ weight + beta @ covariance @ beta.mT
    updated = covariance @ beta.mT @ torch.linalg.inv(second)
    torch.testing.assert_close(after.weight, updated)
    residual = (covariance - updated @ beta @ covariance).diagonal()
    torch.testing.assert_close(after.noise_variance, residual)


def test_gradient_is_zero_at_the_optimum() -> None:
    x = factor_data()
    fit = factor_analysis_em(x, 2, num_steps=20_000, tolerance=1e-15)
    # At the optimum each column has its sample variance.
    variance = fit.weight.square().sum(-1) + fit.noise_variance
    torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-5, atol=0)
    model = fit.weight @ fit.weight.mT + fit.noise_variance.diag()
    scores = torch.linalg.solve(model, fit.weight)
    expected = torch.linalg.solve(model, x.mT.cov(correction=0) @ scores)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_em_never_decreases(seed: int) -> None:
    torch.manual_seed(seed)
    num_rows, num_columns = int(torch.randint(12, 60, ())), int(torch.randint(2, 20, ()))
    latent_dim = int(torch.randint(1, min(num_columns, 5), ()))
    x = factor_data(num_rows, num_columns)
    fit = factor_analysis_em(x, latent_dim, num_steps=100, tolerance=0.0)
    values = fit.log_likelihoods
    assert (values.diff() >= -1e-9 * values[1:].abs()).all()
    torch.testing.assert_close(values[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10)


def test_contains_probabilistic_pca() -> None:
    x = factor_data()
    fit, special = factor_analysis_em(x, 2), ppca(x, 2)
    assert fit.log_likelihoods[-1] > special.log_prob(x).mean() + 0.01


def test_units_of_the_columns_do_not_matter() -> None:
    x, scale = factor_data(), torch.logspace(-4, 4, 8)
    # Already after the first steps, so that the start does not depend on the units either.
    fit, scaled = [factor_analysis_em(data, 2, num_steps=3) for data in (x, x * scale)]
    torch.testing.assert_close(scaled.noise_variance, fit.noise_variance * scale.square())
    expected = fit.log_prob(x) - scale.log().sum()
    torch.testing.assert_close(scaled.log_prob(x * scale), expected)


def test_recovers_the_parameters_of_its_own_samples() -> None:
    num_rows = 20_000
    weight = torch.tensor([[2.0], [1.0], [0.5], [-1.0]])
    noise_variance = torch.tensor([0.5, 1.0, 2.0, 0.2])
    x = torch.randn(num_rows, 1) @ weight.mT + torch.randn(num_rows, 4) * noise_variance.sqrt()
    fit = factor_analysis_em(x, 1)
    model = fit.weight @ fit.weight.mT + fit.noise_variance.diag()
    truth = weight @ weight.mT + noise_variance.diag()
    variance = truth.diagonal()
    # The sample covariance has this standard error, and the constrained estimate a smaller one.
    error = ((truth.square() + variance.outer(variance)) / num_rows).sqrt()
    assert ((model - truth).abs() < 5 * error).all()


def test_draws_no_random_number_and_leaves_the_caller_alone() -> None:
    x = factor_data().float()
    before, state = x.clone(), torch.get_rng_state()
    fit = factor_analysis_em(x, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert fit.weight.dtype == torch.float64


def test_noise_that_tends_to_zero_at_the_optimum_is_no_error() -> None:
    # One latent too few: the maximum of the bounded likelihood lies on the boundary, with a
    # column that has no noise, and EM approaches it like 1 / step.
    x = factor_data()
    smallest = [
        float(
            (
                factor_analysis_em(x, 1, num_steps=steps, tolerance=0.0).noise_variance / x.var(0)
            ).min()
        )
        for steps in (100, 1000)
    ]
    assert 0.05 < smallest[1] / smallest[0] < 0.2


def test_fewer_rows_than_columns() -> None:
    x = factor_data(20, 30)
    fit = factor_analysis_em(x, 2, num_steps=50)
    assert (fit.noise_variance > 0).all()
    assert fit.log_prob(x).isfinite().all()


def test_stops_by_tolerance_or_after_all_steps() -> None:
    x = factor_data()
    fit = factor_analysis_em(x, 2, tolerance=1e-3)
    values = fit.log_likelihoods
    assert values[-1] - values[-2] < 1e-3
    torch.testing.assert_close(values[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10)
    assert factor_analysis_em(x, 2, num_steps=4, tolerance=0.0).log_likelihoods.shape == (4,)


def test_digits() -> None:
    x = torch.as_tensor(load_digits().data)
    x = (x + torch.rand_like(x)) / 17
    fit = factor_analysis_em(x, 5)
    expected = FactorAnalysis(5, tol=1e-7, max_iter=5000, svd_method="lapack").fit(x).score(x)
    assert abs(float(fit.log_likelihoods[-1]) - expected) < 1e-4


def test_constant_columns_are_refused() -> None:
    x = factor_data()
    x[:, [1, 4]] = 0.1
    with pytest.raises(ValueError, match=r"factor_analysis_em: .* constant columns \[1, 4\]"):
        factor_analysis_em(x, 2)


def test_unbounded_likelihood_is_refused() -> None:
    x = factor_data()
    x[:, 5] = 2.0 * x[:, 2] + 1.0
    with pytest.raises(ValueError, match=r"got zero in columns \[(2|5|2, 5)\], which 2 latents"):
        factor_analysis_em(x, 2)
    with pytest.raises(ValueError, match="rank above latent_dim = 2, got rank 2 from 3 rows"):
        factor_analysis_em(factor_data(3), 2)


def test_bad_arguments_are_refused() -> None:
    x = factor_data()
    with pytest.raises(ValueError, match="factor_analysis_em: expected `latent_dim` between 1 and"):
        factor_analysis_em(x, 8)
    with pytest.raises(ValueError, match="factor_analysis_em: expected `num_steps`"):
        factor_analysis_em(x, 2, num_steps=0)
    with pytest.raises(ValueError, match="factor_analysis_em: expected `tolerance`"):
        factor_analysis_em(x, 2, tolerance=-math.inf)
    x[3, 3] = torch.nan
    with pytest.raises(ValueError, match="factor_analysis_em: .* got 1 NaN and 0 infinite"):
        factor_analysis_em(x, 2)
