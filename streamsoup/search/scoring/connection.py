"""The connection between a search and its workers: whole messages, or an error.

The worker's end is a file descriptor in a process where a user's code runs, which may write there
anything. So each message begins with a mark, and carries its size and its digest: anything else is
recognised at its first byte, no size is trusted before its mark, and nothing that has arrived is
waited for. In bytes, little-endian::

    mark 8 | size of the content 8 | its xxh3 8 | content
"""

from __future__ import annotations

import socket
import struct

import xxhash

from streamsoup.errors import TaskError

__all__ = ["Connection"]

_MARK = b"\x93soup\r\n\0"
_HEAD = struct.Struct("<8sQQ")

_PART_NBYTES = 1 << 20
"""How much is taken at once: memory grows with what has come, not with what was promised."""


class Connection:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        """Own the end of a pair of stream sockets."""
        self._end = end
        self._come = bytearray()

    def fileno(self) -> int:
        """Return its file descriptor."""
        return self._end.fileno()

    def send(self, content: bytes) -> None:
        """Send a message. Waits until the other end, or its buffer, has taken it."""
        head = _HEAD.pack(_MARK, len(content), xxhash.xxh3_64_intdigest(content))
        self._end.sendall(head + content)

    def take(self, *, wait: bool) -> bytes | None:
        """Return the next message; None if it has not all come, and `wait` is False.

        Raises `EOFError` if the other end is closed, and `TaskError` if something else than a
        message has come.
        """
        while (missing := self._missing()) > 0:
            try:
                flags = 0 if wait else socket.MSG_DONTWAIT
                part = self._end.recv(min(missing, _PART_NBYTES), flags)
            except BlockingIOError:
                return None
            except ConnectionError:
                raise EOFError from None
            if not part:
                raise EOFError
            self._come += part
        content = bytes(memoryview(self._come)[_HEAD.size :])
        _, _, digest = _HEAD.unpack_from(self._come)
        if xxhash.xxh3_64_intdigest(content) != digest:
            raise _strange()
        self._come = bytearray()
        return content

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _missing(self) -> int:
        """Count the bytes that the head, or then the content, still lacks."""
        come = len(self._come)
        if not _MARK.startswith(self._come[: len(_MARK)]):
            raise _strange()
        if come < _HEAD.size:
            return _HEAD.size - come
        _, size, _ = _HEAD.unpack_from(self._come)
        return int(_HEAD.size + size - come)


def _strange() -> TaskError:
    return TaskError(
        "wrote into a file descriptor that is not its own, the worker's connection to streamsoup; "
        "write to stdout, or to files that it opens"
    )
