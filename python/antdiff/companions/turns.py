"""Samplers of timesteps for experts in turn and for specialists, and the importance weights of any sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from antdiff.clustering import StratifiedTimesteps, TimestepClusters, UniformTimesteps
from antdiff.clustering.timesteps import TimestepBatch
from antdiff.companions.curriculum import RestrictedTimesteps
from antdiff.companions.experts import P_OWN, ExpertBank, SoftIntervalSampler

Sampler = StratifiedTimesteps | UniformTimesteps | RestrictedTimesteps


class IntervalTimesteps(UniformTimesteps):
    """Timesteps of one cluster, drawn uniformly, for the training of a specialist."""

    def __init__(self, clusters: TimestepClusters, only: int) -> None:
        super().__init__(clusters)
        self.only = only

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw B timesteps of the cluster, with weights of 1."""
        start, stop = self.clusters.bounds[self.only : self.only + 2]
        t = torch.randint(start, stop, (B,), device=device, generator=generator)
        return TimestepBatch(t, torch.full_like(t, self.only), torch.ones(B, device=t.device))


class ExpertTurns(UniformTimesteps):
    """Timesteps of the experts of a bank in turn. Each draw selects the one expert that is trained in this step."""

    def __init__(self, clusters: TimestepClusters, bank: ExpertBank) -> None:
        super().__init__(clusters)
        n = len(bank.experts)
        # The published p are for four experts. Other numbers of experts interpolate them over the same range of noise.
        p = np.interp(np.linspace(0, len(P_OWN) - 1, n), np.arange(len(P_OWN)), P_OWN).tolist()
        self.soft = SoftIntervalSampler(n, p, clusters.T)
        self.bank = bank
        self.turn = 0

    def sample(
        self, B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> TimestepBatch:
        """Draw B timesteps of the expert whose turn it is, with weights of 1."""
        self.bank.only = self.turn
        t = self.soft.sample(self.turn, B, device=device, generator=generator)
        self.turn = (self.turn + 1) % len(self.bank.experts)
        return TimestepBatch(t, self.clusters.cluster_of(t), torch.ones(B, device=t.device))

    def state_dict(self) -> dict[str, int]:
        return {"turn": self.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turn = int(state["turn"])


def importance_of(sampler: Sampler, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a function that gives the importance weight of each cluster's samples at the current step, [K].

    The losses of a step are divided by this weight before they are logged.
    """
    if isinstance(sampler, RestrictedTimesteps):
        return lambda: sampler.cluster_weights
    k = sampler.clusters.k
    fixed = torch.ones(k, device=device)
    if isinstance(sampler, StratifiedTimesteps) and sampler.importance:
        fixed = (sampler.clusters.sizes * (k / sampler.clusters.T)).to(fixed)
    return lambda: fixed
