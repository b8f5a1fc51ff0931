"""A server on this machine that imitates the Hub and plain hosts, with faults where asked.

``/api/models/ORG/NAME/revision/REV`` lists a model; ``/ORG/NAME/resolve/COMMIT/FILE`` redirects to
``/cdn/...?Signature=...``, which expires after `signed_for` requests; ``/plain/FILE`` needs none.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class Hub:
    """What the server serves, how it misbehaves, and what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """Holds ``ORG/NAME/FILE``."""
        self.token = ""
        """Needed for all but ``/cdn`` and ``/plain``, if set."""
        self.faults: list[str] = []
        """Of the next ranges that are asked for, first to last: ``500``, ``429``, ``short``,
        ``hang``, ``wrong-range``, ``cut``, or nothing."""
        self.retry_after = "0"
        self.always = ""
        """Of all ranges."""
        self.signed_for = 1_000_000
        self.etag = "one"
        self.moved = False
        """``/token`` redirects to ``/plain``."""
        self.signatures: Counter[str] = Counter()
        self.nbytes = 0
        """Bytes of bodies that were sent."""
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.url = ""


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve a folder of models until the block ends."""
    hub = Hub(root)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append((self.path, dict(self.headers)))
        path, _, query = self.path.partition("?")
        open_to_all = path.startswith(("/cdn/", "/plain/"))
        if hub.token and not open_to_all and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(401)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(revision|tree)/([^/]+))?", path):
            folder = hub.root / found[1]
            if not folder.is_dir():
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            names = sorted(file.name for file in folder.iterdir())
            if found[3] == "tree":
                files = [(name, (folder / name).stat().st_size) for name in names]
                tree = [{"type": "file", "oid": n, "size": size, "path": n} for n, size in files]
                return self.answer(200, json.dumps(tree).encode())
            told = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            file = hub.root / found[1] / found[3]
            if not file.is_file():
                return self.answer(404)
            if file.suffix != ".safetensors":  # small files come from the Hub itself
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}
                return self.answer(200, file.read_bytes(), headers)
            signature = f"secret{len(hub.signatures)}"
            hub.signatures[signature] = hub.signed_for
            cdn = hub.url.replace("127.0.0.1", "localhost")  # another host, as a client sees it
            headers = {"Location": f"{cdn}/cdn/{found[1]}/{found[3]}?Signature={signature}"}
            headers |= {"X-Repo-Commit": COMMIT, "ETag": '"r"'}
            headers["X-Linked-Etag"] = f'"{hub.etag}-{file.name}"'
            headers["X-Linked-Size"] = str(file.stat().st_size)
            return self.answer(302, b"Found", headers)
        if path.startswith("/cdn/"):
            signature = query.removeprefix("Signature=")
            if hub.signatures[signature] <= 0:
                return self.answer(403, b"expired")
            hub.signatures[signature] -= 1
            return self.file(hub.root / path.removeprefix("/cdn/"))
        if path.startswith("/token/"):  # an object of a store that is opened by a token
            if not self.headers["Authorization"]:
                return self.answer(401)
            if hub.moved:
                return self.answer(302, headers={"Location": path.replace("/token/", "/plain/")})
            return self.file(hub.root / path.removeprefix("/token/"))
        if path.startswith("/plain/"):
            return self.file(hub.root / path.removeprefix("/plain/"))
        return self.answer(404)

    def file(self, file: Path) -> None:
        hub = self.hub
        if not file.is_file():
            return self.answer(404)
        size = file.stat().st_size
        headers = {"ETag": f'"{hub.etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if asked is None:
            return self.answer(200, file.read_bytes(), headers)
        fault = hub.always or (hub.faults.pop(0) if hub.faults else "")
        if fault in ("500", "429"):
            return self.answer(int(fault), b"no", {"Retry-After": hub.retry_after})
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
            return None
        if fault == "ignored":
            return self.answer(200, file.read_bytes(), headers)
        first, last = int(asked[1]), min(int(asked[2]), size - 1)
        if first >= size:
            return self.answer(416)
        if fault == "wrong-range":
            first += 1
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with file.open("rb") as opened:
            opened.seek(first)
            body = opened.read(last + 1 - first)
        if fault in ("short", "cut"):
            # A body that ends before its length says, or one that says less than was asked for.
            kept = body[: len(body) // 2]
            return self.answer(206, kept, headers, len(body) if fault == "short" else len(kept))
        return self.answer(206, body, headers)

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.nbytes += len(body)
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True
        if length is not None and length != len(body):
            self.close_connection = True
