"""Does a sample reach the rows of another one? A probe with NaN, which no weight, however small or zero, can hide.

The values of some samples are made NaN, and NaN spreads to everything that is computed from them, through zero weights
too. Wherever the batch meets a parameter, and in the losses, only the rows of these samples may be NaN. Which samples
are poisoned codes their numbers in binary, so that ``2 ceil(log2 B)`` forwards tell every pair of samples apart.

The probe is blind to ops that swallow NaN (``nan_to_num``, comparisons). The audit (``audit.py``) compares numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from antdiff.gradients.batch import ClusteredBatch, GroupingError, check_losses
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.routes import Chosen, LossFn, Network
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import Sink


class Replay:
    """Restores parameters, buffers and random generators to their state when this object was made.

    The generators are torch's, numpy's and Python's global ones, and every ``torch.Generator`` that a module or
    ``loss_fn`` holds, in attributes, closures and ``functools.partial``.
    """

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        state = [*model.parameters(), *model.buffers()]
        self.devices = sorted({x.device for x in state if x.device.type == "cuda"}, key=str)
        # Parameters too: a forward may write them (forced weight normalisation).
        self._values = [(x, x._version, x.detach().clone()) for x in state]
        self._own = [g for m in model.modules() for g in vars(m).values() if isinstance(g, torch.Generator)]
        self._own += _generators_of(loss_fn)
        self._states = self._random()
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def _random(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]
        return [*states, *(g.get_state() for g in self._own)]

    def drew(self) -> bool:
        """Return whether random numbers were drawn since."""
        return not all(torch.equal(a, b) for a, b in zip(self._states, self._random(), strict=True))

    @torch.no_grad()
    def rewind(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self.devices, self._states[1:], strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own, self._states[1 + len(self.devices) :], strict=True):
            generator.set_state(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for x, version, value in self._values:
            if x._version != version:
                x.copy_(value)


def _generators_of(loss_fn: Any) -> list[torch.Generator]:
    held: list[Any] = []
    while isinstance(loss_fn, partial):
        held += [*loss_fn.args, *loss_fn.keywords.values()]
        loss_fn = loss_fn.func
    held += [cell.cell_contents for cell in getattr(loss_fn, "__closure__", None) or () if _is_filled(cell)]
    for owner in (loss_fn, getattr(loss_fn, "__self__", None)):
        held += vars(owner).values() if hasattr(owner, "__dict__") else ()
    held += getattr(loss_fn, "__defaults__", None) or ()
    return [x for x in held if isinstance(x, torch.Generator)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that its function has not set yet
        return False


@contextmanager
def repeatable(model: nn.Module, loss_fn: Any = None) -> Iterator[Replay]:
    """Leave parameters, buffers, gradients and random generators as they were."""
    replay = Replay(model, loss_fn)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield replay
    finally:
        replay.rewind()
        for p, grad in grads:
            p.grad = grad


def uncompiled(net: Network) -> AbstractContextManager[Any]:
    return nullcontext() if net.compiled is None else torch.compiler.set_stance("force_eager")


def binary_codes(B: int, device: torch.device) -> list[Tensor]:
    """Return sets of samples, bool ``[B]`` each: of any two samples, some set has the first one without the second."""
    ids = torch.arange(B, device=device)
    bits = [(ids >> b & 1).bool() for b in range(max(1, (B - 1).bit_length()))]
    return [s for bit in bits for s in (bit, ~bit) if bool(s.any())]


def random_code(B: int, seed: int, device: torch.device) -> list[Tensor]:
    """Return a random half of the samples and the other half, which tell any pair apart with probability 1/2."""
    chosen = torch.rand(B, generator=torch.Generator().manual_seed(seed)).argsort() < B // 2
    return [s.to(device) for s in (chosen, ~chosen) if bool(s.any())]


def probe(
    route: Chosen,
    net: Network,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    replay: Replay,
    codes: Sequence[Tensor],
) -> int:
    """Run one forward per set of poisoned samples, and raise if a sample has reached another one.

    Args:
        batch: sorted by cluster.
        codes: the sets, bool ``[B]`` each.

    Returns:
        The structure of the batch for route ``grouped`` (see :class:`GroupedMode`), 0 for another route.

    Raises:
        GroupingError: names the place.
    """
    structure = 0
    for poisoned in codes:
        replay.rewind()
        structure = _poisoned_forward(route, net, loss_fn, batch, clustered, poisoned)
    return structure


# A function of its own, so that the graph of one forward is freed before the next one starts.
def _poisoned_forward(
    route: Chosen, net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, poisoned: Tensor
) -> int:
    samples, structure = Samples.of(batch, clustered.B).with_nan(poisoned), 0
    if route == "grouped":
        sinks = [Sink(name, p, clustered.k) for name, p in net.model.named_parameters() if p.requires_grad]
        mode = GroupedMode(net.model, clustered, sinks, net.separable, probe=poisoned, batch=samples.tensors())
        with mode:
            losses = loss_fn(*samples)
        structure = mode.structure
    else:
        losses = loss_fn(*samples)
    check_losses(losses, clustered.B)
    others = int((torch.isnan(losses) & ~poisoned).sum())
    if others:
        raise GroupingError(
            f"the values of some samples have reached the losses of {others} other samples: the network or the loss "
            "mixes samples. Only route='loop' gives cluster gradients of such a network."
        )
    return structure
