"""The kinds of gradients that every method that works on a Gram matrix must handle."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

RANK = 64 * 2.0**-52  # times m: eigenvalues of m correlated rows below this are rounding errors
KINDS = ["random", "conflicting", "duplicates", "opposed", "deficient", "zeros", "scaled"]
# For these kinds a positive combination of the rows can vanish, so that Nash bargaining may have no solution.
STATIONARY = ("opposed", "deficient")


def rows(kind: str, k: int, P: int = 12, seed: int = 0) -> Tensor:
    """Return J, float64 [k, P]."""
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
    """Return the Gram matrix [..., k, k], exactly symmetric."""
    G = J @ J.mT
    return (G + G.mT) / 2


def unit_rows(J: Tensor) -> Tensor:
    """Return the non-zero rows, normalised to length 1."""
    norms = J.norm(dim=1, keepdim=True)
    return (J / norms)[norms[:, 0] > 0]


def condition(rows: Tensor) -> float:
    """Return the condition of the Gram matrix of `rows` [m, P] on its range; 1 if all rows are zero."""
    values = torch.linalg.svdvals(rows) ** 2
    return float(values.max() / values[values > RANK * len(rows) * values.max()].min()) if rows.any() else 1.0


def worst_condition(J: Tensor) -> float:
    """Return 1 / the least eigenvalue among the correlation matrices of all sets of independent rows, 2^k sets."""
    rows = unit_rows(J)  # [m, P]
    m = len(rows)
    used = ((torch.arange(2**m)[:, None] >> torch.arange(m)) & 1).double()  # [2^m, m]
    padded = torch.cat(
        [rows * used[:, :, None], torch.diag_embed(1 - used)], dim=2
    )  # replace unused rows by orthonormal ones
    least = torch.linalg.svdvals(padded)[:, -1] ** 2 if m else torch.ones(1)
    return float(1 / least[least > RANK * max(m, 1)].min())


def dependent(J: Tensor) -> bool:
    """Whether a non-zero row is a linear combination of the others, up to rounding errors of the Gram matrix."""
    rows = unit_rows(J)
    return bool(torch.linalg.matrix_rank(rows, rtol=(RANK * max(1, len(rows))) ** 0.5) < len(rows))


def examples(max_k: int = 9) -> st.SearchStrategy[Tensor]:
    return st.builds(
        rows,
        st.sampled_from(KINDS),
        st.integers(1, max_k),
        st.integers(1, 20),
        st.integers(0, 2**31 - 1),
    )


# ---- matrices with a given rank and stationarity, in the kinds of TorchJD's tests ------------------------------------

# J is strongly stationary if a positive combination of its rows vanishes, and strictly weakly stationary if only a
# non-negative one does. "none" has no such combination, and "any" can be of every kind.
STATIONARITY = ("any", "strong", "weak", "none")


def with_rank(stationarity: str, m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """Return J, float64 [m, n], with singular values from 1 to 1/4. Rank 0 gives the zero matrix.

    The left singular vectors make it stationary or not. A vector that is perpendicular to all of them combines the
    rows to zero. If one of them is positive, no non-negative combination of the rows is zero.
    """
    g = torch.Generator().manual_seed(seed + 1000 * m + 10 * n + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    positive = normal(m).abs() + 0.1
    part = (torch.randperm(m, generator=g) < m // 2).double()
    first = {
        "any": torch.zeros(m, 0, dtype=torch.float64),
        "strong": positive[:, None],
        "weak": torch.stack([positive * part, positive * (1 - part)], dim=1),
        "none": positive[:, None],
    }[stationarity]  # [m, 0..2], orthogonal
    first = first / first.norm(dim=0)
    others = torch.linalg.qr(torch.cat([first, normal(m, m - first.shape[1])], dim=1))[0][:, first.shape[1] :]
    U = torch.cat([first, others], dim=1)[:, stationarity in ("strong", "weak") :]
    V = torch.linalg.qr(normal(n, n))[0]
    values = 4.0 ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    return (U[:, :rank] * values) @ V[:, :rank].T
