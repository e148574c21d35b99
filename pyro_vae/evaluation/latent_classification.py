"""How well a linear classifier reads the class from the code, given each subset of modalities."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.checks import support_of
from pyro_vae.evaluation.labelled import LabelledBatch, Rate, subsets_of, table
from pyro_vae.isolation import without_side_effects
from pyro_vae.latents import encode

__all__ = ["LatentClassification", "latent_classification"]

_WHERE = "latent_classification"

Given = tuple[str, ...]


@dataclass(frozen=True)
class LatentClassification:
    """Accuracy of a linear classifier of codes; printed, a table.

    Attributes:
        accuracy: On the test rows in which the whole subset is present, by subset.
        majority: Of guessing the most frequent class of the training rows, on the same test rows.
        num_train: Rows that the classifier was fitted to, by subset.
    """

    accuracy: Mapping[Given, Rate]
    majority: Mapping[Given, float]
    num_train: Mapping[Given, int]

    def __str__(self) -> str:
        rows = [("given", "right", "s.e.", "rows", "majority")]
        for given, rate in self.accuracy.items():
            rows.append((", ".join(given), *rate.cells(), f"{self.majority[given]:.3f}"))
        return table(rows, num_left=1)


def latent_classification(
    guide: Callable[..., Any],
    train_batch: Mapping[str, torch.Tensor],
    train_labels: torch.Tensor,
    test_batch: Mapping[str, torch.Tensor],
    test_labels: torch.Tensor,
    *,
    train_present: Mapping[str, torch.Tensor] | None = None,
    test_present: Mapping[str, torch.Tensor] | None = None,
    given: Collection[Given] | None = None,
    site: str | None = None,
    sample: bool = False,
) -> LatentClassification:
    """Accuracy of logistic regression from the code to the class, given each subset.

    Protocol: for each subset of modalities, the rows in which all of it is present are encoded
    from it alone; a multinomial logistic regression (scikit-learn's with C = 1, on codes
    standardised by the training rows) is fitted to the training rows and judged on the test
    rows. The guide is called as ``guide(batch, present)``, with ``None`` in place of the other
    modalities; ``present`` is ``None`` if it is here.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched.
    The guide runs on all rows at once.

    Args:
        guide: Any guide of that signature.
        train_batch: Data ``(train, *event)`` by modality.
        train_labels: Classes 0, 1, ..., integers of shape ``(train,)``.
        test_batch: Data ``(test, *event)`` of the same modalities.
        test_labels: Their classes, ``(test,)``.
        train_present: bool ``(train,)`` by modality; one without a key is present in all rows.
        test_present: The same for the test rows.
        given: Which subsets are encoded in turn; all for up to 4 modalities.
        site: Which latent; needed where the guide has several.
        sample: Whether a code is one sample, or the mean of its distribution where that exists.
            The mean of a mixture of experts lies between them, where no code is ever drawn.

    Returns:
        Accuracies in 0 ... 1 with binomial standard errors over the test rows, and what guessing
        the most frequent class reaches.

    Raises:
        TypeError: If batches, labels, masks or subsets are of the wrong type.
        ValueError: If there are fewer than two modalities, or more than 4 and no ``given``; names
            or shapes do not fit; a subset has no test rows, or its training rows no two classes;
            the site is not named, not in the plate over the data, or discrete; a code is not
            finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(batch, present):  # Sees nothing but the left one.
        ...     num = next(len(x) for x in batch.values() if x is not None)
        ...     x = torch.zeros(num, 1) if batch["left"] is None else batch["left"]
        ...     with pyro.plate("data", num):
        ...         pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        >>> y = torch.arange(40) % 2
        >>> batch = {"left": 4.0 * y.unsqueeze(1), "right": torch.zeros(40, 1)}
        >>> print(latent_classification(guide, batch, y, batch, y))
        given        right   s.e.  rows  majority
        left         1.000  0.000    40     0.500
        right        0.500  0.079    40     0.500
        left, right  1.000  0.000    40     0.500

    References:
        Sutter et al. (2021), Generalized multimodal ELBO,
        https://arxiv.org/abs/2105.02470
    """
    train = LabelledBatch(_WHERE, train_batch, train_labels, train_present)
    test = LabelledBatch(_WHERE, test_batch, test_labels, test_present)
    if set(train.data) != set(test.data):
        raise ValueError(
            f"{_WHERE}: expected the same modalities in both batches, got {list(train.data)} and "
            f"{list(test.data)}. Mark rows without a modality in train_present or test_present."
        )
    subsets = subsets_of(_WHERE, list(train.data), given, proper=False)
    accuracy, majority, num_train = {}, {}, {}
    for subset in subsets:
        rows, test_rows = train.rows(subset), test.rows(subset)
        labels, true = train.labels.cpu()[rows], test.labels.cpu()[test_rows]
        _check_classes(subset, labels, true)
        codes, test_codes = (
            _codes(guide, data, subset, part, site, sample)
            for data, part in ((train, rows), (test, test_rows))
        )
        accuracy[subset] = Rate.of(_predicted(codes, labels, test_codes) == true)
        majority[subset] = float((true == labels.bincount().argmax()).double().mean())
        num_train[subset] = len(labels)
    return LatentClassification(accuracy, majority, num_train)


def _check_classes(given: Given, labels: torch.Tensor, test_labels: torch.Tensor) -> None:
    if len(labels.unique()) < 2 or not len(test_labels):
        raise ValueError(
            f"{_WHERE}: expected training rows of two classes and test rows that have all of "
            f"{given}, got {len(labels.unique())} classes and {len(test_labels)} test rows. Leave "
            "this subset out with given=[...], or pass more rows."
        )


def _codes(
    guide: Callable[..., Any],
    data: LabelledBatch,
    given: Given,
    rows: torch.Tensor,
    site: str | None,
    sample: bool,
) -> torch.Tensor:
    """Codes of these rows, from these modalities: float64 ``(rows, dimensions)`` on the CPU."""
    q = encode(guide, *data.only(given, rows), site=site)
    num_rows = int(rows.sum())
    if q.batch_shape != (num_rows,):
        raise ValueError(
            f"{_WHERE}: expected one code for each of {num_rows} rows, got codes of batch shape "
            f"{tuple(q.batch_shape)}. Name a latent in the plate over the data with site=..., and "
            "declare the dimensions of one code with .to_event(1)."
        )
    if getattr(support_of(q), "is_discrete", False):
        raise ValueError(
            f"{_WHERE}: expected a continuous latent, got a discrete one, whose values have no "
            "linear classifier. Name another one with site=..."
        )
    with without_side_effects(guide):
        try:
            codes = q.sample() if sample else q.mean
        except NotImplementedError:
            codes = q.sample()
    codes = codes.reshape(num_rows, -1).to("cpu", torch.float64)
    if not codes.isfinite().all():
        raise ValueError(
            f"{_WHERE}: expected finite codes given {given}, got "
            f"{int((~codes.isfinite()).any(1).sum())} of {len(codes)} rows that are not. Look at "
            "what the guide makes of them."
        )
    return codes


def _predicted(codes: torch.Tensor, labels: torch.Tensor, test_codes: torch.Tensor) -> torch.Tensor:
    """The classes of the test rows by logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(codes.numpy(), labels.numpy())
    return torch.as_tensor(classifier.predict(test_codes.numpy()))
