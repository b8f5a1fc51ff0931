"""A task that is a shell command: it is given a checkpoint folder, and prints a score.

The answer is the last JSON object or number on standard output. Lines below it are skipped only if
they hold no digit, no NaN and no part of an object; any other line that cannot be read is refused,
as what stands above it may not be the score. If the metric is named, a line that names it is
preferred to one that is only a number. Output is read as it is printed, and only its end is kept.
When the command has ended, is late, or is not wanted any more, it is killed with all its children
(`processes`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import selectors
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from streamsoup.errors import TaskError, printable, signal_name, some
from streamsoup.sizes import nbytes_text
from streamsoup.task.code import digest_scripts
from streamsoup.task.processes import ProcessTree, Tail
from streamsoup.task.scores import Score, read_score

__all__ = ["CommandTask", "command_task"]

OUTPUT_NBYTES = 1 << 25
"""How much of the end of the output is held, and searched for a score: a million examples in JSON,
with all their digits and a line each, are 25 MB."""

_CUT = f" in the last {nbytes_text(OUTPUT_NBYTES)} that it printed, and no more are held"

DIGESTED_NBYTES = 10_000_000
"""Files named in a command count with all that they hold up to this size; else by size and time."""


class CommandTask(msgspec.Struct, frozen=True):
    """A shell command that scores checkpoint folders."""

    command: str
    fingerprint: str
    """Changes with the command, and with the scripts it names."""
    main: str | None
    """The name of the metric that counts, in a JSON object or in a line such as ``acc: 0.9``."""
    timeout: float | None
    """Seconds that one run may take."""
    scripts: tuple[str, ...] = ()
    """The Python files that it names."""
    code: str = digest_scripts((), version="")
    """Changes with those, and with what they import of their own project."""
    splits: tuple[str, ...] = ("val",)

    @property
    def name(self) -> str:
        """The command, for messages."""
        return printable(self.command, 120)

    def check_split(self, split: str | None) -> str:
        """Return the split to score. Raises `TaskError` if the command does not take one."""
        if split is not None and "{split}" not in self.command:
            raise TaskError(f"{self.name}: takes no split; write {{split}} in the command")
        return split or "val"

    def run(
        self,
        folder: str,
        split: str,
        to_beat: float | None,
        *,
        server: str | None = None,
        stop: threading.Event | None = None,
    ) -> Score:
        """Score the checkpoint in `folder`, which the server at an address has loaded, if given.

        Once `stop` is set, the command is killed.

        Raises `TaskError`, with the end of the output, when the command fails, prints no score or
        takes too long.
        """
        values = {"checkpoint": folder, "split": split, "to_beat": repr(to_beat)}
        environment: dict[str, str] | None = None
        if server is not None:
            values["server"] = server
            environment = {**os.environ, "STREAMSOUP_SERVER": server}
        line = re.sub(
            r"\{(checkpoint|split|to_beat|server)\}",
            lambda m: shlex.quote(values[m[1]]) if m[1] in values else m[0],
            self.command,
        )
        status, output, tail = _run(line, self.timeout, environment, stop)
        if digest_scripts(self.scripts, version="") != self.code:
            raise TaskError(
                f"{self.name}: {some(self.scripts)}, or what it imports, changed as it was used; "
                "run again"
            )
        if status is None:
            raise TaskError(f"{self.name}: took longer than {self.timeout:g} s{tail.text()}")
        if status:
            how = f"was killed by {signal_name(-status)}" if status < 0 else None
            raise TaskError(f"{self.name}: {how or f'ended with status {status}'}{tail.text()}")
        answer = _answer(output, self.name, tail, self.main)
        where = f"{self.name}: on {split!r}"
        return read_score(answer, main=self.main, to_beat=to_beat, where=where)


def command_task(
    command: str, *, main: str | None, timeout: float | None, in_server: bool = False
) -> CommandTask:
    """Make a task of a shell command, such as ``python eval.py {checkpoint}``.

    ``{checkpoint}`` stands for the folder to score, ``{split}`` and ``{to_beat}`` for what a
    task file would be told. Files named in it are part of what its scores depend on, and what those
    import that lies beside them; not those that output goes to (``>> log``), but any other that it
    writes to and so changes. Raises `TaskError` for a command that takes no checkpoint, unless the
    candidates are `in_server`: then ``{server}``, and ``STREAMSOUP_SERVER``, are its address.
    """
    if "{checkpoint}" not in command and not in_server:
        raise TaskError(
            f"{printable(command)}: takes no checkpoint; "
            "write it as 'python eval.py {checkpoint}'"
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise TaskError(f"{printable(command)}: is not a shell command: {error}") from None
    inner: list[str] = []
    for word in words:
        with suppress(ValueError):  # sh -c 'python eval.py …'
            inner += shlex.split(word) if " " in word else []
    known = repr((command, main))
    scripts: list[str] = []
    for before, word in itertools.pairwise(["", *words, "", *inner]):
        for path in () if before.endswith(">") else _files_of(before, word):
            if os.path.getsize(path) <= DIGESTED_NBYTES:
                scripts.append(path)
            else:
                status = os.stat(path)
                known += f" {status.st_size} {status.st_mtime_ns}"
    python = tuple(os.path.abspath(path) for path in scripts if path.endswith(".py"))
    fingerprint = digest_scripts(scripts, version=known)
    return CommandTask(
        command, fingerprint, main, timeout, python, digest_scripts(python, version="")
    )


def _files_of(before: str, word: str) -> list[str]:
    """List the files that a word of a command may mean, and the scripts that a shell script names.

    `before` is the word before it.
    """
    paths = [
        os.path.expandvars(os.path.expanduser(each)) for each in (word, word.partition("=")[2])
    ]
    paths += [os.path.join(path, "__main__.py") for path in paths if path]  # python FOLDER
    if before == "-m":
        module = word.replace(".", os.sep)
        paths += [f"{module}.py", os.path.join(module, "__main__.py")]
    found = [path for path in paths if os.path.isfile(path)]
    for path in [path for path in found if path.endswith(".sh")]:
        with open(path, encoding="utf-8", errors="replace") as file:
            named = re.findall(r"[^\s'\"=;|&()]+\.py\b", file.read(1 << 20))
        found += [each for each in map(os.path.expandvars, named) if os.path.isfile(each)]
    return found


def _run(
    line: str,
    timeout: float | None,
    environment: dict[str, str] | None,
    stop: threading.Event | None,
) -> tuple[int | None, Tail, Tail]:
    """Run a shell command; return its status (None: too late), standard output and all output."""
    tree = ProcessTree(
        ["/bin/sh", "-c", line],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process = tree.process
    deadline = None if timeout is None else time.monotonic() + timeout
    output, tail = Tail(OUTPUT_NBYTES), Tail()
    try:
        status = _follow(process, deadline, output, tail, stop)
    finally:
        tree.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    return status, output, tail


def _follow(
    process: subprocess.Popen[bytes],
    deadline: float | None,
    output: Tail,
    tail: Tail,
    stop: threading.Event | None = None,
) -> int | None:
    """Read what a process prints until it ends: its children may keep the pipes open."""
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while True:
            # First, as we may have been stopped meanwhile, and the command have ended in time.
            late = deadline is not None and time.monotonic() > deadline
            status = process.poll()
            _drain(selector, process, output, tail, 0.0 if status is not None else 0.05)
            if status is not None:
                return status
            if stop is not None and stop.is_set():
                raise TaskError("the search is over")
            if late:
                return None


def _drain(
    selector: selectors.BaseSelector,
    process: subprocess.Popen[bytes],
    output: Tail,
    tail: Tail,
    wait_s: float,
) -> None:
    """Read what is there by now; wait at most `wait_s` for the first of it."""
    if not selector.get_map():
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
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


_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
"""A command to a terminal, such as a colour (ECMA-48)."""

_MINUS = {0x2212: "-", 0x2013: "-"}
"""What typesetters write for a minus."""

_NUMBER = re.compile(
    r"(?<![\w.+/-])[+-]?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf(?:inity)?)"
    r"(?![\w/]|\.[\w.]|-\d)",
    re.IGNORECASE,
)
"""A number in a line, without the full stop that may end a sentence. What stands in a name, a path
or a date is none."""

_WORD = re.compile(r"nan|inf(?:inity)?", re.IGNORECASE)
"""A number that is a word in prose as well."""

_BEFORE_WORD = re.compile(
    r"(?:.*[=:]\s*)?(?:[\w.]+\()?|(?!(?:no|not|without)\s)\S+\s+", re.IGNORECASE
)
"""After what it is meant as a number: nothing, an equals sign, a colon, or a single name. Nothing
but punctuation may follow."""

_AFTER_SPAN = re.compile(r"\s*(?:ms|s|secs?|seconds?|min|mins|minutes?|h|hours?)\b", re.IGNORECASE)
"""After what a number is a time taken, and no score."""

_NO_SCORE = re.compile(
    r"per[_ ]second|/s\b|\b[kMGT]i?B\b|runtime|latency|throughput|elapsed|time \(|memory|"
    r"\bepoch|exit code|copyright|\b(?:passed|failed) in\b",
    re.IGNORECASE,
)
"""In a line whose number says how fast, how large or how far, and not how good."""


def _answer(output: Tail, where: str, tail: Tail, main: str | None) -> Any:
    """Find the last JSON object or number in what a command printed; that of `main`, if named."""
    text = _ESCAPE.sub(b"", output.content()).replace(b"\r", b"\n").rstrip()
    bare = None
    for begin, end in _lines_from_the_end(text):
        if begin == 0 and output.is_cut:
            break  # half a line
        line = text[begin:end].decode("utf-8", "replace").translate(_MINUS).strip()
        if line.endswith("}"):
            found = _object_at_the_end(text[:end].decode("utf-8", "replace").rstrip())
            if found is not None:
                return found
            _refuse(line, where, _CUT if output.is_cut else "")
        number = _number_in(line, where) if main is None else _number_of(main, line)
        if number is not None:
            return number
        plain = line.replace("%", " ").strip()
        if bare is None and _NUMBER.fullmatch(plain):
            bare = float(plain)
    if bare is not None:
        return bare
    wanted = "score" if main is None else printable(main)
    if output.is_cut:
        raise TaskError(f"{where}: printed no {wanted}{_CUT}; print less, and the score last")
    raise TaskError(
        f"{where}: printed no {wanted} on standard output, as a number or in a JSON object"
        f"{tail.text()}"
    )


def _number_of(name: str, line: str) -> float | None:
    """Return the number that a line has for a name."""
    plain = line.replace("%", " ")
    named = re.search(rf"(?<![\w.-]){re.escape(name)}[\"']?\s*[:=]\s*", plain)
    found = None if named is None else _NUMBER.match(plain, named.end())
    return None if found is None else float(found[0])


def _lines_from_the_end(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each line begins and ends, the last one first."""
    end = len(text)
    while end >= 0:
        begin = text.rfind(b"\n", 0, end) + 1
        yield begin, end
        end = begin - 1


def _number_in(line: str, where: str) -> float | None:
    """Return the one number in a line; None if nothing in it may be part of a score."""
    plain = line.replace("%", " ")
    found = list(itertools.islice(_NUMBER.finditer(plain), 2))
    if len(found) > 1:
        n = sum(1 for _ in _NUMBER.finditer(plain))
        raise TaskError(
            f"{where}: its last line with a number has {n} of them, "
            f"{printable(line)!r}; end with one number, or with a JSON object"
        )
    if not found:
        # The end of an object or a list, or a number in a form that is not known.
        if re.search(r"\d", line) or not _is_balanced(line, "[]", "{}"):
            _refuse(line, where)
        return None
    (number,) = found
    is_word = _WORD.fullmatch(number[0]) is not None
    if (
        not _is_balanced(line, "()", "[]", "{}")
        or _AFTER_SPAN.match(line, number.end())
        or _NO_SCORE.search(line)
        or (is_word and not _BEFORE_WORD.fullmatch(line[: number.start()]))
        or (is_word and re.search(r"\w", line[number.end() :]))
    ):
        _refuse(line, where)
    return float(number[0])


def _is_balanced(line: str, *pairs: str) -> bool:
    return all(line.count(pair[0]) == line.count(pair[1]) for pair in pairs)


def _refuse(line: str, where: str, cut: str = "") -> NoReturn:
    """Refuse a line that may hold the score, but cannot be read."""
    raise TaskError(
        f"{where}: no score can be read from {printable(line)!r}{cut}; print the score last, as "
        "one number or a JSON object, such as print(json.dumps({'accuracy': accuracy}))"
    )


def _object_at_the_end(text: str) -> dict[str, Any] | None:
    """Return the JSON object that ends where `text` does; None if none does.

    It begins with the first brace of a line; before that may be words, but nothing of an object or
    list that it would be part of. Of each object before it only its own text is read.
    """
    decoder = json.JSONDecoder()
    end = len(text)
    while end >= 0:
        line = text.rfind("\n", 0, end) + 1
        begin = text.find("{", line, end)
        end = line - 1
        if begin < 0 or re.search("[\"'\\[(]", text[line:begin]):
            continue
        try:
            found, stop = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            continue
        if stop == len(text):
            return _numbers_of(found)
    return None


def _numbers_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a JSON object, and its ``examples``."""
    return {
        name: value
        for name, value in found.items()
        if name == "examples" or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }
