"""Means of 16- and 8-bit floats in numba, by way of float32, wherever that is exact.

Twice the elements of float64 fit a register, and little is needed to widen: the fields of a small
float, put where those of a float32 are, are its value times a power of two, subnormals too. It is
seen how far apart the values of each element lie; those too far apart are summed anew in float64.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.constants import MEAN_TILE, MEAN_VECTOR, SCRATCH, STREAMS
from streamsoup.kernels.fast.prefetching import FORESEEN, IS_ZEN, prefetch
from streamsoup.kernels.fast.vectors import (
    Vector,
    as_vector,
    below,
    concatenated,
    first_half,
    lacks,
    larger,
    load,
    reaches,
    second_half,
    shifted_signed,
    smaller,
    splat,
    store,
)
from streamsoup.kernels.plain import WORDS, narrow, numbers, pointer, widen
from streamsoup.tensors import DType

__all__ = ["MOST", "mean_of", "no_mean"]

MOST = 64
"""Ingredients whose mean may be taken in float32: beyond, little would be exact."""

SLOW_SUBNORMALS = not IS_ZEN
"""True if a subnormal quotient takes much longer than others: on Intel's processor 25 to 50 ns for
a vector with some. On AMD's it was not measured by itself; float16 at its full rate there had one
in a quarter of all vectors."""

_SIGN, _MAGNITUDE, _ONE, _LIFT = 1 << 31, (1 << 31) - 1, 1 << 23, 64 << 23
"""Of a float32: its sign, all but that, one of its exponent, and the exponent of 2^64."""

_SINGLES, _FIELDS = Vector(types.float32, MEAN_VECTOR), Vector(types.uint32, MEAN_VECTOR)


def mean_of(dtype: DType) -> Any:
    """Return the loop that takes the means of a tile of a 16- or 8-bit dtype."""
    size, fraction = dtype.itemsize, dtype.fraction or 0
    assert (4 + 2 * size) * MEAN_TILE <= 8 * SCRATCH, "sums, highs and spans of a tile"
    word: Any = WORDS[dtype.nbits]
    words = Vector(word, MEAN_VECTOR)

    add, divided, redo = _adder(dtype), _divider(dtype), _redoer(dtype)
    mask = (1 << (dtype.nbits - 1)) - 1
    always_near, huge = _is_always_near(dtype), _huge(dtype)

    @numba.njit(forceinline=True, error_model="numpy")
    def mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
        """Put the means of `n` elements, `offset` bytes into the ingredients, at `y_at`.

        `n` is a multiple of `MEAN_VECTOR`. Returns whether it did: not where many elements need
        float64. Returns as well whether one of the few that did is not finite.
        """
        k = len(addresses)
        # Magnitudes within 2^d are multiples of one unit, below 2^(fraction + 1 + d) of it. If `k`
        # of them stay below 2^24, each of their sums is a float32.
        n_doublings = 0
        while (1 << n_doublings) < k:
            n_doublings += 1
        limit = word(mask if always_near else min((23 - fraction - n_doublings) << fraction, mask))
        n_far, beyond = 0, False
        highs_at = scratch_at + 4 * MEAN_TILE
        lows_at = highs_at + size * MEAN_TILE
        for first in range(0, k, STREAMS):
            last = min(first + STREAMS, k)
            for at in range(0, n * size, MEAN_VECTOR * size):
                sums_at = scratch_at + 4 // size * at
                # The largest magnitude; one less than the smallest that is not zero.
                sums: Any = splat(np.float32(-0.0), _SINGLES)  # zeros keep their sign
                high, low = splat(word(0), words), splat(word(2 * mask + 1), words)
                if first > 0:
                    sums = load(sums_at, _SINGLES)
                    high, low = load(highs_at + at, words), load(lows_at + at, words)
                for i in range(first, last):
                    sums, high, low = add(addresses[i] + (offset + at), k, sums, high, low)
                if last < k:
                    store(sums_at, sums)
                    store(highs_at + at, high)
                    store(lows_at + at, low)
                    continue
                store(y_at + at, divided(sums, k))
                span = high if always_near else high - (low + word(1))
                if reaches(span, limit) or reaches(high, huge):
                    store(highs_at + at, high)
                    store(lows_at + at, span)
                    here, bad = redo(
                        addresses, offset + at, highs_at + at, lows_at + at, y_at + at, limit
                    )
                    n_far, beyond = n_far + here, beyond or bad
                    if n_far > n // 16:
                        return False, False
        return True, beyond

    return mean


@numba.njit(forceinline=True)
def no_mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
    """Stand in for the loop of `mean_of` where there is none: it never does it."""
    return False, False


def _is_always_near(dtype: DType) -> bool:
    """Return whether no values lie too far apart.

    E4M3 are multiples of 2^-9 below 2^9: sums of `MOST` of them stay within 2^24 multiples.
    """
    return dtype.name == "F8_E4M3"


def _huge(dtype: DType) -> Any:
    """Return the magnitude from which sums need float64: of what is not finite, or may overflow.

    Sums of `MOST` of bfloat16's magnitudes below it do not.
    """
    word: Any = WORDS[dtype.nbits]
    return word(min(dtype.largest + 1, (254 - 6) << 7))


def _adder(dtype: DType) -> Any:
    """Return what adds a vector of an ingredient to sums, and to the extremes of magnitudes."""
    size = dtype.itemsize
    word: Any = WORDS[dtype.nbits]
    words = Vector(word, MEAN_VECTOR)
    mask = (1 << (dtype.nbits - 1)) - 1
    always_near = _is_always_near(dtype)
    apart, _ = _conversions(dtype.nbits, dtype.fraction or 0)

    @numba.njit(inline="always")
    def add(x_at: int, k: int, sums: Any, high: Any, low: Any) -> Any:
        x: Any = load(x_at, words)
        if k > FORESEEN:
            for line in range(0, MEAN_VECTOR * size, 64):
                prefetch(x_at + MEAN_TILE * size + line)
        magnitude = x & word(mask)
        high = larger(high, magnitude)
        if not always_near:
            low = smaller(low, magnitude - word(1))
        return sums + as_vector(apart(x), _SINGLES), high, low

    return add


def _divider(dtype: DType) -> Any:
    """Return what divides float32 sums by `k`, and rounds the quotients to a dtype.

    A quotient that is rounded to float32 and then to the dtype is rounded as if once:

    1. Rounding to the dtype changes only at the points halfway between two of its values. Let h be
       one: it has at most 12 significant bits, and k·h at most 18, so both are float32.
    2. Let s be a sum that is not k·h. If k is a power of two, s/k is a float32, and there is
       nothing to show. Otherwise k·h is none, and the float32 next to it, on either side, are a
       2^-23 of its own power of two away: s/k is more than a 2^-24 of h away from h.
    3. That is more than half the spacing of float32 at h. So s/k is not rounded to h; nor beyond
       it, as rounding keeps order. It stays on its side of every h, and s/k = h stays h.
    4. Where the quotient is subnormal in float32, the spacing is 2^-149. There the elements, k·h
       and s are multiples of half the dtype's own spacing, which is 2^-134 or more (bfloat16), or
       2^-137 (float16, in the fields of a float32): s/k is at least a 64th of that away from h,
       which is more than two roundings to multiples of 2^-149 move it.
    """
    fraction = dtype.fraction or 0
    _, together = _conversions(dtype.nbits, fraction)
    careful = SLOW_SUBNORMALS and dtype.name != "BF16"  # whose subnormals are below 10^-38

    @numba.njit(forceinline=True)
    def narrowed(bits: Any) -> Any:
        # Half to even: just below half of the last kept place is added, plus its parity; a carry
        # runs into the exponent.
        parity = (bits >> np.uint32(23 - fraction)) & np.uint32(1)
        return together(bits + np.uint32((1 << (22 - fraction)) - 1) + parity)

    @numba.njit(forceinline=True, error_model="numpy")
    def quotient(sums: Any, k: int) -> Any:
        # If k is a power of two, multiplying by its reciprocal is the same, and takes no time.
        divisor = np.float32(k)
        reciprocal = np.float32(1.0) / divisor
        return sums * reciprocal if k & (k - 1) == 0 else sums / divisor

    @numba.njit(forceinline=True, error_model="numpy")
    def divided(sums: Any, k: int) -> Any:
        bits: Any = as_vector(sums, _FIELDS)
        # If the exponent field of every sum is at least this, no quotient by k is subnormal. All
        # are powers of two, so that one look at the bits above tells; of a zero, it is too careful.
        exponent = 1 if k == 1 else 2 if k == 2 else 4 if k <= 8 else 8
        if not careful or not lacks(bits, np.uint32((256 - exponent) << 23)):
            return narrowed(as_vector(quotient(sums, k), _FIELDS))
        # All are taken 2^64 times as large, of whose exponent `together` keeps nothing. A one
        # put before a subnormal's fraction, and subtracted, makes a number of it like any other;
        # added to a quotient that shall be subnormal, it leaves the places that one has.
        magnitude = bits & np.uint32(_MAGNITUDE)
        one = (bits & np.uint32(_SIGN)) | np.uint32(_LIFT + _ONE)
        ones: Any = as_vector(one, _SINGLES)
        from_subnormal = as_vector(as_vector(bits | one, _SINGLES) - ones, _FIELDS)
        large = below(magnitude, np.uint32(_ONE), from_subnormal, bits + np.uint32(_LIFT))
        ratio = quotient(as_vector(large, _SINGLES), k)
        ratio_bits: Any = as_vector(ratio, _FIELDS)
        to_subnormal = as_vector(ratio + ones, _FIELDS) - np.uint32(_ONE)
        normal_from = np.uint32(_LIFT + _ONE)
        is_small = ratio_bits & np.uint32(_MAGNITUDE)
        return narrowed(below(is_small, normal_from, to_subnormal, ratio_bits))

    return divided


def _redoer(dtype: DType) -> Any:
    """Return the loop that takes those means of a vector in float64 whose values lie far apart."""
    row, largest, huge = numbers(dtype), dtype.largest, _huge(dtype)
    word: Any = WORDS[dtype.nbits]

    @numba.njit(error_model="numpy")
    def redo(
        addresses: Any, offset: int, highs_at: int, spans_at: int, y_at: int, limit: Any
    ) -> Any:
        """Return how many there are, and whether one is not finite."""
        highs = numba.carray(pointer(highs_at, word), (MEAN_VECTOR,))
        spans = numba.carray(pointer(spans_at, word), (MEAN_VECTOR,))
        y = numba.carray(pointer(y_at, word), (MEAN_VECTOR,))
        n_far, beyond = 0, False
        for j in range(MEAN_VECTOR):
            if spans[j] >= limit or highs[j] >= huge:
                total = -0.0
                for i in range(len(addresses)):
                    x = numba.carray(pointer(addresses[i] + offset, word), (MEAN_VECTOR,))
                    total += widen(x[j], row)
                code, magnitude = narrow(total / len(addresses), row)
                y[j] = word(code)
                n_far, beyond = n_far + 1, beyond or magnitude > np.uint64(largest)
        return n_far, beyond

    return redo


def _conversions(nbits: int, fraction: int) -> tuple[Any, Any]:
    """Return what puts the fields of `MEAN_VECTOR` small floats into float32s, and takes them out.

    Between the two, elements are in an order of their own.
    """
    drop = 9 + fraction - nbits  # exponent bits that float32 has more
    if nbits == 16:
        return _step(types.uint16, types.uint32, drop)
    # 8 bits to those of a bfloat16, and those to a float32: fewer instructions than at once.
    to_brain, from_brain = _step(types.uint8, types.uint16, drop)
    to_single, from_single = _step(types.uint16, types.uint32, 0)

    @numba.njit(forceinline=True)
    def apart(x: Any) -> Any:
        return to_single(to_brain(x))

    @numba.njit(forceinline=True)
    def together(x: Any) -> Any:
        return from_brain(from_single(x))

    return apart, together


def _step(element: Any, wide: Any, drop: int) -> tuple[Any, Any]:
    """Return what puts small floats into the upper halves of words, and takes them out again.

    There the exponent has `drop` more bits. Neighbours are read as one word, and come to lie half a
    vector from each other, so that nothing need be moved from register to register.
    """
    width, small, words = (
        element.bitwidth,
        Vector(element, MEAN_VECTOR),
        Vector(wide, MEAN_VECTOR // 2),
    )
    sign, magnitude = 1 << (2 * width - 1), (1 << (width - 1)) - 1

    @numba.njit(forceinline=True)
    def apart(x: Any) -> Any:
        # The sign stays; what is copied of it on the way is cut off.
        keep = wide(sign | magnitude << (width - drop))
        second: Any = as_vector(x, words)
        first = second << wide(width)
        return concatenated(
            shifted_signed(first, wide(drop)) & keep, shifted_signed(second, wide(drop)) & keep
        )

    @numba.njit(forceinline=True)
    def together(x: Any) -> Any:
        x = ((x << wide(drop)) & wide(magnitude << width)) | (x & wide(sign))
        return as_vector((first_half(x) >> wide(width)) | second_half(x), small)

    return apart, together
