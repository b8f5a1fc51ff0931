"""Vectors in numba: a type whose arithmetic LLVM does in registers, however wide those are.

A loop over ingredients that keeps sums in registers has neighbours in memory only outside of it,
where LLVM does not look for vectors. So they are said outright. An operator takes two vectors of
one type, or a vector and a number of the type of its elements, which is put everywhere.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="untyped-decorator,misc,no-untyped-call,no-any-return,import-untyped"

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from streamsoup.tensors import DType

__all__ = [
    "Vector",
    "as_vector",
    "below",
    "concatenated",
    "first_half",
    "lacks",
    "larger",
    "load",
    "neighbours",
    "reaches",
    "second_half",
    "shifted_signed",
    "smaller",
    "splat",
    "store",
    "widen_at",
    "widened",
]

_LLVM = {
    types.uint8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.uint32: ir.IntType(32),
    types.uint64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}


class Vector(types.Type):
    """`n` elements: unsigned integers of 8 to 64 bits, ``float32`` or ``float64``."""

    def __init__(self, element: Any, n: int) -> None:
        """Name the type after what it holds: numba compares types by their names."""
        super().__init__(name=f"vector of {n} {element}")
        self.element, self.n = element, n
        self.llvm = ir.VectorType(_LLVM[element], n)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _everywhere(builder: Any, value: Any, vector: Vector) -> Any:
    """Put a number into every element."""
    nothing = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, _places(0, vector.n, step=0))


def _places(start: int, n: int, step: int = 1) -> Any:
    """Return the places of `n` elements, for LLVM's shuffles."""
    places = [start + step * i for i in range(n)]
    return ir.Constant(ir.VectorType(ir.IntType(32), n), places)


def _teach(function: Callable[..., Any], on_integers: str | None, on_floats: str | None) -> None:
    """Teach numba an operator on vectors, by the names of llvmlite's instructions."""

    @infer_global(function)
    class Operator(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            left, right = args
            if isinstance(left, Vector) and right in (left, left.element):
                return signature(left, left, right)
            return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector, right = sig.args
        name = on_floats if isinstance(vector.element, types.Float) else on_integers
        assert name is not None
        value = args[1] if right == vector else _everywhere(builder, args[1], vector)
        return getattr(builder, name)(args[0], value)

    lower_builtin(function, Vector, Vector)(emit)
    lower_builtin(function, Vector, types.Number)(emit)


_teach(operator.add, "add", "fadd")
_teach(operator.sub, "sub", "fsub")
_teach(operator.mul, "mul", "fmul")
_teach(operator.truediv, None, "fdiv")
_teach(operator.and_, "and_", None)
_teach(operator.or_, "or_", None)
_teach(operator.xor, "xor", None)
_teach(operator.lshift, "shl", None)
_teach(operator.rshift, "lshr", None)


@intrinsic
def load(typing: Any, address: Any, kind: Any) -> Any:
    """Read a vector of a type from an address, which need not be aligned."""
    vector = kind.instance_type

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], vector.llvm.as_pointer()), align=1)

    return vector(types.int64, kind), generate


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """Write a vector to an address, which need not be aligned."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], vector.llvm.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def splat(typing: Any, value: Any, kind: Any) -> Any:
    """Return a vector of a type that holds one number everywhere."""
    vector = kind.instance_type

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _everywhere(builder, args[0], vector)

    return vector(vector.element, kind), generate


@intrinsic
def as_vector(typing: Any, value: Any, kind: Any) -> Any:
    """Read the same bits as a vector of another type."""
    vector = kind.instance_type

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], vector.llvm)

    return vector(value, kind), generate


def _chosen(comparison: str) -> Any:
    @intrinsic
    def chosen(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.icmp_unsigned(comparison, *args), *args)

        return left(left, left), generate

    return chosen


larger, smaller = _chosen(">"), _chosen("<")
"""Element by element, of two vectors of unsigned integers."""


@intrinsic
def below(typing: Any, vector: Any, limit: Any, there: Any, elsewhere: Any) -> Any:
    """Choose elements of `there` where unsigned integers are below `limit`, else `elsewhere`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, bound, *both = args
        is_below = builder.icmp_unsigned("<", values, _everywhere(builder, bound, vector))
        return builder.select(is_below, *both)

    return there(vector, vector.element, there, there), generate


@intrinsic
def reaches(typing: Any, vector: Any, limit: Any) -> Any:
    """Return whether any of the unsigned integers is at least `limit`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        there = builder.icmp_unsigned(">=", args[0], _everywhere(builder, args[1], vector))
        return _any(builder, there)

    return types.boolean(vector, vector.element), generate


@intrinsic
def lacks(typing: Any, vector: Any, mask: Any) -> Any:
    """Return whether any of the unsigned integers has no bit of `mask`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.and_(args[0], _everywhere(builder, args[1], vector))
        return _any(builder, builder.icmp_unsigned("==", bits, ir.Constant(vector.llvm, None)))

    return types.boolean(vector, vector.element), generate


def _any(builder: Any, there: Any) -> Any:
    """Return whether any of some booleans is true."""
    kind = ir.FunctionType(ir.IntType(1), [there.type])
    name = f"llvm.vector.reduce.or.v{there.type.count}i1"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [there])


@intrinsic
def shifted_signed(typing: Any, vector: Any, n: Any) -> Any:
    """Shift right by `n` bits, and fill up with the sign."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ashr(args[0], _everywhere(builder, args[1], vector))

    return vector(vector, vector.element), generate


def _half(which: int) -> Any:
    @intrinsic
    def half(typing: Any, vector: Any) -> Any:
        n = vector.n // 2

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.shuffle_vector(args[0], args[0], _places(which * n, n))

        return Vector(vector.element, n)(vector), generate

    return half


first_half, second_half = _half(0), _half(1)


@intrinsic
def neighbours(typing: Any, vector: Any) -> Any:
    """Return the elements, each in the place of its neighbour: 1, 0, 3, 2 and so on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = ir.VectorType(ir.IntType(32), vector.n)([i ^ 1 for i in range(vector.n)])
        return builder.shuffle_vector(args[0], args[0], places)

    return vector(vector), generate


@intrinsic
def concatenated(typing: Any, first: Any, second: Any) -> Any:
    """Return the elements of two vectors of one type, one after the other."""
    both = Vector(first.element, 2 * first.n)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.shuffle_vector(*args, _places(0, both.n))

    return both(first, first), generate


def widen_at(builder: Any, address: Any, dtype: DType, n: int) -> Any:
    """Load `n` elements of a dtype and give their values in float64, exactly, as `bits.widen`."""

    def many(kind: ir.Type) -> Any:
        return ir.VectorType(kind, n)

    def each(value: int | float, kind: ir.Type) -> Any:
        return ir.Constant(many(kind), [value] * n)

    half, single, double = ir.HalfType(), ir.FloatType(), ir.DoubleType()
    word16, word32 = ir.IntType(16), ir.IntType(32)
    stored = {"F64": double, "F32": single, "F16": half}.get(dtype.name, ir.IntType(dtype.nbits))
    x = builder.load(builder.inttoptr(address, many(stored).as_pointer()), align=1)
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


def widened(dtype: DType, n: int) -> Any:
    """Make a function that loads `n` elements from an address, with their values in float64."""

    @intrinsic
    def load_widened(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            # A register at a time, so that none need be taken apart.
            step = ir.IntType(64)(8 * dtype.itemsize)
            at, parts = args[0], []
            for _ in range(n // 8):
                parts.append(widen_at(builder, at, dtype, 8))
                at = builder.add(at, step)
            while len(parts) > 1:
                places = _places(0, 2 * parts[0].type.count)
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [builder.shuffle_vector(*pair, places) for pair in pairs]
            return parts[0]

        return Vector(types.float64, n)(types.int64), generate

    return load_widened
