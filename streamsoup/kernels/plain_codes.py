"""Quantised weights in compiled loops: the bits of `codes`, some hundred times as fast.

What is compiled stands in this file and in `plain`. Loops over codes that have a scale in common
have no branches, so that they become vectors.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.codes import values_of
from streamsoup.kernels.plain import pointer

__all__ = ["compile_decode", "compile_transposed"]

DECODE_SIGNATURE = types.int64(*[types.int64] * 10, types.float64, types.int64)
TRANSPOSED_SIGNATURE = types.int64(*[types.int64] * 10)

_ROWS = 16
"""Stored rows that are transposed at once: their results fill two lines of a cache."""

_VALUES = values_of("E2M1")


@numba.njit(forceinline=True)
def _bytes_to_values(
    x: Any, fraction: int, bias: int, infinity: int, scale: float, out: Any
) -> Any:
    """Write codes of a byte each, times a scale. `infinity` is 256 for a kind that has none."""
    least = np.uint32(1 << fraction)
    shift = np.uint32(23 - fraction)
    normal, small = np.uint32((127 - bias) << 23), np.uint32((128 - bias) << 23)
    step = np.uint32(small).view(np.float32)
    largest = np.uint32(min(infinity, 0x7F) - 1)
    for j in range(len(out)):
        bits = np.uint32(x[j])
        magnitude = bits & np.uint32(0x7F)
        # As a float32 with the same fields. Below the least normal the fields are read as if there
        # were a leading one, which is subtracted: no float32 is subnormal on the way.
        is_small = magnitude < least
        word = np.uint32((magnitude << shift) + (small if is_small else normal))
        value = word.view(np.float32) - (step if is_small else np.float32(0.0))
        above = np.uint32(0x7F800000 if magnitude == np.uint32(infinity) else 0x7FC00000)
        value = above.view(np.float32) if magnitude > largest else value
        sign = (bits >> np.uint32(7)) << np.uint32(31)
        signed = np.uint32(np.float32(value).view(np.uint32) | sign).view(np.float32)
        product = np.float64(signed) * scale
        out[j] = product if product == product else np.nan


@numba.njit(forceinline=True)
def _fill_table(scale: float, divisor: float, table: Any) -> None:
    """Write the values of the 16 codes of E2M1. Two divisions serve: the others differ by twos."""
    one, three = scale / divisor, 3.0 * scale / divisor
    table[0], table[1], table[2], table[3] = 0.0 * one, 0.5 * one, one, 0.5 * three
    table[4], table[5], table[6], table[7] = 2.0 * one, three, 4.0 * one, 2.0 * three
    for j in range(8):
        table[j] = table[j] if table[j] == table[j] else np.nan
        table[8 + j] = -table[j] if table[j] == table[j] else np.nan


@numba.njit(forceinline=True)
def _halves_to_values(codes: Any, at: int, table: Any, out: Any) -> None:
    """Look up codes of half a byte from the one with number `at` on."""
    n = len(out)
    begin = at & 1
    if begin == 1:
        out[0] = table[np.int64(codes[at >> 1]) >> 4]
    pairs = (n - begin) >> 1
    x, y = codes[(at + 1) >> 1 : ((at + 1) >> 1) + pairs], out[begin : begin + 2 * pairs]
    for j in range(len(x)):
        byte = np.int64(x[j])
        y[2 * j] = table[byte & 15]
        y[2 * j + 1] = table[byte >> 4]
    if begin + 2 * pairs < n:
        out[n - 1] = table[np.int64(codes[(at + n - 1) >> 1]) & 15]


@numba.njit(forceinline=True)
def _pairs_to_values(x: Any, scale: float, out: Any) -> None:
    """Write codes of half a byte, from the lower half of a byte on, times a scale."""
    for j in range(len(x)):
        byte = np.uint32(x[j])
        out[2 * j] = _half_to_value(byte & np.uint32(15), scale)
        out[2 * j + 1] = _half_to_value(byte >> np.uint32(4), scale)


@numba.njit(forceinline=True)
def _half_to_value(bits: Any, scale: float) -> float:
    """Return a code of E2M1 times a scale: a float32 of its fields, as in `_bytes_to_values`."""
    magnitude = bits & np.uint32(7)
    is_small = magnitude < np.uint32(2)
    word = (magnitude << np.uint32(22)) + np.uint32((127 if is_small else 126) << 23)
    value = np.uint32(word).view(np.float32) - np.float32(1.0 if is_small else 0.0)
    sign = (bits >> np.uint32(3)) << np.uint32(31)
    signed = np.uint32(np.float32(value).view(np.uint32) | sign).view(np.float32)
    product = np.float64(signed) * scale
    return product if product == product else np.nan


def decode(
    codes_at: Any,
    kind: int,
    first: int,
    n: int,
    n_columns: int,
    n_rows: int,
    block_rows: int,
    block_columns: int,
    scales_at: Any,
    table_at: Any,
    divisor: float,
    out_at: Any,
) -> int:
    """Decode `n` elements in C order, as `codes.decode` does. Kinds: 0 E4M3, 1 E5M2, 2 E2M1."""
    scale_columns = (n_columns + block_columns - 1) // block_columns
    scale_rows = (n_rows + block_rows - 1) // block_rows
    nbytes = n if kind != 2 else (first + n + 1) // 2 - first // 2
    codes = numba.carray(pointer(codes_at, types.uint8), (nbytes,))
    out = numba.carray(pointer(out_at, types.float64), (n,))
    table = numba.carray(pointer(table_at, types.float64), (16,))
    row, column = first // n_columns, first % n_columns
    matrix, row = row // n_rows, row % n_rows
    first_scale_row = matrix * scale_rows + row // block_rows
    done = 0
    while done < n:
        of_row = matrix * scale_rows + row // block_rows - first_scale_row
        end = min(n, done + n_columns - column)
        while done < end:
            block = column // block_columns
            stop = min(end, done + (block + 1) * block_columns - column)
            scales = numba.carray(
                pointer(scales_at + 8 * (of_row * scale_columns + block), types.float64), (1,)
            )
            scale = scales[0]
            if kind == 0:
                _bytes_to_values(codes[done:stop], 3, 7, 256, scale, out[done:stop])
            elif kind == 1:
                _bytes_to_values(codes[done:stop], 2, 15, 0x7C, scale, out[done:stop])
            else:
                at = first % 2 + done
                if divisor == 1.0 and (at | (stop - done)) & 1 == 0:
                    _pairs_to_values(
                        codes[at >> 1 : (at + stop - done) >> 1], scale, out[done:stop]
                    )
                    column += stop - done
                    done = stop
                    continue
                _fill_table(scale, divisor, table)
                _halves_to_values(codes, first % 2 + done, table, out[done:stop])
            column += stop - done
            done = stop
        column = 0
        row += 1
        if row == n_rows:
            row = 0
            matrix += 1
    return 0


def transposed(
    codes_at: Any,
    stride: int,
    column: int,
    first: int,
    n: int,
    n_rows: int,
    block_columns: int,
    scales_at: Any,
    scale_columns: int,
    out_at: Any,
) -> int:
    """Decode `n` elements of the transpose of a matrix of E2M1, as `codes.decode_transposed`.

    `stride` is the distance of rows of codes in bytes, `scale_columns` that of rows of scales.
    """
    begin, end = first // n_rows, (first + n - 1) // n_rows + 1
    first_block = begin // block_columns
    out = numba.carray(pointer(out_at, types.float64), (n,))
    codes = numba.carray(pointer(codes_at, types.uint8), (n_rows * stride,))
    scales = numba.carray(pointer(scales_at, types.float64), (n_rows * scale_columns,))
    for tile in range(0, n_rows, _ROWS):
        for at in range(begin, end):
            start = at * n_rows - first
            low, high = max(tile, -start), min(tile + _ROWS, n_rows, n - start)
            if low >= high:
                continue
            byte = low * stride + ((at - column) >> 1)
            scale = low * scale_columns + at // block_columns - first_block
            shift = 4 * (at & 1)
            made = out[start + low : start + high]
            for j in range(len(made)):
                bits = (np.int64(codes[byte]) >> shift) & 15
                product = _VALUES[bits] * scales[scale]
                made[j] = product if product == product else np.nan
                byte += stride
                scale += scale_columns
    return 0


def compile_decode(*, cache: bool = True) -> Any:
    """Compile `decode`; with `cache`, or load it from numba's. Returns numba's function."""
    return _compiled(DECODE_SIGNATURE, decode, cache)


def compile_transposed(*, cache: bool = True) -> Any:
    """Compile `transposed`; with `cache`, or load it from numba's. Returns numba's function."""
    return _compiled(TRANSPOSED_SIGNATURE, transposed, cache)


def _compiled(signature: Any, function: Any, cache: bool) -> Any:
    # As in `plain`: never ``fastmath``, and a division by zero gives Inf without a branch.
    try:
        return numba.cfunc(signature, error_model="numpy", cache=cache)(function)
    except RuntimeError:  # no place that is writable
        return numba.cfunc(signature, error_model="numpy")(function)
