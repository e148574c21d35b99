"""Digits, MNIST's files, binarisation and batches."""

import gzip
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets as sklearn_datasets

from pyro_vae.datasets import Batches, binarize, load_digits, load_mnist

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
