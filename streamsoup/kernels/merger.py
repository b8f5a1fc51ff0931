"""The compiled kernels of `merging`, wrapped so that Python can call them.

`find_merger` takes them from the cache of object files; `make_merger` compiles what is missing.
Numba is imported only to compile.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels.constants import KINDS
from streamsoup.kernels.fast import objects
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.kernels.merge_rows import LANES, N_WORDS, ROW, TILE
from streamsoup.kernels.philox import Key
from streamsoup.system.buffers import Bytes, address_of
from streamsoup.tensors import DType

__all__ = ["Merger", "Rows", "find_merger", "make_merger", "make_plain_merger"]

_ROOMS = ("constants.py", "merge_rows.py", "merging.py", "plain.py")
"""What the kernels are compiled from."""

_NAMES = ("count", "collect", "total", "rank", "merge")
_INTEGER, _NUMBER = ctypes.c_int64, ctypes.c_double
_ARGUMENTS: dict[str, list[Any]] = {
    "count": [_INTEGER] * 4,
    "collect": [_INTEGER] * 7,
    "total": [_INTEGER] * 4,
    "rank": [*[_INTEGER] * 8, _NUMBER, _NUMBER],
    "merge": [*[_INTEGER] * 8, _NUMBER, _NUMBER],
}


class Rows:
    """What the kernels have to know of a block: a row of words for each ingredient.

    The words (`merge_rows.ROW`) are those of the base in row 0, and of the others from row 1 on.
    """

    def __init__(self, raw: Sequence[Bytes], dtypes: Sequence[DType], n: int) -> None:
        """Note where the `n` elements of each ingredient lie; nothing else is asked for yet."""
        self.n, self.k = n, len(raw) - 1
        self.words = np.zeros((self.k + 1, N_WORDS), np.int64)
        self.numbers = np.ones((self.k + 1, 2))
        """Factor and coefficient of each ingredient."""
        self.words[:, ROW.address] = [address_of(block) for block in raw]
        self.words[:, ROW.kind] = [KINDS.index(dtype.name) for dtype in dtypes]
        self._held: list[object] = [raw]  # keeps the memory at these addresses

    def keep(self, mask: NDArray[np.bool_]) -> int:
        """Return the address of a mask ``(element,)``, which is kept until the rows are gone."""
        self._held.append(mask)
        return mask.ctypes.data


class Merger:
    """The kernels, to be called by many threads at once. They run without the GIL."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        """Wrap the kernels, in the order of their names; they live as long as this does."""
        self._count, self._collect, self._total, self._rank, self._merge = (
            ctypes.CFUNCTYPE(_INTEGER, *_ARGUMENTS[name])(kernel.address)
            for name, kernel in zip(_NAMES, kernels, strict=True)
        )
        self._kernels = kernels
        self._own = threading.local()

    def count(self, rows: Rows) -> bool:
        """Count digits of magnitudes, or ties; return True if an element is not finite."""
        return bool(self._count(_at(rows.words), rows.k, rows.n, self._scratch(rows.k)))

    def collect(
        self, rows: Rows, ingredient: int, most: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Return the keys of an ingredient above LOW and below HIGH, and their places.

        At most `most` of them, both ``(found,)``; then True if an element is not finite.
        """
        room = min(most, rows.n)
        found = np.empty((2, room), np.int64)
        n = self._collect(
            _at(rows.words),
            ingredient,
            rows.n,
            _at(found[0]),
            _at(found[1]),
            room,
            self._scratch(rows.k),
        )
        n, bad = (-n - 1, True) if n < 0 else (n, False)
        return found[0, :n], found[1, :n], bad

    def total(self, rows: Rows) -> bool:
        """Sum magnitudes over grains; return True if an element is not finite."""
        return bool(self._total(_at(rows.words), rows.k, rows.n, self._scratch(rows.k)))

    def rank(
        self, tasks: NDArray[np.float64], key: Key, first: int, least: float, spread: float
    ) -> NDArray[np.bool_]:
        """Return what is kept of rows of a task vector ``(row, element)``, by rank and at random.

        Args:
            tasks: Rows of two elements or more.
            key: Of the random words.
            first: Flat index of the first element.
            least: Probability of the smallest magnitude of a row.
            spread: How much larger that of the largest is.
        """
        n_rows, n = tasks.shape
        mask = np.empty((n_rows, n), np.bool_)
        scratch = np.empty(5 * n + 8 + 256, np.int64)
        self._rank(
            _at(tasks),
            n_rows,
            n,
            key.low,
            key.high,
            first,
            mask.ctypes.data,
            _at(scratch),
            least,
            spread,
        )
        return mask

    def merge(
        self,
        rows: Rows,
        dtype: DType,
        output: Bytes,
        *,
        consensus: bool,
        normalize: bool,
        whole: float,
        scale: float,
        counts: bool = False,
    ) -> tuple[bool, bool]:
        """Make a block of the soup, rounded to `dtype`, in `output`.

        With `counts`, it is the mean of what is not zero that is added to the base.

        Returns True if an input, and True if a result is not finite.
        """
        flags = self._merge(
            _at(rows.words),
            _at(rows.numbers),
            rows.k,
            rows.n,
            self._scratch(rows.k),
            address_of(output),
            KINDS.index(dtype.name),
            consensus | normalize << 1 | counts << 2,
            whole,
            scale,
        )
        return bool(flags & 1), bool(flags & 2)

    def _scratch(self, k: int) -> int:
        """Return the address of the thread's own scratch: for any kernel, tiles and lanes."""
        n = (k + 7) * TILE + 2 * (k + 1) * LANES
        if getattr(self._own, "n", 0) < n:
            self._own.scratch, self._own.n = np.empty(n), n
        return _at(self._own.scratch)


def find_merger() -> Merger | None:
    """Return the kernels if all are in the cache, or None. Takes milliseconds."""
    kernels = []
    for name in _NAMES:
        kernel = objects.find(f"merge-{name}", _ROOMS)
        if kernel is None:
            return None
        kernels.append(kernel)
    return Merger(kernels)


def make_merger() -> Merger:
    """Compile the kernels, and keep them: some ten seconds, once.

    Raises whatever numba does where it is broken, or has no object files.
    """
    from streamsoup.kernels.merging import compile_object

    return Merger(
        [objects.make(f"merge-{name}", _ROOMS, partial(compile_object, name)) for name in _NAMES]
    )


def make_plain_merger() -> Merger:
    """Compile the kernels for this process alone."""
    from streamsoup.kernels.merging import compile_plain

    made = [compile_plain(name) for name in _NAMES]
    return Merger([Kernel(kernel.address, kernel) for kernel in made])


def _at(array: NDArray[np.float64] | NDArray[np.int64]) -> int:
    return array.ctypes.data
