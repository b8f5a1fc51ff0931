"""What the benchmarks say is what their rows say; and the harness runs, on something tiny."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import limits
from benchmarks.answers import check
from benchmarks.bars import Bar, bars
from benchmarks.checkpoints import Case, make
from benchmarks.measure import measure
from benchmarks.report import BEGIN, END, inserted, short_table, tables
from benchmarks.rows import Session, read
from benchmarks.tasks import greedy, growth, uniform
from benchmarks.tasks.growth import exponent, grown

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "text"), [("README.md", short_table), ("benchmarks/README.md", tables)]
)
def test_a_readme_shows_what_the_rows_say(name: str, text) -> None:
    """Tables between the markers are made of the rows: `python -m benchmarks report` makes them."""
    content = (ROOT / name).read_text(encoding="utf-8")
    if BEGIN not in content and name == "README.md":
        assert END not in content
        return
    assert inserted(content, text(read())) == content


def test_rows_name_no_place() -> None:
    """Rows hold no path and no host of the machine that measured them."""
    text = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.jsonl"))
    for word in (str(ROOT), str(Path.home()) + "/", os.uname().nodename + "/", "://", "/tmp/"):
        assert word not in text


def test_a_tiny_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are checked, then limits and streamsoup are measured, and rows come of it."""
    monkeypatch.setenv("STREAMSOUP_BENCH", str(tmp_path))
    monkeypatch.setattr(uniform, "settle", lambda: None)  # other tests never let it be quiet
    uniform.run(Session(tmp_path / "rows", log=False), Case("0.5M", 3, "F16", 2), rounds=2)
    rows = read(tmp_path / "rows")
    ours = [row for row in rows if row["tool"] == "streamsoup"]
    assert len(ours) == 2
    assert all(row["wall_s"] > 0 and row["limit_s"] > 0 for row in ours)
    assert all(row["peak_anonymous_nbytes"] > 1e6 and row["cpu_s"] > 0 for row in ours)
    assert {row["answer"]["share_wrong"] for row in ours} == {0}
    assert "| streamsoup |" in tables(rows)


@pytest.mark.parametrize("name", limits.WAYS)
def test_each_way_to_write_writes_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it waits for the disk, all is written, in whole pages where it must be."""
    path, nbytes = tmp_path / "limit", 9_000_001
    found: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: found.append(path.read_bytes()))
    if limits.write(limits.WAYS[name], nbytes, str(path)) == math.inf:
        pytest.skip("this file system has no direct writes")
    (content,) = found
    assert nbytes <= len(content) < nbytes + os.sysconf("SC_PAGE_SIZE")
    assert content.count(0) < nbytes / 200, "room that was reserved is all zeros"
    assert not path.exists()


def test_ways_to_write_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no fast one; a file system without direct writes has an infinite limit."""

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)
    way = limits.WAYS["direct"]
    code = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        limits.write(way, 5_000_000, str(tmp_path / "limit"))
    code = errno.EINVAL
    assert limits.write(way, 5_000_000, str(tmp_path / "limit")) == math.inf
    assert limits.both(1, way, 5_000_000, str(tmp_path / "limit"), []) == math.inf
    assert not list(tmp_path.iterdir())


def test_tiny_soups_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soups of more and more ingredients are measured beside their limits: a table comes of it."""
    monkeypatch.setenv("STREAMSOUP_BENCH", str(tmp_path))
    monkeypatch.setattr(growth, "settle", lambda: None)
    cases = [Case("0.5M", n) for n in (3, 4, 6)]
    growth.run(Session(tmp_path / "rows", log=False), cases, rounds=1)
    rows = read(tmp_path / "rows")
    assert [row["n"] for row in rows] == [2, 3, 4, 6]
    assert all(row["wall_s"] > 0 and row["limit_s"] > 0 for row in rows)
    assert "| 6 × 0.5M bf16 |" in tables(rows)
    assert "the limit" in tables(rows)


def test_greedy_searches_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and those of peers are run, keep as many ingredients, and say what they read."""
    monkeypatch.setenv("STREAMSOUP_BENCH", str(tmp_path))
    monkeypatch.setattr(greedy, "settle", lambda: None)
    monkeypatch.setattr(greedy, "install", lambda peers: {})
    monkeypatch.setattr(greedy, "python_of", lambda peer: sys.executable)
    session = Session(tmp_path / "rows", log=False)
    greedy.run(session, Case("0.5M", 3), score_s=0.0, rounds=1)
    rows = {row["tool"]: row for row in read(tmp_path / "rows")}
    alone = rows.pop("scoring alone")
    assert alone["wall_s"] > 0
    assert list(rows) == ["streamsoup", "paper's way", "a file for each trial"]
    assert {row["n_accepted"] for row in rows.values()} == {2}
    nbytes = Case("0.5M", 1).nbytes_each
    # Three alone and two trials; the paper's loads the best once more to begin with.
    assert rows["paper's way"]["read_per_score_nbytes"] * 5 == 6 * nbytes
    assert rows["streamsoup"]["read_per_score_nbytes"] * 5 >= 5 * nbytes


def test_a_wrong_answer_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in one element is one element wrong."""
    monkeypatch.setenv("STREAMSOUP_BENCH", str(tmp_path))
    one, *_ = make(Case("0.5M", 1))
    assert check(one, [one]).share_wrong == 0
    (path,) = one.glob("*.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    (copy / path.name).write_bytes(content)
    answer = check(copy, [one])
    assert answer.largest_ulps == 1
    assert 0 < answer.share_wrong < 1e-5


def test_a_measurement_sees_children(tmp_path: Path) -> None:
    """Memory and time of a child of the command count, and so does its failure."""
    script = "import os,sys,time\nif os.fork() == 0:\n x = bytearray(60_000_000)\n time.sleep(.2)\n"
    script += " os._exit(0)\nos.wait()\nsys.exit(3)"
    result = measure(["python3", "-S", "-c", script])
    assert result.status == 3
    assert result.peak_anonymous_nbytes > 60_000_000
    assert result.wall_s > 0.2
    assert json.loads(json.dumps(result.row()))["wall_s"] > 0.2


def test_bytecode_is_kept_between_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's start-up is measured with its sources being compiled anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    result = measure(["python3", "-S", "-c", "import sys; print(sys.dont_write_bytecode)"])
    assert result.stdout == "False\n"


def test_exponents_are_those_of_powers() -> None:
    """A cubic has exponent 3."""
    xs = np.arange(1.0, 9.0)
    assert exponent(list(zip(xs, 5 * xs**3, strict=True))) == pytest.approx(3)


@pytest.mark.parametrize(
    ("wanted", "number", "shown"),
    [
        ("≥ 0.65", 0.65, "0.650"),
        ("≥ 0.65", 0.6499, "**0.650**"),
        ("≤ 0.4", 0.0817, "0.0817"),
        ("≤ 0.4", 0.41, "**0.410**"),
        ("1.00 ± 0.05", 0.96, "0.960"),
        ("1.00 ± 0.05", 1.06, "**1.06**"),
        ("", 12.44, "12.4"),
        ("≥ 4", float("nan"), "–"),
    ],
)
def test_a_bar_that_is_missed_is_bold(wanted: str, number: float, shown: str) -> None:
    """A number shows whether it is as wanted; what was not measured is neither."""
    assert Bar("", lambda rows: number, wanted).cell([]) == shown


def test_bars_without_rows_are_not_measured() -> None:
    """A machine of which there is one row shows dashes for all the rest."""
    row = {"task": "gram", "tool": "streamsoup", "case": "", "cpu": "one", "session": "now"}
    head, *lines = bars([row])
    assert head == ["bar", "wanted", "one"]
    assert {line[2] for line in lines} == {"–"}


def test_a_bar_is_of_the_last_session() -> None:
    """A share is not that of a session with peers where a later one, without, was slower."""
    row = {"task": "uniform", "case": "8 × 125M bf16", "cache": "warm", "cpu": "one", "status": 0}
    answer = {"share_wrong": 0.0}
    rows = [
        {
            **row,
            "tool": tool,
            "session": session,
            "wall_s": wall_s,
            "limit_s": 1.0,
            "answer": answer,
        }
        for tool, session, wall_s in (
            *(("streamsoup", "1", 1.25), ("naive torch", "1", 10.0)),
            ("streamsoup", "2", 2.0),
        )
    ]
    _, share, *_ = bars(rows)
    assert share[2] == "**0.500**"


def test_only_one_thing_grows_in_a_table() -> None:
    """A session may measure more ingredients and larger models: each table has its own rows."""
    cases = [(2, "0.5M", 1), (2, "125M", 250), (8, "125M", 250), (64, "125M", 250)]
    cases += [(2, "1.1B", 2200), (2, "2.2B", 4400)]
    rows = [
        {
            "task": "growth",
            "session": "now",
            "case": Case(size, n).label,
            "n": n,
            "size": size,
            "output_nbytes": nbytes,
        }
        for n, size, nbytes in cases
    ]
    number, sizes = [[row["case"] for row in found] for _, _, found in grown(rows)]
    assert number == [Case(size, n).label for n, size, _ in cases[:4]]
    assert sizes == [Case(size, 2).label for size in ("0.5M", "125M", "1.1B", "2.2B")]
