"""A user's process, with all that it starts: nothing of it outlives it, or this process.

A keeper stands between (`keeper`): it is told to end by closing a pipe, which the system does too
when this process is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from streamsoup.errors import printable
from streamsoup.task import keeper

__all__ = ["ProcessTree", "Tail"]

TAIL_NBYTES = 2000
"""How much of the end of the output a message shows."""

_ENDING_S = 10.0
"""How long a keeper may take to end: it may be stopped, or wait for a child on a dead disk."""


class Tail:
    """The end of what a process printed."""

    def __init__(self, nbytes: int = TAIL_NBYTES) -> None:
        """Keep the last `nbytes`."""
        self._nbytes = nbytes
        # One buffer, not a list of parts: a process may print byte by byte.
        self._held = bytearray()
        self.is_cut = False
        """True if there was more than is kept."""

    def add(self, part: bytes) -> None:
        """Add what was printed next."""
        self._held += part
        excess = len(self._held) - self._nbytes
        if excess > 0:
            del self._held[:excess]
            self.is_cut = True

    def content(self) -> bytes:
        """Return what is kept."""
        return bytes(self._held)

    def text(self) -> str:
        """Return it as the end of a message: line by line, without control characters."""
        lines = self.content().decode("utf-8", "replace").strip().splitlines()[-15:]
        if not lines:
            return "; it printed nothing"
        return "; the last it printed:\n" + "\n".join(f"  | {printable(line)}" for line in lines)


class ProcessTree:
    """A process, and all processes that it starts."""

    def __init__(
        self, arguments: Sequence[str], *, pass_fds: Sequence[int] = (), **settings: Any
    ) -> None:
        """Start a process in a session of its own; `settings` are those of `subprocess.Popen`."""
        theirs, self._pipe = os.pipe()
        self._lock = threading.Lock()
        script = [sys.executable, "-I", "-S", keeper.__file__, str(theirs)]
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [*script, *arguments],
                start_new_session=True,
                pass_fds=[theirs, *pass_fds],
                **settings,
            )
            """Ends when all of them have ended, with the status of the one that was started."""
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(theirs)

    def kill(self) -> None:
        """Kill all of them, and wait until they have ended; a second time does nothing."""
        with self._lock:
            if self._pipe >= 0:
                os.close(self._pipe)
                self._pipe = -1
        try:
            self.process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
