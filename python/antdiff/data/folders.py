"""The images of a folder, and their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
from einops import rearrange

from antdiff._folders import holds_results
from antdiff.data.images import SUFFIXES, read_image

FEWEST_IMAGES = 20  # a tenth is held out, and a covariance needs at least two images

# The pictures that antdiff writes into a folder of results, if the dataset is in that folder too.
_OWN_PICTURES = ("samples", "samples.png", "samples-*.png", "curves.png", "comparison.png", "analysis")


def find_images(folder: Path) -> Iterator[Path]:
    """Yield the image files of a folder at any depth, by their suffix, in no particular order.

    These are skipped: hidden files and folders, folders whose names end like those of images, and folders of results
    of antdiff. If `folder` itself holds results, only the pictures among them are skipped.

    Each file and folder is visited once, under its own name if it has one inside `folder`, else under the first
    symbolic link that leads to it. A link to a folder that holds `folder` itself is not followed.

    Raises:
        ValueError: a symbolic link that is named like an image leads nowhere.
        OSError: a folder cannot be read.
    """
    root = os.path.realpath(folder)
    seen = {root}  # real paths
    folders, links = [(folder, root)], list[Path]()  # links is a heap
    while folders or links:
        if folders:
            place, real = folders.pop()
        else:
            place = heappop(links)
            real = os.path.realpath(place)
            if real in seen or Path(root).is_relative_to(real):
                continue
            seen.add(real)
            if not place.exists():
                if _named_like_image(place):
                    raise ValueError(
                        f"{place} must lead to an image; it is a symbolic link to a file that does not exist. Restore "
                        "the file, or remove the link"
                    )
                continue
            if not place.is_dir():
                if place.is_file() and _named_like_image(place):
                    yield place
                continue
            if _named_like_image(place):
                continue
        entries = {entry.name: entry for entry in os.scandir(place)}
        results = holds_results(place) or {"config.json", "checkpoints"} <= entries.keys()
        if results and real != root:
            continue
        for name, entry in entries.items():
            if name.startswith(".") or (results and any(fnmatchcase(name, own) for own in _OWN_PICTURES)):
                continue
            path, below = place / name, os.path.join(real, name)
            if entry.is_symlink():
                heappush(links, path)
            elif below in seen:
                continue
            elif entry.is_dir() and not _named_like_image(path):
                seen.add(below)
                folders.append((path, below))
            elif entry.is_file() and _named_like_image(path):
                seen.add(below)
                yield path


def read_folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the images of a folder as uint8 [N, C, size, size], with their classes [N], or None without classes.

    The folders of the first level are the classes, if there are several. The images are grey (C = 1) if every image is
    grey, else RGB. :func:`find_images` and :func:`antdiff.data.images.read_image` say which files count, and what
    their pixels are.

    Raises:
        ValueError: the images are too few or too large for the memory, or one of them cannot be decoded.
        OSError: the folder or a file cannot be read.
    """
    paths = sorted(find_images(folder))
    if len(paths) < FEWEST_IMAGES:
        raise ValueError(
            f"{folder} must hold at least {FEWEST_IMAGES} images ({' '.join(SUFFIXES)}); found {len(paths)}. Add "
            "images; hidden files and folders, and the pictures of runs, do not count"
        )
    try:
        rgb = np.empty((len(paths), 3, size, size), np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can count
        raise ValueError(
            f"{folder} must fit into memory; its {len(paths):,} images of {size}x{size} pixels take "
            f"{3 * len(paths) * size**2 / 2**30:,.1f} GiB. Pass a smaller --image-size, or fewer images"
        ) from error
    grey = True
    for row, path in enumerate(paths):
        pixels, is_grey = read_image(path, size)
        rgb[row] = rearrange(pixels, "h w c -> c h w")
        grey = grey and is_grey
    groups = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    names = sorted(set(groups))
    labels = np.array([names.index(group) for group in groups]) if len(names) > 1 else None
    return (rgb[:, :1].copy() if grey else rgb), labels


def _named_like_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
