"""Folders that are opened once; everything in them is reached relative to their descriptors.

A path that is checked and then used is looked up twice, and another process may have put another
folder in its place in between. A descriptor stays with the folder that was checked.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from streamsoup.system.closing import Closing
from streamsoup.system.libc import file_system, sync

__all__ = ["Folder", "is_movable", "other_writer", "replacing"]

_OVERLAY = 0x794C7630
"""The number of an overlay file system in statfs(2)."""


class Folder(Closing):
    """An open folder.

    No name in it is ever followed if it is a symbolic link. Names have one part, without ``/``.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        """Hold a descriptor of the folder; `path` is for messages only."""
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: str) -> Folder:
        """Open the folder at a path, which may lead through links."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def folder(self, name: str) -> Folder:
        """Open a folder in this one. Raises `OSError` for a link and for anything else."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(name, flags, dir_fd=self.descriptor)
        return Folder(os.path.join(self.path, name), descriptor)

    def make(self, name: str, mode: int = 0o777) -> Folder:
        """Make a folder in this one, and open it. Raises `FileExistsError`."""
        os.mkdir(name, mode, dir_fd=self.descriptor)
        return self.folder(name)

    def inside(self, name: str) -> Folder:
        """Open a folder in this one, made if need be. Raises `OSError` for a link."""
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.descriptor)
        return self.folder(name)

    def below(self, name: str) -> tuple[Folder, str]:
        """Return the folder that a relative path ends in, made if need be, and the last name.

        The caller closes it if it is not this one.
        """
        folder = self
        *above, last = name.split("/")
        for part in above:
            before = folder
            try:
                folder = before.inside(part)
            finally:
                if before is not self:
                    before.close()
        return folder, last

    def file(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file in the folder with these flags; return its descriptor."""
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(name, flags, mode, dir_fd=self.descriptor)

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of an entry, without following links; None if it does not exist."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """List the names in the folder, sorted."""
        return sorted(os.listdir(self.descriptor))

    def move(self, name: str, to: Folder, new: str) -> None:
        """Rename an entry to another name in a folder of the same file system."""
        os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=to.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, a link or a whole folder; do nothing if it does not exist."""
        try:
            status = self.status(name)
            if status is None:
                return
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=self.descriptor)
                return
            try:
                # Removing an empty folder needs no descriptors, of which none may be left.
                os.rmdir(name, dir_fd=self.descriptor)
            except OSError:
                shutil.rmtree(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass

    def sync(self) -> None:
        """Wait until the names in the folder are on disk."""
        try:
            sync(self.descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot sync folders
                raise

    def sync_below(self) -> None:
        """Wait until the names in the folder, and in all folders in it, are on disk."""
        for name in self.names():
            status = self.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with self.folder(name) as inner:
                    inner.sync_below()
        self.sync()

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Yield a new file to write, which then takes the place of the one at `path`, whole.

    Until then it has a random name; it is removed if anything fails.
    """
    name = os.path.basename(path)
    with Folder.open(os.path.dirname(path) or ".") as folder:
        temporary = f".{name[:100]}.{os.urandom(8).hex()}.partial"
        descriptor = folder.file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with open(descriptor, "w+b") as file:
                yield file
            folder.move(temporary, folder, name)
        except BaseException:
            with suppress(OSError):
                folder.remove(temporary)
            raise


def other_writer(folder: Folder, above: Folder) -> str:
    """Return who else may have written into a folder made with mode 0700; empty if no one.

    Its content would otherwise be trusted, and become part of the output. `above` is the folder
    that it lies in.
    """
    status = os.fstat(folder.descriptor)
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid == os.geteuid() and not others:
        return ""
    owner, mode = _as_made(above)
    if status.st_uid not in (os.geteuid(), owner):
        return f"belongs to user {status.st_uid}"
    return "may be written to by others" if others & ~mode else ""


def _as_made(folder: Folder) -> tuple[int, int]:
    """Return owner and mode of a private folder made in a folder: some disks choose both."""
    name = f".{os.urandom(8).hex()}"
    try:
        with folder.make(name, 0o700) as made:
            status = os.fstat(made.descriptor)
        os.rmdir(name, dir_fd=folder.descriptor)
    except OSError:
        return os.geteuid(), 0
    return status.st_uid, status.st_mode


def is_movable(above: Folder, name: str, beside: Folder, occupied: str) -> bool:
    """Return True if a folder can be renamed: on an overlay, not what comes from a lower layer.

    Tries a rename that must fail, because the folder `occupied` in `beside` is not empty. Only on
    overlays: other file systems may behave in any way there.
    """
    if file_system(os.path.join(above.path, name)) != _OVERLAY:
        return True
    try:
        above.move(name, beside, occupied)
    except OSError as error:
        return error.errno != errno.EXDEV
    return True
