"""Inner products of rows of float64, in one fixed order of adding up.

The order is part of the law: a grain of 4096 elements is cut into 128 rows of 32 lanes; each lane
adds its products up row by row, each product rounded and then added; then the lanes are folded,
the upper half onto the lower, until one is left. So a sum depends on neither threads nor blocks.

`Products` is compiled: if it is of the fast tier, it is forty times as fast as `in_numpy`. All give
the same bits: as lanes begin at +0, none is ever -0, and rows of zeros change nothing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels import blocks
from streamsoup.kernels.constants import (
    GRAIN,
    KINDS,
    LANES,
    PRODUCT_PAIRS,
    PRODUCT_ROWS,
    PRODUCT_TILE,
    ROW_PITCH,
)
from streamsoup.kernels.cpu import has_kernel
from streamsoup.kernels.fast import objects
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.tensors import DTYPES, DType

__all__ = [
    "Products",
    "find_products",
    "has_products",
    "in_numpy",
    "make_plain_products",
    "make_products",
    "multiply",
    "spend_in_numpy",
]

Array = NDArray[np.uint8]
Floats = NDArray[np.float64]

_ROOMS = (
    *("constants.py", "plain.py", "fast/multiply.py", "fast/prefetching.py", "fast/products.py"),
    "fast/vectors.py",
)
"""What the kernel of the fast tier is compiled from."""


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
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 8)(kernel.address)
        self._kernel = kernel
        self._own = threading.local()

    @staticmethod
    def held_nbytes(n_rows: int) -> int:
        """Return the bytes of scratch that a thread holds: those of either tier's kernel."""
        n_pairs = min(n_rows * (n_rows + 1) // 2, max(PRODUCT_PAIRS, PRODUCT_ROWS * n_rows))
        fast = 2 * PRODUCT_TILE + n_rows * ROW_PITCH + LANES * n_pairs + 8
        return 8 * max(fast, GRAIN * (n_rows + 2))

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
            out.ctypes.data,
            out.shape[1],
        )


def has_products() -> bool:
    """Return whether the fast tier's kernel can be compiled on this processor: see `has_kernel`."""
    return has_kernel(DTYPES["F16"])


def find_products() -> Products | None:
    """Return the fast kernel if it is in the cache, or None. Takes milliseconds."""
    found = objects.find("inner", _ROOMS) if has_products() else None
    return None if found is None else Products(found)


def spend_in_numpy(seconds: float) -> float:
    """Note seconds spent for want of the compiled kernel; return those of all runs so far."""
    return objects.spend("inner", _ROOMS, seconds)


def make_products() -> Products:
    """Compile the fast kernel, and keep it: seconds, once.

    Raises whatever numba does where it is broken, or other than the fast tier knows it.
    """
    from streamsoup.kernels.fast.products import compile_products

    return Products(objects.make("inner", _ROOMS, compile_products))


def make_plain_products() -> Products:
    """Return the plain kernel: half a second if numba has it in its cache, else some seconds.

    Raises whatever numba does where it is broken.
    """
    from streamsoup.kernels.plain import compile_products

    kernel = compile_products()
    return Products(Kernel(kernel.address, kernel))
