"""The best approximation of lower rank of a product of two factors, never made as a whole.

With B (row, rank) and A (rank, column), the product of B·A and its best approximation of rank R (in
the Frobenius norm: Eckart and Young 1936, https://doi.org/10.1007/BF02288367) have the same R first
left singular vectors U, and the approximation is U·(Uᵀ·B·A).

1. B = Q·S and Aᵀ = P·T by Householder reflections, with S and T as small as the rank. So
   B·A = Q·(S·Tᵀ)·Pᵀ, and the left singular vectors of B·A are Q times those of S·Tᵀ.
2. Those of S·Tᵀ by one-sided Jacobi rotations: pairs of its columns are turned until all are
   orthogonal; then they are the singular vectors, times the singular values. Hestenes 1958,
   https://doi.org/10.1137/0106005; relatively accurate, Demmel and Veselić 1992.

LAPACK would be faster, and has other bits on other processors. Here every sum has an order, and the
rest are products, quotients and roots of single elements: the bytes of a soup depend on no machine.
Vectors are rows of a matrix, so that what goes on in numpy is side by side in memory.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["dots", "left_singular_vectors", "product_nbytes"]

Floats = NDArray[np.float64]

LANES = 256
"""Partial sums of a dot product, which are added up by halves at the end."""

ORTHOGONAL = 2.0**-50
"""Cosine of two columns from which they are turned no more: some roundings."""

NOTHING = 2.0**-40
"""Singular values that are nothing beside the norm: float32 has 24 bits."""

MOST_SWEEPS = 40
"""Sweeps over all pairs of columns, of which ten are usual."""


def product_nbytes(n_rows: int, n_columns: int, rank: int) -> int:
    """Return the most bytes that `left_singular_vectors` holds beside its arguments."""
    return 8 * (3 * rank * (n_rows + n_columns) + 8 * rank * rank)


def left_singular_vectors(b: Floats, a: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return the first left singular vectors of B·A, and all its singular values.

    Args:
        b: The columns of B ``(k, n_rows) float64``.
        a: The rows of A ``(k, n_columns) float64``.
        rank: How many vectors.

    Returns:
        The vectors ``(rank, n_rows)``, zeros where a singular value is `NOTHING`, and the singular
        values from the largest down. What is not finite makes all of them NaN.

    Takes some 4·k²·(n_rows + n_columns) products, and 40·k³.
    """
    with np.errstate(all="ignore"):
        (mirrors, s), (_, t) = _reflected(b), _reflected(a)
        columns = np.zeros((t.shape[1], s.shape[1]))
        for one, other in zip(s, t, strict=True):
            columns += other[:, None] * one[None, :]
        _make_orthogonal(columns)
        values = np.sqrt(dots(columns, columns))
        order = np.argsort(-values, kind="stable")
        values = values[order]
        found = np.zeros((rank, b.shape[1]))
        n = min(rank, len(values))
        least = NOTHING * math.sqrt(_sum(values * values))
        inverse = np.where(values[:n] <= least, 0.0, 1.0 / values[:n])
        found[:n, : s.shape[1]] = columns[order[:n]] * inverse[:, None]
        for j in reversed(range(len(mirrors))):
            _reflect(found, mirrors[j], j)
    return found, values


def dots(x: Floats, y: Floats) -> Floats:
    """Return the inner products of rows ``(row, element)`` of both, or of all with one ``y``."""
    lanes = np.zeros((*x.shape[:-1], LANES))
    for begin in range(0, x.shape[-1], LANES):
        part = x[..., begin : begin + LANES] * y[..., begin : begin + LANES]
        lanes[..., : part.shape[-1]] += part
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return np.asarray(lanes[..., 0])


def _sum(values: Floats) -> float:
    """Return the sum of a few numbers ``(n,)``, in order: numpy's own depends on the processor."""
    total = 0.0
    for value in values.tolist():
        total += value
    return total


def _reflected(vectors: Floats) -> tuple[list[Floats], Floats]:
    """Return the unit vectors of the reflections that make a matrix triangular, and that matrix.

    `vectors` are its columns ``(k, n)``; so are those of the result ``(k, min(k, n))``. The j-th
    reflection leaves the first j elements as they are.
    """
    left = vectors.copy()
    n = min(left.shape)
    mirrors: list[Floats] = []
    for j in range(n):
        mirror = left[j, j:].copy()
        length = np.sqrt(dots(mirror, mirror))
        mirror[0] += length if mirror[0] >= 0 else -length
        length = np.sqrt(dots(mirror, mirror))
        mirrors.append(mirror / length if length != 0 else mirror)
        _reflect(left[j:], mirrors[j], j)
    return mirrors, left[:, :n]


def _reflect(vectors: Floats, mirror: Floats, first: int) -> None:
    """Reflect vectors ``(row, element)``, in place, from element `first` on."""
    part = vectors[:, first:]
    twice = (2.0 * dots(part, mirror))[:, None]
    for begin in range(0, len(mirror), LANES):  # as much as a cache holds
        part[:, begin : begin + LANES] -= twice * mirror[begin : begin + LANES]


def _make_orthogonal(columns: Floats) -> None:
    """Turn pairs of columns, given as rows, until all are orthogonal to each other, in place.

    In a round of a sweep, each column is in one pair, as teams in a tournament: all turn at once.
    """
    n, whole = len(columns), _sum(dots(columns, columns))
    teams = np.arange(n + n % 2)
    for _ in range(MOST_SWEEPS):
        turned = False
        for _ in range(len(teams) - 1):
            half = len(teams) // 2
            pairs = np.stack([teams[:half], teams[half:][::-1]])
            pairs = pairs[:, (pairs < n).all(axis=0)]
            turned |= _turn(columns, pairs[0], pairs[1], whole)
            teams[1:] = np.roll(teams[1:], 1)
        if not turned:
            return


def _turn(
    columns: Floats, first: NDArray[np.int64], second: NDArray[np.int64], whole: float
) -> bool:
    """Turn pairs of columns so that they are orthogonal; return False if all are already.

    `whole` is the sum of all squares: what is rounding beside it has no direction.
    """
    p, q = columns[first], columns[second]
    pp, qq, pq = dots(p, p), dots(q, q), dots(p, q)
    lengths = np.maximum(np.sqrt(pp) * np.sqrt(qq), ORTHOGONAL * whole)
    needed = np.abs(pq) > ORTHOGONAL * lengths
    if not needed.any():
        return False
    p, q, pp, qq, pq = p[needed], q[needed], pp[needed], qq[needed], pq[needed]
    ratio = (qq - pp) / (2.0 * pq)
    tangent = np.where(ratio < 0, -1.0, 1.0) / (np.abs(ratio) + np.sqrt(1.0 + ratio * ratio))
    cosine = (1.0 / np.sqrt(1.0 + tangent * tangent))[:, None]
    sine = cosine * tangent[:, None]
    columns[first[needed]] = cosine * p - sine * q
    columns[second[needed]] = sine * p + cosine * q
    return True
