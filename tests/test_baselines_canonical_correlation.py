import math
from typing import Any

import pytest
import torch
from sklearn.cross_decomposition import CCA
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.baselines import MultimodalLinearGaussian, canonical_correlation
from pyro_vae.datasets import load_digits


def views(num_rows: int = 80, width_x: int = 5, width_y: int = 4) -> tuple[Tensor, Tensor]:
    """Two views with three shared latents, correlated noise and no particular units."""
    z = torch.randn(num_rows, 3)
    x = z @ torch.randn(3, width_x) + torch.randn(num_rows, width_x) @ torch.randn(width_x, width_x)
    y = z @ torch.randn(3, width_y) + torch.randn(num_rows, width_y) @ torch.randn(width_y, width_y)
    return x + 3.0, 0.1 * y - 1.0


def with_correlations(*correlations: float, num_rows: int = 40) -> tuple[Tensor, Tensor]:
    """Two views whose 1 / N covariances are the identity, with exactly these correlations."""
    rho, size = torch.tensor(correlations), len(correlations)
    noise = torch.randn(num_rows, 2 * size)
    orthonormal = torch.linalg.qr(noise - noise.mean(0)).Q * num_rows**0.5
    x, rest = orthonormal.split(size, 1)
    return x, x * rho + rest * (1 - rho.square()).sqrt()


def covariances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, of y and between the two, divided by N."""
    joint = torch.cat([x, y], 1).mT.cov(correction=0)
    width = x.shape[1]
    return joint[:width, :width], joint[width:, width:], joint[:width, width:]


def joint_covariance(fit: MultimodalLinearGaussian) -> Tensor:
    weight = torch.cat(list(fit.weight.values()))
    return weight @ weight.mT + torch.block_diag(*fit.noise_covariance.values())


# The classical answers.


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_correlations_agree_with_scikit_learn(latent_dim: int) -> None:
    x, y = views()
    reference = CCA(latent_dim, scale=False, max_iter=20_000, tol=1e-14)
    scores = reference.fit_transform(x.numpy(), y.numpy())
    a, b = (torch.as_tensor(score) for score in scores)
    ours = canonical_correlation(x, y, latent_dim)
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=0)
    torch.testing.assert_close(ours.correlations, cosines, rtol=0, atol=1e-7)
    # The same variates up to their lengths; the sign is shared by the two views.
    for score, projection in zip((a, b), ours.project({"x": x, "y": y}).values(), strict=True):
        alike = torch.nn.functional.cosine_similarity(score, projection, dim=0)
        torch.testing.assert_close(alike.abs(), torch.ones(latent_dim), rtol=0, atol=1e-6)


def test_directions_solve_the_generalised_eigenproblem() -> None:
    x, y = views()
    ours = canonical_correlation(x, y, 4)
    cov_x, cov_y, cross = covariances(x, y)
    u, v = ours.directions["x"], ours.directions["y"]
    # Sigma_xy v = rho Sigma_x u and Sigma_yx u = rho Sigma_y v.
    torch.testing.assert_close(cross @ v, cov_x @ u * ours.correlations)
    torch.testing.assert_close(cross.mT @ u, cov_y @ v * ours.correlations)
    operator = torch.linalg.solve(cov_x, cross) @ torch.linalg.solve(cov_y, cross.mT)
    eigenvalues = torch.linalg.eigvals(operator).real.sort(descending=True).values
    torch.testing.assert_close(ours.correlations.square(), eigenvalues[:4])


def test_projections_are_uncorrelated_with_unit_variance() -> None:
    x, y = views()
    ours = canonical_correlation(x, y, 3)
    projections = ours.project({"y": y, "x": x})
    assert list(projections) == ["y", "x"]
    a, b = projections["x"], projections["y"]
    torch.testing.assert_close(a.mean(0), torch.zeros(3))
    cov_a, cov_b, cross = covariances(a, b)
    torch.testing.assert_close(cov_a, torch.eye(3))
    torch.testing.assert_close(cov_b, torch.eye(3))
    torch.testing.assert_close(cross, ours.correlations.diag())
    u = ours.directions["x"]
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_known_correlations_are_found() -> None:
    rho = torch.tensor([0.999999, 0.5, 0.25, 0.0])
    x, y = with_correlations(*rho.tolist())
    mixed = x @ torch.randn(4, 4), y @ torch.randn(4, 4)
    for pair in ((x, y), mixed):
        ours = canonical_correlation(*pair, 4)
        torch.testing.assert_close(ours.correlations, rho, rtol=0, atol=1e-12)


def test_units_and_offsets_do_not_matter() -> None:
    x, y = views()
    scale = torch.tensor([1e8, 1e-8, 1.0, 1e3, 1e-3])
    shift, mixing = torch.randn(4), torch.randn(4, 4)
    plain = canonical_correlation(x, y, 2)
    other = canonical_correlation(x * scale, y @ mixing + shift, 2)
    torch.testing.assert_close(other.correlations, plain.correlations, rtol=1e-9, atol=0)
    log_det = scale.log().sum() + torch.linalg.slogdet(mixing).logabsdet
    moved = other.fit.log_prob({"x": x * scale, "y": y @ mixing + shift})
    torch.testing.assert_close(moved, plain.fit.log_prob({"x": x, "y": y}) - log_det)


# The probabilistic model.


def test_with_all_latents_it_is_the_joint_normal() -> None:
    x, y = views()
    fit = canonical_correlation(x, y, 4).fit
    data = torch.cat([x, y], 1)
    covariance = data.mT.cov(correction=0)
    torch.testing.assert_close(joint_covariance(fit), covariance)
    dense = MultivariateNormal(data.mean(0), covariance)
    torch.testing.assert_close(fit.log_prob({"x": x, "y": y}), dense.log_prob(data))
    # So the prediction of one view from the other is linear regression.
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(fit.predict({"x": x, "y": None}, "y"), fitted)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_each_view_keeps_its_covariance_and_the_rest_is_cut(latent_dim: int) -> None:
    x, y = views()
    ours = canonical_correlation(x, y, latent_dim)
    cov_x, cov_y, _ = covariances(x, y)
    rho = ours.correlations
    model = joint_covariance(ours.fit)
    torch.testing.assert_close(model[:5, :5], cov_x)
    torch.testing.assert_close(model[5:, 5:], cov_y)
    u, v = ours.directions["x"], ours.directions["y"]
    torch.testing.assert_close(model[:5, 5:], cov_x @ u * rho @ v.mT @ cov_y)
    # The largest log-likelihood there is, by the determinants of the covariances.
    log_det = cov_x.logdet() + cov_y.logdet() + torch.log1p(-rho.square()).sum()
    expected = -0.5 * (9 * math.log(2 * math.pi) + log_det + 9)
    actual = ours.fit.log_prob({"x": x, "y": y}).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_likelihood_is_stationary_and_largest_at_the_fit() -> None:
    x, y = views()
    batch = {"x": x, "y": y}
    fit = canonical_correlation(x, y, 2).fit
    loc = {name: value.clone().requires_grad_() for name, value in fit.loc.items()}
    weight = {name: value.clone().requires_grad_() for name, value in fit.weight.items()}
    root = {
        name: torch.linalg.cholesky(value).requires_grad_()
        for name, value in fit.noise_covariance.items()
    }

    def mean(move: float = 0.0) -> Tensor:
        def near(value: Tensor) -> Tensor:
            return value * (1 + move * torch.randn_like(value)) if move else value

        noise = {name: near(value.tril()) for name, value in root.items()}
        noise = {name: value @ value.mT for name, value in noise.items()}
        locs, weights = ({n: near(v) for n, v in part.items()} for part in (loc, weight))
        return MultimodalLinearGaussian(locs, weights, noise).log_prob(batch).mean()

    best = mean()
    leaves = [*loc.values(), *weight.values(), *root.values()]
    for value, gradient in zip(leaves, torch.autograd.grad(best, leaves), strict=True):
        torch.testing.assert_close(gradient * value, torch.zeros_like(value), rtol=0, atol=1e-11)
    assert all(mean(0.02) < best for _ in range(20))


def test_posteriors_are_those_of_the_paper() -> None:
    x, y = views()
    ours = canonical_correlation(x, y, 2)
    rho, projections = ours.correlations, ours.project({"x": x, "y": y})
    given_x = ours.fit.posterior({"x": x})
    torch.testing.assert_close(given_x.mean, projections["x"] * rho.sqrt())
    torch.testing.assert_close(given_x.covariance_matrix[0], (1 - rho).diag())
    both = ours.fit.posterior({"x": x, "y": y})
    total = (projections["x"] + projections["y"]) * rho.sqrt() / (1 + rho)
    torch.testing.assert_close(both.mean, total)
    torch.testing.assert_close(both.covariance_matrix[0], ((1 - rho) / (1 + rho)).diag())


def test_conditionals_of_independent_views() -> None:
    x, y = with_correlations(0.0, 0.0)
    ours = canonical_correlation(x, y, 1)
    batch = {"x": x, "y": y}
    torch.testing.assert_close(ours.correlations, torch.zeros(1), rtol=0, atol=1e-12)
    conditional = ours.fit.conditional_log_prob(batch, ["x"])
    torch.testing.assert_close(conditional, ours.fit.log_prob({"y": y}), rtol=0, atol=1e-6)


# Regularization, sizes, types.


def test_regularization_enlarges_the_variances() -> None:
    x, y = views()
    ours = canonical_correlation(x, y, 4, regularization=0.3)
    cov_x, cov_y, cross = covariances(x, y)
    cov_x, cov_y = cov_x + 0.3 * torch.eye(5), cov_y + 0.3 * torch.eye(4)
    operator = torch.linalg.solve(cov_x, cross) @ torch.linalg.solve(cov_y, cross.mT)
    eigenvalues = torch.linalg.eigvals(operator).real.sort(descending=True).values
    torch.testing.assert_close(ours.correlations.square(), eigenvalues[:4])
    expected = torch.cat([torch.cat([cov_x, cross], 1), torch.cat([cross.mT, cov_y], 1)])
    torch.testing.assert_close(joint_covariance(ours.fit), expected)


def test_fewer_rows_than_columns_need_regularization() -> None:
    x, y = views(num_rows=7, width_x=12, width_y=9)
    with pytest.raises(ValueError, match=r"view 'x', got rank 6 from 12 columns.* pass regulariz"):
        canonical_correlation(x, y, 2)
    ours = canonical_correlation(x, y, 2, regularization=0.1)
    cov_x, cov_y, cross = covariances(x, y)
    cov_x, cov_y = cov_x + 0.1 * torch.eye(12), cov_y + 0.1 * torch.eye(9)
    torch.testing.assert_close(
        cross @ ours.directions["y"], cov_x @ ours.directions["x"] * ours.correlations
    )
    torch.testing.assert_close(joint_covariance(ours.fit)[:12, :12], cov_x)


@pytest.mark.parametrize("kind", ["constant", "one-hot", "zero", "shared"])
def test_singular_cases_say_what_to_pass(kind: str) -> None:
    x, y = views()
    label = torch.nn.functional.one_hot(torch.arange(len(x)) % 3, 3)
    message = r"regular covariance of view 'y', got rank"
    if kind == "constant":
        y[:, 1] = 2.0
    elif kind == "one-hot":
        y = label
    elif kind == "zero":
        y = torch.zeros(len(x), 2)
    else:
        y[:, 2] = x[:, 0] - 2 * x[:, 3]
        message = r"canonical correlations below 1, got 1, .* no noise in a direction of view 'x'"
    with pytest.raises(ValueError, match=message) as caught:
        canonical_correlation(x, y, 2)
    advised = float(str(caught.value).split("regularization=")[1].split()[0])
    ours = canonical_correlation(x, y, 2, regularization=advised)
    assert ours.fit.log_prob({"x": x, "y": y}).isfinite().all()
    if kind in ("one-hot", "shared"):  # Constants do not interfere, however little is added.
        with pytest.raises(ValueError, match="pass regularization="):
            canonical_correlation(x, y, 2, regularization=1e-30)
    if kind == "one-hot":
        assert canonical_correlation(x, label[:, :2], 2).correlations.shape == (2,)


def test_one_column_each_is_the_correlation_coefficient() -> None:
    x, y = views(width_x=1, width_y=1)
    ours = canonical_correlation(x, y, 1)
    expected = torch.cat([x, y], 1).mT.corrcoef()[0, 1]
    torch.testing.assert_close(ours.correlations[0], expected.abs())


def test_any_real_dtype_is_computed_in_float64() -> None:
    x, y = (view.float() for view in views())
    y.requires_grad_()
    ours, expected = (
        canonical_correlation(x, y, 2),
        canonical_correlation(x.double(), y.double(), 2),
    )
    assert torch.equal(ours.correlations, expected.correlations)
    assert ours.project({"x": x})["x"].dtype == ours.correlations.dtype == torch.float64
    assert not ours.correlations.requires_grad
    integers = (10 * x).round().long()
    assert canonical_correlation(integers, y, 2).fit.loc["x"].dtype == torch.float64


def test_halves_of_digits() -> None:
    halves = []
    for images, _ in load_digits():
        square = images.reshape(-1, 8, 8)
        halves.append({"left": square[..., :4].flatten(1), "right": square[..., 4:].flatten(1)})
    train, test = halves
    ours = canonical_correlation(*train.values(), 8, names=("left", "right"))
    fit = ours.fit
    assert list(ours.directions) == list(fit.loc) == ["left", "right"]
    # On held-out images, one half tells about the other.
    gain = fit.conditional_log_prob(test, ["left"]) - fit.log_prob({"right": test["right"]})
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    error = (fit.predict({"left": test["left"]}, "right") - test["right"]).square().mean()
    assert error < 0.8 * (train["right"].mean(0) - test["right"]).square().mean()
    # And the mean of the gain on the training images is the mutual information of the fit.
    gain = fit.conditional_log_prob(train, ["left"]) - fit.log_prob({"right": train["right"]})
    information = -0.5 * torch.log1p(-ours.correlations.square()).sum()
    torch.testing.assert_close(gain.mean(), information, rtol=1e-9, atol=0)


# Messages.


@pytest.mark.parametrize("names", [("x", "x"), ("x",), "xy"])
def test_names_that_do_not_fit_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match="expected two different names, got .* Pass one for each"):
        canonical_correlation(*views(), 2, names=names)


def test_data_that_do_not_fit_are_refused() -> None:
    x, y = views()
    with pytest.raises(ValueError, match=r"as many rows in `x` as in `y`, got 80 and 79"):
        canonical_correlation(x, y[1:], 2)
    with pytest.raises(
        ValueError, match=r"canonical_correlation: expected `y` of shape .* got \(80,\)"
    ):
        canonical_correlation(x, y[:, 0], 2, names=("a", "b"))
    with pytest.raises(ValueError, match=r"`latent_dim` between 1 and 4, got 5. There are no more"):
        canonical_correlation(x, y, 5)
    with pytest.raises(TypeError, match=r"integer `latent_dim`, got float"):
        canonical_correlation(x, y, 2.0)
    with pytest.raises(TypeError, match=r"expected a number `regularization`, got bool"):
        canonical_correlation(x, y, 2, regularization=True)
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"`regularization` of at least 0 and finite, got"):
            canonical_correlation(x, y, 2, regularization=bad)


def test_projections_of_unknown_views_are_refused() -> None:
    x, y = views()
    ours = canonical_correlation(x, y, 2)
    with pytest.raises(ValueError, match=r"project: expected views among \['x', 'y'\], got 'z'"):
        ours.project({"z": x})
    with pytest.raises(ValueError, match=r"batch\['y'\] of shape \(batch, 4\), got \(80, 5\)"):
        ours.project({"y": x})
    with pytest.raises(TypeError, match=r"batch\['y'\] to be a tensor .* got list"):
        ours.project({"y": [1.0]})
