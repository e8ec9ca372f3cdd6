"""What each cluster does while it trains: losses, gradient lengths, cosines, conflicts, weights, for no wait a step.

A step copies its K losses, counts and weights and its K x K Gram matrix into a ring on the device, nothing of length P.
What they mean is worked out on the host, in float64, when the ring is read: the one place with definitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Telemetry:
    """Records training steps on the device and reads them as one row of plain numbers.

    Example::

        telemetry = Telemetry(5, window=20, share=clusters.sizes / clusters.T, device=device)
        for step, batch in enumerate(loader, 1):
            result = backward(loss_fn, batch, cluster)
            telemetry.add(result.losses, result.counts, result.weights, result.gram)
            if step % 20 == 0:
                logger.log(step, telemetry.read())   # the only synchronisation

    :meth:`add` is four small kernels on tensors of fixed shape at fixed addresses, with no number of the host among
    them: it traces under ``torch.compile``, and each replay of a CUDA graph records its step.

    Args:
        k: the number of clusters.
        window: how many steps there are room for. :meth:`read` covers the steps since the last read, the latest
            ``window`` of them if there were more. Takes ``8 window (k^2 + 3k)`` bytes.
        share: what part each cluster has in ``loss``, [K]: its interval's length over T. Default: equal parts.
        device: of the tensors that :meth:`add` is given.

    Raises:
        ValueError: k or window below 1, or a share that is not [K] numbers of at least 0 with a positive sum.
    """

    def __init__(
        self,
        k: int,
        *,
        window: int,
        share: Sequence[float] | Tensor | Any | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("k", k), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.k, self.window = k, window
        self.share = torch.ones(k).double() if share is None else torch.as_tensor(share).double().cpu()  # [K]
        if self.share.shape != (k,) or not bool((self.share >= 0).all()) or not float(self.share.sum()) > 0:
            raise ValueError(f"share must be [K={k}] numbers of at least 0 with a positive sum; got {share}.")
        self._ring = torch.zeros(window, 3 * k + k * k, dtype=torch.float64, device=device)  # losses, counts, w, G
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)  # steps since the last read
        self._no_gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._first = torch.zeros(k, dtype=torch.float64)  # mean loss in the first window with samples; 0: none yet

    @torch.no_grad()
    def add(self, losses: Tensor, counts: Tensor, weights: Tensor, gram: Tensor | None = None) -> None:
        """Take in one step. Waits for nothing.

        Args:
            losses: [K], the mean loss of each cluster's samples.
            counts: [K], their numbers; 0 where there were none.
            weights: [K], as they multiply the clusters' gradients in the update (a "sum" method's over K).
            gram: [K, K], of the gradients that the weights multiply; zero rows where there was none. None on a step
                that took no cluster gradients.

        Raises:
            ValueError: a tensor of another shape.
        """
        gram = self._no_gram if gram is None else gram
        for name, x, shape in (
            ("losses", losses, (self.k,)),
            ("counts", counts, (self.k,)),
            ("weights", weights, (self.k,)),
            ("gram", gram, (self.k, self.k)),
        ):
            if x.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)} for k={self.k}; got {list(x.shape)}.")
        step = torch.cat([losses, counts, weights, gram.double().flatten()])  # [3K + K^2], float64 as its widest part
        # A cursor on the device, since a replayed graph counts without the host.
        self._ring.index_copy_(0, self._cursor % self.window, step[None])
        self._cursor += 1

    def read(self) -> dict[str, float]:
        """The row of the steps since the last read; waits for the device, and starts again.

        NaN stands for what was not measured in the window: the loss of a cluster without samples, everything about
        gradients where there was no Gram matrix. Every row has the same keys, which ``docs/report.md`` explains:
        ``loss``, ``loss_i``, ``loss_ratio_i``, ``weight_i``, ``grad_norm_i``, ``update_norm``, ``conflict_rate``,
        ``cosine_i_j`` (i < j).

        Raises:
            RuntimeError: no step was added since the last read.
        """
        seen = min(int(self._cursor), self.window)
        if seen == 0:
            raise RuntimeError("read() needs a step: call add(losses, counts, weights, gram) after each step first.")
        steps = self._ring[:seen].cpu()
        self._cursor.zero_()
        return self._row(*steps.split([self.k, self.k, self.k, self.k * self.k], dim=1))

    def _row(self, losses: Tensor, counts: Tensor, weights: Tensor, flat: Tensor) -> dict[str, float]:
        """losses, counts, weights [S, K] and Gram matrices [S, K^2] of S steps -> their row."""
        samples = counts.sum(0)  # [K]
        mean = torch.where(counts > 0, losses * counts, 0).sum(0) / samples  # [K], over samples; NaN without any
        self._first = torch.where((self._first == 0) & (samples > 0), mean, self._first)
        drawn = samples > 0
        G = flat.view(-1, self.k, self.k)  # [S, K, K]
        norms = G.diagonal(dim1=1, dim2=2).sqrt()  # [S, K]
        there = norms != 0  # a cluster without samples has a zero row, and so has a step without Gram matrix
        cosines = G / (norms[:, :, None] * norms[:, None, :])  # [S, K, K]; NaN where either gradient is missing
        i, j = torch.triu_indices(self.k, self.k, 1)  # [K (K - 1) / 2] each
        pairs = there[:, i] & there[:, j]  # [S, pairs]
        negative = (G[:, i, j] < 0) + 0 * G[:, i, j]  # [S, pairs] 0 or 1; NaN stays NaN
        conflicts = torch.where(pairs, negative, 0).sum(1) / pairs.sum(1)  # [S]; NaN without a pair
        update = torch.einsum("si,sij,sj->s", weights, G, weights).clamp(min=0).sqrt()  # [S]; rounding may pass below 0
        row: dict[str, Tensor] = {"loss": (mean[drawn] * self.share[drawn]).sum() / self.share[drawn].sum()}
        row |= _numbered("loss", mean)
        row |= _numbered("loss_ratio", mean / self._first)
        row |= _numbered("weight", weights.mean(0))
        row |= _numbered("grad_norm", _mean_where(norms, there))
        row["update_norm"] = _mean_where(update, there.any(1))
        row["conflict_rate"] = _mean_where(conflicts, pairs.any(1))
        means = _mean_where(cosines[:, i, j], pairs)
        row |= {f"cosine_{a}_{b}": value for a, b, value in zip(i.tolist(), j.tolist(), means, strict=True)}
        return {key: float(value) for key, value in row.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to write the rows it would have written."""
        return {"ring": self._ring.clone(), "cursor": self._cursor.clone(), "first": self._first.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned. A ValueError if it is of another k or window."""
        if state["ring"].shape != self._ring.shape:
            raise ValueError(
                f"state must be of k={self.k} and window={self.window}, a ring {list(self._ring.shape)}; got "
                f"{list(state['ring'].shape)}."
            )
        self._ring.copy_(state["ring"])
        self._cursor.copy_(state["cursor"])
        self._first.copy_(state["first"])


def _numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{i}": value for i, value in enumerate(values)}


def _mean_where(values: Tensor, there: Tensor) -> Tensor:
    """Mean over the steps, the first dimension, at which `there`; NaN where there is none."""
    return torch.where(there, values, 0).sum(0) / there.sum(0)
