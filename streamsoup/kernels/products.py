"""Inner products in numba: the order of `inner`, as fast as a processor multiplies and adds.

A chunk of all rows is widened to float64, and multiplied tile by tile (`tiles`). Sums of all lanes
wait in memory for the next chunk, and are folded with the last one of a grain.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from streamsoup.kernels.bits import pointer, prefetch
from streamsoup.kernels.inner import CHUNK, GRAIN, KINDS, LANES, STRIDE, STRIP
from streamsoup.kernels.tiles import difference, tile
from streamsoup.tensors import DTYPES

__all__ = ["compile_for", "compile_products"]

_SIGNATURE = types.int64(*[types.int64] * 9)


def compile_products() -> tuple[str, bytes]:
    """Compile the kernel; `inner.Products` says how it is called. Seconds.

    Gives its symbol and its object file.
    """
    # Registers: 32 of 8 lanes, or 16 of 4.
    wide = bool(llvm.get_host_cpu_features().get("avx512f"))
    kernel = compile_for(STRIP, 8) if wide else compile_for(STRIP - 1, 4)
    # What numba itself keeps in its cache; the wrapper is a plain C function.
    _, _, (content, _) = kernel._library.serialize_using_object_code()
    return kernel._wrapper_name, content


@numba.njit(error_model="numpy")
def _move_to_mean(rows_at: int, mean_at: int, n_rows: int, n: int) -> None:
    """Measure rows from their mean, and the first, to which they were differences, too."""
    # From differences to the first to differences to the mean: equal ones stay equal.
    mean = numba.carray(pointer(mean_at, types.float64), (n,))
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + 8 * STRIDE * r, types.float64), (n,))
        if r == 1:
            for i in range(n):
                mean[i] = row[i]
        else:
            for i in range(n):
                mean[i] += row[i]
    for i in range(n):
        mean[i] /= n_rows - 1
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + 8 * STRIDE * r, types.float64), (n,))
        for i in range(n):
            row[i] -= mean[i]
    first = numba.carray(pointer(rows_at, types.float64), (n,))
    for i in range(n):
        first[i] += mean[i]


def compile_for(strip: int, width: int) -> Any:
    """Compile the kernel for tiles of `strip` rows by as many, `width` lanes at a time."""
    square = tile(strip, strip, width)
    corner = tile(strip, strip, width, diagonal=True)
    column, row, single = (tile(*s, width) for s in ((strip, 1), (1, strip), (1, 1)))
    f64, f32, bf16, f16, e5m2, e4m3 = (difference(DTYPES[name], width) for name in KINDS)
    row_nbytes, lanes_nbytes = 8 * STRIDE, 8 * LANES

    @numba.njit(error_model="numpy")
    def fill(kind: int, x_at: int, less_at: int, y_at: int, n: int) -> Any:
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
    def multiply(
        rows_at: int, n_rows: int, upper: int, n: int, sums_at: int, fresh: int, out_at: int
    ) -> None:
        """Multiply the first rows, `upper` of `n_rows`, with themselves and all after them."""
        at, to = sums_at, out_at
        for i in range(0, upper, strip):
            x_at = rows_at + row_nbytes * i
            if i + strip > n_rows:  # the last few, pair by pair
                for a in range(i, n_rows):
                    for b in range(a, n_rows):
                        x, y = rows_at + row_nbytes * a, rows_at + row_nbytes * b
                        single(x, y, n, at, fresh, to, 0)
                        at += lanes_nbytes
                        to += 8 if to != 0 else 0
                return
            pitch = 8 * (n_rows - i - 1)
            corner(x_at, x_at, n, at, fresh, to, pitch)
            at += lanes_nbytes * (strip * (strip + 1) // 2)
            j = i + strip
            while j < n_rows:
                y_at = rows_at + row_nbytes * j
                beside = to + 8 * (j - i) if to != 0 else 0
                if j + strip <= n_rows:
                    square(x_at, y_at, n, at, fresh, beside, pitch)
                    at += lanes_nbytes * strip * strip
                    j += strip
                else:
                    column(x_at, y_at, n, at, fresh, beside, pitch)
                    at += lanes_nbytes * strip
                    j += 1
            to += strip * pitch + 8 * (strip - strip * (strip - 1) // 2) if to != 0 else 0

    @numba.njit(error_model="numpy")
    def multiply_first(
        rows_at: int, n_rows: int, n: int, sums_at: int, fresh: int, out_at: int
    ) -> None:
        """Multiply the first row with all others."""
        j = 1
        while j < n_rows:
            y_at, at = rows_at + row_nbytes * j, sums_at + lanes_nbytes * (j - 1)
            to = out_at + 8 * (j - 1) if out_at != 0 else 0
            if j + strip <= n_rows:
                row(rows_at, y_at, n, at, fresh, to, 0)
                j += strip
            else:
                single(rows_at, y_at, n, at, fresh, to, 0)
                j += 1

    # Never ``fastmath``: it reorders sums. A kernel must not allocate or raise: it is loaded
    # without numba.
    @numba.cfunc(_SIGNATURE, error_model="numpy")
    def products(
        inputs_at: Any,
        n_rows: int,
        reference: int,
        to_mean: int,
        n: int,
        scratch_at: Any,
        room: int,
        out_at: Any,
        n_values: int,
    ) -> int:
        inputs = numba.carray(pointer(inputs_at, types.int64), (n_rows, 3))
        # Scratch, from a cache line on: zeros, a mean, rows, sums.
        zeros_at = (scratch_at + 63) // 64 * 64
        mean_at = zeros_at + 8 * CHUNK
        rows_at = mean_at + 8 * CHUNK
        sums_at = rows_at + row_nbytes * n_rows
        zeros = numba.carray(pointer(zeros_at, types.float64), (CHUNK,))
        for i in range(CHUNK):
            zeros[i] = 0.0
        less_at = rows_at + row_nbytes * reference
        for grain in range(0, n, GRAIN):
            end = min(grain + GRAIN, n)
            row_at = out_at + 8 * n_values * (grain // GRAIN)
            top, done = 0, 0
            # As many strips at once as lanes of their pairs have room.
            while top < n_rows:
                bottom, n_pairs = top, 0
                while bottom < n_rows:
                    m = min(strip, n_rows - bottom)
                    more = m * (n_rows - bottom) - m * (m - 1) // 2
                    if reference > 0:
                        m, more = n_rows, n_rows - 1
                    if n_pairs > 0 and n_pairs + more > room:
                        break
                    n_pairs += more
                    bottom += m
                counts_at = row_at + 8 * (n_values - n_rows + 1)
                counts = numba.carray(pointer(counts_at, types.float64), (n_rows - 1,))
                if reference == 0:
                    for r in range(n_rows - 1):
                        counts[r] = 0.0
                for begin in range(grain, end, CHUNK):
                    m = min(CHUNK, end - begin)
                    for r in range(n_rows):
                        kind, size = inputs[r, 1], inputs[r, 2]
                        x_at = inputs[r, 0] + size * begin
                        y_at = rows_at + row_nbytes * r
                        less = less_at if r > reference else zeros_at
                        changed = fill(kind, x_at, less, y_at, m)
                        for line in range(size * CHUNK, 2 * size * CHUNK, 64):
                            prefetch(x_at + line)  # the next chunk, meanwhile
                        if reference == 0 and r > 0:
                            counts[r - 1] += changed
                    if to_mean != 0:
                        _move_to_mean(rows_at, mean_at, n_rows, m)
                    whole = (m + LANES - 1) // LANES
                    if m % LANES != 0:
                        for r in range(n_rows):
                            y_at = rows_at + row_nbytes * r
                            y = numba.carray(pointer(y_at, types.float64), (CHUNK,))
                            for i in range(m, whole * LANES):
                                y[i] = 0.0
                    fresh = 1 if begin == grain else 0
                    to = row_at + 8 * done if begin + CHUNK >= end else 0
                    if reference == 0:
                        x_at = rows_at + row_nbytes * top
                        multiply(x_at, n_rows - top, bottom - top, whole, sums_at, fresh, to)
                    else:
                        multiply_first(rows_at, n_rows, whole, sums_at, fresh, to)
                done += n_pairs
                top = bottom
        return 0

    return products
