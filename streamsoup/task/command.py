"""A task that is a shell command: it is given a checkpoint folder, and prints a score.

The answer is the last JSON object or number on standard output. The command runs in a process
group of its own, which is killed with all its children when it is done, late, or not wanted any
more. What it prints is read as it comes, and only the end of it is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from streamsoup.errors import TaskError, printable
from streamsoup.task.scores import Score, read_score

__all__ = ["CommandTask", "Family", "Tail", "command_task"]

OUTPUT_NBYTES = 1 << 16
"""How much of the end of the output is searched for a score."""

TAIL_NBYTES = 2000
"""How much of the end of the output a message shows."""

DIGESTED_NBYTES = 10_000_000
"""Files named in a command, up to this size, are part of what its scores depend on."""

_ROUNDS = 5
"""How often to look again for processes that were born meanwhile."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class CommandTask:
    """A shell command that scores checkpoint folders."""

    command: str
    fingerprint: str
    """Changes with the command, and with the scripts it names."""
    main: str | None
    """The name of the metric that counts, if the command prints a JSON object."""
    timeout: float | None
    """Seconds that one run may take."""
    splits: tuple[str, ...] = ("val",)

    @property
    def name(self) -> str:
        """The command, for messages."""
        return printable(self.command, 120)

    def check_split(self, split: str | None) -> str:
        """Give the split to score. Raises `TaskError` where the command cannot be told."""
        if split is not None and "{split}" not in self.command:
            raise TaskError(f"{self.name}: says nothing of a split; write {{split}} in the command")
        return split or "val"

    def run(self, folder: str, split: str, to_beat: float | None) -> Score:
        """Score the checkpoint in `folder`.

        Raises `TaskError`, with the end of the output, when the command fails, prints no score or
        takes too long.
        """
        values = {"checkpoint": folder, "split": split, "to_beat": repr(to_beat)}
        line = self.command
        for name, value in values.items():
            line = line.replace(f"{{{name}}}", shlex.quote(value))
        status, output, tail = _run(line, self.timeout)
        if status is None:
            raise TaskError(f"{self.name}: took longer than {self.timeout:g} s{tail.text()}")
        if status:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else None
            raise TaskError(f"{self.name}: {how or f'ended with status {status}'}{tail.text()}")
        answer = _answer(output, f"{self.name}", tail)
        return read_score(answer, main=self.main, to_beat=to_beat, where=self.name)


def command_task(command: str, *, main: str | None, timeout: float | None) -> CommandTask:
    """Make a task of a shell command, such as ``python eval.py {checkpoint}``.

    ``{checkpoint}`` stands for the folder to score, ``{split}`` and ``{to_beat}`` for what a
    task file would be told. Raises `TaskError` for a command that takes no checkpoint.
    """
    if "{checkpoint}" not in command:
        raise TaskError(
            f"{printable(command)}: takes no checkpoint; "
            "write it as 'python eval.py {checkpoint}'"
        )
    digest = hashlib.sha256(command.encode())
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise TaskError(f"{printable(command)}: is no shell command: {error}") from None
    for word in words:
        if os.path.isfile(word) and os.path.getsize(word) <= DIGESTED_NBYTES:
            with open(word, "rb") as file:
                digest.update(file.read())
    return CommandTask(command, digest.hexdigest(), main, timeout)


class Tail:
    """The end of what a process printed."""

    def __init__(self, nbytes: int = TAIL_NBYTES) -> None:
        """Keep the last `nbytes`."""
        self._nbytes = nbytes
        self._parts: deque[bytes] = deque()
        self._held = 0

    def add(self, part: bytes) -> None:
        """Take what was printed next."""
        self._parts.append(part)
        self._held += len(part)
        while self._parts and self._held - len(self._parts[0]) >= self._nbytes:
            self._held -= len(self._parts.popleft())

    def content(self) -> bytes:
        """Give what is kept."""
        return b"".join(self._parts)[-self._nbytes :]

    def text(self) -> str:
        """Give it as the end of a message: line by line, without control characters."""
        lines = self.content().decode("utf-8", "replace").strip().splitlines()[-15:]
        if not lines:
            return "; it printed nothing"
        return "; the last it printed:\n" + "\n".join(f"  | {printable(line)}" for line in lines)


class Family:
    """A process that leads its own group, and all that come of it.

    A child may leave the group, and a daemon has no parent any more either; but its environment
    still has the mark that it was born with.
    """

    def __init__(self, arguments: Sequence[str], **settings: Any) -> None:
        """Start a process, with what `subprocess.Popen` would be told."""
        self._mark = f"STREAMSOUP_{uuid.uuid4().hex}"
        self.leader: subprocess.Popen[bytes] = subprocess.Popen(
            arguments, start_new_session=True, env=os.environ | {self._mark: "1"}, **settings
        )

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

    def _is_ours(self, process: psutil.Process) -> bool:
        return self._mark in (process.info["environ"] or {})


def die_with_parent() -> None:
    """Ask to be killed when the parent is (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run(line: str, timeout: float | None) -> tuple[int | None, bytes, Tail]:
    """Run a shell command; give its status (None: too late), standard output and both ends."""
    family = Family(
        ["/bin/sh", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    process = family.leader
    deadline = None if timeout is None else time.monotonic() + timeout
    output, tail = Tail(OUTPUT_NBYTES), Tail()
    try:
        status = _follow(process, deadline, output, tail)
    finally:
        family.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    return status, output.content(), tail


def _follow(
    process: subprocess.Popen[bytes], deadline: float | None, output: Tail, tail: Tail
) -> int | None:
    """Read what a process prints until it ends: its children may keep the pipes open."""
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while True:
            status = process.poll()
            _drain(selector, process, output, tail, 0.0 if status is not None else 0.05)
            if status is not None:
                return status
            if deadline is not None and time.monotonic() > deadline:
                return None


def _drain(
    selector: selectors.BaseSelector,
    process: subprocess.Popen[bytes],
    output: Tail,
    tail: Tail,
    wait_s: float,
) -> None:
    """Read what is there by now; wait a moment for the first of it."""
    if not selector.get_map():
        time.sleep(wait_s)
        return
    budget = 1 << 24  # what a child printed for ever would be read for ever
    while budget > 0 and (ready := selector.select(wait_s)):
        wait_s = 0.0
        for key, _ in ready:
            part = os.read(key.fd, 1 << 16)
            if not part:
                selector.unregister(key.fileobj)
                continue
            budget -= len(part)
            tail.add(part)
            if key.fileobj is process.stdout:
                output.add(part)
        if not selector.get_map():
            return


_NUMBER = re.compile(
    r"(?<![\w.+-])[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf(?:inity)?)(?![\w.])",
    re.IGNORECASE,
)


def _answer(output: bytes, where: str, tail: Tail) -> Any:
    """Find the last JSON object or number in what a command printed."""
    lines = output.decode("utf-8", "replace").replace("\r", "\n").splitlines()
    for end in range(len(lines), 0, -1):
        line = lines[end - 1].strip()
        if line.endswith("}"):
            for begin in range(end - 1, -1, -1):
                if lines[begin].lstrip().startswith("{"):
                    found = _json_object("\n".join(lines[begin:end]))
                    if found is not None:
                        return found
            continue
        numbers = _NUMBER.findall(line.replace("%", " "))
        if len(numbers) == 1:
            return float(numbers[0])
        if numbers:
            raise TaskError(
                f"{where}: its last line with a number has {len(numbers)} of them, "
                f"{printable(line)!r}; end with one number, or with a JSON object"
            )
    raise TaskError(f"{where}: printed no score: no number and no JSON object{tail.text()}")


def _json_object(text: str) -> dict[str, Any] | None:
    """Give the numbers of a JSON object, and what a task may say besides; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return {
        name: value
        for name, value in found.items()
        if name == "examples" or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }
