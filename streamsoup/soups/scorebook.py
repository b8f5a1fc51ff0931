"""What a search remembers: every score it ever paid for, in a journal beside the output.

A search is a fixed function of its scores, so it is resumed by running it again: what the journal
holds is not scored a second time. The journal belongs to fixed ingredients, task and options; where
one of them changed, its scores are worth nothing, and that is said by name.

::

    OUT.search/lock          held by the one run that searches here
    OUT.search/journal       first what is searched for, then a record for each score, fsynced
    OUT.search/candidate-…   the one candidate in the making, for a command
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from streamsoup.errors import OutputBusyError, OutputError, ResumeError, printable, some
from streamsoup.formats.shards import Ingredient
from streamsoup.journal import Journal
from streamsoup.soups.candidates import Moved
from streamsoup.soups.scoring import Outcome
from streamsoup.task import Score

__all__ = ["Members", "Scorebook", "fingerprint_of"]

Members = tuple[int, ...]
"""Numbers of ingredients, in the order of the sum."""

_OURS = ("lock", "journal")


class Scorebook:
    """The scores of one search, held by this run."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Take the search folder of the output at the real path `target`; read its scores.

        `bound_to` says what the scores depend on; it is plain JSON. `restart` forgets what an
        earlier run scored. Raises `OutputBusyError` if another run searches here, `ResumeError`
        for a damaged journal or one of another search, `OutputError` if the folder is not ours.
        """
        self.root = target + ".search"
        self.scores: dict[Members, Outcome] = {}
        """What is known by now."""
        self.resumed: frozenset[Members] = frozenset()
        """Those of them that an earlier run had paid for."""
        self.paid: list[Outcome] = []
        """What this run paid for, also where nothing came of it."""
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="streamsoup-sync")
        self._syncing: Future[None] | None = None
        self._lock = _take(self.root)
        try:
            path = os.path.join(self.root, "journal")
            if restart and os.path.lexists(path):
                os.unlink(path)
            self._clear()
            self._journal = Journal(path)
            try:
                self._begin(dict(bound_to))
            except BaseException:
                self._journal.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Scorebook:
        """Give the scorebook itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the folder; the scores stay."""
        self.close()

    def put(self, members: Members, outcome: Outcome, to_beat: float | None) -> None:
        """Remember a score. It is on disk before the next one is remembered.

        The disk is waited for beside the next candidate: a kill loses no score, and a power
        failure the last one at most.
        """
        record: dict[str, Any] = {
            "members": list(members),
            "score": outcome.score.to_record(),
            "nbytes": [outcome.moved.nbytes_read, outcome.moved.nbytes_sums],
            "seconds": [outcome.moved.elapsed_s, outcome.scoring_s],
        }
        if outcome.averaged is not None:
            record["averaged"] = outcome.averaged.to_record()
        if to_beat is not None:
            record["to_beat"] = to_beat
        self._wait()
        self._journal.append(record, wait=False)
        self._syncing = self._syncer.submit(self._journal.sync)
        self.scores[members] = outcome
        self.paid.append(outcome)

    def get(self, members: Members, to_beat: float | None) -> Outcome | None:
        """Give a score that is known, and serves: a bound does only while it is below `to_beat`."""
        outcome = self.scores.get(members)
        if outcome is None or not outcome.score.stopped:
            return outcome
        return outcome if to_beat is not None and outcome.score.value < to_beat else None

    def finish(self) -> None:
        """Remove the folder: the output is in place."""
        self._wait()
        self._journal.close()
        self._clear()
        for name in _OURS:
            try:
                os.unlink(os.path.join(self.root, name))
            except FileNotFoundError:
                pass
        try:
            os.rmdir(self.root)
        except OSError:
            pass  # somebody put a file of their own there
        self.close()

    def close(self) -> None:
        """Let go of the folder; a second time does nothing."""
        self._syncer.shutdown()
        self._journal.close()
        if self._lock >= 0:
            if os.path.isdir(self.root):
                self._clear()
            os.close(self._lock)
            self._lock = -1

    def _wait(self) -> None:
        """Wait until all scores are on disk. Raises what the disk said, if it said no."""
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _begin(self, bound_to: dict[str, Any]) -> None:
        """Check what the journal belongs to, and read its scores."""
        records = list(self._journal)
        if not records:
            self._journal.append({"search": bound_to})
            _sync(self.root)
            _sync(os.path.dirname(self.root))
            return
        _check_same(self.root, records[0].get("search"), bound_to)
        n = len(bound_to["ingredients"])
        for number, record in enumerate(records[1:], 2):
            try:
                members, outcome = _read(record)
            except (KeyError, TypeError, ValueError):
                members, outcome = (-1,), None
            if outcome is None or not all(0 <= i < n for i in members):
                raise ResumeError(
                    f"{printable(self._journal.path)}: record {number} is no score; "
                    "--restart forgets all scores of this search"
                )
            self.scores[members] = outcome
        self.resumed = frozenset(self.scores)

    def _clear(self) -> None:
        """Remove candidates that a killed run left."""
        for name in os.listdir(self.root):
            if name.startswith("candidate-"):
                shutil.rmtree(os.path.join(self.root, name), ignore_errors=True)
            elif name.startswith("sum-"):
                os.unlink(os.path.join(self.root, name))


def fingerprint_of(ingredient: Ingredient) -> list[Any]:
    """Tell an ingredient from what it may become: path, file, size and time of each shard."""
    return [
        [os.path.realpath(shard.path), *map(int, _file_of(shard.identity))]
        for shard in ingredient.shards
    ]


def _file_of(identity: Any) -> tuple[int, int, int]:
    # Not the device: its number may change when the machine starts anew.
    return identity.inode, identity.size, identity.mtime_ns


def _read(record: Mapping[str, Any]) -> tuple[Members, Outcome]:
    members = tuple(int(i) for i in record["members"])
    nbytes, seconds = record["nbytes"], record["seconds"]
    moved = Moved(int(nbytes[0]), int(nbytes[1]), float(seconds[0]))
    averaged = Score.from_record(record["averaged"]) if "averaged" in record else None
    score = Score.from_record(record["score"])
    if not members:
        raise ValueError
    return members, Outcome(score, averaged, moved, float(seconds[1]))


def _check_same(root: str, found: Any, wanted: dict[str, Any]) -> None:
    """Refuse scores that were given for something else, and say what changed."""
    if found == wanted:
        return
    advice = "its scores are not trusted; --restart forgets them, or choose another output"
    if not isinstance(found, dict):
        raise ResumeError(f"{printable(root)}: is of another kind of search; {advice}")
    changed: list[str] = []
    before, now = found.get("ingredients"), wanted["ingredients"]
    if before != now:
        changed.append(_what_changed(before, now))
    for key in wanted:
        if key != "ingredients" and found.get(key) != wanted[key]:
            names = {"task": "the task", "code": "the code of the task"}
            changed.append(names.get(key, f"--{key.replace('_', '-')}"))
    if "the task" in changed and "the code of the task" in changed:
        changed.remove("the code of the task")
    raise ResumeError(
        f"{printable(root)}: holds an unfinished search, and since then {some(changed)} changed; "
        f"{advice}"
    )


def _what_changed(before: Any, now: Sequence[Any]) -> str:
    """Name the ingredients that are not the ones of before."""
    if not isinstance(before, list) or [each[0] for each in before] != [each[0] for each in now]:
        return "the list of ingredients"
    names = [new[0] for old, new in zip(before, now, strict=True) if old != new]
    return f"the ingredient{'s' if len(names) > 1 else ''} {some(names)}"


def _take(root: str) -> int:
    """Make the folder, and lock it against every other run."""
    where = printable(root)
    try:
        os.makedirs(os.path.dirname(root), exist_ok=True)
        os.mkdir(root)
    except FileExistsError:
        names = os.listdir(root) if os.path.isdir(root) and not os.path.islink(root) else ["?"]
        if names and not set(names) & set(_OURS):
            raise OutputError(f"{where}: is in the way and not ours; move it elsewhere") from None
    except OSError as error:
        raise OutputError(
            f"{where}: cannot be made: {error.strerror}; choose another output, or mend that"
        ) from None
    while True:
        path = os.path.join(root, "lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise OutputBusyError(
                f"{where}: is being searched in by {printable(who) or 'another run'}; "
                "wait for it, or stop it"
            ) from None
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        except FileNotFoundError:
            os.makedirs(root, exist_ok=True)
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def _sync(folder: str) -> None:
    from streamsoup.staging import sync_folder

    sync_folder(folder)
