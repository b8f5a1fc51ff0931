"""The files of a soup: each finished block is written once, at the place the plan gave it.

`FileSink` makes files at their full size before the work begins, so that a full disk is known at
once, and writes blocks; the disk begins with each leaf as soon as it is finished. `FileLedger`
syncs now and then what is finished, and then notes it in the journal with its digests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterable

import xxhash

from streamsoup.engine.digest import SIZE, Digests
from streamsoup.engine.plan import NOTES, FilePlan, Leaf, MixPlan
from streamsoup.formats.files import Descriptors
from streamsoup.output.journal import Journal
from streamsoup.sizes import nbytes_text
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import remove_any

__all__ = ["FileLedger", "FileSession", "FileSink", "write_file"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2

EARLY_NBYTES = 1 << 20
"""Bytes of a leaf from which the disk is told to begin with it: smaller ones go together."""


class FileSink:
    """The shards of a soup in the making: where each block goes."""

    def __init__(self, plan: MixPlan, files: FilePlan, folder: str) -> None:
        """Take the folder that holds them; nothing is opened yet."""
        self._plan = plan
        self._files = files
        self._folder = folder
        self._paths = [os.path.join(folder, file.name) for file in files.files]

    def session(self) -> FileSession:
        """Return a thread's own means to write."""
        return FileSession(self)

    def path(self, number: int) -> str:
        """Return the path of a shard in the making."""
        return self._paths[number]

    def file_of(self, leaf: Leaf) -> int:
        """Return the number of the shard that holds a leaf."""
        return self._files.places[leaf.tensor][0]

    def place(self, leaf: Leaf, start: int) -> tuple[str, int]:
        """Return the file and the offset at which unit `start` of the leaf's tensor belongs."""
        number, offset = self._files.places[leaf.tensor]
        return self.path(number), offset + start * self.unit_nbytes(leaf)

    def unit_nbytes(self, leaf: Leaf) -> int:
        """Return the bytes of a unit of the leaf's tensor."""
        return self._plan.tensors[leaf.tensor].unit_nbytes

    def prepare(self, *, resumes: bool) -> None:
        """Reserve the space of all shards, and write their headers.

        Where a run `resumes` work, what the disk holds is read from the disk, not from the cache.
        """
        expected = {file.name for file in self._files.files}
        for entry in list(os.scandir(self._folder)):
            status = entry.stat(follow_symlinks=False)
            lone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if entry.name not in expected or not lone:
                remove_any(entry.path)
        missing = sum(file.nbytes for file in self._files.files) - _held_nbytes(self._folder)
        free = shutil.disk_usage(self._folder).free
        if missing > free:
            raise _full(missing, free)
        for number, file in enumerate(self._files.files):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path(number), flags, 0o666)
            try:
                if os.fstat(descriptor).st_size != file.nbytes:
                    os.ftruncate(descriptor, 0)
                    _reserve(descriptor, file.nbytes, self._folder)
                elif resumes:
                    # After a failed write the disk and the cache may differ.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)

    def sync(self, numbers: Iterable[int] | None = None) -> None:
        """Wait until some shards, or all, are on disk."""
        for number in range(len(self._files.files)) if numbers is None else numbers:
            sync_file(self.path(number))


class FileLedger:
    """What is finished of a `FileSink`, in a journal beside it.

    A leaf is noted after its bytes were synced, so what the journal says survives a power cut; it
    is believed only if the bytes match its digest.
    """

    def __init__(self, plan: MixPlan, sink: FileSink, journal: Journal, digests: Digests) -> None:
        """Read what earlier runs noted into `digests`."""
        self._plan, self._sink, self._journal, self._digests = plan, sink, journal, digests
        self._lock = threading.Lock()
        self._finished: list[int] = []
        self._touched: set[int] = set()
        """Files with leaves that are finished and not noted yet."""
        self._noted = self._read_notes()

    def noted(self, leaf: Leaf) -> bool:
        """Return True if an earlier run noted a leaf."""
        return bool(self._noted[leaf.number])

    @property
    def resumes(self) -> bool:
        """Whether an earlier run noted any leaf."""
        return any(self._noted)

    def restore(self, leaf: Leaf) -> bytes | None:
        """Return the digests of a leaf that was noted, if its bytes still match them."""
        if not self._noted[leaf.number]:
            return None
        digests = self._digests.get(leaf.number)
        path, offset = self._sink.place(leaf, leaf.start)
        nbytes = leaf.n_units * self._sink.unit_nbytes(leaf)
        return digests if _digest(path, offset, nbytes) == digests[:SIZE] else None

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Keep the digests of a leaf for the next note."""
        with self._lock:
            self._digests.put(leaf.number, digests)
            if not self._noted[leaf.number]:
                self._finished.append(leaf.number)
                self._touched.add(self._sink.file_of(leaf))

    def checkpoint(self) -> None:
        """Sync what is written, then note it in the journal. Waits for the disk."""
        with self._lock:
            finished, self._finished = self._finished, []
            touched, self._touched = self._touched, set()
        self._sink.sync(sorted(touched))
        for at in range(0, len(finished), NOTES):
            notes = [[leaf, self._digests.get(leaf).hex()] for leaf in finished[at : at + NOTES]]
            self._journal.append({"leaves": notes})

    def _read_notes(self) -> bytearray:
        """Put what an earlier run noted into the table; return a 1 for each of its leaves."""
        noted = bytearray(self._plan.n_leaves)
        row = SIZE * (1 + len(self._plan.ingredients))
        for record in self._journal:
            for number, text in record.get("leaves", ()):
                digests = bytes.fromhex(text)
                if len(digests) == row and 0 <= number < self._plan.n_leaves:
                    self._digests.put(number, digests)
                    noted[number] = 1
        return noted


def _digest(path: str, offset: int, nbytes: int) -> bytes | None:
    """Return the digest of a part of a file, read piece by piece; None if it ends before."""
    digest = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while nbytes > 0:
            part = os.pread(descriptor, min(nbytes, 1 << 20), offset)
            if not part:
                return None
            digest.update(part)
            nbytes -= len(part)
            offset += len(part)
    finally:
        os.close(descriptor)
    return digest.digest()


class FileSession:
    """What one thread writes with."""

    def __init__(self, sink: FileSink) -> None:
        """Open nothing yet."""
        self._sink = sink
        self._files = Descriptors(2)

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return None: files are written, never mapped."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Write a finished block from unit `start` on; the last of a leaf starts the disk on it."""
        path, offset = self._sink.place(leaf, start)
        write_at(self._files.writing(path), block, offset)
        unit = self._sink.unit_nbytes(leaf)
        nbytes = leaf.n_units * unit
        if nbytes >= EARLY_NBYTES and start + len(block) // unit == leaf.start + leaf.n_units:
            begin_writing(path, self._sink.place(leaf, leaf.start)[1], nbytes)

    def close(self) -> None:
        """Close the descriptors."""
        self._files.close()


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of `content` at `offset`, however short each write comes back."""
    view = memoryview(content)
    while view:
        n = os.pwrite(descriptor, view, offset)
        if n == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[n:]
        offset += n


def write_file(path: str, content: Iterable[bytes]) -> None:
    """Make a whole file out of its pieces, and wait until it is on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        offset = 0
        for piece in content:
            write_at(descriptor, piece, offset)
            offset += len(piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_writing(path: str, offset: int, nbytes: int) -> None:
    """Have the disk begin with bytes of a file; wait for nothing.

    Left to the next sync, the disk would idle meanwhile, and the end of the run wait for it: a
    tenth of the time of a soup.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while _LIBC.sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ESPIPE):
                return  # no such call here: the next sync does it
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))  # the next sync may not say so again
    finally:
        os.close(descriptor)


def sync_file(path: str) -> None:
    """Wait until a file's bytes are on disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, nbytes: int, folder: str) -> None:
    """Give a file its full size, and its place on the disk where the file system can."""
    # Not `os.posix_fallocate`: where the file system has no such call, the C library would write
    # to every block instead, which takes hours on a network.
    while _LIBC.fallocate(descriptor, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code == errno.ENOSPC:
            raise _full(nbytes, shutil.disk_usage(folder).free)
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            os.ftruncate(descriptor, nbytes)
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _full(missing: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{os.strerror(errno.ENOSPC)}: the soup needs {nbytes_text(missing, up=True)} more, which "
        f"is {nbytes_text(max(missing - free, 1), up=True)} more than is free",
    )


def _held_nbytes(folder: str) -> int:
    """Bytes already reserved in the folder by an earlier run."""
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))
