"""Means of 16- and 8-bit floats in numba, by way of float32, wherever that is exact.

Twice the lanes of float64, and less to widen. While a block is added up, it is seen how far apart
the ingredients of each element lie: those that lie too far apart are added up again, in float64.
Meanwhile the next block is on its way from memory.
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
    load_two,
    narrow,
    narrow_small,
    pointer,
    prefetch,
    store_two,
    widen,
)
from streamsoup.kernels.cpu import BLOCK, MOST

__all__ = ["mean", "prepare"]

_HALF = BLOCK // 2
_SUMS, _ENDS, _ZEROS, _SPANS, _INPUTS = 0, 8 * BLOCK, 16 * BLOCK, 20 * BLOCK, 24 * BLOCK
"""Where in the scratch of `cpu.Mixer` things are kept, in bytes."""


@numba.njit(forceinline=True)
def prepare(scratch_at: int, word: Any, nbits: int) -> None:
    """Set up the scratch: as many ingredients of -0, which changes neither sums nor spans."""
    zeros = numba.carray(pointer(scratch_at + _ZEROS, word), (BLOCK,))
    for j in range(BLOCK):
        zeros[j] = word(1 << (nbits - 1))
    inputs = numba.carray(pointer(scratch_at + _INPUTS, types.int64), (MOST,))
    for i in range(MOST):
        inputs[i] = scratch_at + _ZEROS


@numba.njit(forceinline=True)
def mean(
    addresses: Any, offset: int, scratch_at: int, y_at: int, word: Any, two: Any, row: Any
) -> Any:
    """Put the means of `BLOCK` elements, `offset` bytes into the ingredients, at `y_at`.

    Says whether it did: not where many elements need float64. Also says how far the magnitudes of
    those few that did went beyond what is finite. `word` is the type of an element's bits, `two`
    that of two of them (`bits.pair`), `row` what `bits.numbers` gives.
    """
    k = len(addresses)
    way, nbits, fraction, bias, largest, overflow, nan = row
    # Magnitudes that lie within 2^d are multiples of one unit, below 2^(fraction + 1 + d) of it. If
    # `k` of them stay below 2^24, each of their sums is a float32.
    n_doublings = 0
    while (1 << n_doublings) < k:
        n_doublings += 1
    # Sums of bfloat16 must not overflow: `MOST` of the magnitudes below this do not.
    huge = min(largest + 1, (254 - 7) << 7)
    mask = (1 << (nbits - 1)) - 1
    limit = word(min((23 - fraction - n_doublings) << fraction, mask))
    inputs = numba.carray(pointer(scratch_at + _INPUTS, types.int64), (MOST,))
    for i in range(k):
        inputs[i] = addresses[i] + offset
    spans = numba.carray(pointer(scratch_at + _SPANS, word), (BLOCK,))
    sums = numba.carray(pointer(scratch_at + _SUMS, types.float32), (BLOCK,))
    n_wide = 0
    if _add_up(inputs, k, scratch_at, sums, spans, word, two, way, mask, huge) >= limit:
        for j in range(BLOCK):
            n_wide += spans[j] >= limit
        if n_wide > BLOCK // 16:
            return False, np.uint64(0)
    # A quotient that is rounded to float32 and then to `y` is rounded as if once. Let h be halfway
    # between two values of `y`: k·h is a float32, so that a sum which is not k·h is more than 2^-24
    # of it away, and its quotient is not rounded to h. (Or k is a power of two, and it is exact.)
    divisor = np.float32(k * (2.0**-8 if bias == 7 else 1.0))  # E4M3: see `load_two`
    pairs = numba.carray(pointer(y_at, two), (BLOCK,))
    if (1 << n_doublings) == k:  # multiplying by the reciprocal is the same, and takes no time
        reciprocal = np.float32(1.0) / divisor
        for j in range(_HALF):
            low = narrow_small(sums[j] * reciprocal, way, nbits, fraction, bias)
            high = narrow_small(sums[_HALF + j] * reciprocal, way, nbits, fraction, bias)
            store_two(pairs, j, _HALF, low, high, way, nbits)
    else:
        for j in range(_HALF):
            low = narrow_small(sums[j] / divisor, way, nbits, fraction, bias)
            high = narrow_small(sums[_HALF + j] / divisor, way, nbits, fraction, bias)
            store_two(pairs, j, _HALF, low, high, way, nbits)
    worst = np.uint64(0)
    y = numba.carray(pointer(y_at, word), (BLOCK,))
    for j in range(BLOCK if n_wide else 0):
        if spans[j] >= limit:
            total = widen(numba.carray(pointer(inputs[0], word), (BLOCK,))[j], way, nan)
            for i in range(1, k):
                x = numba.carray(pointer(inputs[i], word), (BLOCK,))
                total += widen(x[j], way, nan)
            bits, magnitude = narrow(total / k, way, nbits, fraction, bias, overflow, nan)
            y[j] = word(bits)
            worst = max(worst, magnitude)
    return True, worst


@numba.njit(forceinline=True)
def _add_up(
    inputs: Any,
    k: int,
    scratch_at: int,
    sums: Any,
    spans: Any,
    word: Any,
    two: Any,
    way: int,
    mask: int,
    huge: int,
) -> Any:
    """Add up a block in float32, and find how far apart the magnitudes of each element are.

    Four ingredients at a time, whose blocks are in the first cache when they are looked at again;
    meanwhile their next blocks are asked for. Spans are counted in bits; zeros do not count. Where
    a magnitude reaches `huge`, the span is `mask`. Gives the largest span.
    """
    one, magnitude = word(1), word(mask)
    size = 1 if mask < 256 else 2
    # The largest magnitude; one less than the smallest that is not zero.
    highs = numba.carray(pointer(scratch_at + _ENDS, word), (BLOCK,))
    lows = numba.carray(pointer(scratch_at + _ENDS + size * BLOCK, word), (BLOCK,))
    for j in range(BLOCK):
        highs[j] = word(0)
    for j in range(BLOCK):
        lows[j] = word(2 * mask + 1)
    for j in range(BLOCK):
        sums[j] = np.float32(-0.0)  # so that -0 stays -0
    for i in range(0, k, 4):
        for ahead in range(4):
            for line in range(0, size * BLOCK, 64):
                prefetch(inputs[i + ahead] + size * BLOCK + line)
        x0 = numba.carray(pointer(inputs[i], word), (BLOCK,))
        x1 = numba.carray(pointer(inputs[i + 1], word), (BLOCK,))
        x2 = numba.carray(pointer(inputs[i + 2], word), (BLOCK,))
        x3 = numba.carray(pointer(inputs[i + 3], word), (BLOCK,))
        for j in range(BLOCK):
            a0, a1 = word(x0[j] & magnitude), word(x1[j] & magnitude)
            a2, a3 = word(x2[j] & magnitude), word(x3[j] & magnitude)
            high = max(max(a0, a1), max(a2, a3))
            low = min(word(a0 - one), word(a1 - one))
            low = min(low, min(word(a2 - one), word(a3 - one)))
            highs[j] = max(high, highs[j])
            lows[j] = min(low, lows[j])
        y0 = numba.carray(pointer(inputs[i], two), (BLOCK,))
        y1 = numba.carray(pointer(inputs[i + 1], two), (BLOCK,))
        y2 = numba.carray(pointer(inputs[i + 2], two), (BLOCK,))
        y3 = numba.carray(pointer(inputs[i + 3], two), (BLOCK,))
        for j in range(_HALF):
            low0, high0 = load_two(y0, j, _HALF, way)
            low1, high1 = load_two(y1, j, _HALF, way)
            low2, high2 = load_two(y2, j, _HALF, way)
            low3, high3 = load_two(y3, j, _HALF, way)
            first, second = sums[j] + low0, sums[_HALF + j] + high0
            first, second = first + low1, second + high1
            first, second = first + low2, second + high2
            sums[j], sums[_HALF + j] = first + low3, second + high3
    widest = word(0)
    for j in range(BLOCK):
        span = word(highs[j] - word(lows[j] + one))
        span = magnitude if highs[j] >= word(huge) else span
        spans[j] = span
        widest = max(widest, span)
    return widest
