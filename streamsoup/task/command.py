"""A task that is a shell command: it is given a checkpoint folder, and prints a score.

The answer is the last JSON object or number on standard output. What a command prints is read as
it comes, and only the end of it is kept. It is killed with all its children when it is done, late,
or not wanted any more; see `family`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from typing import Any

import msgspec

from streamsoup.errors import TaskError, printable
from streamsoup.task.family import Family, Tail
from streamsoup.task.scores import Score, read_score

__all__ = ["CommandTask", "command_task"]

OUTPUT_NBYTES = 1 << 16
"""How much of the end of the output is searched for a score."""

DIGESTED_NBYTES = 10_000_000
"""Files named in a command, up to this size, are part of what its scores depend on."""


class CommandTask(msgspec.Struct, frozen=True):
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
    task file would be told. Files named in it are part of what its scores depend on; not those
    that output goes to (``>> log``), but any other that it writes to and so changes. Raises
    `TaskError` for a command that takes no checkpoint.
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
    for before, word in itertools.pairwise(["", *words]):
        if before.endswith(">"):
            continue
        if os.path.isfile(word) and os.path.getsize(word) <= DIGESTED_NBYTES:
            with open(word, "rb") as file:
                digest.update(file.read())
    return CommandTask(command, digest.hexdigest(), main, timeout)


def _run(line: str, timeout: float | None) -> tuple[int | None, bytes, Tail]:
    """Run a shell command; give its status (None: too late), standard output and both ends."""
    family = Family(
        ["/bin/sh", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
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
