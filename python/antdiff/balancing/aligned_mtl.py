"""Aligned-MTL (Senushkin et al., CVPR 2023): the mean gradient of a system of gradients with condition number 1."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class AlignedMTL(GramBalancer):
    """Weights of the mean of the rows of J after all its non-zero singular values are set to the smallest of them.

    A singular value counts as zero if its square is below ``k * 2.2e-16`` of the largest squared one. The weights are
    discontinuous at this threshold.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`GramBalancer`.
    """

    name = "aligned_mtl"
    about = About(
        title="Aligned-MTL",
        paper="Senushkin et al., CVPR 2023",
        solves="the mean of the gradients after all singular values of J are set to the smallest one",
        when="gradients differ much in length and are nearly linearly dependent",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "aligned_mtl", nonfinite=self.nonfinite)
