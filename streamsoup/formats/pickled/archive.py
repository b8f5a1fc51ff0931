"""The directory of a zip archive, read strictly: every member a range of bytes of its own.

An archive may come from anywhere, and its readers differ in what they make of one that contradicts
itself. So each must be of the one form that ``torch.save`` and ``zipfile`` write: nothing before
the first member and after the last record, the directory just before its end record, no name twice,
no member over another, local headers that agree with the directory.

Sources: APPNOTE.TXT 6.3.10 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), sections
4.3 and 4.5.3; ``caffe2/serialize/inline_container.cc`` of PyTorch 2.13.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, printable

__all__ = ["Archive", "Member", "ReadAt", "data_begin", "read_archive"]

ReadAt = Callable[[int, int], bytes]
"""Returns `n` bytes from an offset of the file: ``read(offset, n)``."""

LARGEST_DIRECTORY = 64_000_000
"""Bytes of a directory at most."""

MOST_MEMBERS = 400_000
"""Members at most: ten times the tensors that any published model has."""

MEMBER_NBYTES = 500
"""Bytes that a member takes while the directory is read, at most, beside its name."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_DESCRIBED = 1 << 3
"""Flag: CRC and sizes follow the data, and are 0 in the local header."""


class Member(msgspec.Struct, frozen=True):
    """One member, as the directory describes it."""

    name: str
    raw_name: bytes
    begin: int
    """Offset of its local header in the file."""
    limit: int
    """Offset of what comes after it: the next member, or the directory."""
    nbytes: int
    crc: int
    """CRC-32 of its bytes; 0 where none was recorded."""
    method: int
    """How it is compressed; 0 for stored as it is."""
    flags: int


class Archive(msgspec.Struct, frozen=True):
    """The members of an archive, by name."""

    members: dict[str, Member]
    directory: tuple[int, int]
    """Offsets in the file from the first entry of the directory to the end of the archive."""

    @property
    def opening_nbytes(self) -> int:
        """Bytes that reading the directory took, at most."""
        begin, end = self.directory
        return 6 * (end - begin) + MEMBER_NBYTES * len(self.members)


def read_archive(read: ReadAt, begin: int, end: int) -> Archive:
    """Read the directory of the archive in bytes `begin` to `end` of a file.

    Raises:
        CorruptFileError: It contradicts itself; the caller knows in which file.
    """
    if end - begin < _END.size:
        raise CorruptFileError(f"has {end - begin} bytes, too few for a zip archive")
    at = end - _END.size
    signature, disk, first_disk, here, n, size, offset, comment = _END.unpack(read(at, _END.size))
    if signature != b"PK\x05\x06":
        raise CorruptFileError(
            "does not end as a zip archive does: it is truncated, or something follows it"
        )
    if disk or first_disk or here != n or comment:
        raise CorruptFileError("has the end of a zip archive in several parts, or with a comment")
    located = read(at - _LOCATOR.size, _LOCATOR.size) if at - begin >= _LOCATOR.size else b""
    if located.startswith(b"PK\x06\x07"):
        at, n, size, offset = _end64(read, begin, at, located, (n, size, offset))
    elif n == 0xFFFF or 0xFFFFFFFF in (size, offset):
        raise CorruptFileError("lacks the zip64 record that its end record speaks of")
    if begin + offset + size != at:
        raise CorruptFileError(
            f"has its zip directory at byte {offset} to {offset + size}, expected it to end at "
            f"{at - begin}"
        )
    if size > LARGEST_DIRECTORY or n > min(MOST_MEMBERS, size // _ENTRY.size):
        raise CorruptFileError(f"claims a zip directory of {n} members in {size} bytes")
    members = _entries(read(begin + offset, size), n, begin, begin + offset)
    return Archive(members, (begin + offset, end))


def _end64(
    read: ReadAt, begin: int, at: int, located: bytes, short: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """Read the zip64 end record; return where it is, and the true numbers of the end record."""
    _, disk, where, n_disks = _LOCATOR.unpack(located)
    at -= _LOCATOR.size + _END64.size
    if at < begin or begin + where != at or disk or n_disks != 1:
        raise CorruptFileError("has a zip64 end record that is not where its locator says")
    signature, left, _, _, disk, first, here, n, size, offset = _END64.unpack(read(at, _END64.size))
    if signature != b"PK\x06\x06" or left != _END64.size - 12 or disk or first or here != n:
        raise CorruptFileError("has a zip64 end record of an unknown form")
    for told, true, unknown in zip(
        short, (n, size, offset), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True
    ):
        if told not in (true, unknown):
            raise CorruptFileError("has two end records that contradict each other")
    return at, n, size, offset


def _entries(text: bytes, n: int, begin: int, end: int) -> dict[str, Member]:
    """Read the entries of a directory; `end` is where the last member must have ended."""
    rows: list[tuple[int, int, str, bytes, int, int, int]] = []
    at = 0
    for _ in range(n):
        if at + _ENTRY.size > len(text):
            raise CorruptFileError("has a zip directory that ends amid an entry")
        fields = _ENTRY.unpack_from(text, at)
        signature, _, _, flags, method, _, _, crc, packed, nbytes = fields[:10]
        n_name, n_extra, n_comment, disk, _, _, offset = fields[10:]
        stop = at + _ENTRY.size + n_name + n_extra + n_comment
        if signature != b"PK\x01\x02" or stop > len(text):
            raise CorruptFileError("has a zip directory with a damaged entry")
        raw = text[at + _ENTRY.size : at + _ENTRY.size + n_name]
        extra = text[at + _ENTRY.size + n_name : stop - n_comment]
        name = _name(raw)
        if 0xFFFFFFFF in (nbytes, packed, offset):
            nbytes, packed, offset = _zip64(name, extra, nbytes, packed, offset)
        if disk or (method == 0 and packed != nbytes):
            raise CorruptFileError(f"has a zip entry {printable(name)!r} that contradicts itself")
        rows.append((begin + offset, packed, name, raw, crc, method, flags))
        at = stop
    if at != len(text):
        raise CorruptFileError("has a zip directory with bytes after its last entry")
    rows.sort()
    for one, other in pairwise([*rows, (end, 0, "the directory", b"", 0, 0, 0)]):
        if one[0] + _LOCAL.size + len(one[3]) + one[1] > other[0]:
            raise CorruptFileError(
                f"has overlapping zip members: {printable(one[2])!r} runs into "
                f"{printable(other[2])!r}"
            )
    members: dict[str, Member] = {}
    limits = [*(row[0] for row in rows[1:]), end]
    for (offset, packed, name, raw, crc, method, flags), limit in zip(rows, limits, strict=True):
        if name in members:
            raise CorruptFileError(f"has the zip member {printable(name)!r} twice")
        members[name] = Member(name, raw, offset, limit, packed, crc, method, flags)
    return members


def _name(raw: bytes) -> str:
    """Decode the name of a member. Raises `CorruptFileError` for one that leads elsewhere."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptFileError("has a zip member whose name is not UTF-8") from None
    if not name or "\0" in name or "\\" in name or name[0] == "/" or ".." in name.split("/"):
        raise CorruptFileError(f"has a zip member with the name {printable(name)!r}")
    return name


def _zip64(name: str, extra: bytes, *numbers: int) -> list[int]:
    """Return the true numbers of an entry: those that are 32 ones stand in its zip64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + size]
        at += 4 + size
        if kind != 1 or len(field) != size:
            continue
        values = iter(struct.unpack_from(f"<{size // 8}Q", field))
        found = [next(values, -1) if number == 0xFFFFFFFF else number for number in numbers]
        if min(found) >= 0:
            return found
    raise CorruptFileError(f"has a zip entry {printable(name)!r} without its 64-bit sizes")


def data_begin(read: ReadAt, member: Member) -> int:
    """Return the offset of a member's first byte in the file, from its local header.

    Raises:
        CorruptFileError: The local header contradicts the directory.
        FormatError: The member is compressed or encrypted, so it is no range of the file.
    """
    where = f"zip member {printable(member.name)!r}"
    if member.flags & _ENCRYPTED:
        raise FormatError(f"has the {where} encrypted; decrypt the archive first")
    if member.method:
        raise FormatError(
            f"has the {where} compressed, so its tensors are no ranges of the file; save it again "
            "with torch.save, or unpack it and pack it again with `zip -0 -r`"
        )
    signature, _, flags, method, _, _, crc, packed, nbytes, n_name, n_extra = _LOCAL.unpack(
        read(member.begin, _LOCAL.size)
    )
    if signature != b"PK\x03\x04" or n_name != len(member.raw_name):
        raise CorruptFileError(f"has no {where} where its directory says")
    if read(member.begin + _LOCAL.size, n_name) != member.raw_name:
        raise CorruptFileError(f"has another member where its directory has the {where}")
    described = bool(flags & _DESCRIBED) and not (crc or packed or nbytes)
    sizes = {packed, nbytes} - {0xFFFFFFFF}  # those of a zip64 field
    if method or flags & _ENCRYPTED or not (described or sizes <= {member.nbytes}):
        raise CorruptFileError(f"has a local header that contradicts the directory: {where}")
    if not described and crc != member.crc:
        raise CorruptFileError(f"has two CRCs of the {where}")
    begin: int = member.begin + _LOCAL.size + n_name + n_extra
    if begin + member.nbytes > member.limit:
        raise CorruptFileError(f"has a {where} that runs into the next one")
    return begin
