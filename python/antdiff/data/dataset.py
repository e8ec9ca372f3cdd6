"""A dataset in memory, and the range of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from antdiff import _files


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
        """Return the SHA-256 (hex) of the shapes, the images, the labels and the split into train and held-out images.

        Checkpoints name the data of their run by it, and results for this data are cached under it. The name of the
        dataset does not count, so a folder may be moved. Hashing takes about a second per gigabyte, once.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        tensors = (self.train, self.held_out, self.train_labels, self.held_out_labels)
        return _files.digest(*(tensor for tensor in tensors if tensor is not None))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 to float32 in [-1, 1], the range in which diffusion models are trained."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert floats in [-1, 1] (clipped) to uint8 0..255, so that metrics see the pixels of a saved image."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
