"""Gradients of every kind that a method which works on their Gram matrix must survive."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ["random", "conflicting", "duplicates", "opposed", "deficient", "zeros", "scaled"]
# Where some positive combination of the rows can vanish, so that Nash bargaining may have no solution.
STATIONARY = ("opposed", "deficient")


def rows(kind: str, k: int, P: int = 12, seed: int = 0) -> Tensor:
    """J float64 [k, P]."""
    g = torch.Generator().manual_seed(seed + 1000 * k + P)
    J = torch.randn(k, P, generator=g, dtype=torch.float64)
    sign = 1.0 - 2 * (torch.arange(k) % 2)[:, None]
    if kind == "conflicting":
        J += 2 * sign * torch.randn(P, generator=g, dtype=torch.float64)
    elif kind == "duplicates":
        J = J[torch.arange(k) // 2]
    elif kind == "opposed":
        J = J[torch.arange(k) // 2 * 2 % max(k - 1, 1)] * (sign * 2**0.5)
    elif kind == "deficient":
        J[:, 2:] = 0
    elif kind == "zeros":
        J[::2] = 0
    elif kind == "scaled":
        J *= 10.0 ** torch.randint(-15, 16, (k, 1), generator=g)
    return J


def gram(J: Tensor) -> Tensor:
    """Exactly symmetric [k, k]."""
    G = J @ J.mT
    return (G + G.mT) / 2


def examples(max_k: int = 9) -> st.SearchStrategy[Tensor]:
    return st.builds(
        rows,
        st.sampled_from(KINDS),
        st.integers(1, max_k),
        st.integers(1, 20),
        st.integers(0, 2**31 - 1),
    )
