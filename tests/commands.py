"""Commands as a terminal starts them, and checkpoints small or large for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from checkpoints import save, tensor, unexpected

COMMAND = [sys.executable, "-m", "streamsoup"]
IS_ROOT = os.geteuid() == 0
MANY = 32
"""Ingredients of 2 GB that keep two threads busy for many seconds: a run that is to be caught at
work is caught, though it notes nothing in its first half second."""

started: list[subprocess.Popen[str]] = []


def small(folder: Path, seed: int = 0) -> Path:
    """Make a checkpoint of a few kB, with a side file."""
    rng = np.random.default_rng(seed)
    save(folder, {"weight": tensor(rng.standard_normal((30, 30)).astype("f4"))})
    (folder / "config.json").write_text("{}")
    return folder


def large(folder: Path, gigabytes: float = 2) -> Path:
    """Make a checkpoint of many zeros, which take no room on the disk."""
    folder.mkdir()
    path = folder / "model.safetensors"
    n = int(gigabytes * 2**30) // 4
    entry = {"weight": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}
    text = json.dumps(entry).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 4 * n)
    return folder


def start(
    *argv: str | Path, ignored: Sequence[signal.Signals] = (), **options: object
) -> subprocess.Popen[str]:
    """Start a command in a group of its own, as a terminal does, which ignores no other signals.

    The tests may be run by nohup, or in the background.
    """

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [*COMMAND, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
        **options,  # type: ignore[call-overload]
    )
    started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command; give its status and its stderr."""
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return process.returncode, unexpected(stderr)


def run(*argv: str | Path, **options: object) -> tuple[int, str]:
    """Run a command; give its status and its stderr."""
    return finish(start(*argv, **options))


def wait_for(path: Path) -> None:
    """Wait until a file is there and not empty."""
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_work(partial: Path) -> int:
    """Wait until a run has noted something; give the process that holds the lock."""
    deadline = time.monotonic() + 20
    while True:
        try:
            if any("leaves" in journal.read_text() for journal in partial.glob("work-*/journal")):
                return int(json.loads((partial / "lock").read_text())["pid"])
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listing(folder: Path) -> dict[str, tuple[float, int, bytes]]:
    """Read all files below a folder, with time and mode."""
    return {
        str(path): (path.stat().st_mtime, path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
