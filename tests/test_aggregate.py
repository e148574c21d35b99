"""The parts of the average KL, against loops, quadrature and cases with a known answer."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions.transforms import AffineTransform

from pyro_vae.evaluation import AggregatePosterior, aggregate_posterior
from pyro_vae.evaluation.aggregate_density import AggregateDensity
from pyro_vae.guides import AmortizedNormal, ExactGaussianMixture, ExactLinearGaussian
from pyro_vae.handlers import scale_kl
from pyro_vae.models import GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP

PARTS = ("index_code_mutual_information", "total_correlation", "dimension_wise_kl")
Make = Callable[[torch.Tensor], dist.TorchDistribution]


def guide_of(make: Make, **plate: Any) -> Callable[[torch.Tensor], None]:
    """A plain function with names of its own: ``make`` turns data into q(z | x)."""

    def guide(images: torch.Tensor) -> None:
        with pyro.plate("images", len(images), **plate):
            pyro.sample("code", make(images))

    return guide


def model_of(make: Callable[[], dist.TorchDistribution]) -> Callable[[torch.Tensor], None]:
    """A model whose decoder must not run: only its prior is asked for."""

    def model(images: torch.Tensor) -> None:
        with pyro.plate("rows", len(images)):
            pyro.sample("code", make())
        raise AssertionError("the decoder ran")

    return model


def normal(x: torch.Tensor) -> dist.TorchDistribution:
    """Two dimensions that depend on both of x, with scales that differ."""
    loc = x + x.flip(-1) * torch.tensor([0.5, -0.3])
    return dist.Normal(loc, 0.3 + x.abs() / 4).to_event(1)


def full_normal(x: torch.Tensor) -> dist.TorchDistribution:
    lower = torch.tensor([[0.5, 0.0], [-0.4, 0.3]])
    return dist.MultivariateNormal(x, scale_tril=lower * (1 + x[:, :1, None].abs()))


def beta(x: torch.Tensor) -> dist.TorchDistribution:
    return dist.Beta(1.5 + x.abs(), 2.0 + x.square()).to_event(1)


def moving_support(x: torch.Tensor) -> dist.TorchDistribution:
    return dist.Uniform(x, x + 1.5).to_event(1)


def pareto(x: torch.Tensor) -> dist.TorchDistribution:
    """Its density below the scale comes out as finite unless the support is looked at."""
    return dist.Pareto(0.5 + x.abs(), torch.tensor(3.0)).to_event(1)


def rows(num: int = 7) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(3))


def run(*args: Any, seed: int = 0, **kwargs: Any) -> AggregatePosterior:
    pyro.set_rng_seed(seed)
    return aggregate_posterior(*args, **kwargs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The codes that were drawn, ``(S, N, *event)``, and their densities."""
    seen: list[Any] = []
    log_prob = AggregateDensity.log_prob

    def record(self: AggregateDensity, codes: torch.Tensor, chunk_size: int | None) -> Any:
        densities = log_prob(self, codes, chunk_size)
        seen.append((codes, *densities))
        return densities

    monkeypatch.setattr(AggregateDensity, "log_prob", record)
    return seen


def by_loops(
    fn: Any, marginal: Callable[[Any, int], Any], codes: torch.Tensor, log_p: Callable[[Any], Any]
) -> dict[str, float]:
    """Every definition written out, one density at a time, in Python's floats.

    Args:
        fn: From a row's number to q(z | x_n).
        marginal: From a row's number and a dimension to q_j(z_j | x_n).
        codes: ``(S, N, dimensions)``.
        log_p: The prior's log-density of one code.
    """
    num_samples, num_rows, num_dims = codes.shape
    sums = dict.fromkeys((*PARTS, "kl"), 0.0)
    for s in range(num_samples):
        for n in range(num_rows):
            z = codes[s, n]
            density = [math.exp(float(fn(m).log_prob(z))) for m in range(num_rows)]
            log_q = math.log(sum(density) / num_rows)
            log_product = 0.0
            for j in range(num_dims):
                each = [math.exp(float(marginal(m, j).log_prob(z[j]))) for m in range(num_rows)]
                log_product += math.log(sum(each) / num_rows)
            own, prior = math.log(density[n]), float(log_p(z))
            sums["index_code_mutual_information"] += own - log_q
            sums["total_correlation"] += log_q - log_product
            sums["dimension_wise_kl"] += log_product - prior
            sums["kl"] += own - prior
    return {name: value / (num_samples * num_rows) for name, value in sums.items()}


def assert_parts(result: AggregatePosterior, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert math.isclose(getattr(result, name), value, rel_tol=1e-9, abs_tol=1e-9), name


def standard_normal(z: torch.Tensor) -> torch.Tensor:
    return dist.Normal(0.0, 1.0).log_prob(z).sum()


class Supported:
    """A distribution that knows it has no density outside its support."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        inside = bool(self.fn.support.check(z).all())
        return self.fn.log_prob(z) if inside else torch.tensor(-math.inf)


def independent(make: Make, x: torch.Tensor) -> tuple[Any, Any]:
    """A row's distribution and that of a single dimension, for independent dimensions."""

    def row(n: int) -> Any:
        return Supported(make(x[n]))

    def marginal(n: int, j: int) -> Any:
        base = make(x[n]).base_dist
        values = {name: getattr(base, name).expand(2)[j] for name in base.arg_constraints}
        return Supported(type(base)(**values))

    return row, marginal


# Exact: the same codes, one density at a time.


@pytest.mark.parametrize("num_samples", [1, 3])
def test_loops(recorded: list[Any], num_samples: int) -> None:
    x = rows(5)
    result = run(guide_of(normal), x, num_samples=num_samples)
    ((codes, *_),) = recorded
    assert codes.shape == (num_samples, 5, 2)
    expected = by_loops(*independent(normal, x), codes, standard_normal)
    assert_parts(result, expected)
    assert (result.num_data, result.num_samples) == (5, num_samples)


@pytest.mark.parametrize("make", [moving_support, pareto])
def test_loops_where_the_support_moves_with_the_data(recorded: list[Any], make: Make) -> None:
    x = rows(5)
    prior = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    result = run(guide_of(make), x, model=model_of(lambda: prior), num_samples=4)
    expected = by_loops(*independent(make, x), recorded[0][0], prior.log_prob)
    assert_parts(result, expected)


def test_loops_with_a_full_covariance(recorded: list[Any]) -> None:
    """Its marginals are normal, with the variances on the diagonal."""
    x = rows(5)
    result = run(guide_of(full_normal), x, num_samples=2)
    fn = full_normal(x)

    def marginal(m: int, j: int) -> Any:
        return dist.Normal(fn.loc[m, j], fn.covariance_matrix[m, j, j].sqrt())

    def row(m: int) -> Any:
        return dist.MultivariateNormal(fn.loc[m], fn.covariance_matrix[m])

    assert_parts(result, by_loops(row, marginal, recorded[0][0], standard_normal))
    assert result.kl_per_dimension is not None


def test_a_low_rank_covariance_is_a_full_one(recorded: list[Any]) -> None:
    factor, diagonal = torch.tensor([[0.5], [0.7]]), torch.tensor([0.1, 0.4])

    def low_rank(x: torch.Tensor) -> dist.TorchDistribution:
        return dist.LowRankMultivariateNormal(x, factor, diagonal)

    run(guide_of(low_rank), rows(5))
    (codes, *densities) = recorded[0]
    full = dist.MultivariateNormal(rows(5), factor @ factor.T + diagonal.diag())
    kept = torch.ones(5, dtype=torch.bool)
    expected = AggregateDensity(full, kept, where="", site="").log_prob(codes, None)
    for first, second in zip(densities, expected, strict=True):
        torch.testing.assert_close(first, second)


def test_an_event_of_several_normals(recorded: list[Any]) -> None:
    """Independent blocks, each with a covariance: marginals of all four numbers."""

    def blocks(x: torch.Tensor) -> dist.TorchDistribution:
        lower = torch.tensor([[0.5, 0.0], [-0.4, 0.3]])
        return dist.MultivariateNormal(torch.stack([x, x**2], 1), scale_tril=lower).to_event(1)

    result = run(guide_of(blocks), rows(5))
    codes, log_q_given_x, log_q, log_q_j = recorded[0]
    assert codes.shape == (1, 5, 2, 2)
    assert log_q_j.shape == (1, 5, 4)
    assert result.kl_per_dimension is not None
    assert result.kl_per_dimension.shape == (2, 2)
    fn = blocks(rows(5))
    torch.testing.assert_close(log_q_given_x[0], fn.log_prob(codes[0]))
    pairs = fn.log_prob(codes[0].unsqueeze(1))
    torch.testing.assert_close(log_q[0], pairs.logsumexp(1) - math.log(5))


@pytest.mark.parametrize("make", [normal, full_normal])
@pytest.mark.parametrize("chunk_size", [1, 4, 21, 1000])
def test_chunks_change_nothing(make: Make, chunk_size: int) -> None:
    x, guide = rows(7), guide_of(make)
    whole = run(guide, x, num_samples=3)
    parts = run(guide, x, num_samples=3, chunk_size=chunk_size)
    for name in (*PARTS, "kl"):
        assert math.isclose(getattr(whole, name), getattr(parts, name), rel_tol=1e-12), name
        assert math.isclose(whole.standard_errors[name], parts.standard_errors[name])
    torch.testing.assert_close(whole.kl_per_dimension, parts.kl_per_dimension)


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default takes as many codes as fit, and one where none does."""
    sizes: list[int] = []
    pairs = AggregateDensity._pairs

    def record(self: AggregateDensity, z: torch.Tensor) -> Any:
        sizes.append(len(z))
        return pairs(self, z)

    monkeypatch.setattr(AggregateDensity, "_pairs", record)
    for budget, expected in ((8 * 7 * 2 * 3, [3, 3, 1]), (1, [1] * 7)):
        sizes.clear()
        monkeypatch.setattr("pyro_vae.evaluation.aggregate_density._CHUNK_BYTES", {"cpu": budget})
        run(guide_of(normal), rows(7))
        assert sizes == expected


def test_the_parts_add_up() -> None:
    for make in (normal, full_normal):
        result = run(guide_of(make), rows(50), num_samples=2)
        parts = [getattr(result, name) for name in PARTS]
        assert abs(sum(parts) - result.kl) < 1e-10
        assert result.marginal_kl == parts[1] + parts[2]
        assert result.kl_per_dimension is not None
        assert abs(float(result.kl_per_dimension.sum()) - result.dimension_wise_kl) < 1e-10


def test_standard_errors_are_those_of_the_mean_over_the_data(recorded: list[Any]) -> None:
    result = run(guide_of(normal), rows(9), num_samples=4)
    _, log_q_given_x, log_q, log_q_j = recorded[0]
    codes = recorded[0][0]
    log_p = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(codes)
    product = log_q_j.sum(-1)
    terms = (log_q_given_x - log_q, log_q - product, product - log_p, log_q_given_x - log_p)
    for name, values in zip((*PARTS, "kl"), terms, strict=True):
        per_datum = values.mean(0)
        assert math.isclose(result.standard_errors[name], float(per_datum.std()) / 3), name


# Known answers.


def test_identical_rows_tell_nothing() -> None:
    result = run(guide_of(normal), rows(1).expand(20, 2), num_samples=3)
    assert abs(result.index_code_mutual_information) < 1e-12
    assert abs(result.total_correlation) < 1e-12


def test_separated_codes_tell_all() -> None:
    x = 100 * torch.arange(12.0).unsqueeze(-1).expand(12, 2)
    result = run(guide_of(lambda x: dist.Normal(x, 1.0).to_event(1)), x)
    assert math.isclose(result.index_code_mutual_information, math.log(12), rel_tol=1e-12)
    assert result.standard_errors["index_code_mutual_information"] < 1e-12
    # The code's second dimension repeats what the first one tells.
    assert math.isclose(result.total_correlation, math.log(12), rel_tol=1e-12)


def test_a_grid_of_data_has_independent_dimensions() -> None:
    """Its q(z) is a product of mixtures, so that the total correlation of any code is 0."""
    x = torch.cartesian_prod(torch.tensor([-1.0, 0.2, 2.0]), torch.tensor([0.0, 0.5]))
    result = run(guide_of(lambda x: dist.Normal(x, 0.4).to_event(1)), x, num_samples=5)
    assert abs(result.total_correlation) < 1e-12
    assert result.standard_errors["total_correlation"] < 1e-12
    assert result.index_code_mutual_information > 0.5


def test_one_dimension_has_no_total_correlation() -> None:
    """A code may be a number, with no event dimension."""
    guide = guide_of(lambda x: dist.Normal(x[:, 0], 0.5))
    result = run(guide, rows(6), num_samples=2)
    assert result.total_correlation == 0.0
    assert result.kl_per_dimension is not None
    assert result.kl_per_dimension.shape == ()


def test_one_datum() -> None:
    result = run(guide_of(normal), rows(1))
    assert result.index_code_mutual_information == 0.0
    assert all(math.isnan(error) for error in result.standard_errors.values())


def assert_within_errors(
    expected: dict[str, float], guide: Any, x: torch.Tensor, num_runs: int = 20, **kwargs: Any
) -> None:
    """Compares the mean of independent runs, within five of its standard errors."""
    results = [aggregate_posterior(guide, x, **kwargs) for _ in range(num_runs)]
    for name, value in expected.items():
        estimates = torch.tensor([getattr(result, name) for result in results])
        error = float(estimates.std()) / num_runs**0.5
        assert abs(float(estimates.mean()) - value) < 5 * error + 1e-9, name
        assert error < 0.02, name


def quadrature(fn: Any) -> dict[str, float]:
    """All parts of two-dimensional posteriors (batch of rows), integrated on a grid."""
    axis = torch.linspace(-9, 9, 401)
    cell = (axis[1] - axis[0]) ** 2
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    given_x = torch.stack([fn.log_prob(z.unsqueeze(1)) for z in grid])  # (grid, grid, rows)
    log_q = given_x.logsumexp(-1) - math.log(given_x.shape[-1])
    log_q_1 = (log_q.exp().sum(1) * cell.sqrt()).log()
    log_q_2 = (log_q.exp().sum(0) * cell.sqrt()).log()
    product = log_q_1[:, None] + log_q_2[None, :]
    log_p = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(grid)
    density = log_q.exp() * cell
    own = given_x.exp() * cell / given_x.shape[-1]
    return {
        "index_code_mutual_information": float((own * (given_x - log_q.unsqueeze(-1))).sum()),
        "total_correlation": float((density * (log_q - product)).sum()),
        "dimension_wise_kl": float((density * (product - log_p)).sum()),
    }


def test_quadrature() -> None:
    x = torch.tensor([[1.0, 1.2], [-0.8, -1.0], [0.3, 0.1]])
    expected = quadrature(normal(x))
    assert min(expected.values()) > 0.1
    assert_within_errors(expected, guide_of(normal), x, num_samples=500)


def test_quadrature_of_a_linear_gaussian_with_its_exact_posterior() -> None:
    model = LinearGaussian(data_dim=3, latent_dim=2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.5], [0.9, -0.2], [-0.3, 1.1]]))
    guide, x = ExactLinearGaussian(model), torch.randn(4, 3) * 2
    with torch.no_grad():
        expected = quadrature(model.posterior(x))
    assert_within_errors(expected, guide, x, model=model, num_samples=500)


def test_the_average_approaches_the_analytic_kl() -> None:
    x = rows(6)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    expected = float(torch.distributions.kl_divergence(normal(x), prior).mean())
    assert_within_errors({"kl": expected}, guide_of(normal), x, num_samples=500)


def test_entropies_of_a_discrete_code() -> None:
    """With the exact posterior of a mixture all sums are over its components."""
    mixture = GaussianMixture(data_dim=2, num_components=3)
    weights = mixture.weights = torch.tensor([0.2, 0.5, 0.3])
    guide, x = ExactGaussianMixture(mixture), 2 * rows(6)
    q = mixture.posterior(x).probs.detach()
    given_x = (q * q.log()).sum(-1).mean()
    aggregate = q.mean(0)
    expected = {
        "index_code_mutual_information": float(given_x - (aggregate * aggregate.log()).sum()),
        "total_correlation": 0.0,
        "dimension_wise_kl": float((aggregate * (aggregate / weights).log()).sum()),
    }
    assert_within_errors(expected, guide, x, model=mixture, num_samples=300)


def test_loops_of_a_bounded_code(recorded: list[Any]) -> None:
    x = rows(5)
    prior = dist.Beta(torch.tensor([1.0, 2.0]), 2.0).to_event(1)
    result = run(guide_of(beta), x, model=model_of(lambda: prior))
    assert_parts(result, by_loops(*independent(beta, x), recorded[0][0], prior.log_prob))


# Priors.


def test_the_prior_of_a_model(recorded: list[Any]) -> None:
    prior = dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1)
    result = run(guide_of(normal), rows(), model=model_of(lambda: prior), num_samples=2)
    codes, _, _, log_q_j = recorded[0]
    expected = (log_q_j - prior.base_dist.log_prob(codes)).mean((0, 1))
    torch.testing.assert_close(result.kl_per_dimension, expected)
    # The codes do not depend on whether there is a model.
    assert run(guide_of(normal), rows(), num_samples=2).total_correlation == (
        result.total_correlation
    )


@pytest.mark.parametrize("kind", ["full", "mixture"])
def test_a_prior_that_does_not_factorise(recorded: list[Any], kind: str) -> None:
    prior: Any = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 2.0]]))
    if kind == "mixture":
        parts = dist.Normal(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]), 0.7).to_event(1)
        prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
    result = run(guide_of(normal), rows(), model=model_of(lambda: prior), num_samples=2)
    assert result.kl_per_dimension is None
    codes, log_q_given_x, _, log_q_j = recorded[0]
    log_p = prior.log_prob(codes)
    assert math.isclose(result.kl, float((log_q_given_x - log_p).mean()))
    assert math.isclose(result.dimension_wise_kl, float((log_q_j.sum(-1) - log_p).mean()))
    assert abs(sum(getattr(result, name) for name in PARTS) - result.kl) < 1e-10


def test_a_model_and_guide_with_plates_of_other_dimensions() -> None:
    def wide(images: torch.Tensor) -> None:
        with pyro.plate("images", len(images), dim=-2):
            fn = normal(images)
            pyro.sample("code", dist.Normal(*moments(fn)).to_event(1))

    def moments(fn: Any) -> Any:
        return fn.base_dist.loc.unsqueeze(1), fn.base_dist.scale.unsqueeze(1)

    prior = dist.Normal(torch.ones(2), 1.0).to_event(1)
    expected = run(guide_of(normal), rows(), model=model_of(lambda: prior))
    result = run(wide, rows(), model=model_of(lambda: prior))
    for name in (*PARTS, "kl"):
        assert math.isclose(getattr(result, name), getattr(expected, name)), name


# Programs of any kind.


def test_float32_accumulates_in_float64() -> None:
    x = rows(40)
    wide = guide_of(lambda x: dist.Normal(x, 0.5).to_event(1))
    narrow = run(wide, x.float(), num_samples=2)
    assert narrow.kl_per_dimension is not None
    assert narrow.kl_per_dimension.dtype == torch.float64
    assert abs(sum(getattr(narrow, name) for name in PARTS) - narrow.kl) < 1e-10
    assert narrow.index_code_mutual_information <= math.log(40)


def test_rows_masked_out_are_no_data(recorded: list[Any]) -> None:
    x, mask = rows(6), torch.tensor([True, False, True, True, False, True])
    masked = (
        guide_of(lambda x: normal(x).mask(mask)),
        poutine.mask(guide_of(normal), mask),
        guide_of(lambda x: normal(x).mask(mask).mask(torch.ones(6) > 0)),
    )
    for guide in masked:
        recorded.clear()
        result = run(guide, x, num_samples=2, chunk_size=3)
        ((codes, *_),) = recorded
        assert codes.shape == (2, 4, 2)
        assert_parts(result, by_loops(*independent(normal, x[mask]), codes, standard_normal))
        assert result.num_data == 4


def test_a_full_covariance_behind_a_mask(recorded: list[Any]) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    run(guide_of(lambda x: full_normal(x).mask(mask)), rows(6))
    codes, *densities = recorded[0]
    kept = torch.ones(4, dtype=torch.bool)
    alone = AggregateDensity(full_normal(rows(6)[mask]), kept, where="", site="")
    for first, second in zip(densities, alone.log_prob(codes, None), strict=True):
        torch.testing.assert_close(first, second)


def test_a_model_with_the_same_mask() -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    guide, model = poutine.mask(guide_of(normal), mask), model_of(lambda: prior)
    expected = run(guide, rows(6))
    result = run(guide, rows(6), model=poutine.mask(model, mask))
    assert math.isclose(result.kl, expected.kl)


def test_one_distribution_for_all_rows() -> None:
    """The plate expands it, in whatever way its class does."""
    base = dist.Normal(torch.zeros(2), 1.0)
    fns = (base.to_event(1), dist.ExpandedDistribution(base.to_event(1), torch.Size([6])))
    for fn in fns:
        result = run(guide_of(lambda x, fn=fn: fn), rows(6))
        assert result.num_data == 6
        assert abs(result.index_code_mutual_information) < 1e-12
        assert abs(result.kl) < 1e-12


def test_a_transformed_distribution_of_single_dimensions(recorded: list[Any]) -> None:
    def shifted(x: torch.Tensor) -> dist.TorchDistribution:
        fn = dist.TransformedDistribution(dist.Normal(x, 0.5), [AffineTransform(1.0, 2.0)])
        return fn.to_event(1)

    run(guide_of(shifted), rows())
    codes, *densities = recorded[0]
    plain = dist.Normal(2 * rows() + 1, 1.0).to_event(1)
    kept = torch.ones(7, dtype=torch.bool)
    expected = AggregateDensity(plain, kept, where="", site="").log_prob(codes, None)
    for first, second in zip(densities, expected, strict=True):
        torch.testing.assert_close(first, second)


def test_scales_of_training_do_not_count() -> None:
    expected = run(guide_of(normal), rows())
    for guide in (scale_kl(guide_of(normal), 4.0), poutine.scale(guide_of(normal), 0.1)):
        assert run(guide, rows()).kl == expected.kl


def test_rows_of_a_subsampled_plate() -> None:
    def guide(x: torch.Tensor, weight: float) -> None:
        with pyro.plate("rows", 100, subsample=torch.arange(7)):
            pyro.sample("code", dist.Normal(weight * x, 0.5).to_event(1))

    result = run(guide, rows(), weight=0.7)
    expected = run(guide_of(lambda x: dist.Normal(0.7 * x, 0.5).to_event(1)), rows())
    assert math.isclose(result.kl, expected.kl)
    assert result.num_data == 7


def two_latents(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("first", dist.Normal(x, 0.5).to_event(1))
        pyro.sample("second", dist.Normal(2 * x, 0.1).to_event(1))


def hierarchy(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        low = pyro.sample("low", dist.Normal(x, 0.5).to_event(1))
        pyro.sample("top", dist.Normal(low, 0.1).to_event(1))


def test_several_latents() -> None:
    first, second = (run(two_latents, rows(), site=name) for name in ("first", "second"))
    assert second.index_code_mutual_information > first.index_code_mutual_information + 0.1
    expected = run(guide_of(lambda x: dist.Normal(x, 0.5).to_event(1)), rows())
    assert run(hierarchy, rows(), site="low").num_data == expected.num_data


def test_evaluation_leaves_everything_as_it_was() -> None:
    """In train mode dropout would make identical rows differ."""
    encoder = MLP(2, [16], 4, dropout=0.5)
    guide = AmortizedNormal(encoder)
    x = rows(1).expand(20, 2).clone()
    copy = x.clone()
    result = run(guide, x)
    assert abs(result.index_code_mutual_information) < 1e-12
    assert encoder.training
    assert torch.equal(x, copy)
    assert not list(pyro.get_param_store().keys())
    assert result.kl_per_dimension is not None
    assert not result.kl_per_dimension.requires_grad
    assert pyro.settings.get()["validate_distributions_pyro"]

    net = nn.Linear(2, 2)

    def plain(x: torch.Tensor) -> None:
        loc = pyro.module("plain", net)(x)
        scale = pyro.param("scale", torch.ones(2))
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(loc, scale).to_event(1))

    run(plain, rows())
    assert not list(pyro.get_param_store().keys())


# Messages.


def test_arguments() -> None:
    guide, x = guide_of(normal), rows()
    with pytest.raises(ValueError, match="aggregate_posterior: expected num_samples >= 1, got 0"):
        aggregate_posterior(guide, x, num_samples=0)
    with pytest.raises(TypeError, match="expected an integer num_samples, got float"):
        aggregate_posterior(guide, x, num_samples=1.5)
    with pytest.raises(ValueError, match="aggregate_posterior: expected chunk_size >= 1, got 0"):
        aggregate_posterior(guide, x, chunk_size=0)
    with pytest.raises(ValueError, match="expected at least one row of data, got an empty"):
        aggregate_posterior(guide, x[:0])


def test_which_site() -> None:
    with pytest.raises(ValueError, match=r"latents \['first', 'second'\], got none. Name"):
        aggregate_posterior(two_latents, rows())
    with pytest.raises(ValueError, match=r"latents \['first', 'second'\], got 'z'"):
        aggregate_posterior(two_latents, rows(), site="z")
    with pytest.raises(ValueError, match=r"the model's latents \['z'\], got 'code'"):
        aggregate_posterior(guide_of(normal), torch.zeros(7, 2), model=LinearGaussian(2, 2))


@pytest.mark.parametrize("kind", ["no plate", "two plates", "no event"])
def test_plates(kind: str) -> None:
    def guide(x: torch.Tensor) -> None:
        if kind == "no plate":
            pyro.sample("code", normal(x))
        elif kind == "two plates":
            with pyro.plate("rows", len(x), dim=-2), pyro.plate("units", 2):
                pyro.sample("code", normal(x).base_dist)
        else:
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("code", normal(x).base_dist)

    with pytest.raises(ValueError, match="expected site 'code' of the guide in one plate"):
        aggregate_posterior(guide, rows())


def test_a_forgotten_event() -> None:
    with pytest.raises(ValueError, match=r"inside plate 'images', got 2. Was `.to_event\(1\)`"):
        aggregate_posterior(guide_of(lambda x: normal(x).base_dist), rows())


def test_a_random_subsample() -> None:
    guide = guide_of(lambda x: normal(x[:3]), subsample_size=3)
    with pytest.raises(ValueError, match="got a random subsample of 3 of 7 rows"):
        aggregate_posterior(guide, rows())


@pytest.mark.parametrize("site", ["top", "label"])
def test_a_latent_that_depends_on_another(site: str) -> None:
    """A label may be certain, so that no two draws differ: its provenance tells."""

    def labelled(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            label = pyro.sample("sure", dist.Bernoulli(torch.full((len(x),), 1 - 1e-12)))
            pyro.sample("label", dist.Normal(x + label.unsqueeze(-1), 0.5).to_event(1))

    guide = hierarchy if site == "top" else labelled
    with pytest.raises(ValueError, match=f"of site '{site}' to be fixed by the data, got a dist"):
        aggregate_posterior(guide, rows(), site=site)


def test_a_dependence_behind_numpy() -> None:
    """Where provenance is lost, two draws tell."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            low = pyro.sample("low", dist.Normal(x, 0.5).to_event(1))
            loc = torch.tensor(np.tanh(low.tolist()))
            pyro.sample("top", dist.Normal(loc, 0.1).to_event(1))

    with pytest.raises(ValueError, match="of site 'top' to be fixed by the data"):
        aggregate_posterior(guide, rows(), site="top")


def test_noise_outside_the_sites() -> None:
    guide = guide_of(lambda x: dist.Normal(x + torch.randn(7, 1), 0.5).to_event(1))
    with pytest.raises(ValueError, match="or on random numbers drawn outside its sites"):
        aggregate_posterior(guide, rows())


def test_an_auxiliary_latent_behind_the_code() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            code = pyro.sample("code", normal(x))
            pyro.sample("helper", dist.Normal(code, 1.0).to_event(1), infer={"is_auxiliary": True})

    assert aggregate_posterior(guide, rows()).num_data == 7


def test_a_support_that_depends_on_another_latent() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            low = pyro.sample("low", dist.Normal(x, 5.0).to_event(1))
            loc = torch.tensor(low.tolist())
            pyro.sample("top", dist.Uniform(loc, loc + 0.1).to_event(1))

    with pytest.raises(ValueError, match="of site 'top' to be fixed by the data"):
        aggregate_posterior(guide, rows(), site="top")


def test_point_masses() -> None:
    with pytest.raises(ValueError, match=r"got a point mass \(Delta\) at site 'code'"):
        aggregate_posterior(guide_of(lambda x: dist.Delta(x, event_dim=1)), rows())

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"got a point mass \(Delta\) at site 'code'"):
        aggregate_posterior(AutoNormal(model), rows())


def test_a_flow_has_no_marginals() -> None:
    flow = dist.transforms.affine_coupling(2, hidden_dims=[4])

    def guide(x: torch.Tensor) -> None:
        fn = dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [flow])
        with pyro.plate("rows", len(x)):
            pyro.sample("code", fn)

    with pytest.raises(ValueError, match="at site 'code', got TransformedDistribution. Use indep"):
        aggregate_posterior(guide, rows())


def test_masks_that_leave_no_code() -> None:
    inner = torch.tensor([True, False])
    with pytest.raises(ValueError, match="expected a mask over whole codes at site 'code'"):
        aggregate_posterior(guide_of(lambda x: normal(x).base_dist.mask(inner).to_event(1)), rows())
    with pytest.raises(ValueError, match="got a mask that leaves out all 7. Look at the mask"):
        aggregate_posterior(poutine.mask(guide_of(normal), mask=False), rows())


def test_codes_that_a_standard_normal_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expected real codes at site 'code'.*Pass model="):
        aggregate_posterior(guide_of(beta), rows())
    with pytest.raises(ValueError, match="expected real codes at site 'z'"):
        aggregate_posterior(ExactGaussianMixture(GaussianMixture(2, 3)), rows())


def test_priors_that_do_not_fit() -> None:
    guide = guide_of(normal)
    three = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"got \(7, 3\) in the model and \(7, 2\) in the guide"):
        aggregate_posterior(guide, rows(), model=model_of(lambda: three))
    two = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    mask = torch.arange(7) > 2
    with pytest.raises(ValueError, match="expected the same mask at site 'code' in model and"):
        aggregate_posterior(guide, rows(), model=poutine.mask(model_of(lambda: two), mask))
    moving = dist.Normal(rows(), 1.0).to_event(1)
    with pytest.raises(ValueError, match="expected one prior p.z. for all data at site 'code'"):
        aggregate_posterior(guide, rows(), model=model_of(lambda: moving))
    outside = dist.Uniform(torch.zeros(2), 1e-3).to_event(1)
    with pytest.raises(ValueError, match="got 7 of 7 codes without a finite dimension_wise_kl"):
        aggregate_posterior(guide, rows(), model=model_of(lambda: outside))

    def ladder(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            top = pyro.sample("top", two)
            pyro.sample("code", dist.Normal(top, 1.0).to_event(1))

    with pytest.raises(ValueError, match="got one that depends on another latent of the model"):
        aggregate_posterior(guide, rows(), model=ladder)


def test_memory_does_not_grow_with_the_square_of_the_data() -> None:
    """Measured in a process of its own: the heap of this one has been used for other things."""
    program = """
import resource, sys, torch, pyro, pyro.distributions as dist
from pyro_vae.evaluation import aggregate_posterior
def guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 0.3).to_event(1))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
aggregate_posterior(guide, torch.randn(200, 10))
before = peak()
aggregate_posterior(guide, torch.randn(3000, 50))
print(peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 600  # MiB; all pairs at once would be 3,400.


def test_a_guide_of_mixtures_has_real_codes() -> None:
    def guide(x: torch.Tensor) -> None:
        locs = torch.stack([x, -x], -1)
        with pyro.plate("rows", len(x)):
            each = dist.MixtureSameFamily(
                dist.Categorical(torch.ones(*x.shape, 2)), dist.Normal(locs, 0.3)
            )
            pyro.sample("z", each.to_event(1))

    result = aggregate_posterior(guide, torch.randn(50, 3))
    parts = result.index_code_mutual_information + result.marginal_kl
    assert parts == pytest.approx(result.kl, abs=1e-10)
