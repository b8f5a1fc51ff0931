"""Memory for sums and snapshots: of the process, or of a file without a name on a disk.

Such a file is gone when the process ends, however it ends, so nothing is left behind and no two
processes meet. Its pages are the system's cache: what is written goes to the disk as it needs room.
"""

from __future__ import annotations

import mmap
import os
import tempfile

from streamsoup.errors import OutputError, printable
from streamsoup.sizes import nbytes_text
from streamsoup.system import libc
from streamsoup.system.buffers import Bytes, buffer

__all__ = ["ALIGNMENT", "room", "starts"]

ALIGNMENT = 64
"""Bytes that each tensor's part of a room begins at a multiple of: a cache line."""


def room(nbytes: int, folder: str | None) -> Bytes:
    """Return `nbytes` of zeros: in memory, or in a file in `folder`, whose space is reserved.

    Raises `OutputError` if the file cannot be made or the disk is too full, and `MemoryError`.
    """
    if folder is None or not nbytes:
        return buffer(nbytes)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if not libc.reserve(file.fileno(), nbytes):
                file.truncate(nbytes)
            return memoryview(mmap.mmap(file.fileno(), nbytes))
    except OSError as error:
        raise OutputError(
            f"{printable(folder)}: cannot hold {nbytes_text(nbytes, up=True)} of an average: "
            f"{error.strerror or error}; choose another folder for place"
        ) from None


def starts(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return where parts of these bytes begin in a room, and its size.

    >>> starts({"a": 10, "b": 1})
    ({'a': 0, 'b': 64}, 128)
    """
    found, at = {}, 0
    for name, nbytes in sizes.items():
        found[name] = at
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return found, at
