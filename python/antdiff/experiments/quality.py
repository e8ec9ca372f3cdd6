"""Sample quality without downloaded weights: Frechet distance, precision and recall in the features of a small CNN.

The CNN is trained on the dataset itself, so its distances have a scale of their own. The metric is therefore called
"FD (<data>-CNN)". It is not FID, and it can only be read beside the anchors of the same data: held-out images, a
per-pixel Gaussian, and noise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from antdiff._files import write_atomically
from antdiff.data import ImageData, to_uint8, to_unit

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

REFERENCE_IMAGES = 5000  # a fixed random subset of this size is the reference for larger datasets
NEIGHBOURS = 5  # k of precision and recall
FEATURES_VERSION = 1  # part of the cache key: increase it when the network or its training changes


class FeatureNet(nn.Module):
    """A small CNN. Its 64-dimensional penultimate layer is the feature space of the metrics."""

    num_features = 64  # read by torchmetrics

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] -> features [B, 64]."""
        return self.body(to_unit(images))  # type: ignore[no-any-return]


def feature_net(data: ImageData, *, steps: int = 600, cache: Path | None = None) -> FeatureNet:
    """Return the feature network of a dataset: from the cache, or trained in a few seconds if the data is new.

    The network learns the classes if the data has labels. Otherwise it learns by how many quarter turns an image was
    rotated (Gidaris et al., 2018). The seed of its training is constant, so that all runs on the same data are measured
    with the same network.

    Args:
        steps: optimizer steps with B = 128.
        cache: folder of the cache; None means ``$XDG_CACHE_HOME/antdiff`` or ``~/.cache/antdiff``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    classes = int(data.train_labels.max()) + 1 if data.train_labels is not None else 4
    with torch.random.fork_rng(devices=[]):  # initialisers use the global generator
        torch.manual_seed(0)
        net = FeatureNet(data.shape[0], classes)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antdiff"
    path = folder / f"features-v{FEATURES_VERSION}-{steps}-{data.digest()[:16]}.safetensors"
    if path.exists():
        try:
            net.load_state_dict(load_file(path))
            return net.eval()
        except (OSError, SafetensorError, RuntimeError) as error:
            warnings.warn(f"{path} is damaged ({error}); the feature network is trained again", stacklevel=2)
    _train_features(net, data, steps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(net.state_dict()))
    except OSError as error:
        warnings.warn(
            f"the feature network is not cached in {folder} ({error}); it costs seconds per run", stacklevel=2
        )
    return net.eval()


def _train_features(net: FeatureNet, data: ImageData, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        rows = torch.randint(len(data.train), (128,), generator=generator)
        images = data.train[rows]
        if data.train_labels is not None:
            labels = data.train_labels[rows]
        else:
            labels = torch.randint(4, (128,), generator=generator)
            images = torch.stack(
                [torch.rot90(image, int(turns), (1, 2)) for image, turns in zip(images, labels, strict=True)]
            )
        optimizer.zero_grad()
        F.cross_entropy(net.head(net(images)), labels).backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(net: FeatureNet, data: ImageData) -> float | None:
    """Return the held-out accuracy of the feature network's classifier, a check that its features fit the data."""
    if data.held_out_labels is None:
        return None
    predicted = torch.cat([net.head(net(images)).argmax(1) for images in data.held_out.split(1000)])
    return float((predicted == data.held_out_labels).double().mean())


@dataclass(frozen=True)
class Quality:
    """Frechet distance (lower is better), precision and recall (0 to 1, higher is better) against the train images."""

    fd: float
    precision: float
    recall: float


class Judge:
    """Measures sets of images against the train images of a dataset."""

    def __init__(self, data: ImageData, net: FeatureNet) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.data = data
        self.net = net
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:REFERENCE_IMAGES]
        self.reference = data.train[chosen]
        self.real = self._features(self.reference)  # [N, 64]
        self.real_radius = neighbour_distance(self.real)
        # torchmetrics' FID class with this network in place of Inception: the result is not an FID.
        self.frechet = FrechetInceptionDistance(feature=net, reset_real_features=False, input_img_size=data.shape)
        for images in self.reference.split(1000):
            self.frechet.update(images, real=True)

    def measure(self, images: torch.Tensor) -> Quality:
        """Return the quality of uint8 images [N, C, H, W], with N of at least 10."""
        self.frechet.reset()
        for batch in images.split(1000):
            self.frechet.update(batch, real=False)
        fake = self._features(images)
        return Quality(
            fd=float(self.frechet.compute()),
            precision=coverage(self.real, self.real_radius, fake),
            recall=coverage(fake, neighbour_distance(fake), self.real),
        )

    def anchors(self, n: int) -> dict[str, Quality]:
        """Return the scale of the data: real held-out images (the floor), then `n` samples of each of two baselines."""
        generator = torch.Generator().manual_seed(0)
        pixels = to_unit(self.reference)  # [N, C, H, W]
        noise = torch.randn(n, *self.data.shape, generator=generator)
        gaussian = pixels.mean(0) + pixels.std(0) * torch.randn(n, *self.data.shape, generator=generator)
        return {
            "held-out images (floor)": self.measure(self.data.held_out),
            "per-pixel Gaussian": self.measure(to_uint8(gaussian)),
            "noise": self.measure(to_uint8(noise)),
        }

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(batch) for batch in images.split(1000)])


def neighbour_distance(features: torch.Tensor) -> torch.Tensor:
    """Return the distance [N] of each feature vector [N, D] to its NEIGHBOURS-th nearest other vector."""
    nearest = min(NEIGHBOURS, len(features) - 1)
    # + 1, since the nearest vector is the vector itself, at distance 0
    return torch.cat([torch.cdist(part, features).kthvalue(nearest + 1, dim=1).values for part in features.split(1000)])


def coverage(support: torch.Tensor, radius: torch.Tensor, points: torch.Tensor) -> float:
    """Return the share of `points` [M, D] inside the union of balls around `support` [N, D] with `radius` [N].

    Precision is the share of samples inside the balls of the real images. Recall is the share of real images inside
    the balls of the samples (Kynkaanniemi et al., 2019).
    """
    inside = [(torch.cdist(part, support) <= radius).any(1) for part in points.split(1000)]  # each [<=1000]
    return float(torch.cat(inside).double().mean())


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    data: ImageData,
    schedule: DDPMScheduler,
    intervals: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    timesteps: int = 8,
    images: int = 1000,
) -> torch.Tensor:
    """Return the mean squared error of the noise estimate on held-out images per interval [start, stop), float64 [K].

    Each interval is probed at up to `timesteps` evenly spaced t, each with the first `images` held-out images and with
    noise from a constant seed. All models see the same inputs, so differences between models have little noise.
    """
    model.eval()
    x0 = to_unit(data.held_out[:images]).to(device)  # [N, C, H, W]
    generator = torch.Generator().manual_seed(0)
    losses = torch.zeros(len(intervals), dtype=torch.float64)
    for cluster, (start, stop) in enumerate(intervals):
        probes = min(timesteps, stop - start)
        for probe in range(probes):
            t = start + (2 * probe + 1) * (stop - start) // (2 * probes)
            for part in x0.split(500):
                noise = torch.randn(part.shape, generator=generator).to(device)
                at = torch.full((len(part),), t, device=device)
                error = model(schedule.add_noise(part, noise, at), at) - noise
                losses[cluster] += error.double().square().mean().cpu() * len(part) / (len(x0) * probes)
    return losses
