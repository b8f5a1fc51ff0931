"""Searches in inference servers: the outcome of a sequential search, whatever a server does."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from searching import marks
from stub_servers import Stub

import streamsoup
from streamsoup import GreedySettings, SweepSettings, greedy, sweep
from streamsoup.errors import OutputError, RecipeError, TaskError
from streamsoup.search.scoring import servers as scoring
from streamsoup.task.command import command_task

SCORES = {(0,): 5.0, (1,): 7.0, (2,): 3.0, (0, 1): 8.0, (1, 2): 6.0, (0, 1, 2): 8.5}


def score(url: str, split: str) -> float:
    """Ask a stub which ingredients its weights are of, and look up their score."""
    with urllib.request.urlopen(f"{url}/score", timeout=5) as answer:
        return SCORES[tuple(json.loads(answer.read())["members"])]


TASK = SimpleNamespace(score=score)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PAUSE_S", 0.01)


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    """Return a list of stubs, which are stopped at the end."""
    started: list[Stub] = []
    yield started
    for stub in started:
        stub.stop()


def search(
    tmp_path: Path, stubs: list[Stub], task: Any = TASK, name: str = "out", **more: Any
) -> Any:
    """Search in servers."""
    ingredients = marks(tmp_path / "in", 3) if not (tmp_path / "in").exists() else None
    paths = ingredients or sorted(map(str, (tmp_path / "in").iterdir()))
    settings = GreedySettings(
        servers=[stub.url for stub in stubs],
        server_kind=stubs[0].kind,  # type: ignore[arg-type]
        **{"reload_timeout": 5.0, **more},
    )
    return greedy(paths, task, output=tmp_path / name, settings=settings)


def outcome(soup: Any) -> Any:
    """Return what a search decided."""
    return (
        soup.members,
        soup.score,
        [
            (trial.members, trial.score.value, trial.decision)
            for run in soup.runs
            for trial in run.trials
        ],
    )


EXPECTED = ((1, 0, 2), 8.5)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("n", [1, 3])
def test_servers_score_as_one_would(kind: str, n: int, tmp_path: Path, stubs: list[Stub]) -> None:
    """Any number of servers ends with the same soup and decisions; nothing is left behind."""
    stubs += [Stub(kind) for _ in range(n)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    soup = search(tmp_path, stubs, scratch=str(scratch))
    alone = [Stub(kind)]
    stubs += alone
    assert outcome(soup) == outcome(search(tmp_path, alone, name="alone"))
    assert (soup.members, soup.score) == EXPECTED
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out.search").exists()
    assert soup.report["servers"] == {"reloads": 0, "rescored": 0, "equal": 0}
    flushes = {"vllm": "/reset_prefix_cache", "sglang": "/update_weights_from_disk"}[kind]
    assert (
        sum(path == flushes for stub in stubs[:n] for path in stub.asked) >= soup.report["n_scored"]
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fault", "times", "said"),
    [
        ("fails", 2, "answered 500"),
        ("dies", 1, "gave no answer"),
        ("hangs", 1, "did not answer within"),
        ("garbage", 1, "answered no JSON"),
        ("endless", 1, "longer than"),
        ("says another version", 1, "somebody's"),
        ("changes in between", 1, "became version somebody's"),
        ("dies in a score", 1, "while it was scored"),
    ],
)
def test_what_passes_is_overcome_and_said(
    kind: str,
    fault: str,
    times: int,
    said: str,
    tmp_path: Path,
    stubs: list[Stub],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fault that passes changes no outcome, and a warning names it and the server."""
    stubs.append(Stub(kind, **{fault: times}))
    reload_timeout = 1.0 if fault == "hangs" else 5.0
    if fault == "says another version":
        stubs[0].faults[fault] = 0
        marks(tmp_path / "in", 3)
    soup = None
    if fault == "says another version":
        # The first version is asked for before anything is loaded.
        class Late(Stub):
            def load(self, folder: str, version: str) -> dict[str, Any]:
                if self.n_loads == 1:
                    self.faults["says another version"] = 1
                return super().load(folder, version)

        stubs[0].stop()
        stubs[:] = [Late(kind)]
    soup = search(tmp_path, stubs, reload_timeout=reload_timeout)
    assert (soup.members, soup.score) == EXPECTED
    assert said in caplog.text
    assert stubs[0].url in caplog.text


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("sglang", "refuses", "could not load the weights: shapes do not fit"),
        ("sglang", "fails", "answered 500: .*out of memory"),
        ("vllm", "fails", "answered 500"),
        ("vllm", "changes in between", "became version somebody's while a candidate was scored"),
        ("sglang", "garbage", "answered no JSON"),
    ],
)
def test_what_stays_ends_the_search_by_name(
    kind: str, fault: str, message: str, tmp_path: Path, stubs: list[Stub]
) -> None:
    """A fault that stays ends the search, naming it and the server; the same call then goes on."""

    class Breaks(Stub):
        """Works for two candidates, and never again."""

        def load(self, folder: str, version: str) -> dict[str, Any]:
            if self.n_loads == 1:
                self.faults[fault] = 10**6
            return super().load(folder, version)

    stubs.append(Breaks(kind))
    with pytest.raises(TaskError, match=message) as error:
        search(tmp_path, stubs)
    assert stubs[0].url in str(error.value)
    stubs.append(Stub(kind))
    soup = search(tmp_path, stubs[1:])
    assert (soup.members, soup.score) == EXPECTED
    assert soup.report["n_resumed"] >= 1


def test_stale_weights_are_found(
    tmp_path: Path, stubs: list[Stub], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that says the new version and keeps the old weights is found by an equal score."""

    class Stale(Stub):
        def load(self, folder: str, version: str) -> dict[str, Any]:
            if self.n_loads == 2:
                self.faults["keeps old weights"] = 1
            return super().load(folder, version)

    stubs.append(Stale("sglang"))
    soup = search(tmp_path, stubs)
    assert (soup.members, soup.score) == EXPECTED
    assert "had kept old weights" in caplog.text
    assert soup.report["servers"]["rescored"] == 1
    assert soup.report["servers"]["equal"] == 0


def test_equal_scores_count_after_a_second_look(tmp_path: Path, stubs: list[Stub]) -> None:
    """Scores that are equal in earnest count, and the report says how often that was seen."""
    stubs.append(Stub("sglang"))
    soup = search(tmp_path, stubs, SimpleNamespace(score=lambda url, split: 1.0))
    assert soup.report["servers"]["equal"] == soup.report["servers"]["rescored"] > 0


@pytest.mark.parametrize(("kind", "n"), [("vllm", 1), ("sglang", 2)])
def test_a_sweep_is_scored_in_servers(
    kind: str, n: int, tmp_path: Path, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point is loaded by a server under a version of its own, also after a kill."""
    stubs += [Stub(kind) for _ in range(n)]
    base, *paths = marks(tmp_path / "in", 3)
    settings = SweepSettings(
        servers=[stub.url for stub in stubs],
        server_kind=kind,  # type: ignore[arg-type]
        scratch=str(tmp_path),
    )
    asked = []

    def score(url: str, split: str) -> float:
        with urllib.request.urlopen(f"{url}/score", timeout=5) as answer:
            weights = json.loads(answer.read())["weights"]
        asked.append(weights)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return float(weights[1] - 2 * weights[0] ** 2)

    def run() -> Any:
        grid = {"scale": [0.25, 0.5, 1.0]}
        task = SimpleNamespace(score=score)
        out = tmp_path / "out"
        return sweep(paths, "arithmetic", task, grid, base=base, output=out, settings=settings)

    with pytest.raises(KeyboardInterrupt):
        run()
    soup = run()
    found = {point["values"]["scale"]: point["score"] for point in soup.report["sweep"]["points"]}
    assert found == {s: s - 2 * (1 - 2 * s) ** 2 for s in (0.25, 0.5, 1.0)}
    assert soup.report["sweep"]["compared"] == {"the base": -2.0, "the mean": 0.5}
    assert dict(soup.best) == {"scale": 0.5}
    assert list(map(tuple, asked)).count((1.0, 0.0, 0.0)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    settings = SweepSettings(servers=["http://127.0.0.1:1"])
    with pytest.raises(RecipeError, match="go together"):
        run()


def test_a_command_gets_its_server(tmp_path: Path, stubs: list[Stub]) -> None:
    """A command finds the address as {server} and in its environment, and needs no checkpoint."""
    stubs.append(Stub("sglang"))
    script = tmp_path / "ask.py"
    script.write_text(
        "import json, os, sys, urllib.request\n"
        "assert os.environ['STREAMSOUP_SERVER'] == sys.argv[1]\n"
        "found = json.loads(urllib.request.urlopen(sys.argv[1] + '/score').read())\n"
        f"print({ {str(list(k)): v for k, v in SCORES.items()} }[str(found['members'])])\n"
    )
    line = f"{sys.executable} -I -S {script} {{server}}"
    task = command_task(line, main=None, timeout=20.0, in_server=True)
    soup = search(tmp_path, stubs, task)
    assert (soup.members, soup.score) == EXPECTED


def test_a_task_that_fails_is_not_the_servers_fault(tmp_path: Path, stubs: list[Stub]) -> None:
    """An error of the task ends the search at once, with the line that failed."""
    stubs.append(Stub("vllm"))

    def broken(url: str, split: str) -> float:
        raise ValueError("no such data")

    with pytest.raises(TaskError, match=r"score failed: ValueError: no such data \(line"):
        search(tmp_path, stubs, SimpleNamespace(score=broken))
    assert stubs[0].n_loads == 1


def test_a_server_that_is_not_there(tmp_path: Path, stubs: list[Stub]) -> None:
    """Before anything is scored, a server that does not answer is named."""
    stubs.append(Stub("sglang"))
    url = stubs[0].url
    stubs.pop().stop()
    gone = SimpleNamespace(url=url, kind="sglang")
    with pytest.raises(TaskError, match=f"{url}/get_weight_version: gave no answer"):
        search(tmp_path, [gone], reload_timeout=0.05)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"servers": ["localhost:8000"]}, "is not an address"),
        ({"servers": ["file:///etc/passwd"]}, "is not an address"),
        ({"servers": ["http://user:secret@localhost"]}, "leave the password out"),
        ({"servers": ["http://a", "http://a"]}, "each once"),
        ({"servers": "http://a"}, "list of addresses"),
        ({"servers": ["http://a"], "server_kind": None}, "go together"),
        ({"servers": ["http://a"], "jobs": 2}, "the servers have the model"),
        ({"servers": ["http://a"], "recalibrate": True}, "the servers have the model"),
        ({"servers": ["http://a"], "reload_timeout": 0}, "must be above 0"),
        ({"scratch": "x", "server_kind": None}, "give servers, too"),
    ],
)
def test_settings_that_do_not_fit(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Settings that contradict each other are refused before any server is asked."""
    settings: dict[str, Any] = {"server_kind": "vllm", **more}
    with pytest.raises(RecipeError, match=message) as error:
        greedy(
            marks(tmp_path / "in", 2),
            TASK,
            output=tmp_path / "out",
            settings=GreedySettings(**settings),
        )
    assert "secret" not in str(error.value)


def test_scratch_of_others_and_of_killed_runs(tmp_path: Path, stubs: list[Stub]) -> None:
    """What a killed run left in the scratch folder goes; a missing folder is named."""
    stubs.append(Stub("sglang"))
    scratch = tmp_path / "scratch"
    with pytest.raises(OutputError, match="scratch: candidates cannot be written there: No such"):
        search(tmp_path, stubs, scratch=str(scratch))
    scratch.mkdir()

    class Dies(BaseException):
        pass

    def killed(url: str, split: str) -> float:
        (left,) = scratch.iterdir()
        os.link(next(left.rglob("*.safetensors")), tmp_path / "kept")
        raise Dies

    with pytest.raises(Dies):
        search(tmp_path, stubs, SimpleNamespace(score=killed), scratch=str(scratch))
    assert list(scratch.iterdir()) == []
    assert streamsoup.inspect(tmp_path / "kept").n_tensors >= 1
