"""xxh3-128 in numba, of bytes that lie in a cache as they have just been summed.

States are those of `leaf_digests`. Inputs are long ones: shorter ones are digested otherwise
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, "XXH3 Algorithm").

Digests are those of the bytes in memory after the call, of the result too:

1. `mix` digests elements only after it has summed them, and stored what they became.
2. LLVM moves no load across a store to memory that may be the same. The addresses here are plain
   integers, about which it knows nothing: every store may be to what is loaded afterwards.
3. A prefetch may be of bytes that are not stored yet. It is no load: caches are coherent.
4. Ingredients are read twice within a tile. A file that changes in between is found by the checks
   of its identity after the pass, not here.
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

from streamsoup.kernels.constants import (
    SCRAMBLE_NBYTES,
    SECRET_NBYTES,
    STATE_NBYTES,
    STRIPE_NBYTES,
)
from streamsoup.kernels.fast.prefetching import FORESEEN, prefetch
from streamsoup.kernels.fast.vectors import Vector, load, neighbours, splat, store

__all__ = ["digester"]

_AHEAD = 2 * SCRAMBLE_NBYTES
"""Bytes from what is digested to what is prefetched meanwhile: sums are one tile further, and have
prefetched the next. Intel, eight ingredients of bfloat16 from memory: 16 to 19 GB/s; three or four
times as far is no better than none."""

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
def _take(x_at: int, end_at: int, state_at: int, secret_at: int) -> None:
    """Digest what lies between two addresses: whole scrambles, and not the last bytes of a leaf."""
    sums: Any = load(state_at, _SUMS)
    while x_at < end_at:
        for n in range(SCRAMBLE_NBYTES // STRIPE_NBYTES):
            if FORESEEN == 0:
                prefetch(x_at + STRIPE_NBYTES * n + _AHEAD)
            sums = _with_stripe(sums, x_at + STRIPE_NBYTES * n, secret_at + 8 * n)
        sums = sums ^ (sums >> np.uint64(47)) ^ load(secret_at + SECRET_NBYTES - 64, _SUMS)
        sums = sums * _PRIME32
        x_at += SCRAMBLE_NBYTES
    store(state_at, sums)


@numba.njit
def _end(x_at: Any, end_at: int, nbytes: int, state_at: int, secret_at: int) -> None:
    """Digest the rest of a block, and end a digest of `nbytes` in all if that is not 0."""
    n = end_at - x_at
    whole = n if nbytes == 0 else (n - 1) // SCRAMBLE_NBYTES * SCRAMBLE_NBYTES
    _take(x_at, x_at + whole, state_at, secret_at)
    if nbytes == 0:
        return
    sums: Any = load(state_at, _SUMS)
    for s in range((n - whole - 1) // STRIPE_NBYTES):
        sums = _with_stripe(sums, x_at + whole + STRIPE_NBYTES * s, secret_at + 8 * s)
    sums = _with_stripe(sums, end_at - STRIPE_NBYTES, secret_at + SECRET_NBYTES - 71)
    length = np.uint64(nbytes)
    low = _merged(sums, secret_at + 11, length * _PRIME64)
    high = _merged(sums, secret_at + SECRET_NBYTES - 75, ~(length * _OTHER_PRIME64))
    store(state_at, splat(low, _WORD))
    store(state_at + 8, splat(high, _WORD))


@numba.njit(forceinline=True)
def _merged(sums: Any, key_at: int, start: Any) -> Any:
    total = start + _folded(sums ^ load(key_at, _SUMS))
    total = (total ^ (total >> np.uint64(37))) * _AVALANCHE
    return total ^ (total >> np.uint64(32))


def digester(size: int, to_size: int) -> tuple[Any, Any, int]:
    """Return two loops over all ingredients, whose elements have `size` bytes, and the result.

    The first digests the elements between two places, which are multiples of the third value; the
    second digests the rest of a block of `n` elements, and ends the digests of `leaf` in all
    if that is not 0.
    """

    @numba.njit(inline="always")
    def digest(table: Any, k: int, begin: int, end: int, states_at: int, secret_at: int) -> None:
        for i in range(len(table)):
            unit = size if i < k else to_size
            x_at, state_at = table[i], states_at + i * STATE_NBYTES
            _take(x_at + begin * unit, x_at + end * unit, state_at, secret_at)

    @numba.njit(inline="always")
    def digest_end(
        table: Any, k: int, begin: int, n: int, leaf: int, states_at: int, secret_at: int
    ) -> None:
        for i in range(len(table)):
            unit = size if i < k else to_size
            x_at, state_at = table[i], states_at + i * STATE_NBYTES
            _end(x_at + begin * unit, x_at + n * unit, leaf * unit, state_at, secret_at)

    return digest, digest_end, SCRAMBLE_NBYTES // min(size, to_size)
