"""Calibration against cases by hand and scikit-learn."""

import math
from typing import Any

import pytest
import torch

from pyro_vae.evaluation.calibration import calibration


def log_of(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


@pytest.fixture
def predicted() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions for three classes that are too sure of themselves."""
    log_prob = (2 * torch.randn(400, 3)).log_softmax(-1)
    labels = torch.distributions.Categorical(logits=0.5 * log_prob).sample()
    return log_prob, labels


# By hand.


def test_four_rows_in_two_bins() -> None:
    log_prob = log_of((0.9, 0.1), (0.2, 0.8), (0.4, 0.6), (0.7, 0.3))
    result = calibration(log_prob, torch.tensor([0, 0, 1, 1]), num_bins=4)
    assert result.accuracy == 0.5
    losses = [math.log(p) for p in (0.9, 0.2, 0.6, 0.3)]
    assert result.log_loss == pytest.approx(-sum(losses) / 4)
    assert result.brier == pytest.approx(2 * (0.1**2 + 0.8**2 + 0.4**2 + 0.7**2) / 4)
    # Confidences 0.6 and 0.7 lie in (0.5, 0.75], of which one is right; 0.8 and 0.9 likewise.
    assert result.bin_count.tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(
        result.bin_confidence, torch.tensor([math.nan, math.nan, 0.65, 0.85]), equal_nan=True
    )
    torch.testing.assert_close(
        result.bin_accuracy, torch.tensor([math.nan, math.nan, 0.5, 0.5]), equal_nan=True
    )
    assert result.expected_calibration_error == pytest.approx(0.5 * 0.15 + 0.5 * 0.35)


def test_bins_are_closed_on_the_right() -> None:
    log_prob = log_of((0.5, 0.5), (0.75, 0.25), (1.0, 0.0))
    result = calibration(log_prob, torch.tensor([0, 0, 0]), num_bins=4)
    assert result.bin_count.tolist() == [0, 1, 1, 1]
    assert result.bin_confidence[1:].tolist() == [0.5, 0.75, 1.0]


def test_bins_of_different_size_count_by_their_rows() -> None:
    log_prob = log_of((0.6, 0.4), (0.6, 0.4), (0.6, 0.4), (1.0, 0.0))
    result = calibration(log_prob, torch.tensor([0, 1, 1, 1]), num_bins=2)
    assert result.expected_calibration_error == pytest.approx(abs(2.8 / 4 - 1 / 4))
    result = calibration(log_prob, torch.tensor([0, 1, 1, 1]), num_bins=4)
    assert result.expected_calibration_error == pytest.approx(0.75 * (0.6 - 1 / 3) + 0.25 * 1)


def test_certain_and_right_or_wrong() -> None:
    log_prob = log_of((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    right = calibration(log_prob, torch.tensor([0, 2]))
    assert (right.accuracy, right.log_loss, right.brier) == (1.0, 0.0, 0.0)
    assert right.expected_calibration_error == 0.0
    wrong = calibration(log_prob, torch.tensor([1, 2]))
    assert wrong.log_loss == math.inf  # and not what a clamped probability gives
    assert (wrong.accuracy, wrong.brier, wrong.expected_calibration_error) == (0.5, 1.0, 0.5)


# scikit-learn.


def test_accuracy_log_loss_and_brier(predicted: tuple[torch.Tensor, torch.Tensor]) -> None:
    from sklearn.metrics import accuracy_score, log_loss

    log_prob, labels = predicted
    result = calibration(log_prob, labels)
    assert result.log_loss == pytest.approx(log_loss(labels.numpy(), log_prob.exp().numpy()))
    most_probable = log_prob.argmax(-1).numpy()
    assert result.accuracy == pytest.approx(accuracy_score(labels.numpy(), most_probable))


def test_brier_of_two_classes(predicted: tuple[torch.Tensor, torch.Tensor]) -> None:
    from sklearn.metrics import brier_score_loss

    log_prob, labels = predicted[0][:, :2].log_softmax(-1), predicted[1] % 2
    result = calibration(log_prob, labels)
    of_one_class = brier_score_loss(labels.numpy(), log_prob[:, 1].exp().numpy())
    assert result.brier == pytest.approx(2 * of_one_class)  # the sum over both


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_the_diagram(predicted: tuple[torch.Tensor, torch.Tensor], num_bins: int) -> None:
    from sklearn.calibration import calibration_curve

    log_prob, labels = predicted
    result = calibration(log_prob, labels, num_bins=num_bins)
    confidence, most_probable = log_prob.exp().max(-1)
    right = (most_probable == labels).numpy()
    accuracies, confidences = calibration_curve(right, confidence.numpy(), n_bins=num_bins)
    filled = result.bin_count > 0
    assert result.bin_accuracy[filled].tolist() == pytest.approx(list(accuracies))
    assert result.bin_confidence[filled].tolist() == pytest.approx(list(confidences))
    assert result.bin_confidence[~filled].isnan().all()
    assert int(result.bin_count.sum()) == len(labels)
    gap = (result.bin_accuracy - result.bin_confidence).abs()[filled]
    expected = float((gap * result.bin_count[filled]).sum() / len(labels))
    assert result.expected_calibration_error == pytest.approx(expected)
    assert result.expected_calibration_error > 0.05  # they are too sure


def test_predictions_that_come_true() -> None:
    num = 20_000
    log_prob = torch.randn(num, 3).log_softmax(-1)
    labels = torch.distributions.Categorical(logits=log_prob).sample()
    result = calibration(log_prob, labels)
    # Every bin is off by the noise of its rows alone.
    error = (result.bin_accuracy * (1 - result.bin_accuracy) / result.bin_count).sqrt()
    filled = result.bin_count > 100
    assert int(filled.sum()) >= 6
    gap = (result.bin_accuracy - result.bin_confidence).abs()
    assert (gap < 5 * error)[filled].all()
    noise = (error.nan_to_num() * result.bin_count).sum() / num
    assert result.expected_calibration_error < 5 * float(noise)
    entropy = torch.distributions.Categorical(logits=log_prob).entropy()
    loss = -log_prob.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert abs(result.log_loss - float(entropy.mean())) < 5 * float(loss.std()) / num**0.5


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_dtypes(predicted: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    log_prob, labels = predicted
    expected = calibration(log_prob, labels)
    result = calibration(log_prob.float().requires_grad_(), labels.to(dtype))
    assert result.log_loss == pytest.approx(expected.log_loss, rel=1e-6)
    assert result.brier == pytest.approx(expected.brier, rel=1e-6)
    assert result.bin_confidence.dtype == torch.float64


# Errors.


@pytest.mark.parametrize("log_prob", [[[0.0]], torch.zeros(2, 3, dtype=torch.int64)])
def test_log_probabilities_of_another_type(log_prob: Any) -> None:
    match = "calibration: expected log_prob to be a tensor of floats, got (list|torch.int64)"
    with pytest.raises(TypeError, match=match):
        calibration(log_prob, torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(2,), (0, 3), (2, 0), (2, 3, 1)])
def test_log_probabilities_of_another_shape(shape: tuple[int, ...]) -> None:
    match = r"calibration: expected log_prob of shape \(rows, classes\) with at least one row, got"
    with pytest.raises(ValueError, match=match):
        calibration(torch.zeros(shape), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("row", "got"),
    [((0.5, 0.5), "2.71"), ((0.0, -math.inf), None), ((math.nan, 0.0), "NaN"), ((3.0, 1.0), "22")],
)
def test_rows_that_are_not_normalised(row: tuple[float, float], got: str | None) -> None:
    log_prob = torch.stack([torch.tensor([0.5, 0.5]).log(), torch.tensor(row)])
    labels = torch.tensor([0, 0])
    if got is None:
        calibration(log_prob, labels)
        return
    if got == "2.71":
        got = f"{2 * math.exp(0.5):g}"
    match = f"calibration: expected probabilities that sum to 1 .*, got {got}.* in row 1.*softmax"
    with pytest.raises(ValueError, match=match):
        calibration(log_prob, labels)


def test_labels_that_do_not_fit() -> None:
    log_prob = log_of((0.5, 0.5), (0.5, 0.5))
    with pytest.raises(ValueError, match=r"calibration: expected classes 0 \.\.\. 1 in labels"):
        calibration(log_prob, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"calibration: expected labels of shape \(2,\)"):
        calibration(log_prob, torch.tensor([0, 1, 1]))
    with pytest.raises(TypeError, match="calibration: expected labels of integers"):
        calibration(log_prob, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="calibration: expected num_bins >= 1, got 0"):
        calibration(log_prob, torch.tensor([0, 1]), num_bins=0)
