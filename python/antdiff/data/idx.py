"""The four IDX files of an MNIST-like dataset."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FEWEST_IMAGES = 2  # of the train images and of the held-out images: a covariance needs two

_UNSIGNED_BYTES = 0x08  # the third byte of a file; the fourth is the number of dimensions
_CHUNK = 2**24


def holds_idx(folder: Path) -> bool:
    """Return whether a folder holds at least one of the four files."""
    return any(_find(folder, stem) for stem in IDX_STEMS)


def read_idx(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the train images [N, H, W], their labels [N], the test images and their labels, all uint8.

    Raises:
        ValueError: a file is missing or damaged, the images are too few, or the files do not fit each other.
        OSError: a file cannot be read.
    """
    paths = {stem: _find(folder, stem) for stem in IDX_STEMS}
    missing = [stem for stem, path in paths.items() if path is None]
    if missing:
        raise ValueError(
            f"{folder} must hold the four IDX files (plain or .gz); missing: {', '.join(missing)}. Add what is missing"
        )
    arrays = [_read(path, 3 if "images" in stem else 1) for stem, path in paths.items() if path is not None]
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if len(images) != len(labels):
            raise ValueError(
                f"{folder} must hold as many labels as images; got {len(labels)} and {len(images)}. "
                "Take the four files of one dataset"
            )
    for stem, images in ((IDX_STEMS[0], train), (IDX_STEMS[2], test)):
        if len(images) < FEWEST_IMAGES or images.size == 0:
            raise ValueError(
                f"{paths[stem]} must hold at least {FEWEST_IMAGES} images of at least one pixel; it holds "
                f"{len(images)} of {images.shape[1]}x{images.shape[2]} pixels. Pass a folder with more images"
            )
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{folder} must hold train and test images of one size; got {train.shape[1]}x{train.shape[2]} and "
            f"{test.shape[1]}x{test.shape[2]} pixels. Take the four files of one dataset"
        )
    return train, train_labels, test, test_labels


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file: a big-endian int32 magic (0x00000800 + ndim), ndim int32 sizes, then unsigned bytes."""
    try:
        # gzip.open's GzipFile reads like a binary file, but its stub does not say so.
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 * (1 + ndim))
            sizes = _sizes(header, ndim, path)
            wanted = math.prod(sizes)
            # Read in chunks, and one byte more than the header promises: memory is taken only for what the file holds,
            # and gzip compares its checksum at the end.
            body = bytearray()
            while len(body) <= wanted and (chunk := file.read(min(_CHUNK, wanted + 1 - len(body)))):
                body += chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a complete gzip file; it cannot be read ({error}). Copy it again") from error
    except MemoryError as error:
        raise ValueError(f"{path} must fit into memory; its header promises {wanted:,} bytes. Copy it again") from error
    if len(body) != wanted:
        found = "has more" if len(body) > wanted else f"is truncated after {len(body):,} of them"
        raise _malformed(path, ndim, f"its header promises {wanted:,} bytes, and it {found}")
    return np.frombuffer(body, np.uint8).reshape(sizes)


def _sizes(header: bytes, ndim: int, path: Path) -> tuple[int, ...]:
    if len(header) < 4 * (1 + ndim):
        raise _malformed(path, ndim, f"it is truncated, since its {len(header)} bytes do not hold a header")
    if header[:2] != b"\0\0":
        raise _malformed(path, ndim, f"it begins with 0x{header[:4].hex()}, which is no IDX header")
    if header[2] != _UNSIGNED_BYTES:
        raise _malformed(path, ndim, f"its numbers have the type 0x{header[2]:02x}, not 0x{_UNSIGNED_BYTES:02x}")
    if header[3] != ndim:
        raise _malformed(path, ndim, f"it has {header[3]} dimensions")
    sizes = tuple(np.frombuffer(header, ">i4", offset=4).tolist())
    if min(sizes) < 0:
        raise _malformed(path, ndim, f"its header says {' x '.join(map(str, sizes))}")
    return sizes


def _malformed(path: Path, ndim: int, problem: str) -> ValueError:
    dimensions = f"{ndim} dimension{'s' if ndim > 1 else ''}"
    return ValueError(f"{path} must be an IDX file of unsigned bytes with {dimensions}; {problem}. Copy it again")
