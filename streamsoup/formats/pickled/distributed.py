"""Folders of ``torch.distributed.checkpoint``: ``.metadata``, and the files of each rank.

``.metadata`` is a pickle that says which tensors there are, which chunks each was cut into, and in
which file and range each chunk lies. Such a range is a whole archive of ``torch.save`` that holds
one tensor. The pickles are interpreted as those of lone files are, by the same list; the chunks of
a tensor are read as parts of it (`formats.pickled.strided`), however many ranks there were.

Source: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` of PyTorch 2.13.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    StreamsoupError,
    UnsafePickleError,
    printable,
)
from streamsoup.formats.conversions import of_training_folder
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.links import check_inside
from streamsoup.formats.pickled.checksums import Checked
from streamsoup.formats.pickled.descriptions import (
    DTYPE_NAMES,
    Global,
    Items,
    Record,
    Tensor,
)
from streamsoup.formats.pickled.opcodes import TEXT_LIMIT, interpret
from streamsoup.formats.pickled.places import Place, place, whole
from streamsoup.formats.pickled.saved import finder, open_archive, read_at
from streamsoup.formats.pickled.source import Contents, Pickled
from streamsoup.formats.pickled.strided import Chunk
from streamsoup.formats.pickled.trees import find_weights
from streamsoup.formats.shards import Attributes, Identity, StoredFile
from streamsoup.system.regular import read_whole, reading

__all__ = ["METADATA", "open_distributed"]

METADATA = ".metadata"
"""What the description of a distributed checkpoint is called."""

_MODULE = "torch.distributed.checkpoint.metadata."

_MOST_BESIDE = 1 << 12
"""Chunks of a tensor that may lie side by side: each is compared with each."""


class _Part(msgspec.Struct, frozen=True):
    """A chunk of a tensor, and the range of a file that holds its archive."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


class _Sharded(Tensor):
    """A tensor of the checkpoint, by its name there; its chunks are looked up when it is chosen."""

    __slots__ = ("name", "sizes")

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], sizes: Any) -> None:
        super().__init__(None, 0, shape, (0,) * len(shape), dtype)
        self.name, self.sizes = name, sizes


def open_distributed(folder: str, key: str | None, cache: HeaderCache) -> Pickled:
    """Open a distributed checkpoint by its metadata, and the archives of its model's tensors.

    Args:
        folder: The folder that holds ``.metadata``.
        key: Where the model's tensors are; None to find them.
        cache: What was read so far, to be shared by the ingredients of one soup.

    Raises:
        FormatError: It is damaged, or needs code to be read; names the file and the fault.
    """
    where = os.path.join(folder, METADATA)
    try:
        check_inside(where, folder)
        text = read_whole(where, TEXT_LIMIT)
        root, held = interpret(text)
        fields = _fields(root, "Metadata")
        weights = find_weights(_tree(fields), key)
        parts = _parts(fields, weights.tensors.values())
        with reading(where) as (_, status):
            metadata = _stored(where, status, ((0, len(text)),), xxhash.xxh3_128_digest(text), held)
    except UnsafePickleError as error:
        advice = of_training_folder(folder, ["__0_0.distcp"])
        raise UnsafePickleError(
            f"{printable(where)}: {error.text}; make it whole first: {printable(advice, 800)}"
        ) from None
    except CorruptFileError as error:
        raise _corrupt(where, error) from None
    except FormatError as error:
        raise type(error)(f"{printable(where)}: {error.text}") from None
    except OSError as error:
        if isinstance(error, StreamsoupError):
            raise
        raise FormatError(
            f"{printable(where)}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    names = sorted({part.file for each in parts.values() for part in each})
    files, contents, crcs = _open_parts(folder, names, weights.tensors, parts)
    return Pickled(
        folder,
        folder,
        [*files, metadata],
        contents.shared(cache.pickled),
        crcs,
        key=weights.key,
        left_out=weights.left_out,
        file_names=("model.safetensors",),
        index_name=None,
        opening_nbytes=held,
    )


def _corrupt(where: str, error: CorruptFileError) -> CorruptFileError:
    return CorruptFileError(
        f"{printable(where)}: {error.text}; download, copy or save the checkpoint again"
    )


def _stored(
    path: str,
    status: os.stat_result,
    heads: tuple[tuple[int, int], ...],
    digest: bytes,
    held: int = 0,
) -> StoredFile:
    return StoredFile(
        path=path,
        identity=Identity.of(status),
        attributes=Attributes.of(status),
        heads=heads,
        head_digest=digest,
        opening_nbytes=held,
    )


# What the metadata says


def _fields(given: Any, kind: str) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    state = given.state if isinstance(given, Record) else None
    if not isinstance(state, Items) or given.kind.rpartition(".")[2] != kind:
        raise CorruptFileError(f"has no {kind} where one was expected")
    return {key: value for key, value in state.pairs if isinstance(key, str)}


def _pairs(given: Any, what: str) -> list[tuple[Any, Any]]:
    if not isinstance(given, Items):
        raise CorruptFileError(f"has no mapping of {what}")
    return given.pairs


def _sizes(given: Any, what: str) -> tuple[int, ...]:
    if not isinstance(given, tuple) or not all(type(n) is int and 0 <= n < 1 << 63 for n in given):
        raise CorruptFileError(f"has a {what} that is not a list of sizes")
    return given


def _tree(fields: Mapping[str, Any]) -> Items:
    """Return the mapping of mappings that was saved: names were made of keys, with dots."""
    paths: dict[str, Any] = {}
    if isinstance(fields.get("planner_data"), Items):
        paths = {key: at for key, at in fields["planner_data"].pairs if isinstance(key, str)}
    root = Items()
    below: dict[int, dict[str | int, Any]] = {id(root): {}}
    for name, entry in _pairs(fields.get("state_dict_metadata"), "tensors"):
        if not isinstance(name, str):
            raise CorruptFileError("has a tensor whose name is not text")
        at: Any = root
        path = paths.get(name, (name,))
        if not isinstance(path, tuple) or not 0 < len(path) <= 64:
            raise CorruptFileError(f"has no keys for tensor {printable(name)!r}")
        for n, key in enumerate(path):
            if not isinstance(key, str) and not (type(key) is int and 0 <= key < 1 << 31):
                raise CorruptFileError(f"has no keys for tensor {printable(name)!r}")
            last = n == len(path) - 1
            inner = below[id(at)].get(key)
            if inner is not None and (last or not isinstance(inner, Items)):
                raise CorruptFileError(f"has two values at the keys of {printable(name)!r}")
            if inner is None:
                inner = _leaf(name, entry) if last else Items()
                at.pairs.append((key, inner))
                below[id(at)][key] = inner
                if not last:
                    below[id(inner)] = {}
            at = inner
    return root


def _leaf(name: str, entry: Any) -> Any:
    """Return a tensor of the checkpoint; what is something else stays what it is."""
    if not isinstance(entry, Record) or entry.kind != f"{_MODULE}TensorStorageMetadata":
        return entry
    try:
        fields = _fields(entry, "TensorStorageMetadata")
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, Record) else None
        if isinstance(state, Items):  # before torch 2.1
            dtype = {key: value for key, value in state.pairs if isinstance(key, str)}.get("dtype")
        else:
            dtype = state[0] if isinstance(state, tuple) and state else None
        known = DTYPE_NAMES.get(dtype.name) if isinstance(dtype, Global) else None
        if known is None:
            raise CorruptFileError("has no dtype")
        return _Sharded(name, known, _sizes(fields.get("size"), "shape"), fields.get("chunks"))
    except CorruptFileError as error:
        raise CorruptFileError(f"tensor {printable(name)!r} {error.text}") from None


def _parts(fields: Mapping[str, Any], chosen: Any) -> dict[str, list[_Part]]:
    """Return the chunks of the chosen tensors, in order, by the names of the checkpoint.

    Raises `CorruptFileError` unless they leave nothing of a tensor out and do not overlap.
    """
    places: dict[str, list[tuple[tuple[int, ...], Any]]] = {each.name: [] for each in chosen}
    for index, info in _pairs(fields.get("storage_data"), "places in files"):
        found = _fields(index, "MetadataIndex")
        if found.get("fqn") in places:
            at = found.get("offset")
            places[found["fqn"]].append((() if at is None else _sizes(at, "offset"), info))
    parts: dict[str, list[_Part]] = {}
    for tensor in chosen:
        try:
            parts[tensor.name] = _parts_of(tensor, places[tensor.name])
        except CorruptFileError as error:
            raise CorruptFileError(f"tensor {printable(tensor.name)!r} {error.text}") from None
    return parts


def _parts_of(tensor: _Sharded, places: list[tuple[tuple[int, ...], Any]]) -> list[_Part]:
    boxes = []
    for each in tensor.sizes if isinstance(tensor.sizes, list) else ():
        chunk = _fields(each, "ChunkStorageMetadata")
        box = _sizes(chunk.get("offsets"), "offset"), _sizes(chunk.get("sizes"), "chunk")
        inside = len(box[0]) == len(box[1]) == len(tensor.shape) and all(
            start + n <= size for start, n, size in zip(*box, tensor.shape, strict=True)
        )
        if not inside:
            raise CorruptFileError("has a chunk that reaches out of it")
        boxes.append(box)
    boxes.sort()
    places.sort(key=lambda each: each[0])
    if [box[0] for box in boxes] != [starts for starts, _ in places]:
        raise CorruptFileError(
            f"is cut into {len(boxes)} chunks, but {len(places)} places in files are known"
        )
    _check_tiles(tensor.shape, boxes)
    return [_part(box, info) for box, (_, info) in zip(boxes, places, strict=True)]


def _check_tiles(
    shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Raise `CorruptFileError` unless boxes inside a shape fill it and do not overlap."""
    filled = sum(math.prod(sizes) for _, sizes in boxes)
    if filled != math.prod(shape):
        raise CorruptFileError(
            f"has chunks of {filled} elements in all, expected {math.prod(shape)}"
        )
    begun: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for starts, sizes in boxes:
        if not math.prod(sizes):
            continue
        if starts:
            begun = [each for each in begun if each[0][0] + each[1][0] > starts[0]]
        for other, theirs in begun:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(starts, sizes, other, theirs, strict=True)
            ):
                raise CorruptFileError("has chunks that overlap")
        begun.append((starts, sizes))
        if len(begun) > _MOST_BESIDE:
            raise CorruptFileError("is cut into more chunks side by side than are read")


def _part(box: tuple[tuple[int, ...], tuple[int, ...]], info: Any) -> _Part:
    fields = _fields(info, "_StorageInfo")
    file, offset, nbytes = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if fields.get("transform_descriptors"):
        raise CorruptFileError("was compressed or otherwise changed on its way to the file")
    plain = isinstance(file, str) and os.path.basename(file) == file and file[:1] not in ("", ".")
    if not isinstance(file, str) or not plain or "\\" in file or "\0" in file:
        raise CorruptFileError(f"lies in {printable(repr(file))}, not the plain name of a file")
    offset, nbytes = _sizes((offset, nbytes), "range of a file")
    return _Part(*box, file, offset, nbytes)


# What the files say


def _open_parts(
    folder: str,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[_Part]],
) -> tuple[list[StoredFile], Contents, list[int]]:
    """Open the archives of all chunks, file by file, in the order in which they lie there."""
    rows: dict[str, list[tuple[int, _Part, str, str]]] = {name: [] for name in names}
    for name, tensor in tensors.items():
        if isinstance(tensor, _Sharded):
            for part in parts[tensor.name]:
                rows[part.file].append((part.offset, part, name, tensor.dtype))
    files: list[StoredFile] = []
    members: list[Checked] = []
    crcs: list[int] = []
    chunks: dict[str, list[Chunk]] = {name: [] for name in tensors}
    for number, file in enumerate(names):
        rows[file].sort(key=lambda row: row[0])
        path = os.path.join(folder, file)
        files.append(_open_file(path, folder, number, rows[file], chunks, members, crcs))
    places: list[tuple[str, Place]] = []
    for name, tensor in tensors.items():
        found = tuple(sorted(chunks[name], key=lambda chunk: chunk.starts))
        try:
            places.append((name, whole(tensor.dtype, tensor.shape, found, 0)))
        except FormatError as error:
            where = os.path.join(folder, METADATA)
            raise type(error)(
                f"{printable(where)}: tensor {printable(name)!r} {error.text}"
            ) from None
    places.sort(key=lambda each: each[1].lies_at)
    return files, Contents(dict(places), tuple(members)), crcs


def _open_file(
    path: str,
    folder: str,
    number: int,
    rows: Sequence[tuple[int, _Part, str, str]],
    chunks: dict[str, list[Chunk]],
    members: list[Checked],
    crcs: list[int],
) -> StoredFile:
    """Open the archives in one file; add to `chunks`, `members` and `crcs`."""
    digest = xxhash.xxh3_128()
    heads: list[tuple[int, int]] = []
    try:
        check_inside(path, folder)
        for one, other in pairwise(rows):
            if one[1].offset + one[1].nbytes > other[1].offset:
                raise CorruptFileError(f"has chunks of {printable(one[2])!r} over those of others")
        with reading(path) as (descriptor, status):
            read = read_at(descriptor)
            for _, part, name, dtype in rows:
                end = part.offset + part.nbytes
                if end > status.st_size:
                    raise CorruptFileError(
                        f"is truncated: {printable(name)!r} ends at byte {end}, the file at "
                        f"{status.st_size}"
                    )
                try:
                    opened = open_archive(read, part.offset, end)
                    tensor, _ = interpret(opened.text)
                    find, listed = finder(read, opened, number)
                    if not isinstance(tensor, Tensor) or tensor.shape != part.sizes:
                        raise CorruptFileError(f"is not a tensor of the shape {list(part.sizes)}")
                    if tensor.dtype != dtype:
                        raise CorruptFileError(f"has dtype {tensor.dtype}, expected {dtype}")
                    lies = place(tensor, find).chunks[0]
                except FormatError as error:
                    raise type(error)(f"tensor {printable(name)!r} {error.text}") from None
                strides = lies.strides[: len(part.sizes)]
                chunks[name].append(
                    msgspec.structs.replace(
                        lies,
                        starts=part.starts,
                        sizes=part.sizes,
                        strides=strides,
                        member=len(members),
                    )
                )
                members += listed
                crcs += [opened.archive.members[opened.prefix + each.name].crc for each in listed]
                for begin, stop in opened.heads:
                    digest.update(read(begin, stop - begin))
                heads += opened.heads
    except CorruptFileError as error:
        raise _corrupt(path, error) from None
    except FormatError as error:
        raise type(error)(f"{printable(path)}: {error.text}") from None
    except FileNotFoundError:
        raise MissingFileError(
            f"{printable(path)}: no such file; the checkpoint is not complete, so download or save "
            "it again"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{printable(path)}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    return _stored(path, status, tuple(heads), digest.digest())
