"""Regular files, opened to be read: nothing that comes from anywhere is opened in another way."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["close_read", "reading"]


@contextmanager
def reading(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file, and give its descriptor and its status.

    Raises `OSError` for what cannot be opened, and for folders, FIFOs and devices.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        yield descriptor, status
    finally:
        close_read(descriptor)


def close_read(descriptor: int) -> None:
    """Close what was only read from. What was read is read, whatever a disk says afterwards."""
    with suppress(OSError):
        os.close(descriptor)
