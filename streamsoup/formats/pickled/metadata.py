"""What the metadata of a distributed checkpoint says: tensors, chunks, and where they lie."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from streamsoup.errors import CorruptFileError, printable
from streamsoup.formats.pickled.descriptions import DTYPE_NAMES, Global, Items, Record, Tensor

__all__ = ["Part", "Sharded", "fields_of", "parts_of_all", "saved_tree"]

_MODULE = "torch.distributed.checkpoint.metadata."

_MOST_BESIDE = 1 << 12
"""Chunks of a tensor that may lie side by side: each is compared with each."""


class Part(msgspec.Struct, frozen=True):
    """A chunk of a tensor, and the range of a file that holds its archive."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


class Sharded(Tensor):
    """A tensor of the checkpoint, by its name there; its chunks are looked up when it is chosen."""

    __slots__ = ("name", "sizes")

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], sizes: Any) -> None:
        super().__init__(None, 0, shape, (0,) * len(shape), dtype)
        self.name, self.sizes = name, sizes


def fields_of(given: Any, kind: str) -> dict[str, Any]:
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


def saved_tree(fields: Mapping[str, Any]) -> Items:
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
    if not isinstance(entry, Record):
        raise CorruptFileError(f"says of {printable(name)!r} neither tensor nor bytes")
    if entry.kind != f"{_MODULE}TensorStorageMetadata":
        return entry
    try:
        fields = fields_of(entry, "TensorStorageMetadata")
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, Record) else None
        if isinstance(state, Items):  # before torch 2.1
            dtype = {key: value for key, value in state.pairs if isinstance(key, str)}.get("dtype")
        else:
            dtype = state[0] if isinstance(state, tuple) and state else None
        known = DTYPE_NAMES.get(dtype.name) if isinstance(dtype, Global) else None
        if known is None:
            raise CorruptFileError("has no dtype")
        return Sharded(name, known, _sizes(fields.get("size"), "shape"), fields.get("chunks"))
    except CorruptFileError as error:
        raise CorruptFileError(f"tensor {printable(name)!r} {error.text}") from None


def parts_of_all(fields: Mapping[str, Any], chosen: Any) -> dict[str, list[Part]]:
    """Return the chunks of the chosen tensors, in order, by the names of the checkpoint.

    Raises `CorruptFileError` unless they leave nothing of a tensor out and do not overlap.
    """
    places: dict[str, list[tuple[tuple[int, ...], Any]]] = {each.name: [] for each in chosen}
    for index, info in _pairs(fields.get("storage_data"), "places in files"):
        found = fields_of(index, "MetadataIndex")
        name = found.get("fqn")
        if isinstance(name, str) and name in places:
            at = found.get("offset")
            places[name].append((() if at is None else _sizes(at, "offset"), info))
    parts: dict[str, list[Part]] = {}
    for tensor in chosen:
        try:
            parts[tensor.name] = _parts_of(tensor, places[tensor.name])
        except CorruptFileError as error:
            raise CorruptFileError(f"tensor {printable(tensor.name)!r} {error.text}") from None
    return parts


def _parts_of(tensor: Sharded, places: list[tuple[tuple[int, ...], Any]]) -> list[Part]:
    boxes = []
    for each in tensor.sizes if isinstance(tensor.sizes, list) else ():
        chunk = fields_of(each, "ChunkStorageMetadata")
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


def _part(box: tuple[tuple[int, ...], tuple[int, ...]], info: Any) -> Part:
    fields = fields_of(info, "_StorageInfo")
    file, offset, nbytes = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if fields.get("transform_descriptors"):
        raise CorruptFileError("was compressed or otherwise changed on its way to the file")
    plain = isinstance(file, str) and os.path.basename(file) == file and file[:1] not in ("", ".")
    if not isinstance(file, str) or not plain or "\\" in file or "\0" in file:
        raise CorruptFileError(f"lies in {printable(repr(file))}, not the plain name of a file")
    offset, nbytes = _sizes((offset, nbytes), "range of a file")
    return Part(*box, file, offset, nbytes)
