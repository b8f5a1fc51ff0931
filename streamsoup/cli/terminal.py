"""What a person sees while streamsoup works, and when it is done."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
from contextlib import suppress
from mmap import PAGESIZE
from typing import TYPE_CHECKING, TextIO

from streamsoup.sizes import nbytes_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from streamsoup.engine.stream import Progress

__all__ = ["Watcher", "clear_bar", "fitted", "show_warnings", "summary"]

PATIENCE_S = 0.4
"""A bar that comes and goes sooner than this only flickers."""

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
    """Prints warnings, a line each."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, fitted to a terminal."""
        return fitted(f"warning: {record.getMessage()}", self.stream)


def show_warnings(quiet: bool) -> None:
    """Print the library's warnings on stderr, a line each, or none if `quiet`."""
    log = logging.getLogger("streamsoup")
    log.handlers[:] = [logging.NullHandler() if quiet else _Lines(sys.stderr)]
    log.propagate = False


class Watcher:
    """Follows a run: draws a bar on a terminal, and remembers the peak memory."""

    def __init__(self, label: str, quiet: bool) -> None:
        """Draw nothing unless stderr is a terminal."""
        self._label = label
        self._draws = not quiet and sys.stderr.isatty()
        self._bar: Bar | None = None
        self.peak_nbytes = anonymous_nbytes()
        """Most anonymous memory seen so far; looked at twenty times a second."""

    def __call__(self, progress: Progress) -> None:
        """Take note of how far the run has come."""
        self.peak_nbytes = max(self.peak_nbytes, anonymous_nbytes())
        if not self._draws or (self._bar is None and progress.elapsed_s < PATIENCE_S):
            return
        try:
            if self._bar is None:
                self._bar = _bar()
                self._bar.add_task(self._label, total=progress.nbytes)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=progress.nbytes_done)
        except OSError:
            self._draws = False  # the terminal is gone; the work is not

    def close(self) -> None:
        """Take the bar away."""
        self.peak_nbytes = max(self.peak_nbytes, anonymous_nbytes())
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


def _bar() -> Bar:
    from collections.abc import Iterable

    from rich import progress
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Column, Table

    class Fitting(progress.Progress):
        """Leaves out what a narrow terminal has no room for, so that its line never wraps."""

        def make_tasks_table(self, tasks: Iterable[progress.Task]) -> Table:
            tasks = list(tasks)
            roomy = console.options.update(max_width=1000)
            for lacking in ((), (speed,), (speed, done), (speed, done, label), others):
                self.columns = tuple(each for each in columns if each not in lacking)
                table = super().make_tasks_table(tasks)
                if Measurement.get(console, roomy, table).maximum - spare <= console.width:
                    break
            return table

    console = Console(stderr=True)
    longest, shortest = 40, 10
    spare = longest - shortest
    whole = Column(no_wrap=True)
    label = progress.TextColumn("{task.description}", table_column=whole)
    bar = progress.BarColumn(None, table_column=Column(min_width=shortest, max_width=longest))
    done = progress.DownloadColumn(table_column=whole)
    speed = progress.TransferSpeedColumn(table_column=whole)
    left = progress.TimeRemainingColumn(table_column=whole)
    columns = (label, bar, done, speed, left)
    others = (label, done, speed, left)
    return Fitting(console=console, transient=True)


def clear_bar() -> None:
    """Wipe out the bar of a process that was killed, and show the cursor that it hid."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.control import Control
    from rich.segment import ControlType

    wipe = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
    with suppress(OSError):
        Console(stderr=True).control(wipe, Control.show_cursor(True))


def anonymous_nbytes() -> int:
    """Bytes this process holds that are no copy of a file; 0 where the system does not tell."""
    try:
        with open(_STATM, "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:  # a sandbox without /proc
        return 0
    return (resident - shared) * PAGESIZE


def summary(
    what: str, nbytes_read: int, nbytes_written: int, elapsed_s: float, peak_nbytes: int
) -> str:
    """Say in one line what was made, what was read, how fast, and with how much memory."""
    rate = nbytes_text(nbytes_read / max(elapsed_s, 1e-9))
    peak = f", peak memory {nbytes_text(peak_nbytes)}" if peak_nbytes else ""
    written = f", {nbytes_text(nbytes_written)} written" if nbytes_written else ""
    return f"{what}: {nbytes_text(nbytes_read)} read in {elapsed_s:.2f} s ({rate}/s){written}{peak}"
