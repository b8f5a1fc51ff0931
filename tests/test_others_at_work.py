"""Several runs at once on the same files: one wins, and unfinished work is only its owner's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from checkpoints import random_model, save
from commands import (
    IS_ROOT,
    MANY,
    finish,
    large,
    run,
    small,
    start,
    wait_for_work,
)

from streamsoup.errors import OutputError, OutputExistsError
from streamsoup.methods.fixed import uniform
from streamsoup.output.destination import check_replaceable
from streamsoup.output.staging import Staging
from streamsoup.search.folder import lock_folder
from streamsoup.system import folders

# -- a second run ---------------------------------------------------------------------------------


def test_one_of_several_wins(tmp_path: Path) -> None:
    """Of several runs on one output one wins; the others say who holds it, or that it exists."""
    a = small(tmp_path / "a")
    for n in range(3):
        runs = [start("uniform", a, a, "-o", tmp_path / f"soup-{n}") for _ in range(4)]
        ends = [finish(each) for each in runs]
        assert sorted(status for status, _ in ends) == [0, 1, 1, 1]
        for status, stderr in ends:
            if status:
                assert "is being written by process" in stderr or "exists already" in stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "soup-0", "soup-1", "soup-2"]


def test_neighbours_do_not_disturb(tmp_path: Path) -> None:
    """Runs on different outputs in one folder all succeed."""
    a = small(tmp_path / "a")
    runs = [start("uniform", a, a, "-o", tmp_path / "new" / f"soup-{n}") for n in range(4)]
    assert [finish(each)[0] for each in runs] == [0, 0, 0, 0]


def child_of(pid: int) -> int:
    """Return the process that does a command's work."""
    (child,) = psutil.Process(pid).children()
    return child.pid


def lives(pid: int) -> bool:
    """Return True if a process runs; one that has ended may still have a name."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_holder_is_named_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    """A second run names process and host; after a SIGKILL of the first, it just goes on."""
    a = large(tmp_path / "a")
    first = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    pid = wait_for_work(tmp_path / "soup.partial")
    status, stderr = run("uniform", *[a] * MANY, "-o", tmp_path / "soup")
    assert status == 1
    assert f"is being written by process {pid} on {os.uname().nodename} since 20" in stderr
    first.send_signal(signal.SIGKILL)  # the parent; its child must not live on
    first.wait()
    deadline = time.monotonic() + 10  # it may have to wait for the disk before it can die
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    second = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "1")
    deadline = time.monotonic() + 10
    while wait_for_work(tmp_path / "soup.partial") == pid and time.monotonic() < deadline:
        time.sleep(0.01)  # what the dead one wrote is there until the next takes the lock
    assert wait_for_work(tmp_path / "soup.partial") == child_of(second.pid)
    os.killpg(second.pid, signal.SIGINT)
    assert finish(second)[0] == 130


def test_a_lock_of_somebody_else_says_nothing_to_the_terminal(tmp_path: Path) -> None:
    """What stands in it is shown, and not obeyed."""
    a = save(tmp_path / "a", random_model(1))
    (tmp_path / "soup.partial").mkdir()
    lock = tmp_path / "soup.partial" / "lock"
    lock.write_text(json.dumps({"pid": 1, "host": "\x1b]0;x\x07\x1b[2J", "since": "\x1b" * 99}))
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, stderr = run("uniform", a, a, "-o", tmp_path / "soup")
    assert (status, stderr.count("\n")) == (1, 1)
    assert r"is being written by process 1 on \x1b]0;x\x07\x1b[2J since" in stderr
    assert stderr.strip().isprintable()


@pytest.mark.parametrize("mode", [0o777, 0o775, None])
def test_work_of_others_is_not_believed(tmp_path: Path, mode: int | None) -> None:
    """Where another user may have written into it, unfinished work would be made part of a soup."""
    a = small(tmp_path / "a")
    uniform([a], output=tmp_path / "before")
    work = tmp_path / "soup.partial"
    work.mkdir(mode=0o700)
    if mode is not None:
        work.chmod(mode)
        who = "may be written to by others"
    elif IS_ROOT:
        os.chown(work, 1234, 1234)
        who = "belongs to user 1234"
    else:
        pytest.skip("only root may give things away")
    (work / "journal").touch()
    status, stderr = run("uniform", a, a, "-o", tmp_path / "soup")
    assert (status, stderr.count("\n")) == (1, 1)
    assert f"{work}: {who}, so its content is not trusted" in stderr
    assert os.listdir(work) == ["journal"]
    work.rename(tmp_path / "soup.search")
    with pytest.raises(OutputError, match=f"{who}, so its scores are not believed"):
        lock_folder(str(tmp_path / "soup.search"), private=True)


def test_file_systems_without_owners_and_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all folders belong to one and are open to all, as on some disks, ours are ours too."""
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    mkdir = os.mkdir

    def with_no_modes(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        os.chmod(path, 0o777, dir_fd=dir_fd)

    with folders.Folder.open(str(tmp_path)) as above, above.folder("work") as opened:
        assert folders.other_writer(opened, above) == "may be written to by others"
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        assert folders.other_writer(opened, above) == "may be written to by others"
        monkeypatch.setattr(os, "mkdir", with_no_modes)
        assert folders.other_writer(opened, above) == ""
    assert os.listdir(tmp_path) == ["work"]


def test_unfinished_work_is_nobody_elses(tmp_path: Path) -> None:
    """Whatever the umask, others can neither write into it nor look."""
    before = os.umask(0)
    try:
        with Staging(str(tmp_path / "soup"), "x", overwrite=False) as staging:
            assert os.stat(staging.root).st_mode & 0o777 == 0o700
            assert os.stat(staging.soup.path).st_mode & 0o777 == 0o777  # what will be the soup
    finally:
        os.umask(before)


def test_what_cannot_be_replaced_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's soup in a sticky folder, and a folder that is mounted over itself."""
    soup = small(tmp_path / "shared" / "soup")
    (tmp_path / "shared").chmod(0o1777)
    check_replaceable(str(soup))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4321)
        with pytest.raises(OutputExistsError, match="only its owner may replace it"):
            check_replaceable(str(soup))
    if not IS_ROOT or subprocess.run(["mount", "--bind", soup, soup], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with pytest.raises(OutputExistsError, match="is a mount point"):
            check_replaceable(str(soup))
    finally:
        subprocess.run(["umount", soup], check=True)


def test_a_lock_that_says_nobodys_name_is_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the holder cannot be noted: a search goes on, and lets go in the end."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        folder, lock = lock_folder(str(tmp_path / "search"))
        lock.close()
        folder.close()
