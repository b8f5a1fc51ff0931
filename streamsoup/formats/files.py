"""Files of an ingredient, opened again while the stream passes: mapped, or by plain reads.

Each is opened by its path and must still be the file whose header was read. Mappings hold no
descriptor (Python's own `mmap` keeps one each, and 64 ingredients of 200 shards would run out).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

from streamsoup.errors import ChangedIngredientError, FormatError, option, printable
from streamsoup.formats.shards import Identity, Shard
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import Folder
from streamsoup.system.libc import map_file, unmap
from streamsoup.system.regular import close_read

__all__ = ["Descriptors", "Window", "is_mounted", "on_network", "open_shard"]

_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "fuse.")
"""Beginnings of the names of network file systems, where mapping reads page by page.

What a program serves (``fuse.``: sshfs, object stores) mostly is one, and never worse for being
read."""


_MOUNTS = "/proc/self/mounts"
"""See proc_mounts(5). psutil reads it, too: to import it would take an eighth of a small soup."""


def open_shard(shard: Shard) -> int:
    """Open a shard for reading. Raises `ChangedIngredientError` if it is another file now."""
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
            f"{printable(shard.path)}: cannot be opened: {error.strerror}; mend that, and run again"
        ) from None
    if found != shard.identity:
        close_read(descriptor)
        shard.check_unchanged()
        raise ChangedIngredientError(
            f"{printable(shard.path)}: changed while it was being read; run again once nobody "
            "writes to it"
        )
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

    def __init__(self, shard: Shard, begin: int, end: int) -> None:
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
        """Whether bytes `begin` to `end` of the shard are in it."""
        return self._begin <= begin and end <= self._end

    def view(self, begin: int, end: int) -> Bytes:
        """Give bytes `begin` to `end` of the shard."""
        return self._content[begin - self._begin : end - self._begin]


class Descriptors:
    """The few descriptors one thread keeps open, the least recently used closed first."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` open."""
        self._limit = max(1, limit)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._close: Callable[[int], None] = close_read

    def reading(self, shard: Shard) -> int:
        """Give a descriptor to read `shard` with."""
        found = self._get(shard.path)
        return self._keep(shard.path, open_shard(shard)) if found is None else found

    def writing(self, path: str, folder: Folder | None = None) -> int:
        """Return a descriptor to write the existing file at `path`, relative to `folder`."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._close = os.close  # its error may be the only word of a write that failed
        found = self._get(path)
        if found is None:
            above = None if folder is None else folder.descriptor
            found = self._keep(path, os.open(path, flags, dir_fd=above))
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


def read_bytes(descriptor: int, offset: int, nbytes: int) -> bytes:
    """Read from `offset` on, however short each read comes back; less only at the file's end."""
    parts: list[bytes] = []
    while nbytes > 0 and (part := os.pread(descriptor, nbytes, offset)):
        parts.append(part)
        offset, nbytes = offset + len(part), nbytes - len(part)
    return b"".join(parts)


def on_network(paths: Sequence[str]) -> bool:
    """Whether any of `paths` lies on a network file system, or may, as nobody knows."""
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
    """Whether something is mounted at a folder, be it another folder of the same disk."""
    with suppress(OSError):
        return os.path.realpath(folder) in _mounts()
    return os.path.ismount(folder)


def _mounts() -> dict[str, str]:
    """Give the kind of file system at each place where one is mounted."""
    with open(_MOUNTS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        rows = [line.split(" ") for line in file]
    return {re.sub(r"\\([0-7]{3})", _character, row[1]): row[2].lower() for row in rows}


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))
