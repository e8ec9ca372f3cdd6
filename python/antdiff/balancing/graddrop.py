"""GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020): each parameter follows the clusters of one sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from antdiff.balancing.base import About, Needs
from antdiff.balancing.random import Draws


class GradDrop:
    """For each parameter, the sum of its positive gradients with probability ``positive / (positive + |negative|)``,
    else of its negative ones; divided by k (the paper does not divide).

    The only method that K weights cannot express. It is a :class:`DirectionBalancer`: ``direction(rows)`` takes the K
    cluster gradients, and there are no weights.

    Args:
        generator, seed: draw the signs, as in :class:`PCGrad`.
    """

    name: ClassVar[str] = "graddrop"
    needs: ClassVar[Needs] = "rows"
    about: ClassVar[About] = About(
        title="GradDrop",
        paper="Chen et al., NeurIPS 2020",
        solves="for each parameter, draws a sign by the gradients' mass and sums the gradients of that sign, over K",
        when="conflicts lie in single parameters; adds noise",
    )

    def __init__(self, *, generator: torch.Generator | None = None, seed: int = 0) -> None:
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """What draws the signs; None before the first draw of an own one."""
        return self._draws.generator

    @overload
    def direction(self, rows: Tensor, /) -> Tensor: ...
    @overload
    def direction(self, rows: Sequence[Tensor | None], /) -> list[Tensor | None]: ...
    def direction(self, rows: Tensor | Sequence[Tensor | None], /) -> Tensor | list[Tensor | None]:
        """The direction ``[*shape]`` of the gradients ``[k, *shape]``, in their dtype, or float32 for half precision;
        of a list of such tensors the list, with None where it has None. NaN and Inf in a gradient give NaN."""
        if isinstance(rows, Tensor):
            return self._one(rows)
        return [None if x is None else self._one(x) for x in rows]

    def _one(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            raise TypeError(
                f"rows must be a floating-point tensor [k, *shape], or a list of such; got {type(x).__name__}."
            )
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        positive, negative = x.clamp(min=0).sum(0), x.clamp(max=0).sum(0)  # [*shape]
        draw = torch.rand(positive.shape, dtype=x.dtype, device=x.device, generator=self._draws.on(x.device))
        chosen = torch.where(draw * (positive - negative) < positive, positive, negative)
        return (chosen + 0 * (positive + negative)) / len(x)  # an infinite sum that was not drawn must show too

    def reset(self) -> None:
        """Back to the seed."""
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
