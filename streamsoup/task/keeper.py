"""A small process between streamsoup and a user's: when either ends, all that was started ends.

Run as a script, by its path, with the descriptor of a pipe and a command. It makes itself the
adopter of orphans (``PR_SET_CHILD_SUBREAPER``), so whatever the command starts stays among its
descendants: daemons, too, and what runs in sessions of its own. It waits for the command to end,
or for the pipe to close, which also happens when streamsoup is killed. Then it kills its children
until there are none, and ends as the command did.

Where the system has no such adopter, or no ``/proc`` to find children in, it kills the group of the
command instead: what runs in sessions of its own gets away there.

It imports nothing of this package, and little else: it starts for every command. (`signal` alone
would take as long as all the rest.)
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _SIGKILL = 1, 36, 9

_LOOK_MS = 20
"""Time between two looks at the command, where the system cannot wait for it and a pipe at once."""

_KILLING_S = 5.0
"""How long to go on killing: a child that another user owns cannot be killed at all."""


def keep(pipe: int, command: list[str]) -> None:
    """Run a command until it ends or the pipe closes; never returns."""
    libc = ctypes.CDLL(None)
    adopts = hasattr(libc, "prctl") and os.path.isdir("/proc/self")
    if adopts:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(pipe, False)
    leader = os.fork()
    if leader == 0:
        if adopts:
            libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        else:
            os.setpgid(0, 0)
        try:
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    _hold_nothing_but(pipe)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    known = None
    if hasattr(os, "pidfd_open"):
        poll.register(os.pidfd_open(leader), select.POLLIN)
        poll.poll()
    else:
        while known is None and not poll.poll(_LOOK_MS):
            ended, ended_as = os.waitpid(leader, os.WNOHANG)
            known = ended_as if ended else None
    status = _kill_all(leader, adopts, known)
    if os.WIFSIGNALED(status):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _hold_nothing_but(pipe: int) -> None:
    """Close what the command alone is to hold: its ends of pipes and sockets."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))


def _kill_all(leader: int, adopts: bool, known: int | None) -> int:
    """Kill all descendants, and return the leader's status: children of a child come to us.

    Where no process `adopts` them, the leader's group is killed. Its status may be `known`.
    """
    status = _SIGKILL if known is None else known
    deadline = time.monotonic() + _KILLING_S
    if not adopts:
        try:
            os.killpg(leader, _SIGKILL)
        except OSError:
            pass  # nothing of it is left
    while True:
        try:
            ended, ended_as = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if ended == leader:
            status = ended_as
        if ended:
            continue
        for child in _children() if adopts else [leader]:
            try:
                os.kill(child, _SIGKILL)
            except OSError:
                pass
        if time.monotonic() > deadline:
            return status
        time.sleep(0.001)


def _children() -> list[int]:
    """List the processes whose parent this one is."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has just ended
            if parent == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2:])
