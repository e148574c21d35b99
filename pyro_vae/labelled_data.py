"""Data with labels for some of them."""

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.label_checks import is_integer

__all__ = ["mask_labels"]


def mask_labels(labels: torch.Tensor, num_labelled: int, *, seed: int = 0) -> torch.Tensor:
    """Draws which rows keep their label: classes in equal numbers, give or take one.

    Args:
        labels: Classes of all rows, integers of shape ``(N,)``.
        num_labelled: How many rows keep their label.
        seed: Seed of the draw; the global random state is not touched.

    Returns:
        bool, ``(N,)``, on the labels' device: True in ``num_labelled`` rows.

    Raises:
        TypeError: If ``labels`` is no tensor of integers or ``num_labelled`` no integer.
        ValueError: If there are no labels, ``num_labelled`` is below the number of classes or
            above that of rows, or a class has too few rows for its share.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
        >>> labelled = mask_labels(labels, 6)
        >>> labels[labelled].bincount()
        tensor([2, 2, 2])

    References:
        Kingma et al. (2014), Semi-supervised learning with deep generative models, section 4.1,
        https://arxiv.org/abs/1406.5298: 100 to 3,000 labels of MNIST, as many of each class.
    """
    _check(labels, num_labelled)
    check_at_least("mask_labels", "seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    on_cpu = labels.cpu()  # So that a seed means the same rows on every device.
    values, counts = on_cpu.unique(return_counts=True)
    if num_labelled < len(values):
        raise ValueError(
            f"mask_labels: expected num_labelled >= {len(values)}, one row of each class, got "
            f"{num_labelled}. Keep {len(values)} or more, or choose rows of your own."
        )
    shares = _shares(counts, num_labelled, generator)
    kept = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for value, count, share in zip(values, counts, shares.tolist(), strict=True):
        if count < share:
            raise ValueError(
                f"mask_labels: expected {share} or more rows of class {int(value)}, got "
                f"{int(count)}, too few for {num_labelled} labels of {len(values)} classes in "
                "equal numbers. Keep fewer labels, or choose rows of your own."
            )
        rows = (on_cpu == value).nonzero().squeeze(-1)
        order = torch.randperm(len(rows), generator=generator, device="cpu")
        kept[rows[order[:share]]] = True
    return kept.to(labels.device)


def _shares(counts: torch.Tensor, total: int, generator: torch.Generator) -> torch.Tensor:
    """How many of each class: the remainder goes to classes at random that have enough rows."""
    share, rest = divmod(total, len(counts))
    order = torch.randperm(len(counts), generator=generator, device="cpu")
    order = order[(counts[order] <= share).to(torch.uint8).argsort(stable=True)]
    shares = torch.full_like(counts, share)
    shares[order[:rest]] += 1
    return shares


def _check(labels: torch.Tensor, num_labelled: int) -> None:
    if not isinstance(labels, torch.Tensor) or not is_integer(labels):
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(
            f"mask_labels: expected labels to be a tensor of integers, got {got}. Pass the class "
            "of each row; labels.argmax(-1) if they are one-hot."
        )
    if labels.dim() != 1 or not len(labels):
        raise ValueError(
            f"mask_labels: expected labels of shape (N,) with at least one row, got "
            f"{tuple(labels.shape)}. Pass the class of each row."
        )
    check_at_least("mask_labels", "num_labelled", num_labelled, 0)
    if num_labelled == 0:
        raise ValueError(
            "mask_labels: expected num_labelled >= 1, got 0, so that all rows are unlabelled. To "
            "train without labels call model and guide with the data alone."
        )
    if num_labelled > len(labels):
        raise ValueError(
            f"mask_labels: expected num_labelled <= {len(labels)}, the number of rows, got "
            f"{num_labelled}. Keep fewer labels."
        )
