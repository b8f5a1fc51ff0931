"""The file sink: each finished block is written once, at the place the plan gave it.

Files are made at their full size before the work begins, so that a full disk is known at once.
Results are plain writes, and the disk begins with each leaf as soon as it is finished. Now and then
what is finished is synced, and then noted in the journal with its digests; a resumed run believes a
note only if the bytes match it.
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
from streamsoup.output.staging import Staging
from streamsoup.sizes import nbytes_text
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import remove_any

__all__ = ["FileSink", "write_file"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2

EARLY_NBYTES = 1 << 20
"""Bytes of a leaf from which the disk is told to begin with it: smaller ones go together."""


class FileSink:
    """The shards of a soup in the making."""

    def __init__(self, plan: MixPlan, files: FilePlan, staging: Staging, digests: Digests) -> None:
        """Make the files, at full size and with their headers, and read what is finished."""
        self._plan = plan
        self._files = files
        self._staging = staging
        self._digests = digests
        self._paths = [os.path.join(staging.folder, file.name) for file in files.files]
        self._lock = threading.Lock()
        self._finished: list[int] = []
        self._touched: set[int] = set()
        """Files with leaves that are finished and not noted yet."""
        self._noted = self._read_notes()
        self._prepare()

    def session(self) -> FileSession:
        """Give a thread its own means to write."""
        return FileSession(self)

    def path(self, number: int) -> str:
        """Give the path of a shard in the making."""
        return self._paths[number]

    def place(self, leaf: Leaf, start: int) -> tuple[str, int]:
        """Give the file and the offset at which unit `start` of the leaf's tensor belongs."""
        number, offset = self._files.places[leaf.tensor]
        return self.path(number), offset + start * self._plan.tensors[leaf.tensor].unit_nbytes

    def noted(self, leaf: Leaf) -> bytes | None:
        """Give the digests that an earlier run noted for a leaf, if it finished it."""
        return self._digests.get(leaf.number) if self._noted[leaf.number] else None

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Take note of a leaf that is written, and have the disk begin with it."""
        path, offset = self.place(leaf, leaf.start)
        nbytes = leaf.n_units * self._plan.tensors[leaf.tensor].unit_nbytes
        if nbytes >= EARLY_NBYTES and not self._noted[leaf.number]:
            begin_writing(path, offset, nbytes)
        with self._lock:
            self._digests.put(leaf.number, digests)
            if not self._noted[leaf.number]:
                self._finished.append(leaf.number)
                self._touched.add(self._files.places[leaf.tensor][0])

    def checkpoint(self) -> None:
        """Sync what is written, then note it in the journal. Waits for the disk."""
        with self._lock:
            finished, self._finished = self._finished, []
            touched, self._touched = self._touched, set()
        for number in sorted(touched):
            sync_file(self.path(number))
        for at in range(0, len(finished), NOTES):
            notes = [[leaf, self._digests.get(leaf).hex()] for leaf in finished[at : at + NOTES]]
            self._staging.journal.append({"leaves": notes})

    def sync(self) -> None:
        """Wait until every shard is on disk."""
        for number in range(len(self._files.files)):
            sync_file(self.path(number))

    def _read_notes(self) -> bytearray:
        """Put what an earlier run noted into the table; give a 1 for each of its leaves."""
        noted = bytearray(self._plan.n_leaves)
        row = SIZE * (1 + len(self._plan.ingredients))
        for record in self._staging.journal:
            for number, text in record.get("leaves", ()):
                digests = bytes.fromhex(text)
                if len(digests) == row and 0 <= number < self._plan.n_leaves:
                    self._digests.put(number, digests)
                    noted[number] = 1
        return noted

    def _prepare(self) -> None:
        """Reserve the space of all shards, and write their headers."""
        folder = self._staging.folder
        expected = {file.name for file in self._files.files}
        for entry in list(os.scandir(folder)):
            status = entry.stat(follow_symlinks=False)
            lone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if entry.name not in expected or not lone:
                remove_any(entry.path)
        missing = sum(file.nbytes for file in self._files.files) - _held_nbytes(folder)
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise _full(missing, free)
        for number, file in enumerate(self._files.files):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path(number), flags, 0o666)
            try:
                if os.fstat(descriptor).st_size != file.nbytes:
                    os.ftruncate(descriptor, 0)
                    _reserve(descriptor, file.nbytes, folder)
                elif any(self._noted):
                    # Work is believed if the disk gives it back, not the cache: after a failed
                    # write the two may differ.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)


class FileSession:
    """What one thread writes with."""

    def __init__(self, sink: FileSink) -> None:
        """Open nothing yet."""
        self._sink = sink
        self._files = Descriptors(2)

    def restore(self, leaf: Leaf, nbytes: int) -> bytes | None:
        """Give the digests of a leaf that an earlier run finished, if its bytes are still good."""
        digests = self._sink.noted(leaf)
        if digests is None:
            return None
        path, offset = self._sink.place(leaf, leaf.start)
        descriptor = self._files.writing(path)
        digest = xxhash.xxh3_128()
        while nbytes > 0:
            part = os.pread(descriptor, min(nbytes, 1 << 20), offset)
            if not part:
                return None
            digest.update(part)
            nbytes -= len(part)
            offset += len(part)
        return digests if digest.digest() == digests[:SIZE] else None

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Have none: files are written, never mapped."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Write a finished block of the leaf's tensor, from unit `start` on."""
        path, offset = self._sink.place(leaf, start)
        write_at(self._files.writing(path), block, offset)

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
        f"the disk is too full, as the soup needs {nbytes_text(missing, up=True)} more, and that "
        f"is {nbytes_text(max(missing - free, 1), up=True)} more than are free",
    )


def _held_nbytes(folder: str) -> int:
    """Bytes already reserved in the folder by an earlier run."""
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))
