"""DIP-VAE: covariances by loops, and the law of total covariance."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes
from torch.distributions import Normal, kl_divergence

from pyro_vae.guides import AmortizedMultivariateNormal
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceDIP_ELBO

close = torch.testing.assert_close


def penalty(covariance: torch.Tensor, off_diagonal: float, diagonal: float) -> torch.Tensor:
    total = torch.zeros(())
    for i in range(len(covariance)):
        for j in range(len(covariance)):
            if i == j:
                total = total + diagonal * (covariance[i, j] - 1) ** 2
            else:
                total = total + off_diagonal * covariance[i, j] ** 2
    return total


@pytest.mark.parametrize("kind", ["I", "II"])
def test_value_and_gradient_against_loops(kind: Any) -> None:
    p = LinearCodes()
    z = p.codes(p.x, 7)
    loc, scale = p.moments(p.x)
    covariance = torch.zeros(3, 3)
    for row in loc:
        covariance = covariance + torch.outer(row - loc.mean(0), row - loc.mean(0)) / len(loc)
    if kind == "II":
        for row in scale:
            covariance = covariance + torch.diag(row**2) / len(loc)
    elbo = Normal(z @ p.params["weight"], 0.7).log_prob(p.x).sum()
    elbo = elbo - kl_divergence(Normal(loc, scale), p.prior(z)).sum()
    expected = p.with_gradient(len(loc) * penalty(covariance, 2.5, 4.0) - elbo)
    close(p.of(TraceDIP_ELBO(2.5, 4.0, kind=kind).training_loss, 7), expected)


def test_one_weight_at_a_time() -> None:
    p = LinearCodes()
    zero, off, on, both = (
        p.of(TraceDIP_ELBO(*weights).training_loss, 7)["loss"]
        for weights in [(0, 0), (2.0, 0), (0, 3.0), (2.0, 3.0)]
    )
    assert off > zero
    assert on > zero
    close(both - zero, (off - zero) + (on - zero))


def joint_pair(grouped: bool) -> tuple[Any, Any]:
    """A jointly normal latent of 4 elements, or two independent ones of 2 in one site."""
    factor = torch.randn(2, 2, 2).tril() + 2 * torch.eye(2)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            if grouped:
                fn = dist.MultivariateNormal(x.reshape(-1, 2, 2), scale_tril=factor).to_event(1)
            else:
                tril = torch.block_diag(*factor).expand(len(x), 4, 4)
                fn = dist.MultivariateNormal(x, scale_tril=tril)
            pyro.sample("z", fn)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            shape = (2, 2) if grouped else (4,)
            z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
            pyro.sample("x", dist.Normal(0 * z.reshape(-1, 4), 1.0).to_event(1), obs=x)

    return model, guide


@pytest.mark.parametrize("grouped", [False, True])
def test_joint_normals_against_many_codes(grouped: bool) -> None:
    """Kind II is the covariance of the codes, whatever their distribution given a datum."""
    model, guide = joint_pair(grouped)
    x, num = torch.randn(5, 4), 40_000
    objective = TraceDIP_ELBO(1.0, 1.0, kind="II")
    pyro.set_rng_seed(0)
    value = objective.training_loss(model, guide, x)
    pyro.set_rng_seed(0)
    value = (value - TraceDIP_ELBO(0, 0).training_loss(model, guide, x)) / 5
    trace = pyro.poutine.trace(guide).get_trace(x)
    codes = trace.nodes["z"]["fn"].sample(torch.Size([num])).reshape(num * 5, 4)
    # Penalties of many halves: their spread is the error.
    halves = torch.stack([penalty(part.T.cov(), 1.0, 1.0) for part in codes.chunk(40)])
    error = halves.std() / 40**0.5
    assert abs(halves.mean() - value) < 5 * error
    exact = torch.block_diag(*[f @ f.T for f in _factors(guide, x, grouped)])
    centered = x - x.mean(0)
    close(value, penalty(centered.T @ centered / 5 + exact, 1.0, 1.0))


def _factors(guide: Any, x: torch.Tensor, grouped: bool) -> list[torch.Tensor]:
    fn = pyro.poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    if grouped:
        return list(fn.base_dist.scale_tril[0])
    return [fn.scale_tril[0]]


def test_kinds_of_a_joint_normal() -> None:
    model, guide = LinearGaussian(5, 2), AmortizedMultivariateNormal(MLP(5, [], 5), 2)
    x = torch.randn(7, 5)
    losses = []
    for kind in ("I", "II"):
        pyro.set_rng_seed(0)
        losses.append(TraceDIP_ELBO(1.0, 1.0, kind=kind).training_loss(model, guide, x))
    assert not torch.allclose(*losses)


def test_several_sites_lie_along_the_diagonal() -> None:
    """One site of two independent parts is two sites."""
    x = torch.randn(6, 4)

    def loss(split: bool) -> torch.Tensor:
        def draw(loc: torch.Tensor, scale: torch.Tensor, rows: Any) -> None:
            with rows:
                if split:
                    pyro.sample("u", dist.Normal(loc[..., :1], scale[:1]).to_event(1))
                    pyro.sample("v", dist.Normal(loc[..., 1:], scale[1:]).to_event(1))
                else:
                    pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        def model(x: torch.Tensor) -> None:
            rows = pyro.plate("rows", len(x))
            draw(torch.zeros(4), torch.ones(4), rows)
            with rows:
                pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            scale = torch.tensor([0.5, 0.6, 0.7, 0.8])
            draw(0.7 * x, scale, pyro.plate("rows", len(x)))

        return TraceDIP_ELBO(2.0, 3.0, kind="II").training_loss(model, guide, x)

    close(loss(True), loss(False))


def test_arguments_that_are_none_of_ours() -> None:
    with pytest.raises(ValueError, match="expected kind 'I' or 'II', got 'III'"):
        TraceDIP_ELBO(1.0, 1.0, kind="III")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a finite off_diagonal >= 0, got -1"):
        TraceDIP_ELBO(-1.0, 1.0)
    with pytest.raises(ValueError, match="expected a finite diagonal >= 0, got -1"):
        TraceDIP_ELBO(1.0, -1.0)


def refuse(fn: Any, kind: Any, match: str) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", fn)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=match):
        TraceDIP_ELBO(1.0, 1.0, kind=kind).loss(model, guide, torch.zeros(3, 2))


def test_guides_without_moments() -> None:
    normal = dist.Normal(torch.zeros(2), 1.0)
    flow = dist.TransformedDistribution(normal, dist.transforms.Planar(2))
    refuse(flow, "I", "whose mean and variance have formulas, got TransformedDistribution at")
    cauchy = dist.Cauchy(torch.zeros(2), 1.0).to_event(1)
    refuse(cauchy, "I", "expected finite means and variances, got Cauchy at site 'z'")
    heavy = dist.StudentT(torch.tensor(1.5), torch.zeros(2), 1.0).to_event(1)
    refuse(heavy, "II", "expected finite means and variances, got StudentT at site 'z'")
    heavy = dist.MultivariateStudentT(torch.tensor(5.0), torch.zeros(2), torch.eye(2))
    refuse(heavy, "II", "independent elements or a MultivariateNormal, got MultivariateStudentT")
