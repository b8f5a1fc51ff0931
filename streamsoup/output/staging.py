"""The work folder of an output, which appears whole or not at all.

All work happens in ``OUT.partial``, a folder beside the output and on its file system::

    OUT.partial/lock             held by the one run that works here; names it
    OUT.partial/work-…/          of one run; its name is random
    OUT.partial/work-…/journal   what is finished, for the same command run again
    OUT.partial/work-…/soup/     the output-to-be
    OUT.partial/work-…/taken-…/  the output-to-be of an earlier run, from which files are taken
    OUT.partial/work-…/old/      the old output, for an instant, where folders cannot be exchanged

When every byte is on disk, one rename puts ``soup/`` in place (an exchange, where an old output is
replaced), and the rest is removed. A kill at any instant leaves the old output, or none, or the
new one; what is left in ``OUT.partial`` is finished, or cleaned up, by the next run.

Two runs never mix, even if both get the lock (some network file systems grant it to both):

1. A run makes files only in the ``soup`` folder that it made itself, in a work folder whose name is
   random. It holds both open, and reaches all in them by their descriptors.
2. Work of an earlier run is taken over by renaming its ``soup`` to ``taken-…`` in the work folder
   of the new one. One rename of a name succeeds, so one run takes it.
3. A run puts its work in place by renaming ``soup`` out of its own work folder, by descriptor. If
   it was taken over, that name is gone, the rename fails, and so does the run. If the rename came
   first, there is nothing to take. So what is put in place is the folder of 1, and nothing was
   taken out of it: work is only ever removed after it was taken.
4. What is taken over is moved, file by file, into the new run's own ``soup``, and only where the
   journal names the same recipe, ingredients and headers. A run that lost it may still hold files
   of it open, and goes on writing: to the same places the same bytes, as these are a function of
   what was compared. No run ever shrinks a file (`FileSink` makes a new one instead).
5. Side files are not taken over, but written again.

So each output in place is the work of one run, or of several that write the same bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from streamsoup.errors import (
    ChangedIngredientError,
    MismatchError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    option,
    printable,
)
from streamsoup.output.destination import check_replaceable, exists_already
from streamsoup.output.journal import Journal, records_of
from streamsoup.recipe import PROVENANCE_LIMIT, PROVENANCE_NAME
from streamsoup.system.folders import Folder, is_movable, other_writer
from streamsoup.system.libc import EXCHANGE, NO_REPLACE, rename
from streamsoup.system.locks import HeldError, Lock
from streamsoup.system.regular import read_file

__all__ = ["Staging", "move_files"]

log = logging.getLogger("streamsoup")

DYING_S = 30.0
"""How long to wait for the lock of a run that was killed: it may hang in one last fsync."""

_HOPELESS = (ChangedIngredientError, MismatchError, NonFiniteError)
"""Errors after which unfinished work is useless: the same command would fail again."""

_WORK = "work-"
"""Prefix of the names of work folders."""

_TAKEN = "taken-"
"""Prefix of the names of folders taken over from earlier runs."""

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


class _Earlier:
    """The work folder of an earlier run, as its journal describes it."""

    def __init__(self, root: Folder, name: str) -> None:
        """Read the journal. Raises `ResumeError` if it is damaged."""
        self.name = name
        self.fingerprint: object = None
        self.committed: str | None = None
        """Digest of the provenance that was about to be put in place, if one was."""
        self.n_records = 0
        with root.folder(name) as work:
            for record in records_of(work):
                if not self.n_records:
                    self.fingerprint = record.get("fingerprint")
                self.committed = str(record["commit"]) if "commit" in record else None
                self.n_records += 1


class Staging:
    """The work folder of one output, held by this run."""

    def __init__(
        self,
        target: str,
        fingerprint: str,
        *,
        overwrite: bool,
        is_current: Callable[[Folder], bool] = lambda folder: True,
    ) -> None:
        """Lock the work folder of an output, and take over earlier work of the same fingerprint.

        Args:
            target: Real path of the output.
            fingerprint: Digest of what is to be made; unfinished work of another is removed.
            overwrite: Replace an existing output.
            is_current: Called with the folder of a finished soup of the same fingerprint; returns
                True if its side files are the ones that would be written now.

        Raises:
            OutputExistsError: An output exists that is not to be replaced.
            OutputBusyError: Another run is writing it.
            ResumeError: The journal of unfinished work is damaged.
            OutputError: Something else has the folder's name.
        """
        self.target = target
        self.root = target + ".partial"
        self.finished = False
        """True if an earlier run put this very output in place, and only cleaning up is left."""
        self.complete: str | None = None
        """Digest of the provenance, if everything is made and only the rename is left."""
        self._overwrite = overwrite
        self._is_current = is_current
        self._name = os.path.basename(target)
        self._made: list[str] = []
        self._above: Folder | None = None
        self._root: Folder | None = None
        self._work: Folder | None = None
        self._soup: Folder | None = None
        self._lock: Lock | None = None
        self._journal: Journal | None = None
        self._mine = f"{_WORK}{os.urandom(8).hex()}"
        self._earlier: list[_Earlier] = []
        self._n_taken = 0
        try:
            self._take()
            self._begin(fingerprint)
        except BaseException as error:
            self._leave(error)
            raise

    @property
    def journal(self) -> Journal:
        """The journal of finished leaves."""
        assert self._journal is not None
        return self._journal

    @property
    def soup(self) -> Folder:
        """The folder in which the output is made."""
        assert self._soup is not None
        return self._soup

    def __enter__(self) -> Staging:
        """Return the staging itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the folder; work that the same command can resume stays."""
        self._leave(error)

    def commit(self, provenance_digest: str) -> None:
        """Put the finished folder in place. Every file in it must be on disk already.

        The digest of its provenance lets a later run detect the rename, if this run is killed just
        after it. Raises `OutputExistsError` if an output was made meanwhile, and
        `OutputBusyError` if another run has taken this work over.
        """
        assert self._above is not None
        assert self._root is not None
        self.soup.sync()
        if self.journal.last.get("commit") != provenance_digest:
            self.journal.append({"commit": provenance_digest})
        self._put_in_place()
        self._above.sync()
        self._root.sync()
        self.discard()

    def discard(self) -> None:
        """Remove the work folder with its content, and release it."""
        try:
            self._clear()
        except OSError as error:
            where = printable(self.root)
            log.warning("%s: cannot be removed: %s; remove it yourself", where, error.strerror)

    def holds_work(self) -> bool:
        """Return True if a later run could resume what is here."""
        if self._lock is None:
            return os.path.lexists(self.root)
        mine = self._journal is not None and self._journal.n_records > 1
        return mine or any(each.n_records > 1 for each in self._earlier)

    # -- taking the folder ------------------------------------------------------------------------

    def _take(self) -> None:
        """Open the folder, lock it against every other run, and make a work folder in it."""
        while self._work is None:
            self._open_root()
            assert self._root is not None
            try:
                self._lock = Lock(self._root, patience_s=DYING_S)
                self._work = self._root.make(self._mine, 0o700)
            except FileNotFoundError:
                self._let_go()  # another run just tidied up
            except HeldError as error:
                raise OutputBusyError(
                    f"{printable(self.target)}: is being written by {error}; wait for it, or stop "
                    "it"
                ) from None
            except OSError:
                with suppress(OSError):  # no trace of what could not begin
                    if self._lock is not None:
                        self._root.remove(self._mine)
                        self._lock.remove()
                    self._remove_root()
                raise

    def _open_root(self) -> None:
        """Open ``OUT.partial``, made if it does not exist; refuse one of another origin."""
        name = os.path.basename(self.root)
        attempts = 10
        while self._root is None:
            attempts -= 1
            try:
                self._make_folder(os.path.dirname(self.root))
                self._above = Folder.open(os.path.dirname(self.root))
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=self._above.descriptor)
                status = self._above.status(name)
                if status is not None and not stat.S_ISDIR(status.st_mode):
                    raise self._in_the_way()
                self._root = self._above.folder(name)
            except OutputError:
                raise
            except OSError as error:
                if self._above is not None:
                    self._above.close()
                # Another run that could not begin may have removed the folders that it had made.
                if error.errno == errno.ENOENT and attempts:
                    continue
                raise OutputError(
                    f"{printable(self.target)}: cannot be made: {error.strerror}; "
                    "choose another folder, or make this one possible"
                ) from None
        self._check_ours()

    def _make_folder(self, path: str) -> None:
        """Make a folder and those above it, durably; note those that were missing."""
        if os.path.isdir(path):
            return
        self._make_folder(os.path.dirname(path))
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, f"{printable(path)} is a file") from None
            return
        if path not in self._made:
            self._made.append(path)
        with Folder.open(os.path.dirname(path)) as above:
            above.sync()

    def _check_ours(self) -> None:
        """Raise `OutputError` unless the open folder was made by a run of this user."""
        assert self._root is not None
        assert self._above is not None
        who = other_writer(self._root, self._above)
        if who:
            raise OutputError(
                f"{printable(self.root)}: {who}, so its content is not trusted; a run may be at "
                "work there: wait for it, choose another output, or remove that folder"
            )
        for name in self._root.names():
            status = self._root.status(name)
            if status is None:
                continue  # another run is tidying up
            # Writing to a file with a second link would change a file elsewhere.
            lone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            work = stat.S_ISDIR(status.st_mode) and name.startswith(_WORK)
            if not (work or (lone and name == "lock")):
                raise self._in_the_way()

    def _in_the_way(self) -> OutputError:
        where = printable(self.root)
        return OutputError(
            f"{where}: is in the way and was not made by streamsoup; move it elsewhere"
        )

    # -- what earlier runs left -------------------------------------------------------------------

    def _begin(self, fingerprint: str) -> None:
        """Read what earlier runs left, and prepare the folder for this output."""
        assert self._root is not None
        assert self._work is not None
        assert self._above is not None
        names = [name for name in self._root.names() if name.startswith(_WORK)]
        others = [name for name in names if name != self._mine]
        for name in others:
            with suppress(FileNotFoundError):  # its run, which no lock kept out, is tidying up
                self._put_back(name)
                self._earlier.append(_Earlier(self._root, name))
        self._journal = Journal(os.path.join(self._work.path, "journal"), self._work)
        there = provenance_digest(self._above, self._name)
        in_place = [e for e in self._earlier if e.committed is not None and e.committed == there]
        if any(each.fingerprint == fingerprint for each in in_place):
            with self._above.folder(self._name) as soup:
                self.finished = self._is_current(soup)
            if self.finished:
                self._above.sync()  # the kill may have come before
                return
        if self._above.status(self._name) is not None:
            if not self._overwrite:
                if in_place:
                    self.discard()
                raise exists_already(self.target)
            if not is_movable(self._above, self._name, self._root, self._mine):
                raise OutputError(f"{_immovable(self.target)} and run again")
        # Of a soup in place, what is left is the output that it replaced.
        unfinished = [each for each in self._earlier if each not in in_place]
        self._start(fingerprint, [e for e in unfinished if e.fingerprint == fingerprint])

    def _put_back(self, name: str) -> None:
        """Undo the first of the two renames that replace an exchange, after a kill between them."""
        assert self._root is not None
        assert self._above is not None
        with self._root.folder(name) as work:
            if work.status("old") is None:
                return
            if self._above.status(self._name) is None:
                work.move("old", self._above, self._name)
            else:
                work.remove("old")

    def _start(self, fingerprint: str, same: Sequence[_Earlier]) -> None:
        """Begin a journal with all notes of earlier runs, then take over their files.

        In this order: a kill in between must lose neither.
        """
        assert self._root is not None
        assert self._work is not None
        assert self._above is not None
        self.journal.append({"fingerprint": fingerprint})
        for each in same:
            with suppress(FileNotFoundError), self._root.folder(each.name) as work:
                for record in records_of(work):
                    if "leaves" in record:
                        self.journal.append(record, wait=False)
        self.journal.sync()
        self._work.sync()
        self._root.sync()
        for each in same:
            for name in self._claim(each.name):
                if self._soup is None and self._is_complete(each, name):
                    self._work.move(name, self._work, "soup")
                    self._soup = self._work.folder("soup")
                    self.complete = each.committed
        if self._soup is None:
            self._soup = self._work.make("soup")
        self._move_taken()
        self._work.sync()
        self._remove_earlier()
        self._root.sync()
        self._above.sync()

    def _claim(self, other: str) -> list[str]:
        """Rename the folders of an earlier run into this work folder; return their new names."""
        assert self._root is not None
        assert self._work is not None
        claimed = []
        with suppress(FileNotFoundError), self._root.folder(other) as work:
            for name in work.names():
                if name == "soup" or name.startswith(_TAKEN):
                    new = f"{_TAKEN}{self._n_taken}"
                    self._n_taken += 1
                    with suppress(FileNotFoundError):  # its run has just put it in place
                        work.move(name, self._work, new)
                        claimed.append(new)
        return claimed

    def _is_complete(self, each: _Earlier, name: str) -> bool:
        """Return True if a folder that was taken over is a whole soup, as it would be made now."""
        assert self._work is not None
        digest = each.committed
        if digest is None or provenance_digest(self._work, name) != digest:
            return False
        with self._work.folder(name) as taken:
            return self._is_current(taken)

    def _move_taken(self) -> None:
        """Move files that were taken over into the soup folder, unless it has one of that name.

        Links, and files with a second name, are left out: writing would change other files.
        """
        assert self._work is not None
        names = [name for name in self._work.names() if name.startswith(_TAKEN)]
        for name in names:
            if self.complete is None:
                with self._work.folder(name) as taken:
                    move_files(taken, self.soup)
        self.soup.sync()
        for name in names:
            self._work.remove(name)

    # -- the last step ----------------------------------------------------------------------------

    def _put_in_place(self) -> None:
        """Put the folder in place, in one step wherever the file system has one."""
        assert self._above is not None
        assert self._work is not None
        folders = {
            "source_folder": self._work.descriptor,
            "target_folder": self._above.descriptor,
        }
        before = self._above.status(self._name)
        if before is None:
            try:
                if not rename("soup", self._name, NO_REPLACE, **folders):
                    self._work.move("soup", self._above, self._name)
            except OSError as error:
                raise self._not_put(error) from None
            return
        if not self._overwrite:
            raise _made_meanwhile(self.target)
        check_replaceable(self.target)
        out = "soup"
        try:
            exchanged = rename("soup", self._name, EXCHANGE, **folders)
            if not exchanged:
                # No exchange here (some network file systems): for an instant there is no output;
                # after a kill just then the next run puts the old one back.
                out = "old"
                self._above.move(self._name, self._work, out)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise self._not_put(error) from None
            raise OutputError(
                f"{_immovable(self.target)} and run the same command again, which then only has to "
                "put the finished soup in place"
            ) from None
        after = self._work.status(out)
        if after is None or not os.path.samestat(before, after):
            # The output that may be replaced was itself replaced just now.
            if exchanged:
                rename("soup", self._name, EXCHANGE, **folders)
            else:
                self._work.move(out, self._above, self._name)
            raise _made_meanwhile(self.target)
        if not exchanged:
            try:
                self._work.move("soup", self._above, self._name)
            except OSError as error:
                with suppress(OSError):
                    rename("old", self._name, NO_REPLACE, **folders)
                raise self._not_put(error) from None

    def _not_put(self, error: OSError) -> OSError:
        """Return the error for a failed rename, explained if another run caused it."""
        if error.errno in _OCCUPIED:
            return _made_meanwhile(self.target)
        assert self._work is not None
        if error.errno == errno.ENOENT and self._work.status("soup") is None:
            return OutputBusyError(
                f"{printable(self.target)}: another run has taken this work over, as the file "
                "system did not lock it out; wait for that run, and start one at a time"
            )
        return error

    # -- tidying up -------------------------------------------------------------------------------

    def _clear(self) -> None:
        """Remove this run's work, and that of earlier runs; then the folder, if it is empty."""
        try:
            # The reason to clear may be that no descriptors are left.
            for each in (self._journal, self._soup):
                if each is not None:
                    each.close()
            if self._work is not None and self._root is not None and self._lock is not None:
                self._remove_earlier()
                taken = [f"{_TAKEN}{i}" for i in range(self._n_taken)]
                for name in ("soup", "old", "journal", *taken):
                    self._work.remove(name)
                self._work.close()
                self._root.remove(self._mine)
                if self._root.names() == ["lock"]:
                    self._lock.remove()
                self._remove_root()
        finally:
            self._let_go()

    def _remove_earlier(self) -> None:
        """Remove work folders of earlier runs, each after its folders were taken (step 3)."""
        assert self._root is not None
        assert self._work is not None
        earlier, self._earlier = self._earlier, []
        for each in earlier:
            for name in self._claim(each.name):
                self._work.remove(name)
            with suppress(FileNotFoundError):
                self._put_back(each.name)
                with self._root.folder(each.name) as work:
                    work.remove("journal")
                try:
                    # Not with what is in it: its run may have put the old output there just now.
                    os.rmdir(each.name, dir_fd=self._root.descriptor)
                except OSError as error:
                    if error.errno not in _OCCUPIED:
                        raise

    def _remove_root(self) -> None:
        """Remove ``OUT.partial`` if it is empty, and then the folders above that we made."""
        try:
            if self._above is not None and self._above.descriptor >= 0:
                os.rmdir(os.path.basename(self.root), dir_fd=self._above.descriptor)
                self._above.sync()
        except OSError as error:
            # Not empty: another run has begun, or a foreign file is in it.
            if error.errno in _OCCUPIED:
                return
            if error.errno != errno.ENOENT:
                raise
        finally:
            self._remove_made()

    def _remove_made(self) -> None:
        """Remove the folders above that we made, as far as they are empty."""
        try:
            for folder in reversed(self._made):
                os.rmdir(folder)
        except OSError as error:
            # The output is there, or another run has begun, or has taken the folder away.
            if error.errno not in (*_OCCUPIED, errno.ENOENT):
                raise

    def _leave(self, error: BaseException | None) -> None:
        """Release the work folder; after an error, remove it unless it can be resumed."""
        if isinstance(error, Exception):
            with suppress(OSError):  # the error at hand says more
                if self._lock is None:
                    self._remove_root()
                elif isinstance(error, _HOPELESS) or not self.holds_work():
                    self._clear()
                elif self._root is not None and self.journal.n_records <= 1:
                    self._root.remove(self._mine)
        self._let_go()

    def _let_go(self) -> None:
        """Close everything; a second time does nothing."""
        held = (self._journal, self._soup, self._work, self._lock, self._root, self._above)
        self._soup = self._work = self._lock = self._root = self._above = None
        for each in held:
            if each is not None:
                each.close()


def provenance_digest(above: Folder, name: str) -> str | None:
    """Return the digest of the provenance in a folder, or None if there is none."""
    from streamsoup.engine.digest import digest_bytes

    try:
        with above.folder(name) as folder:
            return digest_bytes(read_file(folder, PROVENANCE_NAME, PROVENANCE_LIMIT))
    except OSError:
        return None


def move_files(taken: Folder, to: Folder) -> None:
    """Move files out of a folder and the folders in it into another, which gets such folders.

    Names that are there already stay as they are.
    """
    for name in taken.names():
        status, there = taken.status(name), to.status(name)
        if status is None:
            continue
        if stat.S_ISDIR(status.st_mode):
            if there is None or stat.S_ISDIR(there.st_mode):
                with taken.folder(name) as inner, to.inside(name) as inside:
                    move_files(inner, inside)
                    inside.sync()
        elif there is None and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            taken.move(name, to, name)


def _immovable(target: str) -> str:
    return (
        f"{printable(target)}: cannot be replaced in one step, because it lies in a lower layer "
        "of an overlay file system; choose another folder, or remove it yourself"
    )


def _made_meanwhile(target: str) -> OutputExistsError:
    return OutputExistsError(
        f"{printable(target)}: was made by another run meanwhile; the soup is finished beside "
        f"it, and the same command with {option('overwrite', True)} puts it in place"
    )
