"""Ranges of a tensor whose elements do not lie one after the other in its file.

A tensor is made of *chunks*, boxes of it that lie somewhere with strides of their own: one, for a
view in a file of ``torch.save``; one for each rank, in a distributed checkpoint. A range of its
elements in C order is cut into boxes, each box into its parts of chunks, and each part into pieces
whose bytes lie close enough together to be had at once. Elements are copied from there by numpy,
which needs no memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from streamsoup.system.buffers import Bytes

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Chunk", "ViewAt", "boxes", "gather", "is_in_order"]


class Chunk(msgspec.Struct, frozen=True):
    """A box of a tensor, and where its elements lie."""

    starts: tuple[int, ...]
    """Index of its first element in each dimension of the tensor."""
    sizes: tuple[int, ...]
    file: int
    begin: int
    """Offset of its first element in the file."""
    strides: tuple[int, ...]
    """Bytes from one element to the next in each dimension."""
    member: int
    """Number of the zip member it lies in."""
    member_begin: int
    """Offset of that member's first byte in the file."""


ViewAt = Callable[[Chunk, int, int, bool], Bytes]
"""Returns bytes `begin` to `end` of the file that a chunk lies in, valid until the next call; the
last argument tells if every one of them is an element that is wanted."""


def is_in_order(sizes: Sequence[int], strides: Sequence[int], unit: int) -> bool:
    """Return True if elements of `unit` bytes lie one after the other, in C order."""
    expected = unit
    for n, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def boxes(shape: Sequence[int], first: int, last: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut elements `first` to `last` in C order into boxes, by their starts and sizes, in order.

    There are two for each dimension at most, and one more.

    >>> list(boxes((2, 3), 1, 5))
    [([0, 1], [1, 2]), ([1, 0], [1, 2])]
    """
    if not shape or first >= last:
        if first < last:
            yield [], []
        return
    row = math.prod(shape[1:])
    at = first // row
    while first < last:
        within = first - at * row
        if within or last - first < row:
            end = min(row, last - at * row)
            for starts, sizes in boxes(shape[1:], within, end):
                yield [at, *starts], [1, *sizes]
            first, at = at * row + end, at + 1
        else:
            n = (last - first) // row
            yield [at, *[0] * (len(shape) - 1)], [n, *shape[1:]]
            first, at = first + n * row, at + n


def gather(
    shape: Sequence[int],
    chunks: Sequence[Chunk],
    unit: int,
    first: int,
    block: Bytes,
    view: ViewAt,
    limit: int,
) -> None:
    """Fill `block` with the elements of a tensor from the `first` on, in C order.

    Args:
        shape: Of the tensor.
        chunks: What it is made of; they leave no element out.
        unit: Bytes of an element: 1, 2, 4 or 8.
        first: Index of the first element wanted, in C order.
        block: Bytes of as many elements as are wanted.
        view: Returns ranges of files.
        limit: Bytes that `view` may be asked for at once; more for a single element only.
    """
    import numpy as np

    dtype = np.dtype(f"<u{unit}")
    at = 0
    for starts, sizes in boxes(shape, first, first + len(block) // unit):
        nbytes = unit * math.prod(sizes)
        out = np.frombuffer(block[at : at + nbytes], dtype).reshape(sizes)
        at += nbytes
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(starts, chunk.starts, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(starts, sizes, chunk.starts, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            index: tuple[Any, ...] = (
                *(slice(a - s, b - s) for a, b, s in zip(low, high, starts, strict=True)),
                ...,  # so that an element alone is an array, too
            )
            part = out[index]
            begin = chunk.begin + sum(
                (a - s) * stride
                for a, s, stride in zip(low, chunk.starts, chunk.strides, strict=True)
            )
            _copy(part, chunk, begin, view, limit)


def _copy(
    out: np.ndarray[Any, Any],
    chunk: Chunk,
    begin: int,
    view: ViewAt,
    limit: int,
) -> None:
    """Fill an array with elements of a chunk, the first of which lies at `begin`."""
    import numpy as np

    strides = chunk.strides
    reach = [(n - 1) * stride for n, stride in zip(out.shape, strides, strict=True)]
    span = sum(reach) + out.itemsize
    if span > limit and max(reach, default=0):
        widest = reach.index(max(reach))
        half = out.shape[widest] // 2
        before = (slice(None),) * widest
        _copy(out[(*before, slice(None, half))], chunk, begin, view, limit)
        begin += half * strides[widest]
        _copy(out[(*before, slice(half, None))], chunk, begin, view, limit)
        return
    raw = view(chunk, begin, begin + span, span == out.nbytes)
    out[...] = np.ndarray(out.shape, out.dtype, raw, 0, tuple(strides))
