"""A folder that only this user can have written to, for files that are executed when read.

A digest in a file proves that it is whole, but not who wrote it. These conditions do:

1. Every folder on the way from ``/`` belongs to the user or to root, and no other user may write
   to it; a sticky one such as ``/tmp`` may lie above, as others cannot rename our entries there.
2. A symbolic link on the way is followed if it belongs to the user or root, and lies in a folder
   of which 1 holds and that is not sticky and open to others.
3. The last folder is not a link, belongs to the user, and has mode 0700, with which it is made.
4. A file in it is opened without following links; its descriptor says that it is a regular file of
   the user, has no other name, and has mode 0700. Streamsoup writes no other file with that mode:
   a file in a soup, wherever it came from, is never mistaken for a kernel.
5. The bytes that are executed are those that were read through that descriptor.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from streamsoup.system.folders import Folder

__all__ = ["open_private", "read_private", "write_private"]

_MODE = 0o700
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LINKS = 40
"""Most links followed on one path: the system's own limit."""

_LIMIT = 1 << 26
"""Most bytes of a file that are read; kernels have some ten thousand."""


def open_private(path: str) -> Folder | None:
    """Open a folder that only this user can have written to, made if need be.

    Return None if it does not exist and cannot be made, or others may write to it. `path` is
    absolute.
    """
    if not os.path.isabs(path):
        return None
    above, name = os.path.split(os.path.normpath(path))
    try:
        way = _walk(above)
    except OSError:
        return None
    with way:
        try:
            folder = _enter(way, name)
        except OSError:
            return None
    status = os.fstat(folder.descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != _MODE:
        folder.close()
        return None
    return folder


def read_private(folder: Folder, name: str) -> bytes:
    """Return the content of a file that only this user can have written. Raises `OSError`."""
    descriptor = folder.file(name, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == _MODE
        if not (ours and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            raise PermissionError(f"{name}: is not a file that only this user can have written")
        if status.st_size > _LIMIT:
            raise OSError(f"{name}: is too large")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def write_private(folder: Folder, name: str, content: bytes) -> None:
    """Write a file into a folder of `open_private`, whole or not at all. Raises `OSError`."""
    temporary = f".{os.urandom(8).hex()}"
    descriptor = folder.file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, _MODE)  # whatever the umask
            file.write(content)
        folder.move(temporary, folder, name)
    except BaseException:
        with suppress(OSError):
            folder.remove(temporary)
        raise


def _walk(path: str) -> Folder:
    """Open the folder at an absolute path, by steps 1 and 2. Raises `OSError`."""
    way = [Folder.open("/")]
    n_links = 0
    try:
        _check(way[-1])
        todo = path.split("/")[::-1]
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if len(way) > 1:
                    way.pop().close()
                continue
            status = way[-1].status(part)
            if status is None or not stat.S_ISLNK(status.st_mode):
                way.append(_enter(way[-1], part))
                _check(way[-1])
                continue
            n_links += 1
            here = os.fstat(way[-1].descriptor)
            if status.st_uid not in _trusted() or here.st_mode & _OTHERS or n_links > _LINKS:
                raise PermissionError(f"{part}: is a link that others may have put there")
            target = os.readlink(part, dir_fd=way[-1].descriptor)
            if target.startswith("/"):
                while len(way) > 1:
                    way.pop().close()
            todo += target.split("/")[::-1]
        return way.pop()
    finally:
        for folder in way:
            folder.close()


def _enter(folder: Folder, name: str) -> Folder:
    """Open a folder in another, made for this user alone if it is not there."""
    try:
        return folder.folder(name)
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(name, _MODE, dir_fd=folder.descriptor)
        return folder.folder(name)


def _check(folder: Folder) -> None:
    """Raise `OSError` for a folder in which another user may have put or renamed something."""
    status = os.fstat(folder.descriptor)
    sticky = status.st_mode & stat.S_ISVTX
    if status.st_uid not in _trusted() or (status.st_mode & _OTHERS and not sticky):
        raise PermissionError(f"{folder.path}: others may write there")


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()
