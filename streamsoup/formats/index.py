"""The index of a checkpoint in shards: which file holds which tensor, and how all are called.

``model.safetensors.index.json`` lies beside ``model-00001-of-00002.safetensors``, and so on.
What they have in common is the *stem*, here ``model``. One that ends in a variant of the weights,
``model.fp16``, has ``model.fp16-00001-of-00002.safetensors`` and, split, the index
``model.safetensors.index.fp16.json``: so `save_pretrained` of transformers and diffusers writes
them, and `from_pretrained` looks for no other. Diffusers once wrote
``model.safetensors.fp16.index.json``, and still reads it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from streamsoup.errors import CorruptFileError, FormatError, count, printable, some
from streamsoup.formats.header import recognise
from streamsoup.system.regular import reading

__all__ = [
    "check_files",
    "check_index",
    "index_name",
    "is_index",
    "is_numbered",
    "n_shards",
    "read_index",
    "shard_names",
    "stem",
]

INDEX_LIMIT = 100_000_000
"""The largest index in bytes, as for a header: ten times what any published model has."""

OPENING_LIMIT = 220_000_000
"""Bytes that an index may take while it is read: it holds some hundred for each of its values."""

_INDEX = re.compile(
    r"(?P<base>.+)\.safetensors(\.index(\.(?P<variant>[^.]+))?|\.(?P<old>[^.]+)\.index)\.json",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-_]\d+(-of-\d+)")


def is_index(name: str) -> bool:
    """Return True if a file of that name is an index."""
    return _INDEX.fullmatch(name) is not None


def stem(name: str) -> str:
    """Return what the names of a checkpoint's files begin with, from that of its index or a shard.

    >>> stem("model.safetensors.index.fp16.json"), stem("model-00001-of-00002.safetensors")
    ('model.fp16', 'model')
    """
    index = _INDEX.fullmatch(name)
    if index is None:
        return _NUMBER.sub("", name.removesuffix(".safetensors")) or "model"
    variant = index["variant"] or index["old"]
    return f"{index['base']}.{variant}" if variant else index["base"]


def is_numbered(name: str) -> bool:
    """Return True if a shard's name says which it is, and of how many."""
    return _NUMBER.search(name) is not None


def n_shards(name: str) -> int:
    """Return the number of shards of the checkpoint that a file belongs to, by its name.

    >>> n_shards("model-00001-of-00003.safetensors"), n_shards("model.safetensors")
    (3, 1)
    """
    found = _NUMBER.search(name)
    return int(found[1].removeprefix("-of-")) if found else 1


def shard_names(stem: str, n_shards: int) -> list[str]:
    """Name the files of a checkpoint of so many shards."""
    if n_shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]


def index_name(stem: str) -> str:
    """Name the index of a checkpoint.

    >>> index_name("model"), index_name("model.fp16")
    ('model.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    base, _, variant = stem.rpartition(".")
    if not base or not variant:
        return f"{stem}.safetensors.index.json"
    return f"{base}.safetensors.index.{variant}.json"


def read_index(
    path: str, suffixes: tuple[str, ...] = (".safetensors",)
) -> tuple[dict[str, str], int]:
    """Read the weight map of an index, tensor name to file name; and what that took, in bytes.

    The files that it names end in one of `suffixes`. Raises `FormatError` for any other file, and
    for names that lead out of its folder.
    """
    where = printable(path)
    try:
        with reading(path) as (descriptor, status):
            if status.st_size > INDEX_LIMIT:
                raise CorruptFileError(f"{where}: is too large for an index")
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(status.st_size)
    except OSError as error:
        raise FormatError(
            f"{where}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    if _opening_nbytes(text) > OPENING_LIMIT:
        raise CorruptFileError(f"{where}: is too large for an index, or holds far too much else")
    known = recognise(text[:1000])
    if known is not None and not text.startswith(b"{"):
        raise FormatError(f"{where}: is {known}, not JSON")
    try:
        # No number in it is used, and as text it may have any length.
        index = json.loads(
            text.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_int=str
        )
    except CorruptFileError as error:
        raise CorruptFileError(f"{where}: {error.text}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: is not JSON: {printable(error)}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{where}: has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        # One plain name: an index must not lead out of its folder, nor to another format.
        if (
            not isinstance(file, str)
            or os.path.basename(file) != file
            or file.startswith(".")
            or "\\" in file
            or "\0" in file
            or not file.endswith(suffixes)
        ):
            raise CorruptFileError(
                f"{where}: places tensor {printable(name)!r} in {printable(file)!r}, "
                f"which is not the plain name of a {' or '.join(suffixes)} file"
            )
    for file in sorted(set(weight_map.values())):
        try:
            # Half a character, which no system has, is refused when the shard is opened.
            os.fsencode(file.encode(errors="replace").decode())
        except UnicodeEncodeError:
            raise FormatError(
                f"{where}: names the file {printable(file)!r}, which cannot be said in "
                f"{sys.getfilesystemencoding()}, as names are here; set LC_ALL=C.UTF-8"
            ) from None
    return weight_map, _opening_nbytes(text)


def _opening_nbytes(text: bytes) -> int:
    """Bound the bytes that an index takes while it is read: as it is, decoded, and its values.

    Measured: 240 bytes for a key with its value, beside their text, and 43 for a list or a number.
    """
    characters = len(text) * (3 if text.isascii() else 9)
    return characters + 260 * text.count(b":") + 60 * (text.count(b",") + text.count(b"["))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CorruptFileError(f"has the key {printable(key)!r} twice")
        result[key] = value
    return result


def _tensors(names: Sequence[str]) -> str:
    return count(len(names), "tensor")


def check_files(path: str, listed: Sequence[str], names: Sequence[str]) -> None:
    """Refuse an index that passes over a shard of its own, by the names of all in its folder.

    Shards are of one set if their names say so, such as ``model-00002-of-00002.safetensors``.
    Raises `CorruptFileError`.
    """
    sets = {_NUMBER.sub(r"\1", name) for name in listed if is_numbered(name)}
    over = [
        name
        for name in sorted(set(names).difference(listed))
        if is_numbered(name) and _NUMBER.sub(r"\1", name) in sets
    ]
    if over:
        raise CorruptFileError(
            f"{printable(path)}: lists nothing of {some(over)}, by name of the same set as others"
        )


def check_index(path: str, weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Refuse an index that does not agree with its shards, both ways.

    `held` says in which file each tensor is; raises `CorruptFileError`.
    """
    where = printable(path)
    missing = [f"{name} ({file})" for name, file in weight_map.items() if name not in held]
    if missing:
        raise CorruptFileError(
            f"{where}: lists {_tensors(missing)} that no shard holds: {some(missing)}"
        )
    unlisted = [f"{name} ({file})" for name, file in held.items() if name not in weight_map]
    if unlisted:
        raise CorruptFileError(
            f"{where}: does not list {_tensors(unlisted)} that its shards hold: {some(unlisted)}"
        )
    for name, file in held.items():
        if weight_map[name] != file:
            raise CorruptFileError(
                f"{where}: places tensor {printable(name)!r} in {printable(weight_map[name])}, "
                f"but it is in {printable(file)}"
            )
