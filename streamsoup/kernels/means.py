"""Means of 16- and 8-bit floats in numba, by way of float32, wherever that is exact.

Twice the elements of float64 in a register, and little to widen: the fields of a small float, put
where those of a float32 are, are its value times a power of two, subnormals too. All ingredients of
a few cache lines are added up in registers, and the processor is asked whether it had to round a
sum (`flags`). Where it had, or cannot be asked, it is seen how far apart the values of each element
lie, and what lies too far apart is added up again, in float64.
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
    FORESEEN,
    SLOW_SUBNORMALS,
    WORDS,
    narrow,
    pointer,
    prefetch,
    widen,
)
from streamsoup.kernels.cpu import AT_ONCE, SCRATCH
from streamsoup.kernels.flags import CAN_TELL, forget, rounded
from streamsoup.kernels.vectors import (
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

__all__ = ["GROUP", "MOST", "NO_MEANS", "STRETCH", "means_of"]

MOST = 64
"""Ingredients whose mean may be taken in float32: beyond, little would be exact."""

GROUP = 128
"""Elements at a time. Their sums fill eight registers of 64 bytes; each ingredient moves on by two
cache lines (8 bits) or four (16 bits), which is what the processor sees coming by itself."""

STRETCH = 4 * GROUP
"""Elements of some ingredients before it is the turn of the next, and after which it is seen
whether float32 is worth it."""


_SIGN, _MAGNITUDE, _ONE, _LIFT = 1 << 31, (1 << 31) - 1, 1 << 23, 64 << 23
"""Of a float32: its sign, all but that, one of its exponent, and the exponent of 2^64."""


def means_of(dtype: tuple[int, ...]) -> tuple[Any, Any]:
    """Give the compiled loops for a 16- or 8-bit dtype, as `bits.numbers` describes it.

    The first is the faster, and does it where no sum is rounded; the second where few are.
    """
    way, nbits, fraction, bias, most_finite, overflow, nan = dtype
    size = nbits // 8
    assert (4 + 2 * size) * STRETCH + 4 <= 8 * SCRATCH, "sums, highs and lows of a stretch, a word"
    word: Any = WORDS[nbits]
    words, singles = Vector(word, GROUP), Vector(types.float32, GROUP)
    fields = Vector(types.uint32, GROUP)
    apart, together = _conversions(nbits, fraction)
    mask = (1 << (nbits - 1)) - 1
    # Sums of bfloat16 must not overflow: `MOST` of the magnitudes below this do not.
    huge = min(most_finite + 1, (254 - 6) << 7)
    # E4M3 are multiples of 2^-9 below 2^9: sums of `MOST` of them stay within 2^24 multiples.
    always_near = most_finite == 0x7E
    # In the fields of a float32, what is not finite stays so in bfloat16 alone: sums tell.
    brain = fraction == 7
    careful = SLOW_SUBNORMALS and not brain  # whose subnormals are below 10^-38

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
        # A quotient that is rounded to float32 and then to `y` is rounded as if once. Let h be
        # halfway between two values of `y`: k·h is a float32, so that a sum which is not k·h is
        # more than 2^-24 of it away, and its quotient is not rounded to h; nor where float32 is
        # subnormal, as it then has 12 places more. Or k is a power of two, and it is exact.
        bits: Any = as_vector(sums, fields)
        # If the exponent field of every sum is at least this, no quotient by k is subnormal. All
        # are powers of two, so that one look at the bits above tells; of a zero, it is too careful.
        exponent = 1 if k == 1 else 2 if k == 2 else 4 if k <= 8 else 8
        if not careful or not lacks(bits, np.uint32((256 - exponent) << 23)):
            return narrowed(as_vector(quotient(sums, k), fields))
        # All are taken 2^64 times as large, of whose exponent `together` keeps nothing. A one
        # put before a subnormal's fraction, and subtracted, makes a number of it like any other;
        # added to a quotient that shall be subnormal, it leaves the places that one has.
        magnitude = bits & np.uint32(_MAGNITUDE)
        one = (bits & np.uint32(_SIGN)) | np.uint32(_LIFT + _ONE)
        ones: Any = as_vector(one, singles)
        from_subnormal = as_vector(as_vector(bits | one, singles) - ones, fields)
        large = below(magnitude, np.uint32(_ONE), from_subnormal, bits + np.uint32(_LIFT))
        ratio = quotient(as_vector(large, singles), k)
        ratio_bits: Any = as_vector(ratio, fields)
        to_subnormal = as_vector(ratio + ones, fields) - np.uint32(_ONE)
        is_normal_from = np.uint32(_LIFT + _ONE)
        return narrowed(
            below(ratio_bits & np.uint32(_MAGNITUDE), is_normal_from, to_subnormal, ratio_bits)
        )

    @numba.njit(forceinline=True, error_model="numpy")
    def unrounded_mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
        """Do what `mean` does if no sum is rounded and all is finite; say whether it did."""
        k = len(addresses)
        flags_at = scratch_at + (4 + 2 * size) * STRETCH
        high: Any = splat(word(0), words)
        if not always_near:
            forget(flags_at)
        for first in range(0, k, AT_ONCE):
            for at in range(0, n * size, GROUP * size):
                sums: Any = splat(np.float32(-0.0), singles)  # so that -0 stays -0
                sums_at = scratch_at + 4 // size * at
                if first > 0:
                    sums = load(sums_at, singles)
                for i in range(first, min(first + AT_ONCE, k)):
                    x_at = addresses[i] + (offset + at)
                    x = load(x_at, words)
                    if k > FORESEEN:
                        for line in range(0, GROUP * size, 64):
                            prefetch(x_at + STRETCH * size + line)
                    if not brain:
                        high = larger(high, x & word(mask))
                    sums = sums + as_vector(apart(x), singles)
                store(sums_at, sums)
        if not always_near and rounded(flags_at):
            return False
        for at in range(0, n * size, GROUP * size):
            y = divided(load(scratch_at + 4 // size * at, singles), k)
            if brain:
                high = larger(high, y & word(mask))
            store(y_at + at, y)
        return not reaches(high, word(most_finite + 1))

    @numba.njit(forceinline=True, error_model="numpy")
    def mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
        """Put the means of `n` elements, `offset` bytes into the ingredients, at `y_at`.

        `n` is a multiple of `GROUP`. Says whether it did: not where many elements need float64.
        Also says how far the magnitudes of those few that did went beyond what is finite.
        """
        k = len(addresses)
        # Magnitudes within 2^d are multiples of one unit, below 2^(fraction + 1 + d) of it. If `k`
        # of them stay below 2^24, each of their sums is a float32.
        n_doublings = 0
        while (1 << n_doublings) < k:
            n_doublings += 1
        limit = word(mask if always_near else min((23 - fraction - n_doublings) << fraction, mask))
        n_far, worst = 0, np.uint64(0)
        highs_at = scratch_at + 4 * STRETCH
        lows_at = highs_at + size * STRETCH
        for first in range(0, k, AT_ONCE):
            last = min(first + AT_ONCE, k)
            for at in range(0, n * size, GROUP * size):
                sums: Any = splat(np.float32(-0.0), singles)  # so that -0 stays -0
                # The largest magnitude; one less than the smallest that is not zero.
                high, low = splat(word(0), words), splat(word(2 * mask + 1), words)
                sums_at = scratch_at + 4 // size * at
                if first > 0:
                    sums = load(sums_at, singles)
                    high, low = load(highs_at + at, words), load(lows_at + at, words)
                for i in range(first, last):
                    x_at = addresses[i] + (offset + at)
                    x = load(x_at, words)
                    if k > FORESEEN:
                        for line in range(0, GROUP * size, 64):
                            prefetch(x_at + STRETCH * size + line)
                    magnitude = x & word(mask)
                    high = larger(high, magnitude)
                    if not always_near:
                        low = smaller(low, magnitude - word(1))
                    sums = sums + as_vector(apart(x), singles)
                if last < k:
                    store(sums_at, sums)
                    store(highs_at + at, high)
                    store(lows_at + at, low)
                    continue
                store(y_at + at, divided(sums, k))
                span = high if always_near else high - (low + word(1))
                if reaches(span, limit) or reaches(high, word(huge)):
                    store(highs_at + at, high)
                    store(lows_at + at, span)
                    here, reached = redo(
                        addresses, offset + at, highs_at + at, lows_at + at, y_at + at, limit
                    )
                    n_far, worst = n_far + here, max(worst, reached)
                    if n_far > n // 16:
                        return False, np.uint64(0)
        return True, worst

    @numba.njit(error_model="numpy")
    def redo(
        addresses: Any, offset: int, highs_at: int, spans_at: int, y_at: int, limit: Any
    ) -> Any:
        """Put the means of those elements of a group that lie far apart, and say how many."""
        highs = numba.carray(pointer(highs_at, word), (GROUP,))
        spans = numba.carray(pointer(spans_at, word), (GROUP,))
        y = numba.carray(pointer(y_at, word), (GROUP,))
        n_far, worst = 0, np.uint64(0)
        for j in range(GROUP):
            if spans[j] >= limit or highs[j] >= word(huge):
                total = -0.0
                for i in range(len(addresses)):
                    x = numba.carray(pointer(addresses[i] + offset, word), (GROUP,))
                    total += widen(x[j], way, nan)
                divided = total / len(addresses)
                code, reached = narrow(divided, way, nbits, fraction, bias, overflow, nan)
                y[j] = word(code)
                n_far, worst = n_far + 1, max(worst, reached)
        return n_far, worst

    return (unrounded_mean if CAN_TELL or always_near else _no_unrounded_mean), mean


@numba.njit(forceinline=True)
def _no_unrounded_mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
    return False


@numba.njit(forceinline=True)
def _no_mean(addresses: Any, offset: int, n: int, scratch_at: int, y_at: int) -> Any:
    return False, np.uint64(0)


NO_MEANS = (_no_unrounded_mean, _no_mean)
"""What stands in for the loops of `means_of` where there are none: they never do it."""


def _conversions(nbits: int, fraction: int) -> tuple[Any, Any]:
    """Give what puts the fields of `GROUP` small floats into float32s, and takes them out again.

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
    """Give what puts small floats into the upper halves of words, and takes them out again.

    There the exponent has `drop` more bits. Neighbours are read as one word, and come to lie half a
    vector from each other, so that nothing need be moved from register to register.
    """
    width, small, words = element.bitwidth, Vector(element, GROUP), Vector(wide, GROUP // 2)
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
