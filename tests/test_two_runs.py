"""Two runs on one output where locks keep nobody out: one whole soup or an error, never a mixture.

Some network file systems grant a lock to everybody. Here flock always succeeds and no holder is
known to live, and one run is carried out whole within a call of the other, at one call after the
next.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save_sharded, tensor

from streamsoup.errors import OutputError
from streamsoup.methods.fixed import mix
from streamsoup.options import Options
from streamsoup.output import staging
from streamsoup.output.verification import verify
from streamsoup.system import locks

STEP = 7

CALLS = ("open", "mkdir", "rename", "unlink", "rmdir", "pwrite", "write", "fsync", "stat")


class Stage:
    """Two recipes for one output, which differ in weights and in side files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.output = root / "stage" / "soup"
        self.output.parent.mkdir()
        self.ingredients = []
        for i in range(2):
            rng = np.random.default_rng(i)
            shards = [{f"{n}": tensor(rng.standard_normal((9, 5)).astype("f4"))} for n in range(3)]
            folder = save_sharded(root / f"ingredient-{i}", shards)
            (folder / "config.json").write_text(f'{{"_name_or_path": "{i}"}}')
            (folder / "LICENSE").write_text(f"{i}")
            self.ingredients.append(folder)
        self.whole = []
        for kind in range(2):
            self.make(kind, overwrite=False, output=root / f"alone-{kind}")
            self.whole.append(content(root / f"alone-{kind}"))
        assert self.whole[0].keys() == self.whole[1].keys()
        self.n_calls = 0
        self.at = 0
        self.inner: Callable[[], None] | None = None
        self.pause: Callable[[], None] | None = None
        monkeypatch.setattr(locks.fcntl, "flock", lambda *_: None)
        monkeypatch.setattr(locks.Holder, "surely_lives", False)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is spared
        for name in CALLS:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(staging, "rename", self.counted(staging.rename))
        self._lock = threading.Lock()

    def make(self, kind: int, *, overwrite: bool, output: Path | None = None) -> None:
        """Make one of the two soups: other factors, and side files of the other ingredient."""
        order = self.ingredients if kind == 0 else self.ingredients[::-1]
        options = Options(overwrite=overwrite, threads=1)
        mix(order, [0.25, 0.75], output=output or self.output, options=options)

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call, and run the other soup before call number `at`."""

        def call(*args: Any, **named: Any) -> Any:
            with self._lock:
                self.n_calls += 1
                inner = self.inner if self.n_calls == self.at else None
                self.inner = None if inner is not None else self.inner
            if inner is not None:
                inner()
            if self.pause is not None:
                self.pause()
            return real(*args, **named)

        return call

    def run(self, kind: int, ends: list[str], *, overwrite: bool) -> None:
        """Make a soup; note what came of it."""
        try:
            self.make(kind, overwrite=overwrite)
            ends[kind] = "made"
        except OutputError as error:
            ends[kind] = str(error)

    def interleave(self, at: int, kinds: tuple[int, int], *, overwrite: bool) -> list[str]:
        """Run one soup within the call number `at` of another; return what each came to."""
        ends = ["", ""]

        def run(number: int) -> None:
            try:
                self.make(kinds[number], overwrite=overwrite)
                ends[number] = "made"
            except OutputError as error:
                ends[number] = str(error)

        self.n_calls, self.at, self.inner = 0, at, lambda: run(1)
        run(0)
        self.at = 0
        return ends

    def clear(self) -> None:
        """Make the stage empty again."""
        for path in sorted(self.output.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def content(folder: Path) -> dict[str, bytes]:
    """Read all files of a soup but its provenance, which holds the time."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop("streamsoup.json", None)
    return found


def try_all(stage: Stage, kinds: tuple[int, int], *, old: int | None, overwrite: bool) -> int:
    """Interleave at calls from the first to the last; return how many were tried.

    Every so many are, or every one where EVERY_CALL is set.
    """
    for n, at in enumerate(itertools.count(1, 1 if "EVERY_CALL" in os.environ else STEP)):
        stage.clear()
        if old is not None:
            stage.make(old, overwrite=False)
        ends = stage.interleave(at, kinds, overwrite=overwrite)
        assert all(ends) or stage.inner is not None
        if stage.output.exists():
            assert content(stage.output) in stage.whole, (at, ends, "a mixture")
            verify(stage.output, quick=True)
        if "made" in ends:
            last = kinds[ends.index("made")] if ends.count("made") == 1 else None
            found = content(stage.output)
            assert last is None or found == stage.whole[last], (at, ends)
        elif old is not None:
            assert content(stage.output) == stage.whole[old], (at, ends, "the old one is lost")
        # Whatever is left, the same command alone gets through, and leaves nothing else.
        stage.make(kinds[0], overwrite=True)
        assert content(stage.output) == stage.whole[kinds[0]]
        assert os.listdir(stage.output.parent) == ["soup"], (at, ends)
        if stage.n_calls < at or stage.inner is not None:
            return n
    raise AssertionError


@pytest.mark.parametrize("kinds", [(0, 1), (0, 0)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_make_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[int, int], overwrite: bool
) -> None:
    """Of two recipes, and of one twice: the output is always one whole soup."""
    stage = Stage(tmp_path, monkeypatch)
    assert try_all(stage, kinds, old=None, overwrite=overwrite) >= 20


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_threads_make_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Two runs that alternate at random, 20 times: one whole soup, and the other an error."""
    stage = Stage(tmp_path, monkeypatch)
    rng = random.Random(0)
    for n in range(20):
        ends = ["", ""]
        stage.clear()
        stage.pause = lambda: time.sleep(rng.choice((0, 0, 0.0002, 0.002)))
        threads = [
            threading.Thread(target=stage.run, args=(kind, ends), kwargs={"overwrite": overwrite})
            for kind in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stage.pause = None
        assert all(ends), (n, ends)
        if stage.output.exists():
            assert content(stage.output) in stage.whole, (n, ends)
            verify(stage.output, quick=True)
        if "made" in ends:
            made = {kind for kind in range(2) if ends[kind] == "made"}
            assert any(content(stage.output) == stage.whole[kind] for kind in made)
            assert overwrite or len(made) == 1
        stage.make(0, overwrite=True)
        assert content(stage.output) == stage.whole[0]
        assert os.listdir(stage.output.parent) == ["soup"], (n, ends)


@pytest.mark.parametrize("exchanges", [True, False])
def test_two_runs_do_not_lose_the_old_soup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """While both replace an old one, that is there or one of theirs, also without an exchange."""
    real = staging.rename

    def rename(source: str, target: str, flag: int, **named: int) -> bool:
        return (exchanges or flag != staging.EXCHANGE) and real(source, target, flag, **named)

    monkeypatch.setattr(staging, "rename", rename)
    assert try_all(Stage(tmp_path, monkeypatch), (0, 1), old=1, overwrite=True) >= 20


def test_a_planted_theft_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law fails where files are taken over one by one, and not their folder first."""

    def claim(self: staging.Staging, other: str) -> list[str]:
        assert self._root is not None
        assert self._work is not None
        taken = f"taken-{self._n_taken}"
        self._n_taken += 1
        with self._root.folder(other) as work:
            if work.status("soup") is None:
                return []
            with work.folder("soup") as soup, self._work.make(taken) as mine:
                for name in soup.names():
                    soup.move(name, mine, name)
        return [taken]

    stage = Stage(tmp_path, monkeypatch)
    monkeypatch.setattr(staging.Staging, "_claim", claim)
    with pytest.raises((AssertionError, FileNotFoundError)):
        try_all(stage, (0, 0), old=None, overwrite=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_without_locks_a_soup_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Where the file system has none; the warning says "lock", and so does any other failure."""
    stage = Stage(tmp_path, monkeypatch)

    def missing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    if code == errno.EIO:
        with pytest.raises(OutputError, match=r"its lock cannot be taken \(Input/output error\)"):
            stage.make(0, overwrite=False)
        assert not stage.output.exists()
    else:
        stage.make(0, overwrite=False)
        assert content(stage.output) == stage.whole[0]
        assert "soup.partial: the file system cannot lock files" in caplog.text
        assert os.listdir(stage.output.parent) == ["soup"]


# -- one run, killed with all but the last step done ----------------------------------------------


@pytest.mark.parametrize("when", ["before the rename", "after the rename"])
@pytest.mark.parametrize("changed", [True, False])
def test_side_files_that_changed_after_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, changed: bool
) -> None:
    """Killed when the commit was recorded: the rerun ends with side files of now, or refuses."""
    stage = Stage(tmp_path, monkeypatch)

    class KilledError(BaseException):
        pass

    def kill(self: staging.Staging) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        name = "_put_in_place" if when == "before the rename" else "discard"
        patch.setattr(staging.Staging, name, kill)
        with pytest.raises(KilledError):
            stage.make(0, overwrite=False)
    config = stage.ingredients[0] / "config.json"
    if changed:
        config.write_text('{"_name_or_path": "2"}')
    if changed and when == "after the rename":
        with pytest.raises(OutputError, match="exists already"):
            stage.make(0, overwrite=False)
        stage.make(0, overwrite=True)
    else:
        stage.make(0, overwrite=False)
    assert (stage.output / "config.json").read_text() == config.read_text()
    verify(stage.output)
    assert os.listdir(stage.output.parent) == ["soup"]
