"""A search killed at any call of the command line goes on from there: same soup, no score twice."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Machine, Result, restore
from safetensors.torch import save_file

from streamsoup.output.journal import Journal

N = 4

EVALUATION = """
import json, struct, sys, zlib
(folder,) = sys.argv[1:]
with open({root!r} + "/current") as file:
    log = file.read()
with open(folder + "/model.safetensors", "rb") as file:
    (n,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(n))
    begin, end = header["marks"]["data_offsets"]
    file.seek(8 + n + begin)
    marks = struct.unpack("<%df" % ((end - begin) // 4), file.read(end - begin))
members = [i for i, mark in enumerate(marks) if mark]
with open(log, "a") as file:
    file.write(json.dumps(members) + chr(10))
print(zlib.crc32(bytes(members)) % 9)
"""
"""Scores a candidate by which ingredients are in it, ties included, and notes that it did."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Return one machine for all tests of this file."""
    machine = Machine()
    yield machine
    machine.close()


class Searches:
    """Ingredients whose mean shows its members, and a search on a stage to be disturbed on."""

    def __init__(self, root: Path, machine: Machine, *options: str) -> None:
        self.machine = machine
        self.before, self.stage = root / "before", root / "stage"
        self.before.mkdir()
        self.root = root
        self.n_searches = 0
        (root / "eval.py").write_text(EVALUATION.replace("{root!r}", repr(str(root))))
        self.command = ["greedy"]
        generator = torch.Generator().manual_seed(3)
        for i in range(N):
            noise = torch.randn(1500, generator=generator)
            path = root / f"{i}.safetensors"
            save_file({"marks": torch.eye(N)[i], "noise": noise}, path)
            self.command.append(str(path))
        evaluation = f"{sys.executable} -I -S {root}/eval.py {{checkpoint}}"
        self.command += ["--command", evaluation, "--threads", "1", *options]
        self.command += ["-o", str(self.stage / "soup")]
        restore(self.stage, self.before)
        self.jobs = int(dict(itertools.pairwise(options)).get("--jobs", 1))
        undisturbed = self.search()
        assert undisturbed.status == 0, undisturbed.stderr
        self.n_calls = undisturbed.n_calls
        self.new = found(self.stage / "soup")
        self.once = self.scored()
        """What is scored by a search that nothing disturbs: a set again only in another order."""

    def search(self, at: int = 0, action: str = "kill", plant: str = "") -> Result:
        """Run the command."""
        # Each has its own log: what a killed one left running may yet write.
        self.n_searches += 1
        self.log = self.root / f"log{self.n_searches}"
        self.log.write_text("")
        (self.root / "current").write_text(str(self.log))
        machine, stage = self.machine, self.stage
        return machine.run(*self.command, stage=stage, at=at, action=action, plant=plant)

    def scored(self) -> Counter[tuple[int, ...]]:
        """Return what the last run scored: the members of each candidate, in no order."""
        return Counter(tuple(json.loads(line)) for line in self.log.read_text().splitlines())

    def known(self) -> Counter[tuple[int, ...]]:
        """Return what the journal knows, and thereby drop its torn tail."""
        path = self.stage / "soup.search" / "journal"
        if not path.exists():
            return Counter()
        with Journal(str(path)) as journal:
            return Counter(tuple(sorted(r["members"])) for r in journal if "members" in r)

    def at_most_once(self, scores: Counter[tuple[int, ...]]) -> bool:
        """Return True if nothing was scored twice, nor anything one scorer would not ask for."""
        if self.jobs > 1:
            return set(scores.values()) == {1}
        return scores == self.once

    def disturb(self, action: str, *, step: int, plant: str = "", start: int = 1) -> int:
        """Fail at every so many calls, search again, and give how many of them failed in time."""
        for n, at in enumerate(range(start, 10_000, 1 if "EVERY_CALL" in os.environ else step)):
            restore(self.stage, self.before)
            first = self.search(at, action, plant)
            after = Path(f"{self.stage}.after")
            if after.exists():
                shutil.rmtree(self.stage)
                os.rename(after, self.stage)
            assert "Traceback" not in first.stderr
            assert first.stderr.count("error: ") <= 1
            if first.n_calls < at:
                assert first.status == 0, first.stderr
                return n
            known = self.known()
            if not os.path.lexists(self.stage / "soup"):
                # What was being scored is lost, and with the power the last record.
                lost = self.scored() - known
                assert lost.total() <= self.jobs + (action == "power"), (at, known)
            over = not os.path.lexists(self.stage / "soup.search")
            again = self.search()
            assert again.status == 0 or (over and "exists already" in again.stderr), (at, again)
            assert self.scored().total() == 0 or self.at_most_once(self.scored() + known), at
            assert found(self.stage / "soup") == self.new, at
            debris = set(os.listdir(self.stage)) - {"soup"}
            told = "soup.partial: cannot be removed" in first.stderr
            assert debris <= ({"soup.partial"} if told else set()), at
        raise AssertionError("it never gets through")


def found(folder: Path) -> dict[str, Any]:
    """Read a soup: every file, and of its provenance what does not tell of time and of kills."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    provenance = json.loads(files.pop("streamsoup.json"))
    report = provenance.pop("report")
    del provenance["created"], provenance["checksum"]
    keys = ("ingredient", "kind", "members", "score", "to_beat", "decision")
    trials = [run["trials"] for run in report["runs"]] + [report["singles"]]
    decided = [[[trial.get(key) for key in keys] for trial in each] for each in trials]
    return {**files, "": [provenance, report["members"], report["score"], decided]}


@pytest.mark.parametrize(
    "options",
    [
        ("--passes", "3"),
        ("--order", "random", "--orders", "3"),
        ("--backward", "--sums", "file"),
        ("--jobs", "2", "--passes", "2"),
    ],
    ids=" ".join,
)
def test_killed_at_any_call(tmp_path: Path, machine: Machine, options: tuple[str, ...]) -> None:
    """Killed at any call and run again, a search scores nothing twice and makes the same soup."""
    Searches(tmp_path, machine, *options).disturb("kill", step=61)


def test_killed_while_tidying_up(tmp_path: Path, machine: Machine) -> None:
    """Killed when the soup is in place and traces are removed, a search has nothing left to do."""
    searches = Searches(tmp_path, machine)
    # A busy machine makes a call more or less, so that fewer of the last 25 are met.
    assert searches.disturb("kill", step=2, start=searches.n_calls - 25) > 5


@pytest.mark.parametrize("action", ["power", "INT", "ENOSPC", "EIO"])
def test_other_ends_at_any_call(tmp_path: Path, machine: Machine, action: str) -> None:
    """A power cut, Ctrl-C or an error of the disk at any call is mended in the same way."""
    Searches(tmp_path, machine).disturb(action, step=83)


def test_a_planted_loss_of_scores_is_found(tmp_path: Path, machine: Machine) -> None:
    """The law fails for a search that writes its scores down when all is done."""
    with pytest.raises(AssertionError):
        Searches(tmp_path, machine).disturb("kill", step=83, plant="notes no scores")
