"""Inner products of rows of float64, in one fixed order of adding up.

The order is part of the law: a grain of 4096 elements is cut into 128 rows of 32 lanes; each lane
adds its products up row by row, each product rounded and then added; then the lanes are folded,
the upper half onto the lower, until one is left. So a sum depends on neither threads nor blocks.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="untyped-decorator,no-untyped-call,import-untyped"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["GRAIN", "LANES", "dot", "inner"]

GRAIN = 1 << 12
"""Elements that are added up before anything else is: `plan.SMALLEST_BLOCK`, so that every block
holds whole grains, but for the last of a tensor, which is filled up with zeros."""

LANES = 32
"""Sums kept at once: eight vectors, enough to hide the time that an addition takes."""


def _compiled(function: Callable[..., None]) -> Any:
    """Compile on first use; keep it for later processes where numba finds a folder to do so."""
    # ``nogil``: threads work at the same time. Never ``fastmath``: it reorders sums.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no such folder
        return numba.njit(function, **options)


@_compiled
def _tile(x0: Any, x1: Any, y0: Any, y1: Any, sums: Any) -> None:
    """Multiply two rows by two: each number loaded is used twice."""
    for lane in range(4 * LANES):
        sums[lane] = 0.0
    for row in range(0, GRAIN, 2 * LANES):
        for lane in range(LANES):
            a, b = row + lane, row + LANES + lane
            sums[lane] = (sums[lane] + x0[a] * y0[a]) + x0[b] * y0[b]
            at = LANES + lane
            sums[at] = (sums[at] + x0[a] * y1[a]) + x0[b] * y1[b]
            at += LANES
            sums[at] = (sums[at] + x1[a] * y0[a]) + x1[b] * y0[b]
            at += LANES
            sums[at] = (sums[at] + x1[a] * y1[a]) + x1[b] * y1[b]
    half = LANES // 2
    while half:
        for first in range(0, 4 * LANES, LANES):
            for lane in range(first, first + half):
                sums[lane] += sums[lane + half]
        half //= 2


@_compiled
def inner(left: Any, right: Any, triangle: bool, out: Any) -> None:
    """Fill ``out (n, m) float64`` with the products of the rows of two C-contiguous matrices.

    `left` is ``(n, GRAIN) float64``, `right` ``(m, GRAIN) float64``. With `triangle` only those
    of ``j >= i`` are of use. Compiles in about a second; runs without the GIL.
    """
    sums = np.empty(4 * LANES)
    n, m = len(left), len(right)
    for i in range(0, n, 2):
        below = min(i + 1, n - 1)
        for j in range(i if triangle else 0, m, 2):
            beside = min(j + 1, m - 1)
            _tile(left[i], left[below], right[j], right[beside], sums)
            out[i, j] = sums[0]
            out[i, beside] = sums[LANES]
            out[below, j] = sums[2 * LANES]
            out[below, beside] = sums[3 * LANES]


@_compiled
def dot(vector: Any, row: Any, less: Any, out: Any) -> None:
    """Fill ``out (grain,) float64`` with ⟨vector, row − less⟩, grain by grain.

    All three are ``(element,)`` of float32 or float64, `less` of no element to take nothing off.
    Differences and products are float64, each rounded. Compiles in about a second; runs without
    the GIL.
    """
    lanes = np.empty(LANES)
    for grain in range(len(out)):
        lanes[:] = 0.0
        begin = grain * GRAIN
        end = min(begin + GRAIN, len(row))
        for start in range(begin, end, LANES):
            n = min(LANES, end - start)
            if len(less):
                for lane in range(n):
                    value = np.float64(row[start + lane]) - np.float64(less[start + lane])
                    lanes[lane] += np.float64(vector[start + lane]) * value
            else:
                for lane in range(n):
                    value = np.float64(row[start + lane])
                    lanes[lane] += np.float64(vector[start + lane]) * value
        half = LANES // 2
        while half:
            for lane in range(half):
                lanes[lane] += lanes[lane + half]
            half //= 2
        out[grain] = lanes[0]
