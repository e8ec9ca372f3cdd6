"""The images of a folder, and their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange

from antdiff.data.images import SUFFIXES, read_image

FEWEST_IMAGES = 20  # a tenth is held out, and a covariance needs at least two images


def read_folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the images of a folder as uint8 [N, C, size, size], with their classes [N], or None without classes.

    The folders of the first level are the classes, if there are several. The images are grey (C = 1) if every image is
    grey, else RGB.

    Raises:
        ValueError: the images are too few, or one of them cannot be decoded.
        OSError: the folder or a file cannot be read.
    """
    next(folder.iterdir(), None)  # raises PermissionError, where rglob would silently find nothing
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < FEWEST_IMAGES:
        raise ValueError(
            f"{folder} must hold at least {FEWEST_IMAGES} images ({' '.join(SUFFIXES)}); found {len(paths)}"
        )
    grey = True
    rgb = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in enumerate(paths):
        rgb[row], is_grey = read_image(path, size)
        grey = grey and is_grey
    groups = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    names = sorted(set(groups))
    labels = np.array([names.index(group) for group in groups]) if len(names) > 1 else None
    channels = rgb[..., :1] if grey else rgb
    return np.ascontiguousarray(rearrange(channels, "n h w c -> n c h w")), labels
