"""GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020): each parameter uses the gradients of one sign only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from antdiff._checks import as_tensor, describe
from antdiff.balancing.base import About, Needs
from antdiff.balancing.random import Draws
from antdiff.distributed.shards import place_of


class GradDrop:
    """For each parameter, the sum of its positive gradients or the sum of its negative ones, divided by k.

    The positive sum is taken with probability ``positive / (positive + |negative|)``. The paper does not divide by k.

    This is the only method that K weights cannot express. It is a :class:`DirectionBalancer`: it has no weights, and
    ``direction(rows)`` takes the K cluster gradients.

    Under FSDP2, where ``jacobian.rows`` are shards, every rank draws the numbers of each whole parameter and uses those
    of its shard. The direction is then that of one process, and the generators of all ranks stay alike. It takes the
    memory of one whole parameter.

    Args:
        generator, seed: Draw the signs, as in :class:`PCGrad`.
    """

    name: ClassVar[str] = "graddrop"
    needs: ClassVar[Needs] = "rows"
    about: ClassVar[About] = About(
        title="GradDrop",
        paper="Chen et al., NeurIPS 2020",
        solves="for each parameter, draws a sign with a probability proportional to the sum of its gradients of that "
        "sign, and takes this sum, divided by K",
        when="conflicts are in single parameters; the method adds noise",
        published="The published direction is the sum over the clusters, K times this one. LibMTL restricts the "
        "method to gradients of a shared representation; here it acts on the gradients of all "
        "parameters. The paper's leaks are not offered: with its default, no leak, the method is this "
        "one.",
        torchjd="The sum, with a leak and a function of the probability.",
    )

    def __init__(self, *, generator: torch.Generator | None = None, seed: int = 0) -> None:
        self._draws = Draws(generator, seed)

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the signs; None if the object creates its own and has not drawn yet."""
        return self._draws.generator

    @overload
    def direction(self, rows: Tensor, /) -> Tensor: ...
    @overload
    def direction(self, rows: Sequence[Tensor | None], /) -> list[Tensor | None]: ...
    def direction(self, rows: Tensor | Sequence[Tensor | None], /) -> Tensor | list[Tensor | None]:
        """Return the update direction.

        Args:
            rows: Gradients ``[k, *shape]``, or a list with one such tensor (or None) per parameter.

        Returns:
            A tensor ``[*shape]`` in the dtype of ``rows``, or float32 for half precision. For a list, a list of such
            tensors, with None where ``rows`` has None. NaN or infinity in a gradient gives NaN.
        """
        if isinstance(rows, Tensor):
            return self._one(rows)
        if not isinstance(rows, (list, tuple)):
            raise TypeError(
                f"rows must be a floating-point tensor [k, *shape] or a list of such tensors; got {describe(rows)}. "
                "Pass the cluster gradients."
            )
        for i, x in enumerate(rows):
            if x is not None:
                self._check(x, "rows" if len(rows) == 1 else f"rows[{i}]")
        return [None if x is None else self._one(x) for x in rows]

    @staticmethod
    def _check(x: Any, name: str) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.dim() == 0 or len(x) == 0:
            raise TypeError(
                f"{name} must be a floating-point tensor [k, *shape] or a list of such tensors; got {describe(x)}. "
                "Pass the cluster gradients."
            )
        as_tensor(name, x)

    def _one(self, x: Tensor) -> Tensor:
        self._check(x, "rows")
        place, x = place_of(x), x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        positive, negative = x.clamp(min=0).sum(0), x.clamp(max=0).sum(0)  # [*shape]
        shape = positive.shape if place is None else place.shape
        draw = torch.rand(shape, dtype=x.dtype, device=x.device, generator=self._draws.on(x.device))
        draw = draw if place is None else draw[place.slices]
        chosen = torch.where(draw * (positive - negative) < positive, positive, negative)
        # The zero term turns the result into NaN if the sum that was not drawn is infinite.
        return (chosen + 0 * (positive + negative)) / len(x)

    def reset(self) -> None:
        """Return to the seed. A caller's generator is not changed."""
        self._draws.reset()

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
