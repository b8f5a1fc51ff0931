"""What inner products are made of, in LLVM's own words: rows are widened, and then multiplied.

Numba has no vectors, and leaves it to LLVM to find some in loops. Here they are written down: that
takes half the time to compile, and the sums of some rows by some others, some lanes at a time, are
sure to stay in registers, where each number loaded is used several times.
"""

# Numba's decorators and intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streamsoup.kernels.constants import LANES, ROW_PITCH
from streamsoup.kernels.fast.vectors import widen_at
from streamsoup.tensors import DType

__all__ = ["difference", "multiplier"]

_NUMBER = ir.IntType(64)


def _at(builder: Any, address: Any, nbytes: int, kind: ir.Type) -> Any:
    """Point to something some bytes after an address."""
    return builder.inttoptr(builder.add(address, _NUMBER(nbytes)), kind.as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    """Load numbers of float64."""
    value = builder.load(pointer)
    value.align = 8
    return value


class _Shape(NamedTuple):
    """Rows that are multiplied at once with others, and lanes in a register."""

    rows: int
    columns: int
    width: int
    diagonal: bool
    """Both sides are the same, and pairs are those of ``j >= i``."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """List the pairs of rows, in the order in which their lanes lie in memory."""
        return [
            (i, j) for i in range(self.rows) for j in range(i if self.diagonal else 0, self.columns)
        ]


def _accumulate(shape: _Shape, builder: Any, args: Any, group: Any) -> None:
    """Multiply the lanes of a group, as many as fit a register; their sums lie side by side."""
    x_at, y_at, n, sums_at, fresh, _, _ = args
    pairs, width = shape.pairs, shape.width
    vector = ir.VectorType(ir.DoubleType(), width)
    first = builder.add(sums_at, builder.mul(group, _NUMBER(8 * width * len(pairs))))
    # Places on the stack, which LLVM turns into registers.
    sums = [cgutils.alloca_once(builder, vector) for _ in pairs]
    with builder.if_else(cgutils.is_null(builder, fresh)) as (then, otherwise):
        with then:
            for p, total in enumerate(sums):
                before = _load(builder, _at(builder, first, 8 * width * p, vector))
                builder.store(before, total)
        with otherwise:
            for total in sums:
                builder.store(ir.Constant(vector, None), total)
    with cgutils.for_range(builder, n) as row:
        begin = builder.mul(group, _NUMBER(8 * width))
        begin = builder.add(begin, builder.mul(row.index, _NUMBER(8 * LANES)))

        def some(address: Any, count: int) -> list[Any]:
            at = builder.add(address, begin)
            places = [_at(builder, at, 8 * ROW_PITCH * i, vector) for i in range(count)]
            return [_load(builder, place) for place in places]

        xs = some(x_at, shape.rows)
        ys = xs if shape.diagonal else some(y_at, shape.columns)
        for (i, j), total in zip(pairs, sums, strict=True):
            # Two roundings: LLVM fuses only what it is told to.
            product = builder.fmul(xs[i], ys[j])
            builder.store(builder.fadd(builder.load(total), product), total)
    for p, total in enumerate(sums):
        place = _at(builder, first, 8 * width * p, vector)
        builder.store(builder.load(total), place).align = 8


def _fold(shape: _Shape, builder: Any, args: Any) -> None:
    """Add the upper half of the lanes of each pair onto the lower, until one is left."""
    _, _, _, sums_at, _, out_at, pitch = args
    pairs, width = shape.pairs, shape.width
    vector = ir.VectorType(ir.DoubleType(), width)
    for p, (i, j) in enumerate(pairs):
        places = [8 * width * (len(pairs) * group + p) for group in range(LANES // width)]
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


def multiplier(rows: int, columns: int, width: int, *, diagonal: bool = False) -> Any:
    """Return a function that multiplies a tile of `rows` rows with one of `columns`.

    It takes the addresses of the first row of either side, and how many times `LANES` elements to
    multiply; the address of the sums of all lanes, and whether they begin at zero; and, for the
    last tile of a grain, where the first product goes, and how far those of a row are from those
    of the next, less one for each row that is passed; 0 before. With `diagonal` both sides are
    the same, and pairs are those of ``j >= i``.
    """
    shape = _Shape(rows, columns, width, diagonal)

    @intrinsic
    def multiply(
        typing: Any, x_at: Any, y_at: Any, n: Any, sums_at: Any, fresh: Any, out_at: Any, pitch: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with cgutils.for_range(builder, _NUMBER(LANES // width)) as group:
                _accumulate(shape, builder, args, group.index)
            with builder.if_then(cgutils.is_not_null(builder, args[5])):
                _fold(shape, builder, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


def difference(dtype: DType, width: int) -> Any:
    """Return a function that widens elements and takes others off; it counts what is not zero.

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
                    value = builder.fsub(widen_at(builder, raw, dtype, step), less)
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
