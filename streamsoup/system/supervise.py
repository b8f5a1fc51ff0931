"""Run work in a child process, so that even its death by a signal is explained.

A mapped file that shrinks kills the process that touches its lost pages with SIGBUS, and no handler
in Python can help. So the command line forks before anything heavy is imported; the child works,
and the parent waits, passes signals on, and reports how the child died.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from streamsoup.system.libc import kill_with_parent

__all__ = ["die_with", "leave", "open_standard_streams", "status_of", "supervised"]

GRACE_S = 1.2
"""Time for a clean stop after Ctrl-C or SIGTERM. Work that is cut off can be resumed anyway."""

DYING_S = 0.4
"""Time to wait for a killed child, which may hang in an fsync. It changes nothing after that."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervised(work: Callable[[], int], explain: Callable[[int, float], str]) -> int:
    """Run `work` in a child process, and return its exit status.

    SIGINT, SIGTERM and SIGHUP are passed on; a child that has not stopped `GRACE_S` later is
    killed.

    Args:
        work: Called in the child; returns the exit status.
        explain: Called with the signal that killed the child, and the time (of `time.time`) at
            which it started; returns the error message.

    Returns:
        130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP, 1 if the child was killed otherwise.
    """
    started = time.time()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = 0
    status = signal.SIGKILL.value
    stopping: list[int] = []
    killed: list[int] = []
    # A signal that was ignored at the start (nohup, a background job) stays ignored.
    heeded = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopping:
            stopping.append(number)
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
            _kill(child, number)

    def give_up(number: int, frame: FrameType | None) -> None:
        if killed:
            raise _LeftAloneError
        killed.append(child)
        signal.setitimer(signal.ITIMER_REAL, DYING_S)
        _kill(child, signal.SIGKILL)

    kept = {number: signal.signal(number, stop) for number in heeded}
    kept[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_up)
    kept[signal.SIGCHLD] = signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # if it were ignored, waitpid would find no child
    try:
        try:
            child = os.fork()
        except BlockingIOError:
            print(
                "error: no process can be started; raise the limit of processes (ulimit -u)",
                file=sys.stderr,
            )
            return 1
        if child == 0:
            _work(work, parent, heeded)
        if stopping:  # the signal came before the fork
            _kill(child, stopping[0])
        _, status = os.waitpid(child, 0)
    except _LeftAloneError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
    if stopping:
        return 128 + stopping[0] if status else 0
    if os.WIFSIGNALED(status):
        print(f"error: {explain(os.WTERMSIG(status), started)}", file=sys.stderr)
        return 1
    return os.waitstatus_to_exitcode(status)


def open_standard_streams() -> None:
    """Fill descriptors 0 to 2, so that no shard is opened there and then printed into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has no streams where it found the descriptors closed.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def status_of(stop: KeyboardInterrupt) -> int:
    """Return the exit status after a signal to stop; `_interrupt` puts its number into `stop`."""
    number = stop.args[0] if stop.args and stop.args[0] in _STOPPING else signal.SIGINT
    return 128 + int(number)


def die_with(parent: int) -> None:
    """Make the system kill this process with its parent: an orphan would hold the lock."""
    kill_with_parent()
    if os.getppid() != parent:  # it was killed before we asked
        os._exit(1)


def leave(status: int) -> NoReturn:
    """Flush the standard streams, and exit without Python's own clean-up (saves 6 ms)."""
    os._exit(_flush(status))


class _LeftAloneError(Exception):
    """The child is killed, but not dead yet."""


def _work(work: Callable[[], int], parent: int, heeded: list[signal.Signals]) -> None:
    """Run the child: work, and exit without the clean-up that belongs to the parent."""
    status = 1
    try:
        die_with(parent)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in heeded:
            signal.signal(number, _interrupt)
        status = work()
        status = _flush(status)
    except KeyboardInterrupt as stop:
        status = status_of(stop)
    except BrokenPipeError:
        pass  # the reader of stdout is gone
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)  # too late to stop
        os._exit(status)


def _flush(status: int) -> int:
    """Flush stdout. A closed pipe is not an error: the work is done.

    A command that has failed has said why, and may have failed to write to stdout.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        if status == 0:
            print(f"error: stdout: cannot be written: {error.strerror}", file=sys.stderr)
        return status or 1
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal sends Ctrl-C to parent and child, and the parent passes it on: once is enough.
    for each in _STOPPING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _kill(child: int, number: int) -> None:
    try:
        if child:
            os.kill(child, number)
    except ProcessLookupError:
        pass
