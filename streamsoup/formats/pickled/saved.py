"""Files of ``torch.save`` in zip format, opened by their directory and their pickle alone.

A checkpoint is one such file, a folder that holds one, or a folder whose
``pytorch_model.bin.index.json`` says which file holds which tensor. Of each file, the directory,
the pickle, and the local headers of the members that its weights lie in are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

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
from streamsoup.formats.index import check_files, check_index, index_name, read_index
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.links import check_inside
from streamsoup.formats.pickled.archive import ReadAt, data_begin
from streamsoup.formats.pickled.checksums import Checked
from streamsoup.formats.pickled.opcodes import interpret
from streamsoup.formats.pickled.opened import (
    Opened,
    TorchScriptError,
    finder,
    open_archive,
    place_all,
    read_at,
)
from streamsoup.formats.pickled.places import Place
from streamsoup.formats.pickled.source import Contents, Pickled
from streamsoup.formats.pickled.trees import find_weights
from streamsoup.formats.shards import Attributes, Identity, StoredFile
from streamsoup.formats.weights import PICKLES, names_in
from streamsoup.system.regular import reading

__all__ = ["choose", "is_index", "open_saved", "saved_name"]

INDEX = re.compile(r"(?P<stem>.+)\.bin\.index(\.(?P<variant>[^.]+))?\.json", re.DOTALL)

_OF_TRAINING = (
    *("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"),
    *("sampler", "optim_states", "zero_pp_rank_", "bf16_zero_pp_rank_"),
)
"""How the names of pickles begin that hold the state of a training run, not weights."""

_MODELS = ("model", "diffusion_pytorch_model", "adapter_model")
"""How the names of files begin that loaders look for, once ``pytorch_`` is gone."""


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
            begin, end = opened.archive.directory
            digest.update(read(begin, end - begin))
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
    except TorchScriptError as error:
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
