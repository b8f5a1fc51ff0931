"""Inner products in numba: the order of `inner`, as fast as a processor multiplies and adds.

A tile of all rows is widened to float64, and multiplied some rows by some others (`multiply`). Sums
of all lanes wait in memory for the next tile, and are folded with the last one of a grain.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from streamsoup.kernels.constants import (
    GRAIN,
    KINDS,
    LANES,
    PRODUCT_PAIRS,
    PRODUCT_ROWS,
    PRODUCT_TILE,
    ROW_PITCH,
)
from streamsoup.kernels.fast.multiply import difference, multiplier
from streamsoup.kernels.fast.objects import object_file
from streamsoup.kernels.fast.prefetching import prefetch
from streamsoup.kernels.plain import PRODUCTS_SIGNATURE, pointer
from streamsoup.tensors import DTYPES

__all__ = ["compile_for", "compile_products"]


_ROW_NBYTES, _LANES_NBYTES = 8 * ROW_PITCH, 8 * LANES


def compile_products() -> tuple[str, bytes]:
    """Compile the kernel: seconds. Return its symbol and its object file.

    `inner.Products` says how it is called.
    """
    # Registers: 32 of 8 lanes, or 16 of 4.
    wide = bool(llvm.get_host_cpu_features().get("avx512f"))
    at_once, width = (PRODUCT_ROWS, 8) if wide else (PRODUCT_ROWS - 1, 4)
    return object_file(lambda: compile_for(at_once, width))


@numba.njit(error_model="numpy")
def _move_to_mean(rows_at: int, mean_at: int, n_rows: int, n: int) -> None:
    """Turn differences to the first row into differences to the mean, which becomes the first."""
    mean = numba.carray(pointer(mean_at, types.float64), (n,))
    mean[:] = -0.0  # to which any number is added exactly
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + _ROW_NBYTES * r, types.float64), (n,))
        for i in range(n):
            mean[i] += row[i]
    for i in range(n):
        mean[i] /= n_rows - 1
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + _ROW_NBYTES * r, types.float64), (n,))
        for i in range(n):
            row[i] -= mean[i]
    first = numba.carray(pointer(rows_at, types.float64), (n,))
    for i in range(n):
        first[i] += mean[i]


@numba.njit(inline="always")
def _rows_with_room(top: int, n_rows: int, at_once: int, room: int) -> Any:
    """Return the end of the rows from `top` on whose pairs have room for their lanes, and how many.

    Their pairs are those with themselves and all rows after them. Some rows are taken in any case.
    """
    bottom, n_pairs = top, 0
    while bottom < n_rows:
        m = min(at_once, n_rows - bottom)
        more = m * (n_rows - bottom) - m * (m - 1) // 2
        if n_pairs > 0 and n_pairs + more > room:
            break
        n_pairs += more
        bottom += m
    return bottom, n_pairs


def _filler(width: int) -> Any:
    """Return what widens a tile of every row, takes the reference off, and counts what differs."""
    f64, f32, bf16, f16, e5m2, e4m3 = (difference(DTYPES[name], width) for name in KINDS)

    @numba.njit(inline="always")
    def subtract(kind: int, x_at: int, less_at: int, y_at: int, n: int) -> Any:
        if kind == 0:
            return f64(x_at, less_at, y_at, n)
        if kind == 1:
            return f32(x_at, less_at, y_at, n)
        if kind == 2:
            return bf16(x_at, less_at, y_at, n)
        if kind == 3:
            return f16(x_at, less_at, y_at, n)
        if kind == 4:
            return e5m2(x_at, less_at, y_at, n)
        return e4m3(x_at, less_at, y_at, n)

    @numba.njit(error_model="numpy")
    def fill(
        inputs: Any, begin: int, n: int, reference: int, rows_at: int, zeros_at: int, counts: Any
    ) -> None:
        for r in range(len(inputs)):
            kind, size = inputs[r, 1], inputs[r, 2]
            x_at, y_at = inputs[r, 0] + size * begin, rows_at + _ROW_NBYTES * r
            less_at = rows_at + _ROW_NBYTES * reference if r > reference else zeros_at
            changed = subtract(kind, x_at, less_at, y_at, n)
            for line in range(size * PRODUCT_TILE, 2 * size * PRODUCT_TILE, 64):
                prefetch(x_at + line)  # the next tile, meanwhile
            if reference == 0 and r > 0:
                counts[r - 1] += changed

    return fill


def _pairs(at_once: int, width: int) -> Any:
    """Return what multiplies rows with themselves and all after them, `at_once` by as many."""
    square = multiplier(at_once, at_once, width)
    corner = multiplier(at_once, at_once, width, diagonal=True)
    column, single = multiplier(at_once, 1, width), multiplier(1, 1, width)

    @numba.njit(error_model="numpy")
    def multiply(
        rows_at: int, n_rows: int, upper: int, n: int, sums_at: int, fresh: int, out_at: int
    ) -> None:
        at, to = sums_at, out_at
        for i in range(0, upper, at_once):
            x_at = rows_at + _ROW_NBYTES * i
            if i + at_once > n_rows:  # the last few, pair by pair
                for a in range(i, n_rows):
                    for b in range(a, n_rows):
                        x, y = rows_at + _ROW_NBYTES * a, rows_at + _ROW_NBYTES * b
                        single(x, y, n, at, fresh, to, 0)
                        at += _LANES_NBYTES
                        to += 8 if to != 0 else 0
                return
            pitch = 8 * (n_rows - i - 1)
            corner(x_at, x_at, n, at, fresh, to, pitch)
            at += _LANES_NBYTES * (at_once * (at_once + 1) // 2)
            j = i + at_once
            while j < n_rows:
                y_at = rows_at + _ROW_NBYTES * j
                beside = to + 8 * (j - i) if to != 0 else 0
                if j + at_once <= n_rows:
                    square(x_at, y_at, n, at, fresh, beside, pitch)
                    at += _LANES_NBYTES * at_once * at_once
                    j += at_once
                else:
                    column(x_at, y_at, n, at, fresh, beside, pitch)
                    at += _LANES_NBYTES * at_once
                    j += 1
            to += at_once * pitch + 8 * (at_once - at_once * (at_once - 1) // 2) if to != 0 else 0

    return multiply


def _first_with_others(at_once: int, width: int) -> Any:
    """Return what multiplies the first row with all others, `at_once` at a time."""
    row, single = multiplier(1, at_once, width), multiplier(1, 1, width)

    @numba.njit(error_model="numpy")
    def multiply(rows_at: int, n_rows: int, n: int, sums_at: int, fresh: int, out_at: int) -> None:
        j = 1
        while j < n_rows:
            y_at, at = rows_at + _ROW_NBYTES * j, sums_at + _LANES_NBYTES * (j - 1)
            to = out_at + 8 * (j - 1) if out_at != 0 else 0
            if j + at_once <= n_rows:
                row(rows_at, y_at, n, at, fresh, to, 0)
                j += at_once
            else:
                single(rows_at, y_at, n, at, fresh, to, 0)
                j += 1

    return multiply


def compile_for(at_once: int, width: int) -> Any:
    """Compile the kernel for `at_once` rows by as many, `width` lanes in a register."""
    fill = _filler(width)
    pairs, first_with_others = _pairs(at_once, width), _first_with_others(at_once, width)

    # Never ``fastmath``: it reorders sums. A kernel must not allocate or raise: it is loaded
    # without numba.
    @numba.cfunc(PRODUCTS_SIGNATURE, error_model="numpy")
    def products(
        inputs_at: Any,
        n_rows: int,
        reference: int,
        to_mean: int,
        n: int,
        scratch_at: Any,
        out_at: Any,
        n_values: int,
    ) -> int:
        inputs = numba.carray(pointer(inputs_at, types.int64), (n_rows, 3))
        room = max(PRODUCT_PAIRS, PRODUCT_ROWS * n_rows)
        # Scratch, from a cache line on: zeros, a mean, rows, sums.
        zeros_at = (scratch_at + 63) // 64 * 64
        mean_at = zeros_at + 8 * PRODUCT_TILE
        rows_at = mean_at + 8 * PRODUCT_TILE
        sums_at = rows_at + _ROW_NBYTES * n_rows
        numba.carray(pointer(zeros_at, types.float64), (PRODUCT_TILE,))[:] = 0.0
        for grain in range(0, n, GRAIN):
            end = min(grain + GRAIN, n)
            row_at = out_at + 8 * n_values * (grain // GRAIN)
            counts_at = row_at + 8 * (n_values - n_rows + 1)
            counts = numba.carray(pointer(counts_at, types.float64), (n_rows - 1,))
            top, done = 0, 0
            while top < n_rows:
                bottom, n_pairs = n_rows, n_rows - 1
                if reference == 0:
                    bottom, n_pairs = _rows_with_room(top, n_rows, at_once, room)
                    counts[:] = 0.0
                for begin in range(grain, end, PRODUCT_TILE):
                    m = min(PRODUCT_TILE, end - begin)
                    fill(inputs, begin, m, reference, rows_at, zeros_at, counts)
                    if to_mean != 0:
                        _move_to_mean(rows_at, mean_at, n_rows, m)
                    whole = (m + LANES - 1) // LANES
                    for r in range(n_rows):  # filled up with zeros
                        y_at = rows_at + _ROW_NBYTES * r
                        y = numba.carray(pointer(y_at, types.float64), (PRODUCT_TILE,))
                        y[m : whole * LANES] = 0.0
                    fresh = begin == grain
                    to = row_at + 8 * done if begin + PRODUCT_TILE >= end else 0
                    if reference == 0:
                        x_at = rows_at + _ROW_NBYTES * top
                        pairs(x_at, n_rows - top, bottom - top, whole, sums_at, fresh, to)
                    else:
                        first_with_others(rows_at, n_rows, whole, sums_at, fresh, to)
                done += n_pairs
                top = bottom
        return 0

    return products
