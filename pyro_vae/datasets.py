"""Data in memory: bundled digits and sprites, MNIST and SVHN through torchvision, batches."""

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from pyro_vae.checks import check_at_least
from pyro_vae.labelled_data import mask_labels
from pyro_vae.paired_data import drop_modalities, pair_by_class
from pyro_vae.sprites import load_sprites

__all__ = [
    "Batches",
    "binarize",
    "drop_modalities",
    "load_digits",
    "load_mnist",
    "load_sprites",
    "load_svhn",
    "mask_labels",
    "pair_by_class",
]

Split = tuple[torch.Tensor, torch.Tensor]
Data = torch.Tensor | Mapping[str, torch.Tensor]

DIGITS_GREY_LEVELS = 17
"""Grey levels of the 8x8 digits, 0 ... 16."""


def load_digits(
    *, dequantize: bool = True, test_fraction: float = 0.2, seed: int = 0
) -> tuple[Split, Split]:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels; needs no network.

    With ``dequantize`` each grey level g in 0 ... 16 becomes (g + u) / 17, u uniform in [0, 1):
    a continuous density on [0, 1], comparable between models, and a lower bound on the
    probability of the grey levels (Theis et al. 2016, section 3.1). Without it, g / 16.

    Args:
        dequantize: Whether to add the noise.
        test_fraction: Part of the images held out, classes in proportion.
        seed: Seed of split and noise; the global random state is not touched.

    Returns:
        ``((x_train, y_train), (x_test, y_test))``: images ``(N, 64)`` in [0, 1] of the default
        dtype, labels ``(N,)`` of int64.

    Example:
        >>> (x_train, y_train), (x_test, y_test) = load_digits()
        >>> x_train.shape, x_test.shape
        (torch.Size([1437, 64]), torch.Size([360, 64]))

    References:
        Theis et al. (2016), A note on the evaluation of generative models,
        https://arxiv.org/abs/1511.01844
    """
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"load_digits: expected test_fraction in (0, 1), got {test_fraction}. "
            "0.2 holds out every fifth image."
        )
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    grey, label = datasets.load_digits(return_X_y=True)
    x, y = torch.as_tensor(grey, dtype=torch.float64), torch.as_tensor(label)
    if dequantize:
        noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        x = (x + noise) / DIGITS_GREY_LEVELS
    else:
        x = x / (DIGITS_GREY_LEVELS - 1)
    rows = train_test_split(
        range(len(x)), test_size=test_fraction, random_state=seed, stratify=label
    )
    x = x.to(torch.get_default_dtype())
    train, test = ((x[r], y[r]) for r in rows)
    return train, test


def load_mnist(
    root: str | Path, *, download: bool = False, flatten: bool = True
) -> tuple[Split, Split]:
    """MNIST with its usual split, from a folder in torchvision's layout.

    Args:
        root: Folder that holds ``MNIST/raw``.
        download: Whether to fetch what is missing.
        flatten: Images as rows ``(N, 784)``, else ``(N, 1, 28, 28)``.

    Returns:
        ``((x_train, y_train), (x_test, y_test))``: grey values in [0, 1], labels of int64.
        Binarise them (:func:`binarize`) for a Bernoulli likelihood.

    Raises:
        FileNotFoundError: If the files are not there and ``download`` is false.
        ValueError: If a file cannot be read as MNIST's format.
    """
    from torchvision.datasets import MNIST

    splits, raw = [], Path(root) / "MNIST" / "raw"
    for train in (True, False):
        try:
            data = MNIST(root=str(root), train=train, download=download)
        except (AssertionError, RuntimeError, ValueError) as err:
            if "not found" in str(err):
                raise FileNotFoundError(
                    f"load_mnist: expected MNIST below {raw}, got no such files. Pass "
                    "download=True (--download), or the folder that holds 'MNIST'."
                ) from err
            if "download" in str(err):
                raise
            raise ValueError(
                f"load_mnist: expected complete files of MNIST below {raw}, got broken ones. "
                "Delete them and pass download=True (--download)."
            ) from err
        images = data.data.to(torch.get_default_dtype()) / 255
        splits.append((images.flatten(1) if flatten else images.unsqueeze(1), data.targets))
    return splits[0], splits[1]


def load_svhn(
    root: str | Path, *, download: bool = False, flatten: bool = False
) -> tuple[Split, Split]:
    """Street View House Numbers, cropped digits in colour, from a folder in torchvision's layout.

    73,257 images to train and 26,032 to test; the "extra" ones are left out.

    Args:
        root: Folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Whether to fetch what is missing or broken.
        flatten: Images as rows ``(N, 3072)``, else ``(N, 3, 32, 32)``.

    Returns:
        ``((x_train, y_train), (x_test, y_test))``: red, green and blue values in [0, 1] of the
        default dtype, labels 0 ... 9 of int64 (the files call the digit 0 class 10).

    Raises:
        FileNotFoundError: If a file is not there and ``download`` is false.
        ValueError: If a file is not the published one, by its MD5 checksum.

    References:
        Netzer et al. (2011), Reading digits in natural images with unsupervised feature learning,
        http://ufldl.stanford.edu/housenumbers
    """
    from torchvision.datasets import SVHN

    splits = []
    for split in ("train", "test"):
        path = Path(root) / SVHN.split_list[split][1]
        if not download and not path.is_file():
            raise FileNotFoundError(
                f"load_svhn: expected SVHN in {path}, got no such file. Pass download=True "
                "(--download), or the folder that holds it."
            )
        try:
            data = SVHN(root=str(root), split=split, download=download)
        except RuntimeError as err:
            if download:
                raise
            raise ValueError(
                f"load_svhn: expected the published file of SVHN in {path}, got one with another "
                "checksum, so a broken one. Pass download=True (--download) to fetch it again."
            ) from err
        # The reader turns the axes without moving the numbers; rows are to lie side by side.
        images = torch.as_tensor(data.data).contiguous().to(torch.get_default_dtype()) / 255
        splits.append((images.flatten(1) if flatten else images, torch.as_tensor(data.labels)))
    return splits[0], splits[1]


def binarize(x: torch.Tensor) -> torch.Tensor:
    """Draws each pixel from a Bernoulli with its grey value as probability.

    As ``transform`` of :class:`Batches` it is the dynamic binarisation of Burda et al. (2016):
    fresh in every batch.

    Raises:
        ValueError: If a value lies outside [0, 1].

    Example:
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(
            f"binarize: expected grey values in [0, 1], got [{float(x.min()):g}, "
            f"{float(x.max()):g}]. Divide by the largest grey value first."
        )
    return torch.bernoulli(x)


class Batches:
    """Data in memory, in batches, shuffled anew each time they are walked.

    Indexing whole batches is much faster than a loader that collects single rows.

    Args:
        *data: Tensors, or mappings of tensors by name, all with the same number of rows.
        batch_size: Rows in a batch; the last one may be shorter.
        shuffle: Whether to shuffle, from torch's global generator.
        transform: Applied to the first of ``data`` in each batch, for instance :func:`binarize`.

    Yields: a tensor or a dictionary, or a tuple of them if there are several.

    Example:
        >>> batches = Batches(torch.arange(5.0), batch_size=2, shuffle=False)
        >>> len(batches), list(batches)
        (3, [tensor([0., 1.]), tensor([2., 3.]), tensor([4.])])
        >>> pairs = {"image": torch.zeros(5, 64), "label": torch.arange(5)}
        >>> present = drop_modalities(pairs, 0.5)
        >>> batch, present_in_batch = next(iter(Batches(pairs, present, batch_size=2)))
        >>> batch["image"].shape, present_in_batch["label"].shape
        (torch.Size([2, 64]), torch.Size([2]))
    """

    def __init__(
        self,
        *data: Data,
        batch_size: int,
        shuffle: bool = True,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        check_at_least("Batches", "batch_size", batch_size, 1)
        parts = [dict(part) if isinstance(part, Mapping) else part for part in data]
        tensors = tree_leaves(parts)
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or not tensor.dim():
                what = "a number" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise TypeError(
                    f"Batches: expected tensors with rows, or mappings of them, got {what}. "
                    "Convert it with torch.as_tensor, or leave it out."
                )
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"Batches: expected tensors with the same number of rows, at least one, got "
                f"{tree_map(len, parts)}. Every row is one datum."
            )
        self.data, self.batch_size = parts, batch_size
        self.shuffle, self.transform = shuffle, transform
        self.num_rows, self.device = lengths.pop(), tensors[0].device

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.num_rows) if self.shuffle else torch.arange(self.num_rows)
        for rows in order.to(self.device).split(self.batch_size):
            first, *others = tree_map(itemgetter(rows), self.data)
            if self.transform is not None:
                first = self.transform(first)
            yield (first, *others) if others else first
