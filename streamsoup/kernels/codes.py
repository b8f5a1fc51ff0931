"""Quantised weights in numpy: codes times scales, exact in float64; the specification.

A code is a small float: E4M3 or E5M2 in a byte (OCP 8-bit floating point, 2023), or E2M1, two in a
byte with the lower half first (OCP Microscaling Formats, 2023). A code has 4 significant bits at
most, a scale 24, and a second scale of nvfp4 adds 4 more to 24: products are exact in float64.
Where compressed-tensors stores the reciprocal of the second scale, one division is correctly
rounded. Every NaN is the positive quiet one, so that digests do not depend on what computed it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels.coding import FLOATS, Coding
from streamsoup.tensors import DTYPES

__all__ = ["TILE", "decode", "decode_transposed", "scale_values", "values_of"]

TILE = 1 << 12
"""Codes that numpy decodes at once: what it holds of them is some 300 KB."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def values_of(kind: str) -> Floats:
    """Return the value of each code of a kind, by its bits ``(codes,) float64``."""
    nbits, fraction, bias = FLOATS[kind]
    codes = np.arange(1 << nbits)
    magnitude = codes & ((1 << (nbits - 1)) - 1)
    exponent, digits = magnitude >> fraction, magnitude & ((1 << fraction) - 1)
    significand = np.where(exponent == 0, digits, digits + (1 << fraction)).astype(np.float64)
    values = np.ldexp(significand, np.maximum(exponent, 1) - bias - fraction)
    if kind in DTYPES:
        values[magnitude > DTYPES[kind].largest] = np.nan
        if DTYPES[kind].overflow != DTYPES[kind].nan:
            values[magnitude == DTYPES[kind].overflow] = np.inf
    signed: Floats = np.where(codes == magnitude, values, -values)
    return signed


def scale_values(raw: Bytes, dtype: str) -> Floats:
    """Return the values of scales ``(scale,) float64``, of a float dtype or of powers of two."""
    if dtype in ("U8", "F8_E8M0"):  # 2^(byte - 127), and 255 for NaN
        powers = np.ldexp(1.0, np.arange(256) - 127)
        powers[255] = np.nan
        found: Floats = powers[raw]
        return found
    if dtype in FLOATS:
        return values_of(dtype)[raw]
    if dtype == "BF16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def decode(
    coding: Coding,
    codes: Bytes,
    first: int,
    scales: Floats,
    divisor: float,
    out: Floats,
) -> None:
    """Decode elements of a tensor, in C order.

    Args:
        coding: Where which scale belongs.
        codes: The bytes of the codes from that of element `first` on.
        first: The first element, counted over all matrices.
        scales: ``(scale row, scale column) float64``, from the row of element `first` on.
        divisor: Divides each product.
        out: ``(element,) float64``, the result.
    """
    table = values_of(coding.kind)
    row = coding.scale_row(first)
    for start in range(0, len(out), TILE):
        elements = first + np.arange(start, min(start + TILE, len(out)))
        rows, columns = np.divmod(elements, coding.n_columns)
        matrices, rows = np.divmod(rows, coding.n_rows)
        scale = scales[
            matrices * coding.scale_rows + rows // coding.block[0] - row, columns // coding.block[1]
        ]
        if coding.kind == "E2M1":
            halves = codes[elements // 2 - first // 2]
            found = np.where(elements % 2 == 0, halves & 15, halves >> 4)
        else:
            found = codes[elements - first]
        _multiply(table[found], scale, divisor, out[start : start + len(elements)])


def decode_transposed(
    coding: Coding,
    codes: Bytes,
    column: int,
    first: int,
    scales: Floats,
    out: Floats,
) -> None:
    """Decode elements of the transpose of one matrix, whose blocks have one row, in C order.

    Args:
        coding: Where which scale belongs, in the matrix that is stored.
        codes: ``(row, byte)`` of the stored matrix: columns from `column` on, which is even.
        column: The stored column with which `codes` begin.
        first: The first element, counted in the transpose.
        scales: ``(row, scale column) float64``, from that of the first element's column on.
        out: ``(element,) float64``, the result.
    """
    table = values_of(coding.kind)
    block = first // coding.n_rows // coding.block[1]
    for start in range(0, len(out), TILE):
        elements = first + np.arange(start, min(start + TILE, len(out)))
        columns, rows = np.divmod(elements, coding.n_rows)
        halves = codes[rows, (columns - column) // 2]
        found = np.where(columns % 2 == 0, halves & 15, halves >> 4)
        scale = scales[rows, columns // coding.block[1] - block]
        _multiply(table[found], scale, 1.0, out[start : start + len(elements)])


def _multiply(values: Floats, scale: Floats, divisor: float, out: Floats) -> None:
    """Multiply codes by scales, divide once, and write every NaN in one way."""
    with np.errstate(all="ignore"):
        np.multiply(values, scale, out=out)
        if divisor != 1.0:
            out /= divisor
    out[np.isnan(out)] = np.nan
