"""Pairs of one class, and the distribution of what is missing."""

import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae import datasets
from pyro_vae.paired_data import drop_modalities, pair_by_class


def global_random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        numpy_state[2],
        random.getstate(),
    )


def test_both_are_among_the_data_sets() -> None:
    assert datasets.pair_by_class is pair_by_class
    assert datasets.drop_modalities is drop_modalities


# Pairs.


def classes(*sizes: int) -> torch.Tensor:
    """So many items of class 0, 1, ... in random order."""
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return y[torch.randperm(len(y))]


SIZES = [((50, 7), (5, 30)), ((3, 4), (11, 4)), ((9, 1), (1, 9)), ((6, 6), (4, 12))]


@pytest.mark.parametrize("copies", [1, 3, 4, 10])
@pytest.mark.parametrize(("first", "second"), SIZES)
def test_pairs_are_of_one_class_and_use_all_evenly(
    first: tuple[int, ...], second: tuple[int, ...], copies: int
) -> None:
    y_first, y_second = classes(*first), classes(*second)
    rows_first, rows_second = pair_by_class(y_first, y_second, copies=copies)
    assert rows_first.dtype == rows_second.dtype == torch.int64
    assert rows_first.tolist() == [row for row in range(len(y_first)) for _ in range(copies)]
    assert torch.equal(y_first[rows_first], y_second[rows_second])
    uses = rows_second.bincount(minlength=len(y_second))
    for label in y_first.unique():
        of_class = uses[y_second == label]
        assert of_class.max() - of_class.min() <= 1
        if len(of_class) < copies:
            continue
        partners = rows_second.reshape(-1, copies)[y_first == label]
        assert [len(set(row)) for row in partners.tolist()] == [copies] * len(partners)


def test_every_partner_is_equally_likely() -> None:
    """Also for items whose partners come from two rounds: 3 of 4, of which 1 is left over."""
    y_first, y_second = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    num_draws, copies = 2000, 3
    count = torch.zeros(3, 4)
    for seed in range(num_draws):
        first, second = pair_by_class(y_first, y_second, copies=copies, seed=seed)
        count.index_put_((first, second), torch.ones(len(first)), accumulate=True)
    p = copies / len(y_second)
    error = 5 * (p * (1 - p) / num_draws) ** 0.5
    assert ((count / num_draws - p).abs() < error).all()


def test_partners_of_different_items_are_independent_of_one_another() -> None:
    """One item is used once a round, which says nothing about the next round."""
    num_draws, num = 2000, 3
    y = torch.zeros(num, dtype=torch.int64)
    count = torch.zeros(num, num)
    for seed in range(num_draws):
        _, second = pair_by_class(torch.zeros(2 * num, dtype=torch.int64), y, seed=seed)
        count[second[0], second[num]] += 1
    p = 1 / num**2
    assert ((count / num_draws - p).abs() < 5 * (p * (1 - p) / num_draws) ** 0.5).all()


def test_an_item_used_late_in_a_round_is_used_anywhere_in_the_next() -> None:
    """Of 7, two items get 3 each and one is left for the third item, whose next two come anew.

    The fourth item then gets 3 of the 5 that are left, among them the one of before.
    """
    num_draws, again = 2000, 0
    y_first, y_second = torch.zeros(4, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    for seed in range(num_draws):
        partners = pair_by_class(y_first, y_second, copies=3, seed=seed)[1].reshape(4, 3)
        again += int(partners[2, 0] in partners[3])
    assert again / num_draws == pytest.approx(3 / 5, abs=5 * (0.6 * 0.4 / num_draws) ** 0.5)


def test_classes_of_the_second_data_set_alone_are_not_used() -> None:
    y_second = torch.tensor([8, 5, 9, 5])
    _, second = pair_by_class(torch.tensor([5, 5, 5, 5]), y_second)
    assert sorted(second.tolist()) == [1, 1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_classes_of_any_integers(dtype: torch.dtype) -> None:
    y = torch.tensor([0, 1, 1, 0])
    first, second = pair_by_class(y.to(dtype), y.long())
    assert torch.equal(y[first], y[second])


def test_pairs_depend_on_the_seed_alone() -> None:
    y = classes(20, 20)
    before = global_random_states()
    one = pair_by_class(y, y, copies=2, seed=1)
    assert global_random_states() == before
    torch.rand(3)
    with torch.device("meta"):  # Where a program's new tensors go by default plays no part.
        again = pair_by_class(y, y, copies=2, seed=1)
    assert torch.equal(one[1], again[1])
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[1], pair_by_class(y, y, copies=2, seed=2)[1])
    assert torch.equal(pair_by_class(y, y)[1], pair_by_class(y, y, copies=1, seed=0)[1])


def test_class_without_a_partner() -> None:
    message = (
        r"pair_by_class: expected every class of y_first in y_second, got none of \[3, 7\]. Leave"
    )
    with pytest.raises(ValueError, match=message):
        pair_by_class(torch.tensor([7, 1, 3, 7]), torch.tensor([1, 2]))


def test_classes_of_wrong_form() -> None:
    y = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="expected integers in y_second, got torch.float64. Conv"):
        pair_by_class(y, y.double())
    with pytest.raises(TypeError, match="expected integers in y_first, got torch.complex128"):
        pair_by_class(y.to(torch.complex128), y)
    with pytest.raises(TypeError, match="expected y_first to be a tensor of .*, got list"):
        pair_by_class([0, 1], y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected y_second of shape \(N,\), got \(2, 3\). Pass"):
        pair_by_class(y, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected at least one row in y_first, got an empty"):
        pair_by_class(y[:0], y)


def test_copies_and_seed_are_integers() -> None:
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="pair_by_class: expected copies >= 1, got 0"):
        pair_by_class(y, y, copies=0)
    with pytest.raises(TypeError, match="pair_by_class: expected an integer copies, got float"):
        pair_by_class(y, y, copies=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair_by_class: expected seed >= 0, got -1"):
        pair_by_class(y, y, seed=-1)


# What is missing.


def data(num_rows: int, *names: str) -> dict[str, torch.Tensor]:
    """Only numbers of rows and names count."""
    return {name: torch.full((num_rows,), torch.nan) for name in names}


@pytest.mark.parametrize("keep_one", [True, False])
@pytest.mark.parametrize("names", [("x",), ("x", "y"), ("x", "y", "w")])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_probability_of_every_subset(
    names: tuple[str, ...], fraction: float, keep_one: bool
) -> None:
    num_rows, num_modalities = 50_000, len(names)
    present = drop_modalities(data(num_rows, *names), fraction, keep_one=keep_one)
    assert tuple(present) == names
    kept = torch.stack(list(present.values()), -1)
    assert kept.dtype == torch.bool
    for subset in product([False, True], repeat=num_modalities):
        num_kept = sum(subset)
        p = (1 - fraction) ** num_kept * fraction ** (num_modalities - num_kept)
        if keep_one:
            p = p / (1 - fraction**num_modalities) if num_kept else 0.0
        frequency = (kept == torch.tensor(subset)).all(-1).double().mean().item()
        assert frequency == pytest.approx(p, abs=5 * (p * (1 - p) / num_rows) ** 0.5 + 1e-12)


def test_one_half_of_two_modalities_makes_three_equal_parts() -> None:
    num_rows = 50_000
    x, y = drop_modalities(data(num_rows, "x", "y"), 0.5).values()
    error = 5 * (1 / 3 * 2 / 3 / num_rows) ** 0.5
    for part in (x & y, x & ~y, ~x & y):
        assert part.double().mean().item() == pytest.approx(1 / 3, abs=error)


def test_fraction_that_is_missing_in_the_end() -> None:
    num_rows, f, num = 50_000, 0.6, 3
    present = drop_modalities(data(num_rows, "x", "y", "w"), f)
    p = (f - f**num) / (1 - f**num)
    for mask in present.values():
        missing = 1 - mask.double().mean().item()
        assert missing == pytest.approx(p, abs=5 * (p * (1 - p) / num_rows) ** 0.5)


def test_rows_are_independent() -> None:
    mask = drop_modalities(data(50_000, "x", "y"), 0.5)["x"].double()
    mask = mask - mask.mean()
    correlation = (mask[1:] * mask[:-1]).mean() / mask.var()
    assert abs(correlation.item()) < 5 / len(mask) ** 0.5


@pytest.mark.parametrize("keep_one", [True, False])
def test_nothing_dropped(keep_one: bool) -> None:
    present = drop_modalities(data(100, "x", "y"), 0.0, keep_one=keep_one)
    assert all(mask.all() for mask in present.values())


def test_nearly_everything_dropped() -> None:
    present = drop_modalities(data(5000, "x", "y"), 1 - 1e-12)
    assert (present["x"] ^ present["y"]).all()  # Both would be a chance of one in 10^12.
    assert present["x"].double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 5000**0.5)


def test_missing_depends_on_the_seed_alone_and_the_batch_stays() -> None:
    batch = {"x": torch.randn(50, 2), "y": torch.arange(50)}
    copies = {name: x.clone() for name, x in batch.items()}
    before = global_random_states()
    one = drop_modalities(batch, 0.5, seed=1)
    assert global_random_states() == before
    torch.rand(3)
    with torch.device("meta"):
        again = drop_modalities(batch, 0.5, seed=1)
    assert all(torch.equal(one[name], again[name]) for name in batch)
    assert not torch.equal(one["x"], drop_modalities(batch, 0.5, seed=2)["x"])
    assert batch.keys() == copies.keys()
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2, float("nan")])
def test_fraction_is_a_probability_below_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"expected fraction in \[0, 1\), got {fraction}. 0.5 "):
        drop_modalities(data(3, "x"), fraction)


def test_batches_of_wrong_form() -> None:
    with pytest.raises(TypeError, match="drop_modalities: expected a mapping .*, got Tensor. Pass"):
        drop_modalities(torch.zeros(3), 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected 'y' to be a tensor of .*, got NoneType"):
        drop_modalities({"x": torch.zeros(3), "y": None}, 0.5)  # type: ignore[dict-item]
    message = r"expected modalities with the same number of rows, at least one, got {}. Every"
    with pytest.raises(ValueError, match=message.format("{'x': 3, 'y': 2}")):
        drop_modalities({"x": torch.zeros(3), "y": torch.zeros(2)}, 0.5)
    with pytest.raises(ValueError, match=message.format("{}")):
        drop_modalities({}, 0.5)
    with pytest.raises(ValueError, match="drop_modalities: expected seed >= 0, got -1"):
        drop_modalities(data(3, "x"), 0.5, seed=-1)
