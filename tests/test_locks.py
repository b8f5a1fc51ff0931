"""The lock of a folder: one holder, whatever the others do meanwhile and whatever flock says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamsoup.system import locks
from streamsoup.system.folders import Folder
from streamsoup.system.locks import HeldError, Holder, Lock


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """Return an open folder."""
    with Folder.open(str(tmp_path)) as folder:
        yield folder


def test_one_holds_it_and_says_who(folder: Folder, tmp_path: Path) -> None:
    """A second lock is refused with the first one's name; given back, it is free and nameless."""
    with Lock(folder):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(HeldError, match=f"process {os.getpid()} on .* since 20"):
            Lock(folder)
    assert (tmp_path / "lock").read_text() == ""
    Lock(folder).close()


@pytest.mark.parametrize("checked", [True, False])
def test_a_lock_that_was_removed_in_between_is_no_lock(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Forced: between our open and our flock the file is removed, and a new one locked by a third.

    Without the check of the inode (planted) two hold the lock.
    """
    first, third = Lock(folder), None
    flock, n_calls = fcntl.flock, 0

    def interrupted(descriptor: int, how: int) -> None:
        nonlocal n_calls, third
        n_calls += 1
        if n_calls == 1:
            first.remove()
            first.close()  # these call flock, too, and do not count
            third = Lock(folder)
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", interrupted)
    if not checked:
        monkeypatch.setattr(locks.os.path, "samestat", lambda one, other: True)
        monkeypatch.setattr(Holder, "surely_lives", False)
        Lock(folder).close()  # two hold it
    else:
        with pytest.raises(HeldError):
            Lock(folder)
    assert third is not None
    assert third.descriptor >= 0
    third.close()


def test_a_removed_lock_is_seen_as_removed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: the holder removes the file and makes no new one: the next makes one and holds it."""
    first = Lock(folder)
    flock, removed = fcntl.flock, []

    def interrupted(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(True)
            first.remove()
            first.close()
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", interrupted)
    with Lock(folder) as lock:
        assert os.path.samestat(os.fstat(lock.descriptor), os.stat(folder.path + "/lock"))


@pytest.mark.parametrize("plant", ["symbolic", "hard", "fifo", "text"])
def test_what_is_no_lock_of_ours_is_not_written(folder: Folder, tmp_path: Path, plant: str) -> None:
    """A link of either kind, a FIFO, or somebody's text under the name is refused, untouched."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    path = tmp_path / "lock"
    if plant == "symbolic":
        path.symlink_to(mine)
    elif plant == "hard":
        path.hardlink_to(mine)
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("my own lock")
    with pytest.raises(OSError):  # noqa: PT011 - a link has another number than the rest
        Lock(folder)
    assert mine.read_text() == "precious"
    assert plant != "text" or path.read_text() == "my own lock"


def test_where_everybody_is_given_the_lock_names_count(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a flock that always succeeds, a living process of this machine still holds it.

    A dead one, or one whose number was given out anew, does not.
    """
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: None)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = json.loads(Holder.this()) | {"pid": sleeper.pid, "supervisor": os.getpid()}
    record["started"] = locks._started(sleeper.pid)
    path = tmp_path / "lock"
    try:
        path.write_text(json.dumps(record))
        with pytest.raises(HeldError, match=f"process {sleeper.pid} on"):
            Lock(folder)
        path.write_text(json.dumps(record | {"started": 1}))
        Lock(folder).close()
    finally:
        sleeper.communicate(b"\n")
    path.write_text(json.dumps(record))
    Lock(folder).close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_names_are_the_lock(
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    """Where there is no flock, work goes on with a warning, but for a run named elsewhere."""

    def missing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    Lock(folder).close()
    assert "the file system cannot lock files" in caplog.text
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(HeldError, match=r"cannot lock: .*remove .*/lock"):
        Lock(folder)


@pytest.mark.parametrize("text", ["[" * 4000, "{", "[1]", '{"pid": {}, "host": 3}', "\0\0", '"x"'])
def test_a_record_may_be_anything(text: str) -> None:
    """What stands in a lock is parsed without trouble, whatever it is."""
    holder = Holder(text.encode())
    assert not holder.surely_lives
    assert str(holder)
