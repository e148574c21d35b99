import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from pyro_vae.baselines import LinearGaussianFit, ppca, ppca_em
from pyro_vae.baselines.linear_gaussian import marginal

Fit = Callable[..., LinearGaussianFit]


def correlated(num_rows: int = 200, num_columns: int = 6) -> Tensor:
    return torch.randn(num_rows, num_columns) @ torch.randn(num_columns, num_columns) + 3.0


def with_eigenvalues(*eigenvalues: float, num_rows: int = 40) -> Tensor:
    """Data whose 1 / N covariance is diagonal, with exactly these entries."""
    noise = torch.randn(num_rows, len(eigenvalues))
    orthonormal = torch.linalg.qr(noise - noise.mean(0)).Q
    return orthonormal * (num_rows * torch.tensor(eigenvalues)).sqrt()


def spectrum(x: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(x.mT.cov(correction=0)).flip(0)


@pytest.mark.parametrize("latent_dim", [1, 3, 5])
def test_agrees_with_scikit_learn(latent_dim: int) -> None:
    x = correlated()
    # scikit-learn divides the covariance by N - 1 and so scales every eigenvalue by N / (N - 1).
    # Taking that factor out of its two estimates leaves the maximum likelihood model.
    pca = PCA(latent_dim, svd_solver="full").fit(x.numpy())
    pca.explained_variance_ *= (len(x) - 1) / len(x)
    pca.noise_variance_ *= (len(x) - 1) / len(x)
    fit = ppca(x, latent_dim)
    expected = torch.as_tensor(pca.score_samples(x.numpy()))
    torch.testing.assert_close(fit.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    # And unscaled, its likelihood is the lower one.
    assert fit.log_prob(x).mean() > PCA(latent_dim, svd_solver="full").fit(x).score(x)


@pytest.mark.parametrize("latent_dim", [1, 3, 5])
def test_covariance_has_the_maximum_likelihood_spectrum(latent_dim: int) -> None:
    x = correlated()
    fit = ppca(x, latent_dim)
    eigenvalues = spectrum(x)
    noise_variance = eigenvalues[latent_dim:].mean()
    torch.testing.assert_close(fit.noise_variance, noise_variance.repeat(6))
    torch.testing.assert_close(fit.loc, x.mean(0))
    gram = fit.weight.mT @ fit.weight
    torch.testing.assert_close(gram, (eigenvalues[:latent_dim] - noise_variance).diag())
    assert (fit.weight.gather(0, fit.weight.abs().argmax(0, keepdim=True)) > 0).all()
    # Sample covariance and model share the leading eigenvectors: C W = S W.
    model = fit.weight @ fit.weight.mT + fit.noise_variance.diag()
    torch.testing.assert_close(model @ fit.weight, x.mT.cov(correction=0) @ fit.weight)
    log_det = eigenvalues[:latent_dim].log().sum() + (6 - latent_dim) * noise_variance.log()
    expected = -0.5 * (6 * math.log(2 * math.pi) + log_det + 6)
    torch.testing.assert_close(fit.log_prob(x).mean(), expected, rtol=1e-12, atol=1e-12)
    assert fit.log_likelihoods.shape == (0,)


def test_closed_form_is_a_maximum() -> None:
    x = correlated()
    fit = ppca(x, 2)
    best = fit.log_prob(x).mean()
    weight, noise = fit.weight.clone().requires_grad_(), fit.noise_variance[0].clone()
    noise.requires_grad_()
    marginal(fit.loc, weight, noise).log_prob(x).mean().backward()
    torch.testing.assert_close(weight.grad, torch.zeros(6, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(noise.grad, torch.tensor(0.0), rtol=0, atol=1e-12)
    for _ in range(20):
        moved = fit.weight + 0.05 * torch.randn(6, 2)
        assert marginal(fit.loc, moved, fit.noise_variance).log_prob(x).mean() < best


def test_latents_of_equal_eigenvalues_collapse_to_the_prior() -> None:
    x = with_eigenvalues(9.0, 1.0, 1.0, 1.0, 1.0)
    fit = ppca(x, 3)
    torch.testing.assert_close(
        fit.weight.norm(dim=0), torch.tensor([8.0**0.5, 0, 0]), atol=1e-6, rtol=0
    )
    given_x = fit.posterior(x)
    expected = torch.diag(torch.tensor([1.0 / 9.0, 1.0, 1.0]))
    torch.testing.assert_close(given_x.covariance_matrix[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(given_x.mean[:, 1:], torch.zeros(40, 2), atol=1e-6, rtol=0)


def test_a_latent_collapses_exactly_if_its_eigenvalue_is_below_the_noise() -> None:
    x = with_eigenvalues(4.0, 1.5, 0.5, 0.2)
    noise_variance, lengths = torch.tensor(1.0), torch.linspace(0.0, 3.0, 301)
    for column, eigenvalue in enumerate([4.0, 1.5, 0.5, 0.2]):
        axis = torch.eye(4)[:, column : column + 1]
        values = torch.stack(
            [marginal(x.mean(0), c * axis, noise_variance).log_prob(x).mean() for c in lengths]
        )
        best = lengths[values.argmax()]
        expected = max(eigenvalue - 1.0, 0.0) ** 0.5
        assert abs(float(best) - expected) <= 0.0051


@pytest.mark.parametrize("seed", range(30))
def test_em_never_decreases(seed: int) -> None:
    torch.manual_seed(seed)
    num_rows, num_columns = int(torch.randint(5, 60, ())), int(torch.randint(2, 12, ()))
    latent_dim = int(torch.randint(1, min(num_columns, num_rows - 2), ())) if num_columns > 2 else 1
    x = correlated(num_rows, num_columns)
    fit = ppca_em(x, latent_dim, num_steps=100, tolerance=0.0)
    values = fit.log_likelihoods
    assert (values.diff() >= -1e-9 * values[1:].abs()).all()
    torch.testing.assert_close(values[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10)
    assert values[-1] <= ppca(x, latent_dim).log_prob(x).mean() + 1e-9


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_em_reaches_the_closed_form(latent_dim: int) -> None:
    x = correlated()
    exact = ppca(x, latent_dim)
    fit = ppca_em(x, latent_dim, num_steps=20_000, tolerance=1e-13)
    best = exact.log_prob(x).mean()
    torch.testing.assert_close(fit.log_likelihoods[-1], best, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.loc, exact.loc)
    covariances = [f.weight @ f.weight.mT + f.noise_variance.diag() for f in (fit, exact)]
    torch.testing.assert_close(*covariances, rtol=0, atol=1e-3)


def test_first_em_step_agrees_with_the_published_update() -> None:
    x, latent_dim = correlated(), 2
    torch.manual_seed(7)
    covariance = x.mT.cov(correction=0)
    noise = covariance.trace() / 6
    torch.manual_seed(7)
    weight = torch.randn(6, latent_dim) * (noise / latent_dim).sqrt()
    torch.manual_seed(7)
    fit = ppca_em(x, latent_dim, num_steps=1)
    inverse = torch.linalg.inv(weight.mT @ weight + noise * torch.eye(2))
    inner = noise * torch.eye(2) + inverse @ weight.mT @ covariance @ weight
    updated = covariance @ weight @ torch.linalg.inv(inner)
    torch.testing.assert_close(fit.weight, updated)
    residual = covariance - covariance @ weight @ inverse @ updated.mT
    torch.testing.assert_close(fit.noise_variance, (residual.trace() / 6).repeat(6))
    assert fit.log_likelihoods.shape == (1,)


def test_em_stops_by_tolerance_and_follows_the_torch_seed() -> None:
    x = correlated()
    torch.manual_seed(3)
    fit = ppca_em(x, 2, tolerance=1e-3)
    values = fit.log_likelihoods
    assert 1 < len(values) < 1000
    assert values[-1] - values[-2] < 1e-3
    assert (values.diff()[:-1] >= 1e-3).all()
    torch.testing.assert_close(values[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10)
    torch.manual_seed(3)
    assert torch.equal(ppca_em(x, 2, tolerance=1e-3).weight, fit.weight)
    assert not torch.equal(ppca_em(x, 2, tolerance=1e-3).weight, fit.weight)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_fewer_rows_than_columns(fit: Fit) -> None:
    x = correlated(8, 20)
    result = fit(x, 3)
    # 7 eigenvalues are positive, 13 are zero; the mean runs over 17.
    expected = spectrum(x)[3:7].sum() / 17
    torch.testing.assert_close(result.noise_variance, expected.repeat(20), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_duplicated_rows_change_nothing(fit: Fit) -> None:
    x = correlated(50)
    torch.manual_seed(1)
    once = fit(x, 2)
    torch.manual_seed(1)
    thrice = fit(x.repeat(3, 1), 2)
    torch.testing.assert_close(once.log_prob(x), thrice.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_constant_column_is_harmless(fit: Fit) -> None:
    x = torch.cat([correlated(), torch.full((200, 1), 0.1)], -1)
    result = fit(x, 2)
    assert result.loc[-1] == 0.1
    assert result.log_prob(x).isfinite().all()


def test_a_far_away_mean_costs_no_digits() -> None:
    x = correlated()
    near, far = ppca(x, 2), ppca((x + 2.0**20).round(decimals=9), 2)
    torch.testing.assert_close(near.noise_variance, far.noise_variance, rtol=1e-7, atol=0)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
@pytest.mark.parametrize(
    "convert",
    [torch.Tensor.float, torch.Tensor.int, lambda x: x.float().numpy(), torch.Tensor.tolist],
)
def test_any_real_input_is_computed_in_float64(fit: Fit, convert: Callable[[Tensor], Any]) -> None:
    x = convert(10 * correlated())
    exact = torch.as_tensor(x, dtype=torch.float64)
    torch.manual_seed(0)
    result = fit(x, 2)
    torch.manual_seed(0)
    expected = fit(exact, 2)
    for name in ("loc", "weight", "noise_variance", "log_likelihoods"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
        assert getattr(result, name).dtype == torch.float64


def test_lists_do_not_lose_digits_under_a_float32_default() -> None:
    x = correlated()
    expected = ppca(x, 2).weight
    torch.set_default_dtype(torch.float32)
    try:
        assert torch.equal(ppca(x.tolist(), 2).weight, expected)
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_caller_is_left_alone(fit: Fit) -> None:
    x = correlated().requires_grad_()
    before = x.detach().clone()
    result = fit(x, 2)
    assert torch.equal(x, before)
    assert not result.weight.requires_grad
    frozen = before.numpy()
    frozen.setflags(write=False)
    numpy_state = np.random.get_state()[1].copy()
    fit(frozen, 2)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_digits() -> None:
    x = torch.as_tensor(load_digits().data)
    x = (x + torch.rand_like(x)) / 17
    exact = ppca(x, 10)
    fit = ppca_em(x, 10)
    torch.testing.assert_close(fit.log_likelihoods[-1], exact.log_prob(x).mean(), rtol=0, atol=1e-6)
    expected = PCA(10, svd_solver="full").fit(x.numpy()).score(x.numpy())
    # The N - 1 of scikit-learn costs it O(D / N^2) nats a row.
    torch.testing.assert_close(float(exact.log_prob(x).mean()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_bad_data_are_refused(fit: Fit) -> None:
    name = fit.__name__
    x = correlated()
    with pytest.raises(ValueError, match=rf"{name}: expected `x` of shape .* got \(6,\)"):
        fit(x[0], 2)
    with pytest.raises(ValueError, match=r"got \(200, 0\)"):
        fit(x[:, :0], 2)
    with pytest.raises(ValueError, match=f"{name}: expected at least 2 rows in `x`, got 1"):
        fit(x[:1], 2)
    with pytest.raises(ValueError, match=f"{name}: expected at least 2 columns in `x`, got 1"):
        fit(x[:, :1], 1)
    with pytest.raises(TypeError, match=f"{name}: expected `x` to be real, got torch.complex128"):
        fit(x + 0j, 2)
    with pytest.raises(TypeError, match=f"{name}: expected `x` to be a tensor .* got str"):
        fit("data", 2)
    for scale in (1e200, 1e-200):
        with pytest.raises(ValueError, match=f"{name}: expected entries .* Rescale the data"):
            fit(scale * x, 2)
    x[0, :3] = torch.tensor([torch.nan, torch.nan, torch.inf])
    with pytest.raises(ValueError, match="got 2 NaN and 1 infinite of 1200 entries"):
        fit(x, 2)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
@pytest.mark.parametrize("latent_dim", [-1, 0, 6, 7])
def test_latent_dim_out_of_range_is_refused(fit: Fit, latent_dim: int) -> None:
    with pytest.raises(
        ValueError, match=f"{fit.__name__}: expected `latent_dim` between 1 and 5, got {latent_dim}"
    ):
        fit(correlated(), latent_dim)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
@pytest.mark.parametrize("latent_dim", [2.0, True])
def test_latent_dim_of_the_wrong_type_is_refused(fit: Fit, latent_dim: Any) -> None:
    with pytest.raises(TypeError, match="expected an integer `latent_dim`"):
        fit(correlated(), latent_dim)


@pytest.mark.parametrize("fit", [ppca, ppca_em])
def test_zero_noise_is_refused(fit: Fit) -> None:
    x = torch.randn(100, 3) @ torch.randn(3, 6) + 5.0
    assert (fit(x, 2).noise_variance > 0).all()
    with pytest.raises(
        ValueError, match=r"rank above latent_dim = 3, got rank 3 .* latent_dim < 3"
    ):
        fit(x, 3)
    with pytest.raises(ValueError, match="got rank 3 from 4 rows"):
        fit(correlated(4), 3)
    with pytest.raises(ValueError, match="got rank 0 from 200 rows.* Pass more data"):
        fit(torch.full((200, 6), 0.1), 1)


def test_bad_stopping_rule_is_refused() -> None:
    x = correlated()
    with pytest.raises(ValueError, match="ppca_em: expected `num_steps` of at least 1, got 0"):
        ppca_em(x, 2, num_steps=0)
    with pytest.raises(TypeError, match="ppca_em: expected an integer `num_steps`, got float"):
        ppca_em(x, 2, num_steps=1e3)  # type: ignore[arg-type]
    for tolerance in (-1.0, math.nan):
        with pytest.raises(
            ValueError, match=f"expected `tolerance` of at least 0, got {tolerance}"
        ):
            ppca_em(x, 2, tolerance=tolerance)
