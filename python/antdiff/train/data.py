"""The batches of a run, and the names of `antdiff.data` that a training script needs with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from antdiff.data import ImageData, load_data, to_uint8, to_unit

__all__ = ["Batches", "ImageData", "load_data", "to_uint8", "to_unit"]


class Batches:
    """Endless batches of images, float [B, C, H, W] in [-1, 1].

    Each epoch is a fresh permutation, and a batch may span two epochs.

    Args:
        images: uint8 [N, C, H, W].
        batch_size: B, of all ranks together.
        generator: draws the permutations, on the CPU.
        rows: the rows of each batch that this rank takes.

    Raises:
        ValueError: there are no images.
    """

    def __init__(
        self, images: torch.Tensor, batch_size: int, generator: torch.Generator, rows: slice = slice(None)
    ) -> None:
        if len(images) == 0:
            raise ValueError("images must hold at least one image, since batches are drawn from them; got none")
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
