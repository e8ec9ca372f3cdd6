"""The processes that train together, and the errors of communication between them.

All communication of a step goes through :class:`Ranks`, so that every rank raises the same named error if one rank is
lost or has a NaN.
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
    """A loss or a gradient is NaN or infinite. Every rank raises it.

    Attributes:
        ranks: the ranks whose losses are not finite.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class LostRankError(RuntimeError):
    """A collective failed or timed out, because another rank has died or hangs."""


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
    def spans_all_processes(self) -> bool:
        """Whether the group is all of torch.distributed's processes."""
        return self.size == 1 or self.size == dist.get_world_size()

    def over_gloo(self, device: torch.device) -> bool:
        """Whether gloo sends tensors of ``device``. Its reduce_scatter is an all_reduce that discards most results."""
        return f"{device.type}:gloo" in dist.get_backend_config(self.group).split(",")

    def require_all(self) -> None:
        """Raise if each rank would train alone without the user's knowledge.

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

    def own_subgroup(self, groups: list[list[int]]) -> Ranks:
        """Make disjoint groups that cover all ranks, and return the one that contains this rank.

        Every process of the job has to call this. torch.distributed can make a group on its members alone, but it
        deadlocks if the members are in different numbers of groups already.
        """
        made = [dist.new_group(group) for group in groups]
        return Ranks(next(g for g, group in zip(made, groups, strict=True) if self.rank in group))

    # ---- collectives: asynchronous, their results are valid after wait() ---------------------------------------------

    def all_reduce(self, x: Tensor) -> Work:
        """Sum ``x`` over the ranks in place. Sends 2 rho numel(x) numbers per rank."""
        with naming_lost_ranks("all_reduce"):
            return dist.all_reduce(x, group=self.group, async_op=True)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Write piece ``rank`` of the sum of ``x [size * S]`` over the ranks to ``out [S]``. Sends rho numel(x)."""
        with naming_lost_ranks("reduce_scatter"):
            return _renamed("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=self.group, async_op=True)

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Write every rank's ``x [S]`` to ``out [size * S]``. ``x`` may be a piece of ``out``. Sends rho numel(out)."""
        with naming_lost_ranks("all_gather"):
            return _renamed("all_gather_single", "all_gather_into_tensor")(out, x, group=self.group, async_op=True)

    def all_to_all(
        self, out: Tensor, x: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """Send piece q of ``x`` to rank q, and write the piece that rank q sends to this rank to piece q of ``out``.

        Pieces have equal sizes unless ``received`` and ``sent`` are given. Sends numel(x) less the rank's own piece.
        """
        with naming_lost_ranks("all_to_all"):
            return dist.all_to_all_single(out, x, received, sent, group=self.group, async_op=True)

    def total(self, x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Sum a few numbers over the ranks, and find the ranks whose numbers are not finite, in one message.

        Args:
            x: float64 ``[n]``.
            finite: bool ``[]``, whether this rank's numbers are finite.

        Returns:
            The sum ``[n]``, and for each rank whether its numbers are finite, bool ``[size]``, on the device of ``x``.
        """
        message = x.new_zeros(len(x) + self.size)
        message[: len(x)] = x
        message[len(x) + self.rank] = (~finite).to(x.dtype)
        if self.size > 1:
            wait(self.all_reduce(message), "all_reduce")
        return message[: len(x)], message[len(x) :] == 0


def wait(work: Work, what: str) -> None:
    """Wait until a collective has ended. On CUDA the stream waits, not the host."""
    if work is not None:
        with naming_lost_ranks(what):
            work.wait()


@contextmanager
def naming_lost_ranks(what: str) -> Iterator[None]:
    """Turn the failure of a collective into a LostRankError. Errors in its arguments are not changed."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (
            isinstance(error, dist.DistError) or any(word in text.lower() for word in ("gloo", "nccl", "timed out"))
        ):
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise LostRankError(
            f"rank {rank} waited in {what} for a rank that has died or hangs. Read that rank's own message, or the "
            "first failure that torchrun reports. Under torchrun --max-restarts the job resumes from its last "
            f"checkpoint. ({text})"
        ) from error


def refuse_nonfinite(finite: Tensor, result: Tensor) -> None:
    """Raise if the numbers of a rank, or ``result``, are not finite. This reads the values, so on CUDA it waits.

    Raises:
        NonFiniteError: it names the ranks.
    """
    bad = torch.nonzero(~finite).flatten().tolist()
    if bad:
        names = f"rank {bad[0]}" if len(bad) == 1 else f"ranks {', '.join(map(str, bad))}"
        raise NonFiniteError(f"the losses of {names} are not finite. Check the batch and the weights on {names}.", bad)
    if not bool(result.isfinite().all()):
        raise NonFiniteError(
            "a gradient is not finite although the losses of every rank are, so a backward produced it. "
            "Find the op with torch.autograd.set_detect_anomaly(True).",
            [],
        )
