"""Learned searches that were stopped, killed or changed: what is known is kept, or refused."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from learning import Stop, files, learn, make_batches, task_of
from torch import nn

from streamsoup.errors import ResumeError, TaskError
from streamsoup.options import Options
from streamsoup.search.learned import learned
from streamsoup.search.learning.journal import LearningJournal
from streamsoup.search.learning.settings import LearnedSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of the ingredients."""
    return files(tmp_path_factory.mktemp("learned"))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
def test_a_search_that_was_stopped_goes_on(
    paths: list[str], tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any number of batches, the same call ends with the same bits."""
    monkeypatch.setattr("streamsoup.search.learning.search.NOTE_S", 0.0)
    settings = {"optimizer": optimizer, "epochs": 2, "evaluations": 5, "granularity": "layer"}
    batches = make_batches(10)
    whole = learn(paths, tmp_path / "whole", task_of(batches), **settings)
    left = [0]

    def loss(model: nn.Module, split: str) -> Any:
        for x, y in batches:
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            yield nn.functional.cross_entropy(model(x), y), len(y)

    task = task_of(batches)
    task.loss = loss
    n_stops = 0
    for budget in [3, 14, 14, 25, 25, 10_000]:
        left[0] = budget
        try:
            soup = learn(paths, tmp_path / "soup", task, **settings)
            break
        except TaskError:
            n_stops += 1
    assert n_stops >= 2
    assert soup.rows == whole.rows
    assert [(a.loss, a.guard) for a in soup.evaluations] == [
        (a.loss, a.guard) for a in whole.evaluations
    ]
    assert soup.provenance.tensors == whole.provenance.tensors
    # All that led to a note is counted, in whichever run; each run reads some things anew.
    report, expected = soup.report, whole.report
    assert (expected["n_runs"], report["n_runs"]) == (1, 1 + n_stops)
    assert report["n_passes"] == expected["n_passes"]
    assert report["nbytes_read"] >= expected["nbytes_read"]
    assert report["elapsed_s"] > report["reading_s"] > 0
    left[0] = 3
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "other", task, **settings)
    with pytest.raises(ResumeError, match="granularity"):
        learn(paths, tmp_path / "other", task, **settings | {"granularity": "global"})


def test_a_kill_while_tidying_up_is_mended(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the soup in place, and a trace of its making left, the same call finds it finished."""

    def finish(self: LearningJournal) -> None:
        raise Stop

    task = task_of(make_batches(4))
    settings = {"evaluations": 3}
    with monkeypatch.context() as patch:
        patch.setattr(LearningJournal, "finish", finish)
        with pytest.raises(Stop):
            learn(paths, tmp_path / "soup", task, **settings)
    (tmp_path / "soup.partial").mkdir()
    before = (tmp_path / "soup" / "streamsoup.json").read_bytes()
    assert learn(paths, tmp_path / "soup", task, **settings).finished
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]
    assert (tmp_path / "soup" / "streamsoup.json").read_bytes() == before


def test_a_finished_soup_in_other_shards_is_not_taken_for_this_one(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the soup was in place, and asked for smaller shards: those are made."""

    def search(**options: Any) -> Any:
        return learned(
            paths,
            task_of(make_batches(4)),
            output=tmp_path / "soup",
            settings=LearnedSettings(evaluations=3),
            options=Options(non_float="first", overwrite=True, **options),
        )

    def finish(self: LearningJournal) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LearningJournal, "finish", finish)
        with pytest.raises(Stop):
            search()
    assert not search(shard_size=300).finished
    assert len(list((tmp_path / "soup").glob("*.safetensors"))) > 1


def test_looks_come_back_from_the_notes_as_they_were(paths: list[str], tmp_path: Path) -> None:
    """Also where a watched loss was infinite: the search that goes on is the same."""
    number = [0]  # of the look; the sixth is stopped, once

    def loss(model: nn.Module, split: str) -> Any:
        number[0] += 1
        if number[0] == number[-1]:
            raise Stop
        for n, (x, y) in enumerate(make_batches(5)):
            far = n == 4 and number[0] == 3
            yield nn.functional.cross_entropy(model(x), y) * (math.inf if far else 1), len(y)

    task = task_of([])
    task.loss = loss
    number[:] = [0, -1]
    whole = learn(paths, tmp_path / "whole", task, evaluations=8)
    assert not math.isfinite(whole.evaluations[2].guard)
    number[:] = [0, 6]
    with pytest.raises(TaskError):
        learn(paths, tmp_path / "soup", task, evaluations=8)
    number[:] = [5, -1]
    soup = learn(paths, tmp_path / "soup", task, evaluations=8)
    assert (soup.rows, soup.best) == (whole.rows, whole.best)


def test_an_older_soup_of_the_same_is_not_the_one_under_way(
    paths: list[str], tmp_path: Path
) -> None:
    """A search to replace it that was stopped goes on: its data may have changed meanwhile."""
    batches, left = make_batches(4), [0]

    def loss(model: nn.Module, split: str) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Stop
        for x, y in batches:
            yield nn.functional.cross_entropy(model(x), y), len(y)

    def search() -> Any:
        return learned(
            paths,
            task,
            output=tmp_path / "soup",
            settings=LearnedSettings(evaluations=4),
            options=Options(non_float="first", overwrite=True),
        )

    task = task_of([])
    task.loss = loss
    before = search()
    batches[:], left[0] = make_batches(8)[4:], 2
    with pytest.raises(TaskError):
        search()
    after = search()
    assert not after.finished
    assert after.rows != before.rows
    assert not (tmp_path / "soup.search").exists()


def test_notes_are_kept_on_disk_alone(tmp_path: Path) -> None:
    """A long search takes notes every ten seconds, each as large as all it learns."""
    target = str(tmp_path / "soup")
    tracemalloc.start()
    with LearningJournal(target, {"of": "this"}, restart=False) as notebook:
        for number in range(200):
            notebook.put({"adamw": 0, "done": number, "raw": [0.1 + number] * 1000})
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 300_000
    with LearningJournal(target, {"of": "this"}, restart=False) as notebook:
        found = notebook.find("adamw")
    assert found is not None
    assert found["done"] == 199
