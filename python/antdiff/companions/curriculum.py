"""Curriculum by difficulty of the denoising task: training starts with high noise and adds lower noise in stages.

Source: Kim, Go, Kwon, Kim, "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025
(arXiv 2403.10348), sections 5.1 (clusters, order) and 5.2 (pacing). The noise levels are divided into N clusters C_1 ..
C_N, where C_1 is the hardest (least noise). Stage n trains on the union of the n easiest clusters,

    U_n = C_{N-n+1} + ... + C_N,      p_n(t) = p(t) 1[t in U_n] / p(U_n),

and ends when the training loss has not improved for more than ``patience`` steps. No cluster is ever dropped, and from
stage N on training is ordinary training. Model weights, optimizer state and weight average are never touched.

The paper leaves open how p(t) is restricted (here it is cut off and renormalised) and whether the loss is smoothed
before it is compared (here it is not, unless ``smoothing`` is set).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from antdiff._checks import (
    MOST_TIMESTEPS,
    as_choice,
    as_count,
    as_device,
    as_number,
    as_state,
    as_tensor,
    check_draws,
    same_device,
    state_tensor,
)
from antdiff.clustering import StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff.clustering.timesteps import TimestepBatch

Order = Literal["easy-first", "hard-first"]
# N and tau of the best cell of the paper's ablation (DiT-B, ImageNet).
STAGES = 20
PATIENCE = 200
_CUT = 1e-6  # quantile at which SigmaCurriculum cuts off both ends of its distribution


class Pacing:
    """Stage of a curriculum over N clusters, and the rule that ends a stage.

    The state lives on ``device``, and no method waits for that device.

    Args:
        edges: ``[N+1]`` ascending ends of the clusters, in the units of the noise level (timesteps or quantiles).
        patience: tau. A stage ends after more than ``patience`` consecutive updates without a new lowest loss.
        steps_per_stage: end every stage after this many updates instead, regardless of the loss (the paper's NaiveCL).
        order: ``"easy-first"`` extends the range downwards from the most noise. ``"hard-first"`` (the paper's
            anti-curriculum) extends it upwards from the least noise.
        smoothing: decay in [0, 1) of an exponential average of the loss. The average restarts with each stage and is
            compared in place of the loss. 0: no smoothing.
        group: process group over which the loss is averaged before it is compared, so that every rank changes stage at
            the same step. None: the default group if ``torch.distributed`` is initialised, otherwise no averaging.
        device: device of the state, of the losses passed to :meth:`update`, and of the noise levels drawn.

    Raises:
        TypeError, ValueError: ``patience``, ``steps_per_stage``, ``order`` or ``smoothing`` is out of range.
    """

    def __init__(
        self,
        edges: Tensor,
        *,
        patience: int = PATIENCE,
        steps_per_stage: int | None = None,
        order: Order = "easy-first",
        smoothing: float = 0.0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        as_count("patience", patience, 0)
        if steps_per_stage is not None:
            as_count("steps_per_stage", steps_per_stage)
        as_choice("order", order, ("easy-first", "hard-first"))
        smoothing = as_number("smoothing", smoothing, least=0, below=1, remedy="Use 0 for no smoothing.")
        self.device = as_device("device", "cpu" if device is None else device)
        self.edges = edges.to(self.device)  # [N+1]
        self.stages = len(edges) - 1
        self.patience = patience
        self.steps_per_stage = steps_per_stage
        self.order = order
        self.smoothing = smoothing
        self.group = group
        self._stage = torch.ones((), dtype=torch.int64, device=self.device)
        self._best = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self._smoothed = torch.full((), math.nan, dtype=torch.float64, device=self.device)  # NaN: no loss yet
        self._waited = torch.zeros((), dtype=torch.int64, device=self.device)
        self._mirror = _Mirror(self._stage)

    @property
    def stage(self) -> Tensor:
        """The current stage, 1..N: int64 [] on the device."""
        return self._stage

    @property
    def done(self) -> Tensor:
        """Whether the range includes all N clusters: bool [] on the device."""
        return self._stage == self.stages

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The half-open range [low, high) of the current stage, two 0-d tensors in the units of ``edges``."""
        # take instead of []: indexing with a 0-d tensor would read it on the host.
        if self.order == "easy-first":
            return torch.take(self.edges, self.stages - self._stage), self.edges[-1]
        return self.edges[0], torch.take(self.edges, self._stage)

    @property
    def host_stage(self) -> int:
        """The stage before the latest :meth:`update`, as a Python int. Reading it does not wait for that update."""
        return self._mirror.read()

    @torch.no_grad()
    def update(self, loss: Tensor | float) -> None:
        """Record the training loss of one step, and go to the next stage if this one ends.

        The decision is made on the device, so nothing is returned.

        Args:
            loss: mean loss of the step, one number. NaN counts as no improvement.

        Raises:
            TypeError, ValueError: ``loss`` is not one number, or is a tensor on another device than the curriculum's.
        """
        x = self._mean_over_ranks(loss)
        if self.smoothing:
            blended = self.smoothing * self._smoothed + (1 - self.smoothing) * x
            x = torch.where(self._smoothed.isnan(), x, blended)
        improved = x < self._best
        if self.steps_per_stage is None:
            waited = torch.where(improved, 0, self._waited + 1)
            ends = waited > self.patience
        else:
            waited = self._waited + 1
            ends = waited >= self.steps_per_stage
        ends = ends & ~self.done
        self._stage += ends
        self._best.copy_(torch.where(ends, math.inf, torch.where(improved, x, self._best)))
        self._smoothed.copy_(torch.where(ends, math.nan, x))
        self._waited.copy_(torch.where(ends, 0, waited))
        self._mirror.write(self._stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the stage, the lowest loss, the smoothed loss and the number of updates without improvement."""
        return {
            "stage": self._stage.clone(),
            "best": self._best.clone(),
            "smoothed": self._smoothed.clone(),
            "waited": self._waited.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` of a curriculum with the same number of clusters.

        Raises:
            KeyError: an entry of ``state`` is missing.
            ValueError: the stage is not one of 1..N.
        """
        as_state(state, "stage", "best", "smoothed", "waited")
        values = {}
        for name in ("stage", "best", "smoothed", "waited"):
            x = state[name]
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                x = torch.tensor(float(x) if isinstance(x, float) else as_count(f"state[{name!r}]", x, 0))
            x = state_tensor(name, x)
            if x.numel() != 1:
                raise ValueError(f"state[{name!r}] must be one number; got {list(x.shape)}.")
            values[name] = x.reshape(())
        stage = int(values["stage"]) if values["stage"].isfinite() else 0
        if not 1 <= stage <= self.stages:
            raise ValueError(
                f"state must be of a curriculum of N={self.stages} clusters; got stage {stage}. Use the "
                "number of clusters that the saved curriculum had."
            )
        for name, value in (("best", self._best), ("smoothed", self._smoothed), ("waited", self._waited)):
            value.copy_(values[name])
        self._stage.fill_(stage)
        self._mirror = _Mirror(self._stage)

    def _mean_over_ranks(self, loss: Tensor | float) -> Tensor:
        if isinstance(loss, Tensor):
            as_tensor("loss", loss, kind="real", read=False)
            if loss.numel() != 1:
                raise ValueError(
                    f"loss must be one number, the mean over the batch; got shape {list(loss.shape)}. Call .mean()."
                )
            if loss.device != self.device:
                raise ValueError(
                    f"loss must be on the curriculum's device {self.device}; got {loss.device}. Make the curriculum "
                    f"with device={str(loss.device)!r}."
                )
            x = loss.detach().reshape(()).to(torch.float64, copy=True)
        elif isinstance(loss, (int, float)) and not isinstance(loss, bool):
            x = torch.full(
                (),
                float(max(min(loss, 1e300), -1e300)) if abs(loss) != math.inf else loss,
                dtype=torch.float64,
                device=self.device,
            )
        else:
            raise TypeError(f"loss must be a tensor or a number; got {type(loss).__name__}.")
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(x, group=self.group)
            x /= dist.get_world_size(self.group)
        return x

    def check_device(self, device: torch.device | str | None) -> None:
        """Raise a ValueError if ``device`` is given and differs from the curriculum's device."""
        if device is not None and not same_device(as_device("device", device, present=False), self.device):
            raise ValueError(
                f"device must be the curriculum's own, {self.device}; got {device}. Make the curriculum with "
                f"device={str(device)!r}."
            )


class Curriculum(Pacing):
    """Curriculum over integer timesteps 0 .. T-1 (0 = least noise).

    Example::

        curriculum = Curriculum.from_log_snr(log_snr)                      # N = 20 clusters, patience 200
        timesteps = curriculum.restrict(StratifiedTimesteps(clusters))     # or curriculum.sample(B) for uniform t
        ...
        t, cluster, weight = timesteps.sample(B)
        ...
        curriculum.update(loss)

    Args:
        clusters: the N clusters; cluster 0 has the least noise. They are independent of the K clusters of the balancing
            method.
        pacing: keyword arguments of :class:`Pacing`.
    """

    def __init__(self, clusters: TimestepClusters, **pacing: Any) -> None:
        if not isinstance(clusters, TimestepClusters):
            raise TypeError(f"clusters must be TimestepClusters; got {type(clusters).__name__}.")
        self.T = clusters.T
        super().__init__(torch.tensor(clusters.bounds), **pacing)

    @classmethod
    def from_log_snr(cls, log_snr: Tensor, n: int = STAGES, **pacing: Any) -> Curriculum:
        """Make a curriculum with clusters of similar log-SNR (float [T], falling with t), the paper's default."""
        return cls(TimestepClusters.from_log_snr(log_snr, _stages(n, log_snr)), **pacing)

    @classmethod
    def uniform(cls, T: int, n: int = STAGES, **pacing: Any) -> Curriculum:
        """Make a curriculum with clusters of equal length, the paper's ablation."""
        return cls(TimestepClusters.uniform(T, _stages(n, T)), **pacing)

    @staticmethod
    def edm(p_mean: float = -1.2, p_std: float = 1.2, n: int = STAGES, **pacing: Any) -> SigmaCurriculum:
        """Make a curriculum over EDM's noise levels, a :class:`SigmaCurriculum`."""
        return SigmaCurriculum(p_mean, p_std, n, **pacing)

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw timesteps int64 [B], uniform over the current range. ``device`` must be the curriculum's, or None."""
        B = as_count("B", B, most=MOST_TIMESTEPS)
        self.check_device(device)
        check_draws(generator, self.device)
        low, high = self.range
        u = torch.rand(B, dtype=torch.float64, device=self.device, generator=generator)  # [B]
        # Although u < 1, low + u (high - low) can round up to high, which is outside the range.
        return torch.minimum((low + u * (high - low)).long(), high - 1)

    def restrict(self, sampler: StratifiedTimesteps | UniformTimesteps) -> RestrictedTimesteps:
        """Restrict ``sampler`` to the current range; see :class:`RestrictedTimesteps`."""
        return RestrictedTimesteps(self, sampler)


def _stages(value: Any, timesteps: Any) -> int:
    """Return the argument n if it is from 1 to the number of timesteps."""
    n: int = as_count("n", value)
    T = timesteps if isinstance(timesteps, int) else timesteps.numel() if isinstance(timesteps, Tensor) else n
    if n > T:
        raise ValueError(f"n must be at most T, since no cluster may be empty; got n={n} with T={T}.")
    return n


class SigmaCurriculum(Pacing):
    """Curriculum over EDM's log-normal noise levels, ln sigma ~ N(p_mean, p_std^2), in N equally probable clusters.

    The ends of the clusters are quantiles of that normal distribution, C_i = [Phi^-1((i-1)/N), Phi^-1(i/N)] (section
    5.1). Stage n therefore draws u ~ U((N-n)/N, 1) and ln sigma = p_mean + p_std Phi^-1(u). ``range`` is in units of
    the quantile u.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, n: int = STAGES, **pacing: Any) -> None:
        n = as_count("n", n, most=MOST_TIMESTEPS)
        self.p_mean = as_number("p_mean", p_mean)
        self.p_std = as_number("p_std", p_std, above=0, remedy="EDM uses 1.2.")
        extremes = self._sigma(torch.tensor([_CUT, 1 - _CUT], dtype=torch.float64))  # [2], least and greatest sigma
        least, greatest = extremes.tolist()
        float32 = torch.finfo(torch.float32)
        if not float32.tiny <= least <= greatest <= float32.max:
            raise ValueError(
                "p_mean and p_std must give noise levels in the range of float32, which reach 4.75 p_std on both sides "
                f"of p_mean in ln sigma; got p_mean={p_mean} and p_std={p_std}, with noise levels from {least:.3g} to "
                f"{greatest:.3g}. EDM uses -1.2 and 1.2."
            )
        super().__init__(torch.arange(n + 1, dtype=torch.float64) / n, **pacing)

    @property
    def sigma_bounds(self) -> Tensor:
        """The noise levels between neighbouring clusters, ascending: float64 [N-1]."""
        return self._sigma(self.edges[1:-1])

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw noise levels sigma, float32 [B], in the current range. ``device`` must be the curriculum's, or None."""
        B = as_count("B", B, most=MOST_TIMESTEPS)
        self.check_device(device)
        check_draws(generator, self.device)
        low, high = self.range
        u = torch.rand(B, dtype=torch.float64, device=self.device, generator=generator)  # [B]
        # Clamping cuts off one millionth at each end, 4.75 standard deviations from the mean: sigma stays within a
        # factor exp(4.75 p_std) of the median.
        return self._sigma((low + u * (high - low)).clamp(_CUT, 1 - _CUT)).float()

    def _sigma(self, u: Tensor) -> Tensor:
        return torch.exp(self.p_mean + self.p_std * torch.special.ndtri(u))


# ---- composition with a sampler of clustered timesteps -----------------------------------------------------------


class RestrictedTimesteps:
    """Sampler of timesteps whose density p(t) is cut to the range of a curriculum and renormalised.

    Each t of ``sampler`` is mapped to the same quantile of the restricted density. With F the distribution function of
    p and v uniform, u = F(t) + v p(t) is uniform on [0, 1), and t' = F^-1(F(low) + u (F(high) - F(low))). The map keeps
    the order of quantiles, so a stratified batch stays stratified. Once the range covers everything, t' = t. Clusters
    outside the range get no samples. Methods that receive the counts, such as
    ``UncertaintyWeighting.loss(losses, counts)``, do not update the weights of these clusters.

    Weights are 1. If ``sampler`` has ``importance=True``, samples of cluster c have weight K |I_c in range| / |range|:
    the mean over K clusters of their weighted mean losses is then the mean loss over uniform t in the range.

    Args:
        curriculum: the curriculum that sets the range. The training loop updates it; :meth:`state_dict` includes it.
        sampler: :class:`antdiff.StratifiedTimesteps` or :class:`antdiff.UniformTimesteps`.

    Raises:
        TypeError: ``sampler`` is of another class, so that its density is not known.
        ValueError: the sampler and the curriculum differ in T.
    """

    def __init__(self, curriculum: Curriculum, sampler: StratifiedTimesteps | UniformTimesteps) -> None:
        if not isinstance(sampler, (StratifiedTimesteps, UniformTimesteps)):
            raise TypeError(
                f"sampler must be StratifiedTimesteps or UniformTimesteps; got {type(sampler).__name__}, whose density "
                "is not known. Draw timesteps inside curriculum.range from your own density instead."
            )
        if not isinstance(curriculum, Curriculum):
            raise TypeError(f"curriculum must be a Curriculum; got {type(curriculum).__name__}.")
        clusters, T = sampler.clusters, curriculum.T
        if clusters.T != T:
            raise ValueError(
                f"sampler must have the curriculum's T={T} timesteps; got T={clusters.T}. Make both from the same "
                "schedule."
            )
        self.curriculum = curriculum
        self.sampler = sampler
        self.clusters = clusters
        self.importance = isinstance(sampler, StratifiedTimesteps) and sampler.importance
        sizes = clusters.sizes  # [K]
        each = 1 / (clusters.k * sizes.double()) if isinstance(sampler, StratifiedTimesteps) else torch.tensor(1 / T)
        density = each.double().expand(clusters.k).repeat_interleave(sizes)  # [T], p
        distribution = torch.cat([density.new_zeros(1), density.cumsum(0)])
        self._p = density.to(curriculum.device)
        self._F = (distribution / distribution[-1]).to(curriculum.device)  # [T+1], F[t] = p(below t)
        self._bounds = torch.tensor(clusters.bounds, device=curriculum.device)  # [K+1]

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw t int64 [B] in the current range, with cluster int64 [B] and weight float32 [B].

        All are on the curriculum's device.
        """
        self.curriculum.check_device(device)
        check_draws(generator, self.curriculum.device)
        t = self.sampler.sample(B, device=self.curriculum.device, generator=generator).t
        low, high = self.curriculum.range
        below, inside = torch.take(self._F, low), torch.take(self._F, high) - torch.take(self._F, low)
        v = torch.rand(B, dtype=torch.float64, device=t.device, generator=generator)
        u = self._F[t] + v * self._p[t]
        moved = torch.searchsorted(self._F, below + u * inside, right=True) - 1
        moved = torch.minimum(torch.maximum(moved, low), high - 1)  # rounding can leave the range at its ends
        t = torch.where(high - low == self.curriculum.T, t, moved)
        cluster = torch.bucketize(t, self._bounds, right=True) - 1
        return TimestepBatch(t, cluster, self.cluster_weights[cluster])

    @property
    def cluster_weights(self) -> Tensor:
        """Weight of a sample of each cluster at the current stage: float32 [K], 1 for clusters outside the range."""
        if not self.importance:
            return torch.ones(self.clusters.k, device=self._bounds.device)
        low, high = self.curriculum.range
        inside = torch.minimum(self._bounds[1:], high) - torch.maximum(self._bounds[:-1], low)  # [K]
        return torch.where(inside > 0, self.clusters.k * inside / (high - low), 1.0).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the sampler and of the curriculum."""
        return {"sampler": self.sampler.state_dict(), "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        as_state(state, "sampler", "curriculum")
        before = self.sampler.state_dict()
        self.sampler.load_state_dict(state["sampler"])
        try:
            self.curriculum.load_state_dict(state["curriculum"])
        except (TypeError, ValueError):
            self.sampler.load_state_dict(before)
            raise


class _Mirror:
    """Copy of a device integer on the host, one write behind.

    A copy is queued after everything that the step has queued, so reading the latest copy would wait for the step.
    Reading the copy before it waits at most for the previous step.
    """

    def __init__(self, value: Tensor) -> None:
        cuda = value.is_cuda
        self._copies = [torch.empty((), dtype=value.dtype, pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._latest = 0
        self.write(value)
        self.write(value)

    def write(self, value: Tensor) -> None:
        self._latest = 1 - self._latest
        self._copies[self._latest].copy_(value, non_blocking=True)
        if (event := self._events[self._latest]) is not None:
            event.record()

    def read(self) -> int:
        previous = 1 - self._latest
        if (event := self._events[previous]) is not None:
            event.synchronize()
        return int(self._copies[previous])
