"""Folders of answers, each held by one run: of a search, beside its output, or of a comparison.

::

    OUT.search/lock          held by the one run that searches here; says who
    OUT.search/journal       first what is searched for, then a record for each answer
    OUT.search/candidate-…   the one candidate in the making, for a command
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from streamsoup.errors import OutputBusyError, OutputError, ResumeError, option, printable, some
from streamsoup.formats.ingredients import Ingredient
from streamsoup.output.journal import Journal, named
from streamsoup.system.closing import Closing
from streamsoup.system.folders import Folder, other_writer
from streamsoup.system.locks import HeldError, Lock

__all__ = ["SearchFolder", "bound_ingredients", "lock_folder"]

_OURS = ("journal", "lock")
"""In the order in which they are removed: what has no lock is not ours."""


class SearchFolder(Closing):
    """The folder of one search, with its journal of scores and evaluations."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Lock the folder beside the output at the real path `target`, and read its journal.

        `bound_to` says what the answers depend on; it is plain JSON. `restart` forgets those of an
        earlier run. Raises `OutputBusyError` if another run searches here, `ResumeError` for a
        damaged journal or one of another search, `OutputError` if the folder is not ours.
        """
        self.root = target + ".search"
        self._folder, self._lock = lock_folder(self.root, private=True)
        try:
            if restart:
                self._folder.remove("journal")
            self._clear()
            self._lost = self._folder.status("journal") is None
            self.journal = self._open_journal()
        except BaseException:
            self._unlock()
            raise
        try:
            self.run = self._begin(dict(bound_to))
            """Tells this search, goings-on included, from every other of the same things."""
        except BaseException:
            self.close()
            raise

    @property
    def records(self) -> Iterator[dict[str, Any]]:
        """All answers of earlier runs, one after the other."""
        return itertools.islice(self.journal, 1, None)

    def is_of(self, run: object) -> bool:
        """Return True if a run, as a soup's report names it, may be this search.

        A kill during the clean-up leaves no name, and then every run may be.
        """
        return self._lost or run == self.run

    def note(self, record: dict[str, Any], *, wait: bool = True) -> None:
        """Add an answer to the journal. See `Journal.append`. Raises `OutputError`."""
        with named(self.journal.path):
            self.journal.append(record, wait=wait)

    def sync(self) -> None:
        """Wait until all answers are on disk. Raises `OutputError`."""
        with named(self.journal.path):
            self.journal.sync()

    def finish(self) -> None:
        """Remove the folder: the output is in place, or there is nothing to keep."""
        self.journal.close()
        self._clear()
        for name in _OURS:
            self._folder.remove(name)
        with suppress(OSError):  # another process put a file there
            os.rmdir(self.root)
        self._unlock()  # and no more: by now the folder may be another run's

    def close(self) -> None:
        """Let go of the folder; a second time does nothing."""
        if self._holds and self.journal.n_records <= 1:
            self.finish()  # nothing was answered: nothing to go on from
        self.journal.close()
        if self._holds:
            self._clear()
            self._unlock()

    @property
    def _holds(self) -> bool:
        return self._folder.descriptor >= 0

    def _open_journal(self) -> Journal:
        return Journal(os.path.join(self.root, "journal"), self._folder)

    def _unlock(self) -> None:
        self._lock.close()
        self._folder.close()

    def _begin(self, bound_to: dict[str, Any]) -> str:
        """Check what the journal belongs to, or note it in a new one; return the run's name."""
        if self.journal.n_records == 1 and self.journal.first.get("search") != bound_to:
            # Nothing was scored yet: a corrected task needs no --restart.
            self.journal.close()
            self._folder.remove("journal")
            self.journal = self._open_journal()
        if not self.journal.n_records:
            self.note({"search": bound_to, "run": os.urandom(8).hex()})
            self._folder.sync()
            with Folder.open(os.path.dirname(self.root)) as above:
                above.sync()
        _check_same(self.root, self.journal.first.get("search"), bound_to)
        return str(self.journal.first.get("run"))

    def _clear(self) -> None:
        """Remove candidates that a killed run left."""
        for name in self._folder.names():
            if name.startswith("candidate-"):
                with suppress(OSError):
                    self._folder.remove(name)
            elif name.startswith("sum-"):
                self._folder.remove(name)


def bound_ingredients(ingredients: Sequence[Ingredient]) -> list[list[Any]]:
    """Return which ingredients answers are about: real paths, and what tells their sources."""
    return [[each.real_path, each.fingerprint] for each in ingredients]


def lock_folder(root: str, *, private: bool = False) -> tuple[Folder, Lock]:
    """Make a folder, and those above it, open it, and lock it against every other run.

    A `private` one is used only if no other user can have written there.

    Returns:
        The open folder, and its lock, which is closed first.

    Raises:
        OutputBusyError: Another run holds it.
        OutputError: The folder is not ours, or cannot be made.
    """
    where = printable(root)
    try:
        while True:
            folder = _open_folder(root, private=private)
            try:
                return folder, Lock(folder)
            except FileNotFoundError:
                folder.close()  # another run has just finished, and removed the folder
            except BaseException:
                folder.close()
                raise
    except HeldError as error:
        raise OutputBusyError(
            f"{where}: is being used by {error}; wait for it, or stop it"
        ) from None
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{where}: cannot be made: {error.strerror}; choose another folder, or mend that"
        ) from None


def _open_folder(root: str, *, private: bool) -> Folder:
    """Open a folder, made if need be. Raises `OutputError` for one that is not ours."""
    where = printable(root)
    above_path, name = os.path.split(root)
    os.makedirs(above_path, exist_ok=True)
    with Folder.open(above_path) as above:
        if above.status(name) is None:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700 if private else 0o777, dir_fd=above.descriptor)
        status = above.status(name)
        # Not through a link: candidates of earlier runs are removed from what is ours.
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise OutputError(f"{where}: is in the way and not ours; move it elsewhere")
        folder = above.folder(name)
        try:
            who = other_writer(folder, above) if private else ""
            if who:
                raise OutputError(
                    f"{where}: {who}, so its scores are not believed; a search may be at work "
                    "there: wait for it, choose another output, or remove that folder"
                )
            names = folder.names()
            if names and "lock" not in names:
                raise OutputError(f"{where}: is in the way and not ours; move it elsewhere")
        except BaseException:
            folder.close()
            raise
        return folder


def _check_same(root: str, found: Any, wanted: dict[str, Any]) -> None:
    """Refuse answers that were given for something else, and say what changed."""
    if found == wanted:
        return
    advice = (
        f"its scores are not trusted; {option('restart', True)} forgets them, or choose another "
        "output"
    )
    if not isinstance(found, dict):
        raise ResumeError(f"{printable(root)}: is of another kind of search; {advice}")
    changed: list[str] = []
    before, now = found.get("ingredients"), wanted["ingredients"]
    if before != now:
        changed.append(_what_changed(before, now))
    for key in wanted:
        if key != "ingredients" and found.get(key) != wanted[key]:
            names = {
                "task": "the task",
                "code": "the code of the task",
                "model": "the model",
                "points": "the grid, or another parameter,",
                "granularity": option("granularity", cli="per"),
                "side_files": "what lies beside the weights of the first ingredient",
            }
            changed.append(names.get(key, option(key)))
    if "the task" in changed and "the code of the task" in changed:
        changed.remove("the code of the task")
    raise ResumeError(
        f"{printable(root)}: holds an unfinished search, and since then {', '.join(changed)} "
        f"changed; "
        f"{advice}"
    )


def _what_changed(before: Any, now: Sequence[Any]) -> str:
    """Name the ingredients that are not the ones of before."""
    if not isinstance(before, list) or [each[0] for each in before] != [each[0] for each in now]:
        return "the list of ingredients"
    names = [new[0] for old, new in zip(before, now, strict=True) if old != new]
    return f"the ingredient{'s' if len(names) > 1 else ''} {some(names)}"
