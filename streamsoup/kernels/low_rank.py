"""Products of two small factors, added to a block of a matrix: W + s·(L·R), a range at a time.

The law, for each element, in float64: the products L[i, k]·R[k, j] are added one after the other
for k = 0, 1, …, each rounded, beginning with 0; their sum is multiplied by s, rounded, and added
to W, rounded. So the bits depend on no block, tile, thread or tier.

`add_product` is the specification, in numpy; `compiled` has the same bits from a loop in numba.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels.blocks import widen
from streamsoup.kernels.tiers import first_compiled, tier
from streamsoup.system.buffers import Bytes, address_of
from streamsoup.tensors import DType

__all__ = ["Compiled", "Factor", "add_product", "compiled", "scratch_nbytes"]

Floats = NDArray[np.float64]

TILE = 1 << 12
"""Elements of float64 that a kernel works on at once: 32 KiB, the first cache of a core."""

_NARROW = ("F32", "BF16", "F16")
"""Dtypes whose products are exact in float64."""

_KINDS = ("F64", *_NARROW)
"""Dtypes that the compiled loop reads, by number."""


class Factor(msgspec.Struct, frozen=True):
    """A factor as it is stored: element (outer, k) is at ``outer · step + k · step_k``."""

    block: Bytes
    """All its bytes."""
    dtype: DType
    step: int
    """Elements from one row of L, or column of R, to the next."""
    step_k: int
    """Elements from one index of the sum to the next."""

    def values(self, begin: int, end: int, k: int) -> Floats:
        """Return elements ``(begin … end, k)`` in float64."""
        words = np.frombuffer(self.block, f"<u{self.dtype.itemsize}")
        part = np.ascontiguousarray(words[k * self.step_k :][begin * self.step :: self.step])
        return widen(part[: end - begin].view(np.uint8), self.dtype).astype(np.float64)


def add_product(
    values: Floats, begin: int, columns: int, left: Factor, right: Factor, rank: int, scale: float
) -> None:
    """Add ``scale · (L·R)`` to elements of a matrix, in place.

    Args:
        values: ``(element,) float64``, those of the matrix from `begin` on, row by row.
        begin: Number of the first element.
        columns: Columns of the matrix.
        left: L ``(row, k)``.
        right: R ``(k, column)``, whose outer index is the column.
        rank: Terms of each sum.
        scale: The factor s.
    """
    at = 0
    for row, rows, first, last in _pieces(begin, len(values), columns):
        sums = np.zeros((rows, last - first))
        for k in range(rank):
            ahead = left.values(row, row + rows, k)[:, None]
            sums += ahead * right.values(first, last, k)
        values[at : at + sums.size] += scale * sums.ravel()
        at += sums.size


def _pieces(begin: int, n: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield a range in order as rectangles of few elements: row, rows, first and last column."""
    end = begin + n
    while begin < end:
        row, first = divmod(begin, columns)
        rows = min((end - begin) // columns, TILE // columns) if first == 0 else 0
        last = columns if rows else min(columns, first + end - begin, first + TILE)
        yield row, max(1, rows), first, last
        begin += max(1, rows) * (last - first)


def scratch_nbytes(rank: int) -> int:
    """Return the bytes that either tier holds during a call, beside what it is given."""
    return 8 * max(6 * TILE, rank * _columns(rank) + rank + _columns(rank))


def _columns(rank: int) -> int:
    """Return the columns of R that the compiled loop holds at once: `plain_low_rank.WIDTH` s."""
    return max(32, min(512, TILE // 2 // max(1, rank) // 32 * 32))


_KERNEL = ("low_rank", ("plain_low_rank.py",))
"""The label of the compiled loop, and the files that it is compiled from."""


class Compiled:
    """The compiled loop, to be called by many threads at once. It runs without the GIL."""

    def __init__(self, kernel: Any) -> None:
        """Wrap a kernel, or the function of `plain_low_rank`, which lives as long as this does."""
        self._kernel = kernel
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_double)
        self._call = call(kernel.address)

    @staticmethod
    def takes(base: DType, left: DType, right: DType) -> bool:
        """Return True if it reads these dtypes, and the products of the factors are exact."""
        return base.name in _KINDS and left.name in _NARROW and right.name in _NARROW

    def __call__(
        self,
        values: Bytes,
        base: Bytes,
        dtype: DType,
        begin: int,
        columns: int,
        left: Factor,
        right: Factor,
        rank: int,
        scale: float,
    ) -> None:
        """Put ``base + scale · (L·R)`` into `values`; they may be the same memory.

        Args:
            values: Memory of ``(element,) float64``.
            base: As many elements of a `dtype` that it `takes`.
            dtype: That of `base`.
            begin: As in `add_product`, like all that follow.
            columns: See there.
            left: See there.
            right: See there.
            rank: See there.
            scale: See there.
        """
        scratch = memoryview(bytearray(scratch_nbytes(rank)))
        table = (ctypes.c_int64 * 18)(
            *(address_of(values), address_of(base), _KINDS.index(dtype.name), begin),
            *(len(values) // 8, columns, rank, _columns(rank), address_of(scratch)),
            *(address_of(left.block), _KINDS.index(left.dtype.name), left.step, left.step_k),
            *(address_of(right.block), _KINDS.index(right.dtype.name), right.step, right.step_k),
        )
        self._call(ctypes.addressof(table), scale)


def compiled() -> Compiled | None:
    """Return the compiled loop: from the cache of kernels, or in some seconds.

    None if numpy was asked for (`tiers.tier`), or where nothing can be compiled, which is logged.
    """
    asked = tier()
    if asked == "numpy":
        return None

    def fast() -> Compiled:
        from streamsoup.kernels.fast.objects import find, make

        return Compiled(find(*_KERNEL) or make(*_KERNEL, _object_file))

    def plain() -> Compiled:
        from streamsoup.kernels.plain_low_rank import compile_low_rank

        return Compiled(compile_low_rank())

    return first_compiled(plain) if asked == "plain" else first_compiled(fast, plain)


def _object_file() -> tuple[str, bytes]:
    from streamsoup.kernels.fast.objects import object_file
    from streamsoup.kernels.plain_low_rank import compile_low_rank

    return object_file(compile_low_rank)
