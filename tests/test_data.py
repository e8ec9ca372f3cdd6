"""Data sources: the tensors equal the content of the files, and a bad source is named with its remedy."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antdiff.data import ImageData, load_data, sources, to_uint8, to_unit


def test_digits_are_scikit_learns_with_a_fixed_stratified_split() -> None:
    from sklearn.datasets import load_digits

    digits = load_data("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.train.dtype == torch.uint8
    assert (len(digits.train), len(digits.held_out)) == (1347, 450)
    original = load_digits().images
    # Every image of the package is in exactly one part, and 0..16 became 0..255.
    together = torch.cat([digits.train, digits.held_out]).flatten(1).numpy()
    expected = np.rint(original.reshape(len(original), -1) * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert digits.train_labels is not None
    assert digits.held_out_labels is not None
    shares = [labels.bincount() / len(labels) for labels in (digits.train_labels, digits.held_out_labels)]
    torch.testing.assert_close(*shares, atol=1 / 450, rtol=0)  # stratified, to within one image per class
    assert torch.equal(load_data("digits").train, digits.train)


def test_mnist_comes_whole_from_its_package() -> None:
    mnist = load_data("mnist")
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.held_out)) == (4000, 1000)
    assert int(mnist.train.max()) == 255


def test_pixels_survive_the_way_to_the_models_range_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)
    assert to_unit(pixels).min() == -1
    assert to_unit(pixels).max() == 1
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_digest_tells_data_apart() -> None:
    digits = load_data("digits")
    changed = digits.train.clone()
    changed[0, 0, 0, 0] ^= 1
    other = ImageData("digits", changed, digits.held_out, digits.train_labels, digits.held_out_labels)
    assert digits.digest() == load_data("digits").digest()
    assert digits.digest() != other.digest()


# ---- IDX ---------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, n, suffix in (("train", 30, ".gz"), ("t10k", 10, "")):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 5, 4)))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", rng.integers(0, 3, n))
    return tmp_path


def test_idx_files_plain_and_gzipped(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 5, 4))
    loaded = load_data(str(idx_folder))
    assert loaded.train.shape == (30, 1, 5, 4)
    assert np.array_equal(loaded.train[:, 0].numpy(), images)
    assert np.array_equal(loaded.train_labels, rng.integers(0, 3, 30))  # type: ignore[arg-type]
    assert loaded.held_out.shape == (10, 1, 5, 4)
    monkeypatch.setattr(sources, "FASHION_MNIST", idx_folder)
    assert load_data("fashion-mnist").digest() == loaded.digest()


def test_broken_idx_folders_are_refused_by_name(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte must be an IDX file .* truncated"):
        load_data(str(idx_folder))
    labels.write_bytes(b"")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte must be an IDX file"):
        load_data(str(idx_folder))
    write_idx(labels, np.zeros(9))
    with pytest.raises(ValueError, match="as many labels as images; got 9 and 10"):
        load_data(str(idx_folder))
    zipped = idx_folder / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:50])
    with pytest.raises(ValueError, match="must be a complete gzip file"):
        load_data(str(idx_folder))
    zipped.unlink()
    with pytest.raises(ValueError, match="missing: train-images-idx3-ubyte"):
        load_data(str(idx_folder))
    monkeypatch.setattr(sources, "FASHION_MNIST", idx_folder / "nowhere")
    with pytest.raises(ValueError, match="Install Debian's package dataset-fashion-mnist"):
        load_data("fashion-mnist")


# ---- folders of images -------------------------------------------------------------------------------------------


def save_images(folder: Path, n: int, *, mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=mode if mode == "L" else None).save(
            folder / f"{i}.png"
        )


def test_folder_of_images(tmp_path: Path) -> None:
    save_images(tmp_path / "colour", 40)
    loaded = load_data(str(tmp_path / "colour"), image_size=8)
    assert loaded.name == "colour"
    assert loaded.shape == (3, 8, 8)
    assert (len(loaded.train), len(loaded.held_out)) == (36, 4)
    assert loaded.train_labels is None
    save_images(tmp_path / "grey" / "a", 15, mode="L", size=(8, 8))
    save_images(tmp_path / "grey" / "b" / "deeper", 15, mode="L", size=(8, 8))
    grey = load_data(str(tmp_path / "grey"), image_size=8)
    assert grey.shape == (1, 8, 8)
    assert grey.train_labels is not None
    assert grey.train_labels.unique().tolist() == [0, 1]
    with Image.open(tmp_path / "grey" / "a" / "0.png") as image:  # an image that already has the size is not changed
        assert any(
            np.array_equal(np.asarray(image), pixels[0]) for pixels in torch.cat([grey.train, grey.held_out]).numpy()
        )


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"digits, mnist, fashion-mnist or a folder; the folder 'digit' does not exist"
    ):
        load_data("digit")
    with pytest.raises(ValueError, match=r"must hold at least 20 images .*; found 0"):
        load_data(str(tmp_path))
    save_images(tmp_path, 25)
    with pytest.raises(ValueError, match="is a file"):
        load_data(str(tmp_path / "0.png"))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"7\.png must be an image; it cannot be read"):
        load_data(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        with pytest.raises(PermissionError):
            load_data(str(tmp_path))
    finally:
        tmp_path.chmod(0o700)
