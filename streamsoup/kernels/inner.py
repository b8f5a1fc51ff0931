"""Inner products of rows of float64, in one fixed order of adding up.

The order is part of the law: a grain of 4096 elements is cut into 128 rows of 32 lanes; each lane
adds its products up row by row, each product rounded and then added; then the lanes are folded,
the upper half onto the lower, until one is left. So a sum depends on neither threads nor blocks.

`Products` is compiled (`products`), and forty times as fast as `in_numpy`. Both give the same bits:
as lanes begin at +0, none is ever -0, and rows of zeros change nothing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels import blocks
from streamsoup.tensors import DTYPES, DType

if TYPE_CHECKING:
    from streamsoup.kernels.linking import Kernel

__all__ = [
    "CHUNK",
    "GRAIN",
    "KINDS",
    "LANES",
    "STRIDE",
    "Products",
    "find_products",
    "in_numpy",
    "make_products",
    "multiply",
    "spend_in_numpy",
]

Array = NDArray[np.uint8]
Floats = NDArray[np.float64]

GRAIN = 1 << 12
"""Elements that are added up before anything else is: `budget.SMALLEST_BLOCK`, so that every block
holds whole grains, but for the last of a tensor, which is filled up with zeros."""

LANES = 32
"""Sums kept at once: enough to hide the time that an addition takes."""

CHUNK = 16 * LANES
"""Elements of a grain that are widened before they are multiplied: those of a tile fit a first
cache, and those of 64 ingredients a second one. Whole grains are slower by a tenth."""

STRIDE = CHUNK + 16
"""Distance of widened rows, in elements: a power of two would have them compete for few lines."""

KINDS = ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3")
"""Dtypes, by the number that the compiled kernel knows them by."""

SUMS = 1 << 12
"""Pairs whose lanes are held at once: 1 MiB of them, as much as all of 90 ingredients have."""

STRIP = 4
"""Rows that are multiplied at once, at most: lanes are held for as many with all rows at least."""

_ROOMS = ("bits.py", "inner.py", "products.py", "tiles.py", "vectors.py")
"""What the kernel is compiled from."""


def multiply(left: Floats, right: Floats, triangle: bool, out: Floats) -> None:
    """Fill ``out (n, m)`` with the products of the rows of ``(n, GRAIN)`` and ``(m, GRAIN)``.

    With `triangle` only those of ``j >= i`` are of use. Holds 16 KiB for each row of `right`.
    """
    with np.errstate(all="ignore"):
        for i in range(0, len(left), LANES):
            some = left[i : i + LANES].reshape(-1, 1, GRAIN // LANES, LANES)
            first = i if triangle else 0
            others = right[first:].reshape(1, -1, GRAIN // LANES, LANES)
            sums = np.zeros((some.shape[0], others.shape[1], LANES))
            product = np.empty_like(sums)
            for row in range(GRAIN // LANES):
                np.multiply(some[:, :, row], others[:, :, row], out=product)
                sums += product
            half = LANES // 2
            while half:
                sums[..., :half] += sums[..., half : 2 * half]
                half //= 2
            out[i : i + LANES, first:] = sums[..., 0]


def in_numpy(
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    n: int,
    out: Floats,
    *,
    reference: int,
    to_mean: bool,
) -> None:
    """Do what `Products` does. Holds 48 KiB for each row, and all products of a grain."""
    rows = np.zeros((len(inputs), GRAIN))
    upper = np.triu_indices(len(rows))
    products = np.empty((len(rows), len(rows)))
    for values, begin in zip(out, range(0, n, GRAIN), strict=True):
        end = min(begin + GRAIN, n)
        rows[:, end - begin :] = 0.0
        part = rows[:, : end - begin]
        with np.errstate(all="ignore"):
            for row, data, dtype in zip(part, inputs, dtypes, strict=True):
                row[:] = blocks.widen(data[begin * dtype.itemsize : end * dtype.itemsize], dtype)
            part[reference + 1 :] -= part[reference]
        if reference:
            multiply(rows[:1], rows[1:], False, values[np.newaxis])
            continue
        values[len(upper[0]) :] = np.count_nonzero(part[1:], axis=1)
        if to_mean:
            _move_to_mean(part)
        multiply(rows, rows, True, products)
        values[: len(upper[0])] = products[upper]


def _move_to_mean(rows: Floats) -> None:
    """Measure rows from their mean, and the first, to which they were differences, too."""
    # From differences to the first to differences to the mean: equal ones stay equal.
    with np.errstate(all="ignore"):
        mean = rows[1].copy()
        for row in rows[2:]:
            mean += row
        mean /= len(rows) - 1
        rows[1:] -= mean
        rows[0] += mean


class Products:
    """The compiled kernel, to be called by many threads at once. It runs without the GIL."""

    def __init__(self, kernel: Kernel) -> None:
        """Wrap a kernel, which lives as long as this does."""
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 9)(kernel.address)
        self._kernel = kernel
        self._own = threading.local()

    @staticmethod
    def held_nbytes(n_rows: int) -> int:
        """Give the bytes of scratch that a thread holds."""
        n_sums = min(n_rows * (n_rows + 1) // 2, max(SUMS, STRIP * n_rows))
        return 8 * (2 * CHUNK + n_rows * (STRIDE + 1) + LANES * n_sums + 8)

    def __call__(
        self,
        inputs: Sequence[Array],
        dtypes: Sequence[DType],
        n: int,
        out: Floats,
        *,
        reference: int,
        to_mean: bool,
    ) -> None:
        """Fill ``out (grain, value)`` for the grains of `n` elements.

        `inputs` ``(row,)`` are raw elements, `dtypes` theirs. Rows after the `reference`, which
        is the first or the second, are differences to it, in float64. If it is the first, a
        grain gives the products of all rows with ``j >= i``, row by row; then, for each row but
        the reference, how many of its elements are not zero. With `to_mean`, rows are then
        measured from their mean, and the reference is that mean. If it is the second, a grain
        gives the products of the first row with all others. C-contiguous, and long enough: the
        kernel looks at neither.
        """
        n_rows = len(inputs)
        nbytes = self.held_nbytes(n_rows)
        if getattr(self._own, "nbytes", 0) < nbytes:
            self._own.scratch, self._own.nbytes = np.empty(nbytes // 8), nbytes
        scratch = self._own.scratch
        table = np.array(
            [
                (data.ctypes.data, KINDS.index(dtype.name), dtype.itemsize)
                for data, dtype in zip(inputs, dtypes, strict=True)
            ],
            np.int64,
        )
        self._call(
            table.ctypes.data,
            n_rows,
            reference,
            to_mean,
            n,
            scratch.ctypes.data,
            max(SUMS, STRIP * n_rows),
            out.ctypes.data,
            out.shape[1],
        )


def find_products() -> Products | None:
    """Give the compiled kernel if it is in the cache, or None. Takes milliseconds."""
    from streamsoup.kernels import objects
    from streamsoup.kernels.cpu import has_kernel

    if not has_kernel(DTYPES["F16"]):
        return None
    found = objects.find("inner", _ROOMS)
    return None if found is None else Products(found)


def spend_in_numpy(seconds: float) -> float:
    """Note seconds spent for want of the compiled kernel; return those of all runs so far."""
    from streamsoup.kernels import objects

    return objects.spend("inner", _ROOMS, seconds)


def make_products() -> Products | None:
    """Compile the kernel, and keep it; None where this processor can not do it. Seconds, once."""
    from streamsoup.kernels import objects
    from streamsoup.kernels.cpu import has_kernel

    if not has_kernel(DTYPES["F16"]):
        return None
    from streamsoup.kernels.products import compile_products

    return Products(objects.make("inner", _ROOMS, compile_products))
