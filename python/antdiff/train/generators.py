"""The random generators of a run: one per random choice, all spawned from the run's seed."""

from __future__ import annotations

import numpy as np
import torch

RANDOM_CHOICES = ("weights", "data", "noise", "timesteps", "balancing", "prompts")  # append only: the order is the seed
ON_CPU = ("weights", "data")


def make_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """Return one independent generator per random choice, on `device` or, for the weights and the data, on the CPU."""
    children = np.random.SeedSequence(seed).spawn(len(RANDOM_CHOICES))
    return {
        name: torch.Generator("cpu" if name in ON_CPU else device).manual_seed(
            int(child.generate_state(1, np.uint64)[0] >> 1)
        )
        for name, child in zip(RANDOM_CHOICES, children, strict=True)
    }
