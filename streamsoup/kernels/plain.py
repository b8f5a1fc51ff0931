"""The base tier: plain loops in numba, to be read beside `reference`.

They run wherever numba does, are compiled and kept in its ordinary way, and are what everything
faster falls back to. One kernel mixes any dtypes into any other, several source dtypes too; one
multiplies rows. They have the signatures of the fast tier, and make no digests.

A dtype is a row of plain numbers here, which are constants to LLVM: no branch on them is left.
What is compiled stands in this file alone, as numba's cache looks at no other.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

import os
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from streamsoup.kernels.constants import GRAIN, KINDS, LANES, TILE
from streamsoup.tensors import DTYPES, DType

__all__ = [
    "MIX_SIGNATURE",
    "PRODUCTS_SIGNATURE",
    "WORDS",
    "adder",
    "compile_mix",
    "compile_products",
    "keep_equal",
    "narrow",
    "numbers",
    "pointer",
    "rounder",
    "widen",
]

MIX_SIGNATURE = types.int64(*[types.int64] * 6, types.float64, *[types.int64] * 4)
PRODUCTS_SIGNATURE = types.int64(*[types.int64] * 8)

WORDS = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.uint64}
_F64, _F32, _BF16, _F16, _E5M2, _E4M3 = range(len(KINDS))


@intrinsic
def pointer(typing: Any, address: Any, word: Any) -> Any:
    """Turn an integer into a pointer to words of a type."""
    kind = word.instance_type if isinstance(word, types.TypeRef) else word.dtype
    signature = types.CPointer(kind)(types.int64, word)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


def numbers(dtype: DType) -> tuple[int, ...]:
    """Return what a kernel must know of a dtype, as plain numbers."""
    assert dtype.fraction is not None
    kind = KINDS.index(dtype.name)
    return kind, dtype.nbits, dtype.fraction, dtype.bias, dtype.largest, dtype.overflow, dtype.nan


@numba.njit(forceinline=True)
def widen(bits: Any, row: Any) -> float:
    """Return the value of a word's bits, exactly; `row` is that of its dtype, of `numbers`."""
    kind, nbits, fraction, bias, largest, overflow, nan = row
    if kind == _F64:
        return np.uint64(bits).view(np.float64)
    if kind == _F32:
        return np.float64(np.uint32(bits).view(np.float32))
    if kind == _BF16:
        return np.float64(np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32))
    # In the fields of a float32 it is the value times a power of two, subnormals too.
    word = np.uint32(bits)
    magnitude = np.uint32(word & np.uint32((1 << (nbits - 1)) - 1))
    sign = np.uint32((word >> np.uint32(nbits - 1)) << np.uint32(31))
    scale = np.uint32((127 + 127 - bias) << 23).view(np.float32)
    value = np.uint32((magnitude << np.uint32(23 - fraction)) | sign).view(np.float32) * scale
    # Above the largest are infinity, where the dtype has one, and NaN.
    has_infinity = overflow != nan and magnitude == np.uint32(overflow)
    above = np.uint32(np.uint32(0x7F800000) | sign) if has_infinity else np.uint32(0x7FC00000)
    beyond = np.uint32(above).view(np.float32)
    return np.float64(beyond if magnitude > np.uint32(largest) else value)


@numba.njit(forceinline=True)
def narrow(value: float, row: Any) -> Any:
    """Round a value once; return its bits, and the magnitude that tells if it is finite."""
    kind, nbits, fraction, bias, _, overflow, nan = row
    if kind == _F64:
        bits = np.float64(value).view(np.uint64)
        magnitude = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
        return (np.uint64(nan) if magnitude > np.uint64(overflow) else bits), magnitude
    if kind == _F32:
        bits = np.float32(value).view(np.uint32)
        magnitude = bits & np.uint32(0x7FFFFFFF)
        return (np.uint32(nan) if magnitude > np.uint32(overflow) else bits), magnitude
    # Directly from the bits of float64, as rounding to float32 first would round twice.
    # 1. Adding just below half of the last kept place, plus that place's parity, and cutting off
    #    what is below it rounds half to even; a carry runs into the exponent, as it should.
    bits = np.float64(value).view(np.uint64)
    sign = (bits >> np.uint64(64 - nbits)) & np.uint64(1 << (nbits - 1))
    absolute = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
    shift = np.uint64(52 - fraction)
    below_half = np.uint64((1 << (51 - fraction)) - 1)
    code = (absolute + below_half + ((absolute >> shift) & np.uint64(1))) >> shift
    code -= np.uint64((1023 - bias) << fraction)
    # 2. Below the smallest normal the spacing is fixed: scaled so that it is 1, a value to which
    #    2^52 is added is rounded half to even by that addition, and its fraction is the multiple.
    scale = np.uint64((1023 + bias - 1 + fraction) << 52).view(np.float64)
    scaled = abs(value) * scale + 4503599627370496.0
    small = np.float64(scaled).view(np.uint64) & np.uint64((1 << 52) - 1)
    code = small if absolute < np.uint64((1023 + 1 - bias) << 52) else code
    # 3. What is larger than the largest, rounded, is the overflow pattern.
    code = min(code, np.uint64(overflow))
    return (np.uint64(nan) if value != value else code | sign), code


def adder(dtype: DType) -> Any:
    """Return the loop that adds a factor times the elements of a dtype to sums."""
    row, word = numbers(dtype), WORDS[dtype.nbits]

    @numba.njit(inline="always")
    def add(sums: Any, factor: float, x_at: int) -> None:
        x = numba.carray(pointer(x_at, word), sums.shape)
        for j in range(len(sums)):
            sums[j] += factor * widen(x[j], row)

    return add


def rounder(dtype: DType) -> Any:
    """Return the loop that rounds values to a dtype, and tells whether one is not finite."""
    row, word, largest = numbers(dtype), WORDS[dtype.nbits], dtype.largest
    wide = WORDS[32 if dtype.nbits == 32 else 64]

    @numba.njit(inline="always")
    def round_all(values: Any, y_at: int) -> bool:
        y = numba.carray(pointer(y_at, word), values.shape)
        highest = wide(0)
        for j in range(len(values)):
            bits, magnitude = narrow(values[j], row)
            y[j] = word(bits)
            highest = max(highest, magnitude)
        return highest > wide(largest)

    return round_all


_add_f64, _add_f32, _add_bf16, _add_f16, _add_e5m2, _add_e4m3 = (
    adder(DTYPES[name]) for name in KINDS
)
_to_f64, _to_f32, _to_bf16, _to_f16, _to_e5m2, _to_e4m3 = (rounder(DTYPES[name]) for name in KINDS)


@numba.njit(inline="always")
def _add(kind: int, sums: Any, factor: float, x_at: int, start: int) -> None:
    """Add a factor times the elements from `start` on of an ingredient at `x_at`."""
    if kind == _F64:
        _add_f64(sums, factor, x_at + 8 * start)
    elif kind == _F32:
        _add_f32(sums, factor, x_at + 4 * start)
    elif kind == _BF16:
        _add_bf16(sums, factor, x_at + 2 * start)
    elif kind == _F16:
        _add_f16(sums, factor, x_at + 2 * start)
    elif kind == _E5M2:
        _add_e5m2(sums, factor, x_at + start)
    else:
        _add_e4m3(sums, factor, x_at + start)


@numba.njit(inline="always")
def _round(kind: int, values: Any, y_at: int, start: int) -> bool:
    """Round values into the elements from `start` on of an output at `y_at`."""
    if kind == _F64:
        return _to_f64(values, y_at + 8 * start)
    if kind == _F32:
        return _to_f32(values, y_at + 4 * start)
    if kind == _BF16:
        return _to_bf16(values, y_at + 2 * start)
    if kind == _F16:
        return _to_f16(values, y_at + 2 * start)
    if kind == _E5M2:
        return _to_e5m2(values, y_at + start)
    return _to_e4m3(values, y_at + start)


@numba.njit(inline="always")
def keep_equal(values: Any, addresses: Any, start: int, differ: Any) -> None:
    """Put back float64 that have the same bits in all ingredients: their sum may be inexact.

    `differ` ``(element,) uint64`` is scratch.
    """
    at = 8 * start
    first = numba.carray(pointer(addresses[0] + at, types.uint64), values.shape)
    differ[:] = 0
    for i in range(1, len(addresses)):
        x = numba.carray(pointer(addresses[i] + at, types.uint64), values.shape)
        for j in range(len(values)):
            differ[j] |= x[j] ^ first[j]
    same = numba.carray(pointer(addresses[0] + at, types.float64), values.shape)
    for j in range(len(values)):
        values[j] = same[j] if differ[j] == 0 else values[j]


def mix(
    sums_at: Any,
    table_at: Any,
    factors_at: Any,
    scratch_at: Any,
    k: int,
    fresh: int,
    divisor: float,
    output: int,
    n: int,
    digests_at: int,
    leaf: int,
) -> int:
    """Mix `n` elements of `k` ingredients, as `cpu.Mixer` describes it; no digests."""
    # The addresses of ingredients and output, and then their dtypes.
    table = numba.carray(pointer(table_at, types.int64), (2 * k + 2,))
    addresses, kinds = table[:k], table[k + 1 :]
    factors = numba.carray(pointer(factors_at, types.float64), (k,))
    uniform = divisor == k and fresh != 0
    for i in range(k):
        uniform = uniform and factors[i] == 1.0 and kinds[i] == _F64
    spoiled = False
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        tile_at = sums_at + 8 * start if sums_at != 0 else scratch_at
        sums = numba.carray(pointer(tile_at, types.float64), (m,))
        if fresh != 0:
            sums[:] = -0.0  # the sum of nothing: zeros keep their sign
        for i in range(k):
            _add(kinds[i], sums, factors[i], addresses[i], start)
        if output != 0:
            for j in range(m):
                sums[j] /= divisor
            if uniform and fresh == 1:
                differ_at = scratch_at + 8 * TILE
                differ = numba.carray(pointer(differ_at, types.uint64), (m,))
                keep_equal(sums, addresses, start, differ)
            spoiled |= _round(kinds[k], sums, output, start)
    return spoiled


@numba.njit(inline="always")
def _multiply(x: Any, y: Any, lanes: Any) -> float:
    """Return the inner product of two grains in the order of `inner`."""
    lanes[:] = 0.0
    for start in range(0, GRAIN, LANES):
        for j in range(LANES):
            lanes[j] += x[start + j] * y[start + j]
    half = LANES // 2
    while half > 0:
        for j in range(half):
            lanes[j] += lanes[half + j]
        half //= 2
    return lanes[0]


@numba.njit(inline="always")
def _move_to_mean(rows: Any, mean: Any, n: int) -> None:
    """Turn differences to the first row into differences to the mean, which becomes the first."""
    for j in range(n):
        mean[j] = rows[1, j]
    for r in range(2, len(rows)):
        for j in range(n):
            mean[j] += rows[r, j]
    for j in range(n):
        mean[j] /= len(rows) - 1
    for r in range(1, len(rows)):
        for j in range(n):
            rows[r, j] -= mean[j]
    for j in range(n):
        rows[0, j] += mean[j]


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
    """Multiply `n_rows` rows of `n` elements, as `inner.Products` describes it."""
    inputs = numba.carray(pointer(inputs_at, types.int64), (n_rows, 3))  # address, kind, size
    out = numba.carray(pointer(out_at, types.float64), ((n + GRAIN - 1) // GRAIN, n_values))
    scratch = numba.carray(pointer(scratch_at, types.float64), (n_rows + 2, GRAIN))
    rows, mean, lanes = scratch[:n_rows], scratch[n_rows], scratch[n_rows + 1, :LANES]
    for grain in range(len(out)):
        start = grain * GRAIN
        m = min(GRAIN, n - start)
        value = 0
        for r in range(n_rows):
            rows[r, :m] = -0.0  # to which any number is added exactly
            rows[r, m:] = 0.0
            _add(inputs[r, 1], rows[r, :m], 1.0, inputs[r, 0], start)
            if r > reference:
                for j in range(m):
                    rows[r, j] -= rows[reference, j]
        if reference > 0:
            for r in range(1, n_rows):
                out[grain, r - 1] = _multiply(rows[0], rows[r], lanes)
            continue
        for r in range(1, n_rows):
            n_changed = 0
            for j in range(m):
                n_changed += rows[r, j] != 0.0
            out[grain, n_values - n_rows + r] = n_changed
        if to_mean != 0:
            _move_to_mean(rows, mean, m)
        for a in range(n_rows):
            for b in range(a, n_rows):
                out[grain, value] = _multiply(rows[a], rows[b], lanes)
                value += 1
    return 0


def compile_mix() -> Any:
    """Compile `mix`, or load it; return numba's function, with its `address`."""
    return _compiled(MIX_SIGNATURE, mix)


def compile_products() -> Any:
    """Compile `products`, or load it."""
    return _compiled(PRODUCTS_SIGNATURE, products)


def _compiled(signature: Any, function: Any) -> Any:
    """Compile a function, and let numba keep it beside this file, if it would.

    Elsewhere numba keeps pickles in folders that others may write to, and runs what they hold.
    """
    # Never ``fastmath``, which reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch.
    beside = os.access(os.path.dirname(__file__), os.W_OK) and not numba.config.CACHE_DIR
    try:
        return numba.cfunc(signature, error_model="numpy", cache=beside)(function)
    except RuntimeError:  # numba finds no place that is writable after all
        return numba.cfunc(signature, error_model="numpy")(function)
