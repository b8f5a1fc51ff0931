"""Law 4, whole or absent: whatever happens at whatever call, and whoever else is at it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save, save_sharded, tensor
from crash import AT_EXIT, Machine, Result, restore

from streamsoup import Options
from streamsoup.engine.digest import Digests
from streamsoup.engine.plan import NOTES
from streamsoup.engine.rules.linear import Linear
from streamsoup.output.destination import check_output
from streamsoup.output.make import make, order
from streamsoup.output.staging import Staging
from streamsoup.output.write import FileLedger, FileSink
from streamsoup.recipe import Coefficients

Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Return one machine for all tests of this file."""
    machine = Machine()
    yield machine
    machine.close()


MADE_BEFORE = "exists already; --overwrite replaces it. This very recipe made it"


class Kitchen:
    """Ingredients, the soup of an undisturbed run, and a stage to be disturbed on."""

    def __init__(self, root: Path, machine: Machine) -> None:
        self.machine = machine
        self.ingredients = []
        for i in range(2):
            rng = np.random.default_rng(i)
            shards = [
                {
                    f"{n}.weight": tensor(rng.standard_normal((20, 35)).astype("f4")),
                    f"{n}.count": tensor(np.arange(3)),
                }
                for n in range(2)
            ]
            folder = save_sharded(root / f"ingredient-{i}", shards)
            (folder / "config.json").write_text("{}")
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer" / "vocabulary.txt").write_text("soup\n")
            self.ingredients.append(folder)
        self.before = root / "before"
        self.before.mkdir()
        self.stage = root / "stage"
        self.output = self.stage / "soup"
        self.command: list[str | Path] = ["uniform", *self.ingredients, "--threads", "1"]
        self.untouched = [tree(folder) for folder in self.ingredients]
        self.old: Tree | None = None
        restore(self.stage, self.before)
        assert self.cook().status == 0
        self.new = tree(self.output)
        restore(self.stage, self.before)

    def cook(self, at: int = 0, action: str = "kill", plant: str = "") -> Result:
        """Run the command."""
        command = [*self.command, "-o", self.output]
        if self.old is not None:
            command.append("--overwrite")
        return self.machine.run(*command, stage=self.stage, at=at, action=action, plant=plant)

    def with_old_soup(self) -> None:
        """Let there be another soup in the output's place before each run."""
        restore(self.stage, self.before)
        command = ["mix", *self.ingredients, "-c", "3,4", "-o", self.output]
        assert self.machine.run(*command, stage=self.stage).status == 0
        self.old = tree(self.output)
        self.keep()

    def half_done(self) -> None:
        """Let a run have been killed in the middle before each run."""
        n_calls = self.cook().n_calls
        for at in range(n_calls // 2, n_calls):
            restore(self.stage, self.before)
            self.cook(at)
            journal = self.work() / "journal"
            if journal.exists() and journal.read_text().count("leaves") == 3:
                self.keep()
                return
        raise AssertionError("no run was killed in the middle")

    def work(self) -> Path:
        """Return the one work folder that a run left, or where none is."""
        partial = self.output.with_name(self.output.name + ".partial")
        return next(iter(sorted(partial.glob("work-*"))), partial / "none")

    def keep(self) -> None:
        shutil.rmtree(self.before)
        shutil.copytree(self.stage, self.before)

    def check_whole_or_absent(self) -> None:
        """Fail if the output is anything but the former one, or none, or the new one."""
        found = tree(self.output) if os.path.lexists(self.output) else None
        assert found in (self.old, self.new), "neither whole nor absent"
        assert [tree(folder) for folder in self.ingredients] == self.untouched

    def check_mended(self) -> None:
        """Fail unless the same command leaves the soup, and nothing else."""
        whole = os.path.lexists(self.output) and tree(self.output) == self.new
        again = self.cook()
        if not (whole and MADE_BEFORE in again.stderr):
            assert again.status == 0, again.stderr
        assert tree(self.output) == self.new
        assert os.listdir(self.output.parent) == ["soup"], "debris"

    def disturb(self, action: str, *, step: int = 1, plant: str = "") -> list[Result]:
        """Run the command with a failure at its first call, its second, …, until it gets through.

        After each, the output is whole or absent, and the same command run again mends all.
        With `step`, only every so many calls are tried, unless EVERY_CALL is set.
        """
        results = []
        for at in range(1, 10_000, 1 if "EVERY_CALL" in os.environ else step):
            restore(self.stage, self.before)
            result = self.cook(at, action, plant)
            after = Path(f"{self.stage}.after")
            if after.exists():
                shutil.rmtree(self.stage)
                os.rename(after, self.stage)
            self.check_whole_or_absent()
            if result.n_calls < at:
                assert result.status == 0, result.stderr
                return results
            assert result.stderr.count("\n") <= 1
            assert "Traceback" not in result.stderr
            results.append(result)
            self.check_mended()
        raise AssertionError("it never gets through")


def tree(folder: Path) -> Tree:
    """Read all files below a folder, but for the time in a provenance."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = b"" if path.is_dir() else path.read_bytes()
        if path.name == "streamsoup.json":
            try:
                provenance = json.loads(found[name])
            except ValueError:
                continue
            del provenance["created"], provenance["checksum"]
            found[name] = json.dumps(provenance).encode()
    return found


@pytest.fixture
def kitchen(tmp_path: Path, machine: Machine) -> Kitchen:
    """Return two small sharded ingredients with side files in subfolders."""
    return Kitchen(tmp_path, machine)


def test_killed_at_any_call(kitchen: Kitchen) -> None:
    """A kill at any call leaves no output or the whole one; the same command then completes it."""
    assert len(kitchen.disturb("kill")) > 80


def test_a_finished_soup_is_refused_and_known(kitchen: Kitchen) -> None:
    """A run that is over is not resumed; only a soup of the same recipe is said to be that."""
    assert kitchen.cook().status == 0
    again = kitchen.cook()
    assert (again.status, again.stderr.count("\n")) == (1, 1)
    assert f"{kitchen.output}: {MADE_BEFORE}; `streamsoup verify` tells" in again.stderr
    swapped = ["uniform", *kitchen.ingredients[::-1], "-o", kitchen.output]
    mixed = ["mix", *kitchen.ingredients, "-c", ".5,.5", "-o", kitchen.output]
    for other in (swapped, mixed):
        assert "replaces it\n" in kitchen.machine.run(*other, stage=kitchen.stage).stderr
    provenance = kitchen.output / "streamsoup.json"
    provenance.write_text(provenance.read_text().replace("uniform", "universal"))
    assert "changed since the soup was made (streamsoup.json)" in kitchen.cook().stderr


def test_killed_while_replacing(kitchen: Kitchen) -> None:
    """A kill during an --overwrite leaves the old soup or the new one."""
    kitchen.with_old_soup()
    kitchen.disturb("kill", step=5)


def test_killed_while_resuming(kitchen: Kitchen) -> None:
    """A kill of a run that resumes another is mended like the first."""
    kitchen.half_done()
    kitchen.disturb("kill", step=7)


def test_killed_without_exchange(kitchen: Kitchen) -> None:
    """Where the file system cannot exchange folders, no kill loses the old soup for good."""
    kitchen.with_old_soup()
    plant = "no exchange"
    n_calls = kitchen.cook(plant=plant).n_calls
    for at in range(n_calls - 45, n_calls + 1):
        restore(kitchen.stage, kitchen.before)
        kitchen.cook(at, plant=plant)
        if not kitchen.output.exists():
            assert tree(kitchen.work() / "old") == kitchen.old
            # Another recipe, which fails, still leaves the old soup behind.
            refused = ["mix", *kitchen.ingredients, "-c", "1e300,1e300", "-o", kitchen.output]
            failed = kitchen.machine.run(*refused, "--overwrite", stage=kitchen.stage)
            assert "too large" in failed.stderr
        kitchen.check_whole_or_absent()
        kitchen.check_mended()


def test_power_cut_at_any_call(kitchen: Kitchen) -> None:
    """What was never synced may be lost at any call; the output is whole or absent all the same."""
    kitchen.output = kitchen.stage / "new" / "folders" / "soup"
    results = kitchen.disturb("power", step=5)
    assert len(results) > 30


def test_power_cut_while_replacing(kitchen: Kitchen) -> None:
    """A power cut during an --overwrite leaves the old soup or the new one."""
    kitchen.with_old_soup()
    kitchen.disturb("power", step=4)


def test_durable_when_it_says_so(kitchen: Kitchen) -> None:
    """Exit status 0 means that a power cut an instant later loses nothing and leaves no debris."""
    kitchen.output = kitchen.stage / "new" / "folders" / "soup"
    for old in (False, True):
        if old:
            kitchen.with_old_soup()
        for plant in ("", "no checkpoints"):
            restore(kitchen.stage, kitchen.before)
            kitchen.cook(at=AT_EXIT, action="power", plant=plant)
            after = Path(f"{kitchen.stage}.after")
            left = after / kitchen.output.relative_to(kitchen.stage)
            assert tree(left) == kitchen.new
            assert os.listdir(left.parent) == ["soup"]


@pytest.mark.parametrize("action", ["ENOSPC", "ENOSPC+", "EIO", "EIO+", "EROFS+", "EDQUOT"])
def test_failing_calls(kitchen: Kitchen, action: str) -> None:
    """A call that fails ends in one line naming the output, unless the soup is whole by then."""
    for result in kitchen.disturb(action, step=7):
        if result.status == 0:
            continue
        assert result.status == 1
        assert result.stderr.startswith(f"error: {kitchen.output}"), result.stderr
        assert any(
            word in result.stderr for word in ("fix that", "make room", "choose", "yourself")
        )


def test_a_failed_sync_is_never_believed(kitchen: Kitchen) -> None:
    """What the kernel drops when a sync fails is made again, not taken for finished."""
    for result in kitchen.disturb("lost", step=2):
        # Status 0: there was no sync after that call, or only one of tidying up.
        assert result.status == 0 or "cannot be written: Input/output error" in result.stderr


def test_a_planted_belief_in_a_failed_sync_is_found(kitchen: Kitchen) -> None:
    """The law fails for a writer that goes on after a failed sync."""
    with pytest.raises(AssertionError, match="neither whole nor absent"):
        kitchen.disturb("lost", step=2, plant="sync errors pass")


def test_short_writes(kitchen: Kitchen) -> None:
    """Writes that take a third of what they are given make the same soup."""
    result = kitchen.cook(at=1, action="short")
    assert result.status == 0
    assert tree(kitchen.output) == kitchen.new


@pytest.mark.parametrize(("action", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_signals(kitchen: Kitchen, action: str, status: int) -> None:
    """A signal to stop at any call ends the run in two seconds, in one line, with its status."""
    for result in kitchen.disturb(action, step=11):
        assert result.seconds < 2
        if result.status != 0:  # it was done by then
            assert result.status == status
            assert result.stderr == (
                f"interrupted by SIG{action}; the same command goes on from there\n"
            )


def test_resumes_what_is_finished(kitchen: Kitchen) -> None:
    """The same command run again does not read again what was finished; another starts anew."""
    kitchen.half_done()
    restore(kitchen.stage, kitchen.before)
    journal = kitchen.work() / "journal"
    begun = journal.read_text().splitlines()[:-1]  # the kill may have torn the last
    n_calls = kitchen.cook().n_calls
    restore(kitchen.stage, kitchen.before)
    kitchen.cook(at=2 * n_calls // 3)
    assert len(begun) > 2
    assert kitchen.work() != journal.parent
    journal = kitchen.work() / "journal"
    assert journal.read_text().splitlines()[: len(begun)] == begun
    other = ["mix", *kitchen.ingredients, "-c", "3,4", "-o", kitchen.output]
    assert kitchen.machine.run(*other, stage=kitchen.stage).status == 0
    assert tree(kitchen.output) != kitchen.new
    assert os.listdir(kitchen.stage) == ["soup"]


def test_notes_of_many_leaves(tmp_path: Path) -> None:
    """Many leaves finished at once are noted in records of bounded size, and all believed."""
    n = 2 * NOTES + 88
    model = save(tmp_path / "m", {f"t{i}": tensor(np.ones(3, np.float32)) for i in range(n)})
    ordered = order(
        [str(model)], Linear(Coefficients.uniform(1)), method="uniform", options=Options()
    )
    target = check_output(str(tmp_path / "soup"), (), overwrite=False, resumes=True)

    def ledger(staging: Staging) -> FileLedger:
        sink = FileSink(ordered.plan, ordered.files, staging.soup)
        made = FileLedger(ordered.plan, sink, staging.journal, digests)
        sink.prepare(resumes=made.resumes)
        return made

    leaves = list(ordered.plan.leaves())
    digests = Digests(ordered.plan)
    with Staging(target, "order", overwrite=False) as staging:
        writing = ledger(staging)
        for leaf in leaves:
            writing.finish_leaf(leaf, leaf.number.to_bytes(32))
        writing.checkpoint()
        writing.checkpoint()  # nothing is left to note
        sizes = [len(record["leaves"]) for record in staging.journal if "leaves" in record]
    assert sizes == [NOTES, NOTES, 88]
    with Staging(target, "order", overwrite=False) as staging:
        digests = Digests(ordered.plan)
        assert all(map(ledger(staging).noted, leaves))
        assert [digests.get(leaf.number) for leaf in leaves] == [i.to_bytes(32) for i in range(n)]


def test_what_is_noted_was_synced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf stands in the journal only after its shard was synced: a power cut costs no note."""
    model = save(tmp_path / "m", {"t": tensor(np.ones(3, np.float32))})
    rule = Linear(Coefficients.uniform(1))
    ordered = order([str(model)], rule, method="uniform", options=Options())
    target = check_output(str(tmp_path / "soup"), (), overwrite=False, resumes=True)
    done: list[object] = []
    with Staging(target, "order", overwrite=False) as staging:
        sink = FileSink(ordered.plan, ordered.files, staging.soup)
        ledger = FileLedger(ordered.plan, sink, staging.journal, Digests(ordered.plan))
        sink.prepare(resumes=False)
        append = staging.journal.append
        monkeypatch.setattr(sink, "sync", lambda numbers=None: done.append(numbers))
        monkeypatch.setattr(
            staging.journal, "append", lambda record: (done.append("noted"), append(record))
        )
        (leaf,) = ordered.plan.leaves()
        ledger.finish_leaf(leaf, bytes(32))
        ledger.checkpoint()
    assert done == [[0], "noted"]


def test_damaged_work_is_made_again(kitchen: Kitchen) -> None:
    """A note is believed only if the bytes match it."""
    kitchen.half_done()
    restore(kitchen.stage, kitchen.before)
    _damage(kitchen)
    assert kitchen.cook().status == 0
    assert tree(kitchen.output) == kitchen.new


def _damage(kitchen: Kitchen) -> None:
    for file in (kitchen.work() / "soup").glob("*.safetensors"):
        with open(file, "r+b") as opened:
            opened.seek(-2800, os.SEEK_END)
            opened.write(b"\xff" * 2800)


def test_a_planted_write_in_place_is_found(kitchen: Kitchen) -> None:
    """The law fails for a writer that works in the output itself."""
    with pytest.raises(AssertionError, match="neither whole nor absent"):
        kitchen.disturb("kill", step=3, plant="writes in place")


@pytest.mark.parametrize(
    "plant", ["no sync of shards", "no sync of folders", "no checkpoints, no sync of shards"]
)
def test_a_planted_lack_of_sync_is_found(kitchen: Kitchen, plant: str) -> None:
    """The law of durability fails for a writer that does not sync."""
    kitchen.cook(at=AT_EXIT, action="power", plant=plant)
    left = Path(f"{kitchen.stage}.after") / "soup"
    assert not left.exists() or tree(left) != kitchen.new


def test_a_planted_belief_is_found(kitchen: Kitchen) -> None:
    """Notes that are believed unseen make another soup of damaged work."""
    kitchen.half_done()
    restore(kitchen.stage, kitchen.before)
    _damage(kitchen)
    assert kitchen.cook(plant="believes its notes").status == 0
    assert tree(kitchen.output) != kitchen.new


@pytest.mark.parametrize(("code", "fails"), [(errno.ENOSYS, False), (errno.EIO, True)])
def test_the_disk_is_told_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    """With each leaf of some size; where there is no such call it is let be, errors are errors."""
    from streamsoup.errors import OutputError
    from streamsoup.output import write
    from streamsoup.system import libc

    told = []

    class Disk:
        real = libc._LIBC

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def sync_file_range(self, descriptor: int, offset: int, nbytes: int, flags: int) -> int:
            told.append((offset, nbytes, flags))
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(libc, "_LIBC", Disk())
    small, large = np.ones(9, "f4"), np.ones(write.EARLY_NBYTES // 4, "f4")
    model = save(tmp_path / "m", {"a": tensor(small), "b": tensor(large), "c": tensor(small)})
    ordered = order(
        [str(model)], Linear(Coefficients.uniform(1)), method="uniform", options=Options()
    )
    if fails:
        with pytest.raises(OutputError, match="Input/output error"):
            make(ordered, output=tmp_path / "out", options=Options())
    else:
        make(ordered, output=tmp_path / "out", options=Options())
    assert told == [(ordered.files.places[1][1], large.nbytes, 2)]


@pytest.mark.parametrize("n_started", [0, 1, 2])
def test_threads_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_started: int
) -> None:
    """A system that gives us fewer threads than told is one we say so of, and nothing is left."""
    from streamsoup import uniform
    from streamsoup.engine import stream
    from streamsoup.errors import BudgetError

    model = save(tmp_path / "m", {f"t{i}": tensor(np.ones(3, "f4")) for i in range(9)})
    start, started = threading.Thread.start, []

    def starting(thread: threading.Thread) -> None:
        if len(started) == n_started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    monkeypatch.setattr(stream, "ALONE_NBYTES", -1)
    said = f"only {n_started} of 3 threads can be started here; lower threads"
    with pytest.raises(BudgetError, match=said):
        uniform([model], output=tmp_path / "out", options=Options(threads=3))
    assert len(started) == n_started
    assert not any(thread.is_alive() for thread in started)
    assert os.listdir(tmp_path) == ["m"]


def test_space_is_reserved_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first leaf is begun, the disk holds a place for every byte of every shard."""
    from streamsoup import uniform
    from streamsoup.engine import stream

    with open(tmp_path / "probe", "wb") as probe:
        try:
            os.posix_fallocate(probe.fileno(), 0, 1 << 16)
        except OSError:
            pytest.skip("this file system reserves nothing")
    shards = [{name: tensor(np.ones(100_000, "f4"))} for name in "ab"]
    ingredient = save_sharded(tmp_path / "ingredient", shards)
    make_leaf, held = stream._Pass.make_leaf, []

    def making(*arguments: object) -> None:
        files = (tmp_path / "out.partial").glob("work-*/soup/*.safetensors")
        held.append([file.stat().st_blocks * 512 for file in files])
        make_leaf(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stream._Pass, "make_leaf", making)
    uniform([ingredient], output=tmp_path / "out")
    assert len(held[0]) == 2
    assert min(held[0]) >= 400_000
