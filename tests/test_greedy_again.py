"""Greedy searches that were killed, changed or run beside others: scores are kept, or refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from safetensors.torch import load_file
from searching import (
    Killed,
    Marks,
    failing,
    interrupted,
    marks,
    table,
    task_of_two,
    weights,
)
from torch import nn

import streamsoup
from streamsoup import GreedySettings, GreedySoup, Options, greedy
from streamsoup.errors import (
    OutputBusyError,
    OutputExistsError,
    RecipeError,
    ResumeError,
    TaskError,
)
from streamsoup.output.journal import Journal
from streamsoup.search.folder import SearchFolder
from streamsoup.search.scoring.journal import ScoreJournal
from streamsoup.task import load_task
from streamsoup.task.running import contained


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of the ingredients."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"))


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_record(
    tmp_path: Path, paths: list[str], torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after or amid any record and run again: no score twice, and the same soup."""
    calls: list[int] = []

    def task(model: nn.Module) -> float:
        calls.append(1)
        return networks.score(model)

    whole = greedy(paths[:4], task, model=networks.build(), output=tmp_path / "whole")
    n_scores = len(calls)
    append = Journal.append
    for kill_at in range(n_scores + 1):
        calls.clear()
        written = 0

        def dying(
            self: Journal, record: dict[str, Any], *, wait: bool = True, kill_at: int = kill_at
        ) -> None:
            nonlocal written
            append(self, record, wait=wait)
            if "search" not in record and "members" not in record:
                return
            if written == kill_at:
                if torn and "members" in record:
                    size = os.path.getsize(self.path)
                    os.truncate(self.path, size - 3)
                raise Killed
            written += 1

        output = tmp_path / f"killed{kill_at}"
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", dying)
            with pytest.raises(Killed):
                greedy(paths[:4], task, model=networks.build(), output=output)
        assert not output.exists()
        soup = greedy(paths[:4], task, model=networks.build(), output=output)
        assert len(calls) == n_scores + (torn and kill_at > 0)
        assert soup.members == whole.members
        assert weights(soup.path) == weights(whole.path)


def test_damage_and_changes_are_refused_by_name(tmp_path: Path, paths: list[str]) -> None:
    """A damaged journal, a changed ingredient, task or option: each is named, with advice."""
    own = []
    for path in paths[:3]:
        own.append(str(shutil.copytree(path, tmp_path / Path(path).name)))
    output = tmp_path / "out"

    def again(task: Any = networks.score, **search: Any) -> Any:
        options = GreedySettings(**search)
        return greedy(own, task, model=networks.build(), output=output, settings=options)

    def start() -> None:
        calls: list[int] = []
        put = ScoreJournal.put

        def failing(self: Any, *rest: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise TaskError("enough")
            put(self, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScoreJournal, "put", failing)
            with pytest.raises(TaskError, match="enough"):
                again()

    start()
    with pytest.raises(ResumeError, match=r"the task changed.*restart=True"):
        again(task_of_two)
    with pytest.raises(ResumeError, match="the list of ingredients changed"):
        greedy(own[:2], networks.score, model=networks.build(), output=output)
    shutil.copy(Path(paths[3]) / "model.safetensors", Path(own[1]) / "model.safetensors")
    with pytest.raises(ResumeError, match=r"the ingredient .*run1 changed"):
        again()
    journal = Path(f"{output}.search") / "journal"
    text = bytearray(journal.read_bytes())
    text[len(text) // 2] ^= 1
    journal.write_bytes(text)
    with pytest.raises(ResumeError, match="damaged"):
        again()
    assert again(restart=True).members
    with pytest.raises(OutputExistsError):
        again()


def test_an_output_that_exists_is_refused_before_anything_is_scored(
    tmp_path: Path, paths: list[str]
) -> None:
    """Also beside what another recipe left half done: the end of a search is late to say so."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(Path(paths[0]) / "model.safetensors", output)
    shutil.copytree(output, tmp_path / "out.partial")
    with pytest.raises(OutputExistsError, match="overwrite=True replaces it"):
        greedy(paths, failing, model=networks.build(), output=output)
    assert not (tmp_path / "out.search").exists()


def test_a_failure_names_the_task_the_place_and_the_candidate(
    tmp_path: Path, paths: list[str]
) -> None:
    """An error in the scoring function is named, and what was scored before is kept."""
    journal = interrupted(paths, tmp_path / "out")
    assert len(journal.read_bytes().splitlines()) == 3  # what it is for, and two scores


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_what_a_task_forks_holds_no_lock(tmp_path: Path, paths: list[str]) -> None:
    """Workers that a task has started outlive a search that failed: the next goes on."""
    reading, writing = os.pipe()
    children = []

    def score(model: nn.Module) -> float:
        if not children:
            children.append(os.fork())
            if children[0] == 0:
                os.close(writing)
                os.read(reading, 1)  # until the parent is done
                os._exit(0)
            raise ValueError("transient")
        return networks.score(model)

    try:
        with pytest.raises(TaskError, match="transient"):
            greedy(paths, score, output=tmp_path / "soup", model=networks.build())
        greedy(paths, score, output=tmp_path / "soup", model=networks.build())
    finally:
        os.close(writing)
        os.waitpid(children[0], 0)
        os.close(reading)


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_fork_during_a_score_may_search(tmp_path: Path, paths: list[str]) -> None:
    """A pool started by another thread meanwhile gets no lock that nobody can open again."""
    scoring, forked = threading.Event(), threading.Event()

    def score(model: nn.Module) -> float:
        scoring.set()
        assert forked.wait(20)
        return networks.score(model)

    thread = threading.Thread(
        target=greedy,
        args=(paths[:2], score),
        kwargs={"output": tmp_path / "a", "model": networks.build()},
    )
    task = load_task(score)
    thread.start()
    assert scoring.wait(20)
    child = os.fork()
    if child == 0:
        with contained(task, "score"):
            os._exit(0)
    forked.set()
    thread.join()
    deadline = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waits for a thread that it has not")
        time.sleep(0.01)


def test_searches_in_threads_leave_the_generators_alone(tmp_path: Path, paths: list[str]) -> None:
    """What each search seeds is put back as it was before any of them."""

    def score(model: nn.Module) -> float:
        time.sleep(0.01)
        return random.random() + float(torch.rand(1))

    def search(name: str, model: nn.Module) -> None:
        found.append(greedy(paths, score, output=tmp_path / name, model=model))

    found: list[Any] = []
    models = [("a", networks.build()), ("b", networks.build())]
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), float(torch.rand(1))
    random.seed(5)
    torch.manual_seed(5)
    threads = [threading.Thread(target=search, args=each) for each in models]
    for thread in threads:
        thread.start()
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert (random.random(), float(torch.rand(1))) == expected
    assert found[0].score == found[1].score


def test_an_older_soup_of_the_same_is_not_the_one_under_way(
    tmp_path: Path, paths: list[str]
) -> None:
    """A search to replace it that was stopped goes on: its data may have changed meanwhile."""
    data, left = {"sign": 1.0}, [0]

    def score(model: nn.Module) -> float:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return data["sign"] * networks.score(model)

    def search() -> GreedySoup:
        options = Options(overwrite=True)
        model = networks.build()
        return greedy(paths, score, model=model, output=tmp_path / "out", options=options)

    before = search()
    data["sign"], left[0] = -1.0, 4
    with pytest.raises(KeyboardInterrupt):
        search()
    after = search()
    assert not after.finished
    assert (after.score < 0, before.score > 0) == (True, True)
    assert after.report["n_resumed"] == 3
    assert not (tmp_path / "out.search").exists()


def test_scores_belong_to_the_files_beside_the_weights(tmp_path: Path) -> None:
    """A tokenizer that was mended makes other scores; that it was is said."""
    paths = networks.ingredients(tmp_path / "in", 3)
    tokenizer = Path(paths[0], "tokenizer.json")
    tokenizer.write_text("{}")
    left = [3]

    def score(model: nn.Module) -> float:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return networks.score(model)

    def search(**more: Any) -> GreedySoup:
        rules = GreedySettings(**more)
        out = tmp_path / "out"
        return greedy(paths, score, model=networks.build(), output=out, settings=rules)

    with pytest.raises(KeyboardInterrupt):
        search()
    tokenizer.write_text('{"a": 1}')
    with pytest.raises(ResumeError, match="since then what lies beside the weights of the first"):
        search()
    assert search(restart=True).members


def test_where_one_stands_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search is gone on with from another folder, however the paths are spelled."""
    networks.ingredients(tmp_path / "in", 3)
    task, _ = networks.task_file(tmp_path)
    scores = Path(task).read_text()
    left = tmp_path / "left"
    left.write_text("2")
    Path(task).write_text(
        f"{scores}\nof = score\ndef score(model, split):\n"
        f"    from pathlib import Path\n    path = Path({str(left)!r})\n"
        "    n = int(path.read_text())\n    path.write_text(str(n - 1))\n"
        "    assert n\n    return of(model, split)\n"
    )
    spellings = [(tmp_path, "in/run", "task.py"), (tmp_path / "in", "run", "../task.py")]
    for number, (folder, prefix, name) in enumerate(spellings):
        monkeypatch.chdir(folder)
        paths = [f"{prefix}{i}" for i in range(3)]
        if number == 0:
            with pytest.raises(TaskError):
                greedy(paths, name, output=tmp_path / "out")
            left.write_text("99")
        else:
            assert greedy(paths, name, output="../out").report["n_resumed"] == 2


def test_scores_belong_to_the_model_that_was_given(tmp_path: Path, paths: list[str]) -> None:
    """The same function in another network is another task."""
    other = networks.build()
    other[2] = nn.Tanh()
    cache = tmp_path / "cache"
    found = [
        streamsoup.wise_ft(*paths[:2], networks.score, [0, 1], cache=cache, model=model)
        for model in (networks.build(), other, networks.build())
    ]
    assert [each.n_measured for each in found] == [2, 2, 0]
    assert found[0].values != found[1].values

    def stops(model: nn.Module) -> float:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(model)
        return networks.score(model)

    seen: list[nn.Module] = []
    with pytest.raises(KeyboardInterrupt):
        greedy(paths, stops, model=networks.build(), output=tmp_path / "out")
    with pytest.raises(ResumeError, match="since then the model changed"):
        greedy(paths, stops, model=other, output=tmp_path / "out")


def test_one_search_at_a_time(tmp_path: Path, paths: list[str]) -> None:
    """A second search of the same output is refused while one is at it."""

    def task(model: nn.Module) -> float:
        with pytest.raises(OutputBusyError):
            greedy(paths[:2], networks.score, model=networks.build(), output=tmp_path / "out")
        return networks.score(model)

    greedy(paths[:1], task, model=networks.build(), output=tmp_path / "out")


def test_scores_of_a_report_are_trusted_only_if_nothing_changed(
    tmp_path: Path, paths: list[str]
) -> None:
    """The report of an earlier search gives the single scores; another task's does not."""
    calls: list[int] = []

    first = greedy(paths, networks.score, model=networks.build(), output=tmp_path / "first")
    text = json.loads((tmp_path / "first" / "streamsoup.json").read_text())
    search = GreedySettings(scores=text["report"])
    again = greedy(
        paths, networks.score, model=networks.build(), output=tmp_path / "again", settings=search
    )
    assert again.members == first.members
    assert all(single.known for single in again.singles)
    with pytest.raises(RecipeError, match="code changed since"):
        greedy(paths, task_of_two, model=networks.build(), output=tmp_path / "x", settings=search)
    assert not calls


def test_a_finished_soup_of_other_rules_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the soup was in place: the same call takes it, one with other rules does not."""
    ingredients = marks(tmp_path / "in", 2)
    scores = {(0,): 0.5, (1,): 0.4, (0, 1): 0.5}
    model = Marks(2)

    def search(ties: Any, overwrite: bool = False) -> Any:
        return greedy(
            ingredients,
            table(scores),
            model=model,
            output=tmp_path / "out",
            settings=GreedySettings(ties=ties),
            options=Options(overwrite=overwrite),
        )

    def killed(self: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ScoreJournal, "finish", killed)
        with pytest.raises(Killed):
            search("accept")
    with pytest.raises(OutputExistsError):
        search("reject")
    model = Marks(2)
    assert search("accept").members == (0, 1)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], made[name]) for name in made)
    with monkeypatch.context() as patch:
        patch.setattr(ScoreJournal, "finish", killed)
        with pytest.raises(Killed):
            search("accept", overwrite=True)
    assert search("reject", overwrite=True).members == (0,)


def test_scores_of_a_file_written_in_place_are_not_trusted(tmp_path: Path) -> None:
    """With its old size and times, as reproducible archives give them, it is another one."""
    ingredients = marks(tmp_path / "in", 2)
    file = Path(ingredients[0])
    file = file / "model.safetensors" if file.is_dir() else file
    os.utime(file, (1, 1))

    n_scored = 0

    def score(model: nn.Module) -> float:
        nonlocal n_scored
        n_scored += 1
        return 1 / (2 - n_scored)

    with pytest.raises(TaskError):
        greedy(ingredients, score, model=Marks(2), output=tmp_path / "out")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with open(file, "r+b") as opened:
        opened.write(content)
    os.utime(file, (1, 1))
    with pytest.raises(ResumeError, match=r"the ingredient .* changed"):
        greedy(ingredients, score, model=Marks(2), output=tmp_path / "out")


def test_a_search_without_a_score_may_change(tmp_path: Path) -> None:
    """Whoever mends a slip in the task just runs the same command again: nothing is distrusted."""

    def slip(model: nn.Module) -> float:
        raise NameError("prnt")

    ingredients = marks(tmp_path / "in", 2)
    with pytest.raises(TaskError, match="prnt"):
        greedy(ingredients, slip, model=Marks(2), output=tmp_path / "out")
    assert not (tmp_path / "out.search").exists()
    killed = SearchFolder(str(tmp_path / "out"), {"ingredients": []}, restart=False)
    killed._unlock()
    assert (tmp_path / "out.search" / "journal").exists()
    soup = greedy(ingredients, lambda model: 1.0, model=Marks(2), output=tmp_path / "out")
    assert soup.members == (0, 1)


def test_a_finished_search_leaves_the_next_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its folder is removed, one of that name is another run's."""
    search = SearchFolder(str(tmp_path / "out"), {"ingredients": []}, restart=False)
    candidate = Path(search.root) / "candidate-1-0001"

    rmdir = os.rmdir

    def next_run(path: str) -> None:
        rmdir(path)
        if path == search.root:
            candidate.mkdir(parents=True)

    monkeypatch.setattr(os, "rmdir", next_run)
    search.finish()
    search.close()
    assert candidate.exists()
