"""Vectors in numba: a type whose arithmetic LLVM does in registers, however wide those are.

A loop over ingredients that keeps sums in registers has neighbours in memory only outside of it,
where LLVM does not look for vectors. So they are said outright. An operator takes two vectors of
one type, or a vector and a number of the type of its elements, which is put everywhere.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="untyped-decorator,misc,no-untyped-call,no-any-return,import-untyped"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "Vector",
    "as_vector",
    "concatenated",
    "first_half",
    "larger",
    "load",
    "reaches",
    "second_half",
    "shifted_signed",
    "smaller",
    "splat",
    "store",
]

_LLVM = {
    types.uint8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.uint32: ir.IntType(32),
    types.float32: ir.FloatType(),
}


class Vector(types.Type):
    """`n` elements of ``uint8``, ``uint16``, ``uint32`` or ``float32``."""

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
    """Give the places of `n` elements, for LLVM's shuffles."""
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
        name = on_floats if vector.element == types.float32 else on_integers
        assert name is not None
        value = args[1] if right == vector else _everywhere(builder, args[1], vector)
        return getattr(builder, name)(args[0], value)

    lower_builtin(function, Vector, Vector)(emit)
    lower_builtin(function, Vector, types.Number)(emit)


_teach(operator.add, "add", "fadd")
_teach(operator.sub, "sub", "fsub")
_teach(operator.mul, None, "fmul")
_teach(operator.truediv, None, "fdiv")
_teach(operator.and_, "and_", None)
_teach(operator.or_, "or_", None)
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
    """Give a vector of a type that holds one number everywhere."""
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
def reaches(typing: Any, vector: Any, limit: Any) -> Any:
    """Whether any of the unsigned integers is at least `limit`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        there = builder.icmp_unsigned(">=", args[0], _everywhere(builder, args[1], vector))
        kind = ir.FunctionType(ir.IntType(1), [there.type])
        name = f"llvm.vector.reduce.or.v{vector.n}i1"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [there])

    return types.boolean(vector, vector.element), generate


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
def concatenated(typing: Any, first: Any, second: Any) -> Any:
    """Give the elements of two vectors of one type, one after the other."""
    both = Vector(first.element, 2 * first.n)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.shuffle_vector(*args, _places(0, both.n))

    return both(first, first), generate
