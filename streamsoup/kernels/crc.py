"""CRC-32 of blocks: zlib's, or a compiled kernel of the fast tier that gives the same numbers.

A core of an AMD EPYC takes 4.7 to 6 GiB/s by zlib 1.2.13, and 14.5 by the kernel (of blocks of a
megabyte, from its cache); a soup reads about as fast as zlib. The kernel is kept as those of sums
are (`kernels.fast.objects`).
"""

from __future__ import annotations

import ctypes
import zlib

from streamsoup.kernels.fast import objects, processor
from streamsoup.kernels.fast.folding import LANES_NBYTES, compile_folding
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.kernels.tiers import tier
from streamsoup.system.buffers import Bytes, Crc32, address_of

__all__ = ["FoldedCrc32", "fastest_crc32", "has_folding"]

_ROOMS = ("fast/folding.py",)
"""What the kernel is compiled from."""

_LEAST = 4096
"""Bytes below which zlib is no slower."""


class FoldedCrc32:
    """The compiled kernel. Several threads may call it at once."""

    def __init__(self, kernel: Kernel) -> None:
        """Wrap the kernel, which lives as long as this does."""
        self._kernel = kernel
        words = [ctypes.c_uint64] * 4
        self._fold = ctypes.CFUNCTYPE(ctypes.c_uint64, *words)(kernel.address)

    def __call__(self, block: Bytes, crc: int) -> int:
        """Return the CRC-32 of what had that of `crc`, followed by a block."""
        if len(block) < _LEAST:
            return zlib.crc32(block, crc)
        n = len(block) - len(block) % LANES_NBYTES
        left = (ctypes.c_char * LANES_NBYTES)()
        # zlib inverts what it begins with, and what it returns.
        self._fold(address_of(block), n, crc ^ 0xFFFFFFFF, ctypes.addressof(left))
        return zlib.crc32(block[n:], zlib.crc32(left, 0xFFFFFFFF))


def has_folding() -> bool:
    """Return True if this processor has carry-less products that the kernel is written for."""
    return processor.is_x86() and processor.has_pclmulqdq()


def fastest_crc32(*, compiles: bool) -> Crc32:
    """Return the kernel if it is in the cache, or if it may be compiled: 50 ms, once; else zlib's.

    Raises `RecipeError` for an unknown tier (`kernels.tiers.tier`).
    """
    if tier() != "fast" or not has_folding():
        return zlib.crc32
    kernel = objects.find("crc32", _ROOMS)
    if kernel is None and compiles:
        try:
            kernel = objects.make("crc32", _ROOMS, compile_folding)
        # Any: another llvmlite fails in ways that cannot be listed, and zlib does as well.
        except Exception:
            return zlib.crc32
    return zlib.crc32 if kernel is None else FoldedCrc32(kernel)
