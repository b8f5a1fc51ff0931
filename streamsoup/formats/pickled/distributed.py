"""Folders of ``torch.distributed.checkpoint``: ``.metadata``, and the files of each rank.

``.metadata`` is a pickle that says which tensors there are, which chunks each was cut into, and in
which file and range each chunk lies. Such a range is a whole archive of ``torch.save`` that holds
one tensor. The pickles are interpreted as those of lone files are, by the same list; the chunks of
a tensor are read as parts of it (`formats.pickled.strided`), however many ranks there were.

Source: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` of PyTorch 2.13.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

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
from streamsoup.formats.pickled.descriptions import Tensor
from streamsoup.formats.pickled.metadata import Part, Sharded, fields_of, parts_of_all, saved_tree
from streamsoup.formats.pickled.opcodes import TEXT_LIMIT, interpret
from streamsoup.formats.pickled.opened import finder, open_archive, read_at
from streamsoup.formats.pickled.places import Place, place, whole
from streamsoup.formats.pickled.source import Contents, Pickled
from streamsoup.formats.pickled.strided import Chunk
from streamsoup.formats.pickled.trees import find_weights
from streamsoup.formats.shards import Attributes, Identity, StoredFile
from streamsoup.system.regular import reading

__all__ = ["METADATA", "open_distributed"]

METADATA = ".metadata"
"""What the description of a distributed checkpoint is called."""


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
        with reading(where) as (descriptor, status):
            if status.st_size > TEXT_LIMIT:
                raise CorruptFileError(f"has {status.st_size} bytes, far too many")
            text = read_at(descriptor)(0, status.st_size)
        root, held = interpret(text)
        fields = fields_of(root, "Metadata")
        weights = find_weights(saved_tree(fields), key)
        parts = parts_of_all(fields, weights.tensors.values())
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


def _open_parts(
    folder: str,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[Part]],
) -> tuple[list[StoredFile], Contents, list[int]]:
    """Open the archives of all chunks, file by file, in the order in which they lie there."""
    rows: dict[str, list[tuple[int, Part, str, str]]] = {name: [] for name in names}
    for name, tensor in tensors.items():
        if isinstance(tensor, Sharded):
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
    rows: Sequence[tuple[int, Part, str, str]],
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
