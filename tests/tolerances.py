"""Every tolerance of the tests, each with its derivation. u is the unit roundoff: half the gap between 1 and its
successor (float64 1.1e-16, float32 6.0e-8, bfloat16 3.9e-3, float16 4.9e-4)."""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def rounded(dtype: torch.dtype) -> float:
    """A result computed in at least float32 from exact inputs and rounded once to ``dtype``: u of dtype, plus about ten
    roundings of the arithmetic type in between (a difference, a square, a scale), so 8 u for float32 and float64, and
    2 u for half precision, where the arithmetic in float32 is exact by comparison."""
    u = UNIT_ROUNDOFF[dtype]
    return 8 * u if dtype in (torch.float32, torch.float64) else 2 * u


def summed(dtype: torch.dtype) -> float:
    """A sum of same-signed terms accumulated in chains of at most 1024 in the arithmetic type (float32 for half
    precision), float64 beyond: pairwise independent roundings grow like sqrt(1024) u = 32 u; 64 u leaves room for the
    two roundings of each term."""
    return 64 * UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def smallest(dtype: torch.dtype) -> float:
    """Absolute slack where a value rounded to ``dtype`` may be subnormal and loses relative accuracy: half a step of
    the subnormals. Zero for the other dtypes, whose subnormals no test reaches."""
    return 2.0**-25 if dtype == torch.float16 else 0.0


def gram(dtype: torch.dtype) -> float:
    """An entry of G relative to |g_i| |g_j| (an inner product may cancel, so not relative to itself). Products and
    chains of at most 256 in the arithmetic type, float64 beyond. A rounding error of a chain's partial sum is at most u
    times that sum, whose size the Cauchy-Schwarz inequality bounds by the chain's share of |g_i| |g_j|; independent
    errors add up like sqrt(256) u = 16 u within a chain and average out between chains. 32 u leaves a factor of two."""
    return 32 * UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def combined(dtype: torch.dtype, out: torch.dtype, k: int) -> float:
    """An element of w^T J relative to sum_k |w_k J_kp| (the sum may cancel): k products and k sums in the arithmetic
    type, each off by u at most, one rounding of each weight, and one of the result to the dtype of ``out``."""
    u = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return (2 * k + 1) * u + UNIT_ROUNDOFF[out]


def prefix_summed(T: int) -> float:
    """A cost made of differences of float64 prefix sums over T points, relative to the sum of all |terms|: each prefix
    sum carries at most T u, a cost takes up to four of them, and values on the grid of the exact sums are off by up to
    4 T u each: 8 T u."""
    return 8 * T * UNIT_ROUNDOFF[torch.float64]


def projected(k: int) -> float:
    """PCGrad's direction, or a coefficient in unit rows, relative to sum_i |g_i|, in float64 on both sides. Each of the
    k - 1 projections of a row takes an inner product off by at most its length times u, and no projection lengthens
    p_i, so a row is off by k times (dimension) u; 1000 u covers dimensions up to the tests' 100 and both sides."""
    return 1000 * k * UNIT_ROUNDOFF[torch.float64]


# |a_i (G a)_i - 1| at which Newton stops.
NASH_RESIDUAL = 1e-12


def nash(condition: float) -> float:
    """A Nash weight relative to itself. The rounding of G and of G a, some u each, enters through the inverse of
    I + B C B (B, C: weights and correlations), so at most times the condition number of C; the residual at which the
    solver stops likewise. 16 for the constants."""
    return 16 * (NASH_RESIDUAL + 16 * UNIT_ROUNDOFF[torch.float64]) * condition


# Clarabel stops at a duality gap of 1e-8. The objective is strongly convex with modulus 1 in log weights, so a gap of e
# moves a weight by sqrt(2 e) relative: 1.5e-4. A factor of three for its feasibility tolerance.
CLARABEL = 5e-4


def minimiser(k: int, condition: float) -> float:
    """The minimiser of a convex quadratic of the direction over rows g_i (UPGrad, DualProj, MGDA, CAGrad, FairGrad), or
    its product with a unit row, relative to its longest term w_i |g_i|. Each of up to k terms carries some roundings,
    its product in G and those of the triangular solves: 16 u, and 32 u for two solutions that are compared. Rounding of
    the system enters through its inverse, at most ``condition``: that of the worst set of independent rows, since the
    rows in use are one such set whatever the data (and a diagonal added to the system, as FairGrad's barrier is, makes
    it no worse). However bad that is, the objective is right to rounding and strongly convex with modulus 1 in the
    direction: a gap of e moves it by sqrt(2 e)."""
    e = 32 * k * UNIT_ROUNDOFF[torch.float64]
    return min(e * condition, (2 * e) ** 0.5)


# CAGrad ends its search for the one unknown when |d - g_0| is within 1e-13 of c |g_0|, on both sides.
CAGRAD_SEARCH = 2e-13


# |(G w)_i w_i^(1/alpha) - 1| at which FairGrad's iteration stops. The Hessian of its objective in relative steps of w
# is at least 1/alpha, so the weights are off by at most alpha times that.
FAIRGRAD_RESIDUAL = 1e-12


def aligned(k: int, condition: float) -> float:
    """Aligned-MTL's direction relative to its length: G is right to k roundings of its largest eigenvalue, and the
    inverse root of the least one that is not zero has its relative error, so times the condition of G on its range."""
    return 32 * k * UNIT_ROUNDOFF[torch.float64] * condition


def equal_cosines(k: int, condition: float, *, dependent: bool) -> float:
    """C^+ 1 relative to its longest term, C the correlations: rounding of C times the ``condition`` of C on its range.
    Where rows depend on each other, rounding tilts that range, and a pseudo-inverse takes the condition's square."""
    return 32 * k * UNIT_ROUNDOFF[torch.float64] * (condition**2 if dependent else condition)


def power(log: float) -> float:
    """x^e relative to itself, for |log x^e| up to ``log``: a rounding of the exponent moves it by log u, on both sides,
    and each side takes a few roundings more."""
    return (2 * log + 16) * UNIT_ROUNDOFF[torch.float64]


def vanishing(k: int) -> float:
    """GradVac's direction relative to sum_i |g_i|: it knows |p_i|^2 to 128 k u of the terms it is the difference of,
    and lets be what is below; so each p_i may keep the root of that."""
    return (128 * k * UNIT_ROUNDOFF[torch.float64]) ** 0.5


# K shares made of logarithms of losses up to 1e20, whose logarithm of 46 is right to 46 u; ten of these meet in a mean,
# a softmax and a quotient.
LOG_SHARES = 10 * 46 * UNIT_ROUNDOFF[torch.float64]

# A scalar that Adam has brought to rest in float32: its steps vanish with the gradient, whose own roundings, some u
# relative to its terms, are what is left.
ADAM_AT_REST = 16 * UNIT_ROUNDOFF[torch.float32]

# Clarabel's gap and feasibility tolerances of 1e-8 move a minimiser by their square root, and a few times that.
CONIC_SOLVER = 5e-4
