"""IMTL-L (Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021): a learned scale for each loss."""

from __future__ import annotations

from antdiff.balancing.base import About
from antdiff.balancing.uncertainty import UncertaintyWeighting


class IMTLL(UncertaintyWeighting):
    """``loss = sum_i (exp(s_i) losses_i / K - s_i)`` with learnable s, zero at the start.

    At the optimum ``exp(s_i) losses_i = K``: every scaled loss is the same. With -s for s it is twice the loss of
    uncertainty weighting, and is kept so, as ``log_variance``; arguments and use are the same.
    """

    name = "imtl_l"
    about = About(
        title="IMTL-L",
        paper="Liu et al., ICLR 2021",
        solves="learns a scale for each loss that makes all of them equal",
        when="as uncertainty weighting, of which it is twice the loss",
    )
    factor = 1.0
