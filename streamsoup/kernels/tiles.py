"""Inner products in numba and LLVM: the order of `inner`, as fast as a processor multiplies.

A chunk of all rows is widened to float64; then a *tile* of rows is multiplied with another, some
lanes at a time: their sums stay in registers, and each number loaded is used several times. Sums
of all lanes wait in memory for the next chunk, and are folded at the end of a grain.
"""

# Numba's decorators and intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streamsoup.kernels.bits import pointer
from streamsoup.kernels.inner import CHUNK, GRAIN, KINDS, LANES, STRIDE, STRIP
from streamsoup.tensors import DTYPES, DType

__all__ = ["compile_products"]

_SIGNATURE = types.int64(*[types.int64] * 10)


def compile_products() -> tuple[str, bytes]:
    """Compile the kernel; `inner.Products` says how it is called. Seconds.

    Gives its symbol and its object file.
    """
    # Registers: 32 of 8 lanes, or 16 of 4 or fewer.
    wide = bool(llvm.get_host_cpu_features().get("avx512f"))
    kernel = _compile(STRIP, 8) if wide else _compile(STRIP - 1, 4)
    # What numba itself keeps in its cache; the wrapper is a plain C function.
    _, _, (content, _) = kernel._library.serialize_using_object_code()
    return kernel._wrapper_name, content


_NUMBER = ir.IntType(64)


def _at(builder: Any, address: Any, nbytes: int, kind: ir.Type) -> Any:
    """Point to something some bytes after an address."""
    return builder.inttoptr(builder.add(address, _NUMBER(nbytes)), kind.as_pointer())


def _load(builder: Any, pointer: Any, align: int = 8) -> Any:
    """Load what may lie anywhere."""
    value = builder.load(pointer)
    value.align = align
    return value


def _tile(rows: int, columns: int, width: int, *, diagonal: bool = False) -> Any:
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
    def tile(
        typing: Any, x_at: Any, y_at: Any, n: Any, sums_at: Any, fresh: Any, out_at: Any, pitch: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with cgutils.for_range(builder, _NUMBER(n_groups)) as group:
                accumulate(builder, args, group.index)
            with builder.if_then(cgutils.is_not_null(builder, args[5])):
                fold(builder, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


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


def _difference(dtype: DType, width: int) -> Any:
    """Make a function that widens elements and takes others off; it counts what is not zero.

    It takes the addresses of raw elements, of a row of float64 to take off, and of the result;
    and how many elements there are.
    """

    @intrinsic
    def difference(typing: Any, x_at: Any, less_at: Any, y_at: Any, n: Any) -> Any:
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

    return difference


@numba.njit(error_model="numpy")
def _move_to_mean(rows_at: int, mean_at: int, n_rows: int, n: int) -> None:
    """Measure rows from their mean, and the first, to which they were differences, too."""
    # From differences to the first to differences to the mean: equal ones stay equal.
    mean = numba.carray(pointer(mean_at, types.float64), (n,))
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + 8 * STRIDE * r, types.float64), (n,))
        if r == 1:
            for i in range(n):
                mean[i] = row[i]
        else:
            for i in range(n):
                mean[i] += row[i]
    for i in range(n):
        mean[i] /= n_rows - 1
    for r in range(1, n_rows):
        row = numba.carray(pointer(rows_at + 8 * STRIDE * r, types.float64), (n,))
        for i in range(n):
            row[i] -= mean[i]
    first = numba.carray(pointer(rows_at, types.float64), (n,))
    for i in range(n):
        first[i] += mean[i]


def _compile(strip: int, width: int) -> Any:
    """Compile the kernel for tiles of `strip` rows by as many, `width` lanes at a time."""
    square = _tile(strip, strip, width)
    corner = _tile(strip, strip, width, diagonal=True)
    column, row, single = (_tile(*s, width) for s in ((strip, 1), (1, strip), (1, 1)))
    f64, f32, bf16, f16, e5m2, e4m3 = (_difference(DTYPES[name], width) for name in KINDS)
    row_nbytes, lanes_nbytes = 8 * STRIDE, 8 * LANES

    @numba.njit(error_model="numpy")
    def fill(at: int, kind: int, begin: int, less_at: int, y_at: int, n: int) -> Any:
        if kind == 0:
            return f64(at + 8 * begin, less_at, y_at, n)
        if kind == 1:
            return f32(at + 4 * begin, less_at, y_at, n)
        if kind == 2:
            return bf16(at + 2 * begin, less_at, y_at, n)
        if kind == 3:
            return f16(at + 2 * begin, less_at, y_at, n)
        if kind == 4:
            return e5m2(at + begin, less_at, y_at, n)
        return e4m3(at + begin, less_at, y_at, n)

    @numba.njit(error_model="numpy")
    def multiply(
        rows_at: int, n_rows: int, upper: int, n: int, sums_at: int, fresh: int, out_at: int
    ) -> None:
        """Multiply the first rows, `upper` of `n_rows`, with themselves and all after them."""
        at, to = sums_at, out_at
        for i in range(0, upper, strip):
            x_at = rows_at + row_nbytes * i
            if i + strip > n_rows:  # the last rows, pair by pair
                for a in range(i, n_rows):
                    for b in range(a, n_rows):
                        x, y = rows_at + row_nbytes * a, rows_at + row_nbytes * b
                        single(x, y, n, at, fresh, to, 0)
                        at += lanes_nbytes
                        to += 8 if to != 0 else 0
                return
            pitch = 8 * (n_rows - i - 1)
            corner(x_at, x_at, n, at, fresh, to, pitch)
            at += lanes_nbytes * (strip * (strip + 1) // 2)
            j = i + strip
            while j < n_rows:
                y_at = rows_at + row_nbytes * j
                beside = to + 8 * (j - i) if to != 0 else 0
                if j + strip <= n_rows:
                    square(x_at, y_at, n, at, fresh, beside, pitch)
                    at += lanes_nbytes * strip * strip
                    j += strip
                else:
                    column(x_at, y_at, n, at, fresh, beside, pitch)
                    at += lanes_nbytes * strip
                    j += 1
            to += strip * pitch + 8 * (strip - strip * (strip - 1) // 2) if to != 0 else 0

    @numba.njit(error_model="numpy")
    def multiply_first(
        rows_at: int, n_rows: int, n: int, sums_at: int, fresh: int, out_at: int
    ) -> None:
        """Multiply the first row with all others."""
        j = 1
        while j < n_rows:
            y_at, at = rows_at + row_nbytes * j, sums_at + lanes_nbytes * (j - 1)
            to = out_at + 8 * (j - 1) if out_at != 0 else 0
            if j + strip <= n_rows:
                row(rows_at, y_at, n, at, fresh, to, 0)
                j += strip
            else:
                single(rows_at, y_at, n, at, fresh, to, 0)
                j += 1

    # Never ``fastmath``: it reorders sums. A kernel must not allocate or raise: it is loaded
    # without numba.
    @numba.cfunc(_SIGNATURE, error_model="numpy")
    def products(
        addresses_at: Any,
        kinds_at: Any,
        n_rows: int,
        reference: int,
        to_mean: int,
        n: int,
        scratch_at: Any,
        room: int,
        out_at: Any,
        n_values: int,
    ) -> int:
        addresses = numba.carray(pointer(addresses_at, types.int64), (n_rows,))
        kinds = numba.carray(pointer(kinds_at, types.int64), (n_rows,))
        # Scratch, from a cache line on: zeros, a mean, rows, lanes of pairs, counts.
        zeros_at = (scratch_at + 63) // 64 * 64
        mean_at = zeros_at + 8 * CHUNK
        rows_at = mean_at + 8 * CHUNK
        sums_at = rows_at + row_nbytes * n_rows
        zeros = numba.carray(pointer(zeros_at, types.float64), (CHUNK,))
        for i in range(CHUNK):
            zeros[i] = 0.0
        less_at = rows_at + row_nbytes * reference
        for grain in range(0, n, GRAIN):
            end = min(grain + GRAIN, n)
            row_at = out_at + 8 * n_values * (grain // GRAIN)
            top, done = 0, 0
            # As many strips at once as lanes of their pairs have room.
            while top < n_rows:
                bottom, n_pairs = top, 0
                while bottom < n_rows:
                    m = min(strip, n_rows - bottom)
                    more = m * (n_rows - bottom) - m * (m - 1) // 2
                    if reference > 0:
                        m, more = n_rows, n_rows - 1
                    if n_pairs > 0 and n_pairs + more > room:
                        break
                    n_pairs += more
                    bottom += m
                counts_at = row_at + 8 * (n_values - n_rows + 1)
                counts = numba.carray(pointer(counts_at, types.float64), (n_rows - 1,))
                if reference == 0:
                    for r in range(n_rows - 1):
                        counts[r] = 0.0
                for begin in range(grain, end, CHUNK):
                    m = min(CHUNK, end - begin)
                    for r in range(n_rows):
                        y_at = rows_at + row_nbytes * r
                        less = less_at if r > reference else zeros_at
                        changed = fill(addresses[r], kinds[r], begin, less, y_at, m)
                        if reference == 0 and r > 0:
                            counts[r - 1] += changed
                    if to_mean != 0:
                        _move_to_mean(rows_at, mean_at, n_rows, m)
                    whole = (m + LANES - 1) // LANES
                    if m % LANES != 0:
                        for r in range(n_rows):
                            y_at = rows_at + row_nbytes * r
                            y = numba.carray(pointer(y_at, types.float64), (CHUNK,))
                            for i in range(m, whole * LANES):
                                y[i] = 0.0
                    fresh = 1 if begin == grain else 0
                    to = row_at + 8 * done if begin + CHUNK >= end else 0
                    if reference == 0:
                        x_at = rows_at + row_nbytes * top
                        multiply(x_at, n_rows - top, bottom - top, whole, sums_at, fresh, to)
                    else:
                        multiply_first(rows_at, n_rows, whole, sums_at, fresh, to)
                done += n_pairs
                top = bottom
        return 0

    return products
