"""Samples of a run: a PNG grid to look at, and an npz (``arr_0``, uint8 NHWC) that evaluation suites read."""

from __future__ import annotations

from pathlib import Path

import torch

from antdiff._devices import choose_device, sensible_threads
from antdiff._files import write_npz
from antdiff.data import to_uint8
from antdiff.plotting.images import save_grid
from antdiff.train.config import TrainConfig, require_sample_steps
from antdiff.train.models import draw_samples, noise_schedule
from antdiff.train.run import load_model, require_state

GRID_IMAGES = 100


def sample(
    run: Path, *, n: int = 100, steps: int | None = None, seed: int = 0, device: str = "auto", out: Path
) -> tuple[Path, Path]:
    """Draw `n` images from the averaged network of the last checkpoint of `run`. Write ``<out>.png`` and ``<out>.npz``.

    Args:
        steps: DDIM steps; None means the run's setting.
        seed: seed of the starting noise.
        out: path of the results. A suffix .png or .npz is removed. The grid shows the first 100 images.

    Returns:
        The paths of the grid and of the archive.

    Raises:
        ValueError: `run` is not a run folder, has no checkpoint, n is below 1, or steps is not in [1, 1000].
    """
    config = TrainConfig.load(run / "config.json")
    steps = config.sample_steps if steps is None else steps
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    require_sample_steps("steps", steps)
    if not out.name:
        raise ValueError(
            f"out must be the path of the results without suffix; {out} is a folder. Pass --out {out}/samples"
        )
    where = choose_device(device)
    shape = tuple(require_state(run)["origin"]["data"]["shape"])
    model, _ = load_model(run, config, shape, where)
    generator = torch.Generator(where).manual_seed(seed)
    with sensible_threads(shape[1], where):
        images = to_uint8(draw_samples(model, noise_schedule(), n, shape, steps=steps, generator=generator)).cpu()
    if out.suffix in (".png", ".npz"):
        out = out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    grid, archive = (out.with_name(f"{out.name}{suffix}") for suffix in (".png", ".npz"))
    save_grid(images[:GRID_IMAGES], grid)
    write_npz(archive, {"arr_0": images.permute(0, 2, 3, 1).numpy()}, compress=False)
    return grid, archive
