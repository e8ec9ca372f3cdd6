"""Tests of the quality metrics against their definitions, and of the feature network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from tolerances import UNIT_ROUNDOFF

from antdiff.data import ImageData, load_data
from antdiff.experiments import quality as metrics
from antdiff.experiments.quality import Judge, accuracy, coverage, feature_net, held_out_losses, neighbour_distance
from antdiff.train.models import draw_samples, noise_schedule


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


class Pixels(torch.nn.Module):
    """A feature space in which everything can be computed by hand: the pixels."""

    num_features = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def random_data(n: int) -> ImageData:
    images = torch.randint(256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData("random", images[: n // 2], images[n // 2 :], None, None)


def test_frechet_distance_is_the_closed_form() -> None:
    data = random_data(400)
    fake = (data.held_out.float() * 0.7 + 20).to(torch.uint8)
    real, other = (images.flatten(1).double().numpy() for images in (data.train, fake))
    # |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. (2017), in float64
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(other.T)).real
    expected = ((real.mean(0) - other.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(other.T) - 2 * root)
    judge = Judge(data, Pixels())  # type: ignore[arg-type]
    # computed in float64 and returned in float32: one rounding
    assert judge.measure(fake).fd == pytest.approx(expected, rel=2 * UNIT_ROUNDOFF[torch.float32])
    assert judge.measure(fake) == judge.measure(fake)  # no state leaks into the next measurement


def test_precision_and_recall_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 3, generator=generator)
    fake = torch.randn(50, 3, generator=generator) + 0.8

    def covered(support: torch.Tensor, points: torch.Tensor) -> float:
        hits = 0
        for point in points:
            inside = False
            for i, centre in enumerate(support):
                others = sorted(float((centre - x).norm()) for j, x in enumerate(support) if j != i)
                inside |= float((centre - point).norm()) <= others[metrics.NEIGHBOURS - 1]
            hits += inside
        return hits / len(points)

    assert coverage(real, neighbour_distance(real), fake) == covered(real, fake)
    assert coverage(fake, neighbour_distance(fake), real) == covered(fake, real)


def test_the_train_images_measured_against_themselves_are_perfect() -> None:
    data = random_data(300)
    quality = Judge(data, Pixels()).measure(data.train)  # type: ignore[arg-type]
    scale = float(data.train.float().flatten(1).var(0).sum())
    # 2 C - 2 (C C)^(1/2): eigenvalues of C C are known to u, so their square roots to sqrt(u) in the worst case
    assert abs(quality.fd) < UNIT_ROUNDOFF[torch.float64] ** 0.5 * scale
    assert quality.precision == quality.recall == 1


def test_feature_network_knows_the_data_and_is_cached(cache: Path) -> None:
    digits = load_data("digits")
    net = feature_net(digits, cache=cache)
    (path,) = cache.iterdir()
    written = path.stat().st_mtime_ns
    known = accuracy(net, digits)
    assert known is not None
    assert known > 0.95
    again = feature_net(digits, cache=cache)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    anchors = Judge(digits, net).anchors(500)
    floor, gaussian, noise = (quality.fd for quality in anchors.values())
    assert 0 < floor < gaussian / 20
    assert gaussian < noise


def test_a_damaged_cache_is_made_again_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(100)
    first = feature_net(data, steps=3, cache=cache / "damaged")
    (path,) = (cache / "damaged").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        second = feature_net(data, steps=3, cache=cache / "damaged")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    # a cache that cannot be written causes a warning, not an error
    (cache / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):
        feature_net(data, steps=3, cache=cache / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    feature_net(data, steps=3)
    assert list((cache / "xdg" / "antdiff").iterdir())


def test_held_out_losses_ask_every_model_the_same_questions() -> None:
    data = random_data(80)
    schedule = noise_schedule()
    intervals = [(0, 100), (100, 998), (998, 1000)]
    asked: list[int] = []

    class Oracle(torch.nn.Module):
        """Solves x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise for the noise, and adds an error of t / 1000."""

        def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            asked.append(int(t[0]))
            abar = schedule.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
            x0 = data.held_out[:40].double() / 127.5 - 1
            return (xt - abar.sqrt() * x0) / (1 - abar).sqrt() + t.view(-1, 1, 1, 1) / 1000

    losses = held_out_losses(Oracle(), data, schedule, intervals, torch.device("cpu"), timesteps=4)  # type: ignore[arg-type]
    assert asked == [12, 37, 62, 87, 212, 436, 661, 885, 998, 999]
    squares = [(t / 1000) ** 2 for t in asked]
    expected = [np.mean(squares[:4]), np.mean(squares[4:8]), np.mean(squares[8:])]
    # x_t is float32 after a few roundings (4 u). Recovering the noise divides them by sqrt(1 - abar), which is above
    # 1/100. The smallest error of the oracle is 0.012, and squaring doubles the relative error.
    np.testing.assert_allclose(losses, expected, rtol=2 * 100 * 4 * UNIT_ROUNDOFF[torch.float32] / 0.012)


def test_sampling_is_ddims_and_repeats() -> None:
    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    def draw(n: int, batch_size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return draw_samples(Zero(), noise_schedule(), n, (1, 4, 4), steps=4, generator=generator, batch_size=batch_size)

    assert draw(7, 3).shape == (7, 1, 4, 4)
    assert torch.equal(draw(7, 3), draw(7, 3))
    # with a noise estimate of zero, x_0 is the clipped x_t / sqrt(abar) of the first step
    start = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    first = noise_schedule().alphas_cumprod[750].sqrt()
    torch.testing.assert_close(draw(5, 5), (start / first).clamp(-1, 1))
