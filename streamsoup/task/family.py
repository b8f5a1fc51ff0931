"""A process with all that come of it: none of them outlives it, nor whoever started it.

The process leads a group of its own, which can be killed at once. A child may leave the group, and
a daemon has no parent any more either; but the environment of each still has the mark that the
first was born with (Linux). Beside the family a warden waits, a shell that does nothing: should the
process that started both be killed with SIGKILL, and so be unable to kill anybody, the warden does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Sequence
from typing import Any

import psutil

from streamsoup.errors import printable

__all__ = ["Family", "Tail"]

TAIL_NBYTES = 2000
"""How much of the end of the output a message shows."""

_ROUNDS = 5
"""How often to look again for processes that were born meanwhile."""

_WARDEN = """
while read -r word; do
  [ "$word" = done ] && exit
  leader=$word
done
kill -9 -- "-$leader"
for round in 1 2 3 4 5; do
  for file in $(grep -ls -e "$1" /proc/[0-9]*/environ); do
    pid=${file#/proc/}
    kill -9 "${pid%/environ}"
  done
done
"""
"""It is told the leader, and in the end that all is done. Told nothing more, it is left alone."""


class Tail:
    """The end of what a process printed."""

    def __init__(self, nbytes: int = TAIL_NBYTES) -> None:
        """Keep the last `nbytes`."""
        self._nbytes = nbytes
        # Not its parts: a process that prints byte by byte would fill the memory with them.
        self._held = bytearray()
        self.is_cut = False
        """Whether there was more than is kept."""

    def add(self, part: bytes) -> None:
        """Take what was printed next."""
        self._held += part
        excess = len(self._held) - self._nbytes
        if excess > 0:
            del self._held[:excess]
            self.is_cut = True

    def content(self) -> bytes:
        """Give what is kept."""
        return bytes(self._held)

    def text(self) -> str:
        """Give it as the end of a message: line by line, without control characters."""
        lines = self.content().decode("utf-8", "replace").strip().splitlines()[-15:]
        if not lines:
            return "; it printed nothing"
        return "; the last it printed:\n" + "\n".join(f"  | {printable(line)}" for line in lines)


class Family:
    """A process, and all that come of it."""

    def __init__(self, arguments: Sequence[str], **settings: Any) -> None:
        """Start a process, with what `subprocess.Popen` would be told."""
        self._mark = f"STREAMSOUP_{uuid.uuid4().hex}"
        # First, so that there is no moment without it; in a session that no terminal interrupts.
        self._warden = subprocess.Popen(
            ["/bin/sh", "-c", _WARDEN, "streamsoup-warden", self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.leader: subprocess.Popen[bytes] = subprocess.Popen(
                arguments, start_new_session=True, env=os.environ | {self._mark: "1"}, **settings
            )
        except BaseException:
            self._tell("done")
            raise
        self._tell(str(self.leader.pid))

    def kill(self) -> None:
        """Kill all of them. Costs a look at each process of the machine."""
        found: list[psutil.Process] = []
        try:
            found = psutil.Process(self.leader.pid).children(recursive=True)
        except psutil.Error:
            pass
        try:
            os.killpg(self.leader.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:
            self.leader.kill()
        self.leader.wait()
        for _ in range(_ROUNDS):
            for process in found:
                try:
                    process.kill()
                except psutil.Error:
                    pass
            psutil.wait_procs(found, timeout=1.0)
            found = [p for p in psutil.process_iter(["environ"]) if self._is_ours(p)]
            if not found:
                break
        self._tell("done")

    def _tell(self, word: str) -> None:
        """Tell the warden something; after ``done``, there is none any more."""
        pipe = self._warden.stdin
        assert pipe is not None
        if pipe.closed:
            return
        try:
            os.write(pipe.fileno(), f"{word}\n".encode())
        except OSError:
            pass  # somebody killed it
        if word == "done":
            pipe.close()
            self._warden.wait()

    def _is_ours(self, process: psutil.Process) -> bool:
        return self._mark in (process.info["environ"] or {})
