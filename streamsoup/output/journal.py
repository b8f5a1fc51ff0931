"""An append-only log that survives a kill at any instant. Writing and searching resume from it.

A record is one line: a checksum, its length, and a JSON object. The checksum is that of all JSON
objects up to and including this one, concatenated: so each record is valid only behind those that
it was written behind, and a record that was lost, moved, doubled or inserted is detected.

A record is on disk before `append` returns. A tail that was cut short within a record is dropped;
whole records missing at the end cannot be told from ones never written; damage anywhere else is
refused, as nothing after it can be trusted. This detects accidents, not forgeries.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamsoup.errors import OutputError, ResumeError, printable
from streamsoup.system.closing import Closing
from streamsoup.system.folders import Folder
from streamsoup.system.libc import sync

__all__ = ["Journal", "named", "records_of"]

_BEGINNING = re.compile(rb"[0-9a-f]{0,8}(\Z|\0| (\Z|\0|[0-9]))")
"""How a record that was cut short begins: another file is not mistaken for a journal."""


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn an `OSError` into an `OutputError` that names the file and says that work is kept.

    For searches, which keep answers in a journal and beside it; soups have their own message.
    """
    try:
        yield
    except OSError as error:
        # numpy's error on a full disk has no number: "3000 requested and 2016 written".
        why = error.strerror or "the disk did not take all of it; is it full?"
        raise OutputError(
            f"{printable(path)}: cannot be written: {why}; fix that and run again to resume"
        ) from error


class Journal(Closing):
    """The records of a file, and the means to add one. Not safe for several writers."""

    def __init__(self, path: str, folder: Folder | None = None) -> None:
        """Open or create the journal at `path`, check its records, and drop a torn tail.

        With `folder`, to which `path` leads, it is opened by its name there.

        Raises `ResumeError` if a record is damaged, `OSError` for a link and for a file with other
        names. Costs a read of the whole file, and holds one record at a time: those of a large soup
        would fill the memory.
        """
        self.path = path
        self.n_records = 0
        self.first: dict[str, Any] = {}
        """The first record; empty if there is none."""
        self.last: dict[str, Any] = {}
        """The last record; empty if there is none."""
        self._checksum = 0
        """Of all records."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        if folder is None:
            self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        else:
            self._descriptor = folder.file(os.path.basename(path), flags)
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise OSError(errno.EPERM, "it is not a regular file with one name", path)
            nbytes = 0
            for record, checksum, end in _parse(self._descriptor, path):
                self._count(record, checksum)
                nbytes = end
            os.ftruncate(self._descriptor, nbytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the records again, one after the other."""
        for record, _, _ in _parse(self._descriptor, self.path):
            yield record

    def append(self, record: dict[str, Any], *, wait: bool = True) -> None:
        """Append a record, and wait until it is on disk. If that fails, remove it again.

        Without `wait` it survives a kill, but a power failure only after `sync`.
        """
        text = json.dumps(record, separators=(",", ":")).encode()
        checksum = zlib.crc32(text, self._checksum)
        line = b"%08x %d %b\n" % (checksum, len(text), text)
        nbytes = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            if wait:
                sync(self._descriptor)
        except OSError:
            # The cache would still show what is not on disk.
            os.ftruncate(self._descriptor, nbytes)
            raise
        self._count(record, checksum)

    def sync(self) -> None:
        """Wait until all records are on disk."""
        sync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            # Forgotten first: even a failed close frees the number, which may be reused at once.
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _count(self, record: dict[str, Any], checksum: int) -> None:
        self.first = self.first if self.n_records else record
        self.last = record
        self._checksum = checksum
        self.n_records += 1


def records_of(folder: Folder, name: str = "journal") -> Iterator[dict[str, Any]]:
    """Yield the records of a journal that another run left, which is not changed; none if absent.

    Raises `ResumeError` if one is damaged.
    """
    try:
        descriptor = folder.file(name, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        for record, _, _ in _parse(descriptor, os.path.join(folder.path, name)):
            yield record
    finally:
        os.close(descriptor)


def _parse(descriptor: int, path: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yield each record, its checksum, and the offset of its end; stop at a torn tail."""
    position = number = checksum = 0
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        line = file.readline()
        while line:
            following = file.readline()
            # Only a line without its end, or with unwritten (zero) bytes at the end of the file,
            # can come from a write that was cut short.
            torn = not line.endswith(b"\n") or (b"\0" in line and not following)
            if torn and _BEGINNING.match(line):
                return
            found = _decode(line.removesuffix(b"\n"), checksum)
            number += 1
            if found is None:
                after = f", or was not written after record {number - 1}" if number > 1 else ""
                raise ResumeError(
                    f"{printable(path)}: record {number} is damaged{after}; "
                    f"remove {printable(os.path.dirname(path) or path)} to start anew"
                )
            record, checksum = found
            position += len(line)
            yield record, checksum, position
            line = following


def _decode(line: bytes, before: int) -> tuple[dict[str, Any], int] | None:
    """Return the record of a line, and its checksum; None if the line is damaged.

    `before` is the checksum of the record before it.
    """
    parts = line.split(b" ", 2)
    if len(parts) != 3 or parts[1] != b"%d" % len(parts[2]):
        return None
    checksum = zlib.crc32(parts[2], before)
    if parts[0] != b"%08x" % checksum:
        return None
    record = json.loads(parts[2])
    return (record, checksum) if isinstance(record, dict) else None
