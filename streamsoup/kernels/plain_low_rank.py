"""The compiled loop of `low_rank`, in numba: plain, to be read beside `low_rank.add_product`.

What is compiled stands in this file alone, as numba's cache looks at no other.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

__all__ = ["compile_low_rank"]

_F64, _F32, _BF16 = range(3)

_AT_ONCE = 8
"""Terms that are added while a sum is in a register."""


@intrinsic
def _pointer(typing: Any, address: Any, word: Any) -> Any:
    """Turn an integer into a pointer to words of a type."""
    kind = word.instance_type if isinstance(word, types.TypeRef) else word.dtype
    signature = types.CPointer(kind)(types.int64, word)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def _plus_exact(typing: Any, total: Any, one: Any, other: Any) -> Any:
    """Return ``total + one · other`` where the product is exact.

    1. Factors of 32 bits and fewer have 24 bits of fraction at most, their product 48, which
       float64 holds; its exponent is within that of float64, too.
    2. So rounding the product, or fusing it with the sum, is the same number: the processor may do
       either. NaN and Inf come out alike.
    """
    signature = types.float64(types.float64, types.float64, types.float64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[1], args[2], flags=("contract",))
        return builder.fadd(args[0], product, flags=("contract",))

    return signature, generate


@numba.njit(inline="always")
def _value(kind: int, at: int, i: int) -> float:
    """Return element `i` of an array at an address."""
    if kind == _F64:
        return _pointer(at, types.float64)[i]
    if kind == _F32:
        return np.float64(_pointer(at, types.float32)[i])
    bits = np.uint32(_pointer(at, types.uint16)[i])
    if kind == _BF16:
        return np.float64(np.uint32(bits << np.uint32(16)).view(np.float32))
    # Float16: in the fields of a float32 it is the value times 2^-112, subnormals too.
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    scale = np.uint32(0x77800000).view(np.float32)
    value = np.uint32(magnitude | sign).view(np.float32) * scale
    beyond = np.uint32(magnitude | sign | np.uint32(0x7F800000)).view(np.float32)
    return np.float64(beyond if magnitude >= np.uint32(0x0F800000) else value)


@numba.njit(inline="always")
def _add(kind: int, at: int, start: int, scale: float, sums: Any, out: Any) -> None:
    """Put elements from `start` on of an array, plus `scale` times sums, into `out`."""
    for j in range(len(sums)):
        out[j] = _value(kind, at, start + j) + scale * sums[j]


def low_rank(table_at: Any, scale: float) -> int:
    """Work as `low_rank.Compiled` describes it, on the arguments in its table."""
    t = numba.carray(_pointer(table_at, types.int64), (18,))
    out_at, base_at, base_kind, begin, n, columns, rank, tile, scratch_at = (
        *(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]),
    )
    left_at, left_kind, left_step, left_k = t[9], t[10], t[11], t[12]
    right_at, right_kind, right_step, right_k = t[13], t[14], t[15], t[16]
    right = numba.carray(_pointer(scratch_at, types.float64), (rank, tile))
    left = numba.carray(_pointer(scratch_at + 8 * rank * tile, types.float64), (rank,))
    sums = numba.carray(_pointer(scratch_at + 8 * rank * (tile + 1), types.float64), (tile,))
    end = begin + n
    for first in range(0, columns, tile):
        last = min(columns, first + tile)
        for k in range(rank):
            for j in range(last - first):
                right[k, j] = _value(right_kind, right_at, k * right_k + (first + j) * right_step)
        for row in range(begin // columns, (end - 1) // columns + 1):
            low = max(first, begin - row * columns)
            m = min(last, end - row * columns) - low
            if m <= 0:
                continue
            for k in range(rank):
                left[k] = _value(left_kind, left_at, row * left_step + k * left_k)
            sums[:m] = 0.0
            skip = low - first
            k = 0
            while k + _AT_ONCE <= rank:
                x0, x1, x2, x3 = left[k], left[k + 1], left[k + 2], left[k + 3]
                x4, x5, x6, x7 = left[k + 4], left[k + 5], left[k + 6], left[k + 7]
                for j in range(m):
                    total = _plus_exact(sums[j], x0, right[k, skip + j])
                    total = _plus_exact(total, x1, right[k + 1, skip + j])
                    total = _plus_exact(total, x2, right[k + 2, skip + j])
                    total = _plus_exact(total, x3, right[k + 3, skip + j])
                    total = _plus_exact(total, x4, right[k + 4, skip + j])
                    total = _plus_exact(total, x5, right[k + 5, skip + j])
                    total = _plus_exact(total, x6, right[k + 6, skip + j])
                    sums[j] = _plus_exact(total, x7, right[k + 7, skip + j])
                k += _AT_ONCE
            while k < rank:
                x0 = left[k]
                for j in range(m):
                    sums[j] = _plus_exact(sums[j], x0, right[k, skip + j])
                k += 1
            start = row * columns + low - begin
            out = numba.carray(_pointer(out_at + 8 * start, types.float64), (m,))
            if base_kind == _F64:
                _add(_F64, base_at, start, scale, sums[:m], out)
            elif base_kind == _F32:
                _add(_F32, base_at, start, scale, sums[:m], out)
            elif base_kind == _BF16:
                _add(_BF16, base_at, start, scale, sums[:m], out)
            else:
                _add(3, base_at, start, scale, sums[:m], out)
    return 0


def compile_low_rank() -> Any:
    """Compile `low_rank`, or load it from numba's cache; return numba's function."""
    signature = types.int64(types.int64, types.float64)
    # Never ``fastmath``: only the exact products above may be fused.
    try:
        return numba.cfunc(signature, error_model="numpy", cache=True)(low_rank)
    except RuntimeError:  # no place that is writable
        return numba.cfunc(signature, error_model="numpy")(low_rank)
