"""xxh3-128 in numba, of bytes that lie in a cache just then, as they are summed there.

States are those of `leaf_digests`. Inputs are long ones: shorter ones are digested otherwise
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, "XXH3 Algorithm").
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,misc,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streamsoup.kernels.bits import FORESEEN, prefetch
from streamsoup.kernels.leaf_digests import SECRET, STRIDE, STRIPE
from streamsoup.kernels.vectors import Vector, load, neighbours, splat, store

__all__ = ["end", "take"]

_AHEAD = 2 * STRIDE
"""Bytes from what is digested to what is asked for meanwhile: sums are one stretch further, and
have asked for the next. Intel, eight ingredients of bfloat16 from memory: 16 to 19 GB/s; three or
four strides ahead are no better than none."""

_PRIME32 = np.uint64(0x9E3779B1)
_PRIME64, _OTHER_PRIME64 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
_AVALANCHE = np.uint64(0x165667919E3779F9)
_LOW = np.uint64(0xFFFFFFFF)

_SUMS, _WORD = Vector(types.uint64, 8), Vector(types.uint64, 1)


@intrinsic
def _folded(typing: Any, vector: Any) -> Any:
    """Multiply neighbours, and add up the upper halves of the products ^ the lower ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, double, total = ir.IntType(64), ir.IntType(128), ir.IntType(64)(0)
        for i in range(0, vector.n, 2):
            pair = (builder.extract_element(args[0], ir.IntType(32)(i + j)) for j in (0, 1))
            product = builder.mul(*(builder.zext(each, double) for each in pair))
            upper = builder.trunc(builder.lshr(product, double(64)), word)
            total = builder.add(total, builder.xor(upper, builder.trunc(product, word)))
        return total

    return vector.element(vector), generate


@numba.njit(forceinline=True)
def _with_stripe(sums: Any, x_at: int, key_at: int) -> Any:
    words: Any = load(x_at, _SUMS)
    mixed = words ^ load(key_at, _SUMS)
    return sums + (neighbours(words) + (mixed & _LOW) * (mixed >> np.uint64(32)))


@numba.njit
def take(x_at: int, end_at: int, state_at: int, secret_at: int) -> None:
    """Take what lies between two addresses: whole strides, and not the last bytes of a leaf."""
    sums: Any = load(state_at, _SUMS)
    while x_at < end_at:
        for n in range(STRIDE // STRIPE):
            if FORESEEN == 0:
                prefetch(x_at + STRIPE * n + _AHEAD)
            sums = _with_stripe(sums, x_at + STRIPE * n, secret_at + 8 * n)
        sums = sums ^ (sums >> np.uint64(47)) ^ load(secret_at + len(SECRET) - 64, _SUMS)
        sums = sums * _PRIME32
        x_at += STRIDE
    store(state_at, sums)


@numba.njit
def end(x_at: Any, end_at: int, nbytes: int, state_at: int, secret_at: int) -> None:
    """Take the rest of a block, and end the digest of `nbytes` in all if that is not 0."""
    n = end_at - x_at
    n_strides = n if nbytes == 0 else (n - 1) // STRIDE * STRIDE
    take(x_at, x_at + n_strides, state_at, secret_at)
    if nbytes == 0:
        return
    sums: Any = load(state_at, _SUMS)
    for s in range((n - n_strides - 1) // STRIPE):
        sums = _with_stripe(sums, x_at + n_strides + STRIPE * s, secret_at + 8 * s)
    sums = _with_stripe(sums, end_at - STRIPE, secret_at + len(SECRET) - 71)
    length = np.uint64(nbytes)
    low = _merged(sums, secret_at + 11, length * _PRIME64)
    high = _merged(sums, secret_at + len(SECRET) - 75, ~(length * _OTHER_PRIME64))
    store(state_at, splat(low, _WORD))
    store(state_at + 8, splat(high, _WORD))


@numba.njit(forceinline=True)
def _merged(sums: Any, key_at: int, start: Any) -> Any:
    total = start + _folded(sums ^ load(key_at, _SUMS))
    total = (total ^ (total >> np.uint64(37))) * _AVALANCHE
    return total ^ (total >> np.uint64(32))
