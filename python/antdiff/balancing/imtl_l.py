"""IMTL-L (Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021): a learned scale for each loss."""

from __future__ import annotations

from antdiff.balancing.base import About
from antdiff.balancing.uncertainty import UncertaintyWeighting


class IMTLL(UncertaintyWeighting):
    """The loss ``sum_i (exp(s_i) losses_i / K - s_i)`` with learnable s, initialised to zero.

    At the optimum ``exp(s_i) losses_i = K``, so all scaled losses are equal. With -s in place of s, this is twice the
    loss of uncertainty weighting. The parameter is therefore stored as ``log_variance = -s``, and the arguments and
    the usage are those of :class:`UncertaintyWeighting`.
    """

    name = "imtl_l"
    about = About(
        title="IMTL-L",
        paper="Liu et al., ICLR 2021",
        solves="learns a scale per loss that makes all scaled losses equal",
        when="in place of uncertainty weighting; its loss is twice as large",
        published="The paper's loss, sum exp(s) loss - s, is not divided by K; s then shifts by log K.",
        torchjd="As in the paper.",
    )
    factor = 1.0
