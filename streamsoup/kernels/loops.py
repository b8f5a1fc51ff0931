"""The arithmetic in numba: all ingredients of a block in one pass over memory.

The sums of a few thousand elements stay in a core's first cache while ingredient after ingredient
is added to them, four at a time in registers, and leave it once, rounded. The loops hold no
branch and no call, so that LLVM turns them into vector instructions.

Compiled per pair of input and output dtype, to an object file that `cpu` keeps and loads.
"""

# Numba's decorators and intrinsics change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,misc"
# mypy: disable-error-code="no-any-return,return-value,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streamsoup.kernels.cpu import BLOCK
from streamsoup.tensors import DType

__all__ = ["compile_mix"]

_WORDS = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.uint64}
_SIGNATURE = types.int64(*[types.int64] * 6, types.float64, types.int64, types.int64)
_F64, _F32, _BF16, _F16, _E5M2, _E4M3 = range(6)
"""Ways to widen and to narrow."""


@intrinsic
def _pointer(typing: Any, address: Any, word: Any) -> Any:
    """Turn an integer into a pointer to words of a type."""
    kind = word.instance_type if isinstance(word, types.TypeRef) else word.dtype
    signature = types.CPointer(kind)(types.int64, word)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


def _bitcast(source: Any, target: Any, llvm: ir.Type) -> Any:
    """Make an intrinsic that reads the same bits as another type."""

    @intrinsic
    def cast(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm)

        return target(source), generate

    return cast


_as_float32 = _bitcast(types.uint32, types.float32, ir.FloatType())
_as_float64 = _bitcast(types.uint64, types.float64, ir.DoubleType())
_bits32 = _bitcast(types.float32, types.uint32, ir.IntType(32))
_bits64 = _bitcast(types.float64, types.uint64, ir.IntType(64))


@intrinsic
def _to_half(typing: Any, value: Any) -> Any:
    """Round a float32 to a float16's bits, with the processor's own conversion."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _from_half(typing: Any, bits: Any) -> Any:
    """Give the value of a float16's bits, exactly, with the processor's own conversion."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def compile_mix(source: DType, output: DType) -> tuple[str, bytes]:
    """Compile the kernel that mixes ingredients of dtype `source` into `output`.

    Gives its symbol and its object file; `cpu.Mixer` says how it is called. About a second.
    """
    kernel = _compile(_numbers(source), _numbers(output))
    # What numba itself keeps in its cache; the wrapper is a plain C function.
    _, _, (content, _) = kernel._library.serialize_using_object_code()
    return kernel._wrapper_name, content


def _numbers(dtype: DType) -> tuple[int, ...]:
    """Give what a kernel must know of a dtype, as plain numbers, which a cache can recognise."""
    assert dtype.fraction is not None
    names = ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3")
    way = names.index(dtype.name)
    row = (way, dtype.nbits, dtype.fraction, dtype.bias, dtype.largest, dtype.overflow, dtype.nan)
    return row


@numba.njit(forceinline=True)
def _widen(bits: Any, way: int, nan: int) -> Any:
    """Give the value of a word's bits; all but `bits` are constants to LLVM."""
    if way == _F64:
        return _as_float64(np.uint64(bits))
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
def _widen_small(bits: Any, way: int) -> Any:
    """Give the value of a 16- or 8-bit float, exactly, in float32; of E4M3, 2^-8 of it."""
    if way == _BF16:
        return _as_float32(np.uint32(np.uint32(bits) << np.uint32(16)))
    if way == _F16:
        return _from_half(np.uint16(bits))
    if way == _E5M2:  # the upper byte of a float16
        return _from_half(np.uint16(np.uint16(bits) << np.uint16(8)))
    return _from_half(np.uint16((np.int32(np.int8(bits)) << np.int32(7)) & np.int32(0xBFFF)))


@numba.njit(forceinline=True)
def _narrow_small(value: Any, way: int, nbits: int, fraction: int, bias: int) -> Any:
    """Round a float32 that is finite, and stays so, to the bits of a 16- or 8-bit float."""
    if way == _F16:
        return _to_half(value)
    bits = _bits32(value)
    shift = np.uint32(23 - fraction)
    below_half = np.uint32((1 << (22 - fraction)) - 1)
    if way == _BF16:  # the upper half of a float32
        return (bits + below_half + ((bits >> shift) & np.uint32(1))) >> shift
    sign = (bits >> np.uint32(32 - nbits)) & np.uint32(1 << (nbits - 1))
    absolute = bits & np.uint32(0x7FFFFFFF)
    code = (absolute + below_half + ((absolute >> shift) & np.uint32(1))) >> shift
    code -= np.uint32((127 - bias) << fraction)
    # Below the smallest normal the spacing is fixed: adding 2^23 leaves the rounded multiple.
    scale = _as_float32(np.uint32((127 + bias - 1 + fraction) << 23))
    small = _bits32(abs(value) * scale + np.float32(8388608.0)) & np.uint32((1 << 23) - 1)
    return (small if absolute < np.uint32((127 + 1 - bias) << 23) else code) | sign


@numba.njit(forceinline=True)
def _sum_small(inputs: Any, m: int, sums: Any, ends: Any, word: Any, way: int, mask: int) -> None:
    """Add up 16- or 8-bit floats in float32; find the range of each element's magnitudes.

    `inputs` holds addresses, a multiple of four. `ends` becomes the largest magnitude, as bits,
    and, `BLOCK` further on, one less than the smallest but zero.
    """
    one, magnitude = word(1), word(mask)
    for i in range(0, len(inputs), 4):
        x0 = numba.carray(_pointer(inputs[i], word), (m,))
        x1 = numba.carray(_pointer(inputs[i + 1], word), (m,))
        x2 = numba.carray(_pointer(inputs[i + 2], word), (m,))
        x3 = numba.carray(_pointer(inputs[i + 3], word), (m,))
        if i == 0:
            for j in range(m):
                a0, a1 = word(x0[j] & magnitude), word(x1[j] & magnitude)
                a2, a3 = word(x2[j] & magnitude), word(x3[j] & magnitude)
                ends[j] = max(max(a0, a1), max(a2, a3))
                b01 = min(word(a0 - one), word(a1 - one))
                b23 = min(word(a2 - one), word(a3 - one))
                ends[BLOCK + j] = min(b01, b23)
            for j in range(m):
                total = _widen_small(x0[j], way) + _widen_small(x1[j], way)
                sums[j] = total + _widen_small(x2[j], way) + _widen_small(x3[j], way)
        else:
            for j in range(m):
                a0, a1 = word(x0[j] & magnitude), word(x1[j] & magnitude)
                a2, a3 = word(x2[j] & magnitude), word(x3[j] & magnitude)
                ends[j] = max(max(max(a0, a1), max(a2, a3)), ends[j])
                b01 = min(word(a0 - one), word(a1 - one))
                b23 = min(word(a2 - one), word(a3 - one))
                ends[BLOCK + j] = min(min(b01, b23), ends[BLOCK + j])
            for j in range(m):
                total = sums[j] + _widen_small(x0[j], way)
                total += _widen_small(x1[j], way)
                total += _widen_small(x2[j], way)
                sums[j] = total + _widen_small(x3[j], way)


@numba.njit(forceinline=True)
def _narrow(
    value: float, way: int, nbits: int, fraction: int, bias: int, overflow: int, nan: int
) -> Any:
    """Round to an output's bits; give them, and the magnitude that tells if they are finite."""
    if way == _F64:
        bits = _bits64(value)
        magnitude = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
        return (np.uint64(nan) if magnitude > np.uint64(overflow) else bits), magnitude
    if way == _F32:
        bits = np.uint64(_bits32(np.float32(value)))
        magnitude = bits & np.uint64(0x7FFFFFFF)
        return (np.uint64(nan) if magnitude > np.uint64(overflow) else bits), magnitude
    # Directly from the bits of float64: by way of float32 rounds twice. Adding just below half
    # of the last kept place, plus its parity, rounds half to even; a carry runs into the exponent.
    bits = _bits64(value)
    sign = (bits >> np.uint64(64 - nbits)) & np.uint64(1 << (nbits - 1))
    absolute = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
    shift = np.uint64(52 - fraction)
    below_half = np.uint64((1 << (51 - fraction)) - 1)
    code = (absolute + below_half + ((absolute >> shift) & np.uint64(1))) >> shift
    code -= np.uint64((1023 - bias) << fraction)
    # Below the smallest normal the spacing is fixed: adding 2^52 leaves the rounded multiple.
    scale = _as_float64(np.uint64((1023 + bias - 1 + fraction) << 52))
    small = _bits64(abs(value) * scale + 4503599627370496.0) & np.uint64((1 << 52) - 1)
    code = small if absolute < np.uint64((1023 + 1 - bias) << 52) else code
    code = min(code, np.uint64(overflow))
    return (np.uint64(nan) if value != value else code | sign), code


def _compile(source: tuple[int, ...], output: tuple[int, ...]) -> Any:
    """Compile one kernel. It closes over plain numbers only, which are constants to LLVM."""
    way, nbits, fraction, bias, _, _, nan = source
    small = source == output and nbits <= 16
    largest_bits = (1 << (nbits - 1)) - 1
    huge = (255 - 8) << 7 if way == _BF16 else (nan if way == _E4M3 else 31 << fraction)
    to_way, to_nbits, to_fraction, to_bias, to_largest, to_overflow, to_nan = output
    word, to_word = _WORDS[nbits], _WORDS[to_nbits]
    size, to_size = nbits // 8, to_nbits // 8

    # Never ``fastmath``: it reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch. A kernel must not allocate or raise: it is loaded without numba.
    @numba.cfunc(_SIGNATURE, error_model="numpy")
    def mix(
        sums_at: Any,
        addresses_at: Any,
        factors_at: Any,
        scratch_at: Any,
        k: int,
        fresh: int,
        divisor: float,
        output: int,
        n: int,
    ) -> int:
        addresses = numba.carray(_pointer(addresses_at, types.int64), (k,))
        factors = numba.carray(_pointer(factors_at, types.float64), (k,))
        first = numba.carray(_pointer(scratch_at + 8 * BLOCK, types.uint64), (BLOCK,))
        equal = numba.carray(_pointer(scratch_at + 16 * BLOCK, types.uint64), (BLOCK,))
        part = numba.carray(_pointer(scratch_at, types.float32), (BLOCK,))
        ends = numba.carray(_pointer(scratch_at + 8 * BLOCK, word), (2 * BLOCK,))
        zeros = numba.carray(_pointer(scratch_at + 12 * BLOCK, word), (BLOCK,))
        here = numba.carray(_pointer(scratch_at + 16 * BLOCK, types.int64), (128,))
        plain = True
        for i in range(k):
            plain = plain and factors[i] == 1.0
        # For float64 alone the sum of equal values may be inexact: see `reference`.
        identical = way == _F64 and plain and divisor == k and fresh != 0 and output != 0
        # Multiplying by a power of two's reciprocal is the same correctly rounded quotient.
        reciprocal = 1.0 / divisor
        mantissa = _bits64(divisor) & np.uint64((1 << 52) - 1)
        exact = mantissa == np.uint64(0) and abs(divisor) >= 1.0 and abs(divisor) <= 2.0**100
        in_float32 = small and plain and divisor == k and k <= 128 and fresh != 0 and output != 0
        divisor32 = np.float32(divisor * (2.0**-8 if way == _E4M3 else 1.0))
        reciprocal32 = np.float32(1.0) / divisor32
        if in_float32:
            for j in range(BLOCK):
                zeros[j] = word(largest_bits + 1)
            for i in range(k, 128):
                here[i] = scratch_at + 12 * BLOCK
        n_doublings = 0
        while (1 << n_doublings) < k:
            n_doublings += 1
        limit = (23 - fraction - n_doublings) << fraction
        worst = np.uint64(0)
        for start in range(0, n, BLOCK):
            m = min(BLOCK, n - start)
            acc_at = sums_at + 8 * start if sums_at != 0 else scratch_at
            acc = numba.carray(_pointer(acc_at, types.float64), (m,))
            i = 0
            if in_float32:
                at = start * size
                for i in range(k):
                    here[i] = addresses[i] + at
                _sum_small(here[: -(-k // 4) * 4], m, part, ends, word, way, largest_bits)
                y = numba.carray(_pointer(output + at, word), (m,))
                if exact:
                    for j in range(m):
                        value = part[j] * reciprocal32
                        y[j] = word(_narrow_small(value, way, nbits, fraction, bias))
                else:
                    for j in range(m):
                        value = part[j] / divisor32
                        y[j] = word(_narrow_small(value, way, nbits, fraction, bias))
                widest, top = word(0), word(0)
                for j in range(m):
                    widest = max(widest, word(ends[j] - word(ends[BLOCK + j] + word(1))))
                    top = max(top, ends[j])
                if widest < word(limit) and top < word(huge):
                    continue
                for j in range(m):
                    spread = word(ends[j] - word(ends[BLOCK + j] + word(1)))
                    if spread < word(limit) and ends[j] < word(huge):
                        continue
                    total = 0.0
                    for i in range(k):
                        x0 = numba.carray(_pointer(here[i], word), (m,))
                        value64 = _widen(x0[j], way, nan)
                        total = value64 if i == 0 else total + value64
                    bits, magnitude = _narrow(
                        total / divisor, to_way, to_nbits, to_fraction, to_bias, to_overflow, to_nan
                    )
                    y[j] = word(bits)
                    worst = max(worst, magnitude)
                continue
            if fresh != 0:
                x0 = numba.carray(_pointer(addresses[0] + start * size, word), (m,))
                factor = factors[0]
                if plain:
                    for j in range(m):
                        acc[j] = _widen(x0[j], way, nan)
                else:
                    for j in range(m):
                        value = _widen(x0[j], way, nan)
                        acc[j] = factor * value
                i = 1
            while plain and i + 4 <= k:
                x0 = numba.carray(_pointer(addresses[i] + start * size, word), (m,))
                x1 = numba.carray(_pointer(addresses[i + 1] + start * size, word), (m,))
                x2 = numba.carray(_pointer(addresses[i + 2] + start * size, word), (m,))
                x3 = numba.carray(_pointer(addresses[i + 3] + start * size, word), (m,))
                for j in range(m):
                    total = acc[j] + _widen(x0[j], way, nan)
                    total += _widen(x1[j], way, nan)
                    total += _widen(x2[j], way, nan)
                    acc[j] = total + _widen(x3[j], way, nan)
                i += 4
            while i < k:
                x0 = numba.carray(_pointer(addresses[i] + start * size, word), (m,))
                factor = factors[i]
                for j in range(m):
                    acc[j] += factor * _widen(x0[j], way, nan)
                i += 1
            if output == 0:
                continue
            if divisor != 1.0:
                if exact:
                    for j in range(m):
                        acc[j] *= reciprocal
                else:
                    for j in range(m):
                        acc[j] /= divisor
            if identical:
                x0 = numba.carray(_pointer(addresses[0] + start * size, word), (m,))
                for j in range(m):
                    first[j] = x0[j]
                    equal[j] = 0
                for i in range(1, k):
                    x0 = numba.carray(_pointer(addresses[i] + start * size, word), (m,))
                    for j in range(m):
                        equal[j] |= np.uint64(x0[j]) ^ first[j]
                for j in range(m):
                    acc[j] = _as_float64(first[j]) if equal[j] == 0 else acc[j]
            y = numba.carray(_pointer(output + start * to_size, to_word), (m,))
            for j in range(m):
                bits, magnitude = _narrow(
                    acc[j], to_way, to_nbits, to_fraction, to_bias, to_overflow, to_nan
                )
                y[j] = to_word(bits)
                worst = max(worst, magnitude)
        return 1 if worst > np.uint64(to_largest) else 0

    return mix
