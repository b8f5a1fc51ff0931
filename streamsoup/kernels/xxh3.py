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

from streamsoup.kernels.bits import FORESEEN, pointer, prefetch
from streamsoup.kernels.leaf_digests import SECRET, STRIDE
from streamsoup.kernels.vectors import Vector, load, neighbours, store

__all__ = ["end", "take"]

_STRIPE = 64
"""Bytes that are taken at once, each eight with a part of the secret that moves on by as many."""

_AHEAD = 2 * STRIDE
"""Bytes from what is digested to what is asked for meanwhile: sums are one stretch further, and
have asked for the next. Intel, eight ingredients of bfloat16 from memory: 16 to 19 GB/s; three or
four strides ahead are no better than none."""

_PRIME32 = np.uint64(0x9E3779B1)
_PRIME64, _OTHER_PRIME64 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
_AVALANCHE = np.uint64(0x165667919E3779F9)
_LOW = np.uint64(0xFFFFFFFF)

_SUMS = Vector(types.uint64, 8)


@intrinsic
def _folded(typing: Any, left: Any, right: Any) -> Any:
    """Multiply, and give the upper half of the 128 bits with the lower one: exclusive or."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, double = ir.IntType(64), ir.IntType(128)
        product = builder.mul(*(builder.zext(each, double) for each in args))
        upper = builder.trunc(builder.lshr(product, double(64)), word)
        return builder.xor(upper, builder.trunc(product, word))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _backwards(typing: Any, word: Any) -> Any:
    """Give the bytes of a word in reverse."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return types.uint64(types.uint64), generate


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
        for n in range(STRIDE // _STRIPE):
            if FORESEEN == 0:
                prefetch(x_at + _STRIPE * n + _AHEAD)
            sums = _with_stripe(sums, x_at + _STRIPE * n, secret_at + 8 * n)
        sums = sums ^ (sums >> np.uint64(47)) ^ load(secret_at + len(SECRET) - 64, _SUMS)
        sums = sums * _PRIME32
        x_at += STRIDE
    store(state_at, sums)


@numba.njit
def end(x_at: int, n: int, n_taken: int, state_at: int, secret_at: int) -> None:
    """Take what is left of a block of `n` bytes, and make the digest if it is the leaf's last."""
    state = numba.carray(pointer(state_at, types.uint64), (26,))
    is_last = np.uint64(n) == state[25]
    n_whole = (n - 1) // STRIDE * STRIDE if is_last else n
    take(x_at + n_taken, x_at + n_whole, state_at, secret_at)
    state[25] -= np.uint64(n)
    if not is_last:
        store(state_at + 64, load(x_at + n - _STRIPE, _SUMS))
        return
    sums: Any = load(state_at, _SUMS)
    for s in range((n - n_whole - 1) // _STRIPE):
        sums = _with_stripe(sums, x_at + n_whole + _STRIPE * s, secret_at + 8 * s)
    last_at = x_at + n - _STRIPE
    if n < _STRIPE:  # some of the last stripe came with the block before
        rest = numba.carray(pointer(x_at, types.uint8), (_STRIPE,))
        after = numba.carray(pointer(state_at + 128, types.uint8), (_STRIPE,))
        for j in range(n):
            after[j] = rest[j]
        last_at = state_at + 64 + n
    store(state_at, _with_stripe(sums, last_at, secret_at + len(SECRET) - 71))
    low = _merged(state, secret_at + 11, state[24] * _PRIME64)
    high = _merged(state, secret_at + len(SECRET) - 75, ~(state[24] * _OTHER_PRIME64))
    state[0], state[1] = _backwards(high), _backwards(low)


@numba.njit(forceinline=True)
def _merged(state: Any, key_at: int, start: Any) -> Any:
    keys = numba.carray(pointer(key_at, types.uint64), (8,))
    total = start
    for i in range(0, 8, 2):
        total += _folded(state[i] ^ keys[i], state[i + 1] ^ keys[i + 1])
    total ^= total >> np.uint64(37)
    total *= _AVALANCHE
    return total ^ (total >> np.uint64(32))
