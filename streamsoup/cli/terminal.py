"""What a person sees while streamsoup works, and when it is done.

`Watcher` is the only writer to a terminal while work goes on: it draws one line of progress, and
what anything else prints passes through it, so that the line is wiped out before and drawn again
after. It uses three escape sequences: carriage return, erase to the end of the line or of the
screen, and cursor up (after the terminal was made narrower). Without a terminal, it prints
a plain line every half minute instead.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from mmap import PAGESIZE
from typing import Any, TextIO

from streamsoup.errors import Message, in_options, printable
from streamsoup.options import Note, Progress, Step
from streamsoup.sizes import nbytes_text

__all__ = ["Watcher", "clear_line", "fitted", "show_warnings", "summary"]

PATIENCE_S = 0.4
"""A line that comes and goes sooner than this only flickers."""

DRAW_S = 0.1
"""Time between two drawings of the line: more often cannot be read."""

REPORT_S = 30.0
"""Time between two lines where stderr is not a terminal."""

NODE_COLUMNS = 12
"""Of the name of a node: enough to find it in what ``ray status`` prints."""

WINDOW_S = 10.0
"""Time over which the rate of reading is measured: leaves that were finished before take none."""

MARGIN = 3
"""Columns left free: after Ctrl-C a terminal writes ^C there, and the line must not wrap."""

SHORTEST, LONGEST = 10, 40
"""Columns of the bar."""

_STATM = "/proc/self/statm"
"""See proc_pid_statm(5)."""


_COMMAND = re.compile(r"(?<=[:y] )(python|accelerate|hf|git) \S.*$")
"""A line for a shell at the end of a message, which a line break would spoil."""


def fitted(text: str, stream: TextIO) -> str:
    """Return `text` with lines broken between words, if `stream` is a terminal that breaks within.

    Lines for a shell at its end stay whole, on a line of their own.
    """
    try:
        if not stream.isatty():
            return text
        width = os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # closed, or no terminal after all
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        command = _COMMAND.search(line)
        words = line if command is None else line[: command.start()].rstrip()
        indent = " " * (len(words) - len(words.lstrip(" ")))
        lines += textwrap.wrap(
            *(words, width),
            subsequent_indent=indent,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [] if command is None else [command[0]]
    return "\n".join(lines)


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]  # typeshed has one for the stream
    """Prints warnings, a line each, and keeps them."""

    def __init__(self, stream: TextIO, kept: list[str]) -> None:
        super().__init__(stream)
        self._kept = kept

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, fitted to a terminal, with options as the command line has them."""
        args = record.args if isinstance(record.args, tuple) else ()
        if any(isinstance(each, Message) for each in args):
            record = logging.makeLogRecord(record.__dict__)
            record.args = tuple(
                in_options(each.text) if isinstance(each, Message) else each for each in args
            )
        self._kept.append(record.getMessage())
        return fitted(f"warning: {self._kept[-1]}", self.stream)


def show_warnings(quiet: bool) -> list[str]:
    """Print the library's warnings on stderr, a line each, or none if `quiet`.

    Returns the list to which each is added, printed or not.
    """
    log = logging.getLogger("streamsoup")
    kept: list[str] = []
    log.handlers[:] = [_Lines(io.StringIO() if quiet else sys.stderr, kept)]
    log.propagate = False
    return kept


class Watcher:
    """Follows a run: shows how far it is, and remembers the peak memory.

    It is what a command gives to the library as its callback. `close` must be called before the
    result is printed.
    """

    def __init__(self, label: str, quiet: bool) -> None:
        """Show nothing before the first event, and nothing at all if `quiet`."""
        self.warnings: list[str] = []
        """The warnings so far, as the command line has them."""
        self._label = label
        self._quiet = quiet
        self._draws = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._stream: TextIO = sys.stderr
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None
        self._started = self._reported = time.monotonic()
        self._drawn = 0.0
        self._progress: Progress | None = None
        self._samples: deque[tuple[float, int]] = deque()
        self._step: Step | None = None
        self._note = ""
        self._shown = ""
        """The line that is on the terminal now."""
        self._partial = False
        """True if other output left the cursor inside a line."""
        self._streams: list[tuple[str, TextIO]] = []
        if self._draws:
            for name in ("stderr", "stdout"):
                stream = getattr(sys, name)
                if stream.isatty():
                    self._streams.append((name, stream))
                    setattr(sys, name, _Through(self, stream))
        self.peak_nbytes = anonymous_nbytes()
        """Most anonymous memory seen so far; looked at twenty times a second."""

    def __call__(self, event: object) -> None:
        """Update the progress from an event of the library."""
        self.peak_nbytes = max(self.peak_nbytes, anonymous_nbytes())
        with self._lock:
            if isinstance(event, Progress):
                self._take_progress(event)
            elif isinstance(event, Step):
                self._step, self._progress, self._note = event, None, ""
            elif isinstance(event, Note):
                self._progress, self._note = None, event.text
            if self._quiet or self._closed.is_set():
                return
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
                self._ticker.start()
            self._refresh()

    def write(self, stream: TextIO, text: str) -> int:
        """Print what something else has to say, above the line."""
        with self._lock:
            self._erase()
            written = stream.write(text)
            stream.flush()
            if text:
                self._partial = not text.endswith("\n")
            return written

    def close(self) -> None:
        """Clear the line, and restore stdout and stderr."""
        self.peak_nbytes = max(self.peak_nbytes, anonymous_nbytes())
        self._closed.set()
        with self._lock:
            with suppress(OSError):
                self._erase()
            for name, stream in self._streams:
                setattr(sys, name, stream)
            self._streams = []

    def _take_progress(self, progress: Progress) -> None:
        before = self._progress
        if before is None or progress.elapsed_s < before.elapsed_s:
            self._samples.clear()  # another pass
        self._progress = progress
        self._samples.append((progress.elapsed_s, progress.nbytes_done))
        while self._samples[0][0] < progress.elapsed_s - WINDOW_S:
            self._samples.popleft()

    def _tick(self) -> None:
        while not self._closed.wait(0.5):
            with self._lock:
                if not self._closed.is_set():
                    self._refresh()

    def _refresh(self) -> None:
        """Draw the line anew, or print one without a terminal, if it is time to."""
        now = time.monotonic()
        if not self._draws:
            if now - self._reported >= REPORT_S:
                self._reported = now
                text = ", ".join(part for part in self._parts(now) if part)
                with suppress(OSError):
                    print(f"{self._label}: {text}", file=self._stream, flush=True)
            return
        if self._partial or now - self._drawn < DRAW_S or now - self._started < PATIENCE_S:
            return
        self._drawn = now
        try:
            self._draw(self._line(now))
        except OSError:
            self._draws = False  # the terminal is gone; the work is not

    def _draw(self, line: str) -> None:
        self._stream.write(f"{self._wipe()}{line}")
        self._stream.flush()
        self._shown = line

    def _erase(self) -> None:
        if self._shown:
            self._stream.write(self._wipe())
            self._stream.flush()
            self._shown = ""

    def _wipe(self) -> str:
        """Return what removes the line; in a terminal made narrower it has become several."""
        rows = (_columns(self._shown) - 1) // _width(self._stream) if self._shown else 0
        return f"\x1b[{rows}A\r\x1b[J" if rows > 0 else "\r\x1b[K"

    def _parts(self, now: float) -> tuple[str, str, str, str]:
        """Return how much is done, the rate, the time left, and what is being done."""
        step, progress = self._current_step(), self._progress
        if step is not None:
            reading = ""
            if progress is not None and progress.nbytes_done < progress.nbytes:
                reading = _bytes_of(progress) if progress.elapsed_s >= PATIENCE_S else ""
            running = now - self._started - step.elapsed_s
            text = self._note or (f"reading {reading}" if reading else step.text)
            left = ""
            if step.n_paid:
                left = _left(step.elapsed_s / step.n_paid * (step.n - step.n_done))
            elif running >= REPORT_S:
                left = f"{_clock(running)} so far"
            return _count(step), _rate(step), left, text
        if progress is not None:
            (since, before), (until, after) = self._samples[0], self._samples[-1]
            rate = (after - before) / (until - since) if until > since else 0.0
            left = _left((progress.nbytes - progress.nbytes_done) / rate) if rate else ""
            rate_text = f"{nbytes_text(rate)}/s" if rate else ""
            return _bytes_of(progress), rate_text, left, _by_node(progress)
        return "", "", f"{_clock(now - self._started)} so far", self._note

    def _current_step(self) -> Step | None:
        """Return the last step, unless all are done and a pass over the weights came after."""
        step = self._step
        over = step is not None and step.n_done >= step.n and self._progress is not None
        return None if over else step

    def _line(self, now: float) -> str:
        """Return the line, with as much on it as the terminal has room for."""
        done, rate, left, text = self._parts(now)
        step = self._current_step()
        short = done if step is None else f"{min(step.n_done + 1, step.n)}/{step.n}"
        room = _width(self._stream) - MARGIN
        share = self._share()
        bar = SHORTEST if share is not None else 0
        free = -1
        shown: list[str] = []
        for name, n_bar, *rest in (
            (self._label, bar, done, rate, left),
            (self._label, bar, done, "", left),
            (self._label, 0, short, rate, left),
            (self._label, 0, short, "", left),
            ("", 0, short, "", left),
            ("", 0, short, "", ""),
        ):
            shown = [part for part in (name, *rest) if part]
            free = room - sum(_columns(part) + 1 for part in shown) + 1
            free -= n_bar + 1 if n_bar else 0
            if free >= 0:
                break
        if text and free > SHORTEST:
            text = _cut(text, free - 1)
            free -= _columns(text) + 1
            shown.append(text)
        if n_bar and share is not None:
            shown.insert(1, _bar(share, min(n_bar + free, LONGEST), self._stream))
        return _cut(" ".join(shown) or left or text, room)

    def _share(self) -> float | None:
        step = self._current_step()
        if step is not None:
            return step.n_done / max(step.n, 1)
        if self._progress is not None:
            return self._progress.nbytes_done / max(self._progress.nbytes, 1)
        return None


class _Through:
    """A stream of Python's that prints through the watcher, above its line."""

    def __init__(self, watcher: Watcher, stream: TextIO) -> None:
        self._watcher, self._stream = watcher, stream

    def write(self, text: str) -> int:
        return self._watcher.write(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _bytes_of(progress: Progress) -> str:
    """Write how many bytes of how many are read, the unit once where it is the same."""
    done, of = nbytes_text(progress.nbytes_done), nbytes_text(progress.nbytes)
    number, _, unit = done.partition(" ")
    return f"{number}/{of}" if of.endswith(f" {unit}") else f"{done}/{of}"


def _by_node(progress: Progress) -> str:
    """Write how much each node of a cluster has read, under the beginning of its name."""
    nodes = sorted(progress.nodes.items())
    return ", ".join(f"{name[:NODE_COLUMNS]} {nbytes_text(nbytes)}" for name, nbytes in nodes)


def _count(step: Step) -> str:
    """Write which step is being done: after the last, that all are."""
    number = min(step.n_done + 1, step.n)
    return f"{step.what} {number} of {'at most ' if step.at_most else ''}{step.n}"


def _rate(step: Step) -> str:
    if not step.n_paid or step.elapsed_s <= 0:
        return ""
    rate = step.n_paid / step.elapsed_s
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


def _left(seconds: float) -> str:
    return f"{_clock(seconds)} left"


def _clock(seconds: float) -> str:
    """Write a time as on a clock.

    >>> _clock(59.6), _clock(3723)
    ('1:00', '1:02:03')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _bar(share: float, columns: int, stream: TextIO) -> str:
    full = round(min(max(share, 0.0), 1.0) * columns)
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    done, rest = ("━", "─") if encoding == "utf8" else ("#", "-")
    return done * full + rest * (columns - full)


def _width(stream: TextIO) -> int:
    """Return the columns of the terminal, which may have changed since the last time."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max(columns or shutil.get_terminal_size().columns, MARGIN + 1)


def _columns(text: str) -> int:
    """Return how many columns a terminal needs for a text."""
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, columns: int) -> str:
    """Return as much of a text as fits, without what a terminal would obey."""
    text = printable(text, 1000)
    while _columns(text) > columns:
        text = text[:-1]
    return text


def clear_line() -> None:
    """Wipe out the line of a process that was killed."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with suppress(OSError):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def anonymous_nbytes() -> int:
    """Return the bytes of this process's anonymous memory; 0 where /proc is missing."""
    try:
        with open(_STATM, "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:  # a sandbox without /proc
        return 0
    return (resident - shared) * PAGESIZE


def summary(
    what: str,
    nbytes_read: int,
    nbytes_written: int,
    elapsed_s: float,
    peak_nbytes: int,
    n_passes: int = 1,
) -> str:
    """Return one line on what was made, what was read, how fast, and with how much memory."""
    rate = nbytes_text(nbytes_read / max(elapsed_s, 1e-9))
    peak = f", peak memory {nbytes_text(peak_nbytes)}" if peak_nbytes else ""
    written = f", {nbytes_text(nbytes_written)} written" if nbytes_written else ""
    passes = f" in {n_passes} passes," if n_passes > 1 else " in"
    read = f"{nbytes_text(nbytes_read)} read{passes} {elapsed_s:.2f} s ({rate}/s)"
    return f"{what}: {read}{written}{peak}"
