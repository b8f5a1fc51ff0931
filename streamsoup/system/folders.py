"""Folders as the system has them: names made durable, removed, renamed in one step; locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = [
    "EXCHANGE",
    "NO_REPLACE",
    "is_movable",
    "make_private",
    "remove_any",
    "rename",
    "replacing",
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


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Give the path of a file to write, which then takes the place of the one at `path`, whole.

    It is removed if that fails.
    """
    temporary = f"{path}.partial"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def make_private(path: str) -> None:
    """Make a folder that nobody else may write to or look into. Raises `FileExistsError`."""
    os.mkdir(path, 0o700)


def stranger(path: str) -> str:
    """Say who else may have written into a folder of `make_private`; nothing, if it is ours alone.

    What is in it would otherwise be believed, and be made part of what we make.
    """
    status = os.stat(path)
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid == os.geteuid() and not others:
        return ""
    owner, mode = _as_made(os.path.dirname(path))
    if status.st_uid not in (os.geteuid(), owner):
        return f"belongs to user {status.st_uid}"
    return "may be written to by others" if others & ~mode else ""


def _as_made(folder: str) -> tuple[int, int]:
    """Give owner and mode of a private folder made in a folder: some file systems choose both."""
    import tempfile

    try:
        made = tempfile.mkdtemp(prefix=".", dir=folder)
        status = os.stat(made)
        os.rmdir(made)
    except OSError:
        return os.geteuid(), 0
    return status.st_uid, status.st_mode


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
