"""The way an output comes to be: whole, or not at all.

All work happens in ``OUT.partial``, a folder beside the output and on its file system::

    OUT.partial/lock      held by the one run that works here; says who
    OUT.partial/journal   what is finished, for the same command run again
    OUT.partial/soup/     the output-to-be

When every byte is on disk, one rename puts ``soup/`` in place (an exchange, where an old output is
replaced), and the rest is removed. A kill at any instant leaves the old output, or none, or the
new one; what is left in ``OUT.partial`` is finished, or cleaned up, by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import time
from types import TracebackType

from streamsoup.errors import (
    ChangedIngredientError,
    MismatchError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    printable,
)
from streamsoup.output.destination import check_replaceable, exists_already
from streamsoup.output.journal import Journal
from streamsoup.recipe import PROVENANCE_NAME
from streamsoup.system.folders import (
    EXCHANGE,
    NO_REPLACE,
    is_movable,
    make_private,
    remove_any,
    rename,
    stranger,
    sync_folder,
    unlock,
)

__all__ = ["Staging"]

log = logging.getLogger("streamsoup")

DYING_S = 30.0
"""How long to wait for the lock of a run that was killed: it may hang in one last fsync."""

_HOPELESS = (ChangedIngredientError, MismatchError, NonFiniteError)
"""Errors after which unfinished work is worth nothing: the same command would fail again."""

_KINDS = {"lock": stat.S_ISREG, "journal": stat.S_ISREG, "soup": stat.S_ISDIR, "old": stat.S_ISDIR}
"""All that a work folder of ours may hold."""


class Staging:
    """The work folder of one output, held by this run."""

    def __init__(self, target: str, fingerprint: str, *, overwrite: bool) -> None:
        """Take the work folder of the output at the real path `target`.

        `fingerprint` says what is to be made: unfinished work of another is removed. Raises
        `OutputExistsError` for an output that is not to be replaced, `OutputBusyError` if another
        run is at it, `ResumeError` if its journal is damaged, and `OutputError` if something else
        has the folder's name.
        """
        self.target = target
        self.root = target + ".partial"
        self.folder = os.path.join(self.root, "soup")
        """Where the output is made."""
        self.finished = False
        """Whether an earlier run put this very output in place, and only tidying up is left."""
        self.complete: str | None = None
        """Digest of the provenance, if all is made and only the rename is left."""
        self._overwrite = overwrite
        self._made: list[str] = []
        self._lock = -1
        self._journal: Journal | None = None
        try:
            self._take()
            self._journal = Journal(os.path.join(self.root, "journal"))
            self._begin(fingerprint)
        except BaseException as error:
            self._leave(error)
            raise

    @property
    def journal(self) -> Journal:
        """What is finished."""
        assert self._journal is not None
        return self._journal

    def __enter__(self) -> Staging:
        """Give the staging itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the folder; what the same command can go on from stays."""
        self._leave(error)

    def commit(self, provenance_digest: str) -> None:
        """Put the finished folder in place. Every file in it must be on disk already.

        The digest of its provenance tells a later run, should this one be killed just now,
        whether the rename had happened.
        """
        sync_folder(self.folder)
        if self._committed() != provenance_digest:
            self.journal.append({"commit": provenance_digest})
        self._rename()
        sync_folder(os.path.dirname(self.target))
        sync_folder(self.root)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder and all that is in it, and let go of it."""
        try:
            self._clear()
        except OSError as error:
            where = printable(self.root)
            log.warning("%s: cannot be removed: %s; do so yourself", where, error.strerror)

    def _clear(self) -> None:
        try:
            if self._journal is not None:
                self._journal.close()  # it may be for want of descriptors that we have to
            for name in ("soup", "old", "journal", "lock"):
                remove_any(os.path.join(self.root, name))
            os.rmdir(self.root)
            try:
                sync_folder(os.path.dirname(self.root))
            finally:
                self._remove_made()
        except OSError as error:
            # Not empty: another run has begun, or a stranger's file is in.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            self._let_go()

    def _remove_made(self) -> None:
        """Remove the folders above that we made, as far as they are empty."""
        try:
            for folder in reversed(self._made):
                os.rmdir(folder)
        except OSError as error:
            # The output is there, or another run has begun, or has taken the folder away.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def _leave(self, error: BaseException | None) -> None:
        """Let go of the work folder; after an error, remove it unless it is worth keeping."""
        if isinstance(error, Exception):
            with contextlib.suppress(OSError):  # the error at hand says more
                if self._lock < 0:
                    self._remove_made()
                elif isinstance(error, _HOPELESS) or not self.holds_work():
                    self._clear()
        self._let_go()

    def holds_work(self) -> bool:
        """Whether a later run could go on from what is here."""
        if self._journal is None:
            return os.path.lexists(os.path.join(self.root, "journal"))
        return self._lock >= 0 and self._journal.n_records > 1

    def _take(self) -> None:
        """Make the folder, and lock it against every other run."""
        deadline = time.monotonic() + DYING_S
        while True:
            self._make_root()
            path = os.path.join(self.root, "lock")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self._lock = os.open(path, flags, 0o666)
            except FileNotFoundError:
                continue  # another run just tidied up
            except OSError:
                with contextlib.suppress(OSError):
                    os.rmdir(self.root)  # if empty: no trace of what could not begin
                raise
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_holder(self._lock)
                self._let_go()
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise OutputBusyError(_busy(self.target, holder)) from None
                time.sleep(0.02)
                continue
            try:
                same = os.stat(path).st_ino == os.fstat(self._lock).st_ino
            except FileNotFoundError:
                same = False
            if same:
                break
            self._let_go()
        holder = {"pid": os.getpid(), "supervisor": os.getppid(), "host": os.uname().nodename}
        holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(holder).encode(), 0)
        except OSError:
            pass  # locked all the same; others will not learn by whom

    def _make_root(self, attempts: int = 10) -> None:
        """Make the work folder, or accept one that is ours."""
        try:
            self._make_folder(os.path.dirname(self.root))
            make_private(self.root)
        except FileExistsError:
            self._check_ours()
        except OSError as error:
            if error.errno == errno.ENOENT and attempts > 1:
                # A run that could not begin has just removed the folders that it had made.
                return self._make_root(attempts - 1)
            raise OutputError(
                f"{printable(self.target)}: cannot be made: {error.strerror}; "
                "choose another folder, or make this one possible"
            ) from None

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
        sync_folder(os.path.dirname(path))

    def _check_ours(self) -> None:
        """Raise `OutputError` unless the work folder is of a run of ours."""
        where = printable(self.root)
        try:
            who = stranger(self.root) if os.path.isdir(self.root) else ""
        except FileNotFoundError:
            return  # another run just tidied up
        if who:
            raise OutputError(
                f"{where}: {who}, so what is in it is not believed; a run may be at work there: "
                "wait for it, choose another output, or remove that folder"
            )
        if not self._is_ours():
            raise OutputError(f"{where}: is in the way and not ours; move it elsewhere")

    def _is_ours(self) -> bool:
        """Whether the work folder holds nothing but what a run leaves there."""
        names: list[str] = []
        try:
            if not stat.S_ISDIR(os.lstat(self.root).st_mode):
                return False
            names = os.listdir(self.root)
            for name in names:
                status = os.lstat(os.path.join(self.root, name))
                if name not in _KINDS or not _KINDS[name](status.st_mode):
                    return False
                # A second link to a file of ours would let us write where we must not.
                if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                    return False
            with open(os.path.join(self.root, "lock"), "rb") as file:
                content = file.read(4096).strip(b"\0")
        except FileNotFoundError:
            return not names or "journal" in names  # a run is tidying up, or was killed at it
        return not content or content.startswith(b'{"pid"')

    def _begin(self, fingerprint: str) -> None:
        """Find out what the folder holds, and make it ready for this output."""
        old = os.path.join(self.root, "old")
        if os.path.lexists(old):
            if os.path.lexists(self.target):
                remove_any(old)
            else:  # killed between the two renames that stand in for an exchange
                os.rename(old, self.target)
        ours = self.journal.first.get("fingerprint") == fingerprint
        digest = self._committed()
        in_place = digest is not None and _provenance_digest(self.target) == digest
        if in_place and ours:
            sync_folder(os.path.dirname(self.target))  # the kill may have come before
            self.finished = True
            return
        if os.path.lexists(self.target) and not self._overwrite:
            if in_place:
                self.discard()
            raise exists_already(self.target)
        if os.path.lexists(self.target) and not is_movable(self.target, self.root):
            raise OutputError(f"{_immovable(self.target)} and run again")
        if ours and digest is not None and _provenance_digest(self.folder) == digest:
            self.complete = digest
            return
        if not ours:
            remove_any(self.folder)
            self.journal.close()
            remove_any(self.journal.path)
            self._journal = Journal(self.journal.path)
            self.journal.append({"fingerprint": fingerprint})
        os.makedirs(self.folder, exist_ok=True)
        sync_folder(self.root)
        sync_folder(os.path.dirname(self.root))

    def _committed(self) -> str | None:
        """Give the digest of the provenance that was about to be put in place, if one was."""
        last = self.journal.last
        return str(last["commit"]) if "commit" in last else None

    def _rename(self) -> None:
        """Put the folder in place, in one step wherever the file system has one."""
        if not os.path.lexists(self.target):
            try:
                done = rename(self.folder, self.target, NO_REPLACE)
            except FileExistsError:
                raise _made_meanwhile(self.target) from None
            if not done:
                os.rename(self.folder, self.target)
            return
        if not self._overwrite:
            raise _made_meanwhile(self.target)
        check_replaceable(self.target)
        try:
            if rename(self.folder, self.target, EXCHANGE):
                return
            # No exchange here (some network file systems): for an instant there is no output, and
            # a kill just then is mended by the next run, which finds the old one.
            os.rename(self.target, os.path.join(self.root, "old"))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise OutputError(
                f"{_immovable(self.target)} and run the same command again, which then only has to "
                "put the finished soup in place"
            ) from None
        os.rename(self.folder, self.target)

    def _let_go(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            unlock(lock)


def _immovable(target: str) -> str:
    return (
        f"{printable(target)}: cannot be replaced in one step, as nothing can that lies in a lower "
        "layer of an overlay file system; choose another folder, or remove it yourself"
    )


def _made_meanwhile(target: str) -> OutputExistsError:
    return OutputExistsError(
        f"{printable(target)}: was made by somebody else meanwhile; the soup is finished beside "
        "it, and the same command with --overwrite puts it in place"
    )


def _provenance_digest(folder: str) -> str | None:
    from streamsoup.engine.digest import digest_file

    try:
        return digest_file(os.path.join(folder, PROVENANCE_NAME))
    except OSError:
        return None


def _read_holder(descriptor: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    """Whether the run that holds a lock is at work, rather than being torn down after a kill."""
    import psutil

    if holder.get("host") != os.uname().nodename:
        return bool(holder)
    for key in ("pid", "supervisor"):
        pid = holder.get(key)
        try:
            if not isinstance(pid, int) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.Error:
            return False
    return True


def _busy(target: str, holder: dict[str, object]) -> str:
    who = "another run"
    if holder:
        pid, host, since = (printable(holder.get(key), 60) for key in ("pid", "host", "since"))
        who = f"process {pid} on {host} since {since}"
    return f"{printable(target)}: is being written by {who}; wait for it, or stop it"
