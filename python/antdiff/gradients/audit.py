"""The audit: the gradient of one cluster against a plain backward, now and then while training runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from antdiff.gradients.batch import ClusteredBatch, GroupingError, check_losses
from antdiff.gradients.parameters import without_hooks
from antdiff.gradients.probe import uncompiled
from antdiff.gradients.replay import Replay, repeatable
from antdiff.gradients.routes import LossFn, Network

# A gradient may differ from the plain one by RELATIVE of its own length, plus NOISE of the length of the whole row of
# the Jacobian: gradients that are zero except for rounding (the bias of a key in attention) have no length of their
# own.
# In float32 sums in another order differ by some 1e-6 of their terms, and float64 networks may contain float32 parts.
RELATIVE, NOISE = 1e-3, 1e-5
# Half precision and TF32 round products to 2^-8 or 2^-11 of their terms, in another order in each of the two.
RELATIVE_LOW, NOISE_LOW = 5e-2, 1e-2
HALF = (torch.float16, torch.bfloat16)


class UnrepeatableError(GroupingError):
    """``loss_fn`` gives different losses for the same batch and random state, so numbers cannot be compared."""


class Difference(NamedTuple):
    """The outcome of a comparison.

    Attributes:
        excess: the largest ratio of a parameter's difference to the allowed one; more than 1 is an error.
        relative: the difference of this parameter relative to its plain gradient.
        name: this parameter.
        error: the largest difference of any parameter, relative to its plain gradient or, if that is smaller, to NOISE
            of the whole row.
    """

    excess: float
    relative: float
    name: str
    error: float


class Audit:
    """Says at which calls to compare: 1, 2, 4, 8, ..., and then every ``every`` calls; never if ``every`` is None."""

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.calls = 0
        self.audits = 0
        self.right_at = 0  # the last call that was found right

    def due(self) -> bool:
        """Count a call, and return whether it is to be audited."""
        self.calls += 1
        n = self.calls
        if self.every is None or (n & (n - 1) if n < self.every else n % self.every):
            return False
        self.audits += 1
        return True

    def cluster(self, clustered: ClusteredBatch) -> int:
        """Return the cluster whose row is compared: each in turn, without empty ones."""
        filled = [i for i, size in enumerate(clustered.sizes) if size]
        return filled[self.audits % len(filled)]


def plain_gradient(
    net: Network,
    loss_fn: LossFn,
    batch: Sequence[Any],
    clustered: ClusteredBatch,
    i: int,
    factor: Tensor | float,
    before: Replay,
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Run one forward of the whole batch and one backward, from the state of ``before`` and without any rule.

    Returns:
        The per-sample losses ``[B]``; ``factor`` times the gradient of the summed losses of cluster i, by the names of
        the parameters; and whether products may have been rounded to half precision or TF32.
    """
    with repeatable(net.model, loss_fn) as replay, uncompiled(net):
        before.rewind()
        with PrecisionObserver() as precision:
            per_sample = loss_fn(*batch)
        check_losses(per_sample, clustered.B)
        values = per_sample.detach().clone()
        own = {id(p) for p in net.model.parameters()}
        foreign = [(x, None if x.grad is None else x.grad.clone()) for x in _leaves(per_sample) if id(x) not in own]
        try:
            mask = clustered.one_hot(per_sample.dtype)[i]
            with without_hooks([*net.model.parameters(), *replay.foreign]):
                torch.autograd.backward((per_sample,), (mask * factor,))
            grads = {n: p.grad.to_dense() for n, p in net.model.named_parameters() if p.grad is not None}
        finally:
            for x, grad in foreign:
                x.grad = grad
    return values, grads, precision.low


def compare(rows: dict[str, Tensor], want: dict[str, Tensor], low_precision: bool) -> Difference:
    """Compare the gradients of one cluster, ``{name: [*shape]}``, with the plain ones; a missing one is zero."""
    relative, noise = (RELATIVE_LOW, NOISE_LOW) if low_precision else (RELATIVE, NOISE)
    names = list(rows)
    zero = {n: torch.zeros_like(rows[n]) for n in names if n not in want}
    pairs = [(rows[n], want.get(n, zero.get(n))) for n in names]
    norms = torch.stack([torch.linalg.vector_norm(b.double()) for _, b in pairs if b is not None]).cpu()
    gaps = torch.stack([torch.linalg.vector_norm(a.double() - b.double()) for a, b in pairs if b is not None]).cpu()
    if not bool(norms.isfinite().all()):
        return Difference(0.0, 0.0, "", 0.0)  # a step that overflowed says nothing
    floor = noise * norms.square().sum().sqrt()
    allowed = relative * norms + floor
    excess = torch.where(gaps == 0, gaps, gaps / allowed).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    error = torch.where(gaps == 0, gaps, gaps / norms.maximum(floor))
    tiny = torch.finfo(torch.float64).tiny
    return Difference(
        float(excess[worst]), float(gaps[worst] / norms[worst].clamp(min=tiny)), names[worst], float(error.max())
    )


class PrecisionObserver(TorchFunctionMode):
    """Sees whether any op works in half precision, under autocast or not, or may use TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.low = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.low:
            x = next((x for x in args if isinstance(x, Tensor)), None)
            if x is not None:
                device = x.device.type
                self.low = torch.is_autocast_enabled(device) or x.dtype in HALF or (device == "cuda" and _tf32())
        return func(*args, **(kwargs or {}))


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


def same_losses(a: Tensor, b: Tensor, low_precision: bool) -> bool:
    """Return whether two forwards of the same batch gave the same loss, up to rounding. NaN is like NaN."""
    limit = RELATIVE_LOW if low_precision else RELATIVE
    return bool(torch.isclose(a.double(), b.double(), rtol=limit, atol=0.0, equal_nan=True))


def _leaves(x: Tensor) -> list[Tensor]:
    """Return the tensors in which a backward from ``x`` accumulates gradients."""
    found, seen, stack = [], set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            stack.extend(f for f, _ in node.next_functions)
    return found
