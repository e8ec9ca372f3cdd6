"""GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020): each parameter follows the clusters of one sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from antdiff.balancing.base import About, Needs
from antdiff.balancing.random import Draws


class GradDrop:
    """For each parameter, the sum of its positive gradients with probability ``positive / (positive + |negative|)``,
    else of its negative ones.

    The only method that K weights cannot express: it needs the gradients, ``direction(J)``, and takes no Gram matrix.

    Args:
        generator, seed: draw the signs, as in :class:`PCGrad`.
    """

    name: ClassVar[str] = "graddrop"
    needs: ClassVar[Needs] = "J"
    scale: ClassVar[Literal["sum", "mean"]] = "sum"
    about: ClassVar[About] = About(
        title="GradDrop",
        paper="Chen et al., NeurIPS 2020",
        solves="for each parameter, draws a sign by the gradients' mass and sums the gradients of that sign",
        when="conflicts lie in single parameters; adds noise",
    )

    def __init__(self, *, generator: torch.Generator | None = None, seed: int = 0) -> None:
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """What draws the signs; None before the first draw of an own one."""
        return self._draws.generator

    @overload
    def direction(self, J: Tensor) -> Tensor: ...
    @overload
    def direction(self, J: Sequence[Tensor | None]) -> list[Tensor | None]: ...
    def direction(self, J: Tensor | Sequence[Tensor | None]) -> Tensor | list[Tensor | None]:
        """The direction ``[*shape]`` of J ``[k, *shape]``, in the dtype of J, or float32 for half precision; of a list
        of such tensors the list, with None where it has None. NaN and Inf in J give NaN."""
        if isinstance(J, Tensor):
            return self._one(J)
        return [None if x is None else self._one(x) for x in J]

    def _one(self, J: Tensor) -> Tensor:
        if not isinstance(J, Tensor) or not J.is_floating_point() or J.dim() == 0:
            raise TypeError(
                f"J must be a floating-point tensor [k, *shape], or a list of such; got {type(J).__name__}."
            )
        J = J.detach()
        J = J.float() if J.dtype in (torch.float16, torch.bfloat16) else J
        positive, negative = J.clamp(min=0).sum(0), J.clamp(max=0).sum(0)  # [*shape]
        draw = torch.rand(positive.shape, dtype=J.dtype, device=J.device, generator=self._draws.on(J.device))
        chosen = torch.where(draw * (positive - negative) < positive, positive, negative)
        return chosen + 0 * (positive + negative)  # an infinite sum that was not drawn must show too

    def weights(self, _x: Tensor, /) -> Tensor:
        raise TypeError("graddrop has no weights: it chooses for each parameter. Call direction(J).")

    def reset(self) -> None:
        """Back to the seed."""
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
