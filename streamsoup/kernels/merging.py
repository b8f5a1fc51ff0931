"""Merges of task vectors in compiled loops, with the bits of numpy.

Each stands beside the numpy it replaces in `engine.rules`: counting digits of magnitudes, making
products of what is kept, adding up what agrees. Elements come as numba sees them: bfloat16 as
``uint16``, float16 as ``int16``, float32 and float64 as they are. Loops run without the GIL, and
numba keeps them in its ordinary cache; what is compiled stands in this file alone.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,untyped-decorator,no-untyped-call,misc,no-any-return"
# mypy: disable-error-code="import-untyped,no-untyped-def"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

__all__ = ["collect", "count", "elect", "largest", "random_words", "task", "within"]

ABSOLUTE = np.uint64(0x7FFFFFFFFFFFFFFF)
INFINITE = np.uint64(0x7FF0000000000000)
NAN = np.uint64(0x7FF8000000000000)
MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
TILE = 1024


def _wide(x: Any) -> float:
    """Return an element as float64, exactly."""
    raise NotImplementedError


@overload(_wide)
def _widen(x):
    if x == types.uint16:  # bfloat16
        return lambda x: np.float64(np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32))
    if x == types.int16:  # float16

        def half(x):
            # In the fields of a float32 it is the value times 2**-112, subnormals too.
            word = np.uint32(np.uint16(x))
            magnitude = np.uint32(word & np.uint32(0x7FFF))
            sign = np.uint32((word >> np.uint32(15)) << np.uint32(31))
            moved = np.uint32((magnitude << np.uint32(13)) | sign).view(np.float32)
            value = moved * np.uint32(0x77800000).view(np.float32)
            beyond = (
                np.uint32(0x7F800000) if magnitude == np.uint32(0x7C00) else np.uint32(0x7FC00000)
            )
            above = np.uint32(beyond | sign).view(np.float32)
            return np.float64(above if magnitude >= np.uint32(0x7C00) else value)

        return half
    return lambda x: np.float64(x)


@numba.njit(forceinline=True)
def _task(value: float, base: float) -> float:
    """Return dᵢ: 0 where both are the same, infinite ones too."""
    return 0.0 if value == base else value - base


@numba.njit(forceinline=True)
def _key(d: float) -> Any:
    """Return the bits of a magnitude; all NaN are one."""
    return NAN if d != d else np.float64(d).view(np.uint64) & ABSOLUTE


@numba.njit(nogil=True, cache=True)
def count(base, other, prefix, shift, counts):
    """Count the 16 bits above `shift` of the magnitudes whose bits above those are `prefix`.

    Fills `counts` ``(65536,) int32``; returns True if an element is not finite.
    """
    bad = False
    for j in range(len(base)):
        a, b = _wide(base[j]), _wide(other[j])
        bad |= not (abs(a) < np.inf and abs(b) < np.inf)
        key = _key(_task(b, a))
        if shift == 48 or key >> np.uint64(shift + 16) == prefix:
            counts[(key >> np.uint64(shift)) & np.uint64(0xFFFF)] += 1
    return bad


@numba.njit(nogil=True, cache=True)
def collect(base, other, prefix, shift, keys, indices):
    """Find the magnitudes whose bits above `shift` are `prefix`, and where they are.

    Fills ``keys (found,)`` and ``indices (found,) uint64``; returns how many there are, found or
    not, and True if an element is not finite.
    """
    n, bad = 0, False
    for j in range(len(base)):
        a, b = _wide(base[j]), _wide(other[j])
        bad |= not (abs(a) < np.inf and abs(b) < np.inf)
        key = _key(_task(b, a))
        if key >> np.uint64(shift) == prefix:
            if n < len(keys):
                keys[n], indices[n] = key, j
            n += 1
    return n, bad


@numba.njit(nogil=True, cache=True)
def largest(base, other, threshold, n_tied, factor, coefficient, out):
    """Make products of magnitudes above a threshold, or equal to it among the first `n_tied`.

    Fills ``out (element,)``; returns True if an element is not finite.
    """
    bad = False
    for j in range(len(base)):
        a, b = _wide(base[j]), _wide(other[j])
        bad |= not (abs(a) < np.inf and abs(b) < np.inf)
        d = _task(b, a)
        key = _key(d)
        kept = key > threshold or (key == threshold and j < n_tied)
        out[j] = (d if kept else 0.0) * factor * coefficient
    return bad


@numba.njit(nogil=True, cache=True)
def within(base, other, drawn, limit, factor, coefficient, out):
    """Make products where the random words `drawn` ``(element,) uint32`` lie below `limit`.

    Fills ``out (element,)``; returns True if an element is not finite.
    """
    bad = False
    for j in range(len(base)):
        a, b = _wide(base[j]), _wide(other[j])
        bad |= not (abs(a) < np.inf and abs(b) < np.inf)
        d = _task(b, a)
        out[j] = (d if np.uint64(drawn[j]) < limit else 0.0) * factor * coefficient
    return bad


@numba.njit(nogil=True, cache=True)
def task(base, other, out):
    """Fill ``out (element,)`` with dᵢ; return True if an element is not finite."""
    bad = False
    for j in range(len(base)):
        a, b = _wide(base[j]), _wide(other[j])
        bad |= not (abs(a) < np.inf and abs(b) < np.inf)
        out[j] = _task(b, a)
    return bad


@numba.njit(nogil=True, cache=True)
def elect(base, products, coefficients, consensus, normalize, whole, scale, out):
    """Fill ``out (element,)`` with the base and the sum of ``products (ingredient, element)``.

    `whole` divides it where it is to be normalized without a consensus.
    """
    total, moved, divisor = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for begin in range(0, len(base), TILE):
        n = min(TILE, len(base) - begin)
        moved[:] = 0.0
        for i in range(len(products)):
            row = products[i, begin : begin + n]
            for j in range(n):
                moved[j] += row[j]
        if consensus:
            total[:] = moved
            moved[:] = 0.0
            divisor[:] = 0.0
            for i in range(len(products)):
                row, w = products[i, begin : begin + n], coefficients[i]
                for j in range(n):
                    sign = 1.0 if total[j] >= 0 else -1.0
                    agrees = row[j] * sign > 0
                    moved[j] += row[j] if agrees else 0.0
                    divisor[j] += w if agrees else 0.0
            if normalize:
                for j in range(n):
                    moved[j] /= 1.0 if divisor[j] == 0 else divisor[j]
            for j in range(n):
                moved[j] = moved[j] if total[j] == total[j] else np.nan
        elif normalize:
            for j in range(n):
                moved[j] /= whole
        if scale != 1.0:
            for j in range(n):
                moved[j] *= scale
        for j in range(n):
            start = _wide(base[begin + j])
            out[begin + j] = start if moved[j] == 0 else start + moved[j]


@numba.njit(nogil=True, cache=True)
def random_words(low, high, first, out):
    """Fill ``out (counter, 4) uint32`` with the words of Philox4x32-10 from a counter on."""
    for j in range(len(out)):
        index = np.uint64(first) + np.uint64(j)
        a, b = index & MASK, index >> HALF
        c, d = np.uint64(0), np.uint64(0)
        k, m = np.uint64(low), np.uint64(high)
        for _ in range(10):
            p = a * np.uint64(0xD2511F53)
            q = c * np.uint64(0xCD9E8D57)
            a, b = (q >> HALF) ^ b ^ k, q & MASK
            c, d = (p >> HALF) ^ d ^ m, p & MASK
            k = (k + np.uint64(0x9E3779B9)) & MASK
            m = (m + np.uint64(0xBB67AE85)) & MASK
        out[j, 0], out[j, 1] = np.uint32(a), np.uint32(b)
        out[j, 2], out[j, 3] = np.uint32(c), np.uint32(d)
