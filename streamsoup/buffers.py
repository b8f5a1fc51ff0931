"""Raw bytes in memory, and where they lie: what is read, summed, digested and written.

Without numpy, which takes as long to import as summing a gigabyte: rooms that compute with elements
make arrays of these bytes (``numpy.frombuffer``), without a copy.
"""

from __future__ import annotations

import ctypes
import mmap

__all__ = ["Bytes", "address_of", "buffer"]

Bytes = memoryview
"""One after the other, in one dimension. Their elements are little-endian."""


def buffer(nbytes: int) -> Bytes:
    """Give `nbytes` of memory, all zero. It begins with a page, and takes none until touched.

    Raises `MemoryError` where there is none.
    """
    try:
        return memoryview(mmap.mmap(-1, nbytes)) if nbytes else memoryview(b"")
    except OSError:
        raise MemoryError(f"{nbytes} bytes") from None


def address_of(block: Bytes) -> int:
    """Give the address of a block, which may be read-only. The caller keeps it alive.

    >>> block = buffer(100)
    >>> address_of(block[10:]) - address_of(block)
    10
    """
    if block.readonly or not len(block):
        import numpy as np

        return np.frombuffer(block, np.uint8).ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
