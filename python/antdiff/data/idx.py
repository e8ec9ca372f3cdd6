"""The four IDX files of an MNIST-like dataset."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def holds_idx(folder: Path) -> bool:
    """Return whether a folder holds at least one of the four files."""
    return any(_find(folder, stem) for stem in IDX_STEMS)


def read_idx(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the train images [N, H, W], their labels [N], the test images and their labels, all uint8.

    Raises:
        ValueError: a file is missing or damaged, or the numbers of images and labels differ.
        OSError: a file cannot be read.
    """
    paths = {stem: _find(folder, stem) for stem in IDX_STEMS}
    missing = [stem for stem, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{folder} must hold the four IDX files (plain or .gz); missing: {', '.join(missing)}")
    arrays = [_read(path, 3 if "images" in stem else 1) for stem, path in paths.items() if path is not None]
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if len(images) != len(labels):
            raise ValueError(f"{folder} must hold as many labels as images; got {len(labels)} and {len(images)}")
    return train, train_labels, test, test_labels


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file: a big-endian int32 magic (0x00000800 + ndim), ndim int32 sizes, then unsigned bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} must be a complete gzip file; it cannot be read ({error}). Copy it again") from error
    header = 4 * (1 + ndim)
    sizes = np.frombuffer(raw, ">i4", count=1 + ndim) if len(raw) >= header else np.zeros(1 + ndim, ">i4")
    shape = tuple(int(size) for size in sizes[1:])
    if sizes[0] != 0x0800 + ndim or len(raw) - header != int(np.prod(shape)):
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes with {ndim} dimensions; it has another type or is truncated"
        )
    pixels: np.ndarray = np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
    return pixels
