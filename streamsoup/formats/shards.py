"""Files of a checkpoint, as they were when what describes their tensors was read."""

from __future__ import annotations

import os

import msgspec
import xxhash

from streamsoup.errors import ChangedIngredientError, FormatError, printable
from streamsoup.formats.header import Header
from streamsoup.system.regular import reading

__all__ = ["Attributes", "Identity", "Shard", "StoredFile"]

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


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file, and what tells it from a changed one."""

    path: str
    identity: Identity
    attributes: Attributes
    """As they were when it was opened. Not a part of the identity: backups change them under a run
    that goes on. `on_disk.OnDisk.suspects` says what becomes of a change."""
    heads: tuple[tuple[int, int], ...]
    """Ranges of bytes that describe its tensors: of a safetensors file, the header."""
    head_digest: bytes
    """The xxh3-128 of these ranges, one after the other."""
    opening_nbytes: int = 0
    """Bytes held at most while they were read."""

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
        """Raise `ChangedIngredientError` if `heads` are no longer the ones that were read."""
        digest = xxhash.xxh3_128()
        try:
            with reading(self.path) as (descriptor, _):
                for begin, end in self.heads:
                    for at in range(begin, end, _PIECE):
                        digest.update(os.pread(descriptor, min(_PIECE, end - at), at))
        except OSError as error:
            raise self._unreadable(error) from None
        if digest.digest() != self.head_digest:
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


class Shard(StoredFile, frozen=True, kw_only=True):
    """One safetensors file: its header is its first `data_begin` bytes."""

    header: Header

    @property
    def data_begin(self) -> int:
        """Offset of the first byte after the header."""
        return self.heads[0][1]
