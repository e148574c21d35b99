"""Running sums over importance weights against direct formulas, Pareto-k against ArviZ."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pyro_vae.evaluation.weights import LogWeightSums, pareto_k, tail_length

FIELDS = ("log_mean", "mean_log", "effective_sample_size", "standard_error", "pareto_k")


def summed(log_weights: torch.Tensor, cuts: list[int] | None = None) -> LogWeightSums:
    """The sums over weights that arrive in the chunks between ``cuts``."""
    num = len(log_weights)
    sums = LogWeightSums(tuple(log_weights.shape[1:]), num)
    for start, stop in pairwise([0, *(cuts or []), num]):
        sums.add(log_weights[start:stop])
    return sums


def direct(log_weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The textbook formulas, with the largest weight taken out."""
    top = log_weights.amax(0)
    w = (log_weights - top).exp()
    num = len(w)
    return {
        "log_mean": w.mean(0).log() + top,
        "mean_log": log_weights.mean(0),
        "effective_sample_size": w.sum(0) ** 2 / (w**2).sum(0),
        "standard_error": w.std(0) / w.mean(0) / num**0.5,
    }


def log_weights_of(num: int, spread: float = 1.0, level: float = 0.0) -> torch.Tensor:
    return level + spread * torch.randn(num, 7, dtype=torch.float64)


@pytest.mark.parametrize("level", [0.0, -1e4, 1e4, -700.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_against_the_direct_formulas(level: float, spread: float) -> None:
    log_weights = log_weights_of(83, spread, level)
    sums, expected = summed(log_weights, [20, 61]), direct(log_weights)
    for name, value in expected.items():
        # 1e-16 of the level, twice, in the difference of logs.
        torch.testing.assert_close(getattr(sums, name), value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("cuts", [[], [1], [50], [99], [10, 20, 30], list(range(1, 100))])
def test_any_partition_gives_the_same(cuts: list[int]) -> None:
    log_weights = log_weights_of(100, 3.0, -500.0)
    log_weights[::9, 0] = -math.inf
    expected = summed(log_weights)
    sums = summed(log_weights, cuts)
    assert sums.count == 100
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(sums, name), getattr(expected, name), rtol=1e-9, atol=1e-9, msg=name
        )


def test_weights_of_zero_count() -> None:
    log_weights = log_weights_of(40, 1.0, -1e4)
    log_weights[::2] = -math.inf
    sums, half = summed(log_weights, [7]), summed(log_weights[1::2])
    torch.testing.assert_close(sums.log_mean, half.log_mean - math.log(2))
    torch.testing.assert_close(sums.effective_sample_size, half.effective_sample_size)
    expected = direct(log_weights)["standard_error"]
    torch.testing.assert_close(sums.standard_error, expected, rtol=1e-8, atol=0)
    assert (sums.mean_log == -math.inf).all()


def test_weights_that_are_all_zero() -> None:
    log_weights = log_weights_of(40)
    log_weights[:, 2] = -math.inf
    sums = summed(log_weights, [7])
    assert sums.log_mean[2] == -math.inf
    assert sums.mean_log[2] == -math.inf
    assert sums.effective_sample_size[2] == 0
    assert sums.standard_error[2] == math.inf
    assert sums.pareto_k[2] == math.inf
    others = [0, 1, 3, 4, 5, 6]
    for name, value in direct(log_weights[:, others]).items():
        torch.testing.assert_close(getattr(sums, name)[others], value)


def test_one_weight() -> None:
    log_weights = log_weights_of(1, level=-50.0)
    sums = summed(log_weights)
    torch.testing.assert_close(sums.log_mean, log_weights[0])
    torch.testing.assert_close(sums.mean_log, log_weights[0])
    torch.testing.assert_close(sums.effective_sample_size, torch.ones(7))
    assert sums.standard_error.isnan().all()


@pytest.mark.parametrize("level", [0.0, -1e4])
def test_equal_weights(level: float) -> None:
    sums = summed(torch.full((60, 7), level), [13])
    torch.testing.assert_close(sums.log_mean, torch.full((7,), level))
    torch.testing.assert_close(sums.effective_sample_size, torch.full((7,), 60.0))
    assert float(sums.standard_error.max()) < 1e-6
    assert (sums.pareto_k == -math.inf).all()


def test_float32_weights_are_summed_in_float64() -> None:
    log_weights = log_weights_of(1000, 0.1, -3000.0).float()
    sums = summed(log_weights, [300])
    for name in FIELDS:
        assert getattr(sums, name).dtype == torch.float64
    expected = direct(log_weights.double())["log_mean"]
    torch.testing.assert_close(sums.log_mean, expected, rtol=0, atol=1e-9)


def test_data_of_any_shape() -> None:
    log_weights = torch.randn(50, 2, 3, 4)
    sums, flat = summed(log_weights, [9]), summed(log_weights.reshape(50, -1), [9])
    for name in FIELDS:
        assert getattr(sums, name).shape == (2, 3, 4)
        torch.testing.assert_close(getattr(sums, name).flatten(), getattr(flat, name))


def test_memory_does_not_grow_with_the_number_of_weights() -> None:
    sums = LogWeightSums((3,), 5000)
    for _ in range(10):
        sums.add(torch.randn(500, 3))
        assert len(sums._largest) <= tail_length(5000) + 1


# Pareto-k.


def arviz_pareto_k(log_weights: np.ndarray) -> float:
    """ArviZ's Pareto-k, of 0.23 or of 1.x."""
    try:
        from arviz import psislw
    except ImportError:
        from arviz_stats.base import array_stats

        return float(array_stats.psislw(-log_weights, axis=-1)[1])  # takes log-likelihoods
    return float(psislw(log_weights)[1])


def tails(num: int) -> dict[str, torch.Tensor]:
    """Log-weights with tails of many shapes."""
    uniform = torch.rand(num).clamp(min=1e-12)
    return {
        "normal": 0.5 * torch.randn(num),
        "wide normal": 4 * torch.randn(num),
        "bounded": uniform.log(),
        "k = 0.3": -0.3 * uniform.log(),
        "k = 0.9": -0.9 * uniform.log(),
        "k = 2": -2 * uniform.log(),
        "shifted": -1e4 + torch.randn(num),
        "skewed": -(torch.rand(num) ** 3),
    }


# Where 3 sqrt(K) is a whole number: otherwise ArviZ 0.23 and 1.x round the tail differently.
@pytest.mark.parametrize("num", [30, 100, 900, 4900])
def test_pareto_k_is_that_of_arviz(num: int) -> None:
    rows = tails(num)
    ours = summed(torch.stack(list(rows.values()), -1), [num // 3]).pareto_k
    expected = torch.tensor([arviz_pareto_k(row.numpy()) for row in rows.values()])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    if num >= 900:
        assert ours[list(rows).index("k = 2")] > 0.7
        assert ours[list(rows).index("bounded")] < 0.5


def test_pareto_k_estimates_the_shape() -> None:
    num = 20_000
    for k in (0.2, 0.5, 1.0):
        estimates = summed(-k * torch.rand(num, 30).log()).pareto_k
        # The weak prior draws the shape to 0.5 with the weight of ten observations.
        length = tail_length(num)
        expected = (length * k + 5) / (length + 10)
        error = float(estimates.std()) / 30**0.5
        assert abs(float(estimates.mean()) - expected) < 5 * error + 0.01


def test_pareto_k_with_ties() -> None:
    """Weights that repeat, as of a discrete latent, are no tail of their own."""
    log_weights = torch.randn(1000).round(decimals=1)
    ours = summed(log_weights.unsqueeze(-1)).pareto_k
    assert ours.isfinite().all()
    assert float(ours) == pytest.approx(arviz_pareto_k(log_weights.numpy()), abs=0.2)
    # Ties with the threshold are no part of the tail, however many there are.
    tail = torch.randn(40, 1).sort(0, descending=True).values
    tail, threshold = tail[:30], tail[30:31]
    tied = torch.cat([tail, threshold.expand(20, 1)])
    torch.testing.assert_close(pareto_k(tied), pareto_k(torch.cat([tail, threshold])))
    two_values = torch.tensor([0.0, 1.0]).repeat(100).unsqueeze(-1)
    assert not summed(two_values).pareto_k.isnan().any()


@pytest.mark.parametrize("num", [1, 2, 5, 10, 20])
def test_pareto_k_of_few_weights_cannot_be_judged(num: int) -> None:
    assert (summed(log_weights_of(num)).pareto_k == math.inf).all()


def test_pareto_k_is_a_public_function() -> None:
    log_weights = log_weights_of(500)
    largest = log_weights.topk(tail_length(500) + 1, dim=0).values
    torch.testing.assert_close(pareto_k(largest), summed(log_weights).pareto_k)


def test_pareto_k_does_not_depend_on_the_order_or_the_level() -> None:
    log_weights = log_weights_of(500, 2.0)
    expected = summed(log_weights).pareto_k
    torch.testing.assert_close(summed(log_weights.flip(0) - 800).pareto_k, expected)


@pytest.mark.parametrize(
    ("num", "length"), [(1, 1), (10, 2), (100, 20), (225, 45), (226, 46), (5000, 213)]
)
def test_tail_length(num: int, length: int) -> None:
    assert tail_length(num) == length


def test_standard_error_keeps_its_digits_at_any_level() -> None:
    spread = 1e-4 * torch.randn(50, 2)
    errors = []
    for level in (0.0, -12345.0):
        sums = LogWeightSums((2,), 50)
        for chunk in (level + spread).split(7):
            sums.add(chunk)
        errors.append(sums.standard_error)
    direct = spread.exp().std(0) / spread.exp().mean(0) / 50**0.5
    torch.testing.assert_close(errors[0], direct, rtol=1e-6, atol=0)
    torch.testing.assert_close(errors[1], direct, rtol=1e-6, atol=0)


# Weights that were drawn together.


def summed_in_blocks(log_weights: torch.Tensor, block: int, cuts: list[int]) -> LogWeightSums:
    num = len(log_weights)
    sums = LogWeightSums(tuple(log_weights.shape[1:]), num, block=block)
    for start, stop in pairwise([0, *cuts, num]):
        sums.add(log_weights[start:stop])
    return sums


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3], [6, 7], [5, 10, 15], list(range(1, 40))])
def test_the_error_of_blocks_is_that_of_their_means(cuts: list[int]) -> None:
    log_weights = log_weights_of(60, 1.5, -700.0)
    sums = summed_in_blocks(log_weights, 5, cuts)
    means = (log_weights + 700).exp().reshape(12, 5, 7).mean(1)
    expected = means.std(0) / means.mean(0) / 12**0.5
    torch.testing.assert_close(sums.standard_error, expected, rtol=1e-9, atol=0)
    plain = summed(log_weights)
    for name in ("log_mean", "mean_log", "effective_sample_size", "pareto_k"):
        torch.testing.assert_close(getattr(sums, name), getattr(plain, name))


@pytest.mark.parametrize("level", [0.0, -1e4])
def test_blocks_keep_their_digits_at_any_level(level: float) -> None:
    spread = 1e-4 * torch.randn(160, 3)
    sums = summed_in_blocks(level + spread, 16, [7])
    means = spread.exp().reshape(10, 16, 3).mean(1)
    expected = means.std(0) / means.mean(0) / 10**0.5
    torch.testing.assert_close(sums.standard_error, expected, rtol=1e-5, atol=0)


def test_few_blocks_have_the_error_of_independent_weights() -> None:
    """Their own would be too uncertain, and often much too small."""
    log_weights = log_weights_of(144)
    for num in (1, 5, 16, 17, 40, 144):
        sums = summed_in_blocks(log_weights[:num], 16, [])
        torch.testing.assert_close(
            sums.standard_error, summed(log_weights[:num]).standard_error, equal_nan=True
        )


def test_equal_weights_in_blocks_have_no_error() -> None:
    sums = summed_in_blocks(torch.full((200, 2), -3.0), 16, [20])
    assert float(sums.standard_error.max()) < 1e-12


def test_blocks_of_zero_weights() -> None:
    log_weights = log_weights_of(160)
    log_weights[:, 0] = -math.inf
    log_weights[16:32, 1] = -math.inf
    sums = summed_in_blocks(log_weights, 16, [10])
    error = sums.standard_error
    means = log_weights.exp().reshape(10, 16, 7).mean(1)
    expected = means.std(0) / means.mean(0) / 10**0.5
    torch.testing.assert_close(error[1:], expected[1:])
    assert error[0] == math.inf  # As for independent weights.


@pytest.mark.parametrize("num", [145, 150, 175, 250])
def test_the_error_of_unequal_blocks_is_calibrated(num: int) -> None:
    """With independent weights it has to be theirs: the mean square of many is the variance."""
    rows, spread = 4000, 0.05  # Small, so that nothing is lost in the ratio of two sums.
    log_weights = (1 + spread * torch.randn(num, rows)).log()
    sums = summed_in_blocks(log_weights, 16, [])
    squares = sums.standard_error.square()
    error = 5 * float(squares.std()) / rows**0.5
    assert abs(float(squares.mean()) - spread**2 / num) < error + 0.02 * spread**2 / num
