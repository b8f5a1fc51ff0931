"""Sums of all ingredients in float64: Σᵢ cᵢ·xᵢ, in order, two roundings an ingredient.

The sums of a group of elements stay in registers while ingredient after ingredient is added.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call,import-untyped"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from streamsoup.kernels.bits import FORESEEN, prefetch
from streamsoup.kernels.cpu import AT_ONCE, BLOCK
from streamsoup.kernels.vectors import Vector, load, splat, store, widened
from streamsoup.tensors import DType

__all__ = ["WIDTH", "sums_of"]

WIDTH = 64 if llvm.get_host_cpu_features().get("avx512f") else 32
"""Elements at a time: their sums fill eight registers, and leave as many for the rest."""


def sums_of(source: DType) -> Any:
    """Give the compiled loop over ingredients of a dtype."""
    size = source.itemsize
    doubles, wide = Vector(types.float64, WIDTH), widened(source, WIDTH)

    @numba.njit(forceinline=True)
    def add(
        addresses: Any, factors: Any, plain: bool, fresh: bool, start: int, n: int, sums_at: int
    ) -> None:
        """Add `n` elements of each ingredient, from `start` on, to the sums at `sums_at`.

        `n` is a multiple of `WIDTH`. With `fresh` the sums begin here; all factors of a `plain` sum
        are 1.
        """
        k = len(addresses)
        for first in range(0, k, AT_ONCE):
            last = min(first + AT_ONCE, k)
            for at in range(0, n, WIDTH):
                offset = (start + at) * size
                sums: Any = splat(-0.0, doubles)  # so that -0 stays -0
                if first > 0 or not fresh:
                    sums = load(sums_at + 8 * at, doubles)
                if k > FORESEEN:
                    for i in range(first, last):
                        for line in range(0, WIDTH * size, 64):
                            prefetch(addresses[i] + offset + BLOCK * size + line)
                if plain:
                    for i in range(first, last):
                        sums = sums + wide(addresses[i] + offset)
                else:
                    for i in range(first, last):
                        sums = sums + wide(addresses[i] + offset) * factors[i]
                store(sums_at + 8 * at, sums)

    return add
