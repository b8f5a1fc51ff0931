"""A headless Chromium, driven over a pipe: what a page does, says and looks like in it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)


class Browser:
    """One page in a browser of its own, which is closed at the end of the block."""

    def __init__(self, folder: Path) -> None:
        """Start it; its profile lies in `folder`."""
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads from descriptor 3 and writes to descriptor 4.
        start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._session, self._rest = 0, "", b""
        self.said: list[str] = []
        """Errors and whatever else reached the console."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for room in ("Runtime", "Page", "Log"):
            self._ask(f"{room}.enable")

    def __enter__(self) -> Browser:
        """Return the browser."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(30)

    def open(self, path: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Show a file in a window of a size, light or dark."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", features=features)
        self._ask("Page.navigate", url=path.as_uri())
        while (
            self.run("document.readyState") != "complete"
            or self.run("location.href") == "about:blank"
        ):
            pass

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str, number: int = 0) -> None:
        """Click in the middle of an element, with the mouse."""
        x, y = self.move(selector, number)
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, selector: str, number: int = 0) -> tuple[float, float]:
        """Rest the mouse on the middle of an element; return where."""
        of = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.run(f"{of}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        box = self.run(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])({of}.getBoundingClientRect())"
        )
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        return box[0], box[1]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write what is shown as a PNG."""
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page."""
        found = self._ask("Page.printToPDF", printBackground=False)
        path.write_bytes(base64.b64decode(found["data"]))

    def _ask(self, method: str, **told: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": told}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(told["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.said.append(json.dumps(told["args"]))
        elif event.get("method") == "Log.entryAdded":
            self.said.append(told["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(first))
