"""Codes against known factors: by hand, on perfect, turned and unrelated codes, on bad input."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.evaluation import (
    beta_vae_score,
    code_factor_information,
    dci,
    factor_vae_score,
    mutual_information_gap,
    sap_score,
)
from pyro_vae.evaluation.fixed_factor import _Rows
from pyro_vae.latents import encode

Score = Callable[..., float]


def mig(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return mutual_information_gap(codes, factors).score


def sap(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return sap_score(codes, factors, categorical=()).score


def disentanglement(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return dci(codes, factors, num_trees=5).disentanglement


def completeness(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return dci(codes, factors, num_trees=5).completeness


def fixed_by_variance(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return factor_vae_score(
        codes, factors, num_train=2000, num_test=2000, group_size=20, min_scale=0
    ).score


def fixed_by_difference(codes: torch.Tensor, factors: torch.Tensor) -> float:
    return beta_vae_score(codes, factors, num_train=2000, num_test=2000, group_size=20).score


GAPS = [mig, sap]
ALL = [*GAPS, disentanglement, completeness, fixed_by_variance, fixed_by_difference]
# With their arguments, for what must be raised.
RAW = {
    "mutual_information_gap": mutual_information_gap,
    "code_factor_information": code_factor_information,
    "sap_score": lambda codes, factors: sap_score(codes, factors, categorical=()),
    "dci": dci,
    "factor_vae_score": factor_vae_score,
    "beta_vae_score": beta_vae_score,
}


def grid(*sizes: int, repeats: int = 4) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).repeat(repeats, 1)


FACTORS = grid(4, 5, 6)


def blurred(num_rows: int = 1500) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that know something of the factors, far from the best and the worst."""
    factors = torch.stack([torch.randint(size, (num_rows,)) for size in (3, 4, 5)], -1)
    codes = factors.double() @ torch.tensor(
        [[1.0, 0.3, 0.7, 0], [0, 1, 0.5, 0], [0.8, 0.4, 0.5, 0]]
    )
    return codes + 0.8 * torch.randn(num_rows, 4), factors


# The best and the worst codes.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("score", ALL)
def test_factors_permuted_scaled_and_turned_around_are_perfect(
    score: Score, dtype: torch.dtype
) -> None:
    codes = (FACTORS[:, [2, 0, 1]] * torch.tensor([-3, 200, 1]) + 7).to(dtype)
    assert score(codes, FACTORS) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("score", [mig, sap, disentanglement, completeness, fixed_by_variance])
def test_constant_codes_beside_perfect_ones_do_no_harm(score: Score) -> None:
    codes = torch.cat([torch.full((len(FACTORS), 1), 0.1), FACTORS, FACTORS[:, :1] * 0 + 1e9], 1)
    assert score(codes, FACTORS) == pytest.approx(1, abs=1e-6)


def turned() -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent factors in both of two codes alike: the sum and the difference."""
    factors = grid(7, 7, repeats=200)
    return factors.double() @ torch.tensor([[1.0, 1.0], [1.0, -1.0]]), factors


@pytest.mark.parametrize("score", GAPS)
def test_no_gap_where_two_codes_know_the_same(score: Score) -> None:
    assert score(*turned()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("score", [disentanglement, completeness])
def test_importance_is_even_where_factors_are_mixed_evenly(score: Score) -> None:
    assert score(*turned()) < 0.02


@pytest.mark.parametrize("score", [fixed_by_variance, fixed_by_difference])
def test_turned_codes_leave_only_guessing(score: Score) -> None:
    assert score(*turned()) == pytest.approx(0.5, abs=5 * (0.25 / 2000) ** 0.5)


@pytest.mark.parametrize("score", [fixed_by_variance, fixed_by_difference])
def test_unrelated_codes_leave_only_guessing(score: Score) -> None:
    factors = grid(4, 5, 6, repeats=200)
    found = score(torch.randn(len(factors), 5), factors)
    assert found == pytest.approx(1 / 3, abs=5 * (2 / 9 / 2000) ** 0.5)


def test_unrelated_codes_have_no_gap_and_no_importance() -> None:
    factors = grid(4, 5, 6, repeats=50)
    num_rows, codes = len(factors), torch.randn(len(factors), 5)
    information = code_factor_information(codes, factors)
    # 2 N I is close to chi-squared with (bins - 1) (K - 1) degrees of freedom.
    degrees = 19 * torch.tensor([3.0, 4.0, 5.0])
    assert (2 * num_rows * information < degrees + 5 * (2 * degrees).sqrt()).all()
    assert mig(codes, factors) < 0.01
    assert sap(codes, factors) < 5**2 / num_rows  # A correlation of five standard errors.
    result = dci(codes, factors, num_trees=5)
    assert result.disentanglement < 0.01
    assert result.completeness < 0.01
    for accuracy, size in zip(result.informativeness_of_factors, (4, 5, 6), strict=True):
        error = 5 * (1 / size * (1 - 1 / size) / (0.2 * num_rows)) ** 0.5
        assert accuracy.item() == pytest.approx(1 / size, abs=error)


@pytest.mark.parametrize("score", ALL)
def test_entangled_codes_are_in_between(score: Score) -> None:
    assert 0.05 < score(*blurred()) < 0.97


@pytest.mark.parametrize("score", ALL)
def test_order_and_units_do_not_count(score: Score) -> None:
    codes, factors = blurred()
    expected = score(codes, factors)
    # Trees break ties by the order of columns, and splits depend on the order of rows.
    error = 0.02 if score in (disentanglement, completeness) else 1e-9
    changed = codes * torch.tensor([2.0**520, 0.125, 2.0**-520, 1.0]) - torch.tensor([0, 3, 0, 9])
    assert score(changed, factors) == pytest.approx(expected, abs=1e-9)
    assert score(codes[:, [3, 1, 0, 2]], factors) == pytest.approx(expected, abs=error)
    assert score(codes, 10 * factors - 7) == pytest.approx(expected, abs=1e-9)
    if score in GAPS:
        assert score(codes[:, :3], factors[:, [1, 2, 0]]) == pytest.approx(
            score(codes[:, :3], factors), abs=1e-9
        )
        order = torch.randperm(len(codes))
        assert score(codes[order], factors[order]) == pytest.approx(expected, abs=1e-9)


# Mutual information gap.


def test_gap_by_hand() -> None:
    first = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    second = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    often = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1])  # The first factor in 3 rows of 4.
    result = mutual_information_gap(
        torch.stack([often, first, second], -1), torch.stack([first, second], -1)
    )
    known = 1 - (0.25 * math.log2(4) + 0.75 * math.log2(4 / 3))
    expected = torch.tensor([[known, 0.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(result.table, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(result.gaps, torch.tensor([1 - known, 1.0]))
    assert result.score == pytest.approx(1 - known / 2)


def test_gap_is_relative_to_the_entropy_of_the_factor() -> None:
    # I = log 2 with the parity of a factor of 6 values and entropy log 6.
    factor = torch.arange(6).repeat(3).unsqueeze(-1)
    result = mutual_information_gap(factor % 2, factor)
    assert result.score == pytest.approx(math.log(2) / math.log(6))
    assert result.table.shape == (1, 1)


def test_fewer_bins_than_values_cannot_reach_one() -> None:
    factor = torch.arange(40).repeat(3).unsqueeze(-1)
    coarse = mutual_information_gap(factor, factor).score
    assert coarse == pytest.approx(math.log(20) / math.log(40))  # As the docstring warns.
    assert mutual_information_gap(factor, factor, num_bins=40).score == pytest.approx(1)


def test_information_against_a_sum_over_cells() -> None:
    codes, factors = blurred(200)
    found = code_factor_information(codes, factors, num_bins=7)
    for i in range(codes.shape[1]):
        edges = np.histogram_bin_edges(codes[:, i].numpy(), 7)
        bins = np.digitize(codes[:, i].numpy(), edges[1:-1]).tolist()
        for j in range(factors.shape[1]):
            values = factors[:, j].tolist()
            joint = Counter(zip(bins, values, strict=True))
            of_bin, of_value = Counter(bins), Counter(values)
            expected = sum(
                n / 200 * math.log(n * 200 / (of_bin[b] * of_value[v]))
                for (b, v), n in joint.items()
            )
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_information_of_a_small_joint_in_nats() -> None:
    # p = [[1/2, 1/8], [1/8, 1/4]].
    cells = [(0, 0)] * 4 + [(0, 1)] + [(1, 0)] + [(1, 1)] * 2
    code, factor = torch.tensor(cells).T
    marginal = 5 / 8
    expected = (
        0.5 * math.log(0.5 / marginal**2)
        + 0.25 * math.log(0.125 / (marginal * (1 - marginal)))
        + 0.25 * math.log(0.25 / (1 - marginal) ** 2)
    )
    found = code_factor_information(code.unsqueeze(-1), factor.unsqueeze(-1), num_bins=2)
    assert found.item() == pytest.approx(expected)


def test_information_of_constant_codes_is_exactly_zero() -> None:
    codes = torch.full((len(FACTORS), 2), 0.1)
    assert not code_factor_information(codes, FACTORS).any()
    assert mig(codes, FACTORS) == 0


def test_bias_is_as_documented() -> None:
    num_rows, draws = 2000, []
    for _ in range(60):
        codes = torch.rand(num_rows, 3)
        factor = torch.randint(5, (num_rows, 1))
        draws.append(code_factor_information(codes, factor).flatten())
    found = torch.cat(draws)
    expected = 19 * 4 / (2 * num_rows)
    error = 5 * found.std().item() / len(found) ** 0.5
    assert found.mean().item() == pytest.approx(expected, abs=error)


# Predictability.


def test_ordered_factors_count_by_squared_correlation() -> None:
    codes, factors = blurred(300)
    result = sap_score(codes, factors, categorical=())
    together = np.corrcoef(torch.cat([codes, factors], 1).numpy(), rowvar=False)
    expected = torch.as_tensor(together[:4, 4:]) ** 2
    torch.testing.assert_close(result.table, expected)
    ordered = expected.sort(0, descending=True).values
    torch.testing.assert_close(result.gaps, ordered[0] - ordered[1])
    assert result.score == pytest.approx((ordered[0] - ordered[1]).mean().item())


def test_categories_need_no_order() -> None:
    category = torch.randint(3, (3000,))
    place = torch.tensor([1.0, -1.0, 0.0])[category]  # Three groups that a line cannot tell.
    codes = torch.stack([place + 0.05 * torch.randn(3000), torch.zeros(3000)], -1)
    factors = category.unsqueeze(-1)
    result = sap_score(codes, factors, categorical=[0])
    assert result.table.tolist() == [[1.0], [0.0]]
    assert sap_score(codes, factors, categorical=[]).score < 0.5


def test_accuracy_is_balanced_and_held_out() -> None:
    # Of 2,000 rows, 9 in 10 are of the one value: always saying so would be right as often.
    factors = (torch.arange(2000) % 10 == 0).long().unsqueeze(-1)
    result = sap_score(torch.randn(2000, 4), factors, categorical=[0], test_fraction=0.5)
    # The rarer value, with 100 rows held out, has the larger error.
    error = 5 * (0.25 * (0.25 / 100 + 0.25 / 900)) ** 0.5
    assert result.table.max().item() == pytest.approx(0.5, abs=error)
    few = torch.arange(40).unsqueeze(-1) % 20  # A row of each value to fit, and one to predict.
    leaked = sap_score(torch.randn(40, 1), few, categorical=[0]).score
    assert leaked <= 0.3


def test_thresholds_weigh_the_values_of_a_category_alike() -> None:
    # Two normals a standard deviation apart: best split in the middle, however rare the second.
    factor = (torch.arange(8000) % 10 == 0).long()
    codes = (factor + torch.randn(8000)).unsqueeze(-1)
    result = sap_score(codes, factor.unsqueeze(-1), categorical=[0])
    hit = dist.Normal(0.0, 1.0).cdf(torch.tensor(0.5)).item()
    error = 5 * (hit * (1 - hit) * (1 / 400 + 1 / 3600) / 4) ** 0.5
    assert result.score == pytest.approx(hit, abs=error)  # Else near 0.5.


def test_one_code_for_a_category_falls_short_by_chance() -> None:
    category = torch.arange(4000) % 4
    codes = torch.stack([category.double(), torch.randn(4000)], -1)
    score = sap_score(codes, category.unsqueeze(-1), categorical=[0]).score
    # Balanced accuracy of an unrelated code on 2,000 rows held out.
    assert score == pytest.approx(3 / 4, abs=5 * (3 / 16 / 2000) ** 0.5)


def test_columns_that_are_categorical() -> None:
    codes, factors = blurred(300)
    mixed = sap_score(codes, factors, categorical=[1]).table
    ordered = sap_score(codes, factors, categorical=[]).table
    categorical = sap_score(codes, factors, categorical=[0, 1, 2]).table
    assert torch.equal(mixed[:, [0, 2]], ordered[:, [0, 2]])
    assert torch.equal(mixed[:, 1], categorical[:, 1])


# Importance.


def test_scores_from_the_importance() -> None:
    codes, factors = blurred()
    result = dci(codes, factors, num_trees=5)
    r = result.importance
    assert r.shape == (4, 3)
    torch.testing.assert_close(r.sum(0), torch.ones(3))
    disentanglement = [
        1 + sum(float(v / row.sum()) * math.log(v / row.sum(), 3) for v in row if v) for row in r
    ]
    completeness = [1 + sum(float(v) * math.log(v, 4) for v in column if v) for column in r.T]
    assert result.disentanglement_of_codes.tolist() == pytest.approx(disentanglement)
    assert result.completeness_of_factors.tolist() == pytest.approx(completeness)
    weights = (r.sum(1) / 3).tolist()
    assert result.disentanglement == pytest.approx(
        sum(w * d for w, d in zip(weights, disentanglement, strict=True))
    )
    assert result.completeness == pytest.approx(sum(completeness) / 3)
    assert result.informativeness == pytest.approx(result.informativeness_of_factors.mean().item())


def test_a_code_for_two_factors_is_complete_not_disentangled() -> None:
    factors = grid(4, 4, repeats=40)
    both = factors[:, 0] * 4 + factors[:, 1]
    result = dci(torch.stack([both, torch.zeros_like(both)], -1), factors, num_trees=5)
    assert result.disentanglement < 0.02
    assert result.completeness == pytest.approx(1)
    assert result.informativeness == 1


def test_two_codes_for_a_factor_are_disentangled_not_complete() -> None:
    factors = grid(4, 4, repeats=40)
    a, b = factors.T  # High and low half of the first factor, whole second factor.
    result = dci(torch.stack([a // 2, a % 2, b], -1), factors, num_trees=5)
    assert result.disentanglement == pytest.approx(1)
    expected = 1 - math.log(2, 3)
    assert result.completeness_of_factors[0].item() == pytest.approx(expected, abs=0.05)
    assert result.completeness_of_factors[1].item() == pytest.approx(1)
    assert result.informativeness == 1


def test_importance_of_constant_codes() -> None:
    result = dci(torch.zeros(len(FACTORS), 3), FACTORS, num_trees=2)
    assert result.disentanglement == result.completeness == 0
    assert not result.importance.any()
    assert result.informativeness == pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3, abs=0.01)


# Fixed factors.


def test_rows_of_a_group_share_the_factor() -> None:
    factors = torch.stack([torch.arange(900) % 3, (torch.arange(900) % 10 > 0).long()], -1)
    drawn = list(_Rows("test", factors, 30, seed=0).groups(2400))
    rows, fixed = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert rows.shape == (2400, 30)
    assert fixed.bincount().tolist() == [1200, 1200]
    shared = factors[rows, fixed.unsqueeze(-1)]
    assert (shared == shared[:, :1]).all()
    # A value is drawn as often as it occurs, and then each of its rows.
    for factor, share in ((0, 1 / 3), (1, 1 / 10)):
        found = (shared[fixed == factor, 0] == 0).double().mean().item()
        assert found == pytest.approx(share, abs=5 * (share * (1 - share) / 1200) ** 0.5)
    counts = rows[fixed == 0].flatten().bincount(minlength=900)
    # Of one group the counts vary as draws, and groups as a whole with their value.
    assert counts.double().mean() == 40
    assert (counts - 40).abs().max() < 5 * (40 + 40**2 * 2 / 1200) ** 0.5


def test_rows_of_a_pair_share_the_factor_and_differ() -> None:
    factors = torch.stack([torch.arange(60) % 3, torch.arange(60) // 30], -1)
    drawn = list(_Rows("test", factors, 2, seed=0).pairs(2100, 50))
    first, second, fixed = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert first.shape == second.shape == (2100, 50)
    column = fixed.unsqueeze(-1)
    assert torch.equal(factors[first, column], factors[second, column])
    assert (first != second).all()
    for rows in (first, second):
        counts = rows.flatten().bincount(minlength=60)
        assert (counts - 1750).abs().max() < 5 * 1750**0.5
    partners = second[(first == 7) & (column == 0)].bincount(minlength=60)[1::3]
    assert partners[2] == 0  # Row 7 itself.
    others = partners[partners > 0].double()
    assert len(others) == 19
    assert (others - others.mean()).abs().max() < 5 * others.mean() ** 0.5


def test_pairs_have_their_own_values() -> None:
    drawn = next(_Rows("test", FACTORS, 2, seed=0).pairs(10, 50))
    assert len(FACTORS[drawn[0][0], 0].unique()) == 4


def test_codes_that_vary_little_have_no_vote() -> None:
    codes = FACTORS * torch.tensor([1.0, 1.0, 0.029])  # The last: a deviation of 0.0495.
    sizes: dict[str, Any] = {"group_size": 40, "num_train": 900, "num_test": 900}
    kept = factor_vae_score(codes, FACTORS, **sizes, min_scale=0.049)
    assert kept.score == 1
    assert kept.score_of_factors.tolist() == [1, 1, 1]
    pruned = factor_vae_score(codes, FACTORS, **sizes)
    # Of the last factor nothing is left, and a code cannot stand for two factors.
    assert pruned.score_of_factors.tolist() == [1, 1, 0]
    assert pruned.score == pytest.approx(2 / 3)
    assert pruned.chance == pytest.approx(1 / 3)
    assert pruned.train_score == pytest.approx(2 / 3)


def test_a_code_stands_for_the_factor_it_won_most_for() -> None:
    # One code that knows both factors, the first better; the other factor has no code.
    factors = grid(5, 5, repeats=20)
    result = factor_vae_score(
        (10 * factors[:, :1] + factors[:, 1:]), factors, group_size=40, num_train=50, num_test=50
    )
    assert result.score_of_factors.tolist() == [1, 0]


@pytest.mark.parametrize("function", [factor_vae_score, beta_vae_score])
def test_score_is_of_groups_held_out(function: Any) -> None:
    factors = grid(4, 5, 6, repeats=100)
    codes = torch.randn(len(factors), 15)
    result = function(codes, factors, num_train=18, num_test=2000)
    assert result.train_score > 0.6  # Fitted to chance.
    assert result.score == pytest.approx(1 / 3, abs=5 * (2 / 9 / 2000) ** 0.5)


def test_differences_of_perfect_codes_for_each_factor() -> None:
    result = beta_vae_score(FACTORS, FACTORS, num_train=300, num_test=300)
    assert result.score == result.train_score == 1
    assert result.score_of_factors.tolist() == [1, 1, 1]


def test_one_code_alone_cannot_tell_differences_of_three_factors() -> None:
    result = beta_vae_score(FACTORS[:, :1], FACTORS, num_train=600, num_test=600)
    # The first factor is known, the other two are a guess.
    assert result.score_of_factors[0] == 1
    assert result.score == pytest.approx(2 / 3, abs=5 * (2 / 9 / 600) ** 0.5)


def test_constant_codes_leave_only_guessing_of_differences() -> None:
    result = beta_vae_score(torch.zeros(len(FACTORS), 2), FACTORS, num_train=30, num_test=30)
    assert result.score == result.chance == pytest.approx(1 / 3)


# On any guide, without a trace.


def test_codes_of_a_plain_guide() -> None:
    def guide(rows: torch.Tensor) -> None:
        with pyro.plate("rows", len(rows)):
            pyro.sample("style", dist.Normal(0.0, 1.0))
            loc = rows.double() * torch.tensor([1.0, -2.0, 3.0])
            pyro.sample("content", dist.Normal(loc, 0.01).to_event(1))

    codes = encode(guide, FACTORS, site="content")
    assert mig(codes.mean, FACTORS) == pytest.approx(1)
    assert mig(codes.sample(), FACTORS) > 0.8
    assert fixed_by_variance(codes.sample(), FACTORS) == 1


@pytest.mark.parametrize("score", ALL)
def test_repeatable_and_without_side_effects(score: Score) -> None:
    codes, factors = blurred(600)
    codes.requires_grad_()
    kept = codes.detach().clone(), factors.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = score(codes, factors)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    torch.rand(5)
    np.random.rand(5)
    assert score(codes, factors) == first
    assert torch.equal(codes, kept[0])
    assert torch.equal(factors, kept[1])


@pytest.mark.parametrize("name", ["dci", "factor_vae_score", "beta_vae_score"])
def test_seed_counts(name: str) -> None:
    codes, factors = blurred(300)
    sizes: dict[str, Any] = {"num_train": 200, "num_test": 200, "group_size": 5}
    if name == "dci":
        sizes = {"num_trees": 2}
    function: Any = RAW[name]
    first, second = (function(codes, factors, **sizes, seed=seed) for seed in (0, 1))
    key = "informativeness" if name == "dci" else "score"
    assert getattr(first, key) != getattr(second, key)


# Bad input.

BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "rows": (FACTORS[1:], FACTORS, ValueError, "expected codes and factors of the same rows"),
    "float factors": (FACTORS, FACTORS.double(), TypeError, "expected factors of an integer type"),
    "bool factors": (FACTORS, FACTORS > 1, TypeError, "got torch.bool"),
    "bool codes": (FACTORS > 1, FACTORS, TypeError, "expected codes of real numbers"),
    "complex codes": (FACTORS * 1j, FACTORS, TypeError, "expected codes of real numbers"),
    "nan": (FACTORS * math.nan, FACTORS, ValueError, "expected finite codes, got 1440 NaN and 0"),
    "inf": (FACTORS / 0.0, FACTORS, ValueError, "expected finite codes"),
    "array": (FACTORS.numpy(), FACTORS, TypeError, "expected codes to be a tensor"),
    "list": (FACTORS, FACTORS.tolist(), TypeError, "expected factors to be a tensor"),
    "one code": (FACTORS[:, 0], FACTORS, ValueError, r"Pass codes.unsqueeze\(1\)"),
    "labels": (FACTORS, FACTORS[:, 0], ValueError, r"Pass factors.unsqueeze\(1\)"),
    "cube": (FACTORS.unsqueeze(0), FACTORS, ValueError, "expected codes of shape"),
    "no rows": (FACTORS[:0], FACTORS[:0], ValueError, "expected at least one row in codes"),
    "no codes": (FACTORS[:, :0], FACTORS, ValueError, "expected codes with at least . columns"),
    "no factors": (FACTORS, FACTORS[:, :0], ValueError, "expected factors with at least"),
    "one row": (FACTORS[:1], FACTORS[:1], ValueError, "expected every factor to vary"),
    "one value": (FACTORS, FACTORS.clamp(max=0) + 3, ValueError, "one single value in column 0"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", RAW)
def test_bad_input(name: str, case: str) -> None:
    codes, factors, error, message = BAD[case]
    function: Any = RAW[name]
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        function(codes, factors)


@pytest.mark.parametrize("name", ["dci", "factor_vae_score", "beta_vae_score"])
def test_one_factor_has_nothing_to_be_told_from(name: str) -> None:
    function: Any = RAW[name]
    with pytest.raises(ValueError, match=f"{name}: expected factors with at least 2 columns"):
        function(FACTORS, FACTORS[:, :1])


def test_one_code_has_nothing_to_be_told_from() -> None:
    with pytest.raises(ValueError, match="dci: expected codes with at least 2 columns, got 1"):
        dci(FACTORS[:, :1], FACTORS)


@pytest.mark.parametrize("function", [mutual_information_gap, code_factor_information])
def test_too_few_bins(function: Any) -> None:
    with pytest.raises(ValueError, match=f"{function.__name__}: expected num_bins >= 2, got 1"):
        function(FACTORS, FACTORS, num_bins=1)


def test_too_few_trees() -> None:
    with pytest.raises(ValueError, match="dci: expected num_trees >= 1, got 0"):
        dci(FACTORS, FACTORS, num_trees=0)


@pytest.mark.parametrize("function", [factor_vae_score, beta_vae_score])
@pytest.mark.parametrize(("name", "least"), [("group_size", 2), ("num_train", 3), ("num_test", 3)])
def test_too_small_sizes(function: Any, name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{function.__name__}: expected {name} >= {least}, got 1"):
        function(FACTORS, FACTORS, **{name: 1})


def test_too_few_rows_for_a_group() -> None:
    with pytest.raises(ValueError, match="expected at least 81 rows of every value of factor 2"):
        factor_vae_score(FACTORS, FACTORS, group_size=81)
    with pytest.raises(ValueError, match="got a value with 80. Pass more rows or a smaller group"):
        factor_vae_score(FACTORS, FACTORS, group_size=81)
    assert factor_vae_score(FACTORS, FACTORS, group_size=80, num_train=9, num_test=9).score == 1


def test_too_few_rows_for_a_pair() -> None:
    factors = torch.cat([FACTORS, torch.tensor([[0, 9, 0]])])
    with pytest.raises(ValueError, match="2 rows of every value of factor 1, got a value with 1"):
        beta_vae_score(factors, factors)


def test_collapsed_codes_have_no_votes() -> None:
    codes = torch.full((len(FACTORS), 2), 0.1)
    codes[0, 1] = 0.2
    message = "expected a code with a standard deviation above min_scale=0.05, got at most 0.00456"
    with pytest.raises(ValueError, match=f"factor_vae_score: {message}"):
        factor_vae_score(codes, FACTORS)
    with pytest.raises(ValueError, match="above min_scale=0, got at most 0"):
        factor_vae_score(codes[1:], FACTORS[1:], min_scale=0)


@pytest.mark.parametrize("columns", [[3], [-1], [0, 5]])
def test_no_such_column(columns: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sap_score: expected categorical among the columns 0"):
        sap_score(FACTORS, FACTORS, categorical=columns)


@pytest.mark.parametrize("fraction", [0.0, 1.0, math.nan])
def test_split_leaves_no_part_empty(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"dci: expected test_fraction in \(0, 1\), got"):
        dci(FACTORS, FACTORS, test_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.2, 0.8])
def test_too_few_rows_to_split(fraction: float) -> None:
    few = torch.tensor([[0, 0], [1, 1]]).repeat(10, 1)
    few[:2, 1] = 2
    message = f"rows of every value of factor 1 on both .* 2 rows and test_fraction={fraction}"
    with pytest.raises(ValueError, match=f"dci: expected {message}"):
        dci(few, few, test_fraction=fraction, num_trees=1)


def test_ordered_factors_count_as_the_numbers_given() -> None:
    """Not as their ranks, which a subset of the values would change."""
    factors = torch.tensor([1, 2, 4, 8, 16, 32] * 20).unsqueeze(1)
    codes = torch.cat([factors.double(), torch.randn(120, 1)], 1)
    assert float(sap_score(codes, factors, categorical=()).table[0, 0]) == pytest.approx(1.0)


def test_ties_of_the_factor_vae_score_do_not_depend_on_the_order_of_codes() -> None:
    factors = torch.stack([(torch.rand(20_000) < 0.01).long(), torch.arange(20_000) % 4], 1)
    codes = factors.double()
    scores = [factor_vae_score(c, factors, min_scale=0).score for c in (codes, codes.flip(1))]
    assert scores[0] == pytest.approx(scores[1], abs=5 * (2 * 0.25 / 5000) ** 0.5)


def test_bad_columns_and_seeds() -> None:
    factors = torch.cartesian_prod(torch.arange(4), torch.arange(5)).repeat(4, 1)
    with pytest.raises(TypeError, match="sap_score: expected categorical to be a list of columns"):
        sap_score(factors.double(), factors, categorical=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dci: expected seed >= 0, got -1"):
        dci(factors.double(), factors, seed=-1)
