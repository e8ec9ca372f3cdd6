"""Grids of images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from antdiff._files import written_atomically


def save_grid(images: torch.Tensor, path: Path, *, columns: int = 10, side: int = 64, gap: int = 4) -> None:
    """Write uint8 images [N, C, H, W] as a PNG grid. Small images are enlarged to about `side` pixels, unsmoothed."""
    from PIL import Image

    scale = max(1, round(side / images.shape[2]))
    tiles = repeat(images.cpu(), "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    blanks = tiles.new_full((-len(tiles) % columns, *tiles.shape[1:]), 255)
    tiles = F.pad(torch.cat([tiles, blanks]), (gap, 0, gap, 0), value=255)  # a gap at the left and top of each
    sheet = rearrange(tiles, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    sheet = F.pad(sheet, (0, gap, 0, gap), value=255)
    with written_atomically(path) as buffer:
        Image.fromarray(rearrange(sheet, "c h w -> h w c").squeeze(-1).numpy()).save(buffer, "PNG")
