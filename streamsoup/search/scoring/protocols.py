"""How inference servers are told to load other weights, and which weights they say they have.

* vLLM, with ``VLLM_SERVER_DEV_MODE=1``: weight transfer by the backend ``disk``.
* SGLang: ``update_weights_from_disk``.

Written after their documentation, and tested against stubs of it; no real server was run.
"""

from __future__ import annotations

import http
import http.client
import json
import os
import socket
import time
import urllib.parse
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from streamsoup.errors import RecipeError, TaskError, check_choice, option, printable

__all__ = ["KINDS", "NoAnswerError", "Refused", "Server", "open_server"]

ANSWER_NBYTES = 1 << 20
"""Most bytes of an answer that are read."""

QUICK_S = 30.0
"""Seconds for a question that needs no work: the version, a flush."""

KEY = "STREAMSOUP_SERVER_KEY"
"""The environment variable with the servers' API key, which no message or report shows."""


class NoAnswerError(TaskError):
    """The server gave no answer: it is down, hangs, or the connection broke."""


class Refused(TaskError):
    """The server answered that it could not do it."""


class Server(Protocol):
    """One inference server."""

    url: str

    @abstractmethod
    def load(self, folder: str, version: str, timeout_s: float) -> None:
        """Load the weights in a folder, as `version`, and drop what was cached of others."""

    @abstractmethod
    def version(self) -> str | None:
        """Return the version of the weights that it has; None if it names none."""

    @abstractmethod
    def close(self) -> None:
        """End a request that is under way in another thread."""


def _connection(scheme: str) -> type[http.client.HTTPConnection]:
    """Return the class of connections of a scheme. Raises `RecipeError` without OpenSSL."""
    if scheme == "http":
        return http.client.HTTPConnection
    if not hasattr(http.client, "HTTPSConnection"):
        raise RecipeError("this Python was built without OpenSSL, so https:// cannot be used")
    return http.client.HTTPSConnection


class _Http:
    """Requests to one server, in JSON."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                f"{option('server')} {printable(url)!r} is not an address such as "
                "http://localhost:8000"
            )
        if parts.username is not None or parts.password is not None:
            raise RecipeError(
                f"{option('server')}: leave the password out of the address, which reports show; "
                f"put an API key into {KEY}"
            )
        self.url = url.rstrip("/")
        self._kind, self._place = _connection(parts.scheme), parts.netloc
        self._above = parts.path.rstrip("/")
        self._open: http.client.HTTPConnection | None = None
        self._is_closed = False

    def close(self) -> None:
        """End a request that is under way, in whichever thread; there are no more."""
        self._is_closed = True
        connection = self._open
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def post(self, path: str, content: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask the server to do something. Raises `NoAnswerError`, or `Refused`."""
        return self._ask(path, json.dumps(content).encode(), timeout_s)

    def get(self, path: str) -> dict[str, Any]:
        """Ask the server a question. Raises `NoAnswerError`, or `Refused`."""
        return self._ask(path, None, QUICK_S)

    def _ask(self, path: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        where = f"{printable(self.url)}{path}"
        late = f"{where}: did not answer within {timeout_s:.3g} s"
        deadline = time.monotonic() + timeout_s
        if self._is_closed:
            raise NoAnswerError(f"{where}: the search is over")
        connection = self._open = self._kind(self._place, timeout=timeout_s)
        try:
            connection.request("GET" if body is None else "POST", self._above + path, body, headers)
            with connection.getresponse() as answer:
                status, text = answer.status, _read(answer, deadline)
        except TimeoutError:
            raise NoAnswerError(late) from None
        except (OSError, http.client.HTTPException) as error:
            why = printable(getattr(error, "strerror", None) or error, 200)
            raise NoAnswerError(f"{where}: gave no answer: {why}") from None
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            said = printable(text[:2000].decode("utf-8", "replace"), 300)
            raise Refused(f"{where}: answered {status}: {said}")
        try:
            found = json.loads(text or b"{}")
        except (ValueError, RecursionError):
            raise Refused(
                f"{where}: answered no JSON: {printable(text[:200].decode('utf-8', 'replace'))}"
            ) from None
        return found if isinstance(found, dict) else {"answer": found}


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read an answer; one that is too long, or that trickles in for too long, is an error."""
    text = b""
    while part := answer.read1(1 << 16):
        text += part
        if len(text) > ANSWER_NBYTES:
            raise OSError(f"its answer is longer than {ANSWER_NBYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return text


class Sglang(_Http, Server):
    """SGLang's HTTP interface."""

    def load(self, folder: str, version: str, timeout_s: float) -> None:
        """Load from disk; the cache of prefixes is flushed with it."""
        wanted = {"model_path": folder, "flush_cache": True, "weight_version": version}
        answer = self.post("/update_weights_from_disk", wanted, timeout_s)
        if answer.get("success") is not True:
            said = printable(str(answer.get("message", answer)), 300)
            raise Refused(f"{printable(self.url)}: could not load the weights: {said}")

    def version(self) -> str | None:
        """Ask for the version, in the way of old or of new ones."""
        try:
            answer = self.get("/get_weight_version")
        except Refused:
            answer = self.get("/get_model_info")
        return _text(answer.get("weight_version"))


class Vllm(_Http, Server):
    """The HTTP interface of vLLM in its development mode."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._is_ready = False

    def load(self, folder: str, version: str, timeout_s: float) -> None:
        """Pause, load from disk as one update, flush the cache of prefixes, and go on."""
        deadline = time.monotonic() + timeout_s

        def left_s() -> float:
            return max(deadline - time.monotonic(), 0.1)

        if not self._is_ready:
            self.post("/init_weight_transfer_engine", {"backend": "disk"}, left_s())
            self._is_ready = True
        try:
            self.post("/pause", {}, left_s())
            try:
                self.post("/start_weight_update", {}, left_s())
                self.post("/update_weights", {"path": folder}, left_s())
                self.post("/finish_weight_update", {"weight_version": version}, left_s())
                self.post("/reset_prefix_cache", {}, left_s())
            finally:
                self.post("/resume", {}, QUICK_S)
        except TaskError:
            self._is_ready = False  # it may be another process by then
            raise

    def version(self) -> str | None:
        """Ask for the version."""
        return _text(self.get("/weight_info").get("weight_version"))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


KINDS: Mapping[str, type[Sglang] | type[Vllm]] = {"sglang": Sglang, "vllm": Vllm}


def open_server(url: str, kind: str) -> Server:
    """Return a server by its kind; it is not asked anything yet. Raises `RecipeError`."""
    check_choice("server_kind", kind, tuple(KINDS))
    return KINDS[kind](url)
