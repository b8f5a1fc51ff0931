"""The arithmetic of the fast tier: all ingredients of a block in one pass over memory.

What `plain` does, with three things more. Means of 16- and 8-bit floats are taken in float32
wherever that is exact (`means`). Sums in float64 are taken in vectors that stay in registers
(`sums`). And where all is to be digested, that is done while it lies in a cache (`xxh3`).

Compiled per pair of input and output dtype, to an object file that `objects` keeps and loads.
"""

# Numba's decorators change what functions take: their types cannot be stated.
# mypy: disable-error-code="attr-defined,call-arg,untyped-decorator,no-untyped-call"
# mypy: disable-error-code="no-any-return,import-untyped"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamsoup.kernels.constants import MEAN_TILE, MEAN_VECTOR, SCRATCH, TILE
from streamsoup.kernels.fast.means import MOST, mean_of, no_mean
from streamsoup.kernels.fast.objects import object_file
from streamsoup.kernels.fast.sums import summer
from streamsoup.kernels.fast.xxh3 import digester
from streamsoup.kernels.plain import MIX_SIGNATURE, keep_equal, pointer, rounder
from streamsoup.tensors import DType

__all__ = ["compile_mix"]

_PATIENCE = 16
"""Tiles that are not tried in float32 after one where it was not worth it."""


def compile_mix(source: DType, output: DType) -> tuple[str, bytes]:
    """Compile the kernel that mixes ingredients of dtype `source` into `output`. Takes seconds.

    Returns its symbol and its object file; `cpu.Mixer` says how it is called.
    """
    return object_file(lambda: _compile(source, output))


@numba.njit(inline="always")
def _divide(values: Any, divisor: float) -> None:
    """Divide truly. By a power of two, its reciprocal gives the same quotients, and faster."""
    reciprocal = 1.0 / divisor
    mantissa = np.float64(divisor).view(np.uint64) & np.uint64((1 << 52) - 1)
    if mantissa == np.uint64(0) and abs(divisor) >= 1.0 and abs(divisor) <= 2.0**100:
        for j in range(len(values)):
            values[j] *= reciprocal
    else:
        for j in range(len(values)):
            values[j] /= divisor


@numba.njit(inline="always")
def _are_ones(factors: Any) -> bool:
    ones = True
    for factor in factors:
        ones = ones and factor == 1.0
    return ones


def _finisher(source: DType, output: DType) -> Any:
    """Return what makes elements of the result of finished sums."""
    keeps_equal, round_all = source.name == "F64", rounder(output)

    @numba.njit(inline="always")
    def finish(
        sums: Any,
        divisor: float,
        uniform: bool,
        addresses: Any,
        start: int,
        scratch_at: int,
        y: int,
    ) -> bool:
        """Return whether an element is not finite."""
        _divide(sums, divisor)
        if keeps_equal and uniform:
            differ = numba.carray(pointer(scratch_at + 8 * TILE, types.uint64), sums.shape)
            keep_equal(sums, addresses, start, differ)
        return round_all(sums, y)

    return finish


def _compile(source: DType, output: DType) -> Any:
    """Compile one kernel; what it closes over is constant to LLVM.

    Longer than 60 lines: its parameters take a line each, and the state of the loop (where it
    stops, what is digested, when float32 is tried again) is shared by all of its steps.
    """
    size, to_size = source.itemsize, output.itemsize
    small = source is output and size <= 2
    sum_tile, finish = summer(source), _finisher(source, output)
    mean = mean_of(source) if small else no_mean
    digest, digest_end, digest_step = digester(size, to_size)

    # Never ``fastmath``, which reorders sums. ``error_model``: dividing by zero gives Inf as in
    # numpy, without a branch. A kernel must not allocate or raise: it is loaded without numba.
    @numba.cfunc(MIX_SIGNATURE, error_model="numpy")
    def mix(
        sums_at: Any,
        table_at: Any,
        factors_at: Any,
        scratch_at: Any,
        k: int,
        fresh: int,
        divisor: float,
        output: int,
        n: int,
        digests_at: int,
        leaf: int,
    ) -> int:
        # After the ingredients' addresses comes that of the result, which is digested as they are.
        table = numba.carray(pointer(table_at, types.int64), (k + 1 if output != 0 else k,))
        addresses = table[:k]
        factors = numba.carray(pointer(factors_at, types.float64), (k,))
        secret_at = scratch_at + 8 * SCRATCH
        ones = _are_ones(factors)
        uniform = ones and divisor == k and fresh != 0 and output != 0
        in_float32 = small and uniform and k <= MOST
        # A first tile that is short, so that those after it begin with a cache line: as headers
        # are alike, all ingredients lie at the same place of a line.
        lead = (-addresses[0] & 63) // size
        spoiled = False
        stop, next_try, n_digested = 0, lead, 0
        while stop < n:
            start = stop
            # What was summed, and the result of it, is digested while it lies in a cache.
            upto = start // digest_step * digest_step
            if digests_at != 0 and upto > n_digested:
                digest(table, k, n_digested, upto, digests_at, secret_at)
                n_digested = upto
            m = min(MEAN_TILE, n - start) // MEAN_VECTOR * MEAN_VECTOR
            if in_float32 and start >= next_try and m > 0:
                y_at = output + start * size
                done, beyond = mean(addresses, start * size, m, scratch_at, y_at)
                if done:
                    spoiled |= beyond
                    stop = start + m
                    continue
                next_try = start + _PATIENCE * MEAN_TILE
            stop = min(lead if start < lead else start + TILE, n)
            m = stop - start
            tile_at = sums_at + 8 * start if sums_at != 0 else scratch_at
            sum_tile(addresses, factors, ones, fresh != 0, start, m, tile_at)
            if output != 0:
                sums = numba.carray(pointer(tile_at, types.float64), (m,))
                y_at = output + start * to_size
                kept = uniform and fresh == 1
                spoiled |= finish(sums, divisor, kept, addresses, start, scratch_at, y_at)
        if digests_at != 0:
            digest_end(table, k, n_digested, n, leaf, digests_at, secret_at)
        return spoiled

    return mix
