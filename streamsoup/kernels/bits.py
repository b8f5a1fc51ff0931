"""Numbers and their bits in numba: what the compiled loops widen, narrow and point with.

A dtype is a row of plain numbers here, which are constants to LLVM: no branch on them is left.
"""

# Numba's decorators and intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streamsoup.tensors import DType

__all__ = [
    "FORESEEN",
    "SLOW_SUBNORMALS",
    "WORDS",
    "as_float64",
    "bits64",
    "narrow",
    "numbers",
    "pointer",
    "prefetch",
    "widen",
]

WORDS = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.uint64}
_F64, _F32, _BF16, _F16, _E5M2, _E4M3 = range(6)
"""Ways to widen and to narrow."""

_IS_ZEN = llvm.get_host_cpu_name().startswith("znver")

FORESEEN = 8 if _IS_ZEN else 0
"""Ingredients of whose next lines the processor thinks by itself. AMD's is slower if told of up to
8, Intel's (Emerald Rapids) 24 to 30 % faster with 4 and with 8; no others were measured."""

SLOW_SUBNORMALS = not _IS_ZEN
"""Whether a quotient that is subnormal takes much longer than others: on Intel's processor 25 to 50
ns for a vector with some. On AMD's it was not measured by itself; float16 at its full rate there
had one in a quarter of all groups."""


@intrinsic
def pointer(typing: Any, address: Any, word: Any) -> Any:
    """Turn an integer into a pointer to words of a type."""
    kind = word.instance_type if isinstance(word, types.TypeRef) else word.dtype
    signature = types.CPointer(kind)(types.int64, word)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Have the cache line at an address, which need not exist, on its way to the second cache.

    Not to the first: blocks of the same tensor lie at the same place of a page in every ingredient,
    so that all of them compete for the same few lines there, and push each other out.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, second, data = (ir.Constant(number, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), read, second, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _bitcast(source: Any, target: Any, kind: ir.Type) -> Any:
    """Make an intrinsic that reads the same bits as another type."""

    @intrinsic
    def cast(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], kind)

        return target(source), generate

    return cast


_as_float32 = _bitcast(types.uint32, types.float32, ir.FloatType())
as_float64 = _bitcast(types.uint64, types.float64, ir.DoubleType())
_bits32 = _bitcast(types.float32, types.uint32, ir.IntType(32))
bits64 = _bitcast(types.float64, types.uint64, ir.IntType(64))


@intrinsic
def _from_half(typing: Any, bits: Any) -> Any:
    """Give the value of a float16's bits, exactly, with the processor's own conversion."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def numbers(dtype: DType) -> tuple[int, ...]:
    """Give what a kernel must know of a dtype, as plain numbers, which a cache can recognise."""
    assert dtype.fraction is not None
    names = ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3")
    way = names.index(dtype.name)
    row = (way, dtype.nbits, dtype.fraction, dtype.bias, dtype.largest, dtype.overflow, dtype.nan)
    return row


@numba.njit(forceinline=True)
def widen(bits: Any, way: int, nan: int) -> Any:
    """Give the value of a word's bits; all but `bits` are constants to LLVM."""
    if way == _F64:
        return as_float64(np.uint64(bits))
    if way == _F32:
        return np.float64(_as_float32(np.uint32(bits)))
    if way == _BF16:
        return np.float64(_as_float32(np.uint32(bits) << np.uint32(16)))
    if way == _F16:
        return np.float64(_from_half(np.uint16(bits)))
    if way == _E5M2:  # the upper byte of a float16
        return np.float64(_from_half(np.uint16(np.uint32(bits) << np.uint32(8))))
    # E4M3 in the fields of a float16 is 2^-8 of its value, subnormals too; 0x7F alone is NaN.
    byte = np.uint32(bits)
    half = ((byte & np.uint32(0x80)) << np.uint32(8)) | ((byte & np.uint32(0x7F)) << np.uint32(7))
    value = _from_half(np.uint16(half)) * np.float32(256)
    return np.float64(np.float32(np.nan) if byte & np.uint32(0x7F) == np.uint32(nan) else value)


@numba.njit(forceinline=True)
def narrow(
    value: float, way: int, nbits: int, fraction: int, bias: int, overflow: int, nan: int
) -> Any:
    """Round to an output's bits; give them, and the magnitude that tells if they are finite."""
    if way == _F64:
        bits = bits64(value)
        magnitude = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
        return (np.uint64(nan) if magnitude > np.uint64(overflow) else bits), magnitude
    if way == _F32:
        bits = _bits32(np.float32(value))
        magnitude = bits & np.uint32(0x7FFFFFFF)
        return (np.uint32(nan) if magnitude > np.uint32(overflow) else bits), magnitude
    # Directly from the bits of float64: by way of float32 rounds twice. Adding just below half
    # of the last kept place, plus its parity, rounds half to even; a carry runs into the exponent.
    bits = bits64(value)
    sign = (bits >> np.uint64(64 - nbits)) & np.uint64(1 << (nbits - 1))
    absolute = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
    shift = np.uint64(52 - fraction)
    below_half = np.uint64((1 << (51 - fraction)) - 1)
    code = (absolute + below_half + ((absolute >> shift) & np.uint64(1))) >> shift
    code -= np.uint64((1023 - bias) << fraction)
    # Below the smallest normal the spacing is fixed: adding 2^52 leaves the rounded multiple.
    scale = as_float64(np.uint64((1023 + bias - 1 + fraction) << 52))
    small = bits64(abs(value) * scale + 4503599627370496.0) & np.uint64((1 << 52) - 1)
    code = small if absolute < np.uint64((1023 + 1 - bias) << 52) else code
    code = min(code, np.uint64(overflow))
    return (np.uint64(nan) if value != value else code | sign), code
