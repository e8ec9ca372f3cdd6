"""Does a sample reach the rows of another one? A probe with NaN, which no weight, however small or zero, can hide.

The values of some samples are made NaN, and NaN spreads to everything that is computed from them, through zero weights
too. Wherever the batch meets a parameter, and in the losses, only the rows of these samples may be NaN. Which samples
are poisoned codes their numbers in binary, so that ``2 ceil(log2 B)`` forwards tell every pair of samples apart.

The probe is blind to ops that swallow NaN (``nan_to_num``, comparisons). The audit (``audit.py``) compares numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients.batch import ClusteredBatch, GroupingError, RowsError, check_losses
from antdiff.gradients.grouped.layout import Located, Survey, decode, shared_layouts
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.replay import Replay
from antdiff.gradients.routes import Chosen, LossFn, Network
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import Sink
from antdiff.gradients.tolerance import tolerating_nan


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
        with tolerating_nan(), mode:
            losses = loss_fn(*samples)
        structure = mode.structure
    else:
        with tolerating_nan():
            losses = loss_fn(*samples)
    check_losses(losses, clustered.B)
    others = int((torch.isnan(losses) & ~poisoned).sum())
    if others:
        raise RowsError(
            f"the values of some samples have reached the losses of {others} other samples: the network or the loss "
            "mixes samples. Only route='loop' gives cluster gradients of such a network."
        )
    return structure


def locate(net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, replay: Replay) -> Located:
    """Find the rows of every sample wherever this batch meets a parameter, for route ``grouped`` in eager mode.

    Returns:
        What holds for this batch. The values of another one may put its rows elsewhere.

    Raises:
        GroupingError: a row depends on several samples or on none, or floating-point values decide where rows are.
    """
    codes = binary_codes(clustered.B, clustered.cluster.device)
    surveys = []
    structures = set()
    for poisoned in codes:
        replay.rewind()
        surveys.append(Survey(poisoned))
        structures.add(_survey(net, loss_fn, batch, clustered, surveys[-1]))
    odd = {place: said for survey in surveys for place, said in survey.odd.items()}
    masks: list[dict[int, list[Tensor]]] = []
    for poisoned in codes if odd else ():
        replay.rewind()
        survey = Survey(poisoned, frozenset(odd))
        structures.add(_survey(net, loss_fn, batch, clustered, survey))
        masks.append(survey.masks)
    if len(structures) > 1:
        raise GroupingError(
            "floating-point values of the batch decide where the rows of the samples are, or how many there are, so a "
            "probe with NaN cannot show it. Use route='split'."
        )
    found = []
    for place, said in odd.items():
        layout = decode([forward[place] for forward in masks], codes)
        if layout is None:
            raise GroupingError(
                f"{said}, and the probe has not shown one sample for each row: an op before it mixes samples "
                "(BatchNorm, attention over the batch), or a row belongs to all samples or to none. Use route='loop' "
                "for a network that mixes samples, and route='split' for one that does not."
            )
        found.append((place, layout))
    return Located(structures.pop(), shared_layouts(found))


def _survey(net: Network, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch, survey: Survey) -> int:
    samples = Samples.of(batch, clustered.B).with_nan(survey.poisoned)
    sinks = [Sink(name, p, clustered.k) for name, p in net.model.named_parameters() if p.requires_grad]
    mode = GroupedMode(net.model, clustered, sinks, net.separable, batch=samples.tensors(), survey=survey)
    with tolerating_nan(), mode:
        losses = loss_fn(*samples)
    check_losses(losses, clustered.B)
    others = int((torch.isnan(losses.detach()) & ~survey.poisoned).sum())
    if others:
        raise GroupingError(
            f"the values of some samples have reached the losses of {others} other samples: the network or the loss "
            "mixes samples. Only route='loop' gives cluster gradients of such a network."
        )
    return mode.structure
