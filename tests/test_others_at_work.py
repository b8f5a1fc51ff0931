"""Others at work on the same files: a second run, a stranger's folder, links, a changing shard."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import content, random_model, save, tensor, unexpected

from streamsoup.errors import OutputError, OutputExistsError
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.methods.fixed import uniform
from streamsoup.options import Options
from streamsoup.output import staging
from streamsoup.output.destination import check_output, check_replaceable
from streamsoup.output.staging import Staging
from streamsoup.search.folder import lock_folder
from streamsoup.system import folders, libc

COMMAND = [sys.executable, "-m", "streamsoup"]
IS_ROOT = os.geteuid() == 0
MANY = 32
"""Ingredients of 2 GB that keep two threads busy for many seconds: a run that is to be caught at
work is caught, though it notes nothing in its first half second."""

_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """End the commands that a failing test left, which later tests would trip over."""
    yield
    while _started:
        with _started.pop() as process:  # waits for it, and closes its streams
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def small(folder: Path, seed: int = 0) -> Path:
    """Make a checkpoint of a few kB, with a side file."""
    rng = np.random.default_rng(seed)
    save(folder, {"weight": tensor(rng.standard_normal((30, 30)).astype("f4"))})
    (folder / "config.json").write_text("{}")
    return folder


def large(folder: Path, gigabytes: float = 2) -> Path:
    """Make a checkpoint of many zeros, which take no room on the disk."""
    folder.mkdir()
    path = folder / "model.safetensors"
    n = int(gigabytes * 2**30) // 4
    entry = {"weight": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}
    text = json.dumps(entry).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 4 * n)
    return folder


def start(
    *argv: str | Path, ignored: Sequence[signal.Signals] = (), **options: object
) -> subprocess.Popen[str]:
    """Start a command in a group of its own, as a terminal does, which ignores no other signals.

    The tests may be run by nohup, or in the background.
    """

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [*COMMAND, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
        **options,  # type: ignore[call-overload]
    )
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command; give its status and its stderr."""
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return process.returncode, unexpected(stderr)


def run(*argv: str | Path, **options: object) -> tuple[int, str]:
    """Run a command; give its status and its stderr."""
    return finish(start(*argv, **options))


def wait_for(path: Path) -> None:
    """Wait until a file is there and not empty."""
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_work(partial: Path) -> int:
    """Wait until a run has noted something; give the process that holds the lock."""
    deadline = time.monotonic() + 20
    while True:
        try:
            if any("leaves" in journal.read_text() for journal in partial.glob("work-*/journal")):
                return int(json.loads((partial / "lock").read_text())["pid"])
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listing(folder: Path) -> dict[str, tuple[float, int, bytes]]:
    """Read all files below a folder, with time and mode."""
    return {
        str(path): (path.stat().st_mtime, path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


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
    """Whether a process is there, and not just its name."""
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


def test_a_worker_that_is_stopped_by_itself_says_by_what(tmp_path: Path) -> None:
    """As some batch systems signal every process."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    os.kill(wait_for_work(tmp_path / "soup.partial"), signal.SIGTERM)
    status, stderr = finish(command)
    assert status == 143
    assert stderr.startswith("interrupted by SIGTERM")


def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    """When the working process is killed, the command says so in one line, and can be resumed."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    os.kill(wait_for_work(tmp_path / "soup.partial"), signal.SIGKILL)
    status, stderr = finish(command)
    assert status == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: the working process was killed by SIGKILL")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("whom", ["parent", "group"])
@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_stopped_by_a_signal(tmp_path: Path, whom: str, name: str, status: int) -> None:
    """Ctrl-C and its kin, twice in a row, end the run in two seconds and one line."""
    a = large(tmp_path / "a")
    command = start("uniform", *[a] * MANY, "-o", tmp_path / "soup", "--threads", "2")
    wait_for_work(tmp_path / "soup.partial")
    started = time.monotonic()
    for _ in range(2):
        kill = os.killpg if whom == "group" else os.kill
        kill(command.pid, getattr(signal, f"SIG{name}"))
    end = finish(command)
    assert time.monotonic() - started < 2
    assert end == (status, f"interrupted by SIG{name}; the same command goes on from there\n")
    assert not (tmp_path / "soup").exists()


def test_stopped_before_it_begins(tmp_path: Path) -> None:
    """Ctrl-C while the command line is still being imported ends in one line, too."""
    # The first thing the command line imports: this one is interrupted.
    (tmp_path / "click.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert run("uniform", "a", "-o", "b", env=os.environ | {"PYTHONPATH": path}) == (
        130,
        "interrupted\n",
    )


def test_nohup_is_respected(tmp_path: Path) -> None:
    """A signal that was ignored when the command started stays ignored."""
    a = small(tmp_path / "a")
    words = ("uniform", a, a, "-o", tmp_path / "soup")
    command = start(*words, ignored=[signal.SIGHUP, signal.SIGCHLD])
    for _ in range(20):
        command.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    assert finish(command) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| true", ">/dev/full"])
def test_without_standard_streams(tmp_path: Path, closed: str) -> None:
    """Closed, broken or full streams change nothing about the soup."""
    a = small(tmp_path / "a")
    line = f"'{sys.executable}' -m streamsoup uniform a a -o soup {closed}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == (1 if "full" in closed else 0)
    assert "Traceback" not in done.stderr
    assert ("error: stdout: cannot be written" in done.stderr) == ("full" in closed)
    assert run("verify", tmp_path / "soup", "-i", a, "-i", a)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "soup"]


@pytest.mark.parametrize("command", ["inspect a", "plan a a", "verify --help", "--version"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_looking_without_standard_streams(tmp_path: Path, command: str, closed: str) -> None:
    """Nor do they change what commands come to that only look: in one line, if in any."""
    small(tmp_path / "a")
    line = f"'{sys.executable}' -m streamsoup {command} {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if "full" in closed else 0)
    assert done.stderr.count("\n") == ("full" in closed)
    assert ("stdout: cannot be written" in done.stderr) == ("full" in closed)


# -- what is in the way ---------------------------------------------------------------------------


def test_a_strangers_folder_is_refused_untouched(tmp_path: Path) -> None:
    """An OUT.partial that is not ours is left as it is, whatever its files are called."""
    a = small(tmp_path / "a")
    for number, files in enumerate(
        [
            {"thesis.tex": "x"},
            {"lock": "mine"},
            {"lock": "", "more": "x"},
            {"journal": "Dear diary"},
        ]
    ):
        partial = tmp_path / f"soup-{number}.partial"
        partial.mkdir()
        for name, text in files.items():
            (partial / name).write_text(text)
        before = listing(partial)
        status, stderr = run("uniform", a, a, "-o", tmp_path / f"soup-{number}")
        assert status == 1
        assert "not made by streamsoup" in stderr or "damaged" in stderr
        assert {p: v for p, v in listing(partial).items() if p in before} == before
    (tmp_path / "file.partial").write_text("x")
    assert "not made by streamsoup" in run("uniform", a, a, "-o", tmp_path / "file")[1]


def test_no_link_leads_the_writer_elsewhere(tmp_path: Path) -> None:
    """Links in the work folder, symbolic or hard, are refused, never written through."""
    a = small(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("lock", "journal", "model.safetensors"):
        (elsewhere / name).write_text("")
    before = listing(elsewhere)
    soup, partial = tmp_path / "soup", tmp_path / "soup.partial"
    for name in ("", "lock", "journal", "soup"):
        for hard in (False, True):
            if name:
                partial.mkdir()
                (partial / "lock").touch()
                (partial / name).unlink(missing_ok=True)
            target = elsewhere / name if name in ("lock", "journal") else elsewhere
            if not hard:
                (partial / name).symlink_to(target)
            elif target.is_file():
                (partial / name).hardlink_to(target)
            else:
                continue
            status, stderr = run("uniform", a, a, "-o", soup)
            assert (status, "not made by streamsoup" in stderr) == (1, True), (name, hard)
            subprocess.run(["rm", "-rf", partial], check=True)
            assert listing(elsewhere) == before
    assert os.listdir(elsewhere)


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    """A link to a folder stands for that folder; one that leads nowhere, for what it names."""
    a = small(tmp_path / "a")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert "exists already" in run("uniform", a, a, "-o", tmp_path / "link")[1]
    assert run("uniform", a, a, "-o", tmp_path / "link", "--overwrite") == (0, "")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()
    (tmp_path / "nowhere").symlink_to("new")
    assert run("uniform", a, a, "-o", tmp_path / "nowhere") == (0, "")
    assert (tmp_path / "new" / "model.safetensors").exists()
    (tmp_path / "loop").symlink_to("loop")
    assert run("uniform", a, a, "-o", tmp_path / "loop")[0] == 1


def test_no_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~ that no shell replaced is neither a home nor, by accident, a new folder of that name."""
    a = small(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    status, stderr = run("uniform", a, a, "-o", "~/soup")
    assert (status, "write the whole path" in stderr) == (1, True)
    assert "not quoted" in run("uniform", "~/a", a, "-o", "soup")[1]
    assert os.listdir(tmp_path) == ["a"]
    assert run("uniform", a, a, "-o", "./~") == (0, "")


def test_the_folder_we_are_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's working folder is pulled away from under them; a new one in it will do."""
    a = small(tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, stderr = run("uniform", a, a, "-o", ".", "--overwrite")
    assert (status, "choose a new folder in it" in stderr) == (1, True)
    assert run("uniform", a, a, "-o", "soup") == (0, "")


def test_the_folder_we_are_in_may_be_gone(tmp_path: Path) -> None:
    """Where it was removed, a path relative to it is refused in words, and a whole one will do."""
    a = small(tmp_path / "a")
    gone = "mkdir gone; cd gone; rmdir ../gone; exec"
    for output, overwrite, reason in (
        ("soup", "", "error: soup: cannot be made, as the current folder was removed"),
        (tmp_path / "soup", "", ""),
        (tmp_path / "soup", "--overwrite", ""),
    ):
        line = f"{gone} '{sys.executable}' -m streamsoup uniform {a} {a} -o {output} {overwrite}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == bool(reason), done.stderr
        assert unexpected(done.stderr).startswith(reason)
        assert unexpected(done.stderr).count("\n") == bool(reason)


def test_never_into_an_ingredient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output in, over or around an ingredient, by whatever path or link."""
    a = small(tmp_path / "zoo" / "deep" / "a")
    b = small(tmp_path / "b", seed=1)
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "zoo" / "x.safetensors").write_bytes(b"")  # so that it could be replaced
    (tmp_path / "hard").mkdir()
    os.link(a / "model.safetensors", tmp_path / "hard" / "model.safetensors")
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft" / "model.safetensors").symlink_to(a / "model.safetensors")
    (tmp_path / "soup.partial").mkdir()
    inside = small(tmp_path / "soup.partial" / "soup", seed=2)
    (tmp_path / "soup.partial" / "lock").touch()
    before = listing(tmp_path)
    ingredients = [str(path) for path in (a, b, inside)]
    lone = [str(a / "model.safetensors"), *ingredients[1:]]
    monkeypatch.chdir(a)
    for output in (
        *(a, f"{a}/", f"{a}/.", a / "x" / "soup", tmp_path / "link", tmp_path / "link" / "soup"),
        *(a.parent / "b" / ".." / "a", a.parent.parent, tmp_path / "hard", tmp_path / "soft"),
        *(tmp_path / "soup", tmp_path, "/", "..", ".", "x", ""),
    ):
        for given in (ingredients, lone):
            if given is lone and output in (a / "x" / "soup", tmp_path / "link" / "soup", "x"):
                continue  # beside a lone file there is room
            with pytest.raises(OutputError):
                uniform(given, output=output, options=Options(overwrite=True))
            assert listing(tmp_path) == before, output


def test_a_disk_that_hides_something_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be looked at may be an ingredient: it is neither replaced nor cleared."""
    a = small(tmp_path / "soup" / "deep" / "a")
    (tmp_path / "soup" / "x.safetensors").write_bytes(b"")
    before = listing(tmp_path)
    opened = open_ingredients([a])
    scandir, stat = os.scandir, os.stat

    def fail(path: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def blind_scandir(path: str) -> object:
        return fail(path) if str(path).endswith("deep") else scandir(path)

    def blind_stat(path: str, **named: Any) -> object:
        return fail(path) if str(path).endswith("model.safetensors") else stat(path, **named)

    for name, blind in (("scandir", blind_scandir), ("stat", blind_stat)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, blind)
            with pytest.raises(OSError, match="Input/output error"):
                check_output(str(tmp_path / "soup"), opened, overwrite=True, resumes=True)
    assert listing(tmp_path) == before


def test_only_a_lone_checkpoint_is_replaced(tmp_path: Path) -> None:
    """--overwrite spares a folder of something else, and one of several checkpoints."""
    a = small(tmp_path / "a")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter-1.tex").write_text("x")
    training = small(tmp_path / "training")
    small(training / "checkpoint-500", seed=1)
    legacy = small(tmp_path / "legacy")
    (legacy / "original").mkdir()
    (legacy / "original" / "consolidated.00.pth").write_text("x")
    before = listing(tmp_path)
    for output, reason in (
        (thesis, "is not a checkpoint"),
        (training, "more than one checkpoint (checkpoint-500)"),
        (legacy, "more than one checkpoint (original)"),
    ):
        status, stderr = run("uniform", a, a, "-o", output, "--overwrite")
        assert status == 1
        assert f"{output}: " in stderr
        assert reason in stderr
        assert listing(tmp_path) == before
    soup = small(tmp_path / "soup")
    (soup / "tokenizer").mkdir()
    (soup / "tokenizer" / "vocab.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for output in (soup, tmp_path / "empty"):
        assert run("uniform", a, a, "-o", output, "--overwrite") == (0, "")


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_never_into_an_ingredient_by_a_mount(tmp_path: Path) -> None:
    """A bind mount of an ingredient is the ingredient."""
    a = small(tmp_path / "zoo" / "a")
    (tmp_path / "zoo" / "x.safetensors").write_bytes(b"")
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "--bind", a, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        for ingredient, output in [(a, mount), (a, mount / "x"), (mount, a), (mount, a.parent)]:
            status, stderr = run("uniform", ingredient, "-o", output, "--overwrite")
            assert status == 1
            assert "ingredient" in stderr
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file/soup", "Not a directory|is a file"),
        ("x" * 300, "name too long"),
        ("x" * 250, "name too long"),
        ("soup.safetensors", "leave out"),
        ("file", "is a file"),
        ("/proc/soup", "cannot be made"),
    ],
)
def test_an_impossible_output(tmp_path: Path, output: str, reason: str) -> None:
    """An output that cannot be is refused in one line that names it, and leaves nothing."""
    a = small(tmp_path / "a")
    (tmp_path / "file").write_text("")
    status, stderr = run("uniform", a, a, "-o", output, cwd=tmp_path)
    assert status == 1
    assert stderr.count("\n") == 1
    assert any(word in stderr for word in reason.split("|")), stderr
    assert output[:50] in stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_folders_above_that_another_run_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that could not begin removes what it had made, just when this one builds on it."""
    mkdir, n_taken = os.mkdir, 0

    def taken_away(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        nonlocal n_taken
        if path.endswith(".partial") and n_taken < 3:
            n_taken += 1
            os.rmdir(tmp_path / "a" / "b")
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", taken_away)
    with Staging(str(tmp_path / "a" / "b" / "soup"), "x", overwrite=False) as staging:
        assert n_taken == 3
        staging.discard()
    assert os.listdir(tmp_path) == []


def test_folders_above_are_not_left_behind(tmp_path: Path) -> None:
    """Folders that were made for an output that then cannot be begun are removed again."""
    a = small(tmp_path / "a")
    status, stderr = run("uniform", a, a, "-o", tmp_path / "new" / "folders" / ("x" * 250))
    assert status == 1
    assert "name too long" in stderr
    assert os.listdir(tmp_path) == ["a"]


def test_few_descriptors(tmp_path: Path) -> None:
    """Where too few files may be open, one line says so, and nothing is left."""
    small(tmp_path / "a")
    failed = 0
    for n in range(5, 9):
        line = f"ulimit -n {n}; exec '{sys.executable}' -m streamsoup uniform a a -o new/soup"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            assert unexpected(done.stderr).count("\n") == 1
            assert "kept beside it" not in done.stderr
            assert os.listdir(tmp_path) == ["a"], n
            failed += 1
        else:
            shutil.rmtree(tmp_path / "new")
    assert failed


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
def test_a_forbidden_output(tmp_path: Path) -> None:
    """A folder that is read-only is named."""
    a = small(tmp_path / "a")
    (tmp_path / "closed").mkdir(mode=0o500)
    status, stderr = run("uniform", a, a, "-o", tmp_path / "closed" / "soup")
    assert status == 1
    assert "Permission denied" in stderr


@pytest.mark.parametrize("name", ["a b", "ÿ", "new\nline", os.fsdecode(b"\xff\xfe"), "-o"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_names_and_modes(tmp_path: Path, name: str, umask: int) -> None:
    """Any name that a file may have will do, and modes follow the umask."""
    a = small(tmp_path / "a")
    (a / "sub").mkdir()
    (a / "sub" / "side.txt").write_text("x")
    command = ["uniform", a, a, f"--output={name}"]
    assert run(*command, cwd=tmp_path, umask=umask) == (0, "")
    soup = tmp_path / name
    for path in (soup, *soup.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask
    assert sorted(os.listdir(tmp_path)) == sorted(["a", name])


def test_a_file_size_limit(tmp_path: Path) -> None:
    """Where files may not grow so large, one line says so, and nothing is left."""
    small(tmp_path / "a")
    line = f"ulimit -f 2; exec '{sys.executable}' -m streamsoup uniform a a -o soup"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert unexpected(done.stderr).startswith("error: soup: cannot be written: File too large; ")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_full_disk(tmp_path: Path) -> None:
    """A disk that is too full is known before the work, and nothing is left on it."""
    a = large(tmp_path / "a", gigabytes=0.05)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        status, stderr = run("uniform", a, "-o", disk / "soup")
        assert status == 1
        assert stderr.startswith(f"error: {disk}/soup: cannot be written: No space left on device")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_disk_of_few_files(tmp_path: Path) -> None:
    """Where there is no place for one more file, what was made so far is removed."""
    a = small(tmp_path / "a")
    disk = tmp_path / "disk"
    disk.mkdir()
    for nr_inodes in range(1, 7):
        mount = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={nr_inodes}", "none", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount")
        try:
            status, stderr = run("uniform", a, a, "-o", disk / "new" / "folders" / "soup")
            assert status == 1
            assert "No space left on device" in stderr
            assert os.listdir(disk) == [], nr_inodes
        finally:
            subprocess.run(["umount", disk], check=True)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a checkpoint ``soup``, which lies in a lower layer."""
    small(tmp_path / "lower" / "soup", seed=1)
    folder, disk = tmp_path / "overlay", tmp_path / "disk"
    for each in (folder, disk):
        each.mkdir()
    # The upper layer of its own, as an overlay on an overlay may not be.
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        layers = f"lowerdir={tmp_path}/lower,upperdir={disk}/upper,workdir={disk}/work"
        mount = ["mount", "-t", "overlay", "-o", f"redirect_dir=off,{layers}", "none", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine has no overlays")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not IS_ROOT, reason="only root may mount")
def test_a_lower_layer_is_known_before_the_work(tmp_path: Path, overlay: Path) -> None:
    """What an overlay cannot rename is refused at once, untouched; once removed, all is well."""
    a = small(tmp_path / "a")
    before = listing(overlay)
    command = ("uniform", a, a, "-o", overlay / "soup", "--overwrite")
    status, stderr = run(*command)
    assert (status, stderr.count("\n")) == (1, 1)
    assert "in a lower layer of an overlay file system; choose another folder" in stderr
    assert stderr.endswith("remove it yourself and run again\n")
    assert listing(overlay) == before
    shutil.rmtree(overlay / "soup")
    for _ in range(2):  # what replaces it lies in the upper layer, and can be replaced
        assert run(*command) == (0, "")
        assert os.listdir(overlay) == ["soup"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_cannot_be_renamed_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Refused in words after the work, which is kept: without the old output, a rename is left."""
    a = small(tmp_path / "a")
    old = small(tmp_path / "soup", seed=1)
    before = listing(old)
    rename2, rename = staging.rename, os.rename

    def stuck2(source: str, target: str, flag: int, **named: int) -> bool:
        if flag == libc.EXCHANGE and exchanges:
            raise OSError(errno.EXDEV, "Invalid cross-device link", target)
        return flag != libc.EXCHANGE and rename2(source, target, flag, **named)

    def stuck(source: str, target: str, **named: int) -> None:
        if source == old.name and target == "old":
            raise OSError(errno.EXDEV, "Invalid cross-device link", target)
        rename(source, target, **named)

    monkeypatch.setattr(staging, "rename", stuck2)
    monkeypatch.setattr(os, "rename", stuck)
    for _ in range(2):
        with pytest.raises(OutputError, match="which then only has to put the finished soup in"):
            uniform([a, a], output=old, options=Options(overwrite=True))
        assert listing(old) == before
    shutil.rmtree(old)
    assert uniform([a, a], output=old, options=Options(overwrite=True)).finished
    assert sorted(os.listdir(tmp_path)) == ["a", "soup"]


# -- an ingredient that changes -------------------------------------------------------------------


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(content({"weight": tensor(np.ones(3, "f4"))}))
    new.rename(path)


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80?")


def _blink(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 4096)
    time.sleep(0.05)
    os.truncate(path, size)


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("change", [_shrink, _grow, _replace, Path.unlink, _rewrite, _blink])
def test_an_ingredient_that_changes(tmp_path: Path, io: str, change: object) -> None:
    """A shard that changes while it is read is named; never a SIGBUS, never a mixture."""
    a, b = large(tmp_path / "a"), large(tmp_path / "b")
    words = (*[a] * (MANY - 1), b, "-o", tmp_path / "soup", "--io", io, "--threads", "2")
    command = start("uniform", *words)
    wait_for_work(tmp_path / "soup.partial")
    assert callable(change)
    change(b / "model.safetensors")
    status, stderr = finish(command)
    assert status == 1
    assert str(b / "model.safetensors") in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("what", [".git/config", "optimizer.bin", "scheduler.pt"])
def test_what_is_no_part_of_a_checkpoint_is_not_replaced(tmp_path: Path, what: str) -> None:
    """A repository, or a run's state beside the weights, is not lost to --overwrite."""
    a, out = small(tmp_path / "a"), small(tmp_path / "out")
    (out / ".cache").mkdir()
    (out / "training_args.bin").touch()
    precious = out / what
    precious.parent.mkdir(exist_ok=True)
    precious.touch()
    status, stderr = run("uniform", a, a, "-o", out, "--overwrite")
    assert status == 1
    assert (
        f"holds files that are not part of a checkpoint ({what.split('/')[0]}) and would be"
        in stderr
    )
    assert precious.exists()
    shutil.rmtree(precious.parent) if precious.parent != out else precious.unlink()
    assert run("uniform", a, a, "-o", out, "--overwrite") == (0, "")


def test_a_read_only_output_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be moved out of the way."""
    small(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(OutputError, match="is read-only, and so cannot be replaced"):
        check_replaceable(str(tmp_path / "out"))


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
