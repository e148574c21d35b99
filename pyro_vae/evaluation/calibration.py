"""Whether predicted probabilities of classes come true. No Pyro."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.label_checks import check_labels

__all__ = ["Calibration", "calibration"]

_WHERE = "calibration"


@dataclass(frozen=True)
class Calibration:
    """How good predicted probabilities are, and a reliability diagram.

    The confidence of a prediction is the probability of its class, the most probable one.

    Attributes:
        accuracy: Fraction of rows whose most probable class is the right one.
        log_loss: Mean of -log p(label), nats per row; lower is better.
        brier: Mean over the rows of the squared distance between the probabilities and the
            one-hot label, in 0 ... 2; lower is better.
        expected_calibration_error: Mean distance between confidence and accuracy of the bins,
            weighted by their rows; in 0 ... 1, lower is better. Noise alone makes it positive.
        bin_confidence: Mean confidence in each bin, ``(num_bins,)``; NaN where it is empty.
        bin_accuracy: Accuracy in each bin, ``(num_bins,)``; NaN where it is empty.
        bin_count: Rows in each bin, int64, ``(num_bins,)``.
    """

    accuracy: float
    log_loss: float
    brier: float
    expected_calibration_error: float
    bin_confidence: torch.Tensor
    bin_accuracy: torch.Tensor
    bin_count: torch.Tensor


def calibration(log_prob: torch.Tensor, labels: torch.Tensor, num_bins: int = 10) -> Calibration:
    r"""Judges predicted probabilities of classes by the true ones.

    .. math::
        \text{ECE} = \sum_{m=1}^M \frac{n_m}{n} \big|\text{accuracy}_m - \text{confidence}_m\big|

    over M bins of equal width, of which the m-th holds confidences in ((m - 1) / M, m / M].

    Args:
        log_prob: Log-probabilities of the classes, nats, ``(rows, C)``, for instance
            ``class_posterior(...).log_prob``.
        labels: The true classes 0 ... C-1, integers, ``(rows,)``.
        num_bins: M.

    Returns:
        Means over the rows, computed in float64 on the CPU.

    Raises:
        TypeError: If ``log_prob`` holds no floats or ``labels`` no integers.
        ValueError: If a shape does not fit, there are no rows, a row of ``log_prob`` is not
            normalised, a label is no class, or ``num_bins`` is below 1.

    Example:
        >>> prob = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
        >>> result = calibration(prob.log(), torch.tensor([0, 1, 1]))
        >>> f"{result.accuracy:.3f} {result.log_loss:.3f} {result.expected_calibration_error:.3f}"
        '0.667 0.415 0.300'

    References:
        Guo et al. (2017), On calibration of modern neural networks, equation 3,
        https://arxiv.org/abs/1706.04599; Brier (1950), Verification of forecasts expressed in
        terms of probability.
    """
    _check_log_prob(log_prob)
    check_labels(_WHERE, "labels", labels, log_prob.shape[1], num_rows=len(log_prob))
    check_at_least(_WHERE, "num_bins", num_bins, 1)
    log_prob, labels = log_prob.detach().to("cpu", torch.float64), labels.to("cpu", torch.int64)
    prob = log_prob.exp()
    confidence, predicted = prob.max(-1)
    right = (predicted == labels).double()

    limits = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
    bins = torch.bucketize(confidence, limits)
    count = bins.bincount(minlength=num_bins)
    bin_confidence, bin_accuracy = (
        torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, values) / count
        for values in (confidence, right)
    )
    gap = (bin_accuracy - bin_confidence).abs().nan_to_num(nan=0.0)
    one_hot = torch.nn.functional.one_hot(labels, prob.shape[1])
    return Calibration(
        accuracy=float(right.mean()),
        log_loss=-float(log_prob.gather(1, labels.unsqueeze(1)).mean()),
        brier=float((prob - one_hot).square().sum(-1).mean()),
        expected_calibration_error=float((gap * count).sum() / len(labels)),
        bin_confidence=bin_confidence,
        bin_accuracy=bin_accuracy,
        bin_count=count,
    )


def _check_log_prob(log_prob: Any) -> None:
    if not isinstance(log_prob, torch.Tensor) or not log_prob.is_floating_point():
        got = getattr(log_prob, "dtype", type(log_prob).__name__)
        raise TypeError(
            f"{_WHERE}: expected log_prob to be a tensor of floats, got {got}. Pass the "
            "logarithms of probabilities, torch.as_tensor(probabilities).log()."
        )
    if log_prob.dim() != 2 or not log_prob.numel():
        raise ValueError(
            f"{_WHERE}: expected log_prob of shape (rows, classes) with at least one row, got "
            f"{tuple(log_prob.shape)}. Of two classes give both probabilities."
        )
    total = log_prob.detach().double().logsumexp(-1).exp()
    bad = ~((total - 1).abs() <= torch.finfo(log_prob.dtype).eps ** 0.5)
    if bad.any():
        row = int(bad.nonzero()[0])
        got = "NaN" if math.isnan(total[row]) else f"{float(total[row]):g}"
        raise ValueError(
            f"{_WHERE}: expected probabilities that sum to 1 in every row of log_prob, got {got} "
            f"in row {row}. Pass logarithms, and normalise scores with scores.log_softmax(-1)."
        )
