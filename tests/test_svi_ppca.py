"""SVI reaches what probabilistic PCA says exactly: likelihood, noise and subspace."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy.linalg import subspace_angles

from pyro_vae import fit
from pyro_vae.baselines import (
    LinearGaussianFit,
    factor_analysis_em,
    gaussian,
    gaussian_mixture_em,
    ppca,
)
from pyro_vae.guides import AmortizedNormal, ExactLinearGaussian
from pyro_vae.models import GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP

NUM_ROWS, DATA_DIM, LATENT_DIM = 500, 6, 2
LOC = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, 0.0])


def data() -> torch.Tensor:
    loadings = torch.linalg.qr(torch.randn(DATA_DIM, LATENT_DIM)).Q * torch.tensor([3.0, 1.5])
    z = torch.randn(NUM_ROWS, LATENT_DIM)
    return z @ loadings.T + LOC.to(z) + 0.7 * torch.randn(NUM_ROWS, DATA_DIM)


def cosine(lr: float, num_steps: int) -> pyro.optim.PyroLRScheduler:
    return pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": lr},
            "lr_lambda": lambda step: (1 + math.cos(math.pi * step / num_steps)) / 2,
        }
    )


def exact_elbo(model: LinearGaussian, guide: AmortizedNormal, x: torch.Tensor) -> torch.Tensor:
    """The bound without Monte Carlo: both expectations are known under a normal guide."""
    q = guide.encoder(x)
    mean = q.mean @ model.weight.T + model.loc
    fitted = dist.Normal(mean, model.log_scale.exp()).log_prob(x).sum(-1)
    spread = (model.weight.square().sum(0) * q.variance).sum(-1) / model.noise_variance[0] / 2
    kl = (q.variance + q.mean.square() - 1 - q.variance.log()).sum(-1) / 2
    return (fitted - spread - kl).mean()


def assert_close_to_ppca(
    model: LinearGaussian, best: LinearGaussianFit, *, noise: float, degrees: float
) -> None:
    noise_variance = model.noise_variance.detach()
    assert noise_variance.tolist() == pytest.approx(best.noise_variance.tolist(), rel=noise)
    angles = subspace_angles(model.weight.detach().numpy(), best.weight.numpy())
    assert math.degrees(angles.max()) < degrees


def test_amortized_guide_reaches_ppca() -> None:
    x = data()
    best = ppca(x, LATENT_DIM)
    optimum = best.log_prob(x).mean().item()
    model = LinearGaussian(DATA_DIM, LATENT_DIM)
    guide = AmortizedNormal(MLP(DATA_DIM, [], 2 * LATENT_DIM))
    assert exact_elbo(model, guide, x).item() < optimum - 1

    num_steps = 1500
    optimizer = cosine(0.03, num_steps)
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    history = fit(svi, [x], num_steps, schedules=[optimizer], progress=False)

    with torch.no_grad():
        elbo, log_likelihood = exact_elbo(model, guide, x).item(), model.log_prob(x).mean().item()
    assert elbo <= log_likelihood <= optimum + 1e-12
    assert elbo > optimum - 5e-3  # Nats per datum.
    assert -history.loss[-1] == pytest.approx(optimum, abs=0.2)
    assert_close_to_ppca(model, best, noise=0.02, degrees=1)
    # A diagonal guide is tight for orthogonal columns only: the rotation is learnt as well.
    correlation = torch.nn.functional.cosine_similarity(*model.weight.detach().T, dim=0)
    assert abs(correlation.item()) < 0.05


def test_gradient_with_the_exact_guide_is_exact_for_a_single_sample() -> None:
    x = data()
    model = LinearGaussian(DATA_DIM, LATENT_DIM)
    with torch.no_grad():
        model.loc.normal_()
        model.log_scale.fill_(-0.3)
    guide = ExactLinearGaussian(model)
    params = list(model.parameters())
    exact = torch.autograd.grad(model.log_prob(x).sum(), params)
    for _ in range(3):
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        assert loss.item() == pytest.approx(-model.log_prob(x).sum().item(), rel=1e-12)
        for ours, theirs in zip(torch.autograd.grad(loss, params), exact, strict=True):
            torch.testing.assert_close(-ours, theirs, rtol=1e-8, atol=1e-8)


def test_exact_guide_reaches_ppca() -> None:
    x = data()
    best = ppca(x, LATENT_DIM)
    model = LinearGaussian(DATA_DIM, LATENT_DIM)
    num_steps = 600
    optimizer = cosine(0.05, num_steps)
    svi = SVI(model, ExactLinearGaussian(model), optimizer, Trace_ELBO())
    first = -model.log_prob(x).mean().item()
    history = fit(svi, [x], num_steps, schedules=[optimizer], progress=False)
    assert history.loss[0] == pytest.approx(first, rel=1e-12)
    assert -history.loss[-1] == pytest.approx(best.log_prob(x).mean().item(), abs=1e-6)
    assert_close_to_ppca(model, best, noise=1e-3, degrees=0.1)


def test_linear_gaussian_from_ppca() -> None:
    x = data()
    best = ppca(x, LATENT_DIM)
    model = LinearGaussian.from_fit(best)
    assert model.log_scale.shape == ()
    torch.testing.assert_close(model.log_prob(x).detach(), best.log_prob(x), rtol=1e-12, atol=0)
    mean = model.posterior(x).mean.detach()
    torch.testing.assert_close(mean, best.posterior(x).mean, rtol=1e-10, atol=1e-12)


def test_linear_gaussian_from_factor_analysis() -> None:
    x = data() * torch.linspace(0.5, 2, DATA_DIM)
    best = factor_analysis_em(x, LATENT_DIM, num_steps=50)
    model = LinearGaussian.from_fit(best, name="fa")
    assert model.log_scale.shape == (DATA_DIM,)
    torch.testing.assert_close(model.log_prob(x).detach(), best.log_prob(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_gaussian_mixture_from_em(covariance: str) -> None:
    x = torch.cat([data(), data() + 4])
    best = gaussian_mixture_em(x, 3, covariance=covariance, num_steps=20)  # type: ignore[arg-type]
    model = GaussianMixture.from_fit(best)
    torch.testing.assert_close(model.log_prob(x).detach(), best.log_prob(x), rtol=1e-9, atol=1e-9)
    probs = model.posterior(x).probs.detach()
    torch.testing.assert_close(probs, best.posterior(x).probs, rtol=0, atol=1e-9)


def test_gaussian_mixture_from_one_gaussian() -> None:
    x = data()
    best = gaussian(x)
    log_prob = GaussianMixture.from_fit(best).log_prob(x).detach()
    torch.testing.assert_close(log_prob, best.log_prob(x), rtol=1e-9, atol=1e-9)
