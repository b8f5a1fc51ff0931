"""One soup by each kernel, and bit patterns to give them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from streamsoup.kernels import blocks, cpu, reference
from streamsoup.tensors import DTYPES, DType

FLOATS = [dtype for dtype in DTYPES.values() if dtype.averaged]
SMALL = [dtype for dtype in FLOATS if dtype.nbits <= 16]
WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Bits = np.ndarray[Any, Any]
Kernel = Callable[[Sequence[Bits], DType, Sequence[float], float, DType], Bits]

by_name = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
by_small = pytest.mark.parametrize("dtype", SMALL, ids=lambda dtype: dtype.name)


def in_reference(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the specification."""
    soup = reference.mix([list(map(int, x)) for x in inputs], source, factors, divisor, output)
    return np.array(soup, WORDS[output.nbits])


def in_numpy(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the numpy kernel."""
    sums = np.empty(len(inputs[0]))
    result = np.empty(len(sums), WORDS[output.nbits])
    data = [np.ascontiguousarray(x).view(np.uint8) for x in inputs]
    blocks.accumulate(sums, data, [source] * len(data), factors, True)
    spoiled = blocks.finish(sums, divisor, output, result.view(np.uint8))
    assert spoiled == _has_non_finite(result, output)
    return result


def in_numba(
    inputs: Sequence[Bits], source: DType, factors: Sequence[float], divisor: float, output: DType
) -> Bits:
    """Mix with the compiled kernel, in one call."""
    data = [np.ascontiguousarray(x) for x in inputs]
    result = np.empty(len(data[0]), WORDS[output.nbits])
    addresses = [x.ctypes.data for x in data]
    mix = cpu.mixer(source, output)
    spoiled = mix(0, addresses, factors, True, divisor, result.ctypes.data, len(result))
    assert spoiled == _has_non_finite(result, output)
    return result


def _has_non_finite(bits: Bits, dtype: DType) -> bool:
    return bool((bits & WORDS[dtype.nbits]((1 << (dtype.nbits - 1)) - 1) > dtype.largest).any())


def in_torch(bits: Bits, dtype: DType) -> np.ndarray[Any, Any]:
    """Widen with torch."""
    signed = bits.view(f"i{dtype.nbits // 8}").copy()
    values: np.ndarray[Any, Any] = torch.from_numpy(signed).view(TORCH[dtype.name]).double().numpy()
    return values


def patterns(dtype: DType) -> Bits:
    """Return all patterns of a small dtype, or the telling ones and random ones of a large."""
    if dtype.nbits <= 16:
        return np.arange(1 << dtype.nbits).astype(WORDS[dtype.nbits])
    rng = np.random.default_rng(dtype.nbits)
    word = WORDS[dtype.nbits]
    one = 1 << (dtype.fraction or 0)
    telling = [0, 1, 2, one - 1, one, one + 1, dtype.largest, dtype.overflow, dtype.nan]
    telling += [dtype.overflow + 1, dtype.largest - 1, (1 << (dtype.nbits - 1)) - 1]
    positive = np.array(telling, word)
    random = rng.integers(0, 2**dtype.nbits, 3000, word)
    return np.concatenate([positive, positive | word(1 << (dtype.nbits - 1)), random])


def same_values(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Return True if float64 values are the same, signs of zeros included; all NaNs are one."""
    nan = np.isnan(a)
    return bool(
        (nan == np.isnan(b)).all()
        and (a[~nan].view(np.uint64) == b[~nan].astype(np.float64).view(np.uint64)).all()
    )
