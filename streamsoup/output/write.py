"""The files of a soup: each finished block is written once, at its planned place.

`FileSink` makes files at their full size before the work begins, so that a full disk is refused at
once, and writes blocks; each finished leaf starts on its way to the disk at once. `FileLedger`
regularly syncs finished leaves, and then notes them in the journal with their digests.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import xxhash

from streamsoup.engine.digest import SIZE, Digests
from streamsoup.engine.plan import NOTES, FilePlan, Leaf, MixPlan
from streamsoup.formats.files import Descriptors
from streamsoup.sizes import nbytes_text
from streamsoup.system import libc
from streamsoup.system.buffers import Bytes
from streamsoup.system.folders import Folder

__all__ = ["FileLedger", "FileSession", "FileSink", "write_file"]

EARLY_NBYTES = 1 << 20
"""Least bytes of a leaf whose writing to disk is started early: smaller ones wait for a sync."""


class FileSink:
    """The shards of a soup in the making: where each block goes."""

    def __init__(
        self, plan: MixPlan, files: FilePlan, folder: Folder, *, early: bool = True
    ) -> None:
        """Hold the folder of the shards; nothing is opened yet.

        Finished leaves start on their way to the disk at once unless it is not `early`.
        """
        self.early = early
        self._plan = plan
        self._files = files
        self._folders = {"": folder}
        """Where the files are, by the path of the folder; each is opened by its name in one."""

    def session(self) -> FileSession:
        """Return a thread's own means to write."""
        return FileSession(self)

    def at(self, number: int) -> tuple[Folder, str]:
        """Return the folder of a shard in the making, and its name there.

        Its folder was opened by `prepare` or `join`.
        """
        above, name = posixpath.split(self._files.files[number].name)
        return self._folders[above], name

    def file_of(self, leaf: Leaf) -> int:
        """Return the number of the shard that holds a leaf."""
        return self._files.places[leaf.tensor][0]

    def place(self, leaf: Leaf, start: int) -> tuple[int, int]:
        """Return the file and the offset at which unit `start` of the leaf's tensor belongs."""
        number, offset = self._files.places[leaf.tensor]
        return number, offset + start * self.unit_nbytes(leaf)

    def unit_nbytes(self, leaf: Leaf) -> int:
        """Return the bytes of a unit of the leaf's tensor."""
        return self._plan.tensors[leaf.tensor].unit_nbytes

    def prepare(self, *, resumes: bool) -> None:
        """Reserve the space of all shards, and write their headers.

        If the run `resumes` work, caches of the files are dropped: reads then come from the disk.
        """
        root = self._folders[""]
        sizes = {file.name: file.nbytes for file in self._files.files}
        held = _keep(root, "", sizes)
        missing = sum(sizes.values()) - sum(held.values())
        free = _free_nbytes(root)
        if missing > free:
            raise _full(missing, free)
        for number, file in enumerate(self._files.files):
            folder, name = self._open_folder(number)
            there = file.name in held
            flags = os.O_RDWR if there else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = folder.file(name, flags)
            try:
                if not there:
                    _reserve(descriptor, file.nbytes, folder)
                elif resumes:
                    # After a failed write the disk and the cache may differ.
                    libc.forget_cached(descriptor)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)

    def join(self, *, resumes: bool) -> None:
        """Open or make all shards at their full size, as other processes do at the same time.

        Nothing is removed, and no file shrinks. Raises `OSError` for a file with other names.
        """
        for number, file in enumerate(self._files.files):
            folder, name = self._open_folder(number)
            descriptor = folder.file(name, os.O_RDWR | os.O_CREAT)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                    raise OSError(errno.EPERM, "is not a regular file with one name", file.name)
                if status.st_size < file.nbytes:
                    _reserve(descriptor, file.nbytes, folder)
                elif resumes:
                    # After a failed write the disk and the cache may differ.
                    libc.forget_cached(descriptor)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)

    def attach(self, numbers: Iterable[int], *, resumes: bool) -> None:
        """Open the folders of some shards, which another process has made; make nothing.

        Raises `OSError` if they are not there.
        """
        for number in numbers:
            above, name = posixpath.split(self._files.files[number].name)
            folder = self._folders[""]
            for part in above.split("/") if above and above not in self._folders else ():
                inner = folder.folder(part)
                if folder is not self._folders[""]:
                    folder.close()
                folder = inner
            folder = self._folders.setdefault(above, folder)
            descriptor = folder.file(name, os.O_RDWR)
            try:
                if resumes:
                    # After a failed write the disk and the cache may differ.
                    libc.forget_cached(descriptor)
            finally:
                os.close(descriptor)

    def sync(self, numbers: Iterable[int] | None = None) -> None:
        """Wait until some shards, or all, are on disk."""
        for number in range(len(self._files.files)) if numbers is None else numbers:
            sync_file(*self.at(number))

    def _open_folder(self, number: int) -> tuple[Folder, str]:
        """Open the folder of a shard, made if need be, and keep it open; return as `at` does."""
        name = self._files.files[number].name
        above = posixpath.dirname(name)
        if above not in self._folders:
            self._folders[above] = self._folders[""].below(name)[0]
        return self.at(number)

    def close(self) -> None:
        """Close the folders that were opened for shards; the one that was given stays open."""
        for above in [above for above in self._folders if above]:
            self._folders.pop(above).close()


class Notes(Protocol):
    """Where finished leaves are noted: a `Journal`, or what is as good."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read all records."""

    def append(self, record: dict[str, Any], *, wait: bool = True) -> None:
        """Add a record; it is on disk then."""


class FileLedger:
    """The finished leaves of a `FileSink`, in a journal beside it.

    A leaf is noted after its bytes were synced, so what the journal says survives a power cut; it
    is trusted only if the bytes match its digest.
    """

    def __init__(self, plan: MixPlan, sink: FileSink, journal: Notes, digests: Digests) -> None:
        """Read what earlier runs noted into `digests`."""
        self._plan, self._sink, self._journal, self.digests = plan, sink, journal, digests
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
        """True if an earlier run noted any leaf."""
        return any(self._noted)

    def restore(self, leaf: Leaf) -> bytes | None:
        """Return the digests of a leaf that was noted, if its bytes still match them."""
        if not self._noted[leaf.number]:
            return None
        digests = self.digests.get(leaf.number)
        number, offset = self._sink.place(leaf, leaf.start)
        nbytes = leaf.n_units * self._sink.unit_nbytes(leaf)
        found = _digest(*self._sink.at(number), offset, nbytes)
        return digests if found == digests[:SIZE] else None

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Keep the digests of a leaf for the next note."""
        with self._lock:
            self.digests.put(leaf.number, digests)
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
            notes = [[leaf, self.digests.get(leaf).hex()] for leaf in finished[at : at + NOTES]]
            self._journal.append({"leaves": notes})

    def _read_notes(self) -> bytearray:
        """Read earlier notes into the table of digests; return a 1 for each noted leaf."""
        noted = bytearray(self._plan.n_leaves)
        row = SIZE * (1 + len(self._plan.ingredients))
        for record in self._journal:
            for number, text in record.get("leaves", ()):
                digests = bytes.fromhex(text)
                if len(digests) == row and 0 <= number < self._plan.n_leaves:
                    self.digests.put(number, digests)
                    noted[number] = 1
        return noted


def _digest(folder: Folder, name: str, offset: int, nbytes: int) -> bytes | None:
    """Return the digest of a part of a file, read piece by piece; None if it ends before."""
    digest = xxhash.xxh3_128()
    descriptor = folder.file(name, os.O_RDONLY)
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
    """One thread's open files."""

    def __init__(self, sink: FileSink) -> None:
        """Open nothing yet."""
        self._sink = sink
        self._files = Descriptors(2)

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return None: files are written, never mapped."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Write a finished block from unit `start` on; the last of a leaf starts the disk on it."""
        number, offset = self._sink.place(leaf, start)
        folder, name = self._sink.at(number)
        write_at(self._files.writing(name, folder), block, offset)
        unit = self._sink.unit_nbytes(leaf)
        nbytes = leaf.n_units * unit
        ends = start + len(block) // unit == leaf.start + leaf.n_units
        if self._sink.early and nbytes >= EARLY_NBYTES and ends:
            begin = self._sink.place(leaf, leaf.start)[1]
            begin_writing(folder, name, begin, nbytes)

    def close(self) -> None:
        """Close the descriptors."""
        self._files.close()


def _keep(folder: Folder, above: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Remove all below a folder but files that have the size of one of `sizes`, by path.

    Returns the bytes that those take. A file of another size is replaced, never cut: an earlier run
    may still write to it.
    """
    held: dict[str, int] = {}
    for name in folder.names():
        status = folder.status(name)
        if status is None:
            continue
        path = above + name
        lone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        if lone and sizes.get(path) == status.st_size:
            held[path] = status.st_blocks * 512
        elif stat.S_ISDIR(status.st_mode) and any(file.startswith(f"{path}/") for file in sizes):
            with folder.folder(name) as inner:
                held |= _keep(inner, f"{path}/", sizes)
        else:
            folder.remove(name)
    return held


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of `content` at `offset`, however short each write comes back."""
    view = memoryview(content)
    while view:
        n = os.pwrite(descriptor, view, offset)
        if n == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[n:]
        offset += n


def write_file(folder: Folder, name: str, content: Iterable[bytes]) -> None:
    """Make a new file out of its pieces, and wait until it is on disk.

    Args:
        folder: Where to make it.
        name: Relative to the folder, with ``/`` between parts; folders on the way are made.
        content: The pieces, one after the other.
    """
    above, last = folder.below(name)
    try:
        descriptor = above.file(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            offset = 0
            for piece in content:
                write_at(descriptor, piece, offset)
                offset += len(piece)
            libc.sync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        if above is not folder:
            above.close()


def begin_writing(folder: Folder, name: str, offset: int, nbytes: int) -> None:
    """Start writing bytes of a file to disk, without waiting.

    If this were left to the next sync, the disk would idle meanwhile, and the run would wait for it
    at the end: a tenth of the time of a soup.
    """
    descriptor = folder.file(name, os.O_RDWR)
    try:
        libc.begin_writing(descriptor, offset, nbytes)  # where it cannot, the next sync does it
    finally:
        os.close(descriptor)


def sync_file(folder: Folder, name: str) -> None:
    """Wait until a file's bytes are on disk."""
    descriptor = folder.file(name, os.O_RDWR)
    try:
        libc.sync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, nbytes: int, folder: Folder) -> None:
    """Set a new file's full size, and allocate its space if the file system can."""
    try:
        if not libc.reserve(descriptor, nbytes):
            os.ftruncate(descriptor, nbytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(nbytes, _free_nbytes(folder)) from None
        raise


def _free_nbytes(folder: Folder) -> int:
    free = os.fstatvfs(folder.descriptor)
    return free.f_bavail * free.f_frsize


def _full(missing: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{os.strerror(errno.ENOSPC)}: the soup needs {nbytes_text(missing, up=True)} more, which "
        f"is {nbytes_text(max(missing - free, 1), up=True)} more than is free",
    )
