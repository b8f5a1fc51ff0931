"""The arithmetic of streamsoup, element by element: the specification of every kernel.

Bits are widened to float64, exactly. The sum is taken in float64 in recipe order; each product is
rounded and then added, with no fused multiply-add; a factor of 1 makes the product the value
itself. One true division ends it, and one rounding, to nearest and ties to even, to the output
dtype. Where all ingredients of a uniform soup have the same bits, the result is those bits: for
every dtype up to float32 that follows from the rest, since their sums are exact; for float64 it is
a rule of its own. Every NaN in a result is the one quiet NaN of its dtype.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from streamsoup.tensors import DType

__all__ = ["mix", "narrow", "widen"]


def widen(bits: int, dtype: DType) -> float:
    """Return the value of a bit pattern, exactly.

    >>> from streamsoup.tensors import DTYPES
    >>> widen(0x3FC0, DTYPES["BF16"])
    1.5
    """
    assert dtype.fraction is not None
    sign = -1.0 if bits >> (dtype.nbits - 1) else 1.0
    magnitude = bits & ((1 << (dtype.nbits - 1)) - 1)
    if magnitude > dtype.largest:
        infinite = magnitude == dtype.overflow and dtype.overflow != dtype.nan
        return sign * math.inf if infinite else math.nan
    exponent, fraction = divmod(magnitude, 1 << dtype.fraction)
    if exponent:
        fraction += 1 << dtype.fraction
    return sign * math.ldexp(fraction, max(exponent, 1) - dtype.bias - dtype.fraction)


def narrow(value: float, dtype: DType) -> int:
    """Round a float64 to the nearest value of `dtype`, ties to even, and give its bit pattern.

    >>> from streamsoup.tensors import DTYPES
    >>> hex(narrow(1.00390625, DTYPES["BF16"]))  # a tie: halfway between 0x3f80 and 0x3f81
    '0x3f80'
    """
    assert dtype.fraction is not None
    sign = int(math.copysign(1.0, value) < 0) << (dtype.nbits - 1)
    if math.isnan(value):
        return dtype.nan
    if math.isinf(value):
        return sign | dtype.overflow
    if value == 0:
        return sign
    # The spacing of the output's values around this one; never finer than its subnormals'.
    exponent = max(math.frexp(value)[1] - 1, 1 - dtype.bias)
    multiple = _round_half_even(abs(value), exponent - dtype.fraction)
    magnitude = multiple + ((exponent + dtype.bias - 1) << dtype.fraction)
    return sign | (magnitude if magnitude <= dtype.largest else dtype.overflow)


def mix(
    ingredients: Sequence[Sequence[int]],
    source: DType,
    factors: Sequence[float],
    divisor: float,
    output: DType,
) -> list[int]:
    """Mix bit patterns ``(ingredient, element)`` into those of the soup ``(element,)``."""
    uniform = all(factor == 1.0 for factor in factors) and divisor == len(factors)
    soup = []
    for patterns in zip(*ingredients, strict=True):
        values = [widen(bits, source) for bits in patterns]
        total = factors[0] * values[0]
        for factor, value in zip(factors[1:], values[1:], strict=True):
            total += factor * value
        total = total / divisor
        if uniform and len(set(patterns)) == 1:
            total = values[0]
        soup.append(narrow(total, output))
    return soup


def _round_half_even(value: float, exponent: int) -> int:
    """Round a float64 to a multiple of 2 to the `exponent`, in integers alone."""
    bits = int.from_bytes(struct.pack("<d", value), "little")
    stored, fraction = divmod(bits, 1 << 52)
    significand = fraction + (1 << 52) if stored else fraction
    shift = exponent - (max(stored, 1) - 1075)
    if shift <= 0:
        return significand << -shift
    multiple, rest = divmod(significand, 1 << shift)
    half = 1 << (shift - 1)
    if rest > half or (rest == half and multiple & 1):
        multiple += 1
    return multiple
