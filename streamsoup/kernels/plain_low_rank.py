"""The compiled loop of `low_rank`, in numba: plain, to be read beside `low_rank.add_product`."""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["compile_low_rank"]

_F64, _F32, _BF16 = range(3)

_VECTOR = 8
"""Float64 in a vector: LLVM makes two of it where the processor has half."""

WIDTH = 32
"""Columns whose sums are in vectors at once: as many as hide how long a sum takes."""


@intrinsic
def _pointer(typing: Any, address: Any, word: Any) -> Any:
    """Turn an integer into a pointer to words of a type."""
    kind = word.instance_type if isinstance(word, types.TypeRef) else word.dtype
    signature = types.CPointer(kind)(types.int64, word)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def _sum_products(
    typing: Any, sums_at: Any, left_at: Any, right_at: Any, rank: Any, pitch: Any
) -> Any:
    """Put the sums of ``left[k] · right[k, j]`` over k, in order, into `WIDTH` float64.

    The sums stay in vectors while k goes on. All arguments are int64; `pitch` is that of `right`.

    1. Factors of 32 bits and fewer have 24 bits of fraction at most, their product 48, which
       float64 holds; its exponent is within that of float64, too.
    2. So rounding the product, or fusing it with the sum (``contract``), is the same number: the
       processor may do either. NaN and Inf come out alike.
    """
    signature = types.void(*[types.int64] * 5)
    vector = ir.VectorType(ir.DoubleType(), _VECTOR)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums_at, left_at, right_at, rank, pitch = args
        word, double = ir.IntType(64), ir.DoubleType()
        zero = ir.Constant(vector, [0.0] * _VECTOR)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(WIDTH // _VECTOR)]
        for total in totals:  # alloca_once_value writes at the entry only
            builder.store(zero, total)
        with cgutils.for_range(builder, rank, intp=word) as loop:
            at = builder.add(left_at, builder.mul(loop.index, word(8)))
            one = builder.load(builder.inttoptr(at, double.as_pointer()))
            lanes = builder.insert_element(zero, one, ir.IntType(32)(0))
            same = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR), [0] * _VECTOR)
            lanes = builder.shuffle_vector(lanes, zero, same)
            row = builder.add(right_at, builder.mul(builder.mul(loop.index, pitch), word(8)))
            for i, total in enumerate(totals):
                place = builder.add(row, word(8 * _VECTOR * i))
                other = builder.load(builder.inttoptr(place, vector.as_pointer()), align=8)
                product = builder.fmul(lanes, other, flags=("contract",))
                builder.store(
                    builder.fadd(builder.load(total), product, flags=("contract",)), total
                )
        for i, total in enumerate(totals):
            place = builder.add(sums_at, word(8 * _VECTOR * i))
            builder.store(
                builder.load(total), builder.inttoptr(place, vector.as_pointer()), align=8
            )
        return context.get_dummy_value()

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
    row_at = scratch_at + 8 * rank * tile
    sums_at = row_at + 8 * rank
    left = numba.carray(_pointer(row_at, types.float64), (rank,))
    sums = numba.carray(_pointer(sums_at, types.float64), (tile,))
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
            skip = low - first
            for at in range(skip // WIDTH * WIDTH, skip + m, WIDTH):
                _sum_products(sums_at + 8 * at, row_at, scratch_at + 8 * at, rank, tile)
            start = row * columns + low - begin
            out = numba.carray(_pointer(out_at + 8 * start, types.float64), (m,))
            if base_kind == _F64:
                _add(_F64, base_at, start, scale, sums[skip : skip + m], out)
            elif base_kind == _F32:
                _add(_F32, base_at, start, scale, sums[skip : skip + m], out)
            elif base_kind == _BF16:
                _add(_BF16, base_at, start, scale, sums[skip : skip + m], out)
            else:
                _add(3, base_at, start, scale, sums[skip : skip + m], out)
    return 0


def compile_low_rank() -> Any:
    """Compile `low_rank`; return numba's function, with its `address`. Takes seconds."""
    signature = types.int64(types.int64, types.float64)
    # Never ``fastmath``: only the exact products above may be fused. A kernel must not allocate or
    # raise: it is loaded without numba.
    return numba.cfunc(signature, error_model="numpy")(low_rank)
