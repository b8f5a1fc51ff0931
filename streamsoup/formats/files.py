"""Files of an ingredient, opened again while the stream passes: mapped, or by plain reads.

Each is opened by its path and must still be the file whose header was read. `Access` is what the
cursors of one thread share: whether to map, and the few descriptors. Mappings hold no descriptor
(Python's own `mmap` keeps one each, and 64 ingredients of 200 shards would run out).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

from streamsoup.errors import FormatError, option, printable
from streamsoup.formats.shards import Identity, StoredFile
from streamsoup.system.buffers import Bytes, Crc32
from streamsoup.system.folders import Folder
from streamsoup.system.libc import map_file, unmap
from streamsoup.system.regular import close_read

__all__ = [
    "Access",
    "Descriptors",
    "Kept",
    "Window",
    "is_mounted",
    "on_network",
    "open_shard",
    "read_into",
]

_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "fuse.")
"""Beginnings of the names of network file systems, where mapping reads page by page.

What a program serves (``fuse.``: sshfs, object stores) mostly is one, and never worse for being
read."""


_MOUNTS = "/proc/self/mounts"
"""See proc_mounts(5). psutil reads it, too: to import it would take an eighth of a small soup."""


KEPT_NBYTES = 1 << 32
"""Bytes of ingredients that stay mapped from one run to the next: 8 MiB of page tables."""


def open_shard(shard: StoredFile) -> int:
    """Open a shard for reading. Raise `ChangedIngredientError` if it is another file now."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = Identity.of(os.fstat(descriptor))
        except OSError:
            close_read(descriptor)
            raise
    except FileNotFoundError:
        shard.check_unchanged()
        raise
    except OSError as error:
        raise FormatError(
            f"{printable(shard.path)}: cannot be opened: {error.strerror}; fix that and run again"
        ) from None
    if found != shard.identity:
        close_read(descriptor)
        shard.check_unchanged()
        raise shard.changed("changed")
    return descriptor


class _Mapping:
    """An address range that is unmapped with the last view of it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes

    def __del__(self) -> None:
        unmap(self.address, self.nbytes)


class Window:
    """A range of a shard in memory, read by touching it. If the file shrinks, that is SIGBUS.

    It is unmapped with the last view of it, and all that the kernel held for it goes then. Giving
    pages of a whole mapped shard back would leave their page tables, a 512th of all that is read,
    and pages that were mapped around those touched.
    """

    def __init__(self, shard: StoredFile, begin: int, end: int) -> None:
        """Map bytes `begin` to `end` of the shard, read-only."""
        self._begin = begin - begin % mmap.PAGESIZE
        self._end = end
        nbytes = end - self._begin
        descriptor = open_shard(shard)
        try:
            address = map_file(descriptor, self._begin, nbytes)
        except OSError as error:
            raise FormatError(
                f"{printable(shard.path)}: cannot be mapped: {error.strerror}; "
                f"{option('io', 'read')} does without"
            ) from None
        finally:
            close_read(descriptor)
        window = (ctypes.c_uint8 * nbytes).from_address(address)
        window.mapping = _Mapping(address, nbytes)  # type: ignore[attr-defined]
        self._content = memoryview(window).cast("B")

    def covers(self, begin: int, end: int) -> bool:
        """Return True if bytes `begin` to `end` of the shard are in it."""
        return self._begin <= begin and end <= self._end

    def view(self, begin: int, end: int) -> Bytes:
        """Return bytes `begin` to `end` of the shard."""
        return self._content[begin - self._begin : end - self._begin]


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

    def of(self, shard: StoredFile) -> Window | None:
        """Return a shard's window, or None if there is no more room for it."""
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


class Descriptors:
    """The few descriptors one thread keeps open, the least recently used closed first."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` open."""
        self._limit = max(1, limit)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._close: Callable[[int], None] = close_read

    def reading(self, shard: StoredFile) -> int:
        """Return a descriptor to read `shard` with."""
        found = self._get(shard.path)
        return self._keep(shard.path, open_shard(shard)) if found is None else found

    def writing(self, path: str, folder: Folder | None = None) -> int:
        """Return a descriptor to write the existing file at `path`, relative to `folder`."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._close = os.close  # its error may be the only word of a write that failed
        key = path if folder is None else os.path.join(folder.path, path)
        found = self._get(key)
        if found is None:
            above = None if folder is None else folder.descriptor
            found = self._keep(key, os.open(path, flags, dir_fd=above))
        return found

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._close(self._open.popitem()[1])

    def _get(self, path: str) -> int | None:
        if path in self._open:
            self._open.move_to_end(path)
        return self._open.get(path)

    def _keep(self, path: str, descriptor: int) -> int:
        self._open[path] = descriptor
        if len(self._open) > self._limit:
            self._close(self._open.popitem(last=False)[1])
        return descriptor


class Access:
    """What the cursors of one thread share to read files with.

    Cursors of sources that open no files of their own pass it on to the sources they read from.
    """

    def __init__(
        self,
        *,
        mapped: bool,
        n_descriptors: int = 1,
        window_nbytes: int = 1 << 23,
        kept: Kept | None = None,
        find_crc32: Callable[[], Crc32] = lambda: zlib.crc32,
        compiles: bool = False,
    ) -> None:
        """Open nothing yet.

        Args:
            mapped: Whether files are mapped rather than read.
            n_descriptors: How many files are kept open to be read at once.
            window_nbytes: Bytes of a file that are mapped at once, at least.
            kept: Shards that stay mapped from one run to the next.
            find_crc32: Returns what computes CRC-32; called by those that check one.
            compiles: Whether a source that computes may compile what it computes with.
        """
        self.mapped = mapped
        self.find_crc32 = find_crc32
        self.compiles = compiles
        self.window_nbytes = window_nbytes
        self.kept = kept
        self.descriptors = Descriptors(n_descriptors)

    def close(self) -> None:
        """Close the descriptors."""
        self.descriptors.close()


def read_into(descriptor: int, block: Bytes, offset: int) -> None:
    """Fill `block` from `offset`, however short each read is. Raise `EOFError` at the end."""
    while block:
        n = os.preadv(descriptor, [block], offset)
        if n == 0:
            raise EOFError
        block = block[n:]
        offset += n


def on_network(paths: Sequence[str]) -> bool:
    """Return True if any of `paths` lies on a network file system, or that cannot be told."""
    try:
        mounts = _mounts()
    except OSError:  # a sandbox without /proc
        return True
    for folder in {os.path.dirname(os.path.realpath(path)) for path in paths}:
        at = folder
        while at not in mounts and at != os.path.dirname(at):
            at = os.path.dirname(at)
        if mounts.get(at, "").startswith(_NETWORK):
            return True
    return False


def is_mounted(folder: str) -> bool:
    """Return True if something is mounted at a folder, be it another folder of the same disk."""
    with suppress(OSError):
        return os.path.realpath(folder) in _mounts()
    return os.path.ismount(folder)


def _mounts() -> dict[str, str]:
    """Return the kind of file system at each place where one is mounted."""
    with open(_MOUNTS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        rows = [line.split(" ") for line in file]
    return {re.sub(r"\\([0-7]{3})", _character, row[1]): row[2].lower() for row in rows}


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))
