"""Opening an ingredient by its headers alone.

An ingredient is a ``.safetensors`` file, a folder that holds one, or a folder whose
``*.safetensors.index.json`` says which shard holds which tensor (the Hugging Face layout;
the symlinked folders of its download cache included), or that index. Nothing but headers and the
index is read.

Fine-tunes of one model have the same headers, byte for byte. A `Pantry` keeps one parsed copy of
each, so that 64 ingredients of 200 shards take the memory of one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import xxhash

from streamsoup.errors import (
    ChangedIngredientError,
    CorruptFileError,
    FormatError,
    MissingFileError,
    RecipeError,
    UnsafePickleError,
    count,
    printable,
)
from streamsoup.formats.conversions import of_hub_id, of_pickle
from streamsoup.formats.header import Header, header_nbytes, parse_header
from streamsoup.formats.index import check_files, check_index, is_index, read_index
from streamsoup.formats.weights import PICKLES, find_weights, names_in
from streamsoup.sizes import nbytes_text
from streamsoup.system.regular import reading
from streamsoup.system.schemes import check_local
from streamsoup.tensors import TensorSpec

__all__ = [
    "AnyIngredient",
    "Identity",
    "Ingredient",
    "Layout",
    "Pantry",
    "Shard",
    "listed",
    "open_ingredients",
]


class Identity(msgspec.Struct, frozen=True):
    """What tells a file from another, and from itself after a change."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Take the identity out of what `os.stat` says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Shard(msgspec.Struct, frozen=True):
    """One safetensors file of an ingredient, as it was when its header was read."""

    in_memory: ClassVar[bool] = False
    path: str
    identity: Identity
    header: Header
    data_begin: int
    """Offset of the first byte after the header."""
    ctime_ns: int
    """When the file was last written to, renamed, linked or granted to others. Work is resumed only
    while it is the same: files written in place may be given the times of those before them. Not a
    part of the identity, as backups and indexers change it under a run that goes on."""
    opening_nbytes: int
    """Bytes that its header took while it was read: as it is, decoded, and its values; four for a
    character where one is no ASCII."""

    def check_unchanged(self, begin: int | None = None) -> None:
        """Raise `ChangedIngredientError` unless the path still leads to the same, untouched file.

        Where a shard is no file, the tensor at offset `begin` alone may be looked at.

        Costs one `stat`. A change within the file system's time stamp granularity goes unseen.
        """
        try:
            status = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ChangedIngredientError(
                f"{printable(self.path)}: vanished while it was being read "
                f"({error.strerror}); put it back, and run again"
            ) from None
        except OSError as error:
            raise FormatError(
                f"{printable(self.path)}: cannot be read any more: {error.strerror}; mend that, "
                "and run again"
            ) from None
        found = Identity.of(status)
        if found == self.identity:
            return
        if found.size != self.identity.size:
            what = f"changed size from {self.identity.size} to {found.size} bytes"
        elif (found.device, found.inode) != (self.identity.device, self.identity.inode):
            what = "was replaced by another file"
        else:
            what = "was modified"
        raise ChangedIngredientError(
            f"{printable(self.path)}: {what} while it was being read; run again once nobody "
            "writes to it"
        )


class Layout(msgspec.Struct, frozen=True, eq=False):
    """Where each tensor of an ingredient lies; shared by the ingredients that agree on it."""

    headers: tuple[Header, ...]
    places: Mapping[str, tuple[int, TensorSpec]]
    """Name to shard number and spec, shard by shard, in file order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.nbytes for _, spec in self.places.values())

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors together."""
        return sum(spec.n_elements for _, spec in self.places.values())


class Ingredient(msgspec.Struct, frozen=True, eq=False):
    """A checkpoint opened by its headers: what it holds and where, but no weights."""

    name: str
    """The path as the user gave it."""
    folder: str | None
    """The folder whose side files belong to it; None for a lone file."""
    shards: tuple[Shard, ...]
    layout: Layout
    index_name: str | None
    """File name of its index, if it has one."""
    index_opening_nbytes: int = 0
    """Bytes that its index took while it was read."""

    def __repr__(self) -> str:
        """Say it in a line."""
        size = nbytes_text(self.nbytes)
        return f"<Ingredient {self.name!r}: {count(len(self.layout.places), 'tensor')}, {size}>"

    @property
    def opening_nbytes(self) -> int:
        """Bytes that its index or its largest header took while it was read."""
        return max(self.index_opening_nbytes, *(shard.opening_nbytes for shard in self.shards))

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of its files, shard by shard."""
        return tuple(os.path.basename(shard.path) for shard in self.shards)

    @property
    def path(self) -> str:
        """Its absolute path; the mere name of what lies in memory."""
        return self.name if self.shards[0].in_memory else os.path.abspath(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors together."""
        return self.layout.nbytes

    @property
    def fingerprint(self) -> list[list[str | int]]:
        """Tell its files from what they may become: path, inode, size and times of each.

        Not the device, whose number may change when the machine starts anew. Plain JSON.
        """
        return [
            [
                shard.path if shard.in_memory else os.path.realpath(shard.path),
                *(shard.identity.inode, shard.identity.size),
                *(shard.identity.mtime_ns, shard.ctime_ns),
            ]
            for shard in self.shards
        ]

    def check_unchanged(self) -> None:
        """Raise `ChangedIngredientError` unless every shard is as it was when opened."""
        for shard in self.shards:
            shard.check_unchanged()

    def where(self, tensor: str) -> str:
        """Name the file that holds `tensor`, and the tensor, for a message."""
        number, _ = self.layout.places[tensor]
        return f"{printable(self.shards[number].path)}: {printable(tensor)}"


class Pantry(msgspec.Struct):
    """Parsed headers and layouts, kept once each while ingredients are opened."""

    parsed: dict[tuple[bytes, int], Header] = {}
    """By the digest of a header's text, which may be megabytes of metadata, and its file's size."""
    headers: dict[tuple[TensorSpec, ...], Header] = {}
    layouts: dict[tuple[int, ...], Layout] = {}
    """By the ids of its headers."""

    def header(self, text: bytes, file_nbytes: int) -> Header:
        """Parse a header, unless the same bytes were parsed before.

        Those that differ in metadata or padding alone give the same header.
        """
        key = xxhash.xxh3_128_digest(text), file_nbytes
        if key not in self.parsed:
            header = parse_header(text, file_nbytes)
            self.parsed[key] = self.headers.setdefault(tuple(header.tensors.values()), header)
        return self.parsed[key]

    def layout(self, shards: Sequence[Shard], root: str) -> Layout:
        """Merge the headers of `shards`, unless the same were merged before."""
        headers = tuple(shard.header for shard in shards)
        key = tuple(id(header) for header in headers)
        if key not in self.layouts:
            places: dict[str, tuple[int, TensorSpec]] = {}
            for number, header in enumerate(headers):
                for name, spec in header.tensors.items():
                    if name in places:
                        one, other = (
                            printable(os.path.basename(shards[n].path))
                            for n in (places[name][0], number)
                        )
                        raise CorruptFileError(
                            f"{printable(root)}: tensor {printable(name)!r} is in two shards, "
                            f"{one} and {other}"
                        )
                    places[name] = (number, spec)
            self.layouts[key] = Layout(headers, places)
        return self.layouts[key]

    def open(self, path: str | bytes | os.PathLike[Any]) -> Ingredient:
        """Open one ingredient. See `open_ingredients`."""
        try:
            return self._open(str(os.fsdecode(path)))  # of numpy, too
        except CorruptFileError as error:
            raise CorruptFileError(
                f"{error.text}; download, copy or save the checkpoint again"
            ) from None

    def _open(self, given: str) -> Ingredient:
        _check_path(given)
        try:
            mode = os.stat(given).st_mode
        except FileNotFoundError:
            raise MissingFileError(
                f"{printable(given)}: no such file or folder; check the path{_advice_for(given)}"
            ) from None
        except OSError as error:
            raise FormatError(
                f"{printable(given)}: cannot be opened: {error.strerror}; mend that, and run again"
            ) from None
        if stat.S_ISDIR(mode):
            name = find_weights(given)
            if is_index(name):
                return self._open_index(given, given, name)
            shards: tuple[Shard, ...] = (self._open_shard(os.path.join(given, name)),)
            return Ingredient(given, given, shards, self.layout(shards, given), None)
        folder, name = os.path.split(given)
        if is_index(name):
            return self._open_index(given, folder or os.curdir, name)
        shards = (self._open_shard(given),)
        return Ingredient(given, None, shards, self.layout(shards, given), None)

    def _open_index(self, given: str, folder: str, name: str) -> Ingredient:
        """Open the shards that the index `name` of a folder lists."""
        weight_map, opening = read_index(os.path.join(folder, name))
        files = sorted(set(weight_map.values()))
        shards = tuple(self._open_shard(os.path.join(folder, file)) for file in files)
        layout = self.layout(shards, given)
        held = {tensor: files[number] for tensor, (number, _) in layout.places.items()}
        check_index(os.path.join(folder, name), weight_map, held)
        check_files(os.path.join(folder, name), files, names_in(folder))
        return Ingredient(given, folder, shards, layout, name, opening)

    def _open_shard(self, path: str) -> Shard:
        """Read one header, with errors that name the file."""
        _check_path(path)
        if path.endswith(PICKLES):
            raise UnsafePickleError(
                f"{printable(path)}: is a PyTorch pickle, which could run code when opened; "
                f"convert it to safetensors first: {printable(of_pickle(path), 800)}"
            )
        try:
            with reading(path) as (descriptor, status):
                head = _read_exactly(descriptor, min(8, status.st_size), 0)
                length = header_nbytes(head, status.st_size)
                text = _read_exactly(descriptor, length, 8)
                header = self.header(text, status.st_size)
        except FormatError as error:
            raise type(error)(f"{printable(path)}: {error.text}") from None
        except FileNotFoundError:
            raise MissingFileError(
                f"{printable(path)}: no such file; the checkpoint is not complete, so download or "
                "save it again"
            ) from None
        except OSError as error:
            raise FormatError(
                f"{printable(path)}: cannot be read: {error.strerror}; mend that, and run again"
            ) from None
        opening = length * (3 if text.isascii() else 9)
        return Shard(path, Identity.of(status), header, 8 + length, status.st_ctime_ns, opening)


AnyIngredient = str | os.PathLike[str] | Ingredient | Mapping[str, Any] | Any
"""A path, an open ingredient, a state dict or a module."""


def listed(ingredients: Iterable[AnyIngredient] | os.PathLike[str]) -> list[AnyIngredient]:
    """Take ingredients in the order given, of a generator, too.

    Raises `RecipeError` for one ingredient in the place of a list, for no list at all, and for a
    set, which has no order.
    """
    if isinstance(ingredients, (str, bytes, os.PathLike)):
        given = printable(os.fsdecode(ingredients))
        raise RecipeError(f"{given}: is one path, and a list is wanted: [{given!r}, ...]")
    if isinstance(ingredients, (Mapping, Ingredient)) or hasattr(ingredients, "state_dict"):
        raise RecipeError("this is one ingredient, and a list of them is wanted")
    try:
        if isinstance(ingredients, (set, frozenset)):
            raise TypeError
        going = iter(ingredients)
    except TypeError:
        given = printable(repr(ingredients))
        raise RecipeError(f"{given}: a list of ingredients is wanted") from None
    return list(going)


def open_ingredients(paths: Iterable[AnyIngredient]) -> list[Ingredient]:
    """Open checkpoints by their headers, in the order given.

    An already open ingredient is passed through, after a check that its files are unchanged. A
    state dict, or a module, is an ingredient too: its tensors are read where they are.
    Raises `MissingFileError` or a `FormatError` that names the file, and the tensor if there is
    one; `RecipeError` for one checkpoint in the place of a list. Reads headers and indexes only,
    and keeps one copy of those that are equal.
    """
    pantry = Pantry()
    opened: list[Ingredient] = []
    for path in listed(paths):
        if isinstance(path, Ingredient):
            path.check_unchanged()
            opened.append(path)
        elif isinstance(path, Mapping) or callable(getattr(path, "state_dict", None)):
            from streamsoup.formats.memory import open_state

            opened.append(open_state(path, pantry))
        elif isinstance(path, (str, bytes, os.PathLike)):
            opened.append(pantry.open(path))
        else:
            raise RecipeError(
                f"{printable(repr(path))} is no ingredient; give a path, a state dict or a module"
            )
    return opened


def _check_path(path: str) -> None:
    """Refuse a path that no file here can have, or that could not be noted in a provenance."""
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
    """Advise somebody who may have given a name that means something elsewhere."""
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


def _read_exactly(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Read `nbytes` at `offset`, however short each read comes back."""
    parts: list[bytes] = []
    while nbytes:
        part = os.pread(descriptor, nbytes, offset)
        if not part:
            raise CorruptFileError("ended while its header was being read")
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)
