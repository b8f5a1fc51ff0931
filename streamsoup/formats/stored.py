"""Stored checkpoints: safetensors files, opened by their headers alone.

One is a ``.safetensors`` file, a folder that holds one, or a folder whose
``*.safetensors.index.json`` says which shard holds which tensor (the Hugging Face layout;
the symlinked folders of its download cache included), or that index. Nothing but headers and the
index is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from streamsoup.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    printable,
)
from streamsoup.formats.conversions import of_hub_id
from streamsoup.formats.files import Access, read_into
from streamsoup.formats.header import header_nbytes, opening_nbytes
from streamsoup.formats.index import check_files, check_index, is_index, read_index
from streamsoup.formats.layout import HeaderCache, Layout
from streamsoup.formats.links import check_inside
from streamsoup.formats.on_disk import MappedRanges, OnDisk, ReadRanges
from streamsoup.formats.shards import Attributes, Identity, Shard
from streamsoup.formats.source import Cursor, ReadingCost, SourceTensor
from streamsoup.formats.weights import find_weights, names_in
from streamsoup.system.buffers import Bytes
from streamsoup.system.regular import reading
from streamsoup.system.schemes import check_local

__all__ = ["Stored", "open_stored"]


class Stored(OnDisk):
    """A checkpoint in one or several safetensors files."""

    def __init__(
        self,
        name: str,
        folder: str | None,
        shards: Sequence[Shard],
        layout: Layout,
        index_name: str | None,
        index_opening_nbytes: int = 0,
    ) -> None:
        """Hold what was opened.

        Args:
            name: The path as it was given.
            folder: The folder whose side files belong to it; None for a lone file.
            shards: Its files.
            layout: Which tensor is in which of them.
            index_name: File name of its index, if it has one.
            index_opening_nbytes: Bytes held at most while its index was read.
        """
        super().__init__(name, folder, shards)
        self._index_name = index_name
        self.shards = tuple(shards)
        self.layout = layout
        self._index_opening_nbytes = index_opening_nbytes

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors, shard by shard, in file order."""
        return {
            name: SourceTensor(spec.dtype.name, spec.shape, None, number)
            for name, (number, spec) in self.layout.places.items()
        }

    @property
    def file_names(self) -> Sequence[str]:
        """The names of its files, shard by shard."""
        return tuple(os.path.basename(shard.path) for shard in self.shards)

    @property
    def index_name(self) -> str | None:
        """File name of its index, if it has one."""
        return self._index_name

    @property
    def contiguous(self) -> bool:
        """Tensors lie side by side: headers with holes are refused."""
        return True

    def files_of(self, tensor: str) -> Sequence[int]:
        """Return the number of the file that holds a tensor."""
        return (self.layout.places[tensor][0],)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that maps the files or reads them, as `access` has it."""
        return _Mapped(self, access) if access.mapped else _Read(self, access)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Mapped pages are the page cache's; what is read goes into the block itself."""
        opening = max(self._index_opening_nbytes, *(shard.opening_nbytes for shard in self.shards))
        return ReadingCost(views=mapped, opening_nbytes=opening)


class _Mapped(Cursor):
    """Views of the files, through a window."""

    def __init__(self, stored: Stored, access: Access) -> None:
        self._places, self._shards = stored.layout.places, stored.shards
        self._ranges = MappedRanges(access)

    def view(self, tensor: str, begin: int, end: int) -> Bytes:
        number, spec = self._places[tensor]
        shard = self._shards[number]
        at = shard.data_begin + spec.begin
        return self._ranges.view(shard, at + begin, at + end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        block[:] = self.view(tensor, begin, begin + len(block))

    def close(self) -> None:
        self._ranges.close()


class _Read(Cursor):
    """Large reads into the caller's block."""

    def __init__(self, stored: Stored, access: Access) -> None:
        self._places, self._shards = stored.layout.places, stored.shards
        self._ranges = ReadRanges(access)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        number, spec = self._places[tensor]
        shard = self._shards[number]
        self._ranges.read(shard, shard.data_begin + spec.begin + begin, block)


def open_stored(path: str | bytes | os.PathLike[Any], cache: HeaderCache | None = None) -> Stored:
    """Open a stored checkpoint by its headers.

    Args:
        path: A safetensors file, a folder that holds a checkpoint, or its index.
        cache: Headers parsed so far, to be shared by the ingredients of one soup.

    Raises:
        MissingFileError: There is no such file or folder.
        FormatError: The file is not a checkpoint; names the file and the fault.
    """
    cache = HeaderCache() if cache is None else cache
    try:
        return _open(str(os.fsdecode(path)), cache)  # a str of numpy's is one, too
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{error.text}; download, copy or save the checkpoint again"
        ) from None


def _open(given: str, cache: HeaderCache) -> Stored:
    _check_path(given)
    try:
        mode = os.stat(given).st_mode
    except FileNotFoundError:
        raise MissingFileError(
            f"{printable(given)}: no such file or folder; check the path{_advice_for(given)}"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{printable(given)}: cannot be opened: {error.strerror}; fix that and run again"
        ) from None
    if stat.S_ISDIR(mode):
        name = find_weights(given)
        if is_index(name):
            return _open_index(given, given, name, cache)
        shard = _open_shard(os.path.join(given, name), cache, within=given)
        return _of_one(given, given, shard, cache)
    folder, name = os.path.split(given)
    if is_index(name):
        return _open_index(given, folder or os.curdir, name, cache)
    return _of_one(given, None, _open_shard(given, cache), cache)


def _of_one(given: str, folder: str | None, shard: Shard, cache: HeaderCache) -> Stored:
    layout = cache.layout([shard.header], [os.path.basename(shard.path)], given)
    return Stored(given, folder, [shard], layout, None)


def _open_index(given: str, folder: str, name: str, cache: HeaderCache) -> Stored:
    """Open the shards that the index `name` of a folder lists."""
    path = os.path.join(folder, name)
    check_inside(path, folder)
    weight_map, opening = read_index(path)
    files = sorted(set(weight_map.values()))
    shards = [_open_shard(os.path.join(folder, file), cache, within=folder) for file in files]
    layout = cache.layout([shard.header for shard in shards], files, given)
    held = {tensor: files[number] for tensor, (number, _) in layout.places.items()}
    check_index(path, weight_map, held)
    check_files(path, files, names_in(folder))
    return Stored(given, folder, shards, layout, name, opening)


def _open_shard(path: str, cache: HeaderCache, *, within: str | None = None) -> Shard:
    """Read one header, with errors that name the file; it may lie `within` an ingredient."""
    _check_path(path)
    if within is not None:
        check_inside(path, within)
    try:
        with reading(path) as (descriptor, status):
            head = _read(descriptor, 0, min(8, status.st_size))
            length = header_nbytes(head, status.st_size)
            text = _read(descriptor, 8, length)
            header = cache.header(text, status.st_size)
    except FormatError as error:
        raise type(error)(f"{printable(path)}: {error.text}") from None
    except FileNotFoundError:
        raise MissingFileError(
            f"{printable(path)}: no such file; the checkpoint is not complete, so download or "
            "save it again"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{printable(path)}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    digest = xxhash.xxh3_128(head)
    digest.update(text)
    return Shard(
        path=path,
        identity=Identity.of(status),
        attributes=Attributes.of(status),
        heads=((0, 8 + length),),
        head_digest=digest.digest(),
        opening_nbytes=opening_nbytes(length, header),
        header=header,
    )


def _read(descriptor: int, offset: int, nbytes: int) -> bytearray:
    block = bytearray(nbytes)
    try:
        read_into(descriptor, memoryview(block), offset)
    except EOFError:
        raise CorruptFileError("ended while its header was being read") from None
    return block


def _check_path(path: str) -> None:
    """Refuse a path that no file can have, or that could not be noted in a provenance."""
    check_local(path, MissingFileError)
    try:
        os.path.abspath(path).encode()
    except FileNotFoundError:
        raise MissingFileError(
            f"{printable(path)}: cannot be found, as the folder we are in was removed; go to "
            "another, or give the whole path"
        ) from None
    except UnicodeEncodeError:
        raise FormatError(f"{printable(path)}: its path is not Unicode; rename it") from None
    if "\0" in path:
        raise FormatError(f"{printable(path)}: a path holds no NUL character; check the path")


def _advice_for(given: str) -> str:
    """Return advice for a name that means something elsewhere: in a shell, or on the Hub."""
    parts = given.split("/")
    if parts[0] == "~":
        return " (only a shell replaces ~, and only where it is not quoted)"
    line = of_hub_id(given)
    if line is not None and not os.path.exists(parts[0]):
        return (
            ", or if it is a model on the Hugging Face Hub, download it first and give its folder: "
            f"{printable(line, 400)}"
        )
    return ""
