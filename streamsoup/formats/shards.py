"""One safetensors file of a stored checkpoint, as it was when its header was read."""

from __future__ import annotations

import os

import msgspec
import xxhash

from streamsoup.errors import ChangedIngredientError, FormatError, printable
from streamsoup.formats.header import Header
from streamsoup.system.regular import reading

__all__ = ["Attributes", "Identity", "Shard"]

_PIECE = 1 << 20
"""Bytes of a header that are digested at a time."""


class Identity(msgspec.Struct, frozen=True):
    """What tells a file from another, and from itself after a change."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity in a result of `os.stat`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Attributes(msgspec.Struct, frozen=True):
    """When a file last changed in any way, and what may have changed besides its bytes."""

    ctime_ns: int
    """Set by the kernel on each write, rename, link, change of owner, mode or times."""
    n_links: int
    mode: int
    user: int
    group: int

    @classmethod
    def of(cls, status: os.stat_result) -> Attributes:
        """Return the attributes in a result of `os.stat`."""
        return cls(
            *(status.st_ctime_ns, status.st_nlink, status.st_mode, status.st_uid, status.st_gid)
        )

    def explains(self, later: Attributes) -> bool:
        """Return True if a link, mode or owner that differs accounts for the later change time."""
        return (self.n_links, self.mode, self.user, self.group) != (
            *(later.n_links, later.mode, later.user, later.group),
        )


class Shard(msgspec.Struct, frozen=True):
    """One safetensors file: its path, its header, and what tells it from a changed one."""

    path: str
    identity: Identity
    header: Header
    data_begin: int
    """Offset of the first byte after the header."""
    attributes: Attributes
    """As they were when it was opened. Not a part of the identity: backups change them under a run
    that goes on. `stored.Stored.suspects` says what becomes of a change."""
    header_digest: bytes
    """The xxh3-128 of its first `data_begin` bytes."""
    opening_nbytes: int
    """Bytes held at most while its header was read."""

    def check_unchanged(self) -> None:
        """Raise `ChangedIngredientError` unless the path leads to the same file of the same time.

        Costs one `stat`. Files written in place and then given their old time pass: see
        `attributes`. A change within the granularity of the file system's clock goes unseen.
        """
        found = Identity.of(self.status())
        if found == self.identity:
            return
        if found.size != self.identity.size:
            what = f"changed size from {self.identity.size} to {found.size} bytes"
        elif (found.device, found.inode) != (self.identity.device, self.identity.inode):
            what = "was replaced by another file"
        else:
            what = "was modified"
        raise self.changed(what)

    def check_header(self) -> None:
        """Raise `ChangedIngredientError` if the header is no longer the one that was read."""
        digest = xxhash.xxh3_128()
        try:
            with reading(self.path) as (descriptor, _):
                for at in range(0, self.data_begin, _PIECE):
                    n = min(_PIECE, self.data_begin - at)
                    digest.update(os.pread(descriptor, n, at))
        except OSError as error:
            raise self._unreadable(error) from None
        if digest.digest() != self.header_digest:
            raise self.changed("was rewritten in place, with its old time stamp,")

    def status(self) -> os.stat_result:
        """Look at the file. Raise `ChangedIngredientError` or `FormatError` where that fails."""
        try:
            return os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ChangedIngredientError(
                f"{printable(self.path)}: vanished while it was being read "
                f"({error.strerror}); put it back and run again"
            ) from None
        except OSError as error:
            raise self._unreadable(error) from None

    def changed(self, what: str) -> ChangedIngredientError:
        """Return the error for a file that changed, in words such as ``was modified``."""
        return ChangedIngredientError(
            f"{printable(self.path)}: {what} while it was being read; run again once no other "
            "process writes to it"
        )

    def _unreadable(self, error: OSError) -> FormatError:
        return FormatError(
            f"{printable(self.path)}: cannot be read any more: {error.strerror}; fix that and run "
            "again"
        )
