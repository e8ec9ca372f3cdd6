"""Grids of images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch


def save_grid(images: torch.Tensor, path: Path, *, columns: int = 10, side: int = 64, gap: int = 4) -> None:
    """uint8 images [N, C, H, W] as a PNG grid; small ones are enlarged to about `side` pixels without smoothing."""
    from PIL import Image

    pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    scale = max(1, round(side / pixels.shape[1]))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = pixels.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (
            gap + place * (length + gap) for place, length in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)
