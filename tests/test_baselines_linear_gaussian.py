import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyro_vae.baselines import LinearGaussianFit
from pyro_vae.baselines.linear_gaussian import marginal, posterior, posterior_factors


def parameters(noise_variance: float, *, num_columns: int = 7, latent_dim: int = 3) -> list[Tensor]:
    loc = torch.randn(num_columns)
    weight = torch.randn(num_columns, latent_dim)
    return [loc, weight, noise_variance * (0.5 + torch.rand(num_columns))]


def draw(num_rows: int, loc: Tensor, weight: Tensor, noise_variance: Tensor) -> Tensor:
    z = torch.randn(num_rows, weight.shape[1])
    return loc + z @ weight.mT + torch.randn(num_rows, len(loc)) * noise_variance.sqrt()


# The dense route itself is only good to about eps / noise_variance.
@pytest.mark.parametrize(
    ("noise_variance", "tolerance"), [(1.0, 1e-12), (1e-2, 1e-10), (1e-6, 1e-6)]
)
def test_marginal_agrees_with_dense_normal(noise_variance: float, tolerance: float) -> None:
    loc, weight, variance = parameters(noise_variance)
    x = draw(50, loc, weight, variance)
    dense = MultivariateNormal(loc, weight @ weight.mT + variance.diag())
    ours = marginal(loc, weight, variance)
    torch.testing.assert_close(ours.log_prob(x), dense.log_prob(x), rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.covariance_matrix, dense.covariance_matrix)
    torch.testing.assert_close(ours.variance, dense.variance)
    torch.testing.assert_close(ours.mean, dense.mean)


def test_marginal_keeps_its_digits_with_tiny_noise() -> None:
    # With W = (1, ..., 1)' / sqrt(D) the covariance has eigenvalues 1 + s and s, known exactly.
    num_columns, noise = 16, 1e-10
    weight = torch.full((num_columns, 1), 0.25)
    off_axis = torch.tensor([1.0, -1.0]).repeat(num_columns // 2) * 0.25
    x = torch.stack([2.0 * weight[:, 0], noise**0.5 * off_axis])
    exact = Normal(0.0, (1 + noise) ** 0.5).log_prob(torch.tensor([2.0, 0.0]))
    exact += Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 1.0]))
    exact += (num_columns - 2) * Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    exact -= (num_columns - 1) * torch.tensor(noise).sqrt().log()
    ours = marginal(torch.zeros(num_columns), weight, torch.tensor(noise)).log_prob(x)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)


def test_marginal_is_usable_in_float32_with_small_noise() -> None:
    exact = [value.float() for value in parameters(1e-6)]
    x = draw(50, *[value.double() for value in exact]).float()
    single = marginal(*exact).log_prob(x)
    double = marginal(*[value.double() for value in exact]).log_prob(x.double())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=0.05)


@pytest.mark.parametrize("noise_variance", [1.0, 1e-4])
def test_bayes_rule_holds_at_any_latent(noise_variance: float) -> None:
    loc, weight, variance = parameters(noise_variance)
    x = draw(20, loc, weight, variance)
    given_x = posterior(x, loc, weight, variance)
    for z in (given_x.sample(), given_x.mean + 0.1, given_x.mean):
        log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_likelihood = Normal(loc + z @ weight.mT, variance.sqrt()).log_prob(x).sum(-1)
        log_evidence = log_prior + log_likelihood - given_x.log_prob(z)
        expected = marginal(loc, weight, variance).log_prob(x)
        torch.testing.assert_close(log_evidence, expected, rtol=1e-10, atol=1e-10)


def test_posterior_agrees_with_conditioning_the_joint_normal() -> None:
    loc, weight, variance = parameters(0.3)
    x = draw(20, loc, weight, variance)
    inverse = torch.linalg.inv(weight @ weight.mT + variance.diag())
    given_x = posterior(x, loc, weight, variance)
    torch.testing.assert_close(given_x.mean, (x - loc) @ inverse @ weight)
    covariance = torch.eye(3) - weight.mT @ inverse @ weight
    torch.testing.assert_close(given_x.covariance_matrix, covariance.expand(20, 3, 3))
    assert given_x.batch_shape == (20,)
    assert given_x.event_shape == (3,)


def test_posterior_factors_are_triangular_with_positive_diagonal() -> None:
    _, weight, variance = parameters(0.3)
    _, scale_tril = posterior_factors(weight, variance)
    torch.testing.assert_close(scale_tril, scale_tril.tril(), rtol=0, atol=0)
    assert (scale_tril.diagonal() > 0).all()


def test_more_latents_than_columns() -> None:
    loc, weight, variance = parameters(0.3, num_columns=2, latent_dim=4)
    x = draw(5, loc, weight, variance)
    dense = MultivariateNormal(loc, weight @ weight.mT + variance.diag())
    torch.testing.assert_close(marginal(loc, weight, variance).log_prob(x), dense.log_prob(x))
    assert posterior(x, loc, weight, variance).mean.shape == (5, 4)


@pytest.mark.parametrize("batch_shape", [(), (4,), (3, 4), (2, 1, 5)])
def test_any_leading_dimensions(batch_shape: tuple[int, ...]) -> None:
    loc, weight, variance = parameters(0.3)
    x = torch.randn(*batch_shape, 7)
    log_prob = marginal(loc, weight, variance).log_prob(x)
    mean = posterior(x, loc, weight, variance).mean
    assert log_prob.shape == batch_shape
    assert mean.shape == (*batch_shape, 3)
    flat = x.reshape(-1, 7)
    torch.testing.assert_close(
        log_prob.flatten(), marginal(loc, weight, variance).log_prob(flat).flatten()
    )
    torch.testing.assert_close(
        mean.reshape(-1, 3), posterior(flat, loc, weight, variance).mean.reshape(-1, 3)
    )


def test_scalar_noise_variance_stands_for_all_columns() -> None:
    loc, weight, _ = parameters(1.0)
    x, scalar = torch.randn(5, 7), torch.tensor(0.3)
    vector = scalar.repeat(7)
    torch.testing.assert_close(
        marginal(loc, weight, scalar).log_prob(x), marginal(loc, weight, vector).log_prob(x)
    )
    torch.testing.assert_close(
        posterior(x, loc, weight, scalar).mean, posterior(x, loc, weight, vector).mean
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    loc, weight, variance = [value.to(dtype) for value in parameters(0.3)]
    x = torch.randn(5, 7, dtype=dtype)
    assert marginal(loc, weight, variance).log_prob(x).dtype == dtype
    assert marginal(loc, weight, variance).rsample((2,)).dtype == dtype
    assert posterior(x, loc, weight, variance).mean.dtype == dtype


def test_gradients() -> None:
    inputs = [torch.randn(3, 7), *parameters(0.3)]
    for value in inputs:
        value.requires_grad_()

    def log_prob(x: Tensor, *params: Tensor) -> Tensor:
        return marginal(*params).log_prob(x)

    def moments(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        given_x = posterior(x, *params)
        return given_x.mean, given_x.scale_tril

    assert torch.autograd.gradcheck(log_prob, inputs)
    assert torch.autograd.gradcheck(moments, inputs)
    sample = marginal(*inputs[1:]).rsample((4,))
    assert sample.requires_grad


def test_samples_have_the_moments_of_the_model() -> None:
    loc, weight, variance = parameters(0.3)
    fit = LinearGaussianFit(loc, weight, variance, torch.empty(0))
    num_samples = 20_000
    x = fit.sample(num_samples)
    covariance = weight @ weight.mT + variance.diag()
    mean_error = (covariance.diagonal() / num_samples).sqrt()
    assert ((x.mean(0) - loc).abs() < 5 * mean_error).all()
    # For a Normal, the variance of an entry of the sample covariance is (C_ij^2 + C_ii C_jj) / n.
    diagonal = covariance.diagonal()
    covariance_error = ((covariance.square() + diagonal.outer(diagonal)) / num_samples).sqrt()
    assert ((x.mT.cov() - covariance).abs() < 5 * covariance_error).all()


def test_fit_accepts_any_dtype() -> None:
    fit = LinearGaussianFit(*parameters(0.3), torch.empty(0))
    x = torch.randint(-3, 3, (5, 7))
    torch.testing.assert_close(fit.log_prob(x), fit.log_prob(x.double()))
    torch.testing.assert_close(fit.posterior(x.float()).mean, fit.posterior(x.double()).mean)


def test_shapes_that_do_not_fit_are_refused() -> None:
    loc, weight, variance = parameters(0.3)
    with pytest.raises(ValueError, match=r"expected `weight` of shape \(D, L\), got \(7,\)"):
        marginal(loc, weight[:, 0], variance)
    with pytest.raises(ValueError, match=r"`loc` of shape \(3,\) .* got \(7,\). Transpose"):
        marginal(loc, weight.mT, variance)
    with pytest.raises(ValueError, match=r"`noise_variance` of shape \(\) or \(7,\), got \(6,\)"):
        posterior(loc, loc, weight, variance[1:])
    with pytest.raises(ValueError, match=r"posterior: expected data of shape \(\*batch, 7\)"):
        posterior(torch.zeros(2, 6), loc, weight, variance)
    with pytest.raises(ValueError, match=r"expected data of shape \(\*batch, 7\), got \(\)"):
        marginal(loc, weight, variance).log_prob(torch.tensor(0.0))


def test_validation_refuses_values_outside_the_domain() -> None:
    loc, weight, variance = parameters(0.3)
    with pytest.raises(ValueError, match="noise_variance"):
        marginal(loc, weight, -variance)
    with pytest.raises(ValueError, match="within the support"):
        marginal(loc, weight, variance).log_prob(torch.full((2, 7), torch.nan))
