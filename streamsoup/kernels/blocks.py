"""The arithmetic in numpy, a tile that fits a cache at a time.

Eight (float32) to a hundred and more (float8) times slower than compiled kernels. It is for what
these are not there for: small jobs before a large one has had them compiled, and places where numba
cannot or may not compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels.constants import NUMPY_TILE
from streamsoup.tensors import DType

__all__ = [
    "BlockSums",
    "accumulate",
    "array_of",
    "finish",
    "first_non_finite",
    "floats_of",
    "narrow",
    "rounded",
    "widen",
]

Array = NDArray[np.uint8]
Floats = NDArray[np.float64]


def array_of(block: memoryview) -> Array:
    """Return the bytes of a block as an array, without a copy."""
    return np.frombuffer(block, np.uint8)


def floats_of(block: memoryview) -> Floats:
    """Return the float64 that a block holds as an array, without a copy."""
    return np.frombuffer(block, np.float64)


class BlockSums:
    """The sums of one block after the other, in memory where a compiled kernel may go on."""

    def __init__(self, memory: memoryview) -> None:
        """Use memory of as many float64 as a block has at most."""
        self._sums = floats_of(memory)

    def of(self, n: int) -> Floats:
        """Return the sums of a block ``(n,)``."""
        return self._sums[:n]

    def add(
        self,
        n: int,
        inputs: Sequence[memoryview],
        dtypes: Sequence[DType],
        factors: Sequence[float],
        *,
        fresh: bool,
    ) -> None:
        """Add the products of `inputs`, in order; with `fresh`, they begin the sums."""
        accumulate(self.of(n), [array_of(block) for block in inputs], dtypes, factors, fresh)

    def watch(self, inputs: Sequence[memoryview], *, fresh: bool) -> None:
        """Note which float64 have had the same bits in every ingredient so far."""
        words = [np.frombuffer(block, np.uint64) for block in inputs]
        if fresh:
            self._first = words[0].copy()
            self._equal = np.ones(len(self._first), np.bool_)
        for word in words:
            self._equal &= word == self._first

    def finish(
        self, n: int, divisor: float, dtype: DType, output: memoryview, *, watched: bool
    ) -> bool:
        """Divide, round into `output`, and return whether a result is not finite.

        Of a block that was `watched`, the common value stands where all were equal.
        """
        sums = self.of(n)
        if watched:
            with np.errstate(all="ignore"):
                np.divide(sums, divisor, out=sums)
            sums[self._equal] = self._first.view(np.float64)[self._equal]
            divisor = 1.0
        return finish(sums, divisor, dtype, array_of(output))


def first_non_finite(block: memoryview, dtype: DType) -> tuple[int, float] | None:
    """Return the first NaN or Inf of a block, and its place; None if there is none."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = widen(array_of(block), dtype)
    bad = np.flatnonzero(~np.isfinite(values))
    return (int(bad[0]), float(values[bad[0]])) if len(bad) else None


def accumulate(
    sums: Floats,
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    factors: Sequence[float],
    fresh: bool,
) -> None:
    """Add the products of `inputs`, in order, to `sums` ``(element,)``.

    With `fresh`, `sums` is overwritten: the first product starts it, so that -0 stays -0.
    """
    with np.errstate(all="ignore"):
        _accumulate(sums, inputs, dtypes, factors, fresh)


def _accumulate(
    sums: Floats,
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    factors: Sequence[float],
    fresh: bool,
) -> None:
    for begin in range(0, len(sums), NUMPY_TILE):
        end = min(begin + NUMPY_TILE, len(sums))
        part = sums[begin:end]
        for i, (data, dtype, factor) in enumerate(zip(inputs, dtypes, factors, strict=True)):
            values = widen(data[begin * dtype.itemsize : end * dtype.itemsize], dtype)
            if factor != 1.0:
                values = np.multiply(values, factor, dtype=np.float64)
            if fresh and i == 0:
                part[:] = values
            else:
                np.add(part, values, out=part)


def finish(sums: Floats, divisor: float, dtype: DType, output: Array) -> bool:
    """Divide, round into `output`, and return whether a result is not finite."""
    spoiled = False
    with np.errstate(all="ignore"):
        for begin in range(0, len(sums), NUMPY_TILE):
            end = min(begin + NUMPY_TILE, len(sums))
            part = sums[begin:end]
            if divisor != 1.0:
                np.divide(part, divisor, out=part)
            target = output[begin * dtype.itemsize : end * dtype.itemsize]
            spoiled |= narrow(part, dtype, target)
    return spoiled


def widen(data: Array, dtype: DType) -> NDArray[np.float64] | NDArray[np.float32]:
    """Return the values of raw little-endian `data`, exactly, as float64 or float32."""
    if dtype.name == "F64":
        return data.view(np.float64)
    if dtype.name == "F32":
        return data.view(np.float32)
    if dtype.name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype.name == "F16":
        return data.view(np.float16).astype(np.float32)
    if dtype.name == "F8_E5M2":  # the upper byte of a float16
        return (data.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    # E4M3 in the fields of a float16 is 2⁻⁸ of its value, subnormals too; 0x7F alone is NaN.
    magnitudes = (data & np.uint8(0x7F)).astype(np.uint16)
    halves = (magnitudes << np.uint16(7)) | ((data & np.uint8(0x80)).astype(np.uint16) << 8)
    values = halves.view(np.float16).astype(np.float32) * np.float32(256)
    values[magnitudes == dtype.nan] = np.nan
    return values


def rounded(block: memoryview, source: DType, dtype: DType, output: memoryview) -> None:
    """Round raw elements of a dtype once to another, into `output`."""
    for start in range(0, len(block) // source.itemsize, NUMPY_TILE):
        stop = min(start + NUMPY_TILE, len(block) // source.itemsize)
        part = array_of(block[start * source.itemsize : stop * source.itemsize])
        with np.errstate(all="ignore"):
            values = widen(part, source).astype(np.float64)
            narrow(values, dtype, array_of(output[start * dtype.itemsize : stop * dtype.itemsize]))


def narrow(values: Floats, dtype: DType, output: Array) -> bool:
    """Round float64 `values` into raw `output`; return whether a result is not finite."""
    if dtype.name == "F64":
        floats = output.view(np.float64)
        floats[:] = values
        spoiled = not bool(np.isfinite(floats).all())
        if spoiled:
            floats[np.isnan(floats)] = np.nan
        return spoiled
    if dtype.name == "F32":
        singles = output.view(np.float32)
        singles[:] = values
        spoiled = not bool(np.isfinite(singles).all())
        if spoiled:
            singles[np.isnan(singles)] = np.nan
        return spoiled
    return _narrow_small(values, dtype, output)


def _narrow_small(values: Floats, dtype: DType, output: Array) -> bool:
    """Round to 16 or 8 bits directly from the bits of float64: by way of float32 rounds twice."""
    assert dtype.fraction is not None
    magnitudes = np.abs(values)
    bits = magnitudes.view(np.uint64)
    shift = 52 - dtype.fraction
    # Adding just below half of the last kept place, plus its parity, rounds half to even;
    # a carry runs into the exponent, as it should.
    rounded = bits + np.uint64((1 << (shift - 1)) - 1) + ((bits >> np.uint64(shift)) & np.uint64(1))
    codes = (rounded >> np.uint64(shift)) - np.uint64((1023 - dtype.bias) << dtype.fraction)
    # Below the smallest normal the spacing is fixed: adding 2⁵² leaves the rounded multiple.
    small = magnitudes < 2.0 ** (1 - dtype.bias)
    if small.any():
        scaled = magnitudes[small] * 2.0 ** (dtype.bias - 1 + dtype.fraction) + 2.0**52
        codes[small] = scaled.view(np.uint64) & np.uint64((1 << 52) - 1)
    np.minimum(codes, np.uint64(dtype.overflow), out=codes)
    spoiled = bool((codes > dtype.largest).any())
    codes |= np.signbit(values).astype(np.uint64) << np.uint64(dtype.nbits - 1)
    if spoiled:
        codes[np.isnan(values)] = dtype.nan
    output.view(np.uint8 if dtype.nbits == 8 else np.uint16)[:] = codes
    return spoiled
