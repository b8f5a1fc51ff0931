"""Files of ``torch.save`` in zip format, opened by their directory and their pickle alone.

A checkpoint is one such file, a folder that holds one, or a folder whose
``pytorch_model.bin.index.json`` says which file holds which tensor. Of each file, the directory,
the pickle, and the local headers of the members that its weights lie in are read.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Sequence

import msgspec
import xxhash

from streamsoup.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    UnsafePickleError,
    printable,
    some,
)
from streamsoup.formats.conversions import of_pickle, of_torchscript
from streamsoup.formats.header import recognise
from streamsoup.formats.index import check_files, check_index, index_name, read_index
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.links import check_inside
from streamsoup.formats.pickled.archive import Archive, ReadAt, data_begin, read_archive
from streamsoup.formats.pickled.checksums import Checked
from streamsoup.formats.pickled.opcodes import TEXT_LIMIT, interpret
from streamsoup.formats.pickled.places import Place, place
from streamsoup.formats.pickled.source import Contents, Pickled
from streamsoup.formats.pickled.trees import Weights, find_weights
from streamsoup.formats.shards import Attributes, Identity, StoredFile
from streamsoup.formats.weights import PICKLES, names_in
from streamsoup.system.regular import reading

__all__ = ["Opened", "choose", "is_index", "open_archive", "open_saved", "read_at", "saved_name"]

INDEX = re.compile(r"(?P<stem>.+)\.bin\.index(\.(?P<variant>[^.]+))?\.json", re.DOTALL)

_OF_TRAINING = (
    *("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"),
    *("sampler", "optim_states", "zero_pp_rank_", "bf16_zero_pp_rank_"),
)
"""How the names of pickles begin that hold the state of a training run, not weights."""

_MODELS = ("model", "diffusion_pytorch_model", "adapter_model")
"""How the names of files begin that loaders look for, once ``pytorch_`` is gone."""


class Opened(msgspec.Struct, frozen=True):
    """One archive of ``torch.save``: what is known before its pickle is interpreted."""

    archive: Archive
    prefix: str
    """What the names of its members begin with."""
    text: bytes
    """The pickle."""
    text_begin: int
    """Offset of the pickle in the file."""

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Ranges of the file that describe the tensors."""
        return (self.text_begin, self.text_begin + len(self.text)), self.archive.directory


class _File(msgspec.Struct, frozen=True):
    """One opened file of a checkpoint."""

    shard: StoredFile
    contents: Contents
    crcs: list[int]
    weights: tuple[str, tuple[str, ...]]
    """Where in the pickle the tensors were, and what was left out."""


def is_index(name: str) -> bool:
    """Return True if a file of that name is the index of pickled shards."""
    return INDEX.fullmatch(name) is not None


def saved_name(name: str) -> str:
    """Return what the file of a soup is called that mirrors a pickled one.

    >>> saved_name("pytorch_model-00001-of-00002.bin"), saved_name("epoch=3.ckpt")
    ('model-00001-of-00002.safetensors', 'model.safetensors')
    """
    stem = name
    for suffix in PICKLES:
        stem = stem.removesuffix(suffix)
    stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors" if stem.startswith(_MODELS) else "model.safetensors"


def choose(folder: str, names: Sequence[str]) -> str | None:
    """Return which of the names in a folder is its pickled weights or their index; None for none.

    Raises:
        FormatError: There are several.
    """
    indexes = [name for name in names if is_index(name) and name[0] != "."]
    files = [
        name
        for name in names
        if name.endswith(PICKLES) and name[0] != "." and not name.startswith(_OF_TRAINING)
    ]
    for plain in ("pytorch_model", "diffusion_pytorch_model"):
        # Variants are only for those who ask for them, as in `from_pretrained`.
        usual = [name for name in (f"{plain}.bin.index.json", f"{plain}.bin") if name in names]
        if len(usual) == 1:
            return usual[0]
    if len(indexes) == 1:
        single = f"{INDEX.fullmatch(indexes[0])['stem']}.bin"  # type: ignore[index]
        if single not in files:
            return indexes[0]
    if len(files) > 1 or indexes:
        raise FormatError(
            f"{printable(folder)}: has several files that may hold weights "
            f"({some([*indexes, *files], 4)}); give the file you mean"
        )
    return files[0] if files else None


def open_saved(path: str, key: str | None, cache: HeaderCache) -> Pickled:
    """Open files of ``torch.save`` by their directories and pickles.

    Args:
        path: A file, an index, or a folder that holds one.
        key: Where in the pickle the weights are; None to find them.
        cache: What was read so far, to be shared by the ingredients of one soup.

    Raises:
        MissingFileError: There is no such file.
        FormatError: It is not a checkpoint, or not one that can be read without running code; names
            the file and the fault.
    """
    folder = path if os.path.isdir(path) else None
    if folder is None:
        above, name = os.path.split(path)
    else:
        above, name = folder, _chosen(folder)
    above = above or os.curdir
    where = os.path.join(above, name) if folder is not None else path
    if is_index(name):
        return _open_index(path, above, where, key, cache)
    if folder is not None:
        check_inside(where, folder)
    file = _open_file(where, 0, key, cache)
    return _source(path, folder, [file], [saved_name(name)], None, 0, cache)


def _chosen(folder: str) -> str:
    names = names_in(folder)
    name = choose(folder, names)
    if name is None:
        raise FormatError(
            f"{printable(folder)}: has no weights, only the state of a training run "
            f"({some(names, 3)}); give the folder with the checkpoint"
        )
    return name


def _open_index(
    given: str, folder: str, where: str, key: str | None, cache: HeaderCache
) -> Pickled:
    """Open the files that an index lists."""
    check_inside(where, folder)
    weight_map, opening = read_index(where, PICKLES)
    names = sorted(set(weight_map.values()))
    files = []
    for number, name in enumerate(names):
        check_inside(os.path.join(folder, name), folder)
        files.append(_open_file(os.path.join(folder, name), number, key, cache))
    held: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        for tensor in file.contents.places:
            if tensor in held:
                raise CorruptFileError(
                    f"{printable(given)}: tensor {printable(tensor)!r} is in two shards, "
                    f"{printable(held[tensor])} and {printable(name)}; download, copy or save the "
                    "checkpoint again"
                )
            held[tensor] = name
    check_index(where, weight_map, held)
    check_files(where, names, names_in(folder))
    found = INDEX.fullmatch(os.path.basename(where))
    stem, variant = (found["stem"], found["variant"]) if found is not None else ("", None)
    stem = stem.removeprefix("pytorch_") + (f".{variant}" if variant else "")
    made = [saved_name(name) for name in names]
    if len({*made}) < len(made):
        made = [f"{stem}-{n + 1:05}-of-{len(made):05}.safetensors" for n in range(len(made))]
    return _source(given, folder, files, made, index_name(stem), opening, cache)


def _source(
    given: str,
    folder: str | None,
    files: Sequence[_File],
    file_names: Sequence[str],
    index: str | None,
    opening: int,
    cache: HeaderCache,
) -> Pickled:
    """Make one source of opened files, each with the number that its places have."""
    if len(files) == 1:
        contents = files[0].contents
    else:
        contents = _merged([file.contents for file in files]).shared(cache.pickled)
    crcs = [crc for file in files for crc in file.crcs]
    return Pickled(
        given,
        folder,
        [file.shard for file in files],
        contents,
        crcs,
        key=files[0].weights[0],
        left_out=files[0].weights[1],
        file_names=file_names,
        index_name=index,
        opening_nbytes=max(opening, *(file.shard.opening_nbytes for file in files)),
    )


def _merged(contents: Sequence[Contents]) -> Contents:
    """Put the contents of several files together; members are numbered through."""
    places: dict[str, Place] = {}
    members: list[Checked] = []
    for each in contents:
        first = len(members)
        members += each.members
        for name, one in each.places.items():
            chunks = tuple(
                msgspec.structs.replace(chunk, member=chunk.member + first) for chunk in one.chunks
            )
            places[name] = msgspec.structs.replace(one, chunks=chunks)
    return Contents(places, tuple(members))


def _open_file(path: str, number: int, key: str | None, cache: HeaderCache) -> _File:
    """Open one file, with errors that name it; `number` counts those of a checkpoint."""
    where = printable(path)
    try:
        with reading(path) as (descriptor, status):
            read = read_at(descriptor)
            opened = open_archive(read, 0, status.st_size)
            digest = xxhash.xxh3_128(opened.text)
            digest.update(read(opened.archive.directory[0], _length(opened.archive.directory)))
            contents, crcs, weights, held = _contents(read, opened, number, key, cache)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{where}: {error.text}; convert it to safetensors first: "
            f"{printable(of_pickle(path), 800)}"
        ) from None
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{where}: {error.text}; download, copy or save the checkpoint again"
        ) from None
    except _TorchScriptError as error:
        raise FormatError(
            f"{where}: {error.text}: {printable(of_torchscript(path), 800)}"
        ) from None
    except FormatError as error:
        raise type(error)(f"{where}: {error.text}") from None
    except FileNotFoundError:
        raise MissingFileError(
            f"{where}: no such file; the checkpoint is not complete, so download or save it again"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{where}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    shard = StoredFile(
        path=path,
        identity=Identity.of(status),
        attributes=Attributes.of(status),
        heads=opened.heads,
        head_digest=digest.digest(),
        opening_nbytes=opened.archive.opening_nbytes + held,
    )
    return _File(shard, contents, crcs, weights)


class _TorchScriptError(FormatError):
    """An archive of TorchScript, for which there is advice of its own."""


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def read_at(descriptor: int) -> ReadAt:
    """Return what reads ranges of an open file. It raises `CorruptFileError` at the end."""

    def read(offset: int, n: int) -> bytes:
        pieces = []
        while n > 0:
            piece = os.pread(descriptor, n, offset)
            if not piece:
                raise CorruptFileError("ended while its zip directory was being read")
            pieces.append(piece)
            offset, n = offset + len(piece), n - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    return read


def open_archive(read: ReadAt, begin: int, end: int) -> Opened:
    """Open the archive of ``torch.save`` in a range of a file, up to its pickle.

    Raises:
        UnsafePickleError: It is a pickle without an archive.
        CorruptFileError: The archive contradicts itself, or the CRC of the pickle is wrong.
        FormatError: It is something else.
    """
    head = read(begin, min(32, end - begin))
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UnsafePickleError(
            "is a PyTorch pickle without a zip archive around it, as before torch 1.6, which could "
            "run code when opened"
        )
    kind = recognise(head)
    if kind is not None and not head.startswith(b"PK"):
        raise FormatError(f"is {kind}, not a file of torch.save")
    archive = read_archive(read, begin, end)
    members = archive.members
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        has = some(list(members), 3) if members else "nothing"
        raise FormatError(
            f"is a zip archive, but not one of torch.save: expected one NAME/data.pkl, found {has}"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in members or any(n.startswith(f"{prefix}code/") for n in members):
        raise _TorchScriptError(
            "is a TorchScript archive, which holds code; save its weights first"
        )
    member = members[pickles[0]]
    if member.nbytes > TEXT_LIMIT:
        raise CorruptFileError(f"has a pickle of {member.nbytes} bytes, far too many")
    at = data_begin(read, member)
    text = read(at, member.nbytes)
    if zlib.crc32(text) != member.crc and member.crc:
        raise CorruptFileError("is damaged: its pickle has another CRC-32 than was written")
    order = members.get(f"{prefix}byteorder")
    if order is not None and order.nbytes < 100:
        found = read(data_begin(read, order), order.nbytes)
        if found != b"little":
            raise FormatError(
                f"was saved in {printable(found.decode('latin-1'))!r}-endian byte order; load it "
                "with torch, and save it again on a little-endian machine"
            )
    return Opened(archive, prefix, text, at)


def _contents(
    read: ReadAt, opened: Opened, number: int, key: str | None, cache: HeaderCache
) -> tuple[Contents, list[int], tuple[str, tuple[str, ...]], int]:
    """Return the tensors of an archive, the CRCs of their members, and the bytes that it took.

    Files of one model have the same pickle, byte for byte, and their members at the same places:
    then they share what was made of the first.
    """
    members = opened.archive.members
    prefix = opened.prefix  # made of the name that the file was saved under
    rows = "\n".join(f"{name[len(prefix) :]}\t{each.nbytes}" for name, each in members.items())
    digest = xxhash.xxh3_128(opened.text)
    digest.update(rows.encode())
    known = (digest.digest(), number, key)
    found = cache.pickled.get(known)
    if found is not None:
        contents, weights, held = found
        used = [members[prefix + each.name] for each in contents.members]
        if all(
            data_begin(read, one) == each.begin
            for one, each in zip(used, contents.members, strict=True)
        ):
            return contents, [one.crc for one in used], weights, held
    root, held = interpret(opened.text)
    chosen = find_weights(root, key)
    contents = place_all(chosen, number, finder(read, opened, number)).shared(cache.pickled)
    cache.pickled[known] = contents, (chosen.key, chosen.left_out), held
    crcs = [members[prefix + each.name].crc for each in contents.members]
    return contents, crcs, (chosen.key, chosen.left_out), held


Finder = tuple[Callable[[str, int], tuple[int, Checked]], list[Checked]]
"""Finds the member of a storage, and lists those that were found."""


def finder(read: ReadAt, opened: Opened, number: int) -> Finder:
    """Return what finds the members of storages in file `number`, each looked at once."""
    found: dict[str, int] = {}
    listed: list[Checked] = []

    def find(key: str, nbytes: int) -> tuple[int, Checked]:
        name = f"data/{key}"
        if name not in found:
            member = opened.archive.members.get(opened.prefix + name)
            if member is None:
                raise CorruptFileError(f"lies in {printable(name)!r}, which the archive lacks")
            at = data_begin(read, member)
            found[name] = len(listed)
            listed.append(Checked(name, number, at, member.nbytes))
        at = found[name]
        if listed[at].nbytes != nbytes:
            raise CorruptFileError(
                f"lies in a storage of {nbytes} bytes, but {printable(name)!r} has "
                f"{listed[at].nbytes}"
            )
        return at, listed[at]

    return find, listed


def place_all(weights: Weights, number: int, found: Finder) -> Contents:
    """Return where all tensors lie, in the order of the file; errors name the tensor."""
    find, listed = found
    places: list[tuple[str, Place]] = []
    for name, tensor in weights.tensors.items():
        try:
            places.append((name, place(tensor, find)))
        except FormatError as error:
            raise type(error)(f"tensor {printable(name)!r} {error.text}") from None
    places.sort(key=lambda each: each[1].lies_at)
    return Contents(dict(places), tuple(listed))
