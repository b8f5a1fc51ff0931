"""Blocks of ingredients for a thread at work: mapped, or read into its own few buffers.

A *session* belongs to one thread. It gives the same block of several ingredients as raw bytes,
valid until its next call, and lets go of what the stream has passed.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Sequence
from mmap import PAGESIZE
from typing import Literal, Protocol

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.errors import ChangedIngredientError, FormatError, check_choice, printable
from streamsoup.formats.files import Descriptors, Window, on_network
from streamsoup.formats.memory import MemoryShard
from streamsoup.formats.shards import Ingredient, Shard
from streamsoup.system.buffers import Bytes, buffer

__all__ = [
    "Kept",
    "MappedReader",
    "PlainReader",
    "Reader",
    "Session",
    "mapped_nbytes",
    "open_reader",
    "will_map",
]

WINDOW = 1 << 23
"""Bytes of an ingredient that a thread maps at once, at least: small enough for any number of
ingredients, large enough that opening and mapping cost little beside reading."""

WIDEST_WINDOW = 1 << 25
"""Bytes that it maps at most: wider windows bring nothing. Unmapping stops all other threads: with
eight ingredients and two threads a soup takes 5 % less with 16 MiB than with 8 (measured)."""

WINDOWS = 1 << 28
"""Bytes of all windows of a run, as long as none is narrower than it may be."""


KEPT_NBYTES = 1 << 32
"""Bytes of ingredients that stay mapped from one run to the next: 8 MiB of page tables."""


def will_map(ingredients: Sequence[Ingredient], io: Literal["auto", "mmap", "read"]) -> bool:
    """Whether to map shards rather than read them.

    Left to us, local files are mapped, and files on a network are read: there a mapping fetches
    page by page (safetensors#562, vllm#24469). Raises `RecipeError` for any other word.
    """
    check_choice("io", io, ("auto", "mmap", "read"))
    if io != "auto":
        return io == "mmap"
    shards = [shard for each in ingredients for shard in each.shards if not shard.in_memory]
    return not on_network([shard.path for shard in shards])


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
        sizes = [s.identity.size for s in ingredient.shards if not isinstance(s, MemoryShard)]
        if sizes:  # each thread has a window of its own, rounded to pages at both ends
            nbytes += memory.threads * (min(max(sizes), window) + 2 * PAGESIZE)
    return nbytes


def open_reader(
    plan: MixPlan, memory: MemoryPlan, *, mapped: bool, kept: Kept | None = None
) -> Reader:
    """Give the reader of a run; what is mapped may be `kept` for others."""
    return MappedReader(plan, memory, kept) if mapped else PlainReader(plan, memory)


class Kept:
    """Whole shards that stay mapped from one run to the next, as many as are within some bytes.

    Mapping pages, and letting go of them, takes as long as summing them. What stays costs page
    tables: a 512th of its bytes. Several threads may use it at once.
    """

    def __init__(self, nbytes: int = KEPT_NBYTES) -> None:
        """Map nothing yet, and never more than `nbytes`."""
        self._left = nbytes
        self._windows: dict[str, Window] = {}
        self._lock = threading.Lock()

    def of(self, shard: Shard) -> Window | None:
        """Give a shard's window; None if there is no more room for it."""
        window = self._windows.get(shard.path)
        if window is not None:
            return window
        with self._lock:
            if shard.path not in self._windows and shard.identity.size <= self._left:
                try:
                    self._windows[shard.path] = Window(shard, 0, shard.identity.size)
                except FormatError:  # no address space is left, and small windows may still do
                    self._left = 0
                    return None
                self._left -= shard.identity.size
            return self._windows.get(shard.path)


class Session(Protocol):
    """What one thread reads with."""

    def block(
        self, tensor: PlannedTensor, first: int, last: int, start: int, n_units: int
    ) -> list[Bytes]:
        """Give units `start` to `start + n_units` of ingredients `first` to `last - 1`."""

    def close(self) -> None:
        """Give back what the session holds."""


class Reader(Protocol):
    """What a run reads with."""

    def session(self) -> Session:
        """Give a thread its own session."""


class MappedReader:
    """Ingredients read by touching mapped memory: nothing is copied, nothing allocated."""

    def __init__(self, plan: MixPlan, memory: MemoryPlan, kept: Kept | None = None) -> None:
        """Map nothing yet: shards are mapped when first touched."""
        self._plan, self._kept = plan, kept
        self._window = window_nbytes(plan, memory)

    def session(self) -> _MappedSession:
        """Give a thread its own windows."""
        return _MappedSession(self._plan, self._window, self._kept)


class _MappedSession:
    """A window into each ingredient, which moves along with the stream."""

    def __init__(self, plan: MixPlan, window: int, kept: Kept | None) -> None:
        self._plan, self._nbytes, self._kept = plan, window, kept
        self._windows: dict[int, tuple[int, Window]] = {}

    def block(
        self, tensor: PlannedTensor, first: int, last: int, start: int, n_units: int
    ) -> list[Bytes]:
        """Give views of the mapped shards."""
        blocks = []
        for i in range(first, last):
            number, begin, end = _range(self._plan, tensor, i, start, n_units)
            shard = self._plan.ingredients[i].shards[number]
            if isinstance(shard, MemoryShard):
                blocks.append(shard.memory[begin:end])
                continue
            if self._kept is not None and (whole := self._kept.of(shard)) is not None:
                blocks.append(whole.view(begin, end))
                continue
            at, window = self._windows.get(i, (-1, None))
            if window is None or at != number or not window.covers(begin, end):
                # The former one goes first.
                self._windows.pop(i, None)
                window = None
                stop = min(max(end, begin + self._nbytes), shard.identity.size)
                window = Window(shard, begin, stop)
                self._windows[i] = number, window
            blocks.append(window.view(begin, end))
        return blocks

    def close(self) -> None:
        """Let go of the windows."""
        self._windows.clear()


class PlainReader:
    """Ingredients read into small buffers that are used again and again."""

    def __init__(self, plan: MixPlan, memory: MemoryPlan) -> None:
        """Open nothing yet."""
        self._plan = plan
        self._memory = memory

    def session(self) -> _PlainSession:
        """Give a thread its own buffers and descriptors."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3 // self._memory.threads
        return _PlainSession(self._plan, self._memory, Descriptors(min(64, limit)))


class _PlainSession:
    def __init__(self, plan: MixPlan, memory: MemoryPlan, files: Descriptors) -> None:
        self._plan = plan
        self._files = files
        widest = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
        self._buffers = [buffer(memory.block * max(1, widest)) for _ in range(memory.group)]

    def block(
        self, tensor: PlannedTensor, first: int, last: int, start: int, n_units: int
    ) -> list[Bytes]:
        """Read each ingredient's range with one large read."""
        blocks = []
        for own, i in zip(self._buffers, range(first, last), strict=False):
            number, begin, end = _range(self._plan, tensor, i, start, n_units)
            shard = self._plan.ingredients[i].shards[number]
            block = own[: end - begin]
            if isinstance(shard, MemoryShard):
                block[:] = shard.memory[begin:end]
                blocks.append(block)
                continue
            try:
                _read_into(self._files.reading(shard), block, begin)
            except EOFError:
                shard.check_unchanged()
                raise ChangedIngredientError(
                    f"{printable(shard.path)}: ended at byte {begin}, before its header says; run "
                    "again once nobody writes to it"
                ) from None
            except OSError as error:
                raise FormatError(
                    f"{printable(shard.path)}: cannot be read at byte {begin}: {error.strerror}; "
                    "mend that, or restore the file"
                ) from error
            blocks.append(block)
        return blocks

    def close(self) -> None:
        """Close the descriptors."""
        self._files.close()


def _range(
    plan: MixPlan, tensor: PlannedTensor, i: int, start: int, n_units: int
) -> tuple[int, int, int]:
    """Locate units of a tensor in ingredient `i`: shard number, first byte, end."""
    source = tensor.sources[plan.layout_of[i]]
    size = source.dtype.itemsize if source.dtype.averaged else 1
    data_begin = plan.ingredients[i].shards[source.shard].data_begin
    begin = data_begin + source.offset + start * size
    return source.shard, begin, begin + n_units * size


def _read_into(descriptor: int, block: Bytes, offset: int) -> None:
    """Fill `block` from `offset`, however short each read comes back."""
    while block:
        n = os.preadv(descriptor, [block], offset)
        if n == 0:
            raise EOFError
        block = block[n:]
        offset += n
