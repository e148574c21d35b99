"""Mixtures of normals: densities by hand, gradients of samples against closed forms."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.mixtures import FixedNormalMixture, NormalMixture, stratified_components

LOC = torch.tensor([[0.5, -0.3, 1.0], [-0.6, 0.8, 0.2]], dtype=torch.float64)
SCALE = torch.tensor([[0.7, 1.2, 0.5], [1.0, 0.5, 0.9]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.4], dtype=torch.float64)


def mixture(loc: torch.Tensor, scale: torch.Tensor, logits: torch.Tensor) -> NormalMixture:
    return NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_moments(dtype: torch.dtype) -> None:
    loc, scale, logits = LOC.to(dtype), SCALE.to(dtype), LOGITS.to(dtype)
    q = mixture(loc, scale, logits)
    z = torch.randn(6, 3, dtype=dtype)
    by_hand = torch.stack(
        [
            dist.Normal(loc[k], scale[k]).log_prob(z).sum(-1) + logits.log_softmax(-1)[k]
            for k in (0, 1)
        ]
    ).logsumexp(0)
    torch.testing.assert_close(q.log_prob(z), by_hand)
    weights = logits.softmax(-1).unsqueeze(-1)
    torch.testing.assert_close(q.mean, (weights * loc).sum(0))
    many = q.expand((4, 6))
    assert isinstance(many, NormalMixture)
    assert many.rsample().shape == (4, 6, 3)
    assert many.rsample().dtype == dtype
    assert many.rsample((2,)).shape == (2, 4, 6, 3)
    torch.testing.assert_close(many.log_prob(z), by_hand.expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_samples_are_those_of_the_expectation(dtype: torch.dtype) -> None:
    """Of E[z1 z2 z3 + z1^2 z2 + z3^2], known in closed form; one sample per row."""
    num = 50_000
    parameters = [t.to(dtype, copy=True).requires_grad_() for t in (LOC, SCALE, LOGITS)]
    loc, scale, logits = parameters
    terms = loc.prod(-1) + (loc**2 + scale**2)[:, 0] * loc[:, 1] + (loc**2 + scale**2)[:, 2]
    exact = torch.autograd.grad((logits.softmax(-1) * terms).sum(), parameters)
    rows = [t.detach().expand(num, *t.shape).clone().requires_grad_() for t in parameters]
    z = mixture(*rows).rsample()
    value = z.prod(-1) + z[:, 0] ** 2 * z[:, 1] + z[:, 2] ** 2
    for expected, rowwise in zip(exact, torch.autograd.grad(value.sum(), rows), strict=True):
        error = 5 * rowwise.std(0) / math.sqrt(num)
        assert (rowwise.mean(0) - expected).abs().le(error).all()
        assert error.max() < 0.15


def test_gradients_of_one_latent_invert_the_distribution_function() -> None:
    """In one dimension dz = -dF / density, here by finite differences."""
    parameters = [t.detach().clone() for t in (LOC[:, :1], SCALE[:, :1], LOGITS)]

    def cdf(z: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
        loc, scale, logits = at
        return (logits.softmax(-1) * torch.special.ndtr((z - loc[:, 0]) / scale[:, 0])).sum()

    tracked = [t.clone().requires_grad_() for t in parameters]
    z = mixture(*tracked).rsample()
    gradients = torch.autograd.grad(z.sum(), tracked)
    value, step = z.detach(), 1e-6
    density = mixture(*parameters).log_prob(value).exp()
    for index, gradient in enumerate(gradients):
        for entry in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in parameters]
                moved[index].view(-1)[entry] += sign * step
                ends.append(cdf(value, *moved))
            expected = -(ends[0] - ends[1]) / (2 * step) / density
            assert float(gradient.reshape(-1)[entry]) == pytest.approx(float(expected), rel=1e-5)


def test_without_gradients_it_only_samples() -> None:
    q = mixture(*[t.clone().requires_grad_() for t in (LOC, SCALE, LOGITS)])
    with torch.no_grad():
        assert not q.rsample((3,)).requires_grad
    torch.manual_seed(3)
    with_gradients = q.rsample((1000,))
    torch.manual_seed(3)
    torch.testing.assert_close(with_gradients.detach(), q.sample((1000,)), rtol=0, atol=0)


def test_equal_components_have_finite_gradients() -> None:
    loc = torch.zeros(2, 3, requires_grad=True)
    mixture(loc, torch.ones(2, 3), torch.zeros(2)).rsample((50,)).square().sum().backward()
    assert loc.grad is not None
    assert loc.grad.isfinite().all()


def test_many_latents_in_float32() -> None:
    loc = torch.randn(20, 5, 64, dtype=torch.float32).mul(3).requires_grad_()
    scale = torch.rand(20, 5, 64, dtype=torch.float32).add(0.01).requires_grad_()
    logits = torch.randn(20, 5, dtype=torch.float32).mul(3).requires_grad_()
    mixture(loc, scale, logits).rsample().square().sum().backward()
    for tensor in (loc, scale, logits):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert loc.grad is not None
    assert loc.grad.abs().max() < 1e3


def test_gradients_in_float32_with_a_component_far_away_in_one_dimension() -> None:
    """It is near in the dimensions before, whose densities a difference of sums would lose."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        loc = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=dtype, requires_grad=True)
        logits = torch.zeros(2, dtype=dtype, requires_grad=True)
        scale = torch.tensor([[0.5, 0.002]] * 2, dtype=dtype)
        q = NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
        value = torch.tensor([[1.0, 0.006]], dtype=dtype)
        q.sample = lambda sample_shape=(), value=value: value
        grads.append(torch.autograd.grad(q.rsample()[..., 1].sum(), [logits, loc]))
    for single, double in zip(*grads, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


# Mixtures whose weights are not learnt.


def fixed(loc: torch.Tensor, scale: torch.Tensor, logits: torch.Tensor) -> FixedNormalMixture:
    return FixedNormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fixed_mixture_has_the_same_density_and_shapes(dtype: torch.dtype) -> None:
    loc, scale, logits = LOC.to(dtype), SCALE.to(dtype), LOGITS.to(dtype)
    q, z = fixed(loc, scale, logits), torch.randn(6, 3, dtype=dtype)
    torch.testing.assert_close(q.log_prob(z), mixture(loc, scale, logits).log_prob(z))
    many = q.expand((4, 6))
    assert isinstance(many, FixedNormalMixture)
    for draw in (many.rsample, many.sample):
        assert draw().shape == (4, 6, 3)
        assert draw((2,)).shape == (2, 4, 6, 3)
        assert draw((2,)).dtype == dtype
    torch.testing.assert_close(many.log_prob(z), q.log_prob(z).expand(4, 6))
    tracked = fixed(loc.requires_grad_(), scale, logits)
    assert tracked.rsample().requires_grad
    assert not tracked.sample().requires_grad


def test_gradients_of_samples_of_a_fixed_mixture() -> None:
    num = 50_000
    parameters = [t.clone().requires_grad_() for t in (LOC, SCALE)]
    loc, scale = parameters
    terms = loc.prod(-1) + (loc**2 + scale**2)[:, 0] * loc[:, 1] + (loc**2 + scale**2)[:, 2]
    exact = torch.autograd.grad((LOGITS.softmax(-1) * terms).sum(), parameters)
    rows = [t.detach().expand(num, *t.shape).clone().requires_grad_() for t in parameters]
    z = fixed(*rows, LOGITS.expand(num, 2)).rsample()
    value = z.prod(-1) + z[:, 0] ** 2 * z[:, 1] + z[:, 2] ** 2
    for expected, rowwise in zip(exact, torch.autograd.grad(value.sum(), rows), strict=True):
        error = 5 * rowwise.std(0) / math.sqrt(num)
        assert (rowwise.mean(0) - expected).abs().le(error).all()
        assert error.max() < 0.15


def test_draws_from_given_components() -> None:
    """Each from its own, in the row it belongs to."""
    loc = torch.arange(5.0).reshape(5, 1, 1) + torch.tensor([0.0, 100.0, 200.0]).reshape(1, 3, 1)
    q = fixed(loc.expand(5, 3, 2), torch.full((5, 3, 2), 1e-6), torch.zeros(5, 3))
    component = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 1, 0]])
    draws = q.rsample_of(component)
    expected = (component * 100 + torch.arange(5)).unsqueeze(-1).expand(2, 5, 2).double()
    torch.testing.assert_close(draws, expected, rtol=0, atol=1e-4)
    assert (draws[..., 0] != draws[..., 1]).all()


def test_a_component_that_is_absent() -> None:
    """No draws, no density, and gradients that are finite."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 0.0, -torch.inf]])
    loc = torch.tensor([0.0, 50.0, 100.0]).reshape(1, 3, 1).expand(2, 3, 1).clone()
    loc.requires_grad_()
    q = fixed(loc, torch.ones(2, 3, 1), logits)
    draws = q.rsample((500,))
    found = (draws[..., 0] / 50).round()
    assert set(found[:, 0].tolist()) == {0.0, 2.0}
    assert set(found[:, 1].tolist()) == {1.0}
    log_prob = q.log_prob(draws)
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(draws[:, 1, 0] - 50)
    torch.testing.assert_close(log_prob[:, 1], expected)
    nearest = torch.minimum(draws[:, 0, 0].abs(), (draws[:, 0, 0] - 100).abs())
    torch.testing.assert_close(log_prob[:, 0], normal.log_prob(nearest) - math.log(2))
    (gradient,) = torch.autograd.grad(log_prob.sum(), loc)
    assert gradient.isfinite().all()


# Systematic sampling.


@pytest.mark.parametrize("num", [1, 3, 8, 10, 97])
def test_each_component_gets_its_share_up_to_one(num: int) -> None:
    torch.manual_seed(1)
    probs = torch.rand(200, 6).softmax(-1)
    probs = torch.where(torch.rand(200, 6) < 0.3, 0.0, probs)
    probs[:, 3] += 0.01
    probs = probs / probs.sum(-1, keepdim=True)
    position = (torch.arange(num) / num).unsqueeze(-1)
    found = stratified_components(probs, position, torch.rand(200) / num)
    assert found.shape == (num, 200)
    assert found.dtype == torch.int64
    count = torch.nn.functional.one_hot(found, 6).sum(0)
    exact = num * probs
    assert (count >= (exact - 1e-9).floor()).all()
    assert (count <= (exact + 1e-9).ceil()).all()
    assert (count[probs == 0] == 0).all()


def test_shares_that_are_whole_are_exact() -> None:
    for dtype in (torch.float32, torch.float64):
        probs = torch.tensor([0.125, 0.0, 0.5, 0.375], dtype=dtype)
        for offset in (0.0, 0.01, 0.0624):
            position = torch.arange(16, dtype=dtype) / 16
            found = stratified_components(probs, position, torch.tensor(offset, dtype=dtype))
            assert found.bincount(minlength=4).tolist() == [2, 0, 8, 6]


def test_over_all_offsets_a_particle_is_of_each_component_as_its_weight() -> None:
    """Together, not each: the mean over particles and offsets is the weight itself."""
    probs, num, grid = torch.tensor([0.23, 0.5, 0.07, 0.2]), 6, 10_000
    offset = (torch.arange(grid) + 0.5) / grid / num
    found = stratified_components(probs, (torch.arange(num) / num).unsqueeze(-1), offset)
    share = torch.nn.functional.one_hot(found, 4).double().mean((0, 1))
    torch.testing.assert_close(share, probs, rtol=0, atol=2 / grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num", [1, 10, 1000, 1_000_003])
def test_components_without_weight_are_never_chosen(dtype: torch.dtype, num: int) -> None:
    """First, last or between, however the sums are rounded and at the ends of the offsets."""
    position = torch.arange(num, dtype=dtype) / num
    for seed in range(20 if num < 10_000 else 2):
        torch.manual_seed(seed)
        probs = torch.rand(7, dtype=dtype).mul(5).softmax(-1)
        probs[[0, 3, 6]] = 0
        probs = probs / probs.sum()
        last = torch.tensor(1 / num, dtype=dtype)
        for offset in (torch.zeros((), dtype=dtype), last, torch.nextafter(last, last * 0)):
            found = stratified_components(probs, position, offset)
            assert (probs[found.unique()] > 0).all()
    one = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=dtype)
    assert (stratified_components(one, position, last) == 2).all()
    assert (stratified_components(one, position, 0 * last) == 2).all()
