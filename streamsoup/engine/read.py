"""Blocks of ingredients for a thread at work: viewed where they lie, or read into its buffers.

A *session* belongs to one thread and holds a cursor of each ingredient's source. It gives the same
block of several ingredients as raw bytes, valid until its next call.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from mmap import PAGESIZE
from typing import Literal

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.errors import FormatError, check_choice
from streamsoup.formats.files import Access, Kept, on_network
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.source import Cursor
from streamsoup.kernels.crc import fastest_crc32
from streamsoup.system.buffers import Bytes, Crc32, buffer

__all__ = ["Kept", "Reader", "Session", "mapped_nbytes", "open_reader", "will_map"]

COMPILE_NBYTES = 1_000_000_000
"""Bytes read from which on it is worth a twentieth of a second to compile a CRC-32, once."""

WINDOW = 1 << 23
"""Bytes of an ingredient that a thread maps at once, at least: small enough for any number of
ingredients, large enough that opening and mapping cost little beside reading."""

WIDEST_WINDOW = 1 << 25
"""Bytes that it maps at most: wider windows bring nothing. Unmapping stops all other threads: with
eight ingredients and two threads a soup takes 5 % less with 16 MiB than with 8 (measured)."""

WINDOWS = 1 << 28
"""Bytes of all windows of a run, as long as none is narrower than it may be."""


def will_map(ingredients: Sequence[Ingredient], io: Literal["auto", "mmap", "read"]) -> bool:
    """Return True if files are to be mapped rather than read.

    With ``auto``, local files are mapped, and files on a network are read: there a mapping fetches
    page by page (safetensors#562, vllm#24469). Raise `RecipeError` for any other word.
    """
    check_choice("io", io, ("auto", "mmap", "read"))
    if io != "auto":
        return io == "mmap"
    return not on_network([path for each in ingredients for path in each.source.files])


def window_nbytes(plan: MixPlan, memory: MemoryPlan) -> int:
    """Return the bytes of an ingredient that a thread maps at once."""
    n_windows = len(plan.ingredients) * memory.threads
    return max(WINDOW, min(WIDEST_WINDOW, WINDOWS // n_windows))


def mapped_nbytes(plan: MixPlan, memory: MemoryPlan, *, mapped: bool) -> int:
    """Return the most bytes of files that one pass has mapped at a time; 0 if it reads them.

    They are no part of `MemoryPlan.peak_nbytes`: the system takes such pages back when it needs
    them, but what counts resident memory counts them. A search may keep more mapped (`Kept`).
    """
    if not mapped:
        return 0
    window = window_nbytes(plan, memory)
    nbytes = 0
    for ingredient in plan.ingredients:
        sizes = [os.path.getsize(path) for path in ingredient.source.files]
        if sizes:  # each thread has a window of its own, rounded to pages at both ends
            nbytes += memory.threads * (min(max(sizes), window) + 2 * PAGESIZE)
    return nbytes


def open_reader(
    plan: MixPlan, memory: MemoryPlan, *, mapped: bool, kept: Kept | None = None
) -> Reader:
    """Return the reader of a run; what is mapped may be `kept` for others."""
    return Reader(plan, memory, mapped=mapped, kept=kept)


class Reader:
    """What the threads of a run read with."""

    def __init__(
        self, plan: MixPlan, memory: MemoryPlan, *, mapped: bool, kept: Kept | None = None
    ) -> None:
        """Open nothing yet."""
        self._plan, self._memory, self._mapped, self._kept = plan, memory, mapped, kept
        self._window = window_nbytes(plan, memory)
        self._crc32: Crc32 | None = None

    def session(self) -> Session:
        """Return a session for one thread."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3 // self._memory.threads
        access = Access(
            mapped=self._mapped,
            n_descriptors=min(64, limit),
            window_nbytes=self._window,
            kept=self._kept,
            find_crc32=self._find_crc32,
            compiles=self._memory.compiles,
        )
        return Session(self._plan, self._memory, access)

    def _find_crc32(self) -> Crc32:
        """Return what computes CRC-32 fastest: compiled, if it was or the job is worth it."""
        if self._crc32 is None:
            worth = self._memory.compiles and self._plan.nbytes_read >= COMPILE_NBYTES
            self._crc32 = fastest_crc32(compiles=worth)
        return self._crc32


class Session:
    """What one thread reads with: a cursor for each ingredient, and buffers for a group of them."""

    def __init__(self, plan: MixPlan, memory: MemoryPlan, access: Access) -> None:
        """Open a cursor of each source; they open files when they are first asked."""
        self._plan, self._access = plan, access
        self._cursors: list[Cursor] = [
            ingredient.source.cursor(access) for ingredient in plan.ingredients
        ]
        widest = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
        self._nbytes = memory.block * max(1, widest)
        self._buffers: list[Bytes] = []

    def block(
        self, tensor: PlannedTensor, first: int, last: int, start: int, n_units: int
    ) -> list[Bytes]:
        """Return units `start` to `start + n_units` of ingredients `first` to `last - 1`."""
        blocks = []
        n_read = 0
        layout_of = self._plan.layout_of
        for i in range(first, last):
            dtype = tensor.sources[layout_of[i]].dtype
            size = dtype.itemsize if dtype.averaged else 1
            begin, end = start * size, (start + n_units) * size
            cursor = self._cursors[i]
            block = cursor.view(tensor.name, begin, end)
            if block is None:
                block = self._buffer(n_read)[: end - begin]
                cursor.read(tensor.name, begin, block)
                n_read += 1
            elif len(block) != end - begin:
                raise FormatError(
                    f"{self._plan.ingredients[i].where(tensor.name)}: its source returned "
                    f"{len(block)} bytes from byte {begin} on, expected {end - begin}; its cursor "
                    "is wrong"
                )
            blocks.append(block)
        return blocks

    def close(self) -> None:
        """Close the cursors and what they share."""
        for cursor in self._cursors:
            cursor.close()
        self._access.close()

    def _buffer(self, number: int) -> Bytes:
        """Return one of the thread's own buffers: there are as many as were ever needed at once."""
        while len(self._buffers) <= number:
            self._buffers.append(buffer(self._nbytes))
        return self._buffers[number]
