"""Blocks through a lane of the pipeline, and what the specification makes of them.

The cases of `streamsoup selftest`, and of the tests of the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels import reference
from streamsoup.kernels.accelerator.device import Device
from streamsoup.kernels.accelerator.pipeline import Lane, LaneShape
from streamsoup.tensors import DTYPES, DType

__all__ = ["COEFFICIENTS", "FLOATS", "WORDS", "random_ingredients", "specified", "through_lane"]

Bytes = NDArray[np.uint8]

FLOATS = [DTYPES[name] for name in ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def through_lane(
    device: Device[Any, Any],
    ingredients: Sequence[Bytes],
    dtype: DType,
    output: DType,
    factors: Sequence[float],
    divisor: float,
    *,
    block: int,
    n_slots: int = 2,
) -> tuple[Bytes, bool]:
    """Mix raw ingredients in blocks, as a worker does; return the soup, and if it is spoiled."""
    uniform = set(factors) == {1.0} and divisor == len(factors) > 1
    compares = uniform and dtype.name == "F64"
    shape = LaneShape(block, n_slots, 8, 8, compares)
    lane = Lane(device, shape)
    size = dtype.itemsize
    n = len(ingredients[0]) // size
    parts: list[Bytes] = []
    spoils = []

    def take() -> None:
        part, spoiled = lane.take()
        parts.append(part.copy())
        spoils.append(spoiled)

    under_way = 0
    for start in range(0, n, block):
        end = min(start + block, n)
        if under_way == shape.in_flight:
            take()
            under_way -= 1
        lane.start(end - start, output, divisor, compares=compares, canonical=True)
        for data, factor in zip(ingredients, factors, strict=True):
            lane.add(data[start * size : end * size], dtype, factor)
        lane.finish()
        under_way += 1
    while under_way:
        take()
        under_way -= 1
    lane.close()
    return np.concatenate([*parts, np.empty(0, np.uint8)]), any(spoils)


def specified(
    ingredients: Sequence[Bytes],
    dtype: DType,
    output: DType,
    factors: Sequence[float],
    divisor: float,
) -> Bytes:
    """Return what `kernels.reference` makes of raw ingredients."""
    patterns = [[int(word) for word in data.view(WORDS[dtype.itemsize])] for data in ingredients]
    soup = reference.mix(patterns, dtype, factors, divisor, output)
    return np.array(soup, WORDS[output.itemsize]).view(np.uint8)


def random_ingredients(dtype: DType, k: int, n: int, *, ties: bool = False) -> list[Bytes]:
    """Return `k` ingredients of `n` random bit patterns: every kind of value, NaN and Inf too.

    Half of float64's are moved into the range of bfloat16, where narrowing rounds; with `ties`, all
    are finite and of like size, so that sums are often halfway between two results.
    """
    rng = np.random.default_rng([k, n, dtype.nbits, dtype.bias, ties])
    made = []
    for _ in range(k):
        if ties:
            values = rng.integers(-(1 << 9), 1 << 9, n) / 8.0
            narrowed = [reference.narrow(float(v), dtype) for v in values]
            made.append(np.array(narrowed, WORDS[dtype.itemsize]).view(np.uint8))
            continue
        data = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8)
        if dtype.name == "F64":
            words = data.view(np.uint64)
            exponents = rng.integers(1023 - 160, 1023 + 140, n // 2).astype(np.uint64)
            kept = words[: n // 2] & ~(np.uint64(0x7FF) << np.uint64(52))
            words[: n // 2] = kept | (exponents << np.uint64(52))
        made.append(data)
    if dtype.name == "F64" and k > 1:
        for data in made[1:]:  # equal values: some whose sum overflows, or is inexact
            data[: n // 8 * 8] = made[0][: n // 8 * 8]
        for data in made:
            data.view(np.uint64)[:2] = np.array([1.7e308, 0.1]).view(np.uint64)
    return made


COEFFICIENTS = {
    "one": ((1.0,), 1.0),
    "mean of two": ((1.0, 1.0), 2.0),
    "mean of three": ((1.0, 1.0, 1.0), 3.0),
    "mean of eight": ((1.0,) * 8, 8.0),
    "weighted": ((0.7, -0.3, 1 / 3), 1.0),
    "normalised": ((0.7, 1.0, 1 / 3), 0.7 + 1.0 + 1 / 3),
}
