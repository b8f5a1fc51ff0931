"""One thread's way through embeddings that lack rows: its own, then the mean of the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streamsoup.formats.source import Cursor
from streamsoup.kernels import blocks
from streamsoup.kernels.environment import standard_floats
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import DType

__all__ = ["Lengthening"]


class Lengthening(Cursor):
    """Reads the elements of the first of several sources, and of the others those it lacks."""

    def __init__(
        self, held: Sequence[Mapping[str, tuple[int, DType]]], cursors: Sequence[Cursor]
    ) -> None:
        """Hold a cursor of each source, and its elements of each lengthened tensor, and dtype."""
        self._held, self._cursors = held, cursors

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        """Return a view of a tensor that is as it is stored."""
        return None if tensor in self._held[0] else self._cursors[0].view(tensor, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        """Fill a block with elements, in float64 where the tensor is lengthened."""
        if tensor not in self._held[0]:
            self._cursors[0].read(tensor, begin, block)
            return
        values = np.frombuffer(block, np.float64)
        first, end = begin // 8, begin // 8 + len(values)
        start = first
        for stop in sorted({held[tensor][0] for held in self._held} | {end}):
            if start < stop <= end:  # elements that the same sources have
                self._fill(tensor, start, values[start - first : stop - first])
                start = stop

    def _fill(self, tensor: str, start: int, values: NDArray[np.float64]) -> None:
        """Write elements from `start` on: the first's, or the mean of those that have them."""
        having = [n for n, held in enumerate(self._held) if held[tensor][0] > start]
        having = having[:1] if having[0] == 0 else having
        with standard_floats(), np.errstate(all="ignore"):
            values[:] = self._values(having[0], tensor, start, len(values))
            for n in having[1:]:
                values += self._values(n, tensor, start, len(values))
            if len(having) > 1:
                values /= len(having)

    def _values(self, n: int, tensor: str, start: int, length: int) -> NDArray[np.float64]:
        """Return elements of one of the sources as float64."""
        _, dtype = self._held[n][tensor]
        begin, end = start * dtype.itemsize, (start + length) * dtype.itemsize
        raw = self._cursors[n].view(tensor, begin, end)
        if raw is None:
            raw = buffer(end - begin)
            self._cursors[n].read(tensor, begin, raw)
        with np.errstate(invalid="ignore"):
            return blocks.widen(blocks.array_of(raw), dtype).astype(np.float64)

    def close(self) -> None:
        """Close all cursors."""
        for cursor in self._cursors:
            cursor.close()
