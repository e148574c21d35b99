"""Digits, the files of MNIST and SVHN, binarisation and batches."""

import gzip
import hashlib
import random
import struct
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import scipy.io
import torch
from sklearn import datasets as sklearn_datasets
from torchvision.datasets import SVHN

from pyro_vae.datasets import Batches, binarize, load_digits, load_mnist, load_svhn

# Digits.


def sorted_rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.tolist()))


def test_facts_about_the_digits() -> None:
    (x, y), (x_test, y_test) = load_digits()
    assert x.shape == (1437, 64)
    assert x_test.shape == (360, 64)
    assert x.dtype == torch.get_default_dtype()
    assert y.dtype == y_test.dtype == torch.int64
    for images in (x, x_test):
        assert images.min() >= 0
        assert images.max() <= 1
    assert y.unique().tolist() == y_test.unique().tolist() == list(range(10))


def test_digits_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        (x, _), _ = load_digits()
    finally:
        torch.set_default_dtype(torch.float64)
    assert x.dtype == torch.float32


def test_all_digits_once_with_their_labels() -> None:
    grey, label = sklearn_datasets.load_digits(return_X_y=True)
    (x, y), (x_test, y_test) = load_digits(dequantize=False)
    images = torch.cat([x, x_test]) * 16
    ours = torch.cat([images, torch.cat([y, y_test]).unsqueeze(-1)], -1)
    theirs = torch.cat([torch.as_tensor(grey), torch.as_tensor(label).unsqueeze(-1)], -1)
    assert sorted_rows(ours) == sorted_rows(theirs)
    assert len(set(sorted_rows(images))) == len(images)  # No image is there twice ...
    assert not set(sorted_rows(x)) & set(sorted_rows(x_test))  # ... and none in both parts.


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_digits_split_is_stratified(fraction: float) -> None:
    (_, y), (_, y_test) = load_digits(test_fraction=fraction)
    total = torch.cat([y, y_test]).bincount()
    assert ((y_test.bincount() - fraction * total).abs() <= 1).all()


def test_dequantised_digits_floor_back_to_grey_levels() -> None:
    noisy, plain = load_digits(seed=4), load_digits(dequantize=False, seed=4)
    for (x, y), (x_plain, y_plain) in zip(noisy, plain, strict=True):
        levels = x_plain * 16
        noise = x * 17 - levels
        assert torch.equal((x * 17).floor(), levels)
        assert torch.equal(y, y_plain)
        error = 5 * (1 / 12 / noise.numel()) ** 0.5
        assert noise.mean().item() == pytest.approx(0.5, abs=error)
        assert noise.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_digits_depend_on_the_seed_alone() -> None:
    torch_state, numpy_state, state = (
        torch.get_rng_state(),
        np.random.get_state(),
        random.getstate(),
    )
    first = load_digits(seed=1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.random.get_state()[2] == numpy_state[2]
    assert random.getstate() == state
    torch.rand(3)
    again, other = load_digits(seed=1), load_digits(seed=2)
    for part in (0, 1):
        assert torch.equal(first[part][0], again[part][0])
        assert torch.equal(first[part][1], again[part][1])
        assert not torch.equal(first[part][0], other[part][0])
        assert not torch.equal(first[part][1], other[part][1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5])
def test_digits_test_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"test_fraction in \(0, 1\), got {fraction}. 0.2 holds"):
        load_digits(test_fraction=fraction)


# MNIST.

NUM_TRAIN, NUM_TEST = 7, 3


def mnist_files(num: int, offset: int) -> tuple[bytes, bytes]:
    """Images and labels in MNIST's format; image i has the grey value offset + i everywhere."""
    images = np.arange(offset, offset + num, dtype=np.uint8).repeat(28 * 28)
    labels = np.arange(num, dtype=np.uint8)
    return (
        struct.pack(">4i", 2051, num, 28, 28) + images.tobytes(),
        struct.pack(">2i", 2049, num) + labels.tobytes(),
    )


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, num, offset in (("train", NUM_TRAIN, 10), ("t10k", NUM_TEST, 253)):
        images, labels = mnist_files(num, offset)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


@pytest.mark.parametrize("as_text", [False, True])
def test_mnist_files(mnist_root: Path, as_text: bool) -> None:
    (x, y), (x_test, y_test) = load_mnist(str(mnist_root) if as_text else mnist_root)
    assert x.shape == (NUM_TRAIN, 784)
    assert x_test.shape == (NUM_TEST, 784)
    assert x.dtype == torch.get_default_dtype()
    torch.testing.assert_close(x[:, 5] * 255, torch.arange(10.0, 17.0))
    torch.testing.assert_close(x_test[:, -1] * 255, torch.arange(253.0, 256.0))
    assert x_test.max() == 1.0
    assert y.tolist() == list(range(NUM_TRAIN))
    assert y_test.tolist() == list(range(NUM_TEST))
    assert y.dtype == torch.int64


def test_mnist_as_images(mnist_root: Path) -> None:
    (x, _), (x_test, _) = load_mnist(mnist_root, flatten=False)
    assert x.shape == (NUM_TRAIN, 1, 28, 28)
    assert x_test.shape == (NUM_TEST, 1, 28, 28)


def test_mnist_that_is_not_there(tmp_path: Path) -> None:
    message = r"load_mnist: expected MNIST below .*MNIST.raw, got no such files. Pass download=True"
    with pytest.raises(FileNotFoundError, match=message):
        load_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        load_mnist(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_mnist_still_compressed(mnist_root: Path) -> None:
    """Torchvision unpacks while it downloads; what is only packed is not there."""
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(FileNotFoundError, match="load_mnist: expected MNIST below"):
        load_mnist(mnist_root)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("left", [0, 3, 20])
def test_mnist_file_cut_short(mnist_root: Path, name: str, left: int) -> None:
    path = mnist_root / "MNIST" / "raw" / name
    content = path.read_bytes()
    path.write_bytes(content[: min(left, len(content) - 1)])
    with pytest.raises(
        ValueError, match="load_mnist: expected complete files of MNIST below .* Delete them"
    ):
        load_mnist(mnist_root)


def test_mnist_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fails)
    with pytest.raises(RuntimeError, match="Error downloading train-images"):
        load_mnist(tmp_path, download=True)


# SVHN.

SVHN_LABELS = {"train": [1, 9, 10, 10, 2], "test": [10, 3]}


def svhn_pixels(split: str) -> np.ndarray:
    """As in the file: row, column, colour, image."""
    shape = (32, 32, 3, len(SVHN_LABELS[split]))
    return np.random.default_rng(len(split)).integers(0, 256, shape, dtype=np.uint8)


def write_svhn(root: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of the published format, which torchvision then takes for the published one."""
    url, name, _ = SVHN.split_list[split]
    labels = np.array(SVHN_LABELS[split], dtype=np.uint8).reshape(-1, 1)
    scipy.io.savemat(root / name, {"X": svhn_pixels(split), "y": labels}, do_compression=True)
    checksum = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setitem(SVHN.split_list, split, [url, name, checksum])


@pytest.fixture
def svhn_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split in SVHN_LABELS:
        write_svhn(tmp_path, split, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("as_text", [False, True])
def test_svhn_files(svhn_root: Path, as_text: bool) -> None:
    train, test = load_svhn(str(svhn_root) if as_text else svhn_root)
    for split, (x, y) in zip(SVHN_LABELS, (train, test), strict=True):
        assert x.shape == (len(SVHN_LABELS[split]), 3, 32, 32)
        assert x.dtype == torch.get_default_dtype()
        assert x.is_contiguous()
        torch.testing.assert_close(
            x * 255, torch.as_tensor(svhn_pixels(split)).double().permute(3, 2, 0, 1)
        )
        assert x.max() == 1.0
        assert y.dtype == torch.int64
        assert y.tolist() == [label % 10 for label in SVHN_LABELS[split]]  # The digit 0 is 10.


def test_svhn_as_rows(svhn_root: Path) -> None:
    (x, _), (x_test, _) = load_svhn(svhn_root, flatten=True)
    (images, _), _ = load_svhn(svhn_root)
    assert x_test.shape == (2, 3 * 32 * 32)
    assert torch.equal(x, images.reshape(len(images), -1))


@pytest.mark.parametrize("split", SVHN_LABELS)
def test_svhn_that_is_not_there(svhn_root: Path, split: str) -> None:
    name = SVHN.split_list[split][1]
    (svhn_root / name).unlink()
    message = f"load_svhn: expected SVHN in .*{name}, got no such file. Pass download=True"
    with pytest.raises(FileNotFoundError, match=message):
        load_svhn(svhn_root)
    assert len(list(svhn_root.iterdir())) == 1


@pytest.mark.parametrize("split", SVHN_LABELS)
@pytest.mark.parametrize("left", [0, 500])
def test_svhn_file_cut_short(svhn_root: Path, split: str, left: int) -> None:
    path = svhn_root / SVHN.split_list[split][1]
    path.write_bytes(path.read_bytes()[:left])
    message = f"expected the published file of SVHN in .*{path.name}, got one with another check"
    with pytest.raises(ValueError, match=message):
        load_svhn(svhn_root)


def test_svhn_file_of_another_origin(svhn_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # The true checksums: our small files are readable, but not SVHN.
    with pytest.raises(ValueError, match="got one with another checksum, so a broken one. Pass"):
        load_svhn(svhn_root)


def test_svhn_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: SVHN) -> None:
        write_svhn(Path(self.root), self.split, monkeypatch)
        self.file_md5 = SVHN.split_list[self.split][2]

    monkeypatch.setattr("torchvision.datasets.SVHN.download", download)
    (x, _), (x_test, _) = load_svhn(tmp_path, download=True)
    assert (len(x), len(x_test)) == (5, 2)


def test_svhn_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.SVHN.download", fails)
    with pytest.raises(RuntimeError, match="^File not found or corrupted.$"):
        load_svhn(tmp_path, download=True)


# Binarisation.


def test_binarize_has_the_grey_value_as_mean() -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    num = 20_000
    drawn = binarize(x.expand(num, -1))
    assert drawn.dtype == x.dtype
    assert drawn.unique().tolist() == [0.0, 1.0]
    error = 5 * (x * (1 - x) / num).sqrt()
    assert ((drawn.mean(0) - x).abs() <= error).all()
    assert not torch.equal(binarize(x.expand(num, -1)), drawn)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, float("nan")])
def test_binarize_refuses_other_values(value: float) -> None:
    with pytest.raises(ValueError, match=r"binarize: expected grey values in \[0, 1\], got \["):
        binarize(torch.tensor([0.5, value]))


# Batches.


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 3, 1]), (10, [10]), (99, [10])])
def test_all_rows_once_an_epoch(shuffle: bool, batch_size: int, sizes: list[int]) -> None:
    batches = Batches(torch.arange(10.0), batch_size=batch_size, shuffle=shuffle)
    assert len(batches) == len(sizes)
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == sizes
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    orders = [torch.cat(epoch).tolist() for epoch in epochs]
    assert (orders[0] == orders[1]) == (not shuffle)
    assert (orders[0] == list(range(10))) == (not shuffle)


def test_shuffling_is_reproducible() -> None:
    batches = Batches(torch.arange(10.0), batch_size=4)
    torch.manual_seed(5)
    first = torch.cat(list(batches))
    torch.manual_seed(5)
    assert torch.equal(torch.cat(list(batches)), first)


def test_tensors_stay_aligned() -> None:
    x = torch.arange(10.0)
    batches = Batches(x.unsqueeze(-1).expand(-1, 2), x + 100, batch_size=4)
    for batch in batches:
        assert isinstance(batch, tuple)
        left, right = batch
        assert torch.equal(left[:, 1] + 100, right)


def test_transform_is_fresh_in_every_batch_and_for_the_first_tensor_only() -> None:
    x = torch.full((40, 3), 0.5)
    batches = Batches(x, torch.full((40,), 0.5), batch_size=20, transform=binarize, shuffle=False)
    (first, label), (second, _) = list(batches)
    again = next(iter(batches))[0]
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (label == 0.5).all()
    assert not torch.equal(first, second)
    assert not torch.equal(first, again)
    assert (x == 0.5).all()


def test_batches_of_one_tensor_are_tensors() -> None:
    (batch,) = Batches(torch.zeros(2, 1), batch_size=2)
    assert isinstance(batch, torch.Tensor)


def test_batches_of_one_mapping_are_dictionaries() -> None:
    x = torch.arange(10.0)
    data = MappingProxyType({"image": x.unsqueeze(-1).expand(-1, 2), "label": x.long() + 100})
    batches = Batches(data, batch_size=4)
    assert len(batches) == 3
    seen = []
    for batch in batches:
        assert type(batch) is dict
        assert list(batch) == ["image", "label"]
        assert torch.equal(batch["image"][:, 1].long() + 100, batch["label"])
        seen += batch["label"].tolist()
    assert sorted(seen) == list(range(100, 110))
    assert seen != sorted(seen)


def test_mappings_and_tensors_stay_aligned() -> None:
    x = torch.arange(10.0)
    present = {"b": x % 2 == 0}  # A modality without a mask is present everywhere.
    for batch, mask, row in Batches({"a": x, "b": -x}, present, x, batch_size=3):
        assert list(mask) == ["b"]
        assert torch.equal(batch["a"], row)
        assert torch.equal(batch["b"], -row)
        assert torch.equal(mask["b"], row % 2 == 0)


def test_nothing_is_said_about_presence() -> None:
    ((batch, present),) = Batches({"a": torch.zeros(3)}, {}, batch_size=3)
    assert batch["a"].shape == (3,)
    assert present == {}


def test_transform_of_a_mapping() -> None:
    data = {"a": torch.full((4,), 0.5), "b": torch.full((4,), 0.5)}

    def transform(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch["a"] = binarize(batch["a"])
        return batch

    for batch, present in Batches(data, {"a": torch.ones(4)}, batch_size=2, transform=transform):
        assert set(batch["a"].tolist()) <= {0.0, 1.0}
        assert (batch["b"] == 0.5).all()
        assert (present["a"] == 1).all()
    assert (data["a"] == 0.5).all()


def test_what_is_no_tensor_with_rows() -> None:
    message = "Batches: expected tensors with rows, or mappings of them, got {}. Convert it"
    with pytest.raises(TypeError, match=message.format("NoneType")):
        Batches({"a": torch.zeros(3), "b": None}, batch_size=1)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=message.format("ndarray")):
        Batches(np.zeros(3), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message.format("a number")):
        Batches(torch.zeros(()), batch_size=1)


def test_rows_of_different_number_in_mappings() -> None:
    message = r"Batches: expected tensors with the same number of rows, at least one, got {}"
    data = {"a": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=message.format(r"\[{'a': 3, 'b': 2}\]")):
        Batches(data, batch_size=1)
    with pytest.raises(ValueError, match=message.format(r"\[{'a': 3}, 2\]")):
        Batches({"a": data["a"]}, data["b"], batch_size=1)
    with pytest.raises(ValueError, match=message.format(r"\[{}\]")):
        Batches({}, batch_size=1)


def test_rows_of_different_number() -> None:
    message = r"Batches: expected tensors with the same number of rows, at least one, got {}"
    with pytest.raises(ValueError, match=message.format(r"\[3, 2\]")):
        Batches(torch.zeros(3), torch.zeros(2), batch_size=1)
    with pytest.raises(ValueError, match=message.format(r"\[0\]")):
        Batches(torch.zeros(0, 4), batch_size=1)
    with pytest.raises(ValueError, match=message.format(r"\[\]")):
        Batches(batch_size=1)


def test_batch_size_is_a_positive_integer() -> None:
    with pytest.raises(ValueError, match="Batches: expected batch_size >= 1, got 0"):
        Batches(torch.zeros(3), batch_size=0)
    with pytest.raises(TypeError, match="Batches: expected an integer batch_size, got float"):
        Batches(torch.zeros(3), batch_size=2.0)  # type: ignore[arg-type]
