"""Who scores: this process, or worker processes that a hostile task may hang, flood or kill.

A worker (see `serving`) has a process group of its own; what it prints is caught, and only the end
of it kept. When it is late, dies or is not wanted any more, it is killed with all its children.

Several workers score the next candidates at the same time. Their results are used in order, and
those that a decision made stale are not used, so that the outcome is that of one worker.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from streamsoup import errors
from streamsoup.errors import (
    RecipeError,
    StreamsoupError,
    TaskError,
    option,
    printable,
    signal_name,
    some,
)
from streamsoup.search.scoring.candidate import Outcome, Scorer
from streamsoup.search.scoring.connection import Connection
from streamsoup.search.scoring.scorebook import Members, Scorebook
from streamsoup.search.scoring.serving import Work
from streamsoup.task.command import CommandTask
from streamsoup.task.family import Family, Tail

__all__ = ["Alone", "Crew", "Scorers"]

DYING_S = 2.0
"""How long a worker may take from its last word to its end."""

_MAIN = b"\x8c\x08__main__"
"""How a pickle names what is defined in a script or notebook itself."""


class Scorers(Protocol):
    """Answers what a candidate scores, from the book or by scoring it."""

    def ask(self, wanted: Sequence[Members], to_beat: float | None, *, keep: bool) -> Outcome:
        """Give the outcome of the first of `wanted`; the others may be wanted next."""

    def close(self) -> None:
        """Give back what the scorers hold."""


class Alone:
    """One scorer in this process."""

    def __init__(self, scorer: Scorer, book: Scorebook, names: Sequence[str]) -> None:
        """Score with `scorer`, and write into `book`."""
        self._scorer, self._book, self._names = scorer, book, names

    def ask(self, wanted: Sequence[Members], to_beat: float | None, *, keep: bool) -> Outcome:
        """Give the outcome of the first of `wanted`."""
        members = wanted[0]
        known = self._book.get(members, to_beat)
        if known is not None:
            return known
        try:
            outcome = self._scorer.score(members, to_beat, keep=keep)
        except TaskError as error:
            raise TaskError(f"{error.text}{_of(members, self._names)}") from error
        self._book.put(members, outcome, to_beat)
        return outcome

    def close(self) -> None:
        """Close the scorer."""
        self._scorer.close()


class Crew:
    """Worker processes that score candidates at the same time."""

    def __init__(
        self, works: Sequence[Work], *, timeout: float | None, names: Sequence[str]
    ) -> None:
        """Start a worker for each of `works`, and wait until the first has loaded the task.

        `timeout` is in seconds, for loading the task, for building its model and for each score.
        Raises `TaskError` if the task cannot be loaded.
        """
        self._names = names
        self._timeout = timeout
        self._book: Scorebook | None = None
        self._workers: list[_Worker] = []
        self._failed: dict[Members, StreamsoupError] = {}
        """How candidates failed that may never be asked for."""
        try:
            for work in works:
                self._workers.append(_Worker(work, timeout))
            self.task = self._workers[0].loaded()
            """What the task is called, its fingerprint and its split."""
        except BaseException:
            self.close()
            raise

    def use(self, book: Scorebook) -> None:
        """Write scores into `book` from now on, and ask it first."""
        self._book = book

    def ask(self, wanted: Sequence[Members], to_beat: float | None, *, keep: bool) -> Outcome:
        """Give the outcome of the first of `wanted`; idle workers take up the others.

        One of the others that fails is told only if it comes to be the first: one worker alone
        would not have tried it before.
        """
        book = self._book
        assert book is not None
        while (outcome := book.get(wanted[0], to_beat)) is None:
            if wanted[0] in self._failed:
                raise self._failed[wanted[0]]
            done_with = {worker.members for worker in self._workers} | self._failed.keys()
            todo = [m for m in wanted if m not in done_with and book.get(m, to_beat) is None]
            for worker in self._workers:
                if worker.members is None and todo:
                    worker.begin(todo.pop(0), to_beat, keep)
            for worker in _ready(self._workers):
                members = worker.members
                try:
                    done = worker.receive(self._names)
                except StreamsoupError as error:
                    if members in (None, wanted[0]):
                        raise
                    self._failed[members] = error
                    self._replace(worker)
                    continue
                if worker.task not in (None, self.task):
                    raise TaskError("the code of the task changed as it was used; run it again")
                if done is not None:
                    book.put(*done)
        return outcome

    def _replace(self, worker: _Worker) -> None:
        """Put a new worker in the place of one that failed."""
        self._workers.remove(worker)
        worker.close()
        self._workers.append(_Worker(worker.work, self._timeout))

    def close(self) -> None:
        """Kill all workers, with their children."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One worker process, seen from here."""

    def __init__(self, work: Work, timeout: float | None) -> None:
        self.work = work
        self.members: Members | None = None
        """What it works on."""
        self.task: dict[str, Any] | None = None
        """What it says of its task, once that is loaded."""
        self._to_beat: float | None = None
        self._timeout = timeout
        self._deadline: float | None = None
        self._doing = "starting"
        self._tail = Tail()
        try:
            pickled = pickle.dumps(replace(work, options=replace(work.options, on_event=None)))
            if _MAIN in pickled:
                raise ValueError("what a script or notebook defines is known to it alone")
        except Exception as error:
            raise RecipeError(
                f"the task or an ingredient cannot be sent to another process ({error}); give a "
                "task file and checkpoints on disk, or leave out jobs, timeout and isolate"
            ) from None
        ours, theirs = socket.socketpair()
        self._is_live = not isinstance(work.task, CommandTask)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from streamsoup.search.scoring.serving import serve; "
            f"serve({theirs.fileno()}, {os.getpid()}, {self._is_live})"
        )
        self._family = Family(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        self._process = self._family.leader
        theirs.close()
        self.connection = Connection(ours)
        self.died = os.pidfd_open(self._process.pid)
        self._listener = threading.Thread(
            target=self._listen, name="streamsoup-listen", daemon=True
        )
        self._listener.start()
        self._send(pickled)

    def loaded(self) -> dict[str, Any]:
        """Wait until it has loaded the task; give what it says of it."""
        while True:
            for worker in _ready([self]):
                worker._note(worker.message(()))
            if self.task is not None:
                return self.task

    def begin(self, members: Members, to_beat: float | None, keep: bool) -> None:
        """Give it a candidate to score."""
        self.members, self._to_beat = members, to_beat
        self._send(pickle.dumps((members, to_beat, keep)))

    def receive(self, names: Sequence[str]) -> tuple[Members, Outcome, float | None] | None:
        """Take its next message; give the outcome if it is one. Raises what the worker raised."""
        message = self.message(names)
        if message is None or message[0] != "done":
            self._note(message)
            return None
        members, self.members, self._deadline = self.members, None, None
        assert members is not None
        return members, message[1], self._to_beat

    def _note(self, message: tuple[str, Any] | None) -> None:
        """Start the clock for the user's code, and stop it for ours."""
        if message is not None:
            kind, content = message
            self._deadline = None
            if kind == "doing":
                self._doing = content
                self._start_clock()
            elif kind == "loaded":
                self.task = content

    def message(self, names: Sequence[str]) -> tuple[str, Any] | None:
        """Take a message, or find out why there is none. Raises `TaskError` for a dead worker."""
        try:
            pickled = self.connection.take(wait=False)
        except TaskError as error:
            self._fail("TaskError", f"{self._doing}: {error.text}", names)
        except EOFError:
            self._await_end(names)
        else:
            if pickled is not None:
                kind, content = pickle.loads(pickled)
                if kind == "error":
                    self._fail(content[0], content[1], names)
                return kind, content
        if self._process.poll() is not None or self._is_over():
            self._fail("TaskError", f"{self._doing}: {self._end()}", names)
        return None

    def close(self) -> None:
        """Kill it, with its children."""
        self._family.kill()
        self._listener.join(1.0)
        if self._process.stdout is not None and not self._listener.is_alive():
            self._process.stdout.close()
        self.connection.close()
        os.close(self.died)

    def wait_s(self) -> float:
        """Give the seconds until it is late."""
        return 1.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _start_clock(self) -> None:
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def _send(self, content: bytes) -> None:
        try:
            self.connection.send(content)
        except OSError:
            pass  # it died; the next look at it says how

    def _await_end(self, names: Sequence[str]) -> None:
        """Wait for a worker to end that has nothing more to say."""
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            closed = "closed a file descriptor that is not its own, the worker's connection"
            self._fail("TaskError", f"{self._doing}: {closed} to streamsoup", names)

    def _end(self) -> str:
        """Say how it ended, or that it did not."""
        status = self._process.poll()
        if status is None:
            return f"took longer than {self._timeout:g} s ({option('timeout')})"
        if status < 0:
            why = "; out of memory?" if -status == signal.SIGKILL else ""
            return f"the process was killed by {signal_name(-status)}{why}"
        return f"the process ended itself with status {status}"

    def _fail(self, kind: str, text: str, names: Sequence[str]) -> None:
        time.sleep(0.05)  # for the listener to catch up
        error = getattr(errors, kind, TaskError)
        # What a command printed is in its error.
        own = error is TaskError and self._is_live and self._tail.content()
        tail = self._tail.text() if own else ""
        raise error(f"{text}{_of(self.members, names)}{tail}")

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while part := os.read(stream.fileno(), 1 << 16):
            self._tail.add(part)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait until a worker has something to say, has died, or is late."""
    by_descriptor = {w.connection.fileno(): w for w in workers} | {w.died: w for w in workers}
    wait_s = min(worker.wait_s() for worker in workers)
    poll = select.poll()  # not `select`, which cannot have descriptors above 1023
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    found = poll.poll(math.ceil(1000 * min(wait_s, 3600.0)))
    ready = {id(by_descriptor[descriptor]) for descriptor, _ in found}
    return [w for w in workers if id(w) in ready or w.wait_s() == 0.0]


def _of(members: Members | None, names: Sequence[str]) -> str:
    """Say which candidate an error is about."""
    if not members or not names:
        return ""
    chosen = [names[i] for i in members]
    if len(chosen) == 1:
        return f"; the candidate is {printable(chosen[0])} alone"
    return f"; the candidate is the mean of {some(chosen, 8)}"
