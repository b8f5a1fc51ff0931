"""What inner products are made of, in LLVM's own words: rows widened, and tiles multiplied.

Numba has no vectors, and leaves it to LLVM to find some in loops. Here they are written down: that
takes half the time to compile, and the sums of a *tile*, some rows by some others, some lanes at a
time, are sure to stay in registers, where each number loaded is used several times.
"""

# Numba's decorators and intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streamsoup.kernels.inner import LANES, STRIDE
from streamsoup.tensors import DType

__all__ = ["difference", "tile"]

_NUMBER = ir.IntType(64)


def _at(builder: Any, address: Any, nbytes: int, kind: ir.Type) -> Any:
    """Point to something some bytes after an address."""
    return builder.inttoptr(builder.add(address, _NUMBER(nbytes)), kind.as_pointer())


def _load(builder: Any, pointer: Any, align: int = 8) -> Any:
    """Load what may lie anywhere."""
    value = builder.load(pointer)
    value.align = align
    return value


def tile(rows: int, columns: int, width: int, *, diagonal: bool = False) -> Any:
    """Make a function that multiplies a chunk of `rows` rows with one of `columns`.

    It takes the addresses of the first row of either side, and how many times `LANES` elements to
    multiply; the address of the sums of all lanes, and whether they begin at zero; and, for the
    last chunk of a grain, where the first product goes, and how far those of a row are from those
    of the next, less one for each row that is passed; 0 before. With `diagonal` both sides are
    the same, and pairs are those of ``j >= i``.
    """
    pairs = [(i, j) for i in range(rows) for j in range(i if diagonal else 0, columns)]
    n_groups = LANES // width
    vector = ir.VectorType(ir.DoubleType(), width)

    def accumulate(builder: Any, args: Any, group: Any) -> None:
        """Multiply the lanes of a group, whose sums lie side by side."""
        x_at, y_at, n, sums_at, fresh, _, _ = args
        first = builder.add(sums_at, builder.mul(group, _NUMBER(8 * width * len(pairs))))
        zero = ir.Constant(vector, None)
        # Places on the stack, which LLVM turns into registers.
        sums = [cgutils.alloca_once(builder, vector) for _ in pairs]
        with builder.if_else(cgutils.is_null(builder, fresh)) as (then, otherwise):
            with then:
                for p, total in enumerate(sums):
                    before = _load(builder, _at(builder, first, 8 * width * p, vector))
                    builder.store(before, total)
            with otherwise:
                for total in sums:
                    builder.store(zero, total)
        with cgutils.for_range(builder, n) as row:
            begin = builder.mul(group, _NUMBER(8 * width))
            begin = builder.add(begin, builder.mul(row.index, _NUMBER(8 * LANES)))

            def some(address: Any, count: int) -> list[Any]:
                at = builder.add(address, begin)
                places = [_at(builder, at, 8 * STRIDE * i, vector) for i in range(count)]
                return [_load(builder, place) for place in places]

            xs = some(x_at, rows)
            ys = xs if diagonal else some(y_at, columns)
            for (i, j), total in zip(pairs, sums, strict=True):
                # Two roundings: LLVM fuses only what it is told to.
                product = builder.fmul(xs[i], ys[j])
                builder.store(builder.fadd(builder.load(total), product), total)
        for p, total in enumerate(sums):
            place = _at(builder, first, 8 * width * p, vector)
            builder.store(builder.load(total), place).align = 8

    def fold(builder: Any, args: Any) -> None:
        """Add the upper half of the lanes of each pair onto the lower, until one is left."""
        _, _, _, sums_at, _, out_at, pitch = args
        for p, (i, j) in enumerate(pairs):
            places = [8 * width * (len(pairs) * group + p) for group in range(n_groups)]
            lanes = [_load(builder, _at(builder, sums_at, place, vector)) for place in places]
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [builder.fadd(lanes[g], lanes[half + g]) for g in range(half)]
            (left,), half = lanes, width // 2
            while half:
                mask = [
                    ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(n, n + half)))
                    for n in (0, half)
                ]
                lower, upper = (builder.shuffle_vector(left, left, each) for each in mask)
                left, half = builder.fadd(lower, upper), half // 2
            place = builder.add(out_at, builder.mul(pitch, _NUMBER(i)))
            at = _at(builder, place, 8 * (j - i * (i - 1) // 2), ir.DoubleType())
            builder.store(builder.extract_element(left, ir.IntType(32)(0)), at)

    @intrinsic
    def multiply(
        typing: Any, x_at: Any, y_at: Any, n: Any, sums_at: Any, fresh: Any, out_at: Any, pitch: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with cgutils.for_range(builder, _NUMBER(n_groups)) as group:
                accumulate(builder, args, group.index)
            with builder.if_then(cgutils.is_not_null(builder, args[5])):
                fold(builder, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


def _widened(builder: Any, x_at: Any, dtype: DType, width: int) -> Any:
    """Load some elements and give their values in float64, exactly, as `bits.widen` does."""

    def many(kind: ir.Type) -> Any:
        return ir.VectorType(kind, width)

    def each(value: int | float, kind: ir.Type) -> Any:
        return ir.Constant(many(kind), [value] * width)

    half, single, double = ir.HalfType(), ir.FloatType(), ir.DoubleType()
    word16, word32 = ir.IntType(16), ir.IntType(32)
    stored = {"F64": double, "F32": single, "F16": half}.get(dtype.name, ir.IntType(dtype.nbits))
    x = _load(builder, _at(builder, x_at, 0, many(stored)), align=1)
    if dtype.name == "F64":
        return x
    if dtype.name == "BF16":
        x = builder.shl(builder.zext(x, many(word32)), each(16, word32))
        x = builder.bitcast(x, many(single))
    elif dtype.name == "F16":
        x = builder.fpext(x, many(single))
    elif dtype.name == "F8_E5M2":  # the upper byte of a float16
        x = builder.shl(builder.zext(x, many(word16)), each(8, word16))
        x = builder.fpext(builder.bitcast(x, many(half)), many(single))
    elif dtype.name == "F8_E4M3":
        # In the fields of a float16 it is 2^-8 of its value, subnormals too; 0x7F alone is NaN.
        byte = builder.zext(x, many(word16))
        sign = builder.shl(builder.and_(byte, each(0x80, word16)), each(8, word16))
        magnitude = builder.and_(byte, each(0x7F, word16))
        fields = builder.or_(sign, builder.shl(magnitude, each(7, word16)))
        x = builder.fpext(builder.bitcast(fields, many(half)), many(single))
        x = builder.fmul(x, each(256.0, single))
        is_nan = builder.icmp_unsigned("==", magnitude, each(dtype.nan, word16))
        x = builder.select(is_nan, each(math.nan, single), x)
    return builder.fpext(x, many(double))


def difference(dtype: DType, width: int) -> Any:
    """Make a function that widens elements and takes others off; it counts what is not zero.

    It takes the addresses of raw elements, of a row of float64 to take off, and of the result;
    and how many elements there are.
    """

    @intrinsic
    def subtract(typing: Any, x_at: Any, less_at: Any, y_at: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_at, less_at, y_at, n = args
            counter = cgutils.alloca_once_value(builder, _NUMBER(0))
            done: Any = _NUMBER(0)
            # As many at a time as registers hold, and the rest one by one.
            for step in (width, 1):
                vector = ir.VectorType(ir.DoubleType(), step)
                many = builder.udiv(builder.sub(n, done), _NUMBER(step))
                with cgutils.for_range(builder, many) as loop:
                    index = builder.add(done, builder.mul(loop.index, _NUMBER(step)))
                    raw = builder.add(x_at, builder.mul(index, _NUMBER(dtype.itemsize)))
                    place = builder.mul(index, _NUMBER(8))
                    less = _load(builder, _at(builder, builder.add(less_at, place), 0, vector))
                    value = builder.fsub(_widened(builder, raw, dtype, step), less)
                    at = _at(builder, builder.add(y_at, place), 0, vector)
                    builder.store(value, at).align = 8
                    changed = builder.fcmp_unordered("!=", value, ir.Constant(vector, None))
                    bits = builder.zext(builder.bitcast(changed, ir.IntType(step)), _NUMBER)
                    count = builder.add(builder.load(counter), builder.ctpop(bits))
                    builder.store(count, counter)
                done = builder.mul(many, _NUMBER(step))
            return builder.load(counter)

        return types.int64(*[types.int64] * 4), generate

    return subtract
