"""An append-only log that survives a kill at any instant. Writing and searching resume from it.

A record is one line: its checksum, its length, and a JSON object. It is on disk before `append`
returns. A tail that was torn off in mid-record is dropped; damage anywhere else is refused, as
nothing after it can be trusted.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from types import TracebackType
from typing import Any

from streamsoup.errors import ResumeError, printable

__all__ = ["Journal"]

_BEGINNING = re.compile(rb"[0-9a-f]{0,8}(\Z|\0| (\Z|\0|[0-9]))")
"""How a record that was cut short begins: another file is not mistaken for a journal."""


class Journal:
    """The records of a file, and the means to add one. Not safe for several writers."""

    def __init__(self, path: str) -> None:
        """Open or create the journal at `path`; read its records, and drop a torn tail.

        Raises `ResumeError` if a record is damaged. Costs a read of the whole file.
        """
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o666)
        try:
            self.records, nbytes = _parse(_read_all(self._descriptor), path)
            os.ftruncate(self._descriptor, nbytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Journal:
        """Give the journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def append(self, record: dict[str, Any], *, wait: bool = True) -> None:
        """Add a record, and wait until it is on disk. If that fails, take it back.

        Without `wait` it survives a kill, but only after `sync` a power failure.
        """
        line = _encode(record)
        nbytes = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            if wait:
                os.fsync(self._descriptor)
        except OSError:
            # The cache would still show what is not on disk.
            os.ftruncate(self._descriptor, nbytes)
            raise
        self.records.append(record)

    def sync(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %d %b\n" % (zlib.crc32(text), len(text), text)


def _parse(content: bytes, path: str) -> tuple[list[dict[str, Any]], int]:
    """Give the records, and the length of the content they fill."""
    records: list[dict[str, Any]] = []
    position = 0
    while position < len(content):
        end = content.find(b"\n", position)
        # Only a line without its end, or with unwritten (zero) bytes at the end of the file, can
        # come from a write that was cut short.
        torn = end < 0 or (b"\0" in content[position:end] and end == len(content) - 1)
        if torn and _BEGINNING.match(content, position):
            break
        record = _decode(content[position:end])
        if record is None:
            if not content[position:].strip(b"\0"):
                break
            raise ResumeError(
                f"{printable(path)}: record {len(records) + 1} is damaged; "
                f"remove {printable(os.path.dirname(path) or path)} to start anew"
            )
        records.append(record)
        position = end + 1
    return records, position


def _decode(line: bytes) -> dict[str, Any] | None:
    """Give the record of a line, or None if it is not as it was written."""
    parts = line.split(b" ", 2)
    if len(parts) != 3 or parts[1] != b"%d" % len(parts[2]):
        return None
    if parts[0] != b"%08x" % zlib.crc32(parts[2]):
        return None
    record = json.loads(parts[2])
    return record if isinstance(record, dict) else None


def _read_all(descriptor: int) -> bytes:
    parts: list[bytes] = []
    while part := os.pread(descriptor, 1 << 20, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)
