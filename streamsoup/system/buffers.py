"""Raw bytes in memory and their addresses: blocks that are read, summed, digested and written.

Without numpy, which takes as long to import as summing a gigabyte: rooms that compute with elements
make arrays of these bytes (``numpy.frombuffer``), without a copy.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from streamsoup.system.libc import is_same_memory

__all__ = ["Bytes", "Crc32", "address_of", "buffer", "is_same"]

Bytes = memoryview
"""Contiguous bytes in one dimension. Elements in them are little-endian."""

Crc32 = Callable[[Bytes, int], int]
"""Returns the CRC-32 of what had that of its second argument, followed by a block."""


def buffer(nbytes: int) -> Bytes:
    """Return `nbytes` of zeroed memory. It is page-aligned, and takes no memory until touched.

    Raises `MemoryError` if it cannot be had.
    """
    if not nbytes:
        return memoryview(b"")
    try:
        # Private: by default, forked processes would share the mapping.
        return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError:
        raise MemoryError(f"{nbytes} bytes") from None


def address_of(block: Bytes) -> int:
    """Return the address of a block, which the caller keeps alive; 0 for an empty block.

    It must not be marked as read-only. (Mapped files are not, though writing to them is SIGSEGV.)

    >>> block = buffer(100)
    >>> address_of(block[10:]) - address_of(block)
    10
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(block)) if len(block) else 0


def is_same(one: Bytes, other: Bytes) -> bool:
    """Return True if two blocks hold the same bytes. Python would compare them one by one."""
    n = len(one)
    return n == len(other) and (not n or is_same_memory(address_of(one), address_of(other), n))
