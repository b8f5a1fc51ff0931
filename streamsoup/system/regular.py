"""Reading regular files: every file from outside is opened here, never a FIFO or a device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from streamsoup.system.folders import Folder

__all__ = ["close_read", "read_file", "read_whole", "reading"]


@contextmanager
def reading(path: str, *, follows: bool = True) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file, and yield its descriptor and its status.

    Raise `OSError` for what cannot be opened, for folders, FIFOs and devices, and for a link unless
    it `follows` one.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    flags |= 0 if follows else os.O_NOFOLLOW
    with _regular(os.open(path, flags), path) as opened:
        yield opened


@contextmanager
def _regular(descriptor: int, path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a descriptor and its status, then close it; raise `OSError` unless it is regular."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        yield descriptor, status
    finally:
        close_read(descriptor)


def read_whole(path: str, limit: int) -> bytes:
    """Return the content of a regular file. Raises `OSError` for others, and beyond `limit` bytes.

    The bytes that are read count, not the size in the status: files in ``/proc`` have size 0.
    """
    with reading(path) as (descriptor, _):
        return _read(descriptor, path, limit)


def read_file(folder: Folder, name: str, limit: int) -> bytes:
    """Return the content of a regular file in an open folder. See `read_whole`."""
    path = os.path.join(folder.path, name)
    with _regular(folder.file(name, os.O_RDONLY), path) as (descriptor, _):
        return _read(descriptor, path, limit)


def _read(descriptor: int, path: str, limit: int) -> bytes:
    text = bytearray()
    while piece := os.read(descriptor, 1 << 20):
        text += piece
        if len(text) > limit:
            raise OSError(errno.EFBIG, "it is too large", path)
    return bytes(text)


def close_read(descriptor: int) -> None:
    """Close a descriptor that was only read from. Errors are ignored: the data was read."""
    with suppress(OSError):
        os.close(descriptor)
