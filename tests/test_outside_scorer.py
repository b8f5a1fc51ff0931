"""A scorer from outside the package: same outcome as a live model, journalled, resumed."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from outside.table_scorer import TableScorer
from safetensors.torch import save_file
from torch import nn

from streamsoup import Coefficients, Linear, Scorer, greedy, verify
from streamsoup.errors import RecipeError, ResumeError, StreamsoupError, TaskError
from streamsoup.search.greedy import GreedySettings, GreedySoup

N = 5


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Make ingredients that are unit vectors, so that a mean shows its members."""
    for i in range(N):
        save_file({"w": torch.eye(N)[i]}, tmp_path / f"{i}.safetensors")
    return [str(tmp_path / f"{i}.safetensors") for i in range(N)]


def scores_of(seed: int) -> dict[frozenset[int], float]:
    """Draw a score for every set of ingredients, with ties."""
    draw = random.Random(seed)
    sets = (frozenset(s) for n in range(1, N + 1) for s in itertools.combinations(range(N), n))
    return {each: draw.randrange(6) / 8 for each in sets}


class Marks(nn.Module):
    """A model that is the vector of its members."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(N))


def table_of(scores: dict[frozenset[int], float], paths: list[str]) -> dict[frozenset[str], float]:
    """Name ingredients as recipes do."""
    return {frozenset(paths[i] for i in each): score for each, score in scores.items()}


def decided(soup: GreedySoup) -> list[Any]:
    """List every trial, and the outcome."""
    runs = [
        [(t.members, t.score.value, t.to_beat, t.decision) for t in each]
        for each in (soup.singles, *(run.trials for run in soup.runs))
    ]
    return [runs, soup.members, soup.score]


@pytest.mark.parametrize("n_at_once", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        GreedySettings(),
        GreedySettings(ties="reject", passes=3),
        GreedySettings(direction="backward", passes=2),
        GreedySettings(order="random", n_orders=3),
    ],
    ids=["forward", "passes", "backward", "random"],
)
def test_the_outcome_is_that_of_a_live_model(
    tmp_path: Path, paths: list[str], settings: GreedySettings, n_at_once: int
) -> None:
    """Whoever scores, and however many at once: same trials, decisions and bytes."""
    for seed in range(3):
        scores = scores_of(seed)

        def live(model: nn.Module, scores: dict[frozenset[int], float] = scores) -> float:
            marks = model.get_parameter("w").detach().nonzero().flatten()
            return scores[frozenset(map(int, marks))]

        expected = greedy(
            paths, live, model=Marks(), output=tmp_path / f"live{seed}", settings=settings
        )
        scorer = TableScorer(table_of(scores, paths), n_at_once=n_at_once)
        assert isinstance(scorer, Scorer)
        soup = greedy(paths, scorer, output=tmp_path / f"table{seed}", settings=settings)
        assert decided(soup) == decided(expected)
        files = [Path(each.path, "model.safetensors").read_bytes() for each in (soup, expected)]
        assert files[0] == files[1]
        assert verify(soup.path).rederived
        assert scorer.is_closed
        (everything,) = scorer.prepared
        assert everything.ingredients == tuple(paths)
        counts = Counter(candidate.members for candidate in scorer.scored)
        assert set(counts.values()) == {1}
        for candidate in scorer.scored:
            assert candidate.recipe.ingredients == tuple(paths[i] for i in candidate.members)
            assert candidate.recipe.rule == Linear(Coefficients.uniform(len(candidate.members)))
        assert soup.report["task"] == "table"


class Blocking(TableScorer):
    """Answers later questions first, and counts how many are open."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.n_open = self.most_open = 0
        self.fails: set[tuple[int, ...]] = set()
        self.threads: set[int] = set()

    def score(self, candidate: Any) -> float:
        """Wait the longer, the earlier the candidate is in its list."""
        with self._lock:
            self.n_open += 1
            self.most_open = max(self.most_open, self.n_open)
            self.threads.add(threading.get_ident())
        time.sleep(0.02 * (N - candidate.members[-1]))
        try:
            if candidate.members in self.fails:
                raise ValueError("no such entry")
            return super().score(candidate)
        finally:
            with self._lock:
                self.n_open -= 1


def test_as_many_at_once_as_it_says(tmp_path: Path, paths: list[str]) -> None:
    """Never more than `n_at_once`; one alone is asked in the caller's own thread."""
    table = table_of(scores_of(0), paths)
    for n in (1, 2, 4):
        scorer = Blocking(table, n_at_once=n)
        greedy(paths, scorer, output=tmp_path / str(n))
        assert scorer.most_open == n
        assert (scorer.threads == {threading.get_ident()}) == (n == 1)


def test_what_fails_ahead_fails_for_nothing(tmp_path: Path, paths: list[str]) -> None:
    """A candidate that one at a time would not try may fail; one that it would try is named."""
    scores = {frozenset(each): 0.0 for each in scores_of(0)}
    scores |= {frozenset((0,)): 0.5, frozenset((0, 1)): 0.6, frozenset((0, 1, 3)): 0.7}
    settings = GreedySettings(order="given")
    table = table_of(scores, paths)
    expected = decided(
        greedy(paths, TableScorer(table), output=tmp_path / "one", settings=settings)
    )
    scorer = Blocking(table, n_at_once=4)
    scorer.fails = {(0, 2), (0, 3)}
    soup = greedy(paths, scorer, output=tmp_path / "ahead", settings=settings)
    assert decided(soup) == expected
    assert (0, 2) not in soup.members
    scorer.fails = {(0, 1, 3)}
    for n in (1, 4):
        scorer.n_at_once = n
        with pytest.raises(
            TaskError,
            match=r"^table: scoring failed: ValueError: no such entry; the candidate is the mean "
            r"of .*0\.safetensors, .*1\.safetensors, .*3\.safetensors$",
        ):
            greedy(paths, scorer, output=tmp_path / f"fails{n}", settings=settings)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from outside.table_scorer import TableScorer
from streamsoup import greedy

class Dying(TableScorer):
    def score(self, candidate):
        with open({log!r}, "a") as file:
            print(*candidate.members, file=file)
        if len(self.scored) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(candidate)

greedy({paths!r}, Dying({table!r}), output={output!r})
"""


def test_resumed_after_a_kill(tmp_path: Path, paths: list[str]) -> None:
    """Killed in any score and run again, no score that was answered is asked for again."""
    table = table_of(scores_of(1), paths)
    whole_scorer = TableScorer(table)
    whole = greedy(paths, whole_scorer, output=tmp_path / "whole")
    n = len(whole_scorer.scored)
    for at in (0, 1, n // 2, n - 1):
        log, output = tmp_path / f"log{at}", str(tmp_path / f"out{at}")
        tests = str(Path(__file__).parent)
        script = KILLED.format(
            tests=tests, log=str(log), at=at, paths=paths, table=table, output=output
        )
        killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert killed.returncode == -9, killed.stderr
        before = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
        assert len(before) == at + 1
        assert not os.path.exists(output)
        scorer = TableScorer(table)
        soup = greedy(paths, scorer, output=output)
        asked = [candidate.members for candidate in scorer.scored]
        assert before[:-1] + asked == [each.members for each in whole_scorer.scored]
        assert soup.report["n_resumed"] == at
        assert decided(soup) == decided(whole)
        assert not os.path.exists(f"{output}.search")


def test_scores_of_another_fingerprint_are_not_used(tmp_path: Path, paths: list[str]) -> None:
    """An unfinished search of another table is refused; a scorer may refuse ingredients."""
    table = table_of(scores_of(1), paths)
    scorer = Blocking(table)
    scorer.fails = {(3,)}
    with pytest.raises(TaskError, match=r"the candidate is .*3\.safetensors alone"):
        greedy(paths, scorer, output=tmp_path / "out")
    with pytest.raises(ResumeError, match="the code of the task changed"):
        greedy(paths, TableScorer(table, default=0.5), output=tmp_path / "out")
    assert greedy(paths, TableScorer(table), output=tmp_path / "out").report["n_resumed"] == 3

    class Small(TableScorer):
        def prepare(self, recipe: Any) -> None:
            raise TaskError(f"table: scores 3 ingredients at most, got {len(recipe.ingredients)}")

    with pytest.raises(TaskError, match=r"3 ingredients at most, got 5$"):
        greedy(paths, Small(table), output=tmp_path / "small")
    assert not (tmp_path / "small.search").exists()


@pytest.mark.parametrize(
    ("settings", "answer", "message"),
    [
        ({"jobs": 2}, 1.0, "a scorer decides itself"),
        ({"split": "test"}, 1.0, "a scorer decides itself"),
        ({"recalibrate": True}, 1.0, "a scorer decides itself"),
        ({}, None, "table: answered with None"),
        ({}, "high", "table: answered with str 'high'"),
        ({}, {"at_most": 1.0}, "table: stopped early"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, paths: list[str], settings: dict[str, Any], answer: Any, message: str
) -> None:
    """Settings of scorers that we start ourselves; and answers that are not scores."""
    scorer: Any = TableScorer({}, default=answer)
    with pytest.raises((RecipeError, TaskError), match=message):
        greedy(paths, scorer, output=tmp_path / "out", settings=GreedySettings(**settings))
    scorer.n_at_once = 0
    with pytest.raises(StreamsoupError, match=r"a scorer decides|n_at_once must be at least 1"):
        greedy(paths, scorer, output=tmp_path / "out", settings=GreedySettings(**settings))


def test_the_page_on_scorers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class and the call of docs/joints/scorer.md are a scorer and a search."""
    page = Path(__file__).parent.parent / "docs" / "joints" / "scorer.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        Path(f"run{i}").mkdir()
        save_file({"w": torch.eye(3)[i]}, f"run{i}/model.safetensors")
    known: dict[str, Any] = {"__name__": "page"}
    exec("".join(blocks), known)
    assert isinstance(known["TableScorer"]({}), Scorer)
    assert known["soup"].members == (1, 0)
