"""Task affinity: do the gradients of two timesteps point the same way?

Go et al., "Addressing Negative Transfer in Diffusion Models", NeurIPS 2023 (arXiv 2306.00354), the first observation:
TAS(s, t) is the mean over checkpoints of cos(grad L_s, grad L_t). This implementation differs in two points. Gradients
are taken from two independent halves of the data, so that noise does not shrink the cosines. They are streamed into
rows that stay within a given memory, and are sketched where necessary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from antdiff._checks import as_count, as_function, as_module, as_path, as_tensor, check_draws, describe
from antdiff._files import digest, write_npz
from antdiff._progress import progress_bar
from antdiff.analysis import estimate
from antdiff.analysis.plan import Plan, make_plan
from antdiff.analysis.projection import Columns, Projection
from antdiff.analysis.rows import ResumableRows
from antdiff.clustering import TimestepClusters
from antdiff.diffusion import log_snr as named_log_snr
from antdiff.gradients import ClusterGradients

Loss = Callable[..., Tensor]

_FORMAT = "antdiff.TaskAffinity-1"


@dataclass
class TaskAffinity:
    """Affinities of timesteps, and the data they come from. Tensors are float64 on the CPU unless stated otherwise.

    Attributes:
        affinity: ``[n, n]``, noise-corrected cosines, mean over checkpoints. NaN where no checkpoint has a value.
        timesteps: int64 ``[n]``, the grid of timesteps.
        log_snr: ``[T]``, log-SNR of all timesteps.
        raw: ``[n, n]``, cosines of the gradients of all data without correction, mean over checkpoints.
        checkpoints: ``[C, n, n]``, ``affinity`` of each checkpoint.
        products: ``[C, n]``, <a_i, b_i>, the denominators: unbiased estimates of the squared gradient norms.
        signal: ``[C, n]``, the split-half cosine: 1 if the gradient is all signal, 0 if it is all noise.
        layers: ``[L, n, n]``, ``affinity`` of each group of parameters alone.
        layer_names: names of the L groups.
        stats: plain numbers: sizes, counts, memory and, with a sketch, the bound on its error.
    """

    affinity: Tensor
    timesteps: Tensor
    log_snr: Tensor
    raw: Tensor
    checkpoints: Tensor
    products: Tensor
    signal: Tensor
    layers: Tensor
    layer_names: tuple[str, ...]
    stats: dict[str, Any]

    def __post_init__(self) -> None:
        shapes = {"affinity": 2, "timesteps": 1, "log_snr": 1, "raw": 2, "checkpoints": 3, "products": 2, "signal": 2,
                  "layers": 3}  # fmt: skip
        for name, dims in shapes.items():
            x = as_tensor(name, getattr(self, name), dims=dims, kind="int" if name == "timesteps" else "float")
            x = x.detach().cpu().resolve_neg()
            setattr(self, name, x.long() if name == "timesteps" else x.double())
        n, T = len(self.timesteps), len(self.log_snr)
        for name in ("affinity", "raw", "checkpoints", "layers"):
            if getattr(self, name).shape[-2:] != (n, n):
                raise ValueError(
                    f"{name} must have shape [..., n, n] for n={n} timesteps; got {list(getattr(self, name).shape)}."
                )
        grid = self.timesteps.tolist()
        if n < 2 or any(a >= b for a, b in pairwise(grid)) or not 0 <= grid[0] <= grid[-1] < T:
            raise ValueError(f"timesteps must be at least two, ascending in 0 .. T-1={T - 1}; got {grid[:8]}.")

    @property
    def T(self) -> int:  # noqa: N802
        """Number of timesteps of the schedule."""
        return len(self.log_snr)

    def full(self) -> Tensor:
        """Return the affinities of all timesteps, ``[T, T]``; see :func:`antdiff.analysis.estimate.interpolate`."""
        return estimate.interpolate(self.affinity, self.timesteps, self.T)

    def clusters(self, k: int, *, min_size: int = 1, max_size: int | None = None) -> TimestepClusters:
        """Return gradient clusters: ``TimestepClusters.from_affinity`` of :meth:`full`."""
        return TimestepClusters.from_affinity(self.full(), k, min_size=min_size, max_size=max_size)

    def gap_correlations(
        self, *, resamples: int = 500, generator: torch.Generator | None = None
    ) -> dict[str, estimate.Correlation]:
        """Return Spearman's correlations of affinity with the gap in ``"t"`` and in ``"log_snr"``."""
        resamples = as_count("resamples", resamples, most=2**20)
        check_draws(generator, torch.device("cpu"))
        positions = {"t": self.timesteps, "log_snr": self.log_snr[self.timesteps]}
        return {
            name: estimate.gap_correlation(self.affinity, x, resamples=resamples, generator=generator)
            for name, x in positions.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every attribute under its name into an npz file, atomically."""
        arrays = {name: value.numpy() for name, value in vars(self).items() if isinstance(value, Tensor)}
        texts = {"layer_names": np.array(self.layer_names), "stats": np.array(json.dumps(self.stats))}
        write_npz(as_path("path", path), {"format": np.array(_FORMAT), **arrays, **texts})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskAffinity:
        """Read a file written by :meth:`save`; raise a ValueError for any other file."""
        try:
            with np.load(as_path("path", path)) as archive:
                if str(archive["format"]) != _FORMAT:
                    raise ValueError(f"format is {archive['format']}")
                values = {name: archive[name] for name in archive.files if name != "format"}
        except (ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} must be an npz written by TaskAffinity.save; {error}.") from error
        names, stats = tuple(values.pop("layer_names").tolist()), json.loads(str(values.pop("stats")))
        return cls(**{k: torch.from_numpy(v) for k, v in values.items()}, layer_names=names, stats=stats)


def epsilon_loss(log_snr: Tensor) -> Loss:
    """Return the denoising loss of a variance-preserving schedule, ``loss(model, x0, noise, t, *conditions) -> [b]``.

    It is the mean squared error of ``model(x_t, t, *conditions)`` as an estimate of the noise, where
    ``x_t = sqrt(sigmoid(l)) x_0 + sqrt(sigmoid(-l)) noise`` and l = log_snr[t].
    """
    as_tensor("log_snr", log_snr, dims=1, shape="[T]")
    signal, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()  # [T]

    def loss(model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        a, s = (level.to(x0)[t].view(-1, *[1] * (x0.dim() - 1)) for level in (signal, sigma))  # [b, 1, ...]
        error = model(a * x0 + s * noise, t, *conditions) - noise
        per_sample: Tensor = error.square().flatten(1).mean(1)
        return per_sample

    return loss


def task_affinity(
    model: nn.Module,
    data: Tensor | Sequence[Tensor],
    timesteps: int | Sequence[int] | Tensor = 100,
    *,
    log_snr: str | Tensor = "cosine",
    loss: Loss | None = None,
    checkpoints: Iterable[Mapping[str, Any]] | None = None,
    groups: Callable[[str], str] | None = None,
    sketch: int | Literal["auto"] | None = "auto",
    memory: int = 2**30,
    batch_size: int = 64,
    folder: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TaskAffinity:
    """Measure the cosines of the gradients of the denoising losses at different timesteps, averaged over checkpoints.

    All timesteps see the same images and the same noise, split at random into two halves. Each gradient is streamed
    into a row, exact or sketched; see :mod:`antdiff.analysis.projection` for the sketch and its error bound. The cost
    is one forward and backward per image, timestep and checkpoint. During the measurement the model is in eval mode
    (no dropout). Its mode, weights and ``.grad`` are restored.

    Args:
        model: network whose samples do not interact (no BatchNorm in training mode).
        data: clean samples, float ``[N, ...]`` with N even, or a sequence of them and of conditions ``[N, ...]``, which
            ``loss`` and ``model`` take after t. Draw them as in training: they are assumed to be independent draws.
        timesteps: the grid: a number of timesteps, evenly spaced from 0 to T-1, or the timesteps themselves.
        log_snr: name of a schedule, or ``[T]``. It determines T and the default loss.
        loss: ``loss(model, x0, noise, t, *conditions)`` -> per-sample losses ``[b]``; default :func:`epsilon_loss`.
        checkpoints: state dicts of ``model`` to average over, loaded one after another; default the current weights.
        groups: maps the name of a parameter to its group (layer), for the affinities of each group; default a single
            group. :func:`antdiff.analysis.module_groups` groups by top-level module.
        sketch: None is exact. With an int d, groups of more than d parameters are sketched to d numbers. ``"auto"`` is
            exact if 2 n P numbers fit into the memory; otherwise d is the largest power of two that fits, at most
            16,384.
        memory: limit in bytes for everything except the network, its activations on ``batch_size`` samples, and the
            data.
        batch_size: samples per forward pass.
        folder: folder of the state. The same call then resumes an interrupted one (whether ``loss`` is the same is not
            checked), and exact rows that do not fit into the memory take 2 n P numbers of disk space instead.
        generator: random numbers of the halves, the noise and the sketch, on the CPU; default one of seed 0, so that a
            repeated call can resume.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: an invalid argument (the message names it and the remedy), too little memory, or a folder
            with the state of another computation.
    """
    as_module("model", model)
    for name, function in (("loss", loss), ("groups", groups)):
        if function is not None:
            as_function(name, function)
    check_draws(generator, torch.device("cpu"))
    batch_size = as_count("batch_size", batch_size)
    if checkpoints is not None and (isinstance(checkpoints, (Tensor, str)) or not isinstance(checkpoints, Iterable)):
        raise TypeError(f"checkpoints must be an iterable of state dicts; got {describe(checkpoints)}.")
    folder = None if folder is None else as_path("folder", folder)
    levels = levels_of(log_snr)
    grid = _grid(timesteps, len(levels))
    samples = _samples(data)
    generator = generator or torch.Generator().manual_seed(0)
    halves = _halves(samples, generator)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    group_of = groups or (lambda name: "all")
    plan = make_plan(named, group_of, len(grid), sketch=sketch, memory=memory, on_disk=folder is not None)
    projection = Projection(model, group_of, plan.dim, generator)
    store = ResumableRows(
        None if folder is None else Path(folder),
        _fingerprint(named, halves, grid, levels, projection, batch_size),
        (2, len(grid), projection.columns),
        plan.dtype,
    )
    stream = _Stream(model, loss or epsilon_loss(levels), halves, grid, batch_size, plan, projection, store)
    found, training = [], model.training
    before = None if checkpoints is None else {k: v.clone() for k, v in model.state_dict().items()}
    try:
        model.eval()
        for c, state in enumerate([None] if checkpoints is None else checkpoints):
            if state is not None:
                if not isinstance(state, Mapping):
                    raise TypeError(f"checkpoints must be state dicts of model; got {describe(state)}.")
                model.load_state_dict(state)
            found.append(stream.run(c, progress))
    finally:
        if before is not None:
            model.load_state_dict(before)
        model.train(training)
    if not found:
        raise ValueError(
            "checkpoints must hold at least one state dict; got none. Leave it out for the current weights."
        )
    return _average(found, grid, levels, projection.groups, plan, len(samples[0]))


class _Stream:
    """Computes the rows of one checkpoint after another, in blocks of timesteps, and their inner products."""

    def __init__(
        self, model: nn.Module, loss: Loss, halves: list[list[Tensor]], grid: Tensor, batch_size: int, plan: Plan,
        projection: Projection, store: ResumableRows,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.halves, self.grid, self.batch_size = model, loss, halves, grid, batch_size
        self.plan, self.projection, self.store = plan, projection, store
        # The split route runs one timestep per slice. It supports every network and keeps no activations.
        self.gradients = ClusterGradients(model, plan.block, route="split", dtype=plan.dtype, group="local")

    def run(self, checkpoint: int, progress: bool) -> dict[str, Tensor]:
        """Return the estimates for the current weights of the model."""
        weights = _weights(self.model)
        result = self.store.finished(checkpoint, weights)
        if result is not None:
            return result
        done, n = self.store.done(checkpoint, weights), len(self.grid)
        with _bar(n, done, f"checkpoint {checkpoint}", progress) as advance:
            for start in range(done, n, self.plan.block):
                stop = min(start + self.plan.block, n)
                for half, samples in enumerate(self.halves):
                    self._gradients(self.grid[start:stop], samples, self.store.rows[half, start:stop])
                self.store.advance(checkpoint, weights, stop)
                advance(stop - start)
        result = self._estimates()
        self.store.finish(checkpoint, weights, result)
        return result

    def _gradients(self, ts: Tensor, samples: list[Tensor], out: Tensor) -> None:
        """Write the gradients of the mean loss over the samples, at each of ts [k], to out [k, D]."""
        k, device = len(ts), next(self.model.parameters()).device

        def losses(t: Tensor, x0: Tensor, noise: Tensor, *conditions: Tensor) -> Tensor:
            return self.loss(self.model, x0, noise, t, *conditions)

        with self.gradients.accumulate() as total:
            for parts in zip(*(x.split(self.batch_size) for x in samples), strict=True):
                b = len(parts[0])
                batch = [x.to(device).repeat(k, *[1] * (x.dim() - 1)) for x in parts]  # each [k b, ...]
                t = ts.to(device).repeat_interleave(b)  # [k b]
                cluster = torch.arange(k, device=device).repeat_interleave(b)
                counts = [b] * k + [0] * (self.plan.block - k)
                total.add(losses, (t, *batch), cluster, counts=counts)
        self.projection.write(total.jacobian.rows, out)

    def _estimates(self) -> dict[str, Tensor]:
        rows = self.store.rows.flatten(0, 1)  # [2n, D]
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        layers = []
        for group in self.projection.groups:
            G = gram_of_rows(rows[:, group.start : group.stop], self.plan.slab)
            layers.append(estimate.corrected_cosine(G))
            total += G
        result = {
            "affinity": estimate.corrected_cosine(total),
            "raw": estimate.raw_cosine(total),
            "products": estimate.split_half_products(total),
            "signal": estimate.split_half_cosine(total),
            "layers": torch.stack(layers),
        }
        if self.projection.dim is not None:
            result["sketch_sd"] = estimate.sketch_sd(total, self.projection.dim)
        return result


def gram_of_rows(rows: Tensor, slab: int) -> Tensor:
    """Return ``rows rows^T`` in float64, summed from ``slab`` columns at a time. ``ops.gram`` takes only few rows."""
    G = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(slab, dim=1):
        part = part.double()  # products of float32 are exact in float64
        G.addmm_(part, part.T)
    return (G + G.T) / 2


def _average(
    found: list[dict[str, Tensor]], grid: Tensor, levels: Tensor, groups: list[Columns], plan: Plan, samples: int
) -> TaskAffinity:
    def stacked(name: str) -> Tensor:
        return torch.stack([result[name] for result in found])  # [C, ...]

    affinity = stacked("affinity").nanmean(0)
    stats: dict[str, Any] = {
        "parameters": sum(group.size for group in groups),
        "samples": samples,
        "checkpoints": len(found),
        "gradients": len(found) * len(grid) * samples,
        "block": plan.block,
        "memory_bytes": plan.bytes,
        "sketch_dim": plan.dim,
        "nan_share": float(affinity.isnan().double().mean()),
    }
    if "sketch_sd" in found[0]:
        # All checkpoints are sketched with the same signs, so their errors may be correlated. Whatever the correlation,
        # the deviation of the mean is at most the mean of the deviations.
        sd = stacked("sketch_sd").nanmean(0)
        off = sd[torch.triu(torch.ones_like(sd), 1).bool()]
        off = off[off.isfinite()]
        if len(off):
            stats |= {"sketch_sd_median": float(off.median()), "sketch_sd_max": float(off.max())}
    return TaskAffinity(
        affinity=affinity,
        timesteps=grid,
        log_snr=levels,
        raw=stacked("raw").nanmean(0),
        checkpoints=stacked("affinity"),
        products=stacked("products"),
        signal=stacked("signal"),
        layers=stacked("layers").nanmean(0),
        layer_names=tuple(group.name for group in groups),
        stats=stats,
    )


def mean_within(affinity: Tensor, clusters: TimestepClusters) -> float:
    """Return the mean affinity, from ``[T, T]``, of the pairs of different timesteps in the same cluster."""
    total = pairs = 0.0
    for start, stop in pairwise(clusters.bounds):
        block = affinity[start:stop, start:stop]
        total += float(block.sum() - block.diagonal().sum())
        pairs += len(block) * (len(block) - 1)
    return total / pairs if pairs else float("nan")


# ---- arguments -------------------------------------------------------------------------------------------------------


def levels_of(log_snr: object) -> Tensor:
    """Return log-SNR as float64 [T] on the CPU, from the name of a schedule or a tensor."""
    if isinstance(log_snr, str):
        return named_log_snr(log_snr)
    if not isinstance(log_snr, Tensor) or not log_snr.is_floating_point() or log_snr.dim() != 1 or not len(log_snr):
        raise TypeError(f"log_snr must be the name of a schedule or a float tensor [T]; got {describe(log_snr)}.")
    return as_tensor("log_snr", log_snr).detach().to("cpu", torch.float64)


def _grid(timesteps: int | Sequence[int] | Tensor, T: int) -> Tensor:
    if isinstance(timesteps, int) and not isinstance(timesteps, bool):
        if not 2 <= timesteps <= T:
            raise ValueError(f"timesteps must be from 2 to T={T}; got {timesteps}.")
        # The rounded timesteps are distinct, since the spacing is at least 1.
        return torch.linspace(0, T - 1, timesteps, dtype=torch.float64).round().long()
    if not isinstance(timesteps, (Tensor, np.ndarray)):
        entries: Any = timesteps if isinstance(timesteps, (list, tuple, range)) else [None]
        if not all(isinstance(t, (int, np.integer)) and abs(t) < 2**62 for t in entries):
            raise TypeError(f"timesteps must be an int or a list of ints; got {describe(timesteps)}.")
    grid = as_tensor("timesteps", torch.as_tensor(timesteps), kind="int")
    if grid.dtype not in (torch.int64, torch.int32) or grid.dim() != 1:
        raise TypeError(f"timesteps must be an int or a list of ints; got {grid.dtype} of shape {list(grid.shape)}.")
    grid = grid.long().cpu()
    if len(grid) < 2 or bool((grid.diff() <= 0).any()) or not 0 <= int(grid[0]) <= int(grid[-1]) < T:
        raise ValueError(f"timesteps must be at least two, ascending in 0 .. T-1={T - 1}; got {grid.tolist()}.")
    return grid


def _samples(data: Tensor | Sequence[Tensor]) -> list[Tensor]:
    samples = [data] if isinstance(data, Tensor) else list(data)
    if not samples or not all(isinstance(x, Tensor) and x.dim() for x in samples):
        received = ", ".join(map(describe, samples)) or "an empty sequence"
        raise TypeError(
            "data must be a float tensor [N, ...], or a sequence of this tensor and condition tensors [N, ...]; got "
            f"{received}. Convert every entry to a tensor with a first dimension of N."
        )
    if not samples[0].is_floating_point():
        raise TypeError(f"data must be float, scaled as in training; got {samples[0].dtype}.")
    N = len(samples[0])
    if N < 2 or N % 2:
        raise ValueError(f"data must have an even number N >= 2 of samples, for two equal halves; got N={N}.")
    lengths = [len(x) for x in samples]
    if any(length != N for length in lengths):
        raise ValueError(f"data and conditions must have the same first dimension N; got {lengths}.")
    return samples


def _halves(samples: list[Tensor], generator: torch.Generator) -> list[list[Tensor]]:
    """Return two random halves of (x0, noise, *conditions)."""
    x0, *conditions = samples
    order = torch.randperm(len(x0), generator=generator)  # [N]
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return [[x[rows.to(x.device)] for x in (x0, noise, *conditions)] for rows in order.chunk(2)]


# ---- the state -------------------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> str:
    """Return a digest of the weights and buffers."""
    return digest(*(part for item in model.state_dict().items() for part in item))


def _fingerprint(
    named: list[tuple[str, nn.Parameter]], halves: list[list[Tensor]], grid: Tensor, levels: Tensor,
    projection: Projection, batch_size: int,
) -> str:  # fmt: skip
    """Return a digest of everything that the rows depend on, except the weights and the loss."""
    parameters = repr([(name, p.dtype, tuple(p.shape)) for name, p in named])
    tensors = (x for half in halves for x in half)
    return digest(_FORMAT, str(batch_size), projection.digest(), parameters, grid, levels, *tensors)


@contextmanager
def _bar(total: int, done: int, title: str, progress: bool) -> Iterator[Callable[[int], Any]]:
    """Yield a function that advances the progress bar by a number of timesteps."""
    with progress_bar(total, initial=done, title=title, unit="timestep", active=progress) as bar:
        yield bar.update
