"""Sums of all ingredients in float64: Σᵢ cᵢ·xᵢ, in order, two roundings an ingredient.

The sums of a vector of elements stay in registers while ingredient after ingredient is added.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from streamsoup.kernels.constants import STREAMS, TILE
from streamsoup.kernels.fast.prefetching import FORESEEN, prefetch
from streamsoup.kernels.fast.vectors import Vector, load, splat, store, widened
from streamsoup.kernels.plain import adder, pointer
from streamsoup.tensors import DType

__all__ = ["summer"]

WIDTH = 64 if llvm.get_host_cpu_features().get("avx512f") else 32
"""Elements of a vector: their sums fill eight registers, and leave as many for the rest."""


def summer(source: DType) -> Any:
    """Return the loop that sums a tile of all ingredients of a dtype."""
    size = source.itemsize
    doubles, wide = Vector(types.float64, WIDTH), widened(source, WIDTH)
    add_rest = adder(source)

    @numba.njit(inline="always")
    def sum_tile(
        addresses: Any, factors: Any, ones: bool, fresh: bool, start: int, n: int, sums_at: int
    ) -> None:
        """Add `n` elements of each ingredient, from `start` on, to the sums at `sums_at`.

        With `fresh` the sums begin here; with `ones` all factors are 1.
        """
        k, whole = len(addresses), n // WIDTH * WIDTH
        for first in range(0, k, STREAMS):
            last = min(first + STREAMS, k)
            for at in range(0, whole, WIDTH):
                offset = (start + at) * size
                sums: Any = splat(-0.0, doubles)  # the sum of nothing: zeros keep their sign
                if first > 0 or not fresh:
                    sums = load(sums_at + 8 * at, doubles)
                if k > FORESEEN:
                    for i in range(first, last):
                        for line in range(0, WIDTH * size, 64):
                            prefetch(addresses[i] + offset + TILE * size + line)
                if ones:
                    for i in range(first, last):
                        sums = sums + wide(addresses[i] + offset)
                else:
                    for i in range(first, last):
                        sums = sums + wide(addresses[i] + offset) * factors[i]
                store(sums_at + 8 * at, sums)
        rest = numba.carray(pointer(sums_at + 8 * whole, types.float64), (n - whole,))
        if fresh:
            rest[:] = -0.0
        for i in range(k):
            add_rest(rest, factors[i], addresses[i] + (start + whole) * size)

    return sum_tile
