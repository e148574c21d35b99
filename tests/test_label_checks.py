"""What is no class label, and the messages about it."""

from typing import Any

import pytest
import torch

from pyro_vae.label_checks import check_labels, is_integer

INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]
INTEGERS += [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_taken(dtype: torch.dtype) -> None:
    y = torch.tensor([2, 0, 1], dtype=dtype)
    assert is_integer(y)
    check_labels("here", "y", y, 3)
    check_labels("here", "y", y, 3, num_rows=3)
    check_labels("here", "y", y, 2, labelled=torch.tensor([False, True, True]))
    with pytest.raises(ValueError, match=r"here: expected classes 0 \.\.\. 1 in y, got 2"):
        check_labels("here", "y", y, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.complex64])
def test_others_are_not(dtype: torch.dtype) -> None:
    y = torch.tensor([1, 0, 1], dtype=dtype)
    assert not is_integer(y)
    match = rf"here: expected y of integers, classes 0 \.\.\. 1, got {dtype}. y.long\(\) turns"
    with pytest.raises(TypeError, match=match):
        check_labels("here", "y", y, 2)


@pytest.mark.parametrize("y", [[0, 1], 1, None, "01"])
def test_no_tensor(y: Any) -> None:
    match = f"here: expected y to be a tensor of integers, got {type(y).__name__}.*as_tensor"
    with pytest.raises(TypeError, match=match):
        check_labels("here", "y", y, 2)


def test_one_hot_rows_are_recognised() -> None:
    with pytest.raises(TypeError, match=r"torch.float64. y.argmax\(-1\) turns one-hot rows into"):
        check_labels("here", "y", torch.eye(3), 3)
    with pytest.raises(TypeError, match=r"torch.float64. y.long\(\) turns them into classes"):
        check_labels("here", "y", torch.tensor([0.0, 1.0]), 1)
    match = r"expected y of shape \(3,\), one class for each row, got \(3, 3\).*y.argmax\(-1\)"
    with pytest.raises(ValueError, match=match):
        check_labels("here", "y", torch.eye(3).long(), 3, num_rows=3)


@pytest.mark.parametrize("bad", [-1, 3, 255])
def test_classes_out_of_range(bad: int) -> None:
    y = torch.tensor([0, 2, bad])
    match = rf"here: expected classes 0 \.\.\. 2 in y, got {bad}. Number the classes from 0"
    with pytest.raises(ValueError, match=match):
        check_labels("here", "y", y, 3)


def test_any_shape_without_rows_to_compare() -> None:
    check_labels("here", "y", torch.arange(3).reshape(3, 1, 1), 3)
    check_labels("here", "y", torch.tensor(2), 3)
    check_labels("here", "y", torch.zeros(0, dtype=torch.int64), 3)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (), (1, 3)])
def test_another_number_of_rows(shape: tuple[int, ...]) -> None:
    y = torch.zeros(shape, dtype=torch.int64)
    match = r"here: expected y of shape \(3,\), one class for each row, got \("
    with pytest.raises(ValueError, match=match):
        check_labels("here", "y", y, 3, num_rows=3)


def test_only_labelled_rows_count() -> None:
    y = torch.tensor([0, -1, 7, 2])
    labelled = torch.tensor([True, False, False, True])
    check_labels("here", "y", y, 3, num_rows=4, labelled=labelled)
    check_labels("here", "y", y, 3, num_rows=4, labelled=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got -1\. .*mark rows without a label by labelled=False"):
        check_labels("here", "y", y, 3, num_rows=4, labelled=~labelled)


@pytest.mark.parametrize("labelled", [[True, False], torch.tensor([1, 0]), torch.tensor([1.0, 0])])
def test_labelled_of_another_type(labelled: Any) -> None:
    got = "list" if isinstance(labelled, list) else str(labelled.dtype)
    match = f"here: expected labelled to be a bool tensor, got {got}. True marks the rows"
    with pytest.raises(TypeError, match=match):
        check_labels("here", "y", torch.tensor([0, 1]), 3, labelled=labelled)


@pytest.mark.parametrize("shape", [(1,), (3,), (), (2, 1)])
def test_labelled_of_another_shape(shape: tuple[int, ...]) -> None:
    labelled = torch.ones(shape, dtype=torch.bool)
    match = r"here: expected labelled of shape \(2,\) as the labels, got"
    with pytest.raises(ValueError, match=match):
        check_labels("here", "y", torch.tensor([0, 1]), 3, labelled=labelled)
