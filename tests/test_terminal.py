"""What a person sees while streamsoup works."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from checkpoints import command as command_of
from checkpoints import save, tensor

from streamsoup.cli import terminal
from streamsoup.cli.terminal import Watcher, _bar, summary
from streamsoup.engine.stream import Progress


def drawn(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Draw a bar in the middle of a long run; give its lines."""
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = _bar()
    bar.add_task("soup", total=567_800_000_000, completed=123_400_000_000)
    lines = bar.console.render_lines(bar.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_the_bar_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width, the bar is one line, which is no longer than that."""
    for columns in range(1, 200):
        lines = drawn(columns, monkeypatch)
        assert [len(line) <= columns for line in lines] == [True], columns


def test_the_bar_leaves_out_the_least_telling_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate goes first, then the bytes, then the label, then the time left."""
    parts = ("?", "123.4/567.8 GB", "soup", "-:--:--", "━")
    for columns, n_parts in {80: 5, 40: 5, 38: 4, 30: 3, 20: 2, 12: 1}.items():
        (line,) = drawn(columns, monkeypatch)
        assert [part in line for part in parts] == [False] * (5 - n_parts) + [True] * n_parts


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox without /proc the peak is not known, and not told; all else goes on."""
    assert Watcher("soup", quiet=True).peak_nbytes > 1_000_000
    monkeypatch.setattr(terminal, "_STATM", "/nowhere/statm")
    watcher = Watcher("soup", quiet=True)
    watcher(Progress(1, 2, 3.0))
    watcher.close()
    assert watcher.peak_nbytes == 0
    assert summary("soup", 10, 0, 1.0, 0) == "soup: 10 B read in 1.00 s (10 B/s)"


KILLED = """
import os, signal, sys
from streamsoup.cli.common import supervise
from streamsoup.engine.stream import Progress

def work(options, watcher, as_json):
    watcher(Progress(1, 2, 1.0))
    os.kill(os.getpid(), signal.SIGKILL)

sys.exit(supervise(work, sys.argv[1], [], {"as_json": False, "quiet": False}))
"""


@pytest.mark.parametrize(("label", "resumes"), [("soup", True), ("geometry", False)])
def test_a_killed_bar_leaves_the_terminal_in_order(label: str, resumes: bool) -> None:
    """Whoever is killed with a bar on the terminal, the cursor comes back, and the bar goes."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, label], stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # nobody is left at the other end
        while part := os.read(ours, 1 << 16):
            said += part
    os.close(ours)
    assert process.wait() == 1
    drawn, _, error = said.partition(b"\r\x1b[2K\x1b[?25h")
    assert label.encode() in drawn
    assert b"\x1b[?25l" in drawn
    after = "; the same command goes on from there" if resumes else ""
    why = f"killed by SIGKILL; the machine may be out of memory{after}\r\n"
    assert error.decode() == f"error: the working process was {why}"


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_break_between_words(columns: int, tmp_path: Path) -> None:
    """On a terminal no word of what is said is cut in two, and a line for a shell is whole."""
    save(tmp_path / "a", {f"layer.{i}": tensor(np.ones(2)) for i in range(9)})
    save(tmp_path / "b", {"other": tensor(np.ones(2))})
    (tmp_path / "p.pt").write_bytes(b"")
    for words in (("a", "b"), ("a", "a"), ("p.pt",)):
        told = ("uniform", *words, "-o", "out")
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = [sys.executable, "-m", "streamsoup", *told]
        shown = b""
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path):
            os.close(theirs)
            with contextlib.suppress(OSError):  # EIO at its end
                while piece := os.read(ours, 1000):
                    shown += piece
        os.close(ours)
        lines = shown.decode().replace("\r", "").splitlines()
        assert len(lines) > 1
        long = [line for line in lines if len(line) > columns and " " in line]
        assert all(line.startswith("python -c ") for line in long)
        if words != ("a", "a"):  # else it is made by now, and took another time
            ran = command_of(*told, cwd=tmp_path)
            assert shown.decode().split() == ran.stderr.split()
