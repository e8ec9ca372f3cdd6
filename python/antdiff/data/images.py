"""The pixels of one image file."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_image(path: Path, size: int) -> tuple[np.ndarray, bool]:
    """Read an image as uint8 [size, size, 3], centre-cropped to a square and resized, and say whether it is grey.

    Raises:
        ValueError: the file cannot be decoded.
        PermissionError: the file may not be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L")
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)), grey
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for a damaged file
        raise ValueError(
            f"{path} must be an image; it cannot be read ({error}). Repair it or remove it from the folder"
        ) from error
