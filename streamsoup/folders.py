"""Folders as the system has them: names made durable, removed, renamed in one step; locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from contextlib import suppress

__all__ = [
    "EXCHANGE",
    "NO_REPLACE",
    "is_movable",
    "make_private",
    "remove_any",
    "rename",
    "stranger",
    "sync_folder",
    "unlock",
]

NO_REPLACE, EXCHANGE = 1, 2
"""Ways to rename, as renameat2(2) has them."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_OVERLAY = 0x794C7630
"""What statfs(2) says of an overlay file system, first of all."""


def sync_folder(path: str) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def unlock(descriptor: int) -> None:
    """Let go of a lock, and close its file: closing alone would leave it to forked children."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def remove_any(path: str) -> None:
    """Remove a file, a link or a whole folder; nothing, if there is nothing."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        try:
            os.rmdir(path)  # for what is empty no descriptors are needed, of which none may be left
        except OSError:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass


def make_private(path: str) -> None:
    """Make a folder that nobody else may write to or look into. Raises `FileExistsError`."""
    os.mkdir(path, 0o700)


def stranger(path: str) -> str:
    """Say who else may have written into a folder; nothing, if it is ours alone.

    What is in it would otherwise be believed, and be made part of what we make.
    """
    status = os.stat(path)
    if status.st_uid != os.geteuid() and status.st_uid != _our_uid(os.path.dirname(path)):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written to by others"
    return ""


def _our_uid(folder: str) -> int:
    """Give the owner of what we make in a folder, which some file systems map."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()


def rename(source: str, target: str, flag: int) -> bool:
    """Rename with a flag of Linux's renameat2; False where there is none.

    Raises `FileExistsError` if something is at `target` that may not be replaced.
    """
    if not hasattr(_LIBC, "renameat2"):
        return False
    names = os.fsencode(source), os.fsencode(target)
    while _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
            return False  # EPERM: some containers forbid what they do not know
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), target)
    return True


def is_movable(folder: str, occupied: str) -> bool:
    """Whether a folder can be renamed: on an overlay, not what comes from a lower layer.

    It is tried with a rename that cannot be done, as `occupied`, a folder beside it, is not empty.
    Only on overlays, as nobody knows what a stranger file system makes of that.
    """
    statfs = ctypes.create_string_buffer(512)
    if _LIBC.statfs(os.fsencode(folder), statfs) != 0:
        return True
    if ctypes.c_long.from_buffer(statfs).value != _OVERLAY:
        return True
    try:
        os.rename(folder, occupied)
    except OSError as error:
        return error.errno != errno.EXDEV
    return True
