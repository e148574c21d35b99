"""Products and mixtures of experts against Bayes' rule by hand, sums and finite differences."""

import math

import pytest
import torch

from pyro_vae.experts import mixture_log_prob, product_of_normals

SHAPE = (6, 4, 3)  # rows, experts, dimensions


def test_log_weights_that_would_widen_the_experts() -> None:
    loc = torch.zeros(4, 3, 1)
    with pytest.raises(ValueError, match=r"expected log_weight that broadcasts with \(4, 3, 1\)"):
        product_of_normals(loc, loc + 1, log_weight=torch.zeros(3))
    loc = torch.zeros(4, 3, 2)  # Here they do not even broadcast.
    with pytest.raises(ValueError, match="expected log_weight that broadcasts with"):
        product_of_normals(loc, loc + 1, log_weight=torch.zeros(3))


def experts(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    loc, scale = torch.randn(SHAPE).to(dtype), (0.6 * torch.randn(SHAPE)).exp().to(dtype)
    return loc, scale


def some_present() -> torch.Tensor:
    """All, none, one, and others."""
    present = torch.rand(SHAPE[:-1]) < 0.5
    present[0], present[1], present[2] = True, False, torch.arange(SHAPE[1]) == 2
    return present


def by_hand(
    loc: torch.Tensor, scale: torch.Tensor, present: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row at a time, one expert after another."""
    locs, scales = [], []
    for row in range(len(loc)):
        precision, weighted = torch.zeros(SHAPE[-1]), torch.zeros(SHAPE[-1])
        for m in range(loc.shape[1]):
            if present[row, m]:
                own = alpha[m] / scale[row, m] ** 2
                precision, weighted = precision + own, weighted + own * loc[row, m]
        locs.append(weighted / precision)
        scales.append(precision**-0.5)
    return torch.stack(locs), torch.stack(scales)


# Products.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_product_against_sums_of_precisions(masked: bool, weighted: bool) -> None:
    loc, scale = experts()
    present = some_present() if masked else torch.ones(SHAPE[:-1], dtype=torch.bool)
    alpha = torch.rand(SHAPE[1:]) + 0.5 if weighted else torch.ones(SHAPE[1:])
    got = product_of_normals(
        loc, scale, present if masked else None, log_weight=alpha.log() if weighted else None
    )
    expected = by_hand(loc, scale, present, alpha)
    some = present.any(-1)
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual[some], wanted[some], rtol=1e-12, atol=1e-12)
    assert (got[0][~some] == 0).all()
    assert (got[1][~some] == torch.inf).all()


def test_the_product_is_the_normalised_product_of_densities() -> None:
    """log N(z; product) - sum of alpha log N(z; expert) is one number for all z."""
    loc, scale = experts()
    alpha = torch.rand(SHAPE[1:]) + 0.5
    product = torch.distributions.Normal(*product_of_normals(loc, scale, log_weight=alpha.log()))
    z = torch.randn(5, SHAPE[0], SHAPE[2])
    each = torch.distributions.Normal(loc, scale).log_prob(z.unsqueeze(-2))
    difference = product.log_prob(z) - (alpha * each).sum(-2)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


def test_any_order_of_experts_and_any_leading_dimensions() -> None:
    loc, scale = experts()
    present = some_present()
    expected = product_of_normals(loc, scale, present)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = product_of_normals(loc[:, order], scale[:, order], present[:, order])
    torch.testing.assert_close(shuffled, expected)
    wide = product_of_normals(loc.reshape(2, 3, 4, 3), scale.reshape(2, 3, 4, 3))
    torch.testing.assert_close(
        tuple(part.reshape(6, 3) for part in wide), product_of_normals(loc, scale)
    )
    # One mask for all rows.
    one = torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        product_of_normals(loc, scale, one), product_of_normals(loc[:, ::2], scale[:, ::2])
    )


def test_an_absent_expert_is_never_looked_at() -> None:
    """Whatever its numbers are, neither values nor gradients change."""
    loc, scale = experts()
    present = some_present()
    results = []
    for filler in (1.0, math.nan, math.inf, 0.0):
        hidden = ~present.unsqueeze(-1)
        tensors = [loc.masked_fill(hidden, filler), scale.masked_fill(hidden, filler)]
        tensors += [torch.zeros(SHAPE[1:])]
        tensors = [t.requires_grad_() for t in tensors]
        mean, deviation = product_of_normals(*tensors[:2], present, log_weight=tensors[2])
        some = present.any(-1)
        total = mean[some].sin().sum() + deviation[some].log().sum()
        results.append([mean.detach(), deviation.detach(), *torch.autograd.grad(total, tensors)])
    for result in results:
        assert all(gradient.isfinite().all() for gradient in result[2:])
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_gradients_where_nobody_is_present_are_zero() -> None:
    """A prior may replace the flat product afterwards."""
    loc, scale = (t.requires_grad_() for t in experts())
    present = torch.zeros(SHAPE[:-1], dtype=torch.bool)
    mean, deviation = product_of_normals(loc, scale, present)
    total = mean.sum() + torch.where(deviation.isinf(), 1.0, deviation).sum()
    for gradient in torch.autograd.grad(total, (loc, scale)):
        assert (gradient == 0).all()


def test_gradcheck() -> None:
    loc, scale = experts()
    log_weight = (0.3 * torch.randn(SHAPE[1:])).requires_grad_()
    present = some_present()
    present[1, 0] = True
    for mask in (None, present):
        assert torch.autograd.gradcheck(
            lambda a, b, c, mask=mask: product_of_normals(a, b, mask, log_weight=c),
            (loc.requires_grad_(), scale.requires_grad_(), log_weight),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_certain_and_nearly_flat_experts(dtype: torch.dtype) -> None:
    """Whose precisions, 1e24 and 1e-24, do not all fit into one sum, nor their squares."""
    loc = torch.tensor([[[5.0], [-2.0], [1.0]]], dtype=dtype).requires_grad_()
    scale = torch.tensor([[[1e-12], [1e12], [1.0]]], dtype=dtype).requires_grad_()
    mean, deviation = product_of_normals(loc, scale)
    torch.testing.assert_close(mean, torch.tensor([[5.0]], dtype=dtype))
    torch.testing.assert_close(deviation, torch.tensor([[1e-12]], dtype=dtype))
    gradients = torch.autograd.grad(mean.sum() + deviation.log().sum(), (loc, scale))
    assert all(gradient.isfinite().all() for gradient in gradients)
    for value in (1e-25, 1e-12, 1e12, 1e25):  # Squares beyond the range of float32.
        equal = torch.full((1, 4, 1), value, dtype=dtype)
        mean, deviation = product_of_normals(torch.full_like(equal, 3.0), equal)
        torch.testing.assert_close(mean, torch.tensor([[3.0]], dtype=dtype))
        torch.testing.assert_close(
            deviation, torch.tensor([[value / 2]], dtype=dtype), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)],
)
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    loc, scale = experts(dtype)
    present = some_present()
    present[1, 0] = True
    got = product_of_normals(loc, scale, present)
    expected = product_of_normals(loc.double(), scale.double(), present)
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)
    # 1 / 300^2 and 1 / 0.003^2 are no numbers of float16.
    for value in (300.0, 0.003):
        scale = torch.full((1, 4, 1), value, dtype=dtype)
        deviation = product_of_normals(torch.zeros_like(scale), scale)[1]
        assert float(deviation) == pytest.approx(value / 2, rel=tolerance)


def test_the_arguments_of_a_product_stay_as_they_are() -> None:
    loc, scale = experts()
    present = some_present()
    copies = [t.clone() for t in (loc, scale, present)]
    product_of_normals(loc, scale, present)
    for tensor, copy in zip((loc, scale, present), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_bad_calls_of_a_product() -> None:
    loc, scale = experts()
    with pytest.raises(ValueError, match="expected loc and scale of one shape .* got .* and"):
        product_of_normals(loc, scale[:, :2])
    with pytest.raises(ValueError, match="expected loc and scale of one shape .*experts, dim"):
        product_of_normals(loc[0, 0], scale[0, 0])
    with pytest.raises(TypeError, match="expected present to be a bool tensor, got torch.int64"):
        product_of_normals(loc, scale, torch.ones(6, 4, dtype=torch.int64))
    for shape in [(6, 3), (6, 4, 3), (2, 6, 4), (5, 4)]:
        with pytest.raises(ValueError, match=r"expected present of shape \(6, 4\), one entry an"):
            product_of_normals(loc, scale, torch.ones(shape, dtype=torch.bool))


# Mixtures.


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mixture_against_sums_of_densities(weighted: bool) -> None:
    log_prob = 3 * torch.randn(SHAPE[:-1])
    present = some_present()
    log_weight = torch.randn(SHAPE[1]) if weighted else None
    pi = torch.ones(SHAPE[1]) if log_weight is None else log_weight.exp()
    got = mixture_log_prob(log_prob, present, log_weight=log_weight)
    for row in range(SHAPE[0]):
        there = present[row]
        if not there.any():
            assert got[row] == -math.inf
            continue
        expected = ((pi * log_prob[row].exp())[there].sum() / pi[there].sum()).log()
        torch.testing.assert_close(got[row], expected)
    everyone = torch.ones(SHAPE[:-1], dtype=torch.bool)
    torch.testing.assert_close(
        mixture_log_prob(log_prob, log_weight=log_weight),
        mixture_log_prob(log_prob, everyone, log_weight=log_weight),
    )
    torch.testing.assert_close(
        mixture_log_prob(log_prob, log_weight=log_weight),
        ((pi * log_prob.exp()).sum(-1) / pi.sum()).log(),
    )


def test_a_mixture_is_a_density() -> None:
    z = torch.linspace(-30, 30, 6001)
    normal = torch.distributions.Normal(torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, 0.3, 2]))
    log_prob = normal.log_prob(z.unsqueeze(-1))
    for present in ([True, True, True], [True, False, True], [False, True, False]):
        mixture = mixture_log_prob(log_prob, torch.tensor(present), log_weight=torch.randn(3))
        assert float(torch.trapezoid(mixture.exp(), z)) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e300])
def test_densities_of_absent_experts_are_never_looked_at(filler: float) -> None:
    present = some_present()
    log_prob = torch.randn(SHAPE[:-1])
    expected = mixture_log_prob(log_prob, present)
    filled = log_prob.masked_fill(~present, filler).requires_grad_()
    log_weight = torch.zeros(SHAPE[1], requires_grad=True)
    got = mixture_log_prob(filled, present, log_weight=log_weight)
    torch.testing.assert_close(got, expected)
    for gradient in torch.autograd.grad(got[present.any(-1)].sum(), (filled, log_weight)):
        assert gradient.isfinite().all()
    for gradient in torch.autograd.grad(
        mixture_log_prob(filled, present, log_weight=log_weight).clamp(min=-1e3).sum(),
        (filled, log_weight),
    ):
        assert gradient.isfinite().all()


def test_gradcheck_of_a_mixture() -> None:
    log_prob = torch.randn(SHAPE[:-1], requires_grad=True)
    log_weight = torch.randn(SHAPE[1], requires_grad=True)
    present = some_present()
    present[1, 3] = True
    for mask in (None, present):
        assert torch.autograd.gradcheck(
            lambda a, b, mask=mask: mixture_log_prob(a, mask, log_weight=b), (log_prob, log_weight)
        )


def test_bad_calls_of_a_mixture() -> None:
    with pytest.raises(ValueError, match=r"mixture_log_prob: expected log_prob of shape \(\*batch"):
        mixture_log_prob(torch.tensor(1.0))
    with pytest.raises(TypeError, match="mixture_log_prob: expected present to be a bool tensor"):
        mixture_log_prob(torch.zeros(6, 4), torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"expected present of shape \(6, 4\), one entry an expe"):
        mixture_log_prob(torch.zeros(6, 4), torch.ones(6, 5, dtype=torch.bool))
