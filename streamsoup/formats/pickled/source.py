"""Pickled checkpoints as sources: views of their files where tensors lie in order, else copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import printable, some
from streamsoup.formats.files import Access
from streamsoup.formats.on_disk import MappedRanges, OnDisk, ReadRanges
from streamsoup.formats.pickled.checksums import Checked, Checksums, Running
from streamsoup.formats.pickled.places import Place
from streamsoup.formats.pickled.strided import Chunk, gather
from streamsoup.formats.pickled.trees import TOP
from streamsoup.formats.shards import StoredFile
from streamsoup.formats.source import Cursor, ReadingCost, SourceTensor
from streamsoup.system.buffers import Bytes, buffer

__all__ = ["Contents", "Pickled"]

_PIECE = 1 << 20
"""Bytes of a file that a thread holds to pick elements from, where files are read."""


class Contents(msgspec.Struct, frozen=True, eq=False):
    """What a pickled checkpoint holds and where; shared by those that agree on it."""

    places: Mapping[str, Place]
    """In the order of the soup."""
    members: tuple[Checked, ...]
    """The zip members that the tensors lie in."""

    def shared(self, cache: dict[Any, Any]) -> Contents:
        """Return equal contents that were opened before, or these, for the next to share."""
        digest = xxhash.xxh3_128_digest(msgspec.msgpack.encode(self))
        found: Contents = cache.setdefault(digest, self)
        return found


class Pickled(OnDisk):
    """The weights of files of ``torch.save``, or of a distributed checkpoint."""

    def __init__(
        self,
        name: str,
        folder: str | None,
        shards: Sequence[StoredFile],
        contents: Contents,
        crcs: Sequence[int],
        *,
        key: str,
        left_out: Sequence[str],
        file_names: Sequence[str],
        index_name: str | None,
        opening_nbytes: int,
    ) -> None:
        """Hold what was opened.

        Args:
            name: The path as it was given.
            folder: The folder whose side files belong to it; None for a lone file.
            shards: Its files.
            contents: Its tensors.
            crcs: The CRC-32 of each of its members; 0 for none.
            key: Where in the pickle the tensors were.
            left_out: What lies beside them in the pickle.
            file_names: What the files of a soup that mirrors it are called.
            index_name: What their index is called.
            opening_nbytes: Bytes held at most while it was opened.
        """
        super().__init__(name, folder, shards)
        self._contents, self._key, self._left_out = contents, key, tuple(left_out)
        self._file_names, self._index_name = tuple(file_names), index_name
        self._opening_nbytes = opening_nbytes
        self._checksums = Checksums(self._files, contents.members, crcs)

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors, in the order in which they lie in its files."""
        return {name: place.tensor for name, place in self._contents.places.items()}

    @property
    def fingerprint(self) -> list[Any]:
        """That of its files, and where in them the tensors were."""
        return [*super().fingerprint, ["key", self._key]]

    @property
    def file_names(self) -> Sequence[str]:
        """What the files of a soup are called: as safetensors."""
        return self._file_names

    @property
    def index_name(self) -> str | None:
        """What the index of a soup is called."""
        return self._index_name

    @property
    def notes(self) -> Sequence[str]:
        """Which keys hold something else than the weights: optimizer, epoch, arguments."""
        if not self._left_out:
            return ()
        what = "" if self._key == TOP else f", {printable(self._key)!r} alone is read"
        return (f"of pickles{what}; left out as no weights of the model: {some(self._left_out)}",)

    def files_of(self, tensor: str) -> Sequence[int]:
        """Return the numbers of the files that hold a tensor; that of the first if it is empty."""
        return sorted({chunk.file for chunk in self._contents.places[tensor].chunks}) or (0,)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that maps the files or reads them, as `access` has it."""
        return _Tensors(self._contents, self._files, self._checksums, access)

    def check_read(self, tensors: Collection[str]) -> None:
        """Raise `CorruptFileError` unless all members that these tensors lie in have their CRCs.

        Reads those that were not read whole, once.
        """
        places = self._contents.places
        found = {chunk.member for name in tensors for chunk in places[name].chunks}
        self._checksums.finish(sorted(found))

    def cost(self, *, mapped: bool) -> ReadingCost:
        """What lies in order is viewed, or read into the block; the rest is picked from pieces."""
        picks = any(not place.is_plain for place in self._contents.places.values())
        return ReadingCost(
            views=mapped and not picks,
            cursor_nbytes=_PIECE if picks and not mapped else 0,
            opening_nbytes=self._opening_nbytes,
        )


class _Tensors(Cursor):
    """Ranges of tensors, whose CRCs are taken on the way."""

    def __init__(
        self,
        contents: Contents,
        files: Sequence[StoredFile],
        checksums: Checksums,
        access: Access,
    ) -> None:
        self._places, self._files = contents.places, files
        self._running = Running(checksums, access.find_crc32())
        self._mapped = MappedRanges(access) if access.mapped else None
        self._read = ReadRanges(access)
        self._limit = access.window_nbytes if access.mapped else _PIECE
        self._piece: Bytes | None = None

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        place = self._places[tensor]
        if self._mapped is None or not place.is_plain:
            return None
        if begin == end:
            return buffer(0)
        chunk = place.chunks[0]
        return self._view(chunk, chunk.begin + begin, chunk.begin + end, True)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        if not block:
            return
        place = self._places[tensor]
        if not place.is_plain:
            first = begin // place.unit
            gather(place.shape, place.chunks, place.unit, first, block, self._view, self._limit)
            return
        chunk = place.chunks[0]
        at = chunk.begin + begin
        if self._mapped is not None:
            block[:] = self._view(chunk, at, at + len(block), True)
            return
        self._read.read(self._files[chunk.file], at, block)
        self._running.note(chunk.member, at - chunk.member_begin, block)

    def _view(self, chunk: Chunk, begin: int, end: int, dense: bool) -> Bytes:
        """Return bytes of a file; their CRC counts if all of them are wanted."""
        shard = self._files[chunk.file]
        if self._mapped is not None:
            found = self._mapped.view(shard, begin, end)
        else:
            if self._piece is None:
                self._piece = buffer(_PIECE)
            found = self._piece[: end - begin]
            self._read.read(shard, begin, found)
        if dense:
            self._running.note(chunk.member, begin - chunk.member_begin, found)
        return found

    def close(self) -> None:
        self._running.stop()
        self._piece = None
        if self._mapped is not None:
            self._mapped.close()
