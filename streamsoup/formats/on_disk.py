"""Sources whose tensors lie in files: what the files are, whether they changed, ranges of them.

A subclass says which file each tensor is in, and where; see `formats.stored` and
`formats.pickled`.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence

from streamsoup.errors import ChangedIngredientError, FormatError, printable
from streamsoup.formats.files import Access, Window, read_into
from streamsoup.formats.shards import Attributes, StoredFile
from streamsoup.formats.source import Source, Suspects
from streamsoup.system.buffers import Bytes

__all__ = ["MappedRanges", "OnDisk", "ReadRanges"]


class OnDisk(Source):
    """A source whose tensors lie in files."""

    def __init__(self, name: str, folder: str | None, shards: Sequence[StoredFile]) -> None:
        """Hold what was opened.

        Args:
            name: The path as it was given.
            folder: The folder whose side files belong to it; None for a lone file.
            shards: Its files.
        """
        self._name, self._folder = name, folder
        self._files = tuple(shards)
        self._settled = [shard.attributes for shard in self._files]
        """As they were when each file was last known to hold the bytes that were opened."""

    @abstractmethod
    def files_of(self, tensor: str) -> Sequence[int]:
        """Return the numbers of the files that hold a tensor."""

    @property
    def name(self) -> str:
        """The path as it was given."""
        return self._name

    @property
    def path(self) -> str:
        """Its absolute path."""
        return os.path.abspath(self._name)

    @property
    def folder(self) -> str | None:
        """The folder whose side files belong to it; None for a lone file."""
        return self._folder

    @property
    def files(self) -> Sequence[str]:
        """The paths of its files."""
        return tuple(shard.path for shard in self._files)

    @property
    def fingerprint(self) -> list[list[str | int]]:
        """Path, inode, size and times of each file.

        The device is left out, as its number may change when the machine starts anew.
        """
        return [
            [
                os.path.realpath(shard.path),
                *(shard.identity.inode, shard.identity.size),
                *(shard.identity.mtime_ns, shard.attributes.ctime_ns),
            ]
            for shard in self._files
        ]

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Look at the files of a tensor, or at all. See `StoredFile.check_unchanged`."""
        if tensor is not None:
            for number in self.files_of(tensor):
                self._files[number].check_unchanged()
            return
        for shard in self._files:
            shard.check_unchanged()

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return the tensors of files whose change time moved though size and time stamp did not.

        Such a file was written in place and given its old time stamp, or only linked, renamed,
        chowned or the like; the digests of what was read tell which. Costs one `stat` a file, and
        for each of those a read of its header, which raises `ChangedIngredientError` if it
        differs. Without `strict`, a new link, mode or owner is taken as the reason.
        """
        state: dict[int, Attributes] = {}
        for number, shard in enumerate(self._files):
            found = Attributes.of(shard.status())
            if found == self._settled[number]:
                continue
            shard.check_unchanged()
            shard.check_header()
            if not strict and self._settled[number].explains(found):
                self._settled[number] = found
            else:
                state[number] = found
        if not state:
            return None
        names = [name for name in self.tensors if not state.keys().isdisjoint(self.files_of(name))]
        return Suspects(names, state)

    def settle(self, suspects: Suspects) -> None:
        """Remember the attributes that the suspected files had by then."""
        for number, attributes in suspects.state.items():
            self._settled[number] = attributes

    def where(self, tensor: str) -> str:
        """Return the file that holds a tensor, and the tensor."""
        first = self._files[self.files_of(tensor)[0]]
        return f"{printable(first.path)}: {printable(tensor)}"


class MappedRanges:
    """Ranges of files through a window into the one that is read, which moves with the stream."""

    def __init__(self, access: Access) -> None:
        """Map nothing yet."""
        self._kept, self._nbytes = access.kept, access.window_nbytes
        self._shard: StoredFile | None = None
        self._window: Window | None = None

    def view(self, shard: StoredFile, begin: int, end: int) -> Bytes:
        """Return bytes `begin` to `end` of a file; they are valid until the next call."""
        if self._kept is not None and (whole := self._kept.of(shard)) is not None:
            return whole.view(begin, end)
        window = self._window
        if window is None or shard is not self._shard or not window.covers(begin, end):
            self._window = window = None  # the former one goes first
            stop = min(max(end, begin + self._nbytes), shard.identity.size)
            self._window = window = Window(shard, begin, stop)
            self._shard = shard
        return window.view(begin, end)

    def close(self) -> None:
        """Unmap the window."""
        self._window = None


class ReadRanges:
    """Ranges of files by large reads into the caller's block."""

    def __init__(self, access: Access) -> None:
        """Open nothing yet."""
        self._descriptors = access.descriptors

    def read(self, shard: StoredFile, begin: int, block: Bytes) -> None:
        """Fill `block` with the bytes of a file from `begin` on.

        Raises:
            ChangedIngredientError: The file is not what it was when it was opened.
            FormatError: It cannot be read.
        """
        try:
            read_into(self._descriptors.reading(shard), block, begin)
        except EOFError:
            shard.check_unchanged()
            raise ChangedIngredientError(
                f"{printable(shard.path)}: ended at byte {begin}, before its header says; run "
                "again once no other process writes to it"
            ) from None
        except OSError as error:
            raise FormatError(
                f"{printable(shard.path)}: cannot be read at byte {begin}: {error.strerror}; fix "
                "that, or restore the file"
            ) from error
