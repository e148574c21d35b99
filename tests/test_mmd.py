"""InfoVAE: discrepancies by loops, and in closed form between normal distributions."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes
from torch.distributions import Normal, kl_divergence

from pyro_vae.objectives import TraceMMD_ELBO

close = torch.testing.assert_close


def kernel(first: torch.Tensor, second: torch.Tensor, name: str, h: float) -> torch.Tensor:
    squared = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    rbf = torch.exp(-squared / (2 * h**2))
    return rbf if name == "rbf" else 2 * h**2 / (2 * h**2 + squared)


def by_loops(z: torch.Tensor, y: torch.Tensor, name: str, h: float) -> torch.Tensor:
    num, total = len(z), torch.zeros(())
    for i in range(num):
        for j in range(num):
            if i != j:
                both = kernel(z[i], z[j], name, h) + kernel(y[i], y[j], name, h)
                total = total + both / (num * (num - 1))
            total = total - 2 * kernel(z[i], y[j], name, h) / num**2
    return total


@pytest.mark.parametrize("name", ["rbf", "imq"])
@pytest.mark.parametrize("bandwidth", [None, 0.8])
def test_value_and_gradient_against_loops(name: Any, bandwidth: float | None) -> None:
    p, alpha, divergence = LinearCodes(), 0.4, 6.0
    z = p.codes(p.x, 7)
    # The prior is drawn next, site by site.
    y = torch.cat([torch.randn(5, 2), 0.3 + 1.2 * torch.randn(5, 1)], -1)
    kl = kl_divergence(Normal(*p.moments(p.x)), p.prior(z)).sum()
    log_likelihood = Normal(z @ p.params["weight"], 0.7).log_prob(p.x).sum()
    discrepancy = by_loops(z, y, name, 3**0.5 if bandwidth is None else bandwidth)
    loss = -log_likelihood + (1 - alpha) * kl + 5 * (alpha + divergence - 1) * discrepancy
    expected = p.with_gradient(loss)
    objective = TraceMMD_ELBO(alpha, divergence, kernel=name, bandwidth=bandwidth)
    close(p.of(objective.training_loss, 7), expected)


def expected_kernel(mean: torch.Tensor, covariance: torch.Tensor, h: float) -> torch.Tensor:
    """E exp(-|d|^2 / 2 h^2) for a normal difference d."""
    wide = torch.eye(len(mean)) + covariance / h**2
    return wide.det() ** -0.5 * torch.exp(-0.5 * mean @ wide.inverse() @ mean / h**2)


def normal_discrepancy(p: Any, q: Any, h: float) -> torch.Tensor:
    zero = torch.zeros_like(p.mean)
    within = sum(expected_kernel(zero, 2 * fn.covariance_matrix, h) for fn in (p, q))
    across = expected_kernel(p.mean - q.mean, p.covariance_matrix + q.covariance_matrix, h)
    return within - 2 * across


@pytest.mark.parametrize("chained", [False, True])
def test_the_discrepancy_of_normal_distributions(chained: bool) -> None:
    """From a prior of independent latents, and from one in which a latent follows another."""
    loc, scale = torch.tensor([0.4, -0.7]), torch.tensor([0.6, 1.3])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("u", dist.Normal(loc[0], scale[0]))
            pyro.sample("v", dist.Normal(loc[1], scale[1]))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(0.9 * u if chained else 0.0, 0.5))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    x, bandwidth = torch.zeros(15, 1), 0.8
    objective = TraceMMD_ELBO(0.0, 2.0, bandwidth=bandwidth)
    draws = torch.stack([_discrepancy(objective, model, guide, x) for _ in range(150)])
    assert objective._dependent == ({"v"} if chained else set())
    q = dist.MultivariateNormal(loc, scale.square().diag())
    slope = 0.9 if chained else 0.0
    covariance = torch.tensor([[1.0, slope], [slope, slope**2 + 0.25]])
    p = dist.MultivariateNormal(torch.zeros(2), covariance)
    expected = normal_discrepancy(p, q, bandwidth)
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - expected) < 5 * error
    assert error < 0.1 * expected


def _discrepancy(objective: Any, model: Any, guide: Any, x: torch.Tensor) -> torch.Tensor:
    runs = objective._runs(model, guide, (x,), {}, training=True)
    bound, loss = objective._losses(runs, training=True)
    return (loss - bound) / len(x)


def test_an_unknown_prior_does_not_run_the_decoder_again() -> None:
    calls = []

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("u", dist.Normal(0.1, 1.0))
            pyro.sample("v", dist.Normal(0.2, 1.0))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(u, 0.5))
            calls.append(v)
            pyro.sample("x", dist.Normal(v.unsqueeze(-1), 1.0).to_event(1), obs=x)

    x, objective = torch.zeros(4, 1), TraceMMD_ELBO(0.5, 2.0, num_particles=2)
    objective.training_loss(model, guide, x)
    calls.clear()
    objective.training_loss(model, guide, x)
    assert [v.shape for v in calls] == [(2, 4)]
    calls.clear()
    objective.loss(model, guide, x)
    assert len(calls) == 1


def test_the_prior_learns_from_the_kl_alone() -> None:
    where = torch.tensor(0.5, requires_grad=True)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.squeeze(-1), 0.7))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(where, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    x = torch.randn(6, 1)
    for alpha in (0.0, 0.5, 1.0):
        objective = TraceMMD_ELBO(alpha, 50.0)
        (grad,) = torch.autograd.grad(objective.training_loss(model, guide, x), where)
        close(grad, (1 - alpha) * (where - x.mean()).detach() * 6)


def test_a_batch_of_one_row() -> None:
    p = LinearCodes(num_rows=1)
    with pytest.raises(ValueError, match="at least 2 rows, got 1: a discrepancy compares pairs"):
        TraceMMD_ELBO(0.5, 2.0).training_loss(p.model, p.guide, p.x)
    pair = LinearCodes()
    objective = TraceMMD_ELBO(0.5, 2.0)
    objective.training_loss(pair.model, pair.guide, pair.x)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):  # A last batch.
        objective.training_loss(pair.model, pair.guide, pair.x[:1])
    objective.loss(pair.model, pair.guide, pair.x[:1])
    keep = torch.tensor([True, False, False, False, False])
    loss = pair.of(objective.training_loss, 7, mask=keep)
    assert all(v.isfinite().all() for v in loss.values())


def test_arguments_that_are_none_of_ours() -> None:
    with pytest.raises(ValueError, match=r"expected kernel in \['rbf', 'imq'\], got 'linear'"):
        TraceMMD_ELBO(0.0, 1.0, kernel="linear")  # type: ignore[arg-type]
    for bandwidth in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected bandwidth > 0, got"):
            TraceMMD_ELBO(0.0, 1.0, bandwidth=bandwidth)
    for alpha, divergence in ((1.5, 1.0), (0.2, 0.7)):
        with pytest.raises(ValueError, match="expected mutual_information <= 1 and divergence >="):
            TraceMMD_ELBO(alpha, divergence)
    with pytest.raises(ValueError, match="expected a finite mutual_information >= 0"):
        TraceMMD_ELBO(-0.5, 2.0)
    with pytest.raises(ValueError, match="expected a finite divergence >= 0"):
        TraceMMD_ELBO(0.5, -2.0)


def transformed_pair() -> tuple[Any, Any]:
    """A guide that makes the latent of an auxiliary one, as Pyro's autoguides do."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(x / 2, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(e))

    return model, guide


def test_a_code_without_a_density() -> None:
    """Its KL would leave the auxiliary latent's entropy out."""
    match = "TraceMMD_ELBO: expected a density for site 'z' in the guide, got a point mass"
    with pytest.raises(ValueError, match=match):
        TraceMMD_ELBO(0.0, 1.0).loss(*transformed_pair(), torch.randn(4))


def test_codes_of_a_hierarchical_prior_are_no_training_data() -> None:
    norm = torch.nn.BatchNorm1d(2)
    zero = torch.zeros(2)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(zero, 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(norm(z2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z2", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(x, 1.0).to_event(1))

    objective = TraceMMD_ELBO(0.0, 5.0)
    objective.training_loss(model, guide, torch.randn(6, 2))
    assert norm.num_batches_tracked == 1
    assert norm.training


def test_a_latent_that_follows_another_in_some_batches() -> None:
    """Codes of the prior are drawn with what they follow, whatever was seen in between."""

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(2 * y, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("n", len(x)):
            given = pyro.sample("y", dist.Normal(x / 2, 0.5)) if y is None else y
            pyro.sample("z", dist.Normal(0.5 * x + given, 0.6))

    x, y = torch.randn(50), torch.randn(50)
    objective = TraceMMD_ELBO(0.0, 10.0, sites=["z"])
    losses = []
    for args in ((x,), (x, y), (x,)):
        pyro.set_rng_seed(0)
        losses.append(float(objective.training_loss(model, guide, *args).detach()))
    assert losses[0] == losses[2]
