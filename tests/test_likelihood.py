"""Importance-weighted log-likelihood against exact answers.

A guide that is the exact posterior makes every log-weight equal log p(x), so most tests here are
deterministic and need few particles: whatever is dropped, doubled or mixed up shows.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.distributions.transforms import AffineTransform, ExpTransform

from pyro_vae.evaluation import LogLikelihoodEstimate
from pyro_vae.evaluation import importance_weighted_log_likelihood as log_likelihood
from pyro_vae.evaluation.weights import LogWeightSums
from pyro_vae.guides import (
    AmortizedMultivariateNormal,
    AmortizedNormal,
    ExactGaussianMixture,
    ExactLinearGaussian,
)
from pyro_vae.handlers import mask_missing, scale_kl
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.likelihoods import Normal as NormalLikelihood
from pyro_vae.mixtures import FixedNormalMixture
from pyro_vae.models import VAE, GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

FIELDS = ("log_likelihood", "standard_error", "effective_sample_size", "pareto_k", "elbo")
NOISE = 0.7
WHERE = "importance_weighted_log_likelihood: "
SLOW = "does not broadcast over particles"


def loadings() -> torch.Tensor:
    return torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, -1.1], [0.9, 0.4]], dtype=torch.float64)


def rows(num: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 4, generator=generator, dtype=torch.float64)


def exact(x: torch.Tensor) -> torch.Tensor:
    """log p(x) of ``linear_model``, of whatever entries are not NaN."""
    covariance = loadings() @ loadings().T + NOISE**2 * torch.eye(4, dtype=torch.float64)
    result = []
    for row in x.double():
        seen = ~row.isnan()
        if not seen.any():
            result.append(row.new_zeros(()))
            continue
        marginal = dist.MultivariateNormal(row[seen] * 0, covariance[seen][:, seen])
        result.append(marginal.log_prob(row[seen]))
    return torch.stack(result)


def posterior(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``(batch, 2)`` and Cholesky factor ``(batch, 2, 2)`` of p(z | entries not NaN)."""
    seen = (~x.isnan()).double()
    scaled = loadings().T.unsqueeze(0) * seen.unsqueeze(1) / NOISE**2
    precision = torch.eye(2, dtype=torch.float64) + scaled @ loadings()
    covariance = torch.linalg.inv(precision)
    mean = covariance @ scaled @ x.double().nan_to_num().unsqueeze(-1)
    return mean.squeeze(-1), torch.linalg.cholesky(covariance)


def prior() -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


def linear_model(x: torch.Tensor, decode: Callable[..., torch.Tensor] | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior())
        loc = z @ loadings().T if decode is None else decode(z)
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def exact_guide(x: torch.Tensor, widen: float = 1.0, shift: float = 0.0) -> None:
    loc, scale_tril = posterior(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(loc + shift, scale_tril=widen * scale_tril))


def imperfect_guide(x: torch.Tensor) -> None:
    exact_guide(x, widen=1.3, shift=0.2)


def decoding(decode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], None]:
    """The linear model with another way to compute the same mean."""
    return lambda x: linear_model(x, decode)


def assert_equal(
    estimate: LogLikelihoodEstimate, expected: torch.Tensor, tolerance: float = 1e-10
) -> None:
    """Every log-weight of an exact guide is log p(x), so the ELBO is too and no error is left."""
    for value in (estimate.log_likelihood, estimate.elbo):
        torch.testing.assert_close(value, expected, rtol=0.0, atol=tolerance)
    if estimate.num_particles > 1:
        assert float(estimate.standard_error.max()) < max(1e-6, tolerance)


def assert_same(
    first: LogLikelihoodEstimate, second: LogLikelihoodEstimate, tolerance: float = 1e-10
) -> None:
    for name in FIELDS:
        a, b = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name}: {a} {b}")
    assert first.num_particles == second.num_particles


def run(model: Any, guide: Any, *args: Any, seed: int = 0, **kwargs: Any) -> LogLikelihoodEstimate:
    pyro.set_rng_seed(seed)
    return log_likelihood(model, guide, *args, **kwargs)


# The oracle: exact guides.


def linear_pair(noise: Any = "isotropic") -> tuple[LinearGaussian, ExactLinearGaussian]:
    model = LinearGaussian(4, 2, noise=noise)
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.normal_(std=0.3)
    return model, ExactLinearGaussian(model)


def mixture_pair(covariance: Any = "full") -> tuple[GaussianMixture, ExactGaussianMixture]:
    model = GaussianMixture(4, 3, covariance=covariance)
    model.weights = torch.tensor([0.2, 0.5, 0.3])
    model.scale = model.scale.detach() * 0.8
    return model, ExactGaussianMixture(model)


PAIRS = {
    "isotropic": lambda: linear_pair(),
    "diagonal": lambda: linear_pair("diagonal"),
    "full": lambda: mixture_pair(),
    "diagonal mixture": lambda: mixture_pair("diagonal"),
    "spherical mixture": lambda: mixture_pair("spherical"),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("num_particles", "chunk_size"), [(1, None), (7, 3), (40, 16), (33, 99)])
def test_exact_guide_gives_the_exact_marginal(
    pair: str, num_particles: int, chunk_size: int | None
) -> None:
    model, guide = PAIRS[pair]()
    x = rows()
    estimate = log_likelihood(model, guide, x, num_particles=num_particles, chunk_size=chunk_size)
    assert_equal(estimate, model.log_prob(x).detach())
    assert estimate.num_particles == num_particles
    if num_particles > 1:
        assert (estimate.pareto_k == -math.inf).all()
        torch.testing.assert_close(
            estimate.effective_sample_size, torch.full((5,), float(num_particles))
        )
    else:
        assert estimate.standard_error.isnan().all()


@pytest.mark.parametrize("pair", PAIRS)
def test_row_order_does_not_matter(pair: str) -> None:
    model, guide = PAIRS[pair]()
    x, order = rows(), torch.tensor([3, 0, 4, 1, 2])
    straight = log_likelihood(model, guide, x, num_particles=5)
    shuffled = log_likelihood(model, guide, x[order], num_particles=5)
    torch.testing.assert_close(shuffled.log_likelihood, straight.log_likelihood[order])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("num_particles", [1, 6])
def test_batch_of_one(pair: str, num_particles: int) -> None:
    model, guide = PAIRS[pair]()
    estimate = log_likelihood(model, guide, rows(1), num_particles=num_particles)
    assert estimate.log_likelihood.shape == (1,)
    assert_equal(estimate, model.log_prob(rows(1)).detach())


def test_no_log_weight_is_lost_or_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """All K weights reach the sums, and each field is what its formula says."""
    seen: list[torch.Tensor] = []
    add = LogWeightSums.add

    def record(self: LogWeightSums, log_weights: torch.Tensor) -> None:
        seen.append(log_weights.clone())
        add(self, log_weights)

    monkeypatch.setattr(LogWeightSums, "add", record)
    estimate = log_likelihood(
        linear_model, imperfect_guide, rows(), num_particles=101, chunk_size=23
    )
    assert [len(chunk) for chunk in seen] == [23, 23, 23, 23, 9]
    log_weights = torch.cat(seen)
    assert log_weights.dtype == torch.float64
    assert len(log_weights.unique()) == 101 * 5
    weights = log_weights.exp()
    torch.testing.assert_close(estimate.log_likelihood, weights.mean(0).log())
    torch.testing.assert_close(estimate.elbo, log_weights.mean(0))
    torch.testing.assert_close(
        estimate.effective_sample_size, weights.sum(0) ** 2 / (weights**2).sum(0)
    )
    torch.testing.assert_close(estimate.standard_error, weights.std(0) / weights.mean(0) / 101**0.5)


# Imperfect guides.


def test_imperfect_guide_is_within_five_standard_errors() -> None:
    x = rows(40)
    estimate = run(linear_model, imperfect_guide, x, num_particles=2000)
    z = (estimate.log_likelihood - exact(x)) / estimate.standard_error
    assert z.abs().max() < 5
    assert 0 < float(estimate.standard_error.max()) < 0.05
    mean_error = estimate.mean() - float(exact(x).mean())
    assert abs(mean_error) < 5 * estimate.mean_standard_error()
    assert (estimate.pareto_k < 0.7).all()


def test_elbo_agrees_with_its_closed_form() -> None:
    """log p(x) - KL(q || p(z | x)), whose standard deviation the weights give."""
    x, num_particles = rows(40), 2000
    estimate = run(linear_model, imperfect_guide, x, num_particles=num_particles)
    loc, scale_tril = posterior(x)
    q = torch.distributions.MultivariateNormal(loc + 0.2, scale_tril=1.3 * scale_tril)
    p = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    kl = torch.distributions.kl_divergence(q, p)
    z = q.sample((1000,))
    error = (p.log_prob(z) - q.log_prob(z)).std(0) / num_particles**0.5
    assert ((estimate.elbo - (exact(x) - kl)).abs() < 5 * error).all()


def test_standard_error_is_calibrated() -> None:
    x = rows(4)
    z, errors = [], []
    for seed in range(200):
        estimate = run(linear_model, imperfect_guide, x, num_particles=200, seed=seed)
        z.append((estimate.log_likelihood - exact(x)) / estimate.standard_error)
        errors.append(estimate.standard_error)
    scores = torch.stack(z)
    assert 0.8 < float(scores.std()) < 1.2
    # E log p-hat = log p - s^2 / 2 + ..., so the mean of the z-scores is about - s / 2.
    bias = -float(torch.stack(errors).mean()) / 2
    assert abs(float(scores.mean()) - bias) < 5 / scores.numel() ** 0.5 + abs(bias)


def test_mean_standard_error_is_calibrated() -> None:
    x = rows(6)
    means, errors = [], []
    for seed in range(200):
        estimate = run(linear_model, imperfect_guide, x, num_particles=50, seed=seed)
        means.append(estimate.mean())
        errors.append(estimate.mean_standard_error())
    ratio = float(torch.tensor(means).std() / torch.tensor(errors).mean())
    assert abs(ratio - 1) < 5 * (1 / 400) ** 0.5


def test_bound_rises_with_the_number_of_particles() -> None:
    x = rows(5).repeat(600, 1)

    def guide(x: torch.Tensor) -> None:
        exact_guide(x, widen=1.5, shift=0.6)

    gaps = [
        exact(x) - run(linear_model, guide, x, num_particles=k).log_likelihood
        for k in (1, 4, 16, 128)
    ]
    for fewer, more in zip(gaps[:-1], gaps[1:], strict=True):
        rise = fewer.mean() - more.mean()
        error = (fewer.var() / len(x) + more.var() / len(x)).sqrt()
        assert rise > 5 * error
    assert gaps[-1].mean() > -5 * gaps[-1].std() / len(x) ** 0.5


def test_a_hopeless_guide_is_flagged() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.full((2,), 4.0)
            pyro.sample("z", dist.Normal(loc, 0.2).to_event(1))

    estimate = run(linear_model, guide, rows(20), num_particles=1000)
    assert (estimate.pareto_k > 0.7).double().mean() > 0.8
    assert estimate.effective_sample_size.median() < 50


# The same numbers for any chunk.


def hierarchical_model(x: torch.Tensor) -> None:
    """z2 -> z1 -> x, all normal."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6))
        loc = z1.unsqueeze(-1) * loadings()[:, 0]
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def hierarchical_exact(x: torch.Tensor) -> torch.Tensor:
    w = loadings()[:, 0]
    covariance = (0.64 + 0.36) * torch.outer(w, w) + NOISE**2 * torch.eye(4)
    return dist.MultivariateNormal(x.new_zeros(4), covariance).log_prob(x)


def hierarchical_posterior(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``(batch, 2)`` and covariance of (z2, z1) given x."""
    w = loadings()[:, 0]
    prior_covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    precision = torch.linalg.inv(prior_covariance)
    precision[1, 1] += w @ w / NOISE**2
    covariance = torch.linalg.inv(precision)
    return torch.outer(x @ w / NOISE**2, covariance[:, 1]), covariance


def hierarchical_guide(
    x: torch.Tensor, first: int = 0, widen: float = 1.0, cat: bool = False
) -> None:
    """The exact posterior, z2 first (0) or z1 first (1); with ``cat`` as for a network."""
    mean, covariance = hierarchical_posterior(x)
    names, second = ("z2", "z1"), 1 - first
    slope = covariance[first, second] / covariance[first, first]
    variance = covariance[second, second] - slope * covariance[first, second]
    with pyro.plate("data", len(x)):
        a = pyro.sample(
            names[first],
            dist.Normal(mean[:, first], widen * covariance[first, first].sqrt()),
        )
        if cat:
            features = torch.cat([mean, a.unsqueeze(-1)], -1)
            loc = features[..., second] + slope * (features[..., 2] - features[..., first])
        else:
            loc = mean[:, second] + slope * (a - mean[:, first])
        pyro.sample(names[second], dist.Normal(loc, widen * variance.sqrt()))


def two_site_model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        loc = a.unsqueeze(-1) * loadings()[:, 0] + b @ loadings().T
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def two_site_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Normal(x[:, :2] / 3, 0.9).to_event(1))
        pyro.sample("a", dist.Normal(x[:, 0] / 3, 0.8))


def two_site_exact(x: torch.Tensor) -> torch.Tensor:
    w = torch.cat([loadings()[:, :1], loadings()], 1)
    covariance = w @ w.T + NOISE**2 * torch.eye(4)
    return dist.MultivariateNormal(x.new_zeros(4), covariance).log_prob(x)


CHUNKED: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "one site": (linear_model, imperfect_guide),
    "two sites": (two_site_model, two_site_guide),
    "hierarchical": (hierarchical_model, lambda x: hierarchical_guide(x, widen=1.2)),
}


@pytest.mark.parametrize("pair", CHUNKED)
def test_same_seed_same_numbers_for_any_chunk(pair: str) -> None:
    model, guide = CHUNKED[pair]
    expected = run(model, guide, rows(), num_particles=101)
    assert expected.standard_error.min() > 0
    for limits in ({"chunk_size": c} for c in (1, 3, 16, 50, 101, 1000)):
        assert_same(run(model, guide, rows(), num_particles=101, **limits), expected)
    for num_bytes in (1, 10_000, 100_000):
        limited = run(model, guide, rows(), num_particles=101, chunk_bytes=num_bytes)
        assert_same(limited, expected)


def test_chunk_bytes_bounds_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    add = LogWeightSums.add

    def record(self: LogWeightSums, log_weights: torch.Tensor) -> None:
        sizes.append(len(log_weights))
        add(self, log_weights)

    monkeypatch.setattr(LogWeightSums, "add", record)
    largest = []
    for num_bytes in (1, 20_000, 80_000):
        sizes.clear()
        log_likelihood(linear_model, exact_guide, rows(), num_particles=300, chunk_bytes=num_bytes)
        assert sum(sizes) == 300
        largest.append(max(sizes))
    assert largest[0] == 1
    assert 1 < largest[1] < largest[2] < 300
    assert largest[2] == pytest.approx(4 * largest[1], abs=4)


def test_the_encoder_runs_once() -> None:
    class Counting(nn.Module):
        num_calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            return torch.cat([x[..., :2] / 2, x[..., :2] * 0 + 0.5], -1)

    network = Counting()
    log_likelihood(linear_model, AmortizedNormal(network), rows(), num_particles=100, chunk_size=10)
    assert network.num_calls == 1


# Structure: several sites, hierarchies, plates, names.


def test_several_latent_sites() -> None:
    x = rows(40)
    estimate = run(two_site_model, two_site_guide, x, num_particles=3000)
    z = (estimate.log_likelihood - two_site_exact(x)) / estimate.standard_error
    trusted = estimate.pareto_k < 0.7
    assert trusted.sum() > 20
    assert z[trusted].abs().max() < 5


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("num_rows", [1, 6])
def test_hierarchical_guide(first: int, num_rows: int) -> None:
    x = rows(num_rows)
    estimate = log_likelihood(
        hierarchical_model, lambda x: hierarchical_guide(x, first), x, num_particles=40
    )
    assert_equal(estimate, hierarchical_exact(x))


@pytest.mark.parametrize("num_rows", [1, 6])
def test_hierarchical_guide_that_cannot_broadcast(num_rows: int) -> None:
    """``torch.cat([x, z], -1)`` does not take a particle dimension."""
    x = rows(num_rows)
    with pytest.warns(UserWarning, match=f"the guide {SLOW}"):
        estimate = log_likelihood(
            hierarchical_model, lambda x: hierarchical_guide(x, cat=True), x, num_particles=20
        )
    assert_equal(estimate, hierarchical_exact(x))


def test_names_are_the_users_own() -> None:
    def model(batch: torch.Tensor) -> None:
        with pyro.plate("rows", len(batch)):
            code = pyro.sample("code", prior())
            pyro.sample("pixels", dist.Normal(code @ loadings().T, NOISE).to_event(1), obs=batch)

    def guide(batch: torch.Tensor) -> None:
        loc, scale_tril = posterior(batch)
        with pyro.plate("other rows", len(batch)):
            pyro.sample("code", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    assert_equal(log_likelihood(model, guide, rows(), num_particles=9), exact(rows()))


def test_plain_functions_with_pyro_module() -> None:
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)
    _, scale_tril = posterior(rows(1))
    with torch.no_grad():
        decoder.weight.copy_(loadings())
        decoder.bias.zero_()
        basis, _ = posterior(torch.eye(4))
        encoder.weight.copy_(basis.T)
        encoder.bias.zero_()

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        linear_model(x, decoder)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(encoder(x), scale_tril=scale_tril[0]))

    assert_equal(log_likelihood(model, guide, rows(), num_particles=9), exact(rows()))
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("data_dim", [-2, -1])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_data_and_pixel_plates(data_dim: int, num_rows: int) -> None:
    def model(x: torch.Tensor) -> None:
        data = pyro.plate("data", len(x), dim=data_dim)
        pixels = pyro.plate("pixels", 4, dim=-3 - data_dim)
        with data:
            z = pyro.sample("z", prior())
            with pixels:
                w = loadings() if data_dim == -2 else loadings().unsqueeze(1)
                obs = x if data_dim == -2 else x.T
                pyro.sample("x", dist.Normal((z * w).sum(-1), NOISE), obs=obs)

    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        if data_dim == -2:
            loc, scale_tril = loc.unsqueeze(1), scale_tril.unsqueeze(1)
        with pyro.plate("rows", len(x), dim=data_dim):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    estimate = log_likelihood(model, guide, rows(num_rows), num_particles=20, chunk_size=7)
    assert_equal(estimate, exact(rows(num_rows)))


def test_several_common_plates_give_their_shape() -> None:
    x = rows()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 5, dim=-2), pyro.plate("pixels", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", 5, dim=-2), pyro.plate("pixels", 4, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    estimate = log_likelihood(model, guide, x, num_particles=9)
    assert_equal(estimate, dist.Normal(0.0, 2.0**0.5).log_prob(x))


def test_two_observed_sites() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            loc = z @ loadings().T
            pyro.sample("x_left", dist.Normal(loc[..., :2], NOISE).to_event(1), obs=x[:, :2])
            pyro.sample("x_right", dist.Normal(loc[..., 2:], NOISE).to_event(1), obs=x[:, 2:])

    assert_equal(log_likelihood(model, exact_guide, rows(), num_particles=9), exact(rows()))


def test_positional_and_keyword_arguments_reach_both() -> None:
    def model(x: torch.Tensor, factor: float, *, offset: float) -> None:
        linear_model(x * factor + offset)

    def guide(x: torch.Tensor, factor: float, *, offset: float) -> None:
        exact_guide(x * factor + offset)

    estimate = log_likelihood(model, guide, rows(), 2.0, num_particles=9, offset=0.5)
    assert_equal(estimate, exact(rows() * 2 + 0.5))


def test_a_batch_may_be_a_mapping() -> None:
    def model(batch: dict[str, torch.Tensor]) -> None:
        linear_model(batch["image"])

    def guide(batch: dict[str, torch.Tensor]) -> None:
        exact_guide(batch["image"])

    batch = {"image": rows()}
    assert_equal(log_likelihood(model, guide, batch, num_particles=9), exact(rows()))


def test_a_model_without_latents_is_its_own_likelihood() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)

    estimate = log_likelihood(model, lambda x: None, rows(), num_particles=20, chunk_size=6)
    assert_equal(estimate, dist.Normal(0.0, 1.0).log_prob(rows()).sum(-1))


# Scales are weights of training; masks say what was observed.


@pytest.mark.parametrize("beta", [0.0, 4.0, LinearWarmup(10), torch.tensor(0.3)])
def test_scale_kl_is_ignored(beta: Any) -> None:
    estimate = log_likelihood(
        scale_kl(linear_model, beta), scale_kl(exact_guide, beta), rows(), num_particles=9
    )
    assert_equal(estimate, exact(rows()))


def test_scale_kl_is_ignored_where_a_latent_is_summed_out() -> None:
    model = GaussianMixture(4, 3)
    estimate = log_likelihood(scale_kl(model, 0.2), lambda x: None, rows(), num_particles=2)
    assert_equal(estimate, model.log_prob(rows()).detach())


@pytest.mark.parametrize("scale", [0.001, 7.0])
def test_poutine_scale_is_ignored(scale: float) -> None:
    estimate = log_likelihood(
        poutine.scale(linear_model, scale),
        poutine.scale(exact_guide, scale),
        rows(),
        num_particles=9,
    )
    assert_equal(estimate, exact(rows()))
    one_side = log_likelihood(
        poutine.scale(linear_model, scale), exact_guide, rows(), num_particles=9
    )
    assert_equal(one_side, exact(rows()))


@pytest.mark.parametrize("enumerate_latent", [False, True])
def test_subsampling_scale_is_ignored(enumerate_latent: bool) -> None:
    mixture = GaussianMixture(4, 3)
    index = torch.tensor([4, 1, 3])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 1000, subsample=index):
            if enumerate_latent:
                z = pyro.sample("z", dist.Categorical(mixture.weights))
                pyro.sample("x", mixture._components(z), obs=x[index])
            else:
                z = pyro.sample("z", prior())
                fn = dist.Normal(z @ loadings().T, NOISE).to_event(1)
                pyro.sample("x", fn, obs=x[index])

    def guide(x: torch.Tensor) -> None:
        if not enumerate_latent:
            loc, scale_tril = posterior(x[index])
            with pyro.plate("data", 1000, subsample=index):
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    estimate = log_likelihood(model, guide, rows(), num_particles=9)
    expected = mixture.log_prob(rows()).detach() if enumerate_latent else exact(rows())
    assert_equal(estimate, expected[index])


def test_a_row_mask_is_kept() -> None:
    x, seen = rows(), torch.tensor([True, False, True, True, False])
    with_holes = torch.where(seen.unsqueeze(-1), x, math.nan)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)

    for data in (torch.where(seen.unsqueeze(-1), x, 1e3), with_holes):
        estimate = log_likelihood(model, lambda _: exact_guide(with_holes), data, num_particles=9)
        assert_equal(estimate, exact(with_holes))
    assert exact(with_holes)[1] == 0


def test_a_mask_around_the_latents_is_kept_too() -> None:
    seen = torch.tensor([True, False, True, True, False])
    model, guide = poutine.mask(linear_model, mask=seen), poutine.mask(exact_guide, mask=seen)
    estimate = log_likelihood(model, guide, rows(), num_particles=9)
    assert_equal(estimate, exact(rows()) * seen)


def test_mask_false_leaves_nothing() -> None:
    model, guide = poutine.mask(linear_model, mask=False), poutine.mask(exact_guide, mask=False)
    assert_equal(log_likelihood(model, guide, rows(), num_particles=9), torch.zeros(5))


def holes() -> torch.Tensor:
    return torch.tensor(
        [
            [True, False, True, True],
            [False, False, True, False],
            [True, True, True, True],
            [False, False, False, False],
            [True, True, False, True],
        ]
    )


@pytest.mark.parametrize("filler", [0.0, math.nan])
def test_a_mask_per_entry_is_kept(filler: float) -> None:
    """By ``poutine.mask`` in a pixel plate, and by ``fn.mask`` inside an event."""
    x = torch.where(holes(), rows(), filler)
    with_holes = torch.where(holes(), rows(), math.nan)

    def in_plate(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", prior())
            with pyro.plate("pixels", 4, dim=-1), poutine.mask(mask=holes()):
                pyro.sample("x", dist.Normal((z * loadings()).sum(-1), NOISE), obs=x)

    def plate_guide(_: torch.Tensor) -> None:
        loc, scale_tril = posterior(with_holes)
        with pyro.plate("data", len(x), dim=-2):
            fn = dist.MultivariateNormal(loc.unsqueeze(1), scale_tril=scale_tril.unsqueeze(1))
            pyro.sample("z", fn)

    def in_event(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            fn = dist.Normal(z @ loadings().T, NOISE).mask(holes()).to_event(1)
            pyro.sample("x", fn, obs=x)

    for model, guide in ((in_plate, plate_guide), (in_event, lambda _: exact_guide(with_holes))):
        estimate = log_likelihood(model, guide, x, num_particles=9, chunk_size=4)
        assert_equal(estimate, exact(with_holes))


def test_a_mask_beside_a_support_that_depends_on_the_row() -> None:
    total, seen = torch.tensor([[3.0], [5.0], [2.0]]), torch.tensor([True, False, True])
    counts = torch.tensor([[1.0, 3.0], [9.0, 9.0], [0.0, 2.0]])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 3):
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Binomial(total, torch.tensor(0.3)).to_event(1), obs=x)

    fn = dist.Binomial(total, torch.tensor(0.3), validate_args=False)
    expected = torch.where(seen, fn.log_prob(counts).sum(-1), 0.0)
    assert_equal(log_likelihood(model, lambda x: None, counts, num_particles=2), expected)


def test_a_mask_around_a_vae() -> None:
    """Rows that are not observed may hold anything, and the guide need not see them."""
    seen = torch.tensor([True, False, True, True, False])
    decoder = MLP(2, [], 4)
    with torch.no_grad():
        decoder[0].weight.copy_(loadings())
        decoder[0].bias.zero_()
    vae = VAE(decoder, NormalLikelihood(NOISE), StandardNormalPrior(2))
    with_holes = torch.where(seen.unsqueeze(-1), rows(), math.nan)

    def guide(x: torch.Tensor) -> None:
        with poutine.mask(mask=seen):
            exact_guide(x)

    estimate = log_likelihood(poutine.mask(vae, mask=seen), guide, with_holes, num_particles=9)
    assert_equal(estimate, exact(with_holes))


def test_a_mask_around_one_value_for_all_rows() -> None:
    seen = torch.tensor([True, False, True])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 3), poutine.mask(mask=seen):
            pyro.sample("evidence", dist.Bernoulli(x), obs=torch.ones(()))

    estimate = log_likelihood(model, lambda x: None, torch.tensor([0.1, 0.5, 0.9]), num_particles=2)
    assert_equal(estimate, torch.tensor([0.1, 1.0, 0.9]).log())


@pytest.mark.parametrize("masked", [False, True])
def test_obs_mask_sites(masked: bool) -> None:
    """``obs_mask`` makes a latent site of its own for what was not observed."""
    x, seen = rows(), torch.tensor([True, False, True, True, False])
    with_holes = torch.where(seen.unsqueeze(-1), x, math.nan)
    filled = with_holes if masked else x

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            fn = dist.Normal(z @ loadings().T, NOISE).to_event(1)
            pyro.sample("x", fn, obs=x, obs_mask=seen)

    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(with_holes)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))
            with poutine.mask(mask=~seen):
                fn = dist.Normal(z @ loadings().T, NOISE).to_event(1)
                pyro.sample("x_unobserved", fn)

    assert_equal(log_likelihood(model, guide, filled, num_particles=9), exact(with_holes))


# Discrete latents.


def log_joint(mixture: GaussianMixture, x: torch.Tensor) -> torch.Tensor:
    return mixture._log_joint(x).detach()


def test_a_latent_the_guide_leaves_out_is_summed_out() -> None:
    for num_rows in (1, 5):
        for num_particles, chunk_size in ((1, None), (5, 2)):
            model = GaussianMixture(4, 3)
            x = rows(num_rows)
            estimate = log_likelihood(
                model, lambda x: None, x, num_particles=num_particles, chunk_size=chunk_size
            )
            assert_equal(estimate, model.log_prob(x).detach())


def test_a_sampled_discrete_latent_with_an_imperfect_guide() -> None:
    model, x = GaussianMixture(4, 3), rows(30)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])))

    estimate = run(model, guide, x, num_particles=2000)
    z = (estimate.log_likelihood - model.log_prob(x).detach()) / estimate.standard_error
    assert z.abs().max() < 5


def class_probs() -> torch.Tensor:
    return torch.tensor([0.3, 0.7])


def pixel_probs() -> torch.Tensor:
    """p(c | y), ``(2, 3)``."""
    return torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])


def pixel_locs() -> torch.Tensor:
    return torch.tensor([-1.0, 0.0, 2.0])


def pixel_joint(x: torch.Tensor) -> torch.Tensor:
    """log p(x, y), ``(batch, 2)``: one sum per pixel."""
    emission = dist.Normal(pixel_locs(), NOISE).log_prob(x.unsqueeze(-1))  # (batch, pixel, c)
    per_pixel = (emission.unsqueeze(-2) + pixel_probs().log()).logsumexp(-1)
    return per_pixel.sum(1) + class_probs().log()


@pytest.mark.parametrize("data_dim", [-2, -1])
@pytest.mark.parametrize("in_guide", [(), ("y",), ("y", "c")])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_discrete_latent_per_pixel(
    data_dim: int, in_guide: tuple[str, ...], num_rows: int
) -> None:
    x = rows(num_rows)
    pixel_dim = -3 - data_dim

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=data_dim):
            y = pyro.sample("y", dist.Categorical(class_probs()))
            with pyro.plate("pixels", 4, dim=pixel_dim):
                c = pyro.sample("c", dist.Categorical(pixel_probs()[y]))
                obs = x if data_dim == -2 else x.T
                pyro.sample("x", dist.Normal(pixel_locs()[c], NOISE), obs=obs)

    def guide(x: torch.Tensor) -> None:
        if not in_guide:
            return
        logits = pixel_joint(x)
        obs = x if data_dim == -2 else x.T
        with pyro.plate("data", len(x), dim=data_dim):
            y = pyro.sample(
                "y", dist.Categorical(logits=logits.unsqueeze(1) if data_dim == -2 else logits)
            )
            if "c" in in_guide:
                with pyro.plate("pixels", 4, dim=pixel_dim):
                    emission = dist.Normal(pixel_locs(), NOISE).log_prob(obs.unsqueeze(-1))
                    logits = emission + pixel_probs()[y].log()
                    pyro.sample("c", dist.Categorical(logits=logits))

    estimate = log_likelihood(model, guide, x, num_particles=6, chunk_size=4)
    assert_equal(estimate, pixel_joint(x).logsumexp(-1))


def test_a_latent_that_training_samples_is_summed_out_exactly() -> None:
    """``num_samples`` makes TraceTMC's estimate in training; evaluation takes the whole sum."""
    mixture = GaussianMixture(4, 3)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel", "num_samples": 2, "expand": True}
            z = pyro.sample("z", dist.Categorical(mixture.weights), infer=infer)
            pyro.sample("x", mixture._components(z), obs=x)

    estimate = log_likelihood(model, lambda x: None, rows(), num_particles=2)
    assert_equal(estimate, mixture.log_prob(rows()).detach())


def test_a_model_marked_for_enumeration_takes_the_guides_samples() -> None:
    """Only what the guide leaves out is summed; here y is, z is not."""
    model, joint = GaussianMixture(4, 3), torch.tensor([0.25, 0.75])

    def extended(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(joint), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Categorical(model.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", model._components(z), obs=x)
            pyro.factor("level", (1.0 + y).log())

    guide = ExactGaussianMixture(model)
    estimate = log_likelihood(extended, guide, rows(), num_particles=9, chunk_size=4)
    expected = model.log_prob(rows()).detach() + math.log(0.25 + 2 * 0.75)
    assert_equal(estimate, expected)


def test_several_discrete_latents_that_depend_on_one_another() -> None:
    table = torch.rand(2, 3, 4).softmax(-1)
    locs = torch.randn(4, 4)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(class_probs()))
            b = pyro.sample("b", dist.Categorical(pixel_probs()[a]))
            c = pyro.sample("c", dist.Categorical(table[a, b]))
            pyro.sample("x", dist.Normal(locs[c], NOISE).to_event(1), obs=x)

    joint = class_probs()[:, None, None] * pixel_probs()[:, :, None] * table
    emission = dist.Normal(locs, NOISE).log_prob(rows().unsqueeze(1)).sum(-1)
    expected = (emission + joint.sum((0, 1)).log()).logsumexp(-1)
    estimate = log_likelihood(model, lambda x: None, rows(), num_particles=5, chunk_size=2)
    assert_equal(estimate, expected)

    def guide(x: torch.Tensor) -> None:  # b from its posterior, a and c summed out
        logits = (joint.sum(0).log() + emission.unsqueeze(1)).logsumexp(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Categorical(logits=logits))

    assert_equal(log_likelihood(model, guide, rows(), num_particles=5), expected)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_markov_chain_is_summed_out(num_rows: int) -> None:
    start, transition = class_probs(), torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    locs, x = torch.tensor([-1.0, 1.5]), rows(num_rows)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(4)):
                probs = start if state is None else transition[state]
                state = pyro.sample(f"state_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(locs[state], NOISE), obs=x[:, t])

    emission = dist.Normal(locs, NOISE).log_prob(x.unsqueeze(-1))
    forward = start.log() + emission[:, 0]
    for t in range(1, 4):
        forward = (forward.unsqueeze(-1) + transition.log()).logsumexp(1) + emission[:, t]
    estimate = log_likelihood(model, lambda x: None, x, num_particles=5, chunk_size=2)
    assert_equal(estimate, forward.logsumexp(-1))


def mixed_model(x: torch.Tensor) -> None:
    """y -> z -> x with z normal."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(class_probs()), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 2.0])[y], 0.8))
        loc = z.unsqueeze(-1) * loadings()[:, 0]
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def mixed_posterior(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(x, y) ``(batch, 2)``; mean ``(batch, 2)`` and scale of p(z | x, y)."""
    w, means = loadings()[:, 0], torch.tensor([-1.0, 2.0])
    covariance = 0.64 * torch.outer(w, w) + NOISE**2 * torch.eye(4)
    locs = means.unsqueeze(-1) * w
    joint = dist.MultivariateNormal(locs, covariance).log_prob(x.unsqueeze(1))
    variance = 1 / (1 / 0.64 + w @ w / NOISE**2)
    mean = variance * (means / 0.64 + (x @ w / NOISE**2).unsqueeze(-1))
    return joint + class_probs().log(), mean, variance.sqrt()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_continuous_latent_beside_one_that_is_summed_out(num_rows: int) -> None:
    x = rows(num_rows)
    joint, mean, scale = mixed_posterior(x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            components = dist.Normal(mean, scale)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=joint), components))

    def joint_guide(x: torch.Tensor) -> None:  # both sampled, z after y
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=joint))
            loc = torch.where(y == 0, mean[:, 0], mean[:, 1])
            pyro.sample("z", dist.Normal(loc, scale))

    for q in (guide, joint_guide):
        estimate = log_likelihood(mixed_model, q, x, num_particles=20, chunk_size=7)
        assert_equal(estimate, joint.logsumexp(-1))


def test_a_slow_model_with_a_latent_summed_out() -> None:
    joint, mean, scale = mixed_posterior(rows())

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 2.0]), 0.8).to_event(1))
            y = pyro.sample("y", dist.Categorical(class_probs()))
            # z[arange, y] works for (batch, 2) and enumerated y, not with leading particles
            chosen = torch.where(y == 0, z.view(len(x), 2)[:, 0], z.view(len(x), 2)[:, 1])
            loc = chosen.unsqueeze(-1) * loadings()[:, 0]
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        """Samples y from its posterior, then the chosen z from its own and the other's prior."""
        priors = torch.tensor([-1.0, 2.0]).expand(5, 2)
        first = torch.stack([mean[:, 0], priors[:, 1]], -1)
        second = torch.stack([priors[:, 0], mean[:, 1]], -1)
        scales = torch.tensor([[float(scale), 0.8], [0.8, float(scale)]])
        components = dist.Normal(torch.stack([first, second], 1), scales).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=joint), components))

    with pytest.warns(UserWarning, match=f"the model {SLOW}"):
        estimate = log_likelihood(model, guide, rows(), num_particles=20, chunk_size=7)
    assert_equal(estimate, joint.logsumexp(-1))


# Programs that do not take a particle dimension.


class View(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.view(z.shape[0], -1) @ loadings().T


class Convolution(nn.Module):
    """As a convolution over ``(batch, 1, 2)``, which takes at most one leading dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(loadings().unsqueeze(1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(z.unsqueeze(-2)).squeeze(-1)
        return result


@pytest.mark.parametrize("network", [View, Convolution])
@pytest.mark.parametrize(("num_rows", "num_particles"), [(5, 20), (1, 20), (5, 1), (1, 1)])
def test_networks_without_leading_dimensions(
    network: type[nn.Module], num_rows: int, num_particles: int
) -> None:
    x, model = rows(num_rows), decoding(network())
    # One particle of one row looks the same either way to ``view``.
    agrees = network is View and num_rows == num_particles == 1
    with nullcontext() if agrees else pytest.warns(UserWarning, match=f"the model {SLOW}"):
        estimate = log_likelihood(model, exact_guide, x, num_particles=num_particles, chunk_size=7)
    assert_equal(estimate, exact(x))


@pytest.mark.parametrize(
    "mix",
    [
        lambda z, dim: z.softmax(dim),
        lambda z, dim: z - z.mean(dim, keepdim=True),
        lambda z, dim: z.cumsum(dim),
        lambda z, dim: nn.functional.normalize(z, dim=dim),
    ],
)
@pytest.mark.parametrize(("num_rows", "num_particles"), [(5, 20), (2, 2), (1, 20)])
def test_networks_that_silently_mix_dimensions(
    mix: Callable[..., torch.Tensor], num_rows: int, num_particles: int
) -> None:
    """``dim=1`` is the code for a batch, but the batch under particles."""
    x = rows(num_rows)

    def model(dim: int) -> Callable[..., None]:
        return decoding(lambda z: mix(z, dim) @ loadings().T)

    expected = run(model(-1), imperfect_guide, x, num_particles=num_particles)
    with pytest.warns(UserWarning, match=f"the model {SLOW}.*gave other log-densities"):
        estimate = run(model(1), imperfect_guide, x, num_particles=num_particles)
    assert_same(estimate, expected)


def test_a_network_that_mixes_rows_keeps_its_meaning() -> None:
    """``softmax(dim=0)`` is over the rows; under particles it would be over the particles."""
    x = rows()
    with pytest.warns(UserWarning, match=SLOW):
        estimate = run(
            decoding(lambda z: z.softmax(0) @ loadings().T), imperfect_guide, x, num_particles=9
        )
    expected = run(
        decoding(lambda z: z.softmax(-2) @ loadings().T), imperfect_guide, x, num_particles=9
    )
    assert_same(estimate, expected)


@pytest.mark.parametrize("num_rows", [4, 5])
def test_batch_norm_in_a_closure(num_rows: int) -> None:
    """With four rows the particles would pass for rows and the rows for channels."""
    x, norm = rows(num_rows), nn.BatchNorm1d(4)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    scale = (norm.running_var + norm.eps).sqrt()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.warns(UserWarning, match=SLOW):
        estimate = log_likelihood(
            # in eval mode the layer undoes what comes before it
            decoding(lambda z: norm(z @ loadings().T * scale + norm.running_mean)),
            exact_guide,
            x,
            num_particles=20,
        )
    assert_equal(estimate, exact(x))
    assert norm.training
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_of_modules_in_a_closure_come_back() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(0.9), nn.Dropout(0.9)
            self.frozen.eval()

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            result: torch.Tensor = self.frozen(self.dropout(z)) @ loadings().T
            return result

    decoder, unused = Decoder(), nn.Dropout(0.5)
    model = decoding(decoder)
    for program in (model, scale_kl(model, 2.0), poutine.block(model, hide=["nothing"])):
        estimate = log_likelihood(program, exact_guide, rows(), num_particles=9)
        assert_equal(estimate, exact(rows()))
        assert decoder.training
        assert decoder.dropout.training
        assert not decoder.frozen.training
        assert unused.training


def test_modes_of_modules_come_back_after_an_error() -> None:
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))

    def model(x: torch.Tensor) -> None:
        linear_model(x, decoder)
        raise RuntimeError("after the decoder")

    with pytest.raises(RuntimeError, match="after the decoder"):
        log_likelihood(model, exact_guide, rows())
    assert all(module.training for module in decoder.modules())


def test_dropout_of_a_library_model_is_off() -> None:
    """Seen from outside, wrapped or bound: the modules are found before they run."""
    vae = VAE(MLP(2, [8], 4, dropout=0.5), NormalLikelihood(), StandardNormalPrior(2))
    guide = AmortizedNormal(MLP(4, [8], 4, dropout=0.5))
    expected = run(vae.eval(), guide.eval(), rows(), num_particles=30)
    vae.train()
    guide.train()
    for model in (vae, scale_kl(vae, 0.5), vae.forward):
        assert_same(run(model, guide, rows(), num_particles=30), expected)
        assert all(module.training for module in [*vae.modules(), *guide.modules()])


# Nothing else changes.


def trained_pair() -> tuple[Callable[..., None], Callable[..., None]]:
    """Plain functions with ``pyro.param`` and ``pyro.module``."""
    encoder = nn.Linear(4, 2)

    def model(x: torch.Tensor) -> None:
        w = pyro.param("w", loadings)
        noise = pyro.param("noise", torch.tensor(NOISE), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ w.T, noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.6).to_event(1))

    return model, guide


def test_an_untrained_program_leaves_no_parameters() -> None:
    model, guide = trained_pair()
    pyro.param("before", torch.ones(2))
    log_likelihood(model, guide, rows(), num_particles=9)
    assert list(pyro.get_param_store().keys()) == ["before"]
    vae = VAE(MLP(2, [], 4), NormalLikelihood(learn=True), StandardNormalPrior(2))
    log_likelihood(vae, AmortizedNormal(MLP(4, [], 4)), rows(), num_particles=9)
    mixture = GaussianMixture(4, 2)
    log_likelihood(mixture, ExactGaussianMixture(mixture), rows(), num_particles=9)
    assert list(pyro.get_param_store().keys()) == ["before"]


def test_parameters_gradients_and_data_stay_as_they_are() -> None:
    model, guide = trained_pair()
    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
    x = rows()
    svi.step(x)
    store = pyro.get_param_store()
    for value in store._params.values():
        value.grad = torch.randn_like(value)
    state = {name: value.detach().clone() for name, value in store._params.items()}
    gradients = {name: value.grad.clone() for name, value in store._params.items()}
    before = x.clone()
    estimate = log_likelihood(model, guide, x, num_particles=9)
    assert set(store.keys()) == {"w", "noise", "encoder$$$weight", "encoder$$$bias"}
    for name, value in store._params.items():
        assert torch.equal(value, state[name]), name
        assert torch.equal(value.grad, gradients[name]), name
        assert value.requires_grad
    assert torch.equal(x, before)
    for name in FIELDS:
        assert not getattr(estimate, name).requires_grad
    svi.step(x)  # and training goes on
    assert not torch.equal(pyro.param("w"), state["w"])


@pytest.mark.parametrize("validation", [True, False])
def test_flags_stay_as_they_are(validation: bool) -> None:
    with pyro.validation_enabled(validation):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                estimate = log_likelihood(linear_model, exact_guide, rows(), num_particles=9)
                assert torch.is_grad_enabled() == grad
        assert_equal(estimate, exact(rows()))
        assert pyro.settings.get("validate_distributions_pyro") == validation
        assert torch.distributions.Distribution._validate_args == validation
        with pytest.raises(ValueError, match="expected finite data"):
            log_likelihood(linear_model, exact_guide_of_zeros, rows() * math.nan)
        assert pyro.settings.get("validate_distributions_pyro") == validation
        assert torch.distributions.Distribution._validate_args == validation


def exact_guide_of_zeros(x: torch.Tensor) -> None:
    exact_guide(torch.zeros_like(x))


def test_data_that_require_gradients() -> None:
    x = rows().requires_grad_()
    estimate = log_likelihood(linear_model, exact_guide, x, num_particles=9)
    assert not estimate.log_likelihood.requires_grad
    assert x.grad is None


# Other Pyro statements.


def test_factors_count_and_deterministic_sites_do_not() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            loc = pyro.deterministic("loc", z @ loadings().T, event_dim=1)
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)
            pyro.factor("weight", x.sum(-1))
            pyro.factor("count", torch.tensor(3))  # an integer

    estimate = log_likelihood(model, exact_guide, rows(), num_particles=9)
    assert_equal(estimate, exact(rows()) + rows().sum(-1) + 3)


def test_a_model_may_observe_through_a_factor_alone() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            fn = dist.Normal(z @ loadings().T, NOISE).to_event(1)
            pyro.factor("x", fn.log_prob(x))

    assert_equal(log_likelihood(model, exact_guide, rows(), num_particles=9), exact(rows()))


def test_a_factor_in_the_guide_counts() -> None:
    """A change of variables written by hand: z = loc + 2 u with its Jacobian as a factor."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 0.5))
            pyro.sample("x", dist.Normal(2 * u, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = dist.Normal(x / 2, 0.5**0.5)
            u = pyro.sample("u", dist.Normal(x / 4, 0.5**0.5 / 2).mask(False))
            pyro.factor("density", z.log_prob(2 * u) + math.log(2), has_rsample=True)

    x = rows()[:, 0]
    estimate = log_likelihood(model, guide, x, num_particles=9)
    assert_equal(estimate, dist.Normal(0.0, 2.0**0.5).log_prob(x))


def test_an_auxiliary_site_that_is_transformed() -> None:
    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", prior(), infer={"is_auxiliary": True})
            z = loc + (scale_tril @ u.unsqueeze(-1)).squeeze(-1)
            log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            pyro.sample("z", dist.Delta(z, log_density=-log_det, event_dim=1))

    for num_rows in (1, 5):
        estimate = log_likelihood(linear_model, guide, rows(num_rows), num_particles=40)
        assert_equal(estimate, exact(rows(num_rows)))


def test_a_transformed_auxiliary_site_through_a_network() -> None:
    """A matrix product may round differently for one particle than for many."""
    mixing = torch.randn(64, 64) / 8 + torch.eye(64)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(64), mixing.T @ mixing))
            pyro.sample("x", dist.Normal(z[..., 0] * 0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample(
                "u", dist.Normal(torch.zeros(64), 1.0).to_event(1), infer={"is_auxiliary": True}
            )
            log_density = -torch.linalg.slogdet(mixing).logabsdet
            z = u @ mixing
            if z.dim() > 2:
                z = z * (1 + 1e-15)
            pyro.sample("z", dist.Delta(z, log_density=log_density, event_dim=1))

    x = rows()[:, 0]
    estimate = log_likelihood(model, guide, x, num_particles=40)
    assert_equal(estimate, dist.Normal(0.0, 1.0).log_prob(x), tolerance=1e-8)


def test_a_transformed_distribution_as_guide() -> None:
    x = rows()[:, 0]

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        base = dist.Normal(torch.zeros_like(x), 1.0)
        transforms = [AffineTransform(x / 2, 0.5**0.5), ExpTransform()]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, transforms))

    estimate = log_likelihood(model, guide, x, num_particles=40, chunk_size=7)
    assert_equal(estimate, dist.Normal(0.0, 2.0**0.5).log_prob(x))


def test_an_autoguide() -> None:
    """Pyro's own: auxiliary sites and Deltas; its parameters survive an evaluation before them."""
    x, guide = rows(), AutoNormal(linear_model, init_scale=0.6)
    log_likelihood(linear_model, guide, x, num_particles=9)
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = pyro.infer.SVI(linear_model, guide, optimizer, pyro.infer.TraceMeanField_ELBO())
    for _ in range(150):
        svi.step(x)
    estimate = run(linear_model, guide, x, num_particles=2000)
    z = (estimate.log_likelihood - exact(x)) / estimate.standard_error
    assert z.abs().max() < 5
    assert estimate.standard_error.max() < 0.05


def test_a_flow_as_guide() -> None:
    x = rows(30)
    flow = dist.transforms.affine_autoregressive(2, hidden_dims=[8])

    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        base = dist.MultivariateNormal(loc, scale_tril=1.5 * scale_tril)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    estimate = run(linear_model, guide, x, num_particles=4000)
    z = (estimate.log_likelihood - exact(x)) / estimate.standard_error
    trusted = estimate.pareto_k < 0.5
    assert trusted.sum() > 10
    assert z[trusted].abs().max() < 5


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_float32_programs(default: torch.dtype) -> None:
    x = rows(20)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).float(), 1.0).to_event(1))
            fn = dist.Normal(z @ loadings().float().T, NOISE).to_event(1)
            pyro.sample("x", fn, obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        with pyro.plate("data", len(x)):
            fn = dist.MultivariateNormal(loc.float(), scale_tril=scale_tril.float())
            pyro.sample("z", fn)

    torch.set_default_dtype(default)
    try:
        estimate = log_likelihood(model, guide, x.float(), num_particles=40)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float64)
    for name in FIELDS:
        assert getattr(estimate, name).dtype == torch.float64
    assert_equal(estimate, exact(x), tolerance=1e-4)


def test_float32_with_discrete_latents_alone() -> None:
    locs = (100 * torch.randn(3, 4)).float()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3).float() / 3))
            # rounds differently with and without particles, as matrix products may
            noise = 1 + 1e-6 * z.dim()
            pyro.sample("x", dist.Normal(locs[z], NOISE * noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(3).float() / 3))

    log_likelihood(model, guide, rows().float(), num_particles=9)  # no warning


# Bad calls.


@pytest.mark.parametrize("name", ["num_particles", "chunk_size", "chunk_bytes"])
def test_numbers_below_one(name: str) -> None:
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"{WHERE}expected {name} >= 1, got {value}"):
            log_likelihood(linear_model, exact_guide, rows(), **{name: value})
    for wrong in (2.0, True, "5"):
        with pytest.raises(TypeError, match=f"{WHERE}expected an integer {name}, got"):
            log_likelihood(linear_model, exact_guide, rows(), **{name: wrong})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite(bad: float) -> None:
    x = rows()
    x[2, 1] = bad
    count = "1 NaN and 0 infinite" if math.isnan(bad) else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=f"{WHERE}expected finite data.*'x', got {count}"):
        log_likelihood(linear_model, exact_guide_of_zeros, x)
    # The guide, which runs first, gets no further.
    with pytest.raises(ValueError, match=f"expected finite data.*got {count}.*poutine.mask"):
        log_likelihood(linear_model, exact_guide_of_raw, x)
    vae = VAE(MLP(2, [8], 4), NormalLikelihood(), StandardNormalPrior(2))
    with pytest.raises(ValueError, match=f"expected finite data.*got {count}.*poutine.mask"):
        log_likelihood(vae, AmortizedNormal(MLP(4, [8], 4)), x)


def exact_guide_of_raw(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2] + x[:, 1:2], 1.0).to_event(1))


def test_an_empty_batch() -> None:
    for model, guide in ((linear_model, exact_guide), linear_pair(), mixture_pair()):
        with pytest.raises(ValueError, match=r"expected at least one row.*\(0, 4\).*Leave empty"):
            log_likelihood(model, guide, torch.zeros(0, 4))


def test_wrong_rank_or_width() -> None:
    model, guide = linear_pair()
    for wrong in (rows()[0], rows()[:, :3], rows().unsqueeze(0)):
        match = rf"expected x of shape \(batch, 4\), got \({', '.join(map(str, wrong.shape))}"
        with pytest.raises(ValueError, match=match):
            log_likelihood(model, guide, wrong)
    with pytest.raises(TypeError, match="expected x to be a tensor"):
        log_likelihood(model, guide, rows().numpy())


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_values_that_are_not_binary_under_a_bernoulli(value: float) -> None:
    vae = VAE(MLP(2, [8], 4), Bernoulli(), StandardNormalPrior(2))
    guide, x = AmortizedNormal(MLP(4, [8], 4)), (rows() > 0).double()
    log_likelihood(vae, guide, x, num_particles=2)
    x[1, 2] = value
    match = "expected values 0 and 1 at site 'x' under a Bernoulli, got values in .*Continuous"
    with pytest.raises(ValueError, match=match):
        log_likelihood(vae, guide, x)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=match):
        log_likelihood(vae, guide, x)


def test_values_outside_another_support() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("counts", dist.Poisson(2.0 * torch.ones(4)).to_event(1), obs=x)

    with pytest.raises(
        ValueError, match=r"expected values at site 'counts' in the support .* of Poisson, got"
    ):
        log_likelihood(model, lambda x: None, rows())


@pytest.mark.parametrize("site", ["z", "x"])
@pytest.mark.parametrize("validation", [True, False])
def test_a_forgotten_to_event(site: str, validation: bool) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            fn = dist.Normal(z @ loadings().T, NOISE)
            pyro.sample("x", fn if site == "x" else fn.to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, _ = posterior(x)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(loc, 1.0)
            pyro.sample("z", fn if site == "z" else fn.to_event(1))

    with pyro.validation_enabled(validation):
        for num_rows in (5, 1):
            with pytest.raises(ValueError, match=rf"site '{site}'.*`\.to_event\(1\)` forgotten"):
                log_likelihood(model, guide, rows(num_rows))


def test_a_latent_the_model_does_not_have() -> None:
    def guide(x: torch.Tensor) -> None:
        exact_guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"latents \['z'\], got site 'w' that the model does not"):
        log_likelihood(linear_model, guide, rows())


def test_a_latent_the_guide_lacks() -> None:
    match = "expected the guide to sample every latent of the model, got no site 'z'"
    with pytest.raises(ValueError, match=match):
        log_likelihood(linear_model, lambda x: None, rows())


def test_a_model_that_observes_nothing() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())

    with pytest.raises(ValueError, match="expected the model to observe data, got no observed"):
        log_likelihood(model, exact_guide, rows())


def test_a_site_outside_the_data_plate() -> None:
    def model(x: torch.Tensor) -> None:
        pyro.sample("global", dist.Normal(torch.zeros(()), 1.0))
        linear_model(x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("global", dist.Normal(torch.zeros(()), 1.0))
        exact_guide(x)

    match = r"every sample site inside plate 'data', got site 'global' outside it.*block\(pyro.pout"
    with pytest.raises(ValueError, match=match):
        log_likelihood(model, guide, rows())

    def fixed(program: Any) -> Any:  # as the message says
        conditioned = poutine.condition(program, data={"global": torch.tensor(0.3)})
        return poutine.block(conditioned, hide=["global"])

    estimate = log_likelihood(fixed(model), fixed(guide), rows(), num_particles=9)
    assert_equal(estimate, exact(rows()))


def test_no_plate_at_all() -> None:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).expand([5, 4]).to_event(2), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", prior())

    with pytest.raises(ValueError, match=r"got no vectorised plate around sites \['z', 'x'\]"):
        log_likelihood(model, guide, rows())


def test_plates_of_model_and_guide_disagree() -> None:
    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        with pyro.plate("data", len(x), dim=-2):
            fn = dist.MultivariateNormal(loc.unsqueeze(1), scale_tril=scale_tril.unsqueeze(1))
            pyro.sample("z", fn)

    with pytest.raises(ValueError, match=r"sample site 'z' with shape \(5, 2\) .* got \(5, 1, 2\)"):
        log_likelihood(linear_model, guide, rows())

    def shorter(x: torch.Tensor) -> None:
        exact_guide(x[:1])

    with pytest.raises(ValueError, match=r"sample site 'z' with shape \(5, 2\) .* got \(1, 2\)"):
        log_likelihood(linear_model, shorter, rows())


def test_a_random_subsample() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            linear_rows(x[index])

    def linear_rows(x: torch.Tensor) -> None:
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", prior())

    with pytest.raises(ValueError, match="'data' over the rows given, got a random subsample of 2"):
        log_likelihood(model, guide, rows())


def test_a_stochastic_model_is_refused() -> None:
    def model(x: torch.Tensor) -> None:
        linear_model(x, lambda z: z @ loadings().T + 0.1 * torch.randn(4))

    with pytest.raises(ValueError, match="expected a model whose log-density is fixed by its lat"):
        log_likelihood(model, exact_guide, rows(), num_particles=20)


def test_a_stochastic_hierarchical_guide_is_refused() -> None:
    def guide(x: torch.Tensor) -> None:
        hierarchical_guide(x + 0.1 * torch.randn_like(x))

    with pytest.raises(ValueError, match="expected a guide whose log-density is fixed by its lat"):
        log_likelihood(hierarchical_model, guide, rows(), num_particles=20)


@pytest.mark.parametrize(
    ("factor", "text"), [(math.nan, "nan"), (math.inf, "inf")], ids=["nan", "inf"]
)
def test_a_log_weight_that_is_not_finite_names_its_site(factor: float, text: str) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)
            pyro.factor("broken", torch.where(torch.arange(len(x)) == 3, factor, 0.0))

    match = f"expected finite log-weights, got {text} as log-density of site 'broken' in the model"
    # With validation on, torch refuses a NaN or infinite parameter before any weight is there.
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=match):
        log_likelihood(model, exact_guide, rows(), num_particles=20)


def test_particles_without_density_count_as_zero() -> None:
    """Half of the particles lie where the model has no density: weights of 0, not errors."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * 0, 1.0))

    x = rows()[:, 0]
    estimate = run(model, guide, x, num_particles=2000)
    expected = dist.Normal(0.0, 1.0).log_prob(x) + math.log(0.5)
    assert ((estimate.log_likelihood - expected).abs() < 5 * estimate.standard_error).all()
    torch.testing.assert_close(
        estimate.standard_error, torch.full((5,), 2000**-0.5), rtol=0.1, atol=0.0
    )
    assert (estimate.elbo == -math.inf).all()


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_guide_below_a_shifted_exponential(event_dim: int, validation: bool) -> None:
    """Torch calls its support real, and gives densities to what lies below."""
    shape = (2,) if event_dim else ()
    shift = dist.transforms.AffineTransform(1.0, 2.0)
    prior = dist.TransformedDistribution(dist.Exponential(torch.ones(shape)), [shift])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.to_event(event_dim))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(event_dim), obs=x)

    def guide(x: torch.Tensor, least: float = 1.0) -> None:
        wide = dist.TransformedDistribution(
            dist.LogNormal(torch.zeros(shape), 1.0), [dist.transforms.AffineTransform(least, 2.0)]
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", wide.to_event(event_dim))

    x = torch.ones(5, *shape)
    with pyro.validation_enabled(validation):
        inside = log_likelihood(model, guide, x, num_particles=20)
        assert inside.log_likelihood.isfinite().all()
        match = "expected the guide to sample site 'z' in the support .* of the model"
        with pytest.raises(ValueError, match=match):
            log_likelihood(model, lambda x: guide(x, -9.0), x, num_particles=20)


@pytest.mark.parametrize("with_discrete", [False, True])
@pytest.mark.parametrize("validation", [True, False])
def test_a_guide_outside_the_models_support(with_discrete: bool, validation: bool) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            if with_discrete:
                pyro.sample("y", dist.Categorical(class_probs()))
            z = pyro.sample("z", dist.Exponential(torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)

    with pyro.validation_enabled(validation):
        match = "expected the guide to sample site 'z' in the support .* of the model"
        with pytest.raises(ValueError, match=match):
            log_likelihood(model, exact_guide, rows(), num_particles=20)


def test_a_point_mass_is_refused() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(posterior(x)[0]).to_event(1))

    with pytest.raises(ValueError, match=r"got a point mass \(Delta\) at site 'z'"):
        log_likelihood(linear_model, guide, rows())


def test_an_error_in_the_model_is_the_users_own() -> None:
    def model(x: torch.Tensor) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        log_likelihood(model, exact_guide, rows())


# Library programs that are trained.


@pytest.mark.parametrize("guide", [AmortizedNormal, AmortizedMultivariateNormal])
def test_a_vae_that_is_a_linear_model(guide: type) -> None:
    """A linear decoder makes a VAE whose marginal is known."""
    decoder = MLP(2, [], 4)
    with torch.no_grad():
        decoder[0].weight.copy_(loadings())
        decoder[0].bias.zero_()
    vae = VAE(decoder, NormalLikelihood(NOISE), StandardNormalPrior(2))
    encoder = MLP(4, [], 4 if guide is AmortizedNormal else 5)
    with torch.no_grad():
        encoder[0].weight.zero_()
        encoder[0].weight[:2] = posterior(torch.eye(4))[0].T
        encoder[0].bias[:] = torch.tensor([0.0, 0.0, 0.7, 0.7, 0.7])[: len(encoder[0].bias)]
    q = guide(encoder) if guide is AmortizedNormal else guide(encoder, 2)
    x = rows(30)
    estimate = run(vae, q, x, num_particles=3000)
    z = (estimate.log_likelihood - exact(x)) / estimate.standard_error
    assert z.abs().max() < 5
    assert estimate.standard_error.max() < 0.1


# LogLikelihoodEstimate.


def estimate_of(log_p: list[float], errors: list[float], num: int = 50) -> LogLikelihoodEstimate:
    value, error = torch.tensor(log_p), torch.tensor(errors)
    return LogLikelihoodEstimate(value, error, error + 7, error + 8, value - 1, num)


def test_means_and_their_errors() -> None:
    estimate = estimate_of([-1.0, -2.0, -6.0], [0.1, 0.2, 0.2])
    assert len(estimate) == 3
    assert estimate.mean() == pytest.approx(-3.0)
    assert estimate.mean_standard_error() == pytest.approx(0.3 / 3)
    assert estimate.data_standard_error() == pytest.approx(7**0.5 / 3**0.5)
    assert math.isnan(estimate_of([-1.0], [0.1]).data_standard_error())
    assert math.isnan(estimate_of([-1.0], [math.nan]).mean_standard_error())


def test_cat_joins_in_order() -> None:
    first, second = estimate_of([-1.0, -2.0], [0.1, 0.2]), estimate_of([-6.0], [0.3])
    both = LogLikelihoodEstimate.cat([first, second])
    assert_same(both, estimate_of([-1.0, -2.0, -6.0], [0.1, 0.2, 0.3]))
    assert both.num_particles == 50


def test_cat_refuses_what_cannot_be_compared() -> None:
    first = estimate_of([-1.0], [0.1])
    with pytest.raises(ValueError, match=r"cat: expected the same num_particles in all, got \[5"):
        LogLikelihoodEstimate.cat([first, estimate_of([-1.0], [0.1], num=51)])
    with pytest.raises(ValueError, match="cat: expected at least one estimate, got none"):
        LogLikelihoodEstimate.cat([])


# Both sides of a latent.


@pytest.mark.parametrize("width", [1, 3])
def test_a_guide_of_another_width(width: int) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :width], 1.0).to_event(1))

    with pytest.raises(ValueError, match=rf"site 'z' with shape \(5, 2\) .* got \(5, {width}\)"):
        log_likelihood(linear_model, guide, rows())


def test_a_guide_that_shares_a_code_between_rows() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", prior())

    with pytest.raises(ValueError, match=r"site 'z' with shape \(5, 2\) .* got \(2,\)"):
        log_likelihood(linear_model, guide, rows())


def test_a_latent_masked_on_one_side() -> None:
    mask = torch.tensor([True, False, True, True, True])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)

    with pytest.raises(ValueError, match="same mask on latent site 'z' in model and guide"):
        log_likelihood(model, exact_guide, rows())
    estimate = log_likelihood(model, pyro.poutine.mask(exact_guide, mask=mask), rows())
    expected = exact(rows()).masked_fill(~mask, 0.0)
    torch.testing.assert_close(estimate.log_likelihood, expected)


def test_a_transformed_site_on_both_sides() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            twice = pyro.sample("twice", dist.Delta(2 * z, event_dim=1))
            pyro.sample("x", dist.Normal(twice / 2 @ loadings().T, NOISE).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale_tril = posterior(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))
            pyro.sample("twice", dist.Delta(2 * z, event_dim=1))

    estimate = log_likelihood(model, guide, rows(), num_particles=9)
    torch.testing.assert_close(estimate.log_likelihood, exact(rows()))


def test_two_plates_of_one_dimension() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("first", len(x)):
            z = pyro.sample("z", prior())
        with pyro.plate("second", len(x)):
            pyro.sample("x", dist.Normal(z @ loadings().T, NOISE).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("first", len(x)):
            pyro.sample("z", prior())

    with pytest.raises(ValueError, match="stands in a plate of its own, '.*': use one plate"):
        log_likelihood(model, guide, rows())


def test_an_autoguide_that_couples_the_rows() -> None:
    guide = AutoDiagonalNormal(linear_model)
    with pytest.raises(ValueError, match="couples all rows: use an amortized guide, or AutoNormal"):
        log_likelihood(linear_model, guide, rows())


def test_a_module_used_through_another_method_is_in_eval_mode() -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            self.modes.append(self.training)
            return posterior(x)[0]

    encoder = Encoder()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale_tril = posterior(x)[1]
            pyro.sample("z", dist.MultivariateNormal(encoder.encode(x), scale_tril=scale_tril))

    log_likelihood(linear_model, lambda x: guide(x), rows())
    assert encoder.modes
    assert not any(encoder.modes)
    assert encoder.training


def test_a_net_that_takes_exactly_its_own_shape_inside_nested_plates() -> None:
    def strict(z: torch.Tensor) -> torch.Tensor:
        assert z.dim() == 2, "made for (batch, latents)"
        return z @ loadings().T

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            loc = strict(z)
            with pyro.plate("pixels", 4, dim=-2):
                pyro.sample("x", dist.Normal(loc.T, NOISE), obs=x.T)

    with pytest.warns(UserWarning, match="does not broadcast over particles"):
        estimate = log_likelihood(model, exact_guide, rows(), num_particles=9)
    torch.testing.assert_close(estimate.log_likelihood, exact(rows()))


@pytest.mark.parametrize("gap", [1.0, 150.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_sites_that_disagree_about_a_component(gap: float, dtype: torch.dtype) -> None:
    locs = torch.tensor([0.0, math.sqrt(2 * gap)], dtype=dtype)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("a", dist.Normal(locs[z], 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(locs[z], 1.0), obs=x[:, 1])

    estimate = log_likelihood(model, lambda x: None, locs.unsqueeze(0), num_particles=2)
    joint = dist.Normal(locs[:, None], 1.0).log_prob(locs).double().sum(-1) - math.log(2)
    torch.testing.assert_close(estimate.log_likelihood, joint.logsumexp(0, keepdim=True))


def test_a_mask_inside_the_distribution_counts() -> None:
    mask = torch.tensor([True, False, True, True, True])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior().mask(mask))
            fn = dist.Normal(z @ loadings().T, NOISE).to_event(1)
            pyro.sample("x", fn.mask(mask), obs=x)

    with pytest.raises(ValueError, match="same mask on latent site 'z' in model and guide"):
        log_likelihood(model, exact_guide, rows())
    estimate = log_likelihood(model, poutine.mask(exact_guide, mask=mask), rows())
    torch.testing.assert_close(estimate.log_likelihood, exact(rows()).masked_fill(~mask, 0.0))


def test_one_module_under_two_names() -> None:
    net = torch.nn.Linear(4, 2)

    def guide(x: torch.Tensor, name: str = "a") -> None:
        pyro.module(name, net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    guide(rows())
    store = pyro.get_param_store()
    names = {name: store.param_name(tensor) for name, tensor in store.named_parameters()}
    log_likelihood(linear_model, lambda x: guide(x, "b"), rows())
    assert set(store) == {"a$$$weight", "a$$$bias"}
    assert {n: store.param_name(t) for n, t in store.named_parameters()} == names


def test_a_distribution_without_support() -> None:
    class Bare(dist.TorchDistribution):
        arg_constraints: ClassVar[dict[str, Any]] = {}

        def __init__(self, loc: torch.Tensor) -> None:
            self.loc = loc
            super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

        def expand(self, batch_shape: Any, _instance: Any = None) -> "Bare":
            return Bare(self.loc.expand(*batch_shape, self.loc.shape[-1]))

        def log_prob(self, value: torch.Tensor) -> torch.Tensor:
            return dist.Normal(self.loc, NOISE).log_prob(value).sum(-1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", Bare(z @ loadings().T), obs=x)

    estimate = log_likelihood(model, exact_guide, rows(), num_particles=9)
    torch.testing.assert_close(estimate.log_likelihood, exact(rows()))


def test_data_where_nan_means_unobserved() -> None:
    x = rows()
    x[1, 2] = torch.nan

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.NanMaskedNormal(z @ loadings().T, NOISE).to_event(1), obs=x)

    estimate = log_likelihood(model, exact_guide, x, num_particles=9)
    torch.testing.assert_close(estimate.log_likelihood, exact(x))


def test_a_guide_that_writes_a_latent_into_a_buffer() -> None:
    """The second latent depends on the first one where provenance loses its track."""
    x = torch.tensor([0.3, -1.2, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x * 2 / 3, (2 / 3) ** 0.5))
            buffer = torch.zeros(z1.shape)
            buffer[:] = z1
            pyro.sample("z2", dist.Normal(buffer / 2, 0.5**0.5))

    estimate = log_likelihood(model, guide, x, num_particles=20)
    exact = dist.Normal(0.0, 3.0**0.5).log_prob(x)
    torch.testing.assert_close(estimate.log_likelihood, exact)
    assert estimate.standard_error.max() < 1e-7  # the square root of rounding


# Mixture guides: particles in proportion to the components.


def two_sided_model(x: torch.Tensor) -> None:
    """x tells the square of z, so that the posterior has two modes."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.squeeze(-1).square(), 0.5), obs=x)


def two_sided_log_likelihood(x: torch.Tensor) -> torch.Tensor:
    z = torch.linspace(-8, 8, 4001)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 0.5).log_prob(x.unsqueeze(-1))
    return torch.trapezoid(joint.exp(), z).log()


def two_sided_guide(kind: Any = FixedNormalMixture) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        loc = torch.tensor([[-1.2], [1.0], [0.0], [3.0]], dtype=x.dtype).expand(len(x), 4, 1)
        scale = torch.tensor([[0.7], [0.6], [1.0], [0.9]], dtype=x.dtype).expand(len(x), 4, 1)
        probs = torch.tensor([0.3, 0.45, 0.0, 0.25], dtype=x.dtype).expand(len(x), 4)
        components = dist.Normal(loc, scale).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", kind(dist.Categorical(probs=probs), components))

    return guide


def never_stratify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.evaluation.particles.can_stratify", lambda fn, dims: False)


def assert_calibrated(estimate: LogLikelihoodEstimate, expected: torch.Tensor) -> None:
    """Over many rows: no bias in p(x), and errors as large as the standard errors say."""
    num, difference = len(estimate.log_likelihood), estimate.log_likelihood - expected
    ratio = difference.exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / num**0.5
    # Of Student's t, which the few blocks make of it, the variance is a little above 1.
    assert 0.85 < float((difference / estimate.standard_error).var()) < 1.2


@pytest.mark.parametrize("kind", [FixedNormalMixture, dist.MixtureSameFamily])
def test_the_error_under_stratification_is_calibrated(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many rows of the same data, each with particles of its own; and it is smaller."""
    x = torch.full((2000,), 1.1)
    expected = two_sided_log_likelihood(x[:1])
    pyro.set_rng_seed(1)
    stratified = log_likelihood(two_sided_model, two_sided_guide(kind), x, num_particles=640)
    assert_calibrated(stratified, expected)
    never_stratify(monkeypatch)
    by_chance = log_likelihood(two_sided_model, two_sided_guide(kind), x, num_particles=640)
    assert_calibrated(by_chance, expected)
    for of in (lambda e: e.log_likelihood - expected, lambda e: e.standard_error):
        ratio = of(stratified).square().mean() / of(by_chance).square().mean()
        assert float(ratio) < 0.9
    # The mean of the weights is what it was, and that of the log-weights.
    error = (stratified.elbo.var() + by_chance.elbo.var()).sqrt() / len(x) ** 0.5
    assert abs(float(stratified.elbo.mean() - by_chance.elbo.mean())) < 5 * float(error)


@pytest.mark.parametrize("num_particles", [1, 5, 16, 17, 40])
def test_few_stratified_particles_are_unbiased(num_particles: int) -> None:
    """The mean of the estimates of p(x) itself, over many rows."""
    x = torch.full((20_000,), 1.1)
    estimate = log_likelihood(two_sided_model, two_sided_guide(), x, num_particles=num_particles)
    ratio = (estimate.log_likelihood - two_sided_log_likelihood(x[:1])).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / len(x) ** 0.5


@pytest.mark.parametrize("num_particles", [7, 16, 50])
def test_chunks_do_not_matter_to_stratified_particles(num_particles: int) -> None:
    x = torch.tensor([0.3, 1.1, -0.2])
    estimates = []
    for chunk_size in (1, 3, 16, 17, 50, None):
        pyro.set_rng_seed(3)
        estimates.append(
            log_likelihood(
                two_sided_model,
                two_sided_guide(),
                x,
                num_particles=num_particles,
                chunk_size=chunk_size,
            )
        )
    for other in estimates[1:]:
        assert_same(other, estimates[0])


@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize("slow", [False, True])
def test_a_guide_with_two_mixture_sites(depends: bool, slow: bool) -> None:
    """The second may depend on the first; one by one or at once; against quadrature."""

    class Shift(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            if slow and z.dim() > 2:
                raise RuntimeError("one batch dimension, please")
            return 0.5 * z

    shift, num_rows = Shift(), 60 if slow else 1500

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            second = pyro.sample("second", dist.Normal(0.5 * first, 1.0).to_event(1))
            loc = first.squeeze(-1).square() + second.squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.6), obs=x)

    def site(loc: torch.Tensor) -> FixedNormalMixture:
        loc = torch.stack([loc - 1, loc + 1.2], -2)
        scale = torch.tensor([[0.8], [1.1]]).expand(loc.shape)
        logits = torch.tensor([0.4, -0.2]).expand(loc.shape[:-1])
        return FixedNormalMixture(
            dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1)
        )

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            zero = torch.zeros(len(x), 1)
            first = pyro.sample("first", site(zero))
            pyro.sample("second", site(shift(first) if depends else zero))

    x = torch.full((num_rows,), 0.9)
    grid = torch.linspace(-8, 8, 641)
    first, second = grid.unsqueeze(-1), grid
    joint = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.5 * first, 1.0).log_prob(second)
    joint = joint + dist.Normal(first**2 + second, 0.6).log_prob(x[0])
    expected = torch.trapezoid(torch.trapezoid(joint.exp(), grid), grid).log()
    with pytest.warns(UserWarning, match=SLOW) if slow and depends else nullcontext():
        estimate = log_likelihood(model, guide, x, num_particles=320)
    if num_rows > 1000:
        assert_calibrated(estimate, expected)
    ratio = (estimate.log_likelihood - expected).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / num_rows**0.5
    error = float(estimate.standard_error.square().mean().sqrt())
    assert 0.6 < float(ratio.std()) / error < 1.6


def test_a_mixture_behind_another_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first site is normal, the mixture depends on it: at once, and one by one."""
    num_rows = 1500

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            level = pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(level.unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.squeeze(-1).square(), 0.5), obs=x)

    def guide(x: torch.Tensor, slow: bool = False) -> None:
        with pyro.plate("rows", len(x)):
            level = pyro.sample("level", dist.Normal(0.2 * x, 1.1))
            if slow and level.dim() > 1:
                raise RuntimeError("one batch dimension, please")
            sides = torch.tensor([[-1.0], [1.0], [3.5]]) + 0.3 * level[..., None, None]
            components = dist.Normal(sides, 0.8).to_event(1)
            logits = torch.tensor([-0.3, 0.5, 0.0]).expand(sides.shape[:-1])
            pyro.sample("z", FixedNormalMixture(dist.Categorical(logits=logits), components))

    z = torch.linspace(-10, 10, 4001)
    joint = dist.Normal(0.0, 2**0.5).log_prob(z) + dist.Normal(z**2, 0.5).log_prob(
        torch.tensor(1.1)
    )
    expected = torch.trapezoid(joint.exp(), z).log()
    estimate = log_likelihood(model, guide, torch.full((num_rows,), 1.1), num_particles=320)
    assert_calibrated(estimate, expected)
    with pytest.warns(UserWarning, match=SLOW):
        alone = log_likelihood(
            lambda x: model(x),
            lambda x: guide(x, slow=True),
            torch.full((300,), 1.1),
            num_particles=64,
        )
    ratio = (alone.log_likelihood - expected).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 300**0.5
    never_stratify(monkeypatch)
    by_chance = log_likelihood(model, guide, torch.full((num_rows,), 1.1), num_particles=320)
    squares = [e.standard_error.square().mean() for e in (estimate, by_chance)]
    assert float(squares[0] / squares[1]) < 0.9


def test_float32_mixtures() -> None:
    x = torch.full((2000,), 1.1, dtype=torch.float32)
    estimate = log_likelihood(two_sided_model, two_sided_guide(), x, num_particles=640)
    assert_calibrated(estimate, two_sided_log_likelihood(torch.tensor([1.1])))


def test_a_mixture_in_a_guide_with_pixels() -> None:
    """One more plate on the right of the rows, around the data alone."""
    x = torch.full((1000, 3), 1.1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(z.squeeze(-1).square(), 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = torch.tensor([[-1.0], [1.1]]).expand(len(x), 1, 2, 1)
        components = dist.Normal(loc, 0.4).to_event(1)
        logits = torch.tensor([-0.4, 0.3]).expand(len(x), 1, 2)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", FixedNormalMixture(dist.Categorical(logits=logits), components))

    z = torch.linspace(-6, 6, 4001)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + 3 * dist.Normal(z**2, 0.5).log_prob(x[0, 0])
    estimate = log_likelihood(model, guide, x, num_particles=640)
    assert estimate.log_likelihood.shape == (1000,)
    assert_calibrated(estimate, torch.trapezoid(joint.exp(), z).log())


def test_a_mixture_with_several_values_a_datum() -> None:
    """Two of them in step would not be independent: against quadrature."""
    x = torch.tensor([1.5, -1.5, 0.3])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1):
            with pyro.plate("parts", 2, dim=-2):
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u[..., :1, :] * u[..., 1:, :], 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        weights, components = (
            dist.Categorical(torch.ones(2)),
            dist.Normal(torch.tensor([-1.0, 1.0]), 1.0),
        )
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("parts", 2, dim=-2):
            pyro.sample("u", dist.MixtureSameFamily(weights, components))

    u = torch.linspace(-7, 7, 1001)
    prior = dist.Normal(0.0, 1.0).log_prob(u)
    log_p = prior.unsqueeze(-1) + prior
    inner = dist.Normal(u.unsqueeze(-1) * u, 0.7).log_prob(x[:, None, None]) + log_p
    exact = torch.trapezoid(torch.trapezoid(inner.exp(), u), u).log()
    estimate = log_likelihood(model, guide, x, num_particles=8000)
    error = 5 * estimate.standard_error
    assert (estimate.log_likelihood - exact).abs().le(error).all()
    assert error.max() < 0.2


def test_rows_that_mask_missing_hides() -> None:
    """NaN in the data of a user's own model: log p of the others, 0 where nothing is observed."""
    x = rows()
    x[[1, 3]] = math.nan
    seen = ~x.isnan().any(-1)
    model = mask_missing(linear_model, {"x": seen})
    for num_particles in (1, 20):
        estimate = log_likelihood(model, exact_guide, x, num_particles=num_particles)
        assert_equal(estimate, exact(x))
        assert (exact(x)[~seen] == 0).all()


def test_a_mask_by_element_is_refused() -> None:
    """It would count each datum several times."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="expected a mask over"):
        log_likelihood(model, guide, torch.ones(3, 3), num_particles=2)
