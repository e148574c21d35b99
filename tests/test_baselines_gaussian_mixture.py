import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.baselines import GaussianMixtureFit, gaussian, gaussian_mixture_em
from pyro_vae.baselines._mixture_em import floor_variances

COVARIANCES = ["full", "diagonal", "spherical"]
SKLEARN_NAMES = {"full": "full", "diagonal": "diag", "spherical": "spherical"}


def clusters(num_rows: int = 300, num_columns: int = 3, distance: float = 8.0) -> Tensor:
    """Three clusters with weights near 0.5, 0.3 and 0.2, on the corners of a triangle."""
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), num_rows, replacement=True)
    locs = distance * torch.eye(3, num_columns)
    mixing = torch.randn(3, num_columns, num_columns) / num_columns**0.5 + torch.eye(num_columns)
    noise = torch.randn(num_rows, 1, num_columns)
    return locs[labels] + (noise @ mixing[labels])[:, 0]


def never_decreases(values: Tensor) -> bool:
    return bool((values.diff() >= -1e-9 * values[1:].abs()).all())


def in_scikit_learn(fit: GaussianMixtureFit, covariance: str) -> GaussianMixture:
    """scikit-learn's mixture that starts from the parameters of a fit."""
    precisions = torch.linalg.inv(fit.covariances)
    if covariance != "full":
        precisions = precisions.diagonal(dim1=1, dim2=2)
    if covariance == "spherical":
        precisions = precisions[:, 0]
    return GaussianMixture(
        len(fit.weights),
        covariance_type=SKLEARN_NAMES[covariance],
        reg_covar=0.0,
        tol=1e-13,
        max_iter=5000,
        weights_init=fit.weights.numpy(),
        means_init=fit.locs.numpy(),
        precisions_init=precisions.numpy(),
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_agrees_with_scikit_learn_from_the_same_start(covariance: Any) -> None:
    x = clusters(distance=3.0)
    torch.manual_seed(5)
    early = gaussian_mixture_em(x, 3, covariance=covariance, num_steps=2)
    torch.manual_seed(5)
    fit = gaussian_mixture_em(x, 3, covariance=covariance, num_steps=5000, tolerance=1e-13)
    assert early.log_likelihoods[-1] < fit.log_likelihoods[-1] - 1e-4
    reference = in_scikit_learn(early, covariance).fit(x.numpy())
    expected = torch.as_tensor(reference.score_samples(x.numpy()))
    torch.testing.assert_close(fit.log_prob(x), expected, rtol=0, atol=1e-4)
    probs = torch.as_tensor(reference.predict_proba(x.numpy()))
    torch.testing.assert_close(fit.posterior(x).probs, probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(fit.weights, torch.as_tensor(reference.weights_), rtol=0, atol=1e-4)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_prob_agrees_with_dense_normals(covariance: Any) -> None:
    x = clusters()
    fit = gaussian_mixture_em(x, 3, covariance=covariance)
    dense = MultivariateNormal(fit.locs, fit.covariances).log_prob(x.unsqueeze(1))
    joint = dense + fit.weights.log()
    torch.testing.assert_close(fit.log_prob(x), joint.logsumexp(-1))
    torch.testing.assert_close(fit.posterior(x).probs, joint.softmax(-1))
    assert fit.posterior(x).batch_shape == (300,)
    torch.testing.assert_close(fit.weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_covariances_have_the_constrained_form(covariance: Any) -> None:
    x = clusters()
    matrices = gaussian_mixture_em(x, 3, covariance=covariance, num_steps=3).covariances
    diagonals = matrices.diagonal(dim1=1, dim2=2)
    assert torch.equal(matrices, matrices.mT)
    assert torch.equal(matrices, diagonals.diag_embed()) == (covariance != "full")
    assert torch.equal(diagonals, diagonals[:, :1].expand(-1, 3)) == (covariance == "spherical")


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("seed", range(15))
def test_em_never_decreases(covariance: Any, seed: int) -> None:
    torch.manual_seed(seed)
    num_columns = int(torch.randint(1, 6, ()))
    x = clusters(150, num_columns, distance=float(4 * torch.rand(())))
    # Some of these starts end in a component that collapses; the floor keeps them all running.
    fit = gaussian_mixture_em(
        x, 4, covariance=covariance, num_steps=80, tolerance=0.0, min_variance=1e-3
    )
    assert never_decreases(fit.log_likelihoods)
    torch.testing.assert_close(
        fit.log_likelihoods[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("seed", range(5))
def test_em_never_decreases_while_the_floor_binds(covariance: Any, seed: int) -> None:
    torch.manual_seed(seed)
    x = clusters(60, 8, distance=1.0)
    x[:, 5] = 0.3
    fit = gaussian_mixture_em(
        x, 6, covariance=covariance, min_variance=0.4, num_steps=60, tolerance=0.0
    )
    assert never_decreases(fit.log_likelihoods)
    smallest = torch.linalg.eigvalsh(fit.covariances).min()
    if covariance != "spherical":
        torch.testing.assert_close(smallest, torch.tensor(0.4), rtol=1e-9, atol=0)
    assert smallest > 0.4 - 1e-9
    torch.testing.assert_close(
        fit.log_likelihoods[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10
    )


def test_floored_covariance_is_the_constrained_maximum() -> None:
    factor = torch.randn(4, 4)
    sample = factor @ torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.0])) @ factor.mT
    floored = floor_variances(sample.unsqueeze(0), 0.5)[0]

    def objective(covariance: Tensor) -> Tensor:
        return -covariance.logdet() - torch.linalg.solve(covariance, sample).trace()

    best = objective(floored)
    for _ in range(200):
        step = 0.1 * torch.randn(4, 4)
        # Any neighbour that obeys the constraint, whatever its eigenvectors.
        moved = floor_variances((floored + step + step.mT).unsqueeze(0), 0.5)[0]
        assert objective(moved) <= best + 1e-12


def test_floor_that_does_not_bind_leaves_the_covariance_alone() -> None:
    x = clusters()
    assert torch.equal(gaussian(x, min_variance=1e-8).covariances, gaussian(x).covariances)


def test_recovers_well_separated_clusters() -> None:
    x = clusters(5000, distance=30.0)
    fit = gaussian_mixture_em(x, 3)
    labels = (x > 15.0).long().argmax(-1)
    order = fit.posterior(torch.eye(3) * 30.0).probs.argmax(-1)
    for label, component in enumerate(order):
        mine = x[labels == label]
        torch.testing.assert_close(fit.locs[component], mine.mean(0))
        torch.testing.assert_close(fit.covariances[component], mine.mT.cov(correction=0))
        torch.testing.assert_close(fit.weights[component], torch.tensor(len(mine) / 5000))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_single_gaussian_is_the_sample_moments(covariance: Any) -> None:
    x = clusters()
    fit = gaussian(x, covariance=covariance)
    sample = x.mT.cov(correction=0)
    expected = {
        "full": sample,
        "diagonal": sample.diagonal().diag(),
        "spherical": sample.diagonal().mean() * torch.eye(3),
    }[covariance]
    torch.testing.assert_close(fit.covariances[0], expected)
    torch.testing.assert_close(fit.locs[0], x.mean(0))
    # At its own maximum the expected quadratic form is D.
    log_likelihood = -0.5 * (3 * math.log(2 * math.pi) + expected.logdet() + 3)
    torch.testing.assert_close(fit.log_prob(x).mean(), log_likelihood)
    assert fit.log_likelihoods.shape == (0,)
    assert fit.weights.tolist() == [1.0]
    by_em = gaussian_mixture_em(x, 1, covariance=covariance)
    torch.testing.assert_close(by_em.log_prob(x), fit.log_prob(x))


def test_samples_have_the_moments_of_the_model() -> None:
    fit = gaussian_mixture_em(clusters(), 3)
    num_samples = 20_000
    x = fit.sample(num_samples)
    mean = fit.weights @ fit.locs
    centred = fit.locs - mean
    covariance = torch.tensordot(fit.weights, fit.covariances, 1)
    covariance += (fit.weights * centred.mT) @ centred
    assert x.shape == (num_samples, 3)
    assert ((x.mean(0) - mean).abs() < 5 * (covariance.diagonal() / num_samples).sqrt()).all()
    products = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
    error = products.var(0) ** 0.5 / num_samples**0.5
    assert ((products.mean(0) - covariance).abs() < 5 * error).all()
    # The components are drawn with their weights.
    counts = fit.posterior(x).probs.mean(0)
    assert ((counts - fit.weights).abs() < 5 * (0.25 / num_samples) ** 0.5).all()


def test_start_follows_the_torch_seed_and_leaves_numpy_alone() -> None:
    x = clusters(distance=2.0)
    state = np.random.get_state()[1].copy()
    torch.manual_seed(1)
    first = gaussian_mixture_em(x, 3, num_steps=3)
    np.random.seed(0)
    torch.manual_seed(1)
    assert torch.equal(gaussian_mixture_em(x, 3, num_steps=3).locs, first.locs)
    assert not torch.equal(gaussian_mixture_em(x, 3, num_steps=3).locs, first.locs)
    np.random.set_state(("MT19937", state, 624, 0, 0.0))
    before = np.random.get_state()[1].copy()
    gaussian_mixture_em(x, 3, num_steps=3)
    assert (np.random.get_state()[1] == before).all()


def test_restarts_keep_the_best_start() -> None:
    x = clusters(distance=2.0)
    torch.manual_seed(0)
    single = [float(gaussian_mixture_em(x, 6, num_steps=30).log_likelihoods[-1]) for _ in range(6)]
    torch.manual_seed(0)
    best = gaussian_mixture_em(x, 6, num_steps=30, num_restarts=6)
    assert len(set(single)) > 1
    assert float(best.log_likelihoods[-1]) == max(single)


def test_stops_by_tolerance_or_after_all_steps() -> None:
    x = clusters(distance=2.0)
    fit = gaussian_mixture_em(x, 3, tolerance=1e-3)
    values = fit.log_likelihoods
    assert values[-1] - values[-2] < 1e-3
    torch.testing.assert_close(values[-1], fit.log_prob(x).mean(), rtol=1e-10, atol=1e-10)
    assert gaussian_mixture_em(x, 3, num_steps=4, tolerance=0.0).log_likelihoods.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_any_real_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    x = (10 * clusters()).to(dtype)
    before = x.clone()
    torch.manual_seed(0)
    fit = gaussian_mixture_em(x, 3)
    torch.manual_seed(0)
    assert torch.equal(fit.locs, gaussian_mixture_em(x.numpy().astype(np.float64), 3).locs)
    assert torch.equal(fit.log_prob(x), fit.log_prob(x.double()))
    assert torch.equal(x, before)
    for name in ("weights", "locs", "covariances", "log_likelihoods"):
        assert getattr(fit, name).dtype == torch.float64


def test_units_of_the_columns_do_not_matter() -> None:
    x, scale = clusters(distance=20.0), torch.tensor([1e-6, 1.0, 1e6])
    expected = gaussian(x).log_prob(x) - scale.log().sum()
    torch.testing.assert_close(gaussian(x * scale).log_prob(x * scale), expected)


def test_digits() -> None:
    x = torch.as_tensor(load_digits().data)
    x = (x + torch.rand_like(x)) / 17
    fit = gaussian_mixture_em(x, 10, covariance="diagonal", tolerance=1e-5)
    score = in_scikit_learn(fit, "diagonal").set_params(max_iter=100, tol=1e-6).fit(x).score(x)
    assert abs(score - float(fit.log_likelihoods[-1])) < 0.05
    assert never_decreases(fit.log_likelihoods)
    assert fit.log_likelihoods[-1] > gaussian(x, covariance="diagonal").log_prob(x).mean() + 10


def test_collapsing_component_is_reported_or_floored() -> None:
    x = torch.cat([clusters(), torch.full((2, 3), 100.0)])
    message = r"component \d with about 2 rows and rank 0 in the last of 1 starts. Pass min_var"
    with pytest.raises(ValueError, match=message):
        gaussian_mixture_em(x, 4)
    with pytest.raises(ValueError, match="in the last of 3 starts. Pass min_variance > 0.$"):
        gaussian_mixture_em(x, 4, covariance="spherical", num_restarts=3)
    fit = gaussian_mixture_em(x, 4, min_variance=1e-3)
    assert never_decreases(fit.log_likelihoods)
    with pytest.raises(ValueError, match=r"Raise min_variance = 1e-40 or covariance=.diagonal"):
        gaussian_mixture_em(x, 4, min_variance=1e-40)


def test_restart_survives_a_collapsed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([clusters(60, distance=2.0), clusters(60, distance=2.0) + 20.0])
    bad = torch.zeros(120, dtype=torch.int64)
    bad[7] = 1
    starts = [bad, (x[:, 0] > 10).long()]
    monkeypatch.setattr(
        "pyro_vae.baselines._mixture_em.kmeans_labels", lambda data, k: starts.pop(0)
    )
    # From the first start one component keeps a single row, far from all others.
    x[7] += 1000.0
    starts[1][7] = 0
    fit = gaussian_mixture_em(x, 2, num_restarts=2, num_steps=1)
    assert starts == []
    assert fit.log_likelihoods.shape == (1,)


def test_component_without_rows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pyro_vae.baselines._mixture_em.kmeans_labels",
        lambda data, k: torch.zeros(len(data), dtype=torch.int64),
    )
    with pytest.raises(ValueError, match="got component 1 with about 0 rows and rank 0"):
        gaussian_mixture_em(clusters(), 2)


@pytest.mark.parametrize("num_rows", [2, 3, 5])
def test_singular_gaussian_is_refused_or_floored(num_rows: int) -> None:
    x = torch.randn(num_rows, 5)
    message = rf"gaussian: expected a covariance of full rank 5, got rank {num_rows - 1} from"
    with pytest.raises(ValueError, match=message):
        gaussian(x)
    fit = gaussian(x, min_variance=1e-4)
    eigenvalues = torch.linalg.eigvalsh(fit.covariances[0])
    torch.testing.assert_close(eigenvalues[0], torch.tensor(1e-4), rtol=1e-9, atol=0)
    assert gaussian(x, covariance="diagonal").log_prob(x).isfinite().all()


def test_linearly_dependent_columns_are_refused() -> None:
    x = clusters()
    x = torch.cat([x, 1e-7 * x[:, :1] + 1e-7 * x[:, 1:2]], -1)
    with pytest.raises(ValueError, match=r"rank 4, got rank 3 .*min_variance > 0 or covariance="):
        gaussian(x)


def test_constant_columns_are_refused_where_they_hurt() -> None:
    x = clusters()
    x[:, 1] = 0.1
    with pytest.raises(ValueError, match=r"gaussian: .* got constant columns \[1\]"):
        gaussian(x)
    with pytest.raises(ValueError, match=r"gaussian_mixture_em: .* constant columns \[1\]"):
        gaussian_mixture_em(x, 2, covariance="diagonal")
    assert gaussian(x, covariance="spherical").log_prob(x).isfinite().all()
    assert gaussian_mixture_em(x, 2, min_variance=1e-3).log_prob(x).isfinite().all()
    with pytest.raises(ValueError, match=r"constant columns \[0, 1, 2\]"):
        gaussian(torch.full((5, 3), 0.1), covariance="spherical")


def test_fewer_distinct_rows_than_components_are_refused() -> None:
    x = torch.randn(3, 2).repeat(20, 1)
    with pytest.raises(ValueError, match="num_components = 4 distinct rows in `x`, got 3"):
        gaussian_mixture_em(x, 4)
    late = torch.cat([x, torch.randn(1, 2)])
    fit = gaussian_mixture_em(late, 4, covariance="spherical", min_variance=1e-2)
    assert fit.log_prob(late).isfinite().all()


def test_bad_arguments_are_refused() -> None:
    x = clusters()
    with pytest.raises(ValueError, match="gaussian: expected `covariance` to be one of .* 'tied'"):
        gaussian(x, covariance="tied")  # type: ignore[arg-type]
    for floor in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"`min_variance` of at least 0, got {floor}"):
            gaussian_mixture_em(x, 2, min_variance=floor)
    with pytest.raises(ValueError, match="expected `num_components` of at least 1, got 0"):
        gaussian_mixture_em(x, 0)
    with pytest.raises(TypeError, match="expected an integer `num_components`, got float"):
        gaussian_mixture_em(x, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected `num_restarts` of at least 1, got 0"):
        gaussian_mixture_em(x, 2, num_restarts=0)
    with pytest.raises(ValueError, match="gaussian_mixture_em: expected `num_steps`"):
        gaussian_mixture_em(x, 2, num_steps=0)
    with pytest.raises(ValueError, match="gaussian_mixture_em: expected `tolerance`"):
        gaussian_mixture_em(x, 2, tolerance=-1.0)
    x[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="gaussian: .* got 0 NaN and 1 infinite"):
        gaussian(x)


def test_result_refuses_data_of_another_shape() -> None:
    fit = gaussian(clusters())
    for bad in (torch.zeros(3), torch.zeros(2, 4)):
        with pytest.raises(
            ValueError, match=r"GaussianMixtureFit: expected data of shape \(N, 3\)"
        ):
            fit.log_prob(bad)
        with pytest.raises(ValueError, match="Flatten each example"):
            fit.posterior(bad)
