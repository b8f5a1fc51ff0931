"""A merge method from outside the package: planned, bounded, resumed and verified like our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import load, save, tensor
from numpy.typing import NDArray
from outside.ties import OutsideTies

import streamsoup
from streamsoup import Options
from streamsoup.engine import budget, plan, stream
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import MismatchError, NonFiniteError, RecipeError
from streamsoup.output.make import make, order
from streamsoup.recipe import Coefficients

SHAPES = {"a": (37, 211), "b": (5000,), "c": (), "d": (0, 3), "e": (1, 4097)}


def checkpoints(tmp_path: Path, n: int = 4, dtype: type = np.float32) -> list[str]:
    """Save a base and fine-tunes of it, with many equal magnitudes."""
    rng = np.random.default_rng(0)
    base = {name: rng.integers(-4, 5, shape).astype(dtype) for name, shape in SHAPES.items()}
    paths = []
    for i in range(n):
        moved = {
            name: value + (0 if i == 0 else rng.integers(-9, 10, value.shape)).astype(dtype) / 8
            if i
            else value
            for name, value in base.items()
        }
        content = {name: tensor(np.asarray(value, dtype)) for name, value in moved.items()}
        content["n"] = tensor(np.array([1, 2], np.int64))
        paths.append(str(save(tmp_path / f"m{i}", content)))
    return paths


def ties(base: NDArray[np.float64], others: list[NDArray[np.float64]], density: float) -> object:
    """Merge one tensor, by a stable sort: the definition, all in memory."""
    kept = []
    for other in others:
        task = (other - base).ravel()
        k = max(1, int(density * len(task)))
        order = np.argsort(-np.abs(task), kind="stable")[:k]
        kept.append(np.zeros_like(task))
        kept[-1][order] = task[order]
    sign = np.where(np.sum(kept, axis=0) >= 0, 1.0, -1.0)
    agree = [np.sign(task) == sign for task in kept]
    count = np.sum(agree, axis=0)
    agreed = np.sum([np.where(a, task, 0) for a, task in zip(agree, kept, strict=True)], axis=0)
    flat = base.ravel()
    return np.where(count > 0, flat + agreed / np.maximum(count, 1), flat).reshape(base.shape)


def files(folder: Path) -> dict[str, bytes]:
    """Read the weights of a soup."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_it_makes_what_its_definition_says(tmp_path: Path, density: float) -> None:
    """Every element equals the merge of whole tensors by a stable sort."""
    paths = checkpoints(tmp_path)
    soup = streamsoup.apply(paths, OutsideTies(density), output=tmp_path / "soup")
    found = load(Path(soup.path))
    every = [load(Path(path)) for path in paths]
    for name, (_, shape, content) in found.items():
        if name == "n":
            continue
        base, *others = (np.frombuffer(each[name][2], np.float32).astype(float) for each in every)
        expected = ties(base, others, density) if base.size else base
        assert np.array_equal(np.frombuffer(content, np.float32), np.float32(expected)), name
        assert shape == SHAPES[name]


def test_bytes_do_not_depend_on_how_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small leaves and blocks, any number of threads, mapped or read: the same bytes."""
    paths = checkpoints(tmp_path)
    whole = streamsoup.apply(paths, OutsideTies(0.3), output=tmp_path / "whole")
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 4096)
    monkeypatch.setattr(stream, "ALONE_NBYTES", 0)
    for threads, io in [(1, "mmap"), (4, "read")]:
        options = Options(threads=threads, io=io)  # type: ignore[arg-type]
        cut = streamsoup.apply(
            paths, OutsideTies(0.3), output=tmp_path / f"{threads}", options=options
        )
        assert files(Path(cut.path)) == files(Path(whole.path))


def test_it_is_verified_by_its_class_alone(tmp_path: Path) -> None:
    """Given its class, a soup verifies; without it, the rule is named; another value is found."""
    paths = checkpoints(tmp_path)
    soup = streamsoup.apply(paths, OutsideTies(0.3), output=tmp_path / "soup")
    assert streamsoup.verify(soup.path, rules=[OutsideTies]).rederived
    assert not streamsoup.verify(soup.path, quick=True).rederived
    with pytest.raises(RecipeError, match="rule 'outside-ties'"):
        streamsoup.verify(soup.path)
    other = streamsoup.apply(paths, OutsideTies(0.9), output=tmp_path / "other")
    text = (Path(soup.path) / "streamsoup.json").read_bytes()
    assert b'"density": 0.3' in text
    assert files(Path(other.path)) != files(Path(soup.path))


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import streamsoup
from outside.ties import OutsideTies
from streamsoup.engine import plan, stream
from streamsoup.output import write
plan.LEAF, stream.CHECKPOINT_S, stream.ALONE_NBYTES, stream.TICK_S = 4096, 1e9, -1, 0.001
made = stream._Pass.make_leaf
n = 0
def make_leaf(self, *arguments):
    global n
    n += 1
    if n == {after}:
        self.ledger.checkpoint()
        os._exit(9)
    made(self, *arguments)
stream._Pass.make_leaf = make_leaf
one = streamsoup.Options(threads=1)
streamsoup.apply({paths!r}, OutsideTies(0.3), output={output!r}, options=one)
"""


@pytest.mark.parametrize("after", [2, 4, 6])
def test_it_is_resumed_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed between leaves, the same command goes on from them, to the bytes of one run."""
    paths = checkpoints(tmp_path)
    whole = streamsoup.apply(paths, OutsideTies(0.3), output=tmp_path / "whole")
    output = str(tmp_path / "soup")
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, after=after, paths=paths, output=output)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    monkeypatch.setattr(plan, "LEAF", 4096)
    monkeypatch.setattr(stream, "ALONE_NBYTES", -1)
    restored: list[int] = []
    finish = stream._Pass.finish

    def finishing(self: stream._Pass, leaf: plan.Leaf, digests: bytes) -> None:
        assert self.ledger is not None
        restored.append(self.ledger.noted(leaf))
        finish(self, leaf, digests)

    monkeypatch.setattr(stream._Pass, "finish", finishing)
    resumed = streamsoup.apply(paths, OutsideTies(0.3), output=output)
    assert files(Path(resumed.path)) == files(Path(whole.path))
    assert any(restored)


def test_another_density_is_another_soup(tmp_path: Path) -> None:
    """Recipes that differ in a parameter of the rule share no unfinished work."""
    from streamsoup.output.make import _fingerprint

    paths = checkpoints(tmp_path)
    prints = {
        _fingerprint(order(paths, rule, method="x", options=Options()))
        for rule in (OutsideTies(0.3), OutsideTies(0.4), Linear(Coefficients.uniform(4)))
    }
    assert len(prints) == 3


def test_its_memory_is_planned(tmp_path: Path) -> None:
    """What the rule says it holds is in the plan, and blocks shrink to fit the budget."""
    paths = checkpoints(tmp_path)
    usual = order(paths, OutsideTies(0.3), method="x", options=Options(threads=2)).memory
    small = order(paths, OutsideTies(0.3), method="x", options=Options(threads=2, memory="125MB"))
    assert small.memory.peak_nbytes <= 125_000_000 < usual.peak_nbytes
    assert small.memory.block < usual.block


def test_a_nan_is_named(tmp_path: Path) -> None:
    """A NaN that the rule would drop ends the run with its file, tensor and place."""
    paths = checkpoints(tmp_path)
    content = load(Path(paths[2]))
    values = np.frombuffer(content["a"][2], np.float32).copy()
    values[5] = np.nan
    content["a"] = (content["a"][0], content["a"][1], values.tobytes())
    save(Path(paths[2]), content)
    with pytest.raises(NonFiniteError, match=r"m2.*: a: holds nan at \[0, 5\]"):
        streamsoup.apply(paths, OutsideTies(0.3), output=tmp_path / "soup")


def test_integers_that_differ_are_refused(tmp_path: Path) -> None:
    """What no rule makes is copied when equal, and refused when not."""
    paths = checkpoints(tmp_path)
    content = load(Path(paths[1]))
    content["n"] = tensor(np.array([1, 3], np.int64))
    save(Path(paths[1]), content)
    with pytest.raises(MismatchError, match="n: this I64"):
        streamsoup.apply(paths, OutsideTies(0.3), output=tmp_path / "soup")


def test_a_rule_that_never_has_enough_is_refused(tmp_path: Path) -> None:
    """Planted fault: a rule that measures more often than it announced does not run for ever."""

    class Insatiable(OutsideTies, tag="insatiable", frozen=True):
        n_passes = 2

    with pytest.raises(RecipeError, match="n_passes"):
        streamsoup.apply(checkpoints(tmp_path), Insatiable(0.3), output=tmp_path / "soup")


def test_what_is_not_a_rule_is_refused(tmp_path: Path) -> None:
    """A class without a tag, or of another kind, is named."""
    for given in (object(), Coefficients.uniform(4)):
        with pytest.raises(RecipeError, match="is not a rule"):
            streamsoup.apply(checkpoints(tmp_path), given, output=tmp_path / "s")  # type: ignore[arg-type]


def test_the_plain_form_of_the_linear_rule_has_the_same_bytes(tmp_path: Path) -> None:
    """`Mix` is a faster form of what the linear rule says, never another algorithm."""
    from streamsoup.engine.apply import Apply
    from streamsoup.engine.read import open_reader
    from streamsoup.engine.reducers import reducer_of
    from streamsoup.engine.stream import DigestLedger, Nowhere, run

    for dtype in (np.float16, np.float32, np.float64):
        paths = checkpoints(tmp_path / dtype.__name__, dtype=dtype)
        for coefficients in (Coefficients.uniform(4), Coefficients((0.3, -1.0, 0.7, 1.1), 3.0)):
            ordered = order(paths, Linear(coefficients), method="mix", options=Options())
            found = []
            for reducer in (
                Apply(ordered.plan, ordered.memory),
                reducer_of(ordered.plan, ordered.memory),
            ):
                ledger = DigestLedger(ordered.plan)
                reader = open_reader(ordered.plan, ordered.memory, mapped=True)
                run(ordered.plan, ordered.memory, reader, reducer, Nowhere(), ledger=ledger)
                found.append(ledger.digests.of_soup())
            assert found[0] == found[1]
    assert make(ordered, output=tmp_path / "soup", options=Options()).provenance.tensors == found[0]
