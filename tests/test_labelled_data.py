"""Which rows keep their label."""

from typing import Any

import pytest
import torch

from pyro_vae.datasets import Batches, load_digits
from pyro_vae.labelled_data import mask_labels

LABELS = torch.tensor([0, 1, 5] * 10 + [0] * 20)


@pytest.mark.parametrize("num", [3, 4, 5, 15, 30])
def test_classes_keep_equal_numbers(num: int) -> None:
    kept = mask_labels(LABELS, num)
    assert kept.dtype == torch.bool
    assert kept.shape == LABELS.shape
    counts = torch.stack([(LABELS[kept] == c).sum() for c in (0, 1, 5)])
    assert counts.sum() == num
    assert counts.max() - counts.min() <= 1


def test_digits() -> None:
    (_, y), _ = load_digits()
    kept = mask_labels(y, 100)
    assert (y[kept].bincount() == 10).all()


def test_the_rest_goes_to_classes_with_enough_rows() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    for seed in range(10):
        assert labels[mask_labels(labels, 4, seed=seed)].bincount().tolist() == [1, 1, 2]


def test_the_draw_is_that_of_its_seed_and_of_nothing_else() -> None:
    state = torch.get_rng_state()
    first = mask_labels(LABELS, 6, seed=3)
    torch.manual_seed(99)
    assert torch.equal(mask_labels(LABELS, 6, seed=3), first)
    assert not torch.equal(mask_labels(LABELS, 6, seed=4), first)
    torch.set_rng_state(state)
    mask_labels(LABELS, 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_row_of_a_class_has_the_same_chance() -> None:
    num = 400
    share = torch.stack([mask_labels(LABELS, 15, seed=s) for s in range(num)]).double().mean(0)
    p = torch.where(LABELS == 0, 5 / 30, 5 / 10)
    assert (share - p).abs().max() < 5 * (p * (1 - p) / num).sqrt().max()


def test_batches_walk_them_beside_the_data() -> None:
    x, kept = torch.arange(50.0), mask_labels(LABELS, 6)
    for x_batch, y_batch, kept_batch in Batches(x, LABELS, kept, batch_size=20):
        rows = x_batch.long()
        assert torch.equal(y_batch, LABELS[rows])
        assert torch.equal(kept_batch, kept[rows])


@pytest.mark.parametrize(
    ("labels", "num", "error", "match"),
    [
        (LABELS, 0, ValueError, "got 0, so that all rows are unlabelled. To train without labels"),
        (LABELS, -1, ValueError, "num_labelled >= 0, got -1"),
        (LABELS, 2, ValueError, "num_labelled >= 3, one row of each class, got 2"),
        (LABELS, 51, ValueError, "num_labelled <= 50, the number of rows, got 51"),
        (LABELS, 36, ValueError, "12 or more rows of class 1, got 10, too few for 36"),
        (LABELS, 2.0, TypeError, "an integer num_labelled, got float"),
        (LABELS.double(), 6, TypeError, "labels to be a tensor of integers, got torch.float64"),
        (LABELS > 0, 6, TypeError, "labels to be a tensor of integers, got torch.bool"),
        ([0, 1], 2, TypeError, "labels to be a tensor of integers, got list"),
        (LABELS.view(5, 10), 6, ValueError, r"labels of shape \(N,\) .* got \(5, 10\)"),
        (LABELS[:0], 6, ValueError, r"with at least one row, got \(0,\)"),
    ],
)
def test_what_cannot_be_kept(labels: Any, num: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=f"mask_labels: expected .*{match}"):
        mask_labels(labels, num)
