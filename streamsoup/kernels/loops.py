"""The arithmetic in numba: all ingredients of a block in one pass over memory.

The sums of a few thousand elements stay in a core's first cache while ingredient after ingredient
is added to them, four at a time in registers, and leave it once, rounded. The loops hold no
branch and no call, so that LLVM turns them into vector instructions.

Means of 16- and 8-bit floats are taken in float32 wherever that is exact: twice the lanes, and
nothing to widen. Compiled per pair of input and output dtype, to an object file that `cpu` keeps
and loads.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.bits import (
    WORDS,
    as_float64,
    bits64,
    narrow,
    narrow_small,
    numbers,
    pointer,
    widen,
    widen_small,
)
from streamsoup.kernels.cpu import BLOCK
from streamsoup.tensors import DType

__all__ = ["compile_mix"]

_SIGNATURE = types.int64(*[types.int64] * 6, types.float64, types.int64, types.int64)

_MOST = 128
"""Ingredients whose mean may be taken in float32: beyond, little would be exact."""


def compile_mix(source: DType, output: DType) -> tuple[str, bytes]:
    """Compile the kernel that mixes ingredients of dtype `source` into `output`.

    Gives its symbol and its object file; `cpu.Mixer` says how it is called. About a second.
    """
    kernel = _compile(numbers(source), numbers(output))
    # What numba itself keeps in its cache; the wrapper is a plain C function.
    _, _, (content, _) = kernel._library.serialize_using_object_code()
    return kernel._wrapper_name, content


@numba.njit(forceinline=True)
def _mean_small(
    inputs: Any, k: int, m: int, sums: Any, ends: Any, y: Any, word: Any, row: Any
) -> Any:
    """Give the means `y` of `k` 16- or 8-bit floats, by way of sums in float32 that are exact.

    Also says how far magnitudes went beyond what is finite; and before that, whether it did
    anything: not where many elements need float64. `inputs` holds `k` addresses, and others of -0,
    which changes neither sums nor ranges.
    """
    way, nbits, fraction, bias, largest, overflow, nan = row
    # Magnitudes that lie within 2^d are multiples of one unit, below 2^(fraction + 1 + d) of it. If
    # `k` of them stay below 2^24, each of their sums is a float32.
    n_doublings = 0
    while (1 << n_doublings) < k:
        n_doublings += 1
    limit = (23 - fraction - n_doublings) << fraction
    # Sums of bfloat16 must not overflow: `_MOST` of the magnitudes below this do not.
    huge = min(largest + 1, (254 - 7) << 7)
    _sum_small(inputs[: -(-k // 4) * 4], m, sums, ends, word, way, (1 << (nbits - 1)) - 1)
    n_wide = _count_wide(ends, m, word, limit, huge)
    if n_wide > m // 16:
        return False, np.uint64(0)
    # A quotient that is rounded to float32 and then to `y` is rounded as if once. Let h be halfway
    # between two values of `y`: k·h is a float32, so that a sum which is not k·h is more than 2^-24
    # of it away, and its quotient is not rounded to h. (Or k is a power of two, and it is exact.)
    divisor = np.float32(k * (2.0**-8 if bias == 7 else 1.0))  # E4M3: see `widen_small`
    for j in range(m):
        y[j] = word(narrow_small(sums[j] / divisor, way, nbits, fraction, bias))
    worst = np.uint64(0)
    for j in range(m if n_wide else 0):
        if _is_wide(ends, j, word, limit, huge):
            total = widen(numba.carray(pointer(inputs[0], word), (m,))[j], way, nan)
            for i in range(1, k):
                total += widen(numba.carray(pointer(inputs[i], word), (m,))[j], way, nan)
            bits, magnitude = narrow(total / k, way, nbits, fraction, bias, overflow, nan)
            y[j] = word(bits)
            worst = max(worst, magnitude)
    return True, worst


@numba.njit(forceinline=True)
def _sum_small(inputs: Any, m: int, sums: Any, ends: Any, word: Any, way: int, mask: int) -> None:
    """Add up 16- or 8-bit floats in float32, and find the range of each element's magnitudes.

    `inputs` holds addresses, a multiple of four. `ends` becomes the largest magnitude's bits and,
    `BLOCK` further on, one less than those of the smallest that is not zero.
    """
    one, magnitude = word(1), word(mask)
    for j in range(m):
        ends[j] = word(0)
    for j in range(m):
        ends[BLOCK + j] = word(mask * 2 + 1)
    for j in range(m):
        sums[j] = np.float32(-0.0)  # so that -0 stays -0
    for i in range(0, len(inputs), 4):
        x0 = numba.carray(pointer(inputs[i], word), (m,))
        x1 = numba.carray(pointer(inputs[i + 1], word), (m,))
        x2 = numba.carray(pointer(inputs[i + 2], word), (m,))
        x3 = numba.carray(pointer(inputs[i + 3], word), (m,))
        for j in range(m):
            a0, a1 = word(x0[j] & magnitude), word(x1[j] & magnitude)
            a2, a3 = word(x2[j] & magnitude), word(x3[j] & magnitude)
            high = max(max(a0, a1), max(a2, a3))
            low01 = min(word(a0 - one), word(a1 - one))
            low = min(low01, min(word(a2 - one), word(a3 - one)))
            ends[j] = max(high, ends[j])
            ends[BLOCK + j] = min(low, ends[BLOCK + j])
        for j in range(m):
            total = sums[j] + widen_small(x0[j], way)
            total += widen_small(x1[j], way)
            total += widen_small(x2[j], way)
            sums[j] = total + widen_small(x3[j], way)


@numba.njit(forceinline=True)
def _count_wide(ends: Any, m: int, word: Any, limit: int, huge: int) -> int:
    """Count the elements whose magnitudes lie too far apart, or too high, for float32."""
    widest, top = word(0), word(0)
    for j in range(m):
        widest = max(widest, word(ends[j] - word(ends[BLOCK + j] + word(1))))
        top = max(top, ends[j])
    if widest < word(limit) and top < word(huge):
        return 0
    n_wide = 0
    for j in range(m):
        n_wide += _is_wide(ends, j, word, limit, huge)
    return n_wide


@numba.njit(forceinline=True)
def _is_wide(ends: Any, j: int, word: Any, limit: int, huge: int) -> bool:
    return word(ends[j] - word(ends[BLOCK + j] + word(1))) >= word(limit) or ends[j] >= word(huge)


def _compile(source: tuple[int, ...], output: tuple[int, ...]) -> Any:
    """Compile one kernel. It closes over plain numbers only, which are constants to LLVM."""
    way, nbits, _, _, _, _, nan = source
    to_way, to_nbits, to_fraction, to_bias, to_largest, to_overflow, to_nan = output
    word, to_word = WORDS[nbits], WORDS[to_nbits]
    size, to_size = nbits // 8, to_nbits // 8
    small = source == output and nbits <= 16

    # Never ``fastmath``: it reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch. A kernel must not allocate or raise: it is loaded without numba.
    @numba.cfunc(_SIGNATURE, error_model="numpy")
    def mix(
        sums_at: Any,
        addresses_at: Any,
        factors_at: Any,
        scratch_at: Any,
        k: int,
        fresh: int,
        divisor: float,
        output: int,
        n: int,
    ) -> int:
        addresses = numba.carray(pointer(addresses_at, types.int64), (k,))
        factors = numba.carray(pointer(factors_at, types.float64), (k,))
        first = numba.carray(pointer(scratch_at + 8 * BLOCK, types.uint64), (BLOCK,))
        equal = numba.carray(pointer(scratch_at + 16 * BLOCK, types.uint64), (BLOCK,))
        sums32 = numba.carray(pointer(scratch_at, types.float32), (BLOCK,))
        ends = numba.carray(pointer(scratch_at + 8 * BLOCK, word), (2 * BLOCK,))
        zeros = numba.carray(pointer(scratch_at + 16 * BLOCK, word), (BLOCK,))
        inputs = numba.carray(pointer(scratch_at + 20 * BLOCK, types.int64), (_MOST,))
        plain = True
        for i in range(k):
            plain = plain and factors[i] == 1.0
        uniform = plain and divisor == k and fresh != 0 and output != 0
        # For float64 alone the sum of equal values may be inexact: see `reference`.
        identical = nbits == 64 and uniform
        # Multiplying by a power of two's reciprocal is the same correctly rounded quotient.
        reciprocal = 1.0 / divisor
        mantissa = bits64(divisor) & np.uint64((1 << 52) - 1)
        exact = mantissa == np.uint64(0) and abs(divisor) >= 1.0 and abs(divisor) <= 2.0**100
        in_float32 = small and uniform and k <= _MOST
        if in_float32:
            for j in range(BLOCK):
                zeros[j] = word(1 << (nbits - 1))
            for i in range(k, _MOST):
                inputs[i] = scratch_at + 16 * BLOCK
        worst = np.uint64(0)
        for start in range(0, n, BLOCK):
            m = min(BLOCK, n - start)
            if in_float32:
                for i in range(k):
                    inputs[i] = addresses[i] + start * size
                y = numba.carray(pointer(output + start * size, word), (m,))
                # What is wide here will be in the next blocks: they do not try.
                in_float32, magnitude = _mean_small(inputs, k, m, sums32, ends, y, word, source)
                worst = max(worst, magnitude)
                if in_float32:
                    continue
            acc_at = sums_at + 8 * start if sums_at != 0 else scratch_at
            acc = numba.carray(pointer(acc_at, types.float64), (m,))
            i = 0
            if fresh != 0:
                x0 = numba.carray(pointer(addresses[0] + start * size, word), (m,))
                factor = factors[0]
                if plain:
                    for j in range(m):
                        acc[j] = widen(x0[j], way, nan)
                else:
                    for j in range(m):
                        value = widen(x0[j], way, nan)
                        acc[j] = factor * value
                i = 1
            while plain and i + 4 <= k:
                x0 = numba.carray(pointer(addresses[i] + start * size, word), (m,))
                x1 = numba.carray(pointer(addresses[i + 1] + start * size, word), (m,))
                x2 = numba.carray(pointer(addresses[i + 2] + start * size, word), (m,))
                x3 = numba.carray(pointer(addresses[i + 3] + start * size, word), (m,))
                for j in range(m):
                    total = acc[j] + widen(x0[j], way, nan)
                    total += widen(x1[j], way, nan)
                    total += widen(x2[j], way, nan)
                    acc[j] = total + widen(x3[j], way, nan)
                i += 4
            while i < k:
                x0 = numba.carray(pointer(addresses[i] + start * size, word), (m,))
                factor = factors[i]
                for j in range(m):
                    acc[j] += factor * widen(x0[j], way, nan)
                i += 1
            if output == 0:
                continue
            if divisor != 1.0:
                if exact:
                    for j in range(m):
                        acc[j] *= reciprocal
                else:
                    for j in range(m):
                        acc[j] /= divisor
            if identical:
                x0 = numba.carray(pointer(addresses[0] + start * size, word), (m,))
                for j in range(m):
                    first[j] = x0[j]
                    equal[j] = 0
                for i in range(1, k):
                    x0 = numba.carray(pointer(addresses[i] + start * size, word), (m,))
                    for j in range(m):
                        equal[j] |= np.uint64(x0[j]) ^ first[j]
                for j in range(m):
                    acc[j] = as_float64(first[j]) if equal[j] == 0 else acc[j]
            y = numba.carray(pointer(output + start * to_size, to_word), (m,))
            for j in range(m):
                bits, magnitude = narrow(
                    acc[j], to_way, to_nbits, to_fraction, to_bias, to_overflow, to_nan
                )
                y[j] = to_word(bits)
                worst = max(worst, magnitude)
        return 1 if worst > np.uint64(to_largest) else 0

    return mix
