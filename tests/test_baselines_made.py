import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_vae.baselines import MADE, fit_made

MIN_SCALE = 1e-3


def binary_vectors(size: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)))


def scrambled(made: MADE) -> MADE:
    """With weights large enough for conditionals far from one another."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def inverse_softplus(y: Tensor) -> Tensor:
    return y.expm1().log()


def gaussian_made(loc: Tensor, scale_tril: Tensor) -> MADE:
    """N(loc, L L') with linear conditionals, written into the weights by hand.

    x_i = loc_i + sum_{j < i} L_ij e_j + L_ii e_i, and e = L^-1 (x - loc).
    """
    size = len(loc)
    made = MADE(size, [], num_components=1, min_scale=MIN_SCALE)
    regression = scale_tril.tril(-1) @ torch.linalg.inv(scale_tril)
    weight, bias = torch.zeros(size, 3, size), torch.zeros(size, 3)
    weight[:, 1] = regression
    bias[:, 1] = loc - regression @ loc
    bias[:, 2] = inverse_softplus(scale_tril.diagonal() - MIN_SCALE)
    layer: Any = made.net.layers[0]
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(0, 1))
        layer.bias.copy_(bias.flatten())
    return made


def correlated_normal(size: int) -> MultivariateNormal:
    root = torch.randn(size, size).tril(-1) + torch.diag(0.5 + torch.rand(size))
    return MultivariateNormal(torch.randn(size), scale_tril=root)


# The density.


@pytest.mark.parametrize("hidden", [[], [5], [16, 9]])
def test_binary_probabilities_sum_to_one(hidden: list[int]) -> None:
    made = scrambled(MADE(6, hidden))
    log_prob = made.log_prob(binary_vectors(6))
    assert log_prob.shape == (64,)
    torch.testing.assert_close(log_prob.logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-12)
    assert log_prob.std() > 0.5


def test_binary_conditionals_are_those_of_the_joint() -> None:
    made = scrambled(MADE(4, [8]))
    x = binary_vectors(4)
    joint = made.log_prob(x).exp().reshape(2, 2, 2, 2).detach()
    logits = made.net(x).squeeze(-1).reshape(2, 2, 2, 2, 4)
    for index in range(4):
        marginal = joint.sum(list(range(index + 1, 4)), keepdim=True) if index < 3 else joint
        conditional = marginal / marginal.sum(index, keepdim=True)
        expected = conditional.select(index, 1)
        # Whatever the later variables are.
        actual = logits[..., index].sigmoid().select(index, 0)
        torch.testing.assert_close(actual.detach(), expected.expand_as(actual))


@pytest.mark.parametrize("num_components", [1, 3])
def test_density_in_the_plane_integrates_to_one(num_components: int) -> None:
    made = scrambled(MADE(2, [8], num_components=num_components, min_scale=0.3))
    made.loc.copy_(torch.tensor([1.0, -2.0]))
    made.scale.copy_(torch.tensor([0.5, 3.0]))
    # Steps well below the smallest scale, as far as there is anything: sums are exact.
    u = torch.linspace(-20, 20, 300)
    v = torch.linspace(-60, 60, 900)
    grid = torch.cartesian_prod(u, v)
    cell = (u[1] - u[0]) * (v[1] - v[0]) * made.scale.prod()
    with torch.no_grad():
        total = made.log_prob(made.loc + made.scale * grid).exp().sum() * cell
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=0, atol=1e-6)


def test_linear_gaussian_conditionals_are_the_exact_normal() -> None:
    normal = correlated_normal(5)
    made = gaussian_made(normal.loc, normal.scale_tril)
    x = 3 * torch.randn(50, 5)
    torch.testing.assert_close(made.log_prob(x), normal.log_prob(x), rtol=1e-10, atol=1e-10)


def test_units_change_the_density_by_their_jacobian() -> None:
    normal = correlated_normal(3)
    made = gaussian_made(normal.loc, normal.scale_tril)
    loc, scale = torch.randn(3), torch.tensor([0.1, 2.0, 30.0])
    made.loc.copy_(loc)
    made.scale.copy_(scale)
    moved = MultivariateNormal(
        loc + scale * normal.loc, scale_tril=scale.diag() @ normal.scale_tril
    )
    x = moved.sample(torch.Size([20]))
    torch.testing.assert_close(made.log_prob(x), moved.log_prob(x))


def test_mixtures_by_hand() -> None:
    made = scrambled(MADE(3, [4], num_components=2))
    x = torch.randn(7, 3)
    logits, loc, raw_scale = made.net(x).split(2, dim=-1)
    scale = torch.nn.functional.softplus(raw_scale) + MIN_SCALE
    z = (x.unsqueeze(-1) - loc) / scale
    density = (-z.square() / 2).exp() / (scale * math.sqrt(2 * math.pi))
    expected = (logits.softmax(-1) * density).sum(-1).log().sum(-1)
    torch.testing.assert_close(made.log_prob(x), expected)


def test_log_prob_has_gradients_and_takes_one_row() -> None:
    made = MADE(3, [8], num_components=2, activation=nn.Tanh)
    x = torch.randn(4, 3)
    torch.testing.assert_close(made.log_prob(x)[:1], made.log_prob(x[:1]))
    made.log_prob(x).sum().backward()
    assert all((parameter.grad != 0).any() for parameter in made.parameters())


def test_one_variable() -> None:
    made = MADE(1, [])
    with torch.no_grad():
        made.net.layers[0].bias.fill_(math.log(3))
    expected = torch.tensor([0.25, 0.75]).log()
    torch.testing.assert_close(made.log_prob(torch.tensor([[0.0], [1.0]])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_components", [None, 2])
def test_dtype_is_that_of_the_network(dtype: torch.dtype, num_components: int | None) -> None:
    made = MADE(3, [4], num_components=num_components).to(dtype)
    x = made.sample(5)
    assert x.dtype == made.log_prob(x).dtype == made.log_prob(x.int()).dtype == dtype
    torch.testing.assert_close(made.log_prob(x.double()), made.log_prob(x))


@pytest.mark.parametrize("num_components", [None, 2])
def test_bool_data(num_components: int | None) -> None:
    x = binary_vectors(3)
    made = scrambled(MADE(3, [4], num_components=num_components))
    assert torch.equal(made.log_prob(x.bool()), made.log_prob(x))


def test_state_dict_holds_the_units() -> None:
    made, other = (scrambled(MADE(3, [4], num_components=2)) for _ in range(2))
    made.scale.mul_(3.0)
    other.load_state_dict(made.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(made.log_prob(x), other.log_prob(x))


# Samples.


def test_binary_samples_have_the_probabilities_of_the_density() -> None:
    made = scrambled(MADE(4, [8]))
    num = 20_000
    x = made.sample(num)
    assert not x.requires_grad
    probs = made.log_prob(binary_vectors(4)).exp().detach()
    index = (x @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
    frequency = torch.bincount(index, minlength=16) / num
    standard_error = (probs * (1 - probs) / num).sqrt()
    assert ((frequency - probs).abs() < 5 * standard_error + 1 / num).all()


def test_real_samples_have_the_moments_of_the_normal() -> None:
    normal = correlated_normal(3)
    made = gaussian_made(normal.loc, normal.scale_tril)
    made.loc.copy_(torch.tensor([10.0, 0.0, -10.0]))
    made.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    num = 20_000
    x = (made.sample(num) - made.loc) / made.scale
    variance = normal.covariance_matrix.diagonal()
    assert ((x.mean(0) - normal.loc).abs() < 5 * (variance / num).sqrt()).all()
    covariance = normal.covariance_matrix
    # Of a sample covariance of normals: (c_ii c_jj + c_ij^2) / n.
    standard_error = ((torch.outer(variance, variance) + covariance.square()) / num).sqrt()
    assert ((x.mT.cov() - covariance).abs() < 5 * standard_error).all()


def test_samples_of_mixtures_have_the_moments_of_the_first_conditional() -> None:
    made = scrambled(MADE(2, [4], num_components=3))
    num = 20_000
    x = made.sample(num)[:, 0]
    logits, loc, raw_scale = made.net(torch.zeros(1, 2))[0, 0].detach().chunk(3)
    weights, scale = logits.softmax(0), torch.nn.functional.softplus(raw_scale) + MIN_SCALE
    mean = (weights * loc).sum()
    variance = (weights * (scale**2 + loc**2)).sum() - mean**2
    assert abs(x.mean() - mean) < 5 * (variance / num).sqrt()
    fourth = (x - x.mean()).pow(4).mean() - variance**2
    assert abs(x.var() - variance) < 5 * (fourth / num).sqrt()


def test_sampling_is_without_dropout_and_leaves_the_mode() -> None:
    class Drop(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.tanh())

    made = MADE(3, [8], num_components=1, activation=Drop)
    made.train()
    torch.manual_seed(1)
    x = made.sample(4)
    assert all(module.training for module in made.modules())
    made.eval()
    torch.manual_seed(1)
    assert torch.equal(made.sample(4), x)


def test_sample_checks_the_number() -> None:
    made = MADE(3, [4])
    assert made.sample(0).shape == (0, 3)
    with pytest.raises(ValueError, match="MADE: expected `num_samples` of at least 0, got -1"):
        made.sample(-1)
    with pytest.raises(TypeError, match="MADE: expected an integer `num_samples`, got float"):
        made.sample(2.5)  # type: ignore[arg-type]


# Training.


def test_fit_comes_to_the_likelihood_of_the_exact_normal() -> None:
    normal = correlated_normal(3)
    x, x_test = normal.sample(torch.Size([2000])), normal.sample(torch.Size([2000]))
    made = MADE(3, [], num_components=1)
    before = made.log_prob(x_test).mean()
    made = fit_made(100 * x, made, num_epochs=30, lr=0.03)
    gap = normal.log_prob(x_test) - 3 * math.log(100) - made.log_prob(100 * x_test)
    # Nine parameters from 1,800 rows cost about 9 / (2 * 1800) nats.
    assert 0 < gap.mean() < 0.02
    assert made.log_prob(100 * x_test).mean() + 3 * math.log(100) > before
    assert not any(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_fit_finds_what_no_product_of_bernoullis_can() -> None:
    # The third variable is the parity of the first two.
    x = torch.randint(2, (1000, 3)).double()
    x[:, 2] = (x[:, 0] + x[:, 1]) % 2
    made = fit_made(x, MADE(3, [16]), num_epochs=60, lr=0.03)
    log_prob = made.log_prob(x).mean()
    assert abs(log_prob + 2 * math.log(2)) < 0.02
    assert made.log_likelihoods[0] < log_prob - 0.3


def test_the_best_epoch_is_kept() -> None:
    # So few rows that the last epochs know them by heart.
    x = torch.randn(40, 6)
    made = MADE(6, [64], num_components=3)
    torch.manual_seed(7)
    order = torch.randperm(40)
    torch.manual_seed(7)
    fit = fit_made(x, made, num_epochs=60, batch_size=10, lr=0.02, validation_fraction=0.25)
    assert fit is made
    assert fit.log_likelihoods.shape == (60,)
    assert fit.log_likelihoods.argmax() < 50
    assert fit.log_likelihoods[-1] < fit.log_likelihoods.max() - 1.0
    apart, rows = x[order[:10]], x[order[10:]]
    torch.testing.assert_close(fit.log_prob(apart).mean(), fit.log_likelihoods.max())
    torch.testing.assert_close(fit.loc, rows.mean(0))
    torch.testing.assert_close(fit.scale, rows.std(0, correction=0))


def test_batches_run_in_train_mode_and_the_rows_set_apart_in_eval_mode() -> None:
    class Spy(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((len(x), self.training))
            return super().forward(x)

    seen: list[tuple[int, bool]] = []
    made = MADE(3, [4], num_components=2, activation=Spy).eval()
    fit_made(torch.randn(50, 3), made, num_epochs=2, batch_size=30)
    assert seen == 2 * [(30, True), (15, True), (5, False)]


def test_fit_is_repeated_by_the_seed_and_leaves_the_data() -> None:
    x = torch.randn(50, 3, requires_grad=True)
    before = x.detach().clone()
    fits = []
    for _ in range(2):
        torch.manual_seed(3)
        fits.append(fit_made(x, MADE(3, [4], num_components=2), num_epochs=3, batch_size=20))
    assert torch.equal(fits[0].log_likelihoods, fits[1].log_likelihoods)
    assert torch.equal(x, before)
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_in_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    made = MADE(2, [4], num_components=2).to(dtype)
    fit = fit_made(torch.randn(30, 2).float().numpy(), made, num_epochs=2)
    assert all(value.dtype == dtype for value in fit.state_dict().values())


def test_data_far_from_zero_keep_their_digits_in_a_float32_network() -> None:
    x = torch.randn(100, 1) + 2.0**19  # Where float32 knows multiples of 1/16 only.
    fit = fit_made(x, MADE(1, [], num_components=2).float(), num_epochs=3)
    assert len(x.float().unique()) < 80
    assert len(fit.log_prob(x).unique()) > 90


def test_data_whose_spread_the_network_cannot_hold_are_refused() -> None:
    x = torch.randn(100, 2)
    x[:, 1] += 1e8
    made = MADE(2, [4], num_components=2).float()
    with pytest.raises(ValueError, match=r"fit_made: .* of torch.float32 .* from zero at \[1\]"):
        fit_made(x, made, num_epochs=3)
    assert torch.equal(made.loc, torch.zeros(2).float())
    samples = fit_made(x, made.double(), num_epochs=3).sample(1000)
    assert 0.3 < samples[:, 1].std() < 3.0


def test_binary_data_are_not_standardised() -> None:
    x = torch.ones(20, 3)  # Constant columns are fine for probabilities.
    fit = fit_made(x, MADE(3, [4]), num_epochs=2)
    assert torch.equal(fit.loc, torch.zeros(3))
    assert torch.equal(fit.scale, torch.ones(3))


@pytest.mark.parametrize("fraction", [1e-6, 0.999])
def test_at_least_one_row_on_each_side(fraction: float) -> None:
    x = torch.randint(2, (5, 2)).double()
    assert len(
        fit_made(x, MADE(2, [4]), num_epochs=2, validation_fraction=fraction).log_likelihoods
    )


# Errors.


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="MADE: expected `num_components` of at least 1, got 0"):
        MADE(3, [4], num_components=0)
    with pytest.raises(TypeError, match="MADE: expected an integer `num_components`, got float"):
        MADE(3, [4], num_components=2.0)  # type: ignore[arg-type]
    for min_scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"expected a positive, finite .* got {min_scale}"):
            MADE(3, [4], min_scale=min_scale)
    with pytest.raises(ValueError, match="expected hidden >= 2, got 1"):
        MADE(3, [1])


@pytest.mark.parametrize("num_components", [None, 2])
def test_log_prob_refuses(num_components: int | None) -> None:
    made = MADE(3, [4], num_components=num_components)
    for shape in ((3,), (5, 2), (2, 5, 3)):
        with pytest.raises(ValueError, match=r"MADE: expected data of shape \(N, 3\), got"):
            made.log_prob(torch.zeros(shape))
    x = torch.zeros(2, 3)
    x[0] = torch.tensor([torch.nan, torch.inf, 0.0])
    with pytest.raises(ValueError, match="MADE: expected finite data, got 2 NaN or infinite of 6"):
        made.log_prob(x)


def test_grey_values_are_no_binary_data() -> None:
    x = torch.rand(20, 3)
    x[0, :2] = torch.tensor([0.0, 2.0])
    with pytest.raises(ValueError, match="MADE: expected binary data of 0 and 1, .* from 0 to 2"):
        MADE(3, [4]).log_prob(x)
    with pytest.raises(ValueError, match="MADE: expected binary data"):
        fit_made(x, MADE(3, [4]))


def test_fit_refuses_data() -> None:
    x, made = torch.randn(20, 3), MADE(3, [4], num_components=2)
    with pytest.raises(ValueError, match=r"fit_made: expected `x` of shape .* got \(3,\)"):
        fit_made(x[0], made)
    with pytest.raises(ValueError, match="fit_made: expected at least 2 rows in `x`, got 1"):
        fit_made(x[:1], made)
    with pytest.raises(ValueError, match=r"MADE: expected data of shape \(N, 3\), got \(20, 2\)"):
        fit_made(x[:, :2], made)
    with pytest.raises(ValueError, match="fit_made: expected `x` to be finite, got 20 NaN"):
        fit_made(torch.cat([x[:, :2], x[:, :1] * torch.nan], 1), made)
    x[:, 1] = 0.5
    with pytest.raises(ValueError, match=r"fit_made: .* in the 18 rows .* constant ones at \[1\]"):
        fit_made(x, made)


def test_fit_refuses_settings() -> None:
    x, made = torch.randn(20, 3), MADE(3, [4], num_components=2)
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(
            ValueError,
            match=rf"fit_made: expected `validation_fraction` in \(0, 1\), got {fraction}",
        ):
            fit_made(x, made, validation_fraction=fraction)
    with pytest.raises(ValueError, match="fit_made: expected `num_epochs` of at least 1, got 0"):
        fit_made(x, made, num_epochs=0)
    with pytest.raises(ValueError, match="fit_made: expected a positive, finite `lr`, got 0.0"):
        fit_made(x, made, lr=0.0)
    with pytest.raises(ValueError, match="fit_made: expected networks with parameters to train"):
        fit_made(x, MADE(3, [4], num_components=2).requires_grad_(False))


def test_diverging_training_is_reported() -> None:
    x = torch.randn(20, 3)
    with pytest.raises(
        FloatingPointError, match="fit_made: expected a finite loss, got .* epoch 1"
    ):
        fit_made(x, MADE(3, [4], num_components=2), lr=1e200, batch_size=5)
    with pytest.raises(
        FloatingPointError, match="finite log-likelihood of the rows set apart, got .* in epoch 1"
    ):
        fit_made(x, MADE(3, [4], num_components=2), lr=1e200, batch_size=20)
