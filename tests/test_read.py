"""Reading: an ingredient that changes during the pass is named; pages and descriptors are few."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import command, content, save, save_sharded, tensor
from msgspec.structs import replace

from streamsoup import Options, uniform, verify
from streamsoup.engine import budget, plan, read, stream
from streamsoup.engine.read import will_map
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import Nowhere
from streamsoup.errors import ChangedIngredientError, FormatError, RecipeError
from streamsoup.formats import files
from streamsoup.formats.files import Descriptors, Window, on_network, open_shard
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.live.candidates import Candidates
from streamsoup.live.running import plan_sums
from streamsoup.output.make import order
from streamsoup.recipe import Coefficients

MODEL = {"a": tensor(np.arange(5000.0)), "b": tensor(np.arange(5000.0))}


def replaced(path: Path) -> None:
    """Put an equal file in its place."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def truncated(path: Path) -> None:
    """Cut off its end; what is still to be read stays, as a lost page is SIGBUS."""
    os.truncate(path, path.stat().st_size - 1)


def touched(path: Path) -> None:
    """Change its time alone."""
    os.utime(path, ns=(1, 1))


def grown(path: Path) -> None:
    """Add to it."""
    with path.open("ab") as file:
        file.write(b"x")


def removed(path: Path) -> None:
    """Remove it."""
    path.unlink()


def linked(path: Path) -> None:
    """Make it a link to a copy."""
    other = path.with_suffix(".copy")
    path.rename(other)
    path.symlink_to(other.name)
    other.write_bytes(other.read_bytes())


CHANGES = {
    replaced: "was replaced by another file",
    truncated: "changed size from",
    touched: "was modified",
    grown: "changed size from",
    removed: "vanished",
    linked: "was modified",
}


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_during_the_pass_is_named(
    change: Callable[[Path], None],
    when: str,
    io: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard that is replaced, cut, touched or removed stops the run, named, without an output."""
    paths = [save(tmp_path / f"m{i}", MODEL) for i in range(3)]
    victim = paths[1] / "model.safetensors"
    monkeypatch.setattr(plan, "LEAF", 1000)
    cook = stream._Pass.make_leaf
    n_leaves, changes_after = 0, 1 if when == "first" else 10

    def cooking(self: Any, *arguments: Any) -> None:
        nonlocal n_leaves
        cook(self, *arguments)
        n_leaves += 1
        if n_leaves == changes_after:
            change(victim)

    monkeypatch.setattr(stream._Pass, "make_leaf", cooking)
    with pytest.raises(ChangedIngredientError) as refused:
        uniform(paths, output=tmp_path / "out", options=Options(io=io, threads=1))
    assert str(refused.value).startswith(f"{victim}: ")
    assert CHANGES[change] in str(refused.value)
    assert "run again" in str(refused.value)
    assert n_leaves == changes_after, "hours of work went on"
    assert not (tmp_path / "out").exists()


def test_a_failed_thread_does_not_hurry_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the others end their blocks, the run waits for them, and does nothing else."""
    paths = [save(tmp_path / f"m{i}", MODEL) for i in range(2)]
    monkeypatch.setattr(plan, "LEAF", 1000)
    monkeypatch.setattr(stream, "ALONE_NBYTES", 0)
    both = threading.Barrier(2)

    def cooking(self: Any, *arguments: Any) -> None:
        if both.wait() == 0:
            raise ZeroDivisionError
        time.sleep(4 * stream.TICK_S)

    monkeypatch.setattr(stream._Pass, "make_leaf", cooking)
    reports: list[Any] = []
    options = Options(threads=2, on_event=reports.append)
    with pytest.raises(ZeroDivisionError):
        uniform(paths, output=tmp_path / "out", options=options)
    assert 1 <= len(reports) <= 8


@pytest.mark.parametrize("name", ["io", "non_float", "non_finite"])
def test_a_word_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """Types are no checks: a slip of the pen in an option of a library's caller is said."""
    paths = [save(tmp_path / f"m{i}", MODEL) for i in range(2)]
    with pytest.raises(RecipeError, match=f"{name} must be one of .*, got 'mmapp'"):
        uniform(paths, output=tmp_path / "out", options=Options(**{name: "mmapp"}))
    assert not (tmp_path / "out.partial").exists()


def test_without_the_checks_a_change_would_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: with the checks taken out, a touched file goes unseen."""
    paths = [save(tmp_path / f"m{i}", MODEL) for i in range(2)]
    opened = open_ingredients(paths)
    touched(paths[0] / "model.safetensors")
    with pytest.raises(ChangedIngredientError):
        opened[0].check_unchanged()
    monkeypatch.setattr("streamsoup.formats.shards.Shard.check_unchanged", lambda self: None)
    monkeypatch.setattr(
        "streamsoup.formats.files.Identity.of", lambda _: opened[0].source.shards[0]
    )
    opened[0].check_unchanged()


def test_a_file_that_ends_early_is_an_error_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that come back empty, or fail, become errors that name the shard and the byte."""
    paths = open_ingredients([save(tmp_path / f"m{i}", MODEL) for i in range(2)])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ChangedIngredientError, match=r"m0/model\.safetensors: ended at byte"):
        uniform(paths, output=tmp_path / "out", options=Options(io="read", threads=1))

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FormatError, match=r"cannot be read at byte \d+: Input/output error"):
        uniform(paths, output=tmp_path / "out", options=Options(io="read", threads=1))


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("call", ["open", "fstat", "stat"])
def test_a_failing_disk_is_laid_to_the_shard(
    call: str, io: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a shard that fails once work is under way names the shard, not the output.

    The shard is not said to have changed: what is finished is worth keeping.
    """
    (opened,) = open_ingredients([save(tmp_path / "m", MODEL)])
    real, started = getattr(os, call), []
    monkeypatch.setattr(stream._Pass, "work", _then(started, stream._Pass.work))

    def fail(path: Any, *more: Any, **named: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if started and where.endswith("m/model.safetensors"):
            raise OSError(5, "Input/output error")
        return real(path, *more, **named)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(FormatError, match=r"m/model\.safetensors: cannot be .*: Input/output err"):
        uniform([opened], output=tmp_path / "out", options=Options(io=io, threads=1))


def _then(started: list[bool], work: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(self: Any) -> None:
        started.append(True)
        work(self)

    return call


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_what_was_read_is_read(io: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at the closing of an ingredient's file has no say in the soup."""
    paths = [save_sharded(tmp_path / f"m{i}", [MODEL, {"z": MODEL["a"]}]) for i in range(2)]
    for path in paths:
        (path / "config.json").write_text("{}")
    close, n_failed = os.close, 0

    def fail(descriptor: int) -> None:
        nonlocal n_failed
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if path.startswith((f"{paths[0]}/", f"{paths[1]}/")):
            n_failed += 1
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "close", fail)
    soup = uniform(paths, output=tmp_path / "out", options=Options(io=io, threads=1))
    assert n_failed > 8
    assert verify(soup.path).rederived


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that bring a few bytes at a time make the same soup."""
    paths = [save(tmp_path / f"m{i}", {"a": tensor(np.arange(50.0) + i)}) for i in range(2)]
    uniform(paths, output=tmp_path / "whole")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    uniform(paths, output=tmp_path / "short", options=Options(io="read"))
    name = "model.safetensors"
    assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def mount(kinds: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have file systems of these kinds mounted at these places, as the kernel would tell it."""
    table = folder / "mounts"
    escaped = str.maketrans({" ": "\\040", "\t": "\\011", "\n": "\\012", "\\": "\\134"})
    rows = [f"disk {at.translate(escaped)} {kind} rw 0 0\n" for at, kind in kinds.items()]
    table.write_text("".join(rows), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(files, "_MOUNTS", str(table))


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        *[(name, True) for name in ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs")],
        *[(name, True) for name in ("beegfs", "ceph", "9p", "afs", "fuse.glusterfs")],
        *[
            (name, True)
            for name in ("fuse.sshfs", "fuse.ceph", "NFS4", "fuse.s3fs", "fuse.gcsfuse")
        ],
        *[(name, False) for name in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs")],
        *[(name, False) for name in ("apfs", "ntfs", "fuseblk", "virtiofs", "vfat", "")],
    ],
)
def test_network_file_systems_are_known(
    kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system is on a network, shards are read, not mapped; by its kernel name."""
    mount({"/": "ext4", str(tmp_path): kind, f"{tmp_path}/inner": "ext4"}, tmp_path, monkeypatch)
    assert on_network([f"{tmp_path}/models/m.safetensors"]) is network
    assert on_network([f"{tmp_path}/inner/m.safetensors"]) is False
    assert on_network([f"{tmp_path}/inner/m.safetensors", f"{tmp_path}/m"]) is network
    (tmp_path / "link").symlink_to(tmp_path / "inner")
    assert on_network([f"{tmp_path}/link/m.safetensors"]) is False


def test_what_nobody_knows_may_be_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell what is mounted, shards are read: that is right anywhere."""
    monkeypatch.setattr(files, "_MOUNTS", "/nowhere/mounts")
    assert on_network(["/models/m.safetensors"])


def test_places_of_any_name_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks, backslashes and bytes that are no text; psutil agrees on the machine's own."""
    for name in ("with a blank", "a\\040b", "line\nbreak", "\r", "é", "bytes \udcff"):
        mount({"/": "ext4", f"{tmp_path}/{name}": "nfs"}, tmp_path, monkeypatch)
        assert on_network([f"{tmp_path}/{name}/m"])
        assert not on_network([f"{tmp_path}/{name}2/m"])
    monkeypatch.undo()
    known = {each.mountpoint: each.fstype.lower() for each in psutil.disk_partitions(all=True)}
    assert files._mounts() == known


def test_a_link_into_a_network_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of links to files on a network, such as a cache, is on a network."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "blob").write_bytes(content(MODEL))
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "m.safetensors").symlink_to(tmp_path / "far" / "blob")
    mount({"/": "ext4", f"{tmp_path}/far": "nfs4"}, tmp_path, monkeypatch)
    assert on_network([f"{tmp_path}/near/m.safetensors"])


def test_descriptors_are_few_and_closed(tmp_path: Path) -> None:
    """A thread keeps at most its share of descriptors open, the latest used, and closes all."""
    folder = save_sharded(tmp_path / "m", [{f"t{i}": MODEL["a"]} for i in range(9)])
    (opened,) = open_ingredients([folder])
    before = len(os.listdir("/proc/self/fd"))
    files = Descriptors(3)
    for shard in [*opened.source.shards, *opened.source.shards]:
        files.reading(shard)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def mapped_nbytes(path: Path) -> int:
    """Bytes of a file that this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


def test_mappings_go_with_their_last_view(tmp_path: Path) -> None:
    """A window holds no descriptor, outlives its object as long as it is seen, then goes."""
    path = save(tmp_path / "m", MODEL) / "model.safetensors"
    (opened,) = open_ingredients([path])
    before = len(os.listdir("/proc/self/fd"))
    window = Window(opened.source.shards[0], 5000, 9000)
    assert len(os.listdir("/proc/self/fd")) == before
    assert window.covers(5000, 9000)
    assert not window.covers(4000, 9000)
    assert not window.covers(5000, 9001)
    view = window.view(5001, 8999)
    del window
    assert bytes(view) == path.read_bytes()[5001:8999]
    assert mapped_nbytes(path) == 2 * mmap.PAGESIZE
    del view
    assert mapped_nbytes(path) == 0


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_what_was_passed_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: Any
) -> None:
    """However large the ingredients, a thread has a window of each mapped, and nothing is left."""
    for name in ("WINDOW", "WIDEST_WINDOW"):
        monkeypatch.setattr(read, name, 4 * mmap.PAGESIZE)
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 1000)
    monkeypatch.setattr(budget, "SMALLEST_BLOCK", 1000)
    model = {f"t{i}": tensor(np.arange(3e4) + i) for i in range(3)}
    paths = [save(tmp_path / f"m{i}", model) / "model.safetensors" for i in range(2)]
    # Read in another order than it lies in.
    paths.append(save(tmp_path / "r", dict(reversed(model.items()))) / "model.safetensors")
    seen = []
    digested = stream._Pass.deliver

    def delivering(*arguments: Any) -> None:
        seen.append(max(mapped_nbytes(path) for path in paths))
        digested(*arguments)

    monkeypatch.setattr(stream._Pass, "deliver", delivering)
    uniform(paths, output=tmp_path / "out", options=Options(io=io, threads=1))
    most = 5 * mmap.PAGESIZE if io == "mmap" else 0
    assert len(seen) > 90
    assert max(seen) <= most < paths[0].stat().st_size // 10
    assert (max(seen) > 0) == (io == "mmap")
    assert [mapped_nbytes(path) for path in paths] == [0, 0, 0]
    soup = tmp_path / "out" / "model.safetensors"
    assert soup.read_bytes()[-720_000:] == paths[0].read_bytes()[-720_000:]


def test_windows_share_what_may_be_mapped(tmp_path: Path) -> None:
    """Wide for a few ingredients, and no narrower than is worth it for many."""
    model = save(tmp_path / "m", MODEL)
    options = Options(threads=2)
    found = {}
    for k in (2, 8, 12, 64):
        planned = order(
            [model] * k, Linear(Coefficients.uniform(k)), method="uniform", options=options
        )
        memory = replace(planned.memory, threads=2)
        found[k] = read.Reader(planned.plan, memory, mapped=True)._window
    assert found == {2: 1 << 25, 8: 1 << 24, 12: (1 << 28) // 24, 64: 1 << 23}


def test_a_replaced_shard_is_not_opened(tmp_path: Path) -> None:
    """A path that leads to another file by now is refused when it is opened again."""
    path = save(tmp_path / "m", MODEL) / "model.safetensors"
    (opened,) = open_ingredients([path])
    replaced(path)
    with pytest.raises(ChangedIngredientError, match="was replaced"):
        open_shard(opened.source.shards[0])


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    """64 ingredients of 200 shards are mixed with 64 descriptors allowed, mapped and read."""
    shards = [{f"t{i}": tensor(np.float32(i))} for i in range(200)]
    real = save_sharded(tmp_path / "real", shards)
    paths = [tmp_path / f"m{i}" for i in range(64)]
    for path in paths:
        path.symlink_to(real)
    for io in ("mmap", "read"):
        words = ["uniform", *paths, "-o", tmp_path / io, "--io", io, "--threads", 8]
        ran = command(*words, preexec_fn=_few_descriptors)
        assert ran.returncode == 0, ran.stderr
        assert len(list((tmp_path / io).glob("*.safetensors"))) == 200


def _few_descriptors() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_what_is_kept_is_mapped_once_and_within_bounds(tmp_path: Path) -> None:
    """Shards beyond the bytes that may be kept move past as ever; all go with their keeper."""
    paths = [save(tmp_path / f"m{i}", MODEL) / "model.safetensors" for i in range(3)]
    opened = open_ingredients(paths)
    nbytes = paths[0].stat().st_size
    kept = read.Kept(2 * nbytes + 1)
    windows = [kept.of(each.source.shards[0]) for each in opened]
    assert windows[0] is kept.of(opened[0].source.shards[0])
    assert windows[1] is not None
    assert windows[2] is None
    assert mapped_nbytes(paths[0]) >= nbytes
    assert mapped_nbytes(paths[2]) == 0
    del windows, kept
    assert [mapped_nbytes(path) for path in paths] == [0, 0, 0]


def test_what_cannot_be_mapped_whole_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `ulimit -v`: then windows go on moving, and no more is tried."""
    paths = [save(tmp_path / f"m{i}", MODEL) / "model.safetensors" for i in range(2)]
    first, second = (each.source.shards[0] for each in open_ingredients(paths))
    kept = read.Kept()
    assert kept.of(first) is not None

    def failing(*arguments: Any) -> None:
        raise FormatError("cannot be mapped")

    monkeypatch.setattr(files, "Window", failing)
    assert kept.of(second) is None
    monkeypatch.undo()
    assert kept.of(second) is None
    assert kept.of(first) is not None


def test_candidates_map_a_shard_once(tmp_path: Path) -> None:
    """From one candidate to the next they stay; a shard that changes meanwhile is named."""
    paths = [save(tmp_path / f"m{i}", MODEL) / "model.safetensors" for i in range(2)]
    ordered = order(paths, Linear(Coefficients.uniform(2)), method="greedy", options=Options())
    sums = plan_sums(ordered.plan, mapped=True, threads=2, budget=150_000_000, scratch=None)
    made = Candidates(ordered.plan, sums, mapped=True, threads=2, scratch=None)
    made.mix((0, 1), Nowhere(), keep=False)
    assert all(mapped_nbytes(path) > 0 for path in paths)
    made.forget()
    assert [mapped_nbytes(path) for path in paths] == [0, 0]
    made.mix((1,), Nowhere(), keep=False)
    os.truncate(paths[1], paths[1].stat().st_size - 1)
    with pytest.raises(ChangedIngredientError, match=r"m1/model\.safetensors"):
        made.mix((1,), Nowhere(), keep=False)


def test_files_on_a_network_are_read_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` asks whether the shards lie on a network, and maps those that do not."""
    opened = open_ingredients([save(tmp_path / "m", {"t": tensor(np.ones(9, np.float32))})])
    asked: list[list[str]] = []

    def on_network(paths: list[str], answer: list[bool]) -> bool:
        asked.append(paths)
        return answer[0]

    for remote in (True, False):
        monkeypatch.setattr(read, "on_network", lambda paths, r=remote: on_network(paths, [r]))
        assert will_map(opened, "auto") is not remote
        assert will_map(opened, "mmap")
        assert not will_map(opened, "read")
    assert asked == [[*opened[0].source.files]] * 2
