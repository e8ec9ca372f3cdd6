"""Telemetry of training: losses, gradient norms, cosines, conflicts and weights of each cluster, without host syncs.

Each step copies its K losses, counts and weights and its K x K Gram matrix into a ring buffer on the device. It copies
nothing of length P. When the ring is read, the metrics are computed on the host, in float64. Only this file defines
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antdiff._checks import as_count, as_device, as_number, as_state, as_tensor, describe, state_tensor

_LARGEST_RING = 2**30  # bytes


class Telemetry:
    """Records training steps on the device, and returns them as one row of plain numbers when it is read.

    Example::

        telemetry = Telemetry(5, window=20, share=clusters.sizes / clusters.T, device=device)
        for step, batch in enumerate(loader, 1):
            result = backward(loss_fn, batch, cluster)
            telemetry.add(result.losses, result.counts, result.weights, result.gram)
            if step % 20 == 0:
                logger.log(step, telemetry.read())   # the only synchronisation

    :meth:`add` runs four small kernels on tensors of fixed shape at fixed addresses and uses no host value. It traces
    under ``torch.compile``, and each replay of a CUDA graph records its step.

    Args:
        k: number of clusters.
        window: number of steps that the ring holds. :meth:`read` covers the steps since the last read, or the latest
            ``window`` of them if there were more. The ring takes ``8 window (k^2 + 3k)`` bytes.
        share: weight of each cluster in ``loss``, [K], usually its interval's length over T. Default: equal weights.
        device: device of the tensors passed to :meth:`add`.

    Raises:
        ValueError: k or window is below 1, or share is not [K] numbers of at least 0 with a positive sum.
    """

    def __init__(
        self,
        k: int,
        *,
        window: int,
        share: Sequence[float] | Tensor | Any | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        k, window = int(as_count("k", k)), int(as_count("window", window))
        self.k, self.window = k, window
        if 8 * window * (k * k + 3 * k) > _LARGEST_RING:
            raise ValueError(
                f"k and window must give a ring of at most {_LARGEST_RING} bytes, 8 window (k^2 + 3k); got k={k} and "
                f"window={window}. Lower the window."
            )
        device = as_device("device", device)
        self.share = torch.ones(k).double() if share is None else _share(share)  # [K]
        total = float(self.share.sum())
        if self.share.shape != (k,) or not bool((self.share >= 0).all()) or not 0 < total < math.inf:
            raise ValueError(f"share must be [K={k}] numbers of at least 0 with a positive sum; got {describe(share)}.")
        self._ring = torch.zeros(window, 3 * k + k * k, dtype=torch.float64, device=device)  # losses, counts, w, G
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)  # steps since the last read
        self._no_weights = torch.full((k,), torch.nan, dtype=torch.float64, device=device)
        self._no_gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._first = torch.zeros(k, dtype=torch.float64)  # mean loss in the first window with samples; 0 before that

    @torch.no_grad()
    def add(self, losses: Tensor, counts: Tensor, weights: Tensor | None, gram: Tensor | None = None) -> None:
        """Record one step, without a host-device sync.

        Args:
            losses: [K], mean loss of the samples of each cluster.
            counts: [K], number of samples of each cluster.
            weights: [K], the factors of the cluster gradients in the update, as returned by ``balancer.weights``. None
                for a method that chooses per parameter (GradDrop).
            gram: [K, K], Gram matrix of the gradients that the weights multiply, with zero rows for missing gradients.
                None for a step without cluster gradients.

        Raises:
            ValueError: a tensor has another shape.
        """
        weights = self._no_weights if weights is None else weights
        gram = self._no_gram if gram is None else gram
        for name, x, shape in (
            ("losses", losses, (self.k,)),
            ("counts", counts, (self.k,)),
            ("weights", weights, (self.k,)),
            ("gram", gram, (self.k, self.k)),
        ):
            as_tensor(name, x, kind="real", read=False)
            if x.device != self._ring.device:
                raise ValueError(f"{name} must be on the device of the telemetry, {self._ring.device}; got {x.device}.")
            if x.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)} for k={self.k}; got {list(x.shape)}.")
        step = torch.cat([losses, counts, weights, gram.double().flatten()])  # [3K + K^2], float64, the widest dtype
        # The cursor is on the device, since a replayed graph counts without the host.
        self._ring.index_copy_(0, self._cursor % self.window, step[None])
        self._cursor += 1

    def read(self) -> dict[str, float]:
        """Return the row of the steps since the last read, and reset the ring. This waits for the device.

        NaN stands for values that were not measured in the window: the loss of a cluster without samples, and all
        gradient metrics without a Gram matrix. Every row has the same keys, which ``docs/report.md`` explains:
        ``loss``, ``loss_i``, ``loss_ratio_i``, ``weight_i``, ``grad_norm_i``, ``update_norm``, ``conflict_rate``,
        ``cosine_i_j`` (i < j).

        Raises:
            RuntimeError: no step was added since the last read.
        """
        seen = min(int(self._cursor), self.window)
        if seen == 0:
            raise RuntimeError(
                "read() needs a step since the last read; got none. Call add(...) after each training step."
            )
        steps = self._ring[:seen].cpu()
        self._cursor.zero_()
        return self._row(*steps.split([self.k, self.k, self.k, self.k * self.k], dim=1))

    def _row(self, losses: Tensor, counts: Tensor, weights: Tensor, flat: Tensor) -> dict[str, float]:
        """Return the row of S steps, from losses, counts and weights [S, K] and Gram matrices [S, K^2]."""
        samples = counts.sum(0)  # [K]
        mean = torch.where(counts > 0, losses * counts, 0).sum(0) / samples  # [K], over samples; NaN without any
        self._first = torch.where((self._first == 0) & (samples > 0), mean, self._first)
        drawn = samples > 0
        G = flat.view(-1, self.k, self.k)  # [S, K, K]
        norms = G.diagonal(dim1=1, dim2=2).sqrt()  # [S, K]
        # A cluster without samples has a zero row, and so has every cluster in a step without a Gram matrix.
        present = norms != 0
        cosines = G / (norms[:, :, None] * norms[:, None, :])  # [S, K, K]; NaN where either gradient is missing
        i, j = torch.triu_indices(self.k, self.k, 1)  # [K (K - 1) / 2] each
        pairs = present[:, i] & present[:, j]  # [S, pairs]
        negative = (G[:, i, j] < 0) + 0 * G[:, i, j]  # [S, pairs] 0 or 1; NaN stays NaN
        conflicts = torch.where(pairs, negative, 0).sum(1) / pairs.sum(1)  # [S]; NaN without a pair
        # [S]; the square is clamped, since rounding can make it negative
        update = torch.einsum("si,sij,sj->s", weights, G, weights).clamp(min=0).sqrt()
        row: dict[str, Tensor] = {"loss": (mean[drawn] * self.share[drawn]).sum() / self.share[drawn].sum()}
        row |= _numbered("loss", mean)
        row |= _numbered("loss_ratio", mean / self._first)
        row |= _numbered("weight", weights.mean(0))
        row |= _numbered("grad_norm", _mean_where(norms, present))
        row["update_norm"] = _mean_where(update, present.any(1))
        row["conflict_rate"] = _mean_where(conflicts, pairs.any(1))
        means = _mean_where(cosines[:, i, j], pairs)
        row |= {f"cosine_{a}_{b}": value for a, b, value in zip(i.tolist(), j.tolist(), means, strict=True)}
        return {key: float(value) for key, value in row.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state with which a resumed run writes the same rows as an uninterrupted one."""
        return {"ring": self._ring.clone(), "cursor": self._cursor.clone(), "first": self._first.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of :meth:`state_dict`; raise a ValueError if it has another k or window."""
        as_state(state, "ring", "cursor", "first")
        for name in ("ring", "cursor", "first"):
            state_tensor(name, state[name])
        if state["ring"].shape != self._ring.shape:
            raise ValueError(
                f"state must have k={self.k} and window={self.window}, a ring of shape {list(self._ring.shape)}; got "
                f"{list(state['ring'].shape)}. Create the Telemetry with the k and window of the saved one."
            )
        state_tensor("cursor", state["cursor"], (1,), kind="int"), state_tensor("first", state["first"], (self.k,))
        if int(state["cursor"]) < 0:
            raise ValueError(f"state['cursor'] must be at least 0; got {int(state['cursor'])}.")
        self._ring.copy_(state["ring"])
        self._cursor.copy_(state["cursor"])
        self._first.copy_(state["first"])


def _share(share: Any) -> Tensor:
    if not isinstance(share, (Tensor, np.ndarray)):
        if not isinstance(share, (list, tuple)):
            raise TypeError(f"share must be a list of numbers or a tensor [K]; got {describe(share)}.")
        share = torch.tensor([as_number("share", x) for x in share], dtype=torch.float64)
    return as_tensor("share", torch.as_tensor(share), kind="real").detach().double().cpu()


def _numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{i}": value for i, value in enumerate(values)}


def _mean_where(values: Tensor, measured: Tensor) -> Tensor:
    """Return the mean over the steps (the first dimension) at which `measured` is True; NaN if there is none."""
    return torch.where(measured, values, 0).sum(0) / measured.sum(0)
