"""The CRC-32 of zip members, checked along with the pass that reads them.

``torch.load`` does not look at the CRCs that ``torch.save`` writes, so a flipped byte loads. Here
each thread goes on with the CRC of what it reads as long as it reads on in the same member; where
it stops, the CRC of that range is noted, and ranges that meet are joined, which takes no more than
their lengths. So a member that was read whole, by whichever threads, was checked on the way.

What is left at the end of a pass (members of which only a view was needed, what an earlier run had
read, what a search had no need of) is read once for that: `Checksums.finish`. So no pass ends
before every member that its tensors lie in was checked, once for each time the files are opened.
The members of anything else are never read. 0 as CRC says that none was recorded
(`torch.serialization.set_crc32_options`).

Joining: Mark Adler's `crc32_combine` (zlib 1.2.12, crc32.c); a CRC followed by n zero bytes is its
product with x^8n modulo the polynomial.
"""

from __future__ import annotations

import bisect
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from streamsoup.errors import CorruptFileError, printable
from streamsoup.formats.files import open_shard
from streamsoup.formats.shards import StoredFile
from streamsoup.system.buffers import Bytes, Crc32
from streamsoup.system.regular import close_read

__all__ = ["Checked", "Checksums", "Running", "joined"]

_PIECE = 1 << 20
"""Bytes that are read at a time for a CRC alone."""

_MOST_RANGES = 256
"""Ranges of a member that are noted before they meet, at most."""

_POLYNOMIAL = 0xEDB88320


class Checked(msgspec.Struct, frozen=True):
    """A member that is checked."""

    name: str
    """Without the folder that all members of an archive lie in."""
    file: int
    begin: int
    """Offset of its first byte in the file."""
    nbytes: int


class Checksums:
    """Which members of a source were found to have their CRC. Several threads may use it."""

    def __init__(
        self, files: Sequence[StoredFile], members: Sequence[Checked], crcs: Sequence[int]
    ) -> None:
        """Begin with nothing checked but what cannot be: members without bytes or CRC."""
        self._files, self._members, self._crcs = files, members, crcs
        self.done = bytearray(
            not (member.nbytes and crc) for member, crc in zip(members, crcs, strict=True)
        )
        self._ranges: dict[int, list[tuple[int, int, int]]] = {}
        self._wrong: list[int] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own: with nothing checked yet."""
        return Checksums, (self._files, self._members, self._crcs)

    def size(self, number: int) -> int:
        """Return the bytes of a member."""
        return self._members[number].nbytes

    def note(self, number: int, begin: int, end: int, crc: int) -> None:
        """Note the CRC of bytes `begin` to `end` of a member."""
        with self._lock:
            ranges = self._ranges.setdefault(number, [])
            i = bisect.bisect_left(ranges, (begin, end, crc))
            if (i and ranges[i - 1][1] > begin) or (i < len(ranges) and ranges[i][0] < end):
                return  # read once more, for another part of the work
            if len(ranges) >= _MOST_RANGES:
                return  # a view that jumps about: `finish` reads the member
            ranges.insert(i, (begin, end, crc))
            for j in (i, i - 1):  # with the one after it, then with the one before it
                if 0 <= j < len(ranges) - 1 and ranges[j][1] == ranges[j + 1][0]:
                    (begin, middle, one), (_, end, other) = ranges[j : j + 2]
                    ranges[j : j + 2] = [(begin, end, joined(one, other, end - middle))]
            if ranges[0][:2] == (0, self._members[number].nbytes):
                self._settle(number, ranges[0][2])

    def check(self) -> None:
        """Raise `CorruptFileError` if a member was found to have another CRC."""
        if self._wrong:
            member = self._members[self._wrong[0]]
            raise CorruptFileError(
                f"{printable(self._files[member.file].path)}: its member {printable(member.name)} "
                "is damaged: the bytes have another CRC-32 than was written; download, copy or "
                "save the checkpoint again"
            )

    def finish(self, numbers: Sequence[int]) -> None:
        """Check which of some members are not checked yet, by reading them in small pieces."""
        self.check()
        for number in numbers:
            if not self.done[number]:
                self._read(number, self._members[number])
                self.check()

    def _settle(self, number: int, crc: int) -> None:
        self.done[number] = True
        self._ranges.pop(number, None)
        if crc != self._crcs[number]:
            self._wrong.append(number)

    def _read(self, number: int, member: Checked) -> None:
        shard = self._files[member.file]
        descriptor = open_shard(shard)
        crc, end = 0, member.begin + member.nbytes
        try:
            for at in range(member.begin, end, _PIECE):
                crc = zlib.crc32(os.pread(descriptor, min(_PIECE, end - at), at), crc)
        finally:
            close_read(descriptor)
        shard.check_unchanged()
        with self._lock:
            self._settle(number, crc)


class Running:
    """The CRC of what one thread reads, for as long as it reads on in one member."""

    def __init__(self, checksums: Checksums, crc32: Crc32) -> None:
        """Begin nowhere."""
        self._checksums, self._crc32 = checksums, crc32
        self._number = -1
        self._begin = self._end = self._crc = 0

    def note(self, number: int, begin: int, block: Bytes) -> None:
        """Go on with bytes from `begin` on of a member. Raise `CorruptFileError` if wrong."""
        checksums = self._checksums
        if checksums.done[number]:
            checksums.check()
            return
        if number != self._number or begin != self._end:
            self.stop()
            self._number, self._begin, self._end, self._crc = number, begin, begin, 0
        self._crc = self._crc32(block, self._crc)
        self._end += len(block)
        if self._end == checksums.size(number):
            self.stop()
            checksums.check()

    def stop(self) -> None:
        """Note the CRC so far."""
        if self._end > self._begin:
            self._checksums.note(self._number, self._begin, self._end, self._crc)
        self._number, self._begin, self._end = -1, 0, 0


def joined(one: int, other: int, nbytes: int) -> int:
    """Return the CRC of two ranges that meet, from theirs and the bytes of the other.

    >>> joined(zlib.crc32(b"ab"), zlib.crc32(b"cde"), 3) == zlib.crc32(b"abcde")
    True
    """
    power, square, n = 1 << 31, 1 << 23, nbytes  # x^0 and x^8, the highest bit for x^0
    while n:
        if n & 1:
            power = _product(power, square)
        square = _product(square, square)
        n >>= 1
    return _product(power, one) ^ other


def _product(a: int, b: int) -> int:
    """Return the product of two polynomials modulo that of CRC-32, bits reflected."""
    result = 0
    for n in range(31, -1, -1):
        if a >> n & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
