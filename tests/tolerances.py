"""All tolerances of the tests, each with its derivation.

u is the unit roundoff, half the gap between 1 and the next larger number: float64 1.1e-16, float32 6.0e-8, bfloat16
3.9e-3, float16 4.9e-4.
"""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def rounded(dtype: torch.dtype) -> float:
    """Tolerance of a result that is computed in at least float32 from exact inputs and rounded once to ``dtype``.

    There is one rounding to dtype, and about ten roundings in the arithmetic type before it (a difference, a square, a
    scale). This gives 8 u for float32 and float64, and 2 u for half precision, for which float32 arithmetic is exact by
    comparison.
    """
    u = UNIT_ROUNDOFF[dtype]
    return 8 * u if dtype in (torch.float32, torch.float64) else 2 * u


def summed(dtype: torch.dtype) -> float:
    """Relative tolerance of a sum of terms with the same sign.

    It is accumulated in chains of at most 1024 in the arithmetic type (float32 for half precision), and in float64
    beyond. Pairwise independent roundings grow like sqrt(1024) u = 32 u; 64 u leaves room for the two roundings of each
    term.
    """
    return 64 * UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def smallest(dtype: torch.dtype) -> float:
    """Absolute tolerance for values that may be subnormal in ``dtype`` and therefore lose relative accuracy.

    For float16 it is half the spacing of the subnormals. It is zero for the other dtypes, because no test reaches their
    subnormals.
    """
    return 2.0**-25 if dtype == torch.float16 else 0.0


def gram(dtype: torch.dtype) -> float:
    """Tolerance of an entry of G, relative to |g_i| |g_j|. It is not relative to the entry, since that may cancel.

    Products and chains of at most 256 are computed in the arithmetic type, and float64 is used beyond. The rounding
    error of a partial sum of a chain is at most u times that sum. By the Cauchy-Schwarz inequality, the sum is at most
    the chain's share of |g_i| |g_j|. Independent errors add up like sqrt(256) u = 16 u within a chain and average out
    between chains. 32 u leaves a factor of two.
    """
    return 32 * UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def combined(dtype: torch.dtype, out: torch.dtype, k: int) -> float:
    """Tolerance of an element of w^T J, relative to sum_k |w_k J_kp|, since the sum itself may cancel.

    There are k products and k sums in the arithmetic type, each with a relative error of at most u, one rounding of
    each weight, and one rounding of the result to the dtype of ``out``.
    """
    u = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return (2 * k + 1) * u + UNIT_ROUNDOFF[out]


def prefix_summed(T: int) -> float:
    """Tolerance of a cost that is made of differences of float64 prefix sums over T points.

    It is relative to the sum of all |terms|. Each prefix sum has an error of at most T u, and a cost uses up to four of
    them. Values on the grid of the exact sums are off by up to 4 T u each. Together this gives 8 T u.
    """
    return 8 * T * UNIT_ROUNDOFF[torch.float64]


def projected(k: int) -> float:
    """Tolerance of PCGrad's direction, or of a coefficient for unit rows, relative to sum_i |g_i|, in float64.

    Each of the k - 1 projections of a row uses an inner product whose error is at most its length times u. No
    projection lengthens p_i, so a row has an error of k times (dimension) u. 1000 u covers the dimensions of the tests,
    up to 100, and the errors of both results.
    """
    return 1000 * k * UNIT_ROUNDOFF[torch.float64]


# Newton's method stops at this |a_i (G a)_i - 1|.
NASH_RESIDUAL = 1e-12


def nash(condition: float) -> float:
    """Relative tolerance of a Nash weight.

    The rounding errors of G and of G a, some u each, are amplified by the inverse of I + B C B, where B are the weights
    and C the correlations. The amplification is at most the condition number of C. The same holds for the residual at
    which the solver stops. The factor 16 covers the constants.
    """
    return 16 * (NASH_RESIDUAL + 16 * UNIT_ROUNDOFF[torch.float64]) * condition


# Relative tolerance of a Nash weight from Clarabel, which stops at a duality gap of 1e-8. The objective is strongly
# convex with modulus 1 in the log weights, so a gap of e moves a weight by sqrt(2 e) = 1.5e-4 relative to itself. A
# factor of three is left for the feasibility tolerance.
CLARABEL = 5e-4


def minimiser(k: int, condition: float) -> float:
    """Tolerance of the minimiser of a convex quadratic of the direction, relative to its longest term w_i |g_i|.

    This concerns UPGrad, DualProj, MGDA, CAGrad and FairGrad, and also the product of the minimiser with a unit row.
    Each of up to k terms has some rounding errors, from its product in G and from the triangular solves: 16 u, or 32 u
    if two solutions are compared. Rounding errors of the system are amplified by its inverse, by at most ``condition``,
    the condition of the worst set of independent rows: the rows in use are always such a set, and a diagonal added to
    the system, like the barrier of FairGrad, does not increase the condition. For any condition, the objective is
    correct up to rounding and strongly convex with modulus 1 in the direction, so a gap of e moves the direction by at
    most sqrt(2 e).
    """
    e = 32 * k * UNIT_ROUNDOFF[torch.float64]
    return min(e * condition, (2 * e) ** 0.5)


# CAGrad ends its search for its only unknown when |d - g_0| is within 1e-13 of c |g_0|; twice, for both results.
CAGRAD_SEARCH = 2e-13


# FairGrad's iteration stops at this |(G w)_i w_i^(1/alpha) - 1|. The Hessian of its objective for relative steps of w
# is at least 1/alpha, so the weights have an error of at most alpha times this.
FAIRGRAD_RESIDUAL = 1e-12


def aligned(k: int, condition: float) -> float:
    """Tolerance of Aligned-MTL's direction relative to its length.

    The error of G is k roundings of its largest eigenvalue. The inverse root of the smallest non-zero eigenvalue has
    the relative error of that eigenvalue, which is larger by the condition of G on its range.
    """
    return 32 * k * UNIT_ROUNDOFF[torch.float64] * condition


def equal_cosines(k: int, condition: float, *, dependent: bool) -> float:
    """Tolerance of C^+ 1 relative to its longest term, where C are the correlations.

    It is the rounding error of C times the ``condition`` of C on its range. If rows are linearly dependent, rounding
    tilts the range, and the error of the pseudo-inverse contains the square of the condition.
    """
    return 32 * k * UNIT_ROUNDOFF[torch.float64] * (condition**2 if dependent else condition)


def dependent_rows(dtype: torch.dtype, k: int, condition: float) -> float:
    """Relative tolerance of a direction of Aligned-MTL, IMTL-G or ConFIG from linearly dependent rows in ``dtype``.

    The error of an entry of G is at most 4 eps of float32 for rows in float32 and half precision (float64: 64 eps), as
    measured and stated by ``antdiff.ops._precision.entry_noise``. An eigenvalue of zero moves by at most k times this,
    and by k u^2 if rounding the elements of J by u has moved a singular value. Both lie below the threshold at which
    the methods treat an eigenvalue as zero, so only errors of the other eigenvalues and of their space remain: k times
    the error of an entry, and sqrt(k) u for the rows themselves, amplified by ``condition``, the condition of the
    correlation matrix on its range (by its root for the rows, whose singular values are roots). The pseudo-inverse of a
    matrix that has a null space has the error of its space and of its inverse: a factor of 2, and 2 for both results.
    """
    eps = 64 * 2.0**-52 if dtype == torch.float64 else 4 * 2.0**-23
    return 4 * (k * eps * condition + (k * condition) ** 0.5 * UNIT_ROUNDOFF[dtype])


def power(log: float) -> float:
    """Relative tolerance of x^e for |log x^e| up to ``log``.

    Rounding the exponent changes the power by log u relative to itself. This happens in both results, and each has a
    few more rounding errors.
    """
    return (2 * log + 16) * UNIT_ROUNDOFF[torch.float64]


def vanishing(k: int) -> float:
    """Tolerance of GradVac's direction relative to sum_i |g_i|.

    GradVac computes |p_i|^2 as a difference of terms and treats it as zero below 128 k u of these terms. Each p_i may
    therefore retain a length of the root of that.
    """
    return (128 * k * UNIT_ROUNDOFF[torch.float64]) ** 0.5


# Relative tolerance of K shares that are computed from logarithms of losses up to 1e20. The logarithm, 46, has an error
# of 46 u; about ten such errors add up in a mean, a softmax and a quotient.
LOG_SHARES = 10 * 46 * UNIT_ROUNDOFF[torch.float64]

# Tolerance of a scalar that Adam has trained to convergence in float32. Its steps vanish with the gradient, so only
# the rounding errors of the gradient remain, which are some u relative to its terms.
ADAM_AT_REST = 16 * UNIT_ROUNDOFF[torch.float32]

# Clarabel's tolerances of 1e-8 for gap and feasibility move a minimiser by a few times their square root.
CONIC_SOLVER = 5e-4

# A pixel in levels of grey, 0..255, that is computed in float32 and rounded once: half a level, and the roundings of
# two products of at most 255.
GREY_LEVEL = 0.5 + 4 * 255 * UNIT_ROUNDOFF[torch.float32]

# The same for what Pillow computes with integers of 8 bits: it keeps the upper byte of 16 bits, which is at most
# 255 / 257 of a level too low, and it composites in fixed point, which is less than a level off.
INTEGER_LEVEL = 1.0

# Pixels of a constant block of a JPEG, in levels: the conversions to YCbCr and back round three channels to half a
# level each, and the largest coefficient of the way back is 1.772.
JPEG_LEVEL = 2.0


def unconditioned(k: int) -> float:
    """Tolerance of a direction from a convex quadratic program, relative to its longest term, for any condition.

    It is :func:`minimiser` without a bound on the condition: the root of twice the rounding error of the objective.
    Use it for matrices of any rank, where the condition of the worst set of rows is unknown or infinite.
    """
    return minimiser(k, float("inf"))


def regularised(k: int, ridge: float) -> float:
    """Tolerance of the difference of two minimisers for a Gram matrix with trace 1 to which a ``ridge`` was added.

    It is relative to the longest term, in the norm of that matrix. Both solvers work in float64, so it is
    :func:`minimiser` for the condition of the matrix, at most ``(1 + ridge) / ridge``.
    """
    return minimiser(k, (1 + ridge) / ridge)


def another_answer() -> float:
    """Relative difference beyond which the fuzzer says that an op gave another answer than its twin in float64.

    It looks for nonsense, not for rounding errors, and its dtypes go down to bfloat16, whose results have relative
    errors of up to u = 2^-8. Four times this leaves room for the inputs, which the twin reads as they are.
    """
    return 4 * UNIT_ROUNDOFF[torch.bfloat16]
