"""One archive of ``torch.save``: its directory, its pickle, and the members of its storages."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, UnsafePickleError, printable, some
from streamsoup.formats.header import recognise
from streamsoup.formats.pickled.archive import Archive, ReadAt, data_begin, read_archive
from streamsoup.formats.pickled.checksums import Checked
from streamsoup.formats.pickled.opcodes import TEXT_LIMIT
from streamsoup.formats.pickled.places import Place, place
from streamsoup.formats.pickled.source import Contents
from streamsoup.formats.pickled.trees import Weights

__all__ = ["Opened", "TorchScriptError", "finder", "open_archive", "place_all", "read_at"]


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


class TorchScriptError(FormatError):
    """An archive of TorchScript, for which there is advice of its own."""


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
        raise TorchScriptError("is a TorchScript archive, which holds code; save its weights first")
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
