"""Sample quality without downloaded weights: Frechet distance on the features of a small CNN, precision and recall.

The CNN is trained on the data at hand, so its distance has a scale of its own: it is called "FD (<data>-CNN)", it is
not FID, and it says something only beside the anchors of the same data (held-out images, a per-pixel Gaussian, noise).
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
from antdiff.train.data import ImageData, to_uint8, to_unit

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

REFERENCE_IMAGES = 5000  # of larger data sets, a fixed choice of so many train images is the reference
NEIGHBOURS = 5  # k of precision and recall
FEATURES_VERSION = 1  # part of the cache's key: raise it when the network or its training changes


class FeatureNet(nn.Module):
    """A small CNN whose 64-dimensional penultimate layer is the feature space of the metrics."""

    num_features = 64  # torchmetrics reads it

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
    """The feature network of a data set: from the cache if this very data was seen before, else trained (seconds).

    It learns the classes where the data has them, else by how many quarter turns an image was rotated (Gidaris et al.,
    2018). Training is seeded by a constant, so that every run on the same data is measured with the same ruler.

    Args:
        steps: optimizer steps of B = 128.
        cache: folder of the cache; None is ``$XDG_CACHE_HOME/antdiff`` or ``~/.cache/antdiff``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    classes = int(data.train_labels.max()) + 1 if data.train_labels is not None else 4
    with torch.random.fork_rng(devices=[]):  # initialisers know only the global generator
        torch.manual_seed(0)
        net = FeatureNet(data.shape[0], classes)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antdiff"
    path = folder / f"features-v{FEATURES_VERSION}-{steps}-{data.digest()[:16]}.safetensors"
    if path.exists():
        try:
            net.load_state_dict(load_file(path))
            return net.eval()
        except (OSError, SafetensorError, RuntimeError) as error:
            warnings.warn(f"{path} is damaged ({error}); training the feature network again", stacklevel=2)
    _train_features(net, data, steps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(net.state_dict()))
    except OSError as error:
        warnings.warn(f"the feature network is not cached in {folder} ({error}); it costs seconds a run", stacklevel=2)
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
    """Held-out accuracy of the feature network's classifier: a check that its features know the data."""
    if data.held_out_labels is None:
        return None
    predicted = torch.cat([net.head(net(images)).argmax(1) for images in data.held_out.split(1000)])
    return float((predicted == data.held_out_labels).double().mean())


@dataclass(frozen=True)
class Quality:
    """Frechet distance (lower is better), precision and recall (0..1, higher is better) against the train images."""

    fd: float
    precision: float
    recall: float


class Judge:
    """Measures sets of images against a data set's train images."""

    def __init__(self, data: ImageData, net: FeatureNet) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.data = data
        self.net = net
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:REFERENCE_IMAGES]
        self.reference = data.train[chosen]
        self.real = self._features(self.reference)  # [N, 64]
        self.real_radius = neighbour_distance(self.real)
        # The class is torchmetrics' FID; with this network in Inception's place the result is not an FID.
        self.frechet = FrechetInceptionDistance(feature=net, reset_real_features=False, input_img_size=data.shape)
        for images in self.reference.split(1000):
            self.frechet.update(images, real=True)

    def measure(self, images: torch.Tensor) -> Quality:
        """Quality of uint8 images [N, C, H, W]; N of at least 10."""
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
        """The data's own scale: real held-out images (the floor), then `n` of two things that are no images at all."""
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
    """Distance [N] of each feature vector [N, D] to its NEIGHBOURS-th nearest other one."""
    nearest = min(NEIGHBOURS, len(features) - 1)
    # + 1: each vector's nearest is itself, at distance 0
    return torch.cat([torch.cdist(part, features).kthvalue(nearest + 1, dim=1).values for part in features.split(1000)])


def coverage(support: torch.Tensor, radius: torch.Tensor, points: torch.Tensor) -> float:
    """Share of `points` [M, D] inside the union of balls around `support` [N, D] with `radius` [N].

    Precision is the share of samples inside the balls of the real images, recall the share of real images inside the
    balls of the samples (Kynkaanniemi et al., 2019).
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
    """Mean squared error of the noise estimate on held-out images, float64 [K], one for each interval [start, stop).

    Each cluster is probed at up to `timesteps` evenly spaced t, each with the first `images` held-out images and noise
    from a constant seed: the same questions for every model, so differences between models have little noise.
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
