"""The exponential moving average of a network's weights, which samples and metrics use."""

from __future__ import annotations

import copy

import torch


class MovingAverage(torch.nn.Module):
    """A copy of a network, `module`, that holds the exponential moving average of the network's weights.

    The first update copies the weights. After n updates the decay is (1 + n) / (10 + n), at most `decay`. torch's
    AveragedModel computes the same, but it moves its counter between the host and the device of the weights in every
    step, which makes the host wait for the device.
    """

    n_averaged: torch.Tensor  # number of updates so far, [], always on the CPU

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0, device="cpu"))

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average in the weights of `model` and copy its buffers, without a host-device sync."""
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1
