"""What a checkpoint records of its dataset, so that a resumed run sees the same images with the same split."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from antdiff.data.dataset import ImageData


def record(data: ImageData) -> dict[str, Any]:
    """Return the record of a dataset: its name, its digest, the shape of an image, and a name for each image.

    The names are 64 bits of a digest of the pixels, int64 [N], in the order of the images.
    """
    return {
        "name": data.name,
        "digest": data.digest(),
        "shape": list(data.shape),
        "train": _names(data.train),
        "held_out": _names(data.held_out),
    }


def with_recorded_split(data: ImageData, recorded: dict[str, Any]) -> ImageData:
    """Return `data` split as recorded: an image that was trained on is trained on, and one that was held out stays so.

    Images that are not in the record keep their place. Without changes to the images, `data` is returned.
    """
    if data.digest() == recorded["digest"]:
        return data
    names = torch.cat([_names(data.train), _names(data.held_out)])  # [N]
    trained = torch.isin(names, recorded["train"])
    held_out = torch.isin(names, recorded["held_out"]) & ~trained
    held_out |= ~trained & (torch.arange(len(names)) >= len(data.train))
    images = torch.cat([data.train, data.held_out])
    labels = None
    if data.train_labels is not None and data.held_out_labels is not None:
        labels = torch.cat([data.train_labels, data.held_out_labels])
    return replace(
        data,
        train=images[~held_out],
        held_out=images[held_out],
        train_labels=None if labels is None else labels[~held_out],
        held_out_labels=None if labels is None else labels[held_out],
    )


def differences(now: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Return in words how the dataset of one record differs from that of another; empty if it does not."""
    if now["digest"] == recorded["digest"]:
        return ""
    if now["shape"] != recorded["shape"]:
        return f"images of {_size(now['shape'])} (recorded: {_size(recorded['shape'])})"
    found = []
    for part, words in (("train", "training"), ("held_out", "held-out")):
        new, old = set(now[part].tolist()), set(recorded[part].tolist())
        if new != old or len(now[part]) != len(recorded[part]):
            found.append(
                f"{len(now[part])} {words} images (recorded: {len(recorded[part])}; {len(new - old)} are new, "
                f"{len(old - new)} are missing)"
            )
    return " and ".join(found) or "the same images in another order or with other classes"


def _names(images: torch.Tensor) -> torch.Tensor:
    """Return a name for each image, int64 [N]."""
    rows = (hashlib.blake2b(image.numpy().data, digest_size=8).digest() for image in images.contiguous())
    return torch.from_numpy(np.frombuffer(b"".join(rows), "<i8").copy())


def _size(shape: Any) -> str:
    channels, height, width = shape
    return f"{height}x{width} pixels with {channels} channel{'s' if channels > 1 else ''}"
