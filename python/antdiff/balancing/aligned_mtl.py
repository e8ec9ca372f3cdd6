"""Aligned-MTL (Senushkin et al., CVPR 2023): the mean gradient of a system of gradients with condition number 1."""

from __future__ import annotations

from torch import Tensor

from antdiff.balancing.base import About, SummedBalancer
from antdiff.ops import gram_weights


class AlignedMTL(SummedBalancer):
    """Weights of the mean of the rows of J after all its non-zero singular values are set to the smallest of them.

    A singular value counts as zero if its square is at most k r times the largest squared one, where r is the relative
    rounding error of the Gram matrix: 2.2e-16 for gradients in float64, 4.8e-7 in float32. The weights are
    discontinuous at this threshold.

    See :func:`antdiff.ops.gram_weights`. The arguments are those of :class:`SummedBalancer`.
    """

    name = "aligned_mtl"
    about = About(
        title="Aligned-MTL",
        paper="Senushkin et al., CVPR 2023",
        solves="the mean of the gradients after all singular values of J are set to the smallest one",
        when="gradients differ much in length and are nearly linearly dependent",
        published="The authors' code and LibMTL take the sum of the aligned gradients, which is K times the mean. "
        "Their other choices of the common singular value, the median and the mean, are not offered: the "
        "paper's method is the smallest.",
        torchjd="The mean, as here. It offers the median and the mean of the singular values.",
        options=(("reduction", "sum"),),
    )

    def solve(self, gram: Tensor) -> Tensor:
        return gram_weights(gram, "aligned_mtl", reduction=self.reduction, nonfinite=self.nonfinite)
