"""Ranges of files at addresses over HTTP, with retries, as one thread reads them.

A range is asked for in large pieces and read from the socket as it is needed, so that what is on
its way waits in buffers of the kernel and takes no memory of the process. An answer is believed
only if it is the range that was asked for, of a file of the same size and the same validator
(``ETag``, else ``Last-Modified``) as when the file was opened. A redirect is followed again when
its target stops to answer: signed addresses expire.
"""

from __future__ import annotations

import http.client
import re
import ssl
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

import msgspec

from streamsoup.errors import (
    ChangedIngredientError,
    FormatError,
    MissingFileError,
    StreamsoupError,
)
from streamsoup.formats.remote.addresses import check_address, is_here, origin, shown, token_for
from streamsoup.formats.remote.stores import Store
from streamsoup.formats.remote.tries import Broken, Tries
from streamsoup.system.buffers import Bytes
from streamsoup.version import __version__

__all__ = ["RemoteFile", "Requests"]

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that a later request may not have."""

_EXPIRED = (400, 401, 403, 404, 410)
"""Statuses that the target of a redirect may have when its signature has expired."""

_MOST_TRIES = 8
"""Tries of what begins anew each time, however many bytes came."""

_PIECE = 1 << 18
"""Bytes of a side file that are held at once."""

_STALL = 20.0
"""Seconds without a byte after which a connection is given up for another one."""


class RemoteFile(msgspec.Struct, frozen=True):
    """A file at an address, as it was when it was opened."""

    url: str
    """Its address; never shown, as it may hold a signature."""
    size: int
    validator: str
    """Its ETag, or the time of its last change; empty if the server says neither."""

    def __repr__(self) -> str:
        """Return it without secrets."""
        return f"<RemoteFile {shown(self.url)}>"


class _Answer(msgspec.Struct):
    response: http.client.HTTPResponse
    linked: str
    """The ETag that the Hub gives with a redirect to its storage."""


class Requests:
    """The requests of one thread, over one connection that is kept while it can be."""

    def __init__(self, timeout_s: float, store: Store | None = None) -> None:
        """Connect to nothing yet.

        Args:
            timeout_s: Seconds without a byte that end in an error.
            store: Opens the objects whose addresses are asked for; None for plain addresses.
        """
        self._timeout_s, self._store = timeout_s, store
        self._headers: dict[str, dict[str, str]] = {}
        """Of an address that the store gave: the headers that open it, sent to no other."""
        self._connection: http.client.HTTPConnection | None = None
        self._origin: tuple[str, str, int] | None = None
        self._targets: dict[str, tuple[str, str]] = {}
        """Where an address was redirected to last, and the ETag given with it."""
        self._response: http.client.HTTPResponse | None = None
        self._file: RemoteFile | None = None
        self._at = self._end = 0

    def fetch(self, url: str, into: BinaryIO, limit: int, *, patient: bool = True) -> bool:
        """Write a whole small file into another; return False if there is none.

        Raises:
            FormatError: It is larger than `limit`, or cannot be had: without `patient`, at once if
                the server cannot be reached.
            MissingFileError: The server does not give it to us.
        """
        trying = Tries(url, self._timeout_s, _MOST_TRIES, patient=patient)
        while True:
            try:
                answer = self._ask(url, None)
                if answer.response.status in (404, 410):
                    self.close()
                    return False
                if answer.response.status != 200:
                    raise Broken(f"status {answer.response.status} instead of 200")
                into.seek(0)
                into.truncate()
                while piece := answer.response.read(_PIECE):
                    into.write(piece)
                    trying.had_a_byte()
                    if into.tell() > limit:
                        raise FormatError(f"{shown(url)}: has more than {limit} bytes")
                told = answer.response.getheader("Content-Length")
                if told is not None and told.isdecimal() and into.tell() < int(told):
                    raise Broken("an answer that is too short")
                return True
            except StreamsoupError:  # some are an OSError, too
                self.close()
                raise
            except (OSError, http.client.HTTPException, Broken) as error:
                self.close()
                trying.again(error)

    def open(self, url: str, nbytes: int) -> tuple[RemoteFile, bytes] | None:
        """Return a file and its first bytes, at most `nbytes`; None if there is none.

        Raises `FormatError` and `MissingFileError` as `fetch` does.
        """
        trying = Tries(url, self._timeout_s, _MOST_TRIES)
        while True:
            try:
                answer = self._ask(url, (0, nbytes))
                if answer.response.status in (404, 410):
                    self.close()
                    return None
                begin, end, size = self._range_of(answer, url)
                if begin != 0 or end != min(nbytes, size):
                    raise Broken("another range than was asked for")
                file = RemoteFile(url, size, _validator(answer))
                head = answer.response.read(end)
                if len(head) < end:
                    raise Broken("an answer that is too short")
                return file, head
            except StreamsoupError:  # some are an OSError, too
                self.close()
                raise
            except (OSError, http.client.HTTPException, Broken) as error:
                self.close()
                trying.again(error)

    def read(self, file: RemoteFile, at: int, block: Bytes, until: int) -> None:
        """Fill a block with the bytes of a file from `at` on.

        Args:
            file: As it was opened.
            at: Offset of the first byte.
            block: Memory to fill.
            until: End of the range to ask for: reads that go on from here are likely up to there.

        Raises:
            ChangedIngredientError: The file has another size or validator now.
            FormatError: There was no byte for the whole timeout, or ranges are ignored.
        """
        trying = Tries(file.url, self._timeout_s)
        while block:
            try:
                if self._response is None or (file, at) != (self._file, self._at):
                    self._begin(file, at, max(until, at + len(block)))
                assert self._response is not None
                n = self._response.readinto(block[: self._end - at])
                if n == 0:
                    raise Broken("an answer that is too short")
            except StreamsoupError:  # some are an OSError, too
                self.close()
                raise
            except (OSError, http.client.HTTPException, Broken) as error:
                self.close()
                trying.again(error, at)
                continue
            trying.had_a_byte()
            block = block[n:]
            self._at = at = at + n
            if at == self._end:
                self._finish()

    def check(self, file: RemoteFile) -> None:
        """Raise `ChangedIngredientError` if a file has another size or validator now."""
        self.read(file, 0, memoryview(bytearray(1)), 1)

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()
        self._response = self._connection = self._file = None

    def _begin(self, file: RemoteFile, at: int, end: int) -> None:
        """Ask for a range of a file, and check that the answer is that range of that file."""
        if self._response is not None:
            self.close()  # what is left of the former answer would have to be read first
        answer = self._ask(file.url, (at, end))
        if answer.response.status in (404, 410):
            raise _changed(file.url, "vanished")
        if answer.response.status == 416:
            raise _changed(file.url, "became shorter")
        begin, stop, size = self._range_of(answer, file.url)
        if size != file.size:
            raise _changed(file.url, f"changed size from {file.size} to {size} bytes")
        validator = _validator(answer)
        if validator != file.validator:
            raise _changed(file.url, "was replaced (its ETag or time is another)")
        if begin != at or stop != end:
            raise Broken("another range than was asked for")
        self._response, self._file, self._at, self._end = answer.response, file, at, end

    def _finish(self) -> None:
        """Leave the connection ready for the next request after a range was read whole."""
        assert self._response is not None
        if self._response.length not in (0, None):
            self.close()
            return
        self._response.read(1)  # the end of a chunked answer
        self._response = self._file = None

    def _range_of(self, answer: _Answer, url: str) -> tuple[int, int, int]:
        """Return begin and end of the range in an answer, and the size of the file."""
        status = answer.response.status
        if status == 200:
            self.close()
            raise FormatError(
                f"{shown(url)}: its server ignores ranges, so that no part can be read; download "
                "the file, and give its path"
            )
        found = _RANGE.fullmatch(answer.response.getheader("Content-Range") or "")
        if status != 206 or found is None:
            raise Broken(f"status {status} without a range")
        if (answer.response.getheader("Content-Encoding") or "identity") != "identity":
            raise Broken("compressed bytes")
        first, last, size = map(int, found.groups())
        return first, last + 1, size

    def _ask(self, url: str, asked: tuple[int, int] | None) -> _Answer:
        """Send a request, and follow redirects: first to where the last one led."""
        at, linked = self._targets.get(url, (url, ""))
        opened_now = self._store is not None and at == url
        if self._store is not None and opened_now:
            opened = self._store.open(url)
            check_address(opened.url)
            at = opened.url
            self._headers = {**self._headers, at: opened.headers} if opened.headers else {}
        for _ in range(6):
            response = self._send(at, asked)
            status = response.status
            if status in (301, 302, 303, 307, 308):
                linked = response.getheader("X-Linked-ETag") or linked
                target = urljoin(at, response.getheader("Location") or "")
                response.read(1 << 16)
                if not response.isclosed():
                    self.close()
                check_address(target)
                if is_here(target) and not is_here(at):
                    raise FormatError(f"{shown(url)}: redirects to this machine; refused")
                at = target
                continue
            gone = self._store is not None and status in (404, 410)
            if at != url and status in _EXPIRED and not gone:
                self._targets.pop(url, None)
                if opened_now and status in (401, 403):
                    raise MissingFileError(
                        f"{shown(url)}: may not be read by us (status {status}); check the name, "
                        "the credentials, and that the clock is right"
                    )
                raise Broken(f"status {status} from {urlsplit(at).hostname}", n_tries=4)
            if status in _AGAIN:
                told = response.getheader("Retry-After") or ""
                raise Broken(f"status {status}", float(told) if told.isdecimal() else 0.0)
            if status in (401, 403):
                raise MissingFileError(
                    f"{shown(url)}: may not be read by us (status {status}); check the name, and "
                    "for a private or gated model type `hf auth login`"
                )
            if status not in (200, 206, 404, 410, 416):
                raise FormatError(f"{shown(url)}: cannot be read: status {status}")
            if at != url:
                self._targets[url] = at, linked
            return _Answer(response, linked)
        raise FormatError(f"{shown(url)}: redirects without an end")

    def _send(self, url: str, asked: tuple[int, int] | None) -> http.client.HTTPResponse:
        """Send one request, over the connection that is open if it leads there."""
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Accept-Encoding": "identity", "User-Agent": f"streamsoup/{__version__}"}
        if asked is not None:
            headers["Range"] = f"bytes={asked[0]}-{asked[1] - 1}"
        headers |= self._headers.get(url, {})
        if (token := token_for(url)) is not None:
            headers["Authorization"] = f"Bearer {token}"
        if self._connection is None or self._origin != origin(url):
            self.close()
            scheme, host, port = self._origin = origin(url)
            stall = min(_STALL, self._timeout_s / 3)
            self._connection = (
                http.client.HTTPSConnection(
                    host, port, timeout=stall, context=ssl.create_default_context()
                )
                if scheme == "https"
                else http.client.HTTPConnection(host, port, timeout=stall)
            )
        self._connection.request("GET", target, headers=headers)
        return self._connection.getresponse()


def _validator(answer: _Answer) -> str:
    header = answer.response.getheader
    return answer.linked or header("ETag") or header("Last-Modified") or ""


def _changed(url: str, what: str) -> ChangedIngredientError:
    return ChangedIngredientError(
        f"{shown(url)}: {what} while it was being read; run again once it no longer changes"
    )
