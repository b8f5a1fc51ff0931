"""What a person sees while streamsoup works."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import command as command_of
from checkpoints import save, tensor

from streamsoup.cli import terminal
from streamsoup.cli.terminal import Watcher, summary
from streamsoup.live.candidates import Moved
from streamsoup.options import Note, Progress, Step
from streamsoup.search.scoring.scorer import Outcome
from streamsoup.search.trials import GreedySettings, Trial, search
from streamsoup.task import Score


class Screen:
    """A terminal that knows what `terminal` says it writes, and refuses everything else."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self.row = self.column = 0
        self.most = 0
        """Most columns that were filled by anything drawn."""

    def feed(self, text: str) -> None:
        """Obey the known escapes; raise for a control character or an escape that is not known."""
        pattern = r"\x1b\[(\d*)([A-Z])|(\r)|(\n)|([^\x00-\x1f\x7f]+)"
        at = 0
        while at < len(text):
            match = re.compile(pattern).match(text, at)
            assert match is not None, repr(text[at : at + 20])
            at = match.end()
            number, escape, back, down, plain = match.groups()
            if escape == "K":
                self.rows[self.row] = self.rows[self.row][: self.column]
            elif escape == "J":
                del self.rows[self.row + 1 :]
                self.rows[self.row] = self.rows[self.row][: self.column]
            elif escape == "A":
                self.row -= int(number)
                assert self.row >= 0
            elif back:
                self.column = 0
            elif down:
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            else:
                assert plain, f"unknown escape {escape}"
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + plain + line[self.column + len(plain) :]
                self.column += len(plain)
                self.most = max(self.most, self.column)


def test_the_screen_refuses_what_is_not_known() -> None:
    """Planted fault: a stray escape, or one that is only half there, fails the tests below."""
    for stray in ("\x1b[2m", "\x1b]0;title\x07", "\x1b[", "\x08"):
        with pytest.raises(AssertionError):
            Screen(80).feed(f"text{stray}")
    screen = Screen(80)
    screen.feed("old line\r\x1b[Knew\r\nnext")
    assert screen.rows == ["new", "next"]


def in_terminal(code: str, columns: int = 80, *, narrower: int | None = None) -> tuple[str, int]:
    """Run code whose stdout and stderr are a terminal; return all it wrote, and its status."""
    ours, theirs = os.openpty()

    def resize(to: int) -> None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, to, 0, 0))

    resize(columns)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=theirs,
        stderr=theirs,
        env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
    )
    said = b""
    if narrower is not None:
        while b"half" not in said:
            said += os.read(ours, 1 << 16)
        resize(narrower)
    os.close(theirs)
    with contextlib.suppress(OSError):  # nothing writes to the other end any more
        while part := os.read(ours, 1 << 16):
            said += part
    os.close(ours)
    return said.decode(), process.wait()


BUSY = """
import logging, os, sys, threading, time
from streamsoup.cli.common import supervise
from streamsoup.cli.results import tell
from streamsoup.options import Note, Progress, Step

def work(options, watcher, as_json):
    watcher._started -= 10
    def chat():
        for n in range(40):
            (sys.stderr if n % 2 else sys.stdout).write(f"task says {n}\\n")
            time.sleep(0.01)
    thread = threading.Thread(target=chat)
    thread.start()
    logging.getLogger("streamsoup").warning("a warning")
    watcher(Note("building"))
    for n in range(60):
        watcher(Step("measurement", n, 60, n, n * 0.5 + 0.5, True, "on \\x1b[31mred"))
        for done in range(3):
            watcher(Progress(done * 10**9, 3 * 10**9, 1.0 + done))
            time.sleep(0.005)
    thread.join()
    print("no end of line", end="")
    watcher(Step("measurement", 59, 60, 59, 30.0, True, "hidden"))
    print(" yet")
    watcher.close()
    tell(["the result"])

sys.exit(supervise(work, "compare", [], {"as_json": False, "quiet": False}))
"""


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_one_writer(columns: int) -> None:
    """Every byte on a terminal is text or a known escape, and all that others print is whole."""
    said, status = in_terminal(BUSY, columns)
    assert status == 0
    screen = Screen(columns)
    screen.feed(said.replace("\r\n", "\n").replace("\n", "\r\n"))
    lines = [f"task says {n}" for n in range(40)]
    found = [row for row in screen.rows if row]
    assert sorted(found) == sorted(
        [*lines, "warning: a warning", "no end of line yet", "the result"]
    )
    assert [row for row in found if row.startswith("task")] == lines
    assert found[-1] == "the result"
    assert " left" in said
    assert "\x1b[31m" not in said


@pytest.mark.parametrize("columns", [80, 40, 20, 8])
def test_the_line_never_wraps(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width and the event, the line is shorter than the terminal is wide."""
    monkeypatch.setattr(terminal, "_width", lambda stream: columns)
    watcher = Watcher("compare", quiet=True)
    events = [
        Note("building the model of /a/long/path/to/a/task.py:Task"),
        Progress(123_400_000_000, 567_800_000_000, 100.0),
        Step("measurement", 5, 1_000_000, 3, 7200.0, True, "measured a mixture of 72 on 模型模型"),
        Progress(1_000_000, 567_800_000_000, 3.0),
    ]
    for event in events:
        watcher(event)
        line = watcher._line(time.monotonic() + 3600)
        assert 0 < terminal._columns(line) <= columns - terminal.MARGIN, line


def test_the_line_leaves_out_the_least_telling_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes first, then the rate and the bar, the label, and the time left.

    A terminal of 40 columns has room for the total, the rate and the time left.
    """
    watcher = Watcher("greedy", quiet=True)
    watcher(Step("trial", 6, 13, 6, 12.0, False, "kept run-3"))
    for columns, shown in {
        80: "greedy | trial 7 of 13 2 s each 0:14 left kept run-3",
        60: "greedy | trial 7 of 13 2 s each 0:14 left",
        45: "greedy | trial 7 of 13 0:14 left",
        40: "greedy 7/13 2 s each 0:14 left",
        28: "greedy 7/13 0:14 left",
        20: "7/13 0:14 left",
        10: "7/13",
    }.items():
        monkeypatch.setattr(terminal, "_width", lambda stream, n=columns: n)
        line = watcher._line(time.monotonic())
        assert re.sub("[━─]{10,40}", "|", line) == shown
        assert len(line) == columns - terminal.MARGIN or "|" not in shown


def test_a_pass_has_total_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is that of the last seconds: what an earlier run had finished took no time."""
    monkeypatch.setattr(terminal, "_width", lambda stream: 80)
    watcher = Watcher("soup", quiet=True)
    for second in range(21):
        watcher(Progress(50 * 10**9 + second * 10**9, 100 * 10**9, float(second)))
    line = watcher._line(time.monotonic())
    assert line.startswith("soup ━")
    assert line.endswith(" 70/100 GB 1 GB/s 0:30 left")


def test_a_terminal_made_narrower() -> None:
    """The line that a narrower terminal has wrapped is wiped out with all its rows."""
    code = """
import time
from streamsoup.cli.terminal import Watcher
from streamsoup.options import Step
watcher = Watcher("compare", False)
watcher._started -= 10
print("before")
watcher(Step("measurement", 30, 60, 30, 30.0, False, "half"))
time.sleep(0.7)
watcher.close()
print("after")
"""
    said, status = in_terminal(code, 80, narrower=30)
    assert status == 0
    first, found, rest = said.partition("\x1b[2A\r\x1b[J")
    assert found
    assert first.endswith("half")
    screen = Screen(30)
    screen.feed(rest.replace("\r\n", "\n").replace("\n", "\r\n"))
    assert screen.rows == ["after", ""]
    assert screen.most < 30


def test_a_line_now_and_then_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log gets a plain line every half minute, also while a single step takes longer."""
    monkeypatch.setattr(terminal, "REPORT_S", 0.6)
    watcher = Watcher("greedy", quiet=False)
    watcher(Step("trial", 6, 13, 6, 12.0, False, "kept run-3"))
    assert capsys.readouterr().err == ""
    time.sleep(2.2)
    watcher.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert set(lines) == {"greedy: trial 7 of 13, 2 s each, 0:14 left, kept run-3"}
    quiet = Watcher("greedy", quiet=True)
    quiet._reported -= 100
    quiet(Step("trial", 6, 13, 6, 12.0))
    quiet.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "n_steps"),
    [
        (GreedySettings(), 7),
        (GreedySettings(order="given"), 4),
        (GreedySettings(order="random", n_orders=3), 12),
        (GreedySettings(direction="backward"), 9),
        (GreedySettings(passes=2), None),
    ],
)
def test_a_search_says_how_many_trials_there_are(
    options: GreedySettings, n_steps: int | None
) -> None:
    """The first event holds the total; each trial counts once; the last says that all are done."""
    events: list[object] = []
    scores = [0.1, 0.4, 0.2, 0.3]
    asked = 0

    def ask(wanted: object, to_beat: float | None) -> tuple[Outcome, bool]:
        nonlocal asked
        asked += 1
        return Outcome(Score(scores[asked % 4]), None, Moved(0, 0, 0.0), 0.1), False

    search(["a", "b", "c", "d"], ask, options, events.append)  # type: ignore[arg-type]
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[0].n_done == 0
    assert steps[-1].n_done == steps[-1].n
    assert len([event for event in events if isinstance(event, Trial)]) == asked
    assert all(0 <= b.n_done - a.n_done <= 1 for a, b in pairwise(steps))
    if n_steps is not None:
        assert steps[0].n == n_steps
        assert steps[-1].n_done <= n_steps
    assert steps[0].n >= steps[-1].n


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox without /proc the peak is not known, and not told; all else goes on."""
    assert Watcher("soup", quiet=True).peak_nbytes > 1_000_000
    monkeypatch.setattr(terminal, "_STATM", "/nowhere/statm")
    watcher = Watcher("soup", quiet=True)
    watcher(Progress(1, 2, 3.0))
    watcher.close()
    assert watcher.peak_nbytes == 0
    assert summary("soup", 10, 0, 1.0, 0) == "soup: 10 B read in 1.00 s (10 B/s)"
    assert summary("soup", 20, 0, 1.0, 0, 2) == "soup: 20 B read in 2 passes, 1.00 s (20 B/s)"


KILLED = """
import os, signal, sys
from streamsoup.cli.common import supervise
from streamsoup.options import Progress

def work(options, watcher, as_json):
    watcher._started -= 10
    watcher(Progress(1, 2, 1.0))
    os.kill(os.getpid(), signal.{signal})
    __import__("time").sleep(5)

sys.exit(supervise(work, "{label}", [], {{"as_json": False, "quiet": False}}))
"""


@pytest.mark.parametrize(("label", "resumes"), [("soup", True), ("geometry", False)])
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_a_stopped_command_leaves_the_terminal_in_order(
    label: str, resumes: bool, signal: str
) -> None:
    """The line is wiped out when the process that drew it is killed, or stopped by Ctrl-C."""
    said, status = in_terminal(KILLED.format(signal=signal, label=label))
    assert status == (1 if signal == "SIGKILL" else 130)
    assert label in said.partition("\x1b[K")[2]
    screen = Screen(80)
    screen.feed(said.replace("\r\n", "\n").replace("\n", "\r\n"))
    after = "; the same command goes on from there" if resumes else ""
    why = "error: the working process was killed by SIGKILL; the machine may be out of memory"
    if signal == "SIGINT":
        why = "interrupted by SIGINT"
    assert screen.rows == [f"{why}{after}", ""]


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
        # A busy machine gets as far as a progress line, which is erased.
        shown = re.sub(rb"[^\r\n]*\r\x1b\[(K|J)", b"", shown.replace(b"\r\n", b"\n"))
        lines = shown.decode().splitlines()
        assert len(lines) > 1
        long = [line for line in lines if len(line) > columns and " " in line]
        assert all(line.startswith("python -c ") for line in long)
        if words != ("a", "a"):  # else it is made by now, and took another time
            ran = command_of(*told, cwd=tmp_path)
            assert shown.decode().split() == ran.stderr.split()
