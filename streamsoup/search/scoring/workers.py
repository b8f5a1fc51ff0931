"""Scoring in worker processes, which a hostile task may hang, flood or kill.

What a worker (see `serving`) prints is caught, and only the end of it kept. When it is late,
dies or is not wanted any more, it is killed with all its children.
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
from typing import Any, NoReturn

from msgspec.structs import replace

from streamsoup import errors
from streamsoup.errors import RecipeError, TaskError, option, signal_name
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.connection import Connection
from streamsoup.search.scoring.scorer import Candidate, Outcome, which
from streamsoup.search.scoring.work import Work
from streamsoup.system.pickles import for_another_process
from streamsoup.task.command import CommandTask
from streamsoup.task.processes import ProcessTree, Tail

__all__ = ["WorkerScorer"]

DYING_S = 2.0
"""How long a worker may take from its last word to its end."""


class WorkerScorer:
    """Worker processes, each of which scores one candidate at a time."""

    def __init__(self, works: Sequence[Work], *, timeout: float | None) -> None:
        """Start a worker for each of `works`, and wait until the first has loaded the task.

        `timeout` is in seconds, for loading the task, for building its model and for each score.
        Raises `TaskError` if the task cannot be loaded.
        """
        self.n_at_once = len(works)
        self._timeout = timeout
        self._lock = threading.Lock()
        """Guards what follows, which the threads that call `score` share."""
        self._is_closed = False
        self._workers: list[_Worker] = []
        self._idle: list[_Worker | Work] = []
        """Workers without a candidate; in the place of one that failed, what it was to do."""
        try:
            for work in works:
                self._workers.append(_Worker(work, timeout))
            self._idle = list(reversed(self._workers))
            self._loaded = self._workers[0].loaded()
        except BaseException:
            self.close()
            raise
        self.name: str = self._loaded["task"]
        self.fingerprint: str = self._loaded["code"]
        self.split: str = self._loaded["split"]

    def prepare(self, recipe: Recipe) -> None:
        """Do nothing: each worker builds its model when it is sent its first candidate."""

    def score(self, candidate: Candidate) -> Outcome:
        """Score a candidate in a worker that is idle; one that failed is started anew."""
        with self._lock:
            worker = self._idle.pop()
            if isinstance(worker, Work):
                if self._is_closed:
                    raise TaskError("the search is over")
                worker = _Worker(worker, self._timeout)
                self._workers.append(worker)
        idle: _Worker | Work = worker.work
        try:
            outcome = worker.score(candidate)
            if worker.task != self._loaded:
                raise TaskError("the code of the task changed as it was used; run it again")
            idle = worker
        finally:
            with self._lock:
                self._idle.append(idle)
                is_failed = idle is not worker and worker in self._workers
                if is_failed:
                    self._workers.remove(worker)
            if is_failed:
                worker.kill()
                worker.close()
        return outcome

    def close(self) -> None:
        """Kill all workers, with their children; a second time does nothing."""
        with self._lock:
            self._is_closed = True
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.close()


class _RemoteError(Exception):
    """The cause of an error in a worker process: its traceback there."""

    def __str__(self) -> str:
        return f"in a worker process\n{self.args[0]}"


class _Worker:
    """One worker process, as this process has it."""

    def __init__(self, work: Work, timeout: float | None) -> None:
        self.work = work
        self.task: dict[str, Any] | None = None
        """What it says of its task, once that is loaded."""
        self._candidate: Candidate | None = None
        """What it works on."""
        self._busy = threading.Lock()
        self._timeout = timeout
        self._deadline: float | None = None
        self._doing = "starting"
        self._tail = Tail()
        try:
            pickled = for_another_process(
                replace(work, options=replace(work.options, on_event=None))
            )
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
            f"serve({theirs.fileno()}, {self._is_live})"
        )
        self._tree = ProcessTree(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        self._process = self._tree.process
        theirs.close()
        self._connection = Connection(ours)
        # Without it, the end of the connection tells.
        self._died = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else None
        self._listener = threading.Thread(
            target=self._listen, name="streamsoup-listen", daemon=True
        )
        self._listener.start()
        self._send(pickled)

    def loaded(self) -> dict[str, Any]:
        """Wait until it has loaded the task; return what it says of it."""
        while self.task is None:
            self._note(self._message())
        return self.task

    def score(self, candidate: Candidate) -> Outcome:
        """Send it a candidate, and wait for the outcome. Raises what the worker raised."""
        with self._busy:
            self._candidate = candidate
            self._send(pickle.dumps(candidate))
            while True:
                message = self._message()
                if message is not None and message[0] == "done":
                    self._candidate, self._deadline = None, None
                    outcome: Outcome = message[1]
                    return outcome
                self._note(message)

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

    def _message(self) -> tuple[str, Any] | None:
        """Wait for a message; None if it has not all come yet. Raises for a dead or late worker."""
        self._wait()
        try:
            pickled = self._connection.take(wait=False)
        except TaskError as error:
            self._fail("TaskError", f"{self._doing}: {error.text}")
        except EOFError:
            self._await_end()
        else:
            if pickled is not None:
                kind, content = pickle.loads(pickled)
                if kind == "error":
                    self._fail(*content, is_its_own=True)
                return kind, content
        if self._process.poll() is not None or self._is_over():
            self._fail("TaskError", f"{self._doing}: {self._end()}")
        return None

    def _wait(self) -> None:
        """Wait until it has something to say, has died, or is late."""
        poll = select.poll()  # not `select`, which cannot have descriptors above 1023
        poll.register(self._connection.fileno(), select.POLLIN)
        if self._died is not None:
            poll.register(self._died, select.POLLIN)
        wait_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        poll.poll(None if wait_s is None else math.ceil(1000 * min(wait_s, 3600.0)))

    def kill(self) -> None:
        """Kill it, with its children: a call of `score` that is under way fails."""
        self._tree.kill()

    def close(self) -> None:
        """Release what is held for it, once it is killed and no call of `score` is under way."""
        with self._busy:
            self._listener.join(1.0)
            if self._process.stdout is not None and not self._listener.is_alive():
                self._process.stdout.close()
            self._connection.close()
            if self._died is not None:
                os.close(self._died)

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _start_clock(self) -> None:
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def _send(self, content: bytes) -> None:
        try:
            self._connection.send(content)
        except OSError:
            pass  # it died; waiting for its message finds how

    def _await_end(self) -> None:
        """Wait for a worker to end that has nothing more to say."""
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            closed = "closed a file descriptor that is not its own, the worker's connection"
            self._fail("TaskError", f"{self._doing}: {closed} to streamsoup")

    def _end(self) -> str:
        """Describe how it ended, or that it did not."""
        status = self._process.poll()
        if status is None:
            return f"took longer than {self._timeout:g} s ({option('timeout')})"
        if status < 0:
            why = "; out of memory?" if -status == signal.SIGKILL else ""
            return f"the process was killed by {signal_name(-status)}{why}"
        return f"the process ended itself with status {status}"

    def _fail(self, kind: str, text: str, trace: str = "", *, is_its_own: bool = False) -> NoReturn:
        """Raise an error, with the end of what was printed; `is_its_own` is one that it sent."""
        time.sleep(0.05)  # for the listener to catch up
        error = getattr(errors, kind, TaskError)
        # What a command printed is in its error.
        shows = error is TaskError and self._is_live and self._tail.content()
        about = "" if is_its_own else which(self._candidate)
        message = f"{text}{about}{self._tail.text() if shows else ''}"
        raise error(message) from (_RemoteError(trace) if trace else None)

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while part := os.read(stream.fileno(), 1 << 16):
            self._tail.add(part)
