"""The lock of a folder: one file in it, held by one run, which it names.

How it is taken:

1. The file is opened, and created if it does not exist; never through a link, and never one with a
   second hard link, since it is written to.
2. It is locked (flock). If another run holds the lock, the error names that run.
3. If by now the name leads to another file, or to none, the former holder removed the file that was
   just locked, and a third run may have locked a new one: start again from 1. So two runs that both
   pass this step have locked the same file, and flock grants it to one at a time.
4. Some file systems have no flock; some grant it to every process, or to every other machine. So
   the content counts, too: if it names a run of this machine that is still alive, that run holds
   the lock.
5. The name of this run is written into the file, and erased before the lock is released: a name
   that is found belongs to a run that is working, or was killed.

Without a working flock, two runs that are at step 4 at the same instant, or on two machines, both
pass. Outputs must be correct even then: see `streamsoup.output.staging`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import time
from contextlib import suppress

from streamsoup.errors import printable
from streamsoup.system.closing import Closing
from streamsoup.system.folders import Folder

__all__ = ["HeldError", "Holder", "Lock"]

log = logging.getLogger("streamsoup")

_MISSING = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""Errors of a flock on file systems that have none."""

_NBYTES = 4096
"""Most bytes of a lock that are read."""


class Holder:
    """The run that a lock names. The text is untrusted: it is shown, and never acted upon."""

    def __init__(self, text: bytes) -> None:
        """Parse the content of a lock; anything but a lock's record names no run."""
        try:
            found = json.loads(text.strip(b"\0") or b"{}")
        except (ValueError, RecursionError):
            found = {}
        self._found: dict[str, object] = found if isinstance(found, dict) else {}

    @staticmethod
    def this() -> bytes:
        """Return the record of this process."""
        record: dict[str, object] = {"pid": os.getpid(), "supervisor": os.getppid()}
        record["host"] = os.uname().nodename
        record["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        record["started"] = _started(os.getpid())
        return json.dumps(record).encode()

    def __bool__(self) -> bool:
        """Return True if a run is named."""
        return bool(self._found)

    def __str__(self) -> str:
        """Return the run's process, host and time, for a message."""
        if not self:
            return "another run"
        pid, host, since = (printable(self._found.get(key), 60) for key in ("pid", "host", "since"))
        return f"process {pid} on {host} since {since}"

    @property
    def is_here(self) -> bool:
        """Return True if it runs, or ran, on this machine."""
        return self._found.get("host") == os.uname().nodename

    @property
    def may_live(self) -> bool:
        """Return True unless it is known to be dead, or being torn down after a kill."""
        if not self.is_here:
            return bool(self)
        return self._lives("pid") and self._lives("supervisor")

    @property
    def surely_lives(self) -> bool:
        """Return True if it is another process of this machine, alive."""
        pid = self._found.get("pid")
        if not self.is_here or pid == os.getpid() or not self.may_live:
            return False
        started = self._found.get("started")
        return started is not None and isinstance(pid, int) and _started(pid) == started

    def _lives(self, key: str) -> bool:
        import psutil

        pid = self._found.get(key)
        try:
            return isinstance(pid, int) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError, OverflowError):
            return False


class HeldError(Exception):
    """Another run holds the lock."""

    def __init__(self, holder: Holder, why: str = "") -> None:
        """Name the run; `why` is added where the file system has no locks."""
        super().__init__(f"{holder}{why}")
        self.holder = holder


class Lock(Closing):
    """The lock of a folder, held until it is closed."""

    def __init__(self, folder: Folder, *, patience_s: float = 0.0) -> None:
        """Lock the file ``lock`` in a folder.

        Args:
            folder: The open folder; it stays open as long as the lock is held.
            patience_s: How long to wait for a holder that was killed: it may still be in an fsync.

        Raises:
            HeldError: Another run holds it.
            FileNotFoundError: The folder was removed.
            OSError: The file cannot be opened, or was not made by streamsoup.
        """
        self._folder = folder
        self.descriptor = -1
        deadline = time.monotonic() + patience_s
        while self.descriptor < 0:
            try:
                self.descriptor = _take(folder)
            except HeldError as error:
                if error.holder.may_live or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        with suppress(OSError):  # the lock is held all the same; others cannot see by which run
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, Holder.this(), 0)

    def remove(self) -> None:
        """Remove the file, before the folder itself is removed."""
        self._folder.remove("lock")

    def close(self) -> None:
        """Release the lock. Closing the descriptor alone would leave it to forked children."""
        if self.descriptor < 0:
            return
        descriptor, self.descriptor = self.descriptor, -1
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _take(folder: Folder) -> int:
    """Lock the file by steps 1 to 4 above; return its descriptor, or -1 to start again."""
    descriptor = folder.file("lock", os.O_RDWR | os.O_CREAT)
    try:
        _check_ours(descriptor, folder)
        missing = ""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(Holder(os.pread(descriptor, _NBYTES, 0))) from None
        except OSError as error:
            if error.errno not in _MISSING:
                why = f"its lock cannot be taken ({error.strerror})"
                raise OSError(error.errno, why, os.path.join(folder.path, "lock")) from None
            missing = str(error.strerror)
        there = folder.status("lock")
        if there is None or not os.path.samestat(there, os.fstat(descriptor)):
            os.close(descriptor)
            return -1
        holder = Holder(os.pread(descriptor, _NBYTES, 0))
        if holder.surely_lives:
            raise HeldError(holder)
        if missing:
            where = printable(folder.path)
            if holder.may_live and not holder.is_here:
                raise HeldError(
                    holder,
                    f" (the file system cannot lock: {missing}; if that run is over, remove "
                    f"{where}/lock)",
                )
            log.warning(
                "%s: the file system cannot lock files (%s); let no other run write there",
                where,
                missing,
            )
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor


def _check_ours(descriptor: int, folder: Folder) -> None:
    """Raise `OSError` for a file that streamsoup did not make, before it is written to."""
    status = os.fstat(descriptor)
    path = os.path.join(folder.path, "lock")
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise OSError(errno.EPERM, "its lock was not made by streamsoup", path)
    text = os.pread(descriptor, _NBYTES, 0).strip(b"\0")
    if text and not text.startswith((b'{"pid"', b"process ")):
        raise OSError(errno.EPERM, "its lock was not made by streamsoup", path)


def _started(pid: int) -> int | None:
    """Return a process's start in ticks since boot: it tells apart reuses of a process id."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
