"""Aligned-MTL (Senushkin et al., CVPR 2023): the mean gradient of a system of gradients with condition number 1."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, GramBalancer
from antdiff.ops import gram_weights


class AlignedMTL(GramBalancer):
    """Weights of the mean of the rows of J with its non-zero singular values set to the smallest one.

    Which singular values count as zero is a jump: below ``k * 2.2e-16`` of the largest, squared.

    See :func:`antdiff.ops.gram_weights`; the arguments are those of :class:`GramBalancer`.
    """

    name = "aligned_mtl"
    about = About(
        title="Aligned-MTL",
        paper="Senushkin et al., CVPR 2023",
        solves="the mean after all singular values of J are made equal to the least",
        when="gradients differ much in length and are nearly dependent",
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "aligned_mtl", nonfinite=self.nonfinite)
