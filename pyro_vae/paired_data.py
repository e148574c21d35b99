"""Data of several modalities: pairs of items of one class, and modalities that are missing."""

from collections.abc import Mapping

import torch

from pyro_vae.checks import check_at_least, check_batch

__all__ = ["drop_modalities", "pair_by_class"]


def pair_by_class(
    y_first: torch.Tensor, y_second: torch.Tensor, *, copies: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs each item of one data set with random items of the same class in another one.

    All items of the second set that share a class are used equally often, give or take one, and
    the partners of one item of the first set differ, as far as the second set has ``copies`` of its
    class. Items of the second set whose class the first one lacks are not used.

    Args:
        y_first: Classes in the first data set, integers of shape ``(N,)``.
        y_second: Classes in the second data set, integers of shape ``(M,)``.
        copies: Number of partners of each item of the first data set.
        seed: Seed of the draw; the global random state is not touched.

    Returns:
        ``(rows_first, rows_second)``: the rows of each pair, int64 of shape ``(copies * N,)``.
        Those of the first data set are in order, each repeated ``copies`` times.

    Raises:
        TypeError: If the classes are not tensors of integers.
        ValueError: If there are none, or a class of the first data set is not in the second.

    Example:
        >>> first, second = pair_by_class(torch.tensor([7, 3]), torch.tensor([3, 3, 7]), copies=2)
        >>> first
        tensor([0, 0, 1, 1])
        >>> second[:2], second[2:].sort().values
        (tensor([2, 2]), tensor([0, 1]))

    References:
        Shi et al. (2019), Variational mixture-of-experts autoencoders for multi-modal deep
        generative models, section 4.1, https://arxiv.org/abs/1911.03393: MNIST and SVHN with 20
        partners. Every item of the first data set gets its partners here, also where the second
        has fewer of its class.
    """
    check_at_least("pair_by_class", "copies", copies, 1)
    check_at_least("pair_by_class", "seed", seed, 0)
    for name, y in (("y_first", y_first), ("y_second", y_second)):
        _check_classes(name, y)
    first, second = y_first.cpu(), y_second.cpu()
    missing = sorted(set(first.tolist()) - set(second.tolist()))
    if missing:
        raise ValueError(
            f"pair_by_class: expected every class of y_first in y_second, got none of {missing}. "
            "Leave those items out of the first data set."
        )
    generator = torch.Generator().manual_seed(seed)
    partners = torch.empty(len(first), copies, dtype=torch.int64, device="cpu")
    for label in first.unique():
        here, there = first == label, (second == label).nonzero().squeeze(-1)
        partners[here] = _partners(there, int(here.sum()), copies, generator)
    rows = torch.arange(len(first), device=y_first.device).repeat_interleave(copies)
    return rows, partners.flatten().to(y_second.device)


def _partners(
    rows: torch.Tensor, num: int, copies: int, generator: torch.Generator
) -> torch.Tensor:
    """Rows in random order, again and again, dealt out ``(num, copies)``."""

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return x[torch.randperm(len(x), generator=generator, device="cpu")]

    rounds: list[torch.Tensor] = []
    num_dealt = 0
    while num_dealt < num * copies:
        turn = shuffled(rows)
        if begun := num_dealt % copies:  # An item that has some of its partners gets others now.
            others = turn[~torch.isin(turn, rounds[-1][-begun:])][: copies - begun]
            turn = torch.cat([others, shuffled(turn[~torch.isin(turn, others)])])
        rounds.append(turn)
        num_dealt += len(turn)
    return torch.cat(rounds)[: num * copies].reshape(num, copies)


def drop_modalities(
    batch: Mapping[str, torch.Tensor], fraction: float, *, keep_one: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Draws which modalities of each row are there: data with parts missing at random.

    Each modality of each row is missing with probability f = ``fraction``, independently. With
    ``keep_one`` that is conditioned on at least one of the M modalities of a row being there, as if
    rows with none were drawn again; a modality is then missing with probability
    (f - f^M) / (1 - f^M), which is less than f: with two modalities and f = 0.5 both, only the
    first and only the second are equally frequent. For another fraction in each modality, draw
    them apart, each with a seed of its own and ``keep_one=False``, and join the dictionaries.

    Args:
        batch: Data of each modality, ``(batch, *event)``; only its names and lengths count.
        fraction: Probability of missing, in [0, 1).
        keep_one: Whether each row keeps at least one modality.
        seed: Seed of the draw, the same for the same seed; the global random state is not touched.

    Returns:
        For each modality a mask ``(batch,)``, true where it is present, on the data's device.

    Raises:
        TypeError: If ``batch`` is not a mapping of tensors.
        ValueError: If there is no modality, if numbers of rows differ, if ``fraction`` is outside
            [0, 1).

    Example:
        >>> batch = {"image": torch.zeros(100_000, 8), "label": torch.zeros(100_000)}
        >>> present = drop_modalities(batch, 0.5)
        >>> bool((present["image"] | present["label"]).all())
        True
        >>> print(f"{1 - present['image'].double().mean():.2f}")  # (0.5 - 0.25) / (1 - 0.25)
        0.33
    """
    check_at_least("drop_modalities", "seed", seed, 0)
    _check_modalities(batch)
    if not 0 <= fraction < 1:
        raise ValueError(
            f"drop_modalities: expected fraction in [0, 1), got {fraction}. 0.5 drops every second "
            "modality."
        )
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(next(iter(batch.values())))
    kept_none = torch.ones(num_rows, dtype=torch.bool, device="cpu")
    present = {}
    for left, name in zip(range(len(batch), 0, -1), batch, strict=True):
        keep = torch.full((num_rows,), 1.0 - fraction, dtype=torch.float64, device="cpu")
        if keep_one:  # Given that one of those left is kept, as no earlier one was.
            keep[kept_none] /= 1.0 - fraction**left
        uniform = torch.rand(num_rows, dtype=torch.float64, generator=generator, device="cpu")
        mask = uniform < keep
        kept_none &= ~mask
        present[name] = mask.to(batch[name].device)
    return present


def _check_classes(name: str, y: torch.Tensor) -> None:
    check_batch("pair_by_class", name, y)
    if y.dim() != 1:
        raise ValueError(
            f"pair_by_class: expected {name} of shape (N,), got {tuple(y.shape)}. Pass one class "
            "an item, for instance the argmax of one-hot labels."
        )
    if y.is_floating_point() or y.is_complex():
        raise TypeError(
            f"pair_by_class: expected integers in {name}, got {y.dtype}. Convert it with "
            f"{name}.long()."
        )


def _check_modalities(batch: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            "drop_modalities: expected a mapping from the name of a modality to its data, got "
            f"{type(batch).__name__}. Pass {{'image': x, 'label': y}}."
        )
    for name, x in batch.items():
        check_batch("drop_modalities", f"'{name}'", x)
    lengths = {name: len(x) for name, x in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            "drop_modalities: expected modalities with the same number of rows, at least one, got "
            f"{lengths}. Every row is one datum."
        )
