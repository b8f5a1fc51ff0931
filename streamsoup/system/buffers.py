"""Raw bytes in memory, and where they lie: what is read, summed, digested and written.

Without numpy, which takes as long to import as summing a gigabyte: rooms that compute with elements
make arrays of these bytes (``numpy.frombuffer``), without a copy.
"""

from __future__ import annotations

import ctypes
import mmap

from streamsoup.system.libc import is_same_memory

__all__ = ["Bytes", "address_of", "buffer", "is_same"]

Bytes = memoryview
"""One after the other, in one dimension. Their elements are little-endian."""


def buffer(nbytes: int) -> Bytes:
    """Give `nbytes` of memory, all zero. It begins with a page, and takes none until touched.

    Raises `MemoryError` where there is none.
    """
    if not nbytes:
        return memoryview(b"")
    try:
        # Private: what is mapped without saying so would be shared with forked processes.
        return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError:
        raise MemoryError(f"{nbytes} bytes") from None


def address_of(block: Bytes) -> int:
    """Give the address of a block, which the caller keeps alive; 0 of an empty one.

    It must not be marked as read-only. (Mapped files are not, though writing to them is SIGSEGV.)

    >>> block = buffer(100)
    >>> address_of(block[10:]) - address_of(block)
    10
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(block)) if len(block) else 0


def is_same(one: Bytes, other: Bytes) -> bool:
    """Whether two blocks hold the same bytes. Python would look at them one by one."""
    n = len(one)
    return n == len(other) and (not n or is_same_memory(address_of(one), address_of(other), n))
