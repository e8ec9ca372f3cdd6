"""The processes that train together, and what may go wrong between them.

Everything that crosses a process boundary goes through :class:`Ranks`, so that a rank that is lost or holds a NaN ends
in the same named error on every other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from typing import Literal

# Strings, because a torch that was built without torch.distributed has neither class.
Group: TypeAlias = "dist.ProcessGroup | Literal['local'] | None"
Work = Any  # torch.distributed.Work, or None if the collective has ended already


def _renamed(new: str, old: str) -> Callable[..., Work]:
    """Return a function of torch.distributed that torch 2.13 has renamed; torch 2.10 to 2.12 know only the old name.

    This function can go when 2.13 is the minimum version.
    """
    return getattr(dist, new, None) or getattr(dist, old)  # type: ignore[no-any-return]


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; raised on every rank alike. ``ranks`` are those whose losses are."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class LostRankError(RuntimeError):
    """A collective failed or timed out: another rank has died, or hangs."""


class Ranks:
    """A process group, or one process alone.

    Args:
        group: a process group; None for the default group, or for one process alone if torch.distributed is not
            initialised; ``"local"`` for one process alone in any case.

    Attributes:
        rank, size: the rank of this process in the group, and the number of processes in it.

    Raises:
        TypeError, ValueError: ``group`` is something else, or a group that this process is not in.
    """

    def __init__(self, group: Group = None) -> None:
        if isinstance(group, str) and group != "local":
            raise ValueError(f"group must be a process group, None or 'local'; got {group!r}.")
        self.local = isinstance(group, str)
        if dist.is_available() and group is not None and not isinstance(group, (str, dist.ProcessGroup)):
            raise TypeError(
                "group must be a process group that this process is in, None or 'local'; got "
                f"{type(group).__name__}. Pass mesh.get_group() for a device mesh."
            )
        self.group: dist.ProcessGroup | None = None if isinstance(group, str) else group
        on = dist.is_available() and dist.is_initialized() and not self.local
        self.rank = dist.get_rank(self.group) if on else 0
        self.size = dist.get_world_size(self.group) if on else 1
        if self.rank < 0:
            raise ValueError("group must contain this process; got a group of other processes. Make it on its members.")

    @property
    def everyone(self) -> bool:
        """Whether the group is all of torch.distributed's processes."""
        return self.size == 1 or self.size == dist.get_world_size()

    def over_gloo(self, device: torch.device) -> bool:
        """Whether tensors there travel by gloo, whose reduce_scatter is an all_reduce that throws most of it away."""
        return f"{device.type}:gloo" in dist.get_backend_config(self.group).split(",")

    def require_all(self) -> None:
        """Refuse to train each rank by itself unnoticed.

        Raises:
            RuntimeError: the process group was initialised after this object was made.
        """
        if self.local or self.size > 1 or self.group is not None:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "antdiff's objects must be made after torch.distributed.init_process_group, or with group='local'; "
                "this one was made before it. Move its construction, or pass group='local' to train each rank alone."
            )

    def mine_of(self, groups: list[list[int]]) -> Ranks:
        """Of disjoint groups of ranks that cover all, the one that has this rank. Every process of the job has to call:
        torch.distributed can let the members alone make a group, but deadlocks where they are in unequal numbers of
        groups already."""
        made = [dist.new_group(group) for group in groups]
        return Ranks(next(g for g, group in zip(made, groups, strict=True) if self.rank in group))

    # ---- collectives: asynchronous, the result is there after wait() -------------------------------------------------

    def all_reduce(self, x: Tensor) -> Work:
        """Sums ``x`` over the ranks, in place. Sends 2 rho numel(x)."""
        with answering("all_reduce"):
            return dist.all_reduce(x, group=self.group, async_op=True)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """``out`` [S]: piece ``rank`` of the sum of ``x [size * S]`` over the ranks. Sends rho numel(x)."""
        with answering("reduce_scatter"):
            return _renamed("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=self.group, async_op=True)

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """``out [size * S]``: every rank's ``x [S]``, which may be its own piece of ``out``. Sends rho numel(out)."""
        with answering("all_gather"):
            return _renamed("all_gather_single", "all_gather_into_tensor")(out, x, group=self.group, async_op=True)

    def all_to_all(
        self, out: Tensor, x: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """Piece q of ``x`` to rank q, whose piece for this rank becomes piece q of ``out``; pieces are equal unless
        sizes are given. Sends numel(x) less the own piece."""
        with answering("all_to_all"):
            return dist.all_to_all_single(out, x, received, sent, group=self.group, async_op=True)

    def total(self, x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Sums a few numbers over the ranks, and tells who is in trouble in the same message.

        Args:
            x: float64 ``[n]``.
            finite: bool, whether this rank's part is sound.

        Returns:
            The sum ``[n]``, and for each rank whether its part is sound, bool ``[size]``, both on the device of x.
        """
        message = x.new_zeros(len(x) + self.size)
        message[: len(x)] = x
        message[len(x) + self.rank] = (~finite).to(x.dtype)
        if self.size > 1:
            wait(self.all_reduce(message), "all_reduce")
        return message[: len(x)], message[len(x) :] == 0


def wait(work: Work, what: str) -> None:
    """Until a collective has ended; on CUDA the stream waits, not the host."""
    if work is not None:
        with answering(what):
            work.wait()


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Names the failure of a collective; an error in its arguments passes through as it is."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (
            isinstance(error, dist.DistError) or any(word in text.lower() for word in ("gloo", "nccl", "timed out"))
        ):
            raise
        me = dist.get_rank() if dist.is_initialized() else 0
        raise LostRankError(
            f"rank {me} waited in {what} for a rank that has died or hangs; its own message, or torchrun's report of "
            "the first failure, says why. Under torchrun --max-restarts the job goes on from its last checkpoint. "
            f"({text})"
        ) from error


def refuse_nonfinite(sound: Tensor, result: Tensor) -> None:
    """Raises where a rank is unsound or the result [...] is not finite. Reads the values: on CUDA it waits.

    Raises:
        NonFiniteError: naming the ranks.
    """
    bad = torch.nonzero(~sound).flatten().tolist()
    if bad:
        who = f"rank {bad[0]}" if len(bad) == 1 else f"ranks {', '.join(map(str, bad))}"
        raise NonFiniteError(f"the losses of {who} are not finite: look at the batch and the weights there.", bad)
    if not bool(result.isfinite().all()):
        raise NonFiniteError(
            "a gradient is not finite although every rank's losses are: a backward made it. "
            "torch.autograd.set_detect_anomaly(True) finds where.",
            [],
        )
