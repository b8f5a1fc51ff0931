"""Stubs of inference servers that speak the protocols as documented, and misbehave on demand."""

from __future__ import annotations

import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def marks_in(folder: str) -> list[float]:
    """Read the tensor ``w`` of a checkpoint, which shows its members (`searching.marks`)."""
    with open(f"{folder}/model.safetensors", "rb") as file:
        (n,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(n))["w"]["data_offsets"]
        file.seek(8 + n + begin)
        return list(struct.unpack(f"<{(end - begin) // 4}f", file.read(end - begin)))


class Stub:
    """A server of one kind; `faults` names misbehaviours, each with how often it happens."""

    def __init__(self, kind: str, **faults: int) -> None:
        self.kind, self.faults = kind, faults
        self.weights: list[float] = []
        self.version: str | None = "base"
        self.asked: list[str] = []
        self.n_loads = 0
        self.next: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the same port as before if it was started before."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                stub.answer(self, {})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                stub.answer(self, json.loads(self.rfile.read(length) or b"{}"))

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()

    def fault(self, name: str) -> bool:
        """Return True if a fault is to happen now, and count it."""
        with self.lock:
            left = self.faults.get(name, 0)
            self.faults[name] = left - 1
            return left > 0

    def answer(self, handler: BaseHTTPRequestHandler, content: dict[str, Any]) -> None:
        """Answer one request."""
        path = handler.path
        self.asked.append(path)
        loads = path in ("/update_weights_from_disk", "/finish_weight_update")
        if loads and self.fault("hangs"):
            time.sleep(3)
        if loads and self.fault("fails"):
            return self.say(handler, 500, {"error": "out of memory"})
        if loads and self.fault("dies"):
            threading.Thread(target=self.restart, daemon=True).start()
            handler.connection.close()
            return None
        if loads and self.fault("garbage"):
            return self.say(handler, 200, "<html>")
        if loads and self.fault("endless"):
            return self.say(handler, 200, "x" * 3_000_000)
        if path == "/update_weights_from_disk":
            return self.say(
                handler, 200, self.load(content["model_path"], content["weight_version"])
            )
        if path == "/update_weights":
            self.next = content
        if path == "/finish_weight_update":
            return self.say(handler, 200, self.load(self.next["path"], content["weight_version"]))
        if path in ("/get_weight_version", "/weight_info"):
            version = "somebody's" if self.fault("says another version") else self.version
            return self.say(handler, 200, {"weight_version": version})
        if path == "/score":
            if self.fault("changes in between"):
                self.version = "somebody's"
            if self.fault("dies in a score"):
                threading.Thread(target=self.restart, daemon=True).start()
                handler.connection.close()
                return None
            members = [i for i, mark in enumerate(self.weights) if mark]
            return self.say(handler, 200, {"members": members, "weights": self.weights})
        return self.say(handler, 200, {})

    def load(self, folder: str, version: str) -> dict[str, Any]:
        """Load the weights in a folder."""
        self.n_loads += 1
        if self.fault("refuses"):
            return {"success": False, "message": "shapes do not fit"}
        if not self.fault("keeps old weights"):
            self.weights = marks_in(folder)
        self.version = version
        return {"success": True}

    def restart(self) -> None:
        """Go away for a moment, and come back with other weights."""
        self.stop()
        time.sleep(0.3)
        self.weights, self.version = [], "base"
        self.start()

    @staticmethod
    def say(handler: BaseHTTPRequestHandler, status: int, content: object) -> None:
        """Send an answer."""
        text = content if isinstance(content, str) else json.dumps(content)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())
