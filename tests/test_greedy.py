"""A greedy search finds what a plain one in memory finds, and forgets nothing it paid for."""

from __future__ import annotations

import json
import operator
import os
import random
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import streamsoup
from streamsoup import GreedySettings, GreedySoup, Options, greedy
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    MismatchError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    RecipeError,
    ResumeError,
    TaskError,
)
from streamsoup.live.candidates import Candidates, Moved
from streamsoup.live.running import plan_sums
from streamsoup.output.journal import Journal
from streamsoup.search.folder import SearchFolder, lock_folder
from streamsoup.search.scoring.journal import ScoreJournal
from streamsoup.search.scoring.scorer import Outcome
from streamsoup.search.trials import search
from streamsoup.study.measures.cache import Cache
from streamsoup.task import Score, load_task
from streamsoup.task.running import contained


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ingredients' folders."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"))


def weights(folder: str | Path) -> bytes:
    """Return the bytes of a soup's file."""
    return (Path(folder) / "model.safetensors").read_bytes()


def by_score(scores: Sequence[float]) -> list[int]:
    """Order best first; ties as given."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sums", ["memory", "file", "reread"])
def test_the_same_as_in_memory(tmp_path: Path, dtype: torch.dtype, sums: Any) -> None:
    """Members, every score and the soup's bytes are those of a float64 search in memory."""
    paths = networks.ingredients(tmp_path / "in", dtype=dtype)
    alone = [networks.mean_score(paths, [i]) for i in range(networks.N)]
    kept, best = networks.plain_greedy(
        by_score(alone), lambda m: networks.mean_score(paths, m), strict=False, gain=0.0
    )
    model = networks.build().to(dtype)
    soup = greedy(
        paths,
        networks.score,
        model=model,
        output=tmp_path / "out",
        settings=GreedySettings(sums=sums),
    )
    assert list(soup.members) == kept
    assert len(kept) > 2, "the search has to add something up"
    assert soup.score == best
    assert [single.score.value for single in soup.singles] == alone
    for trial in soup.runs[0].trials:
        assert trial.score.value == networks.mean_score(paths, trial.members)
    uniform = streamsoup.uniform([paths[i] for i in kept], output=tmp_path / "uniform")
    assert weights(soup.path) == weights(uniform.path)
    assert networks.score(model.eval()) == best, "the live model holds the soup"
    assert not os.path.exists(soup.path + ".search")
    assert soup.provenance.report["kept"] == [paths[i] for i in kept]
    streamsoup.verify(soup.path)


def test_every_candidate_has_the_bits_of_uniform(tmp_path: Path, paths: list[str]) -> None:
    """Wherever sums are kept, and whatever came before, a candidate's bits are uniform's."""
    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import order
    from streamsoup.recipe import Coefficients

    options = Options()
    ordered = order(paths, Linear(Coefficients.uniform(6)), method="greedy", options=options)
    walk = [(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 3, 2), (0, 1, 3, 2, 5), (0, 1, 3, 4)]
    walk += [(4, 1, 2, 0), (4, 1, 2, 3), (5, 4), (0, 1, 2, 3, 4, 5)]
    expected = {}
    for members in walk:
        name = "-".join(map(str, members))
        uniform = streamsoup.uniform([paths[i] for i in members], output=tmp_path / name)
        model = networks.build()
        model.load_state_dict(load_file(Path(uniform.path) / "model.safetensors"))
        expected[members] = model.state_dict()
    for place in ("memory", "file", "reread"):
        for mapped in (True, False):
            scratch = str(tmp_path / "scratch")
            sums = plan_sums(
                ordered.plan,
                mapped=mapped,
                threads=2,
                budget=150_000_000,
                scratch=scratch,
                place=place,
            )
            made = Candidates(ordered.plan, sums, mapped=mapped, threads=2, scratch=scratch)
            model = networks.build()
            sink = ModelSink(model, ordered.plan)
            for members in walk:
                made.mix(members, sink, keep=True)
                for name, tensor in model.state_dict().items():
                    assert torch.equal(tensor, expected[members][name]), (place, members, name)
            made.forget()


def test_a_trial_reads_one_ingredient_once_the_sum_is_kept(
    tmp_path: Path, paths: list[str]
) -> None:
    """The second trial on the same accepted ingredients reads the new one only."""
    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import order
    from streamsoup.recipe import Coefficients

    ordered = order(paths, Linear(Coefficients.uniform(6)), method="greedy", options=Options())
    sums = plan_sums(
        ordered.plan, mapped=True, threads=1, budget=150_000_000, scratch=None, place=None
    )
    assert sums.place == "memory"
    made = Candidates(ordered.plan, sums, mapped=True, threads=1, scratch=None)
    sink = ModelSink(networks.build(), ordered.plan)
    nbytes = ordered.plan.ingredients[0].nbytes
    made.mix((0, 1, 2), sink, keep=True)
    assert made.mix((0, 1, 3), sink, keep=True).nbytes_read == nbytes
    assert made.mix((0, 1, 3, 4), sink, keep=True).nbytes_read == 2 * nbytes
    assert made.mix((0, 1, 3, 5), sink, keep=True).nbytes_read == nbytes


def test_random_orders_and_elimination(tmp_path: Path, paths: list[str]) -> None:
    """Random orders and backward elimination choose as plain ones do."""

    def score_of(members: Sequence[int]) -> float:
        return networks.mean_score(paths, members)

    search = GreedySettings(order="random", n_orders=3, seed=7)
    model = networks.build()
    soup = greedy(paths, networks.score, model=model, output=tmp_path / "r", settings=search)
    for number, run in enumerate(soup.runs):
        kept, best = networks.plain_greedy(
            networks.shuffled(6, 7 + number), score_of, strict=False, gain=0.0
        )
        assert (list(run.members), run.score.value) == (kept, best)
    assert soup.score == max(run.score.value for run in soup.runs)

    search = GreedySettings(direction="backward")
    soup = greedy(paths, networks.score, model=model, output=tmp_path / "b", settings=search)
    order = by_score([single.score.value for single in soup.singles])
    assert (list(soup.members), soup.score) == networks.plain_backward(order, score_of)


def table(scores: dict[tuple[int, ...], float], default: float = 0.0) -> Any:
    """Score by what is in the soup: parameters are powers of ten, so the mean tells."""

    def look(model: nn.Module, split: str, to_beat: float | None = None) -> float:
        marks = model.w.detach()
        found = tuple(int(i) for i in marks.nonzero().flatten())
        return scores.get(found, default)

    return look


class Marks(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))


def marks(folder: Path, n: int) -> list[str]:
    """Make ingredients that are unit vectors: a mean shows its members."""
    from safetensors.torch import save_file

    folder.mkdir()
    paths = []
    for i in range(n):
        paths.append(str(folder / f"{i}.safetensors"))
        save_file({"w": torch.eye(n)[i]}, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({}, (0, 1)),
        ({"ties": "reject"}, (0,)),
        ({"ties": "reject", "passes": 2}, (0,)),
        ({"passes": 2}, (0, 1, 2)),
        ({"min_gain": 0.05}, (0,)),
        ({"scores": [0.1, 0.2, 0.3]}, (2, 1, 0)),
        ({"order": "given"}, (0, 1, 2)),
    ],
)
def test_rules(tmp_path: Path, search: dict[str, Any], expected: tuple[int, ...]) -> None:
    """Ties, least gains, passes, orders and given scores each decide as they say."""
    ingredients = marks(tmp_path / "in", 4)
    scores = {(0,): 0.5, (2,): 0.4, (1,): 0.3, (0, 2): 0.4, (0, 1): 0.5, (0, 1, 2): 0.5}
    scores |= {(1, 2): 0.35, (0, 1, 3): 0.1, (0, 1, 2, 3): 0.2, (3,): 0.01}
    rules = GreedySettings(**search)
    if "scores" in search:
        ingredients = ingredients[:3]
        rules = GreedySettings(scores=[0.1, 0.2, 0.3])
    soup = greedy(
        ingredients, table(scores), model=Marks(4), output=tmp_path / "out", settings=rules
    )
    assert soup.members == expected


def the_papers_script(singles: dict[str, float], score_of: Callable[[list[str]], float]) -> Any:
    """Choose as the greedy loop of mlfoundations/model-soups `main.py` (MIT) does, given scores."""
    ranked = sorted(singles.items(), key=operator.itemgetter(1))
    ranked.reverse()
    order = [name for name, _ in ranked]
    chosen, best = [order[0]], singles[order[0]]
    for name in order[1:]:
        found = score_of([*chosen, name])
        if found > best:
            chosen, best = [*chosen, name], found
    return order, chosen, best


def test_the_choice_of_the_papers_script() -> None:
    """With `ties="reject"`, and files in reverse, any scores lead where its script leads.

    It sorts, then reverses: of equal ones, the last comes first.
    """
    draw = random.Random(0)
    n_tied = 0
    for _ in range(200):
        names = [f"model_{i}" for i in range(12)]
        singles = {name: draw.randrange(8) / 8 for name in names}
        salt = draw.random()

        def score_of(
            chosen: list[str], singles: dict[str, float] = singles, s: float = salt
        ) -> Any:
            noise = zlib.crc32(repr((s, sorted(chosen))).encode()) % 5 - 2
            return singles[chosen[0]] if len(chosen) == 1 else max(singles.values()) + noise / 8

        given = names[::-1]

        def ask(wanted: Any, to_beat: Any, given: list[str] = given, of: Any = score_of) -> Any:
            value = of([given[i] for i in wanted[0]])
            return Outcome(Score(value), None, Moved(0, 0, 0.0), 0.0), False

        order, chosen, best = the_papers_script(singles, score_of)
        (run,) = search(given, ask, GreedySettings(ties="reject")).runs
        assert [given[i] for i in run.order] == order
        assert ([given[i] for i in run.members], run.score.value) == (chosen, best)
        (kept,) = search(given, ask, GreedySettings()).runs
        n_tied += kept.members != run.members
    assert n_tied > 50


def test_nan_never_wins(tmp_path: Path) -> None:
    """A NaN score is tried last and never kept; where all are NaN, that is said."""
    nan = float("nan")
    ingredients = marks(tmp_path / "in", 3)
    scores = {(0,): nan, (1,): 0.5, (2,): 0.4, (1, 2): nan, (0, 1): 0.6}
    soup = greedy(ingredients, table(scores), model=Marks(3), output=tmp_path / "out")
    assert soup.members == (1, 0)
    with pytest.raises(TaskError, match="every score is NaN"):
        greedy(ingredients, table({}, nan), model=Marks(3), output=tmp_path / "nan")


def test_why_one(tmp_path: Path) -> None:
    """When only one is kept, the report says why and what to look at."""
    ingredients = marks(tmp_path / "in", 3)
    scores = {(0,): 0.9, (1,): 0.8, (0, 1): 0.7, (0, 2): 0.1}
    soup = greedy(ingredients, table(scores), model=Marks(3), output=tmp_path / "out")
    assert soup.members == (0,)
    advice = str(soup.report["advice"])
    assert "0.7 against 0.9" in advice
    assert "geometry" in advice
    assert "milder rule" not in advice
    rules = [GreedySettings(min_gain=0.5), GreedySettings(direction="backward")]
    for rule, said in zip(rules, ["scored well enough better", "from dropping"], strict=True):
        soup = greedy(
            ingredients,
            table(scores),
            model=Marks(3),
            output=tmp_path / rule.direction,
            settings=rule,
        )
        assert soup.members == (0,)
        assert said in str(soup.report["advice"])
        assert ("milder rule" in str(soup.report["advice"])) == (rule.min_gain > 0)


def test_stopping_early_changes_no_decision(tmp_path: Path) -> None:
    """A bound below the score to beat leaves the outcome as it is; one above is refused."""
    ingredients = marks(tmp_path / "in", 3)
    scores = {(0,): 0.5, (1,): 0.4, (2,): 0.3, (0, 1): 0.45, (0, 2): 0.6}
    whole = greedy(ingredients, table(scores), model=Marks(3), output=tmp_path / "whole")

    def early(model: nn.Module, split: str, to_beat: float | None) -> Any:
        score = table(scores)(model, split)
        if to_beat is not None and score < to_beat:
            return {"at_most": (score + to_beat) / 2 - 1e-9}
        return score

    soup = greedy(ingredients, early, model=Marks(3), output=tmp_path / "early")
    assert (soup.members, soup.score) == (whole.members, whole.score)
    assert [trial.score.stopped for trial in soup.runs[0].trials] == [False, True, False]
    with pytest.raises(TaskError, match="out of reach"):
        greedy(
            ingredients,
            lambda model, to_beat: 0.5 if to_beat is None else {"at_most": to_beat},
            model=Marks(3),
            output=tmp_path / "wrong",
        )


def test_paired_comparison(tmp_path: Path) -> None:
    """With z, a gain within the noise of the examples is not enough."""
    ingredients = marks(tmp_path / "in", 3)
    right = {
        (0,): [1, 1, 1, 0, 0, 0, 0, 0], (1,): [0] * 8, (2,): [0] * 8,
        (0, 1): [0, 1, 1, 1, 1, 0, 0, 0], (0, 2): [1, 1, 1, 1, 1, 1, 1, 0],
    }  # fmt: skip

    def task(model: nn.Module) -> Any:
        found = tuple(int(i) for i in model.w.detach().nonzero().flatten())
        results = right.get(found, [0] * 8)
        return {"acc": sum(results) / 8, "examples": results}

    plain = greedy(ingredients, task, model=Marks(3), output=tmp_path / "plain")
    assert plain.members == (0, 1)
    search = GreedySettings(z=1.5)
    soup = greedy(ingredients, task, model=Marks(3), output=tmp_path / "z", settings=search)
    assert soup.members == (0, 2)
    with pytest.raises(TaskError, match="examples"):
        greedy(ingredients, table({}, 0.5), model=Marks(3), output=tmp_path / "n", settings=search)


class Killed(BaseException):
    """A kill, as far as a test can have it."""


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


def interrupted(paths: list[str], output: Path) -> Path:
    """Leave a search that failed at its third score; give its journal."""
    calls: list[int] = []

    def task(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no more")
        return networks.score(model)

    with pytest.raises(TaskError, match="ValueError: no more"):
        greedy(paths, task, model=networks.build(), output=output)
    return Path(f"{output}.search") / "journal"


def failing(model: nn.Module) -> float:
    """Score nothing."""
    raise AssertionError("this is not to be scored")


def task_of_two(model: nn.Module) -> float:
    """Score otherwise."""
    return -networks.score(model)


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
        streamsoup.sweep(*paths[:2], networks.score, [0, 1], cache=cache, model=model)
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


def test_jobs_change_nothing(tmp_path: Path, paths: list[str]) -> None:
    """Two processes find what one finds: every trial, its score, and the soup's bytes."""
    task, _ = networks.task_file(tmp_path)
    alone = greedy(paths, task, output=tmp_path / "one")
    both = greedy(paths, task, output=tmp_path / "two", settings=GreedySettings(jobs=2))
    assert [trial.score for trial in both.runs[0].trials] == [
        trial.score for trial in alone.runs[0].trials
    ]
    assert (both.members, both.score) == (alone.members, alone.score)
    assert weights(both.path) == weights(alone.path)


def test_statistics_are_scored_both_ways(tmp_path: Path, paths: list[str]) -> None:
    """Recalibrated, a mean is scored with both statistics; a single one as its file is."""
    task, _ = networks.task_file(tmp_path)
    search = GreedySettings(recalibrate=True)
    soup = greedy(paths[:2], task, output=tmp_path / "out", settings=search)
    for i in (0, 1):
        assert soup.singles[i].averaged is None
        assert soup.singles[i].score.value == networks.mean_score(paths, [i])
    first, second = soup.runs[0].trials
    assert (first.averaged, first.score.value) == (None, soup.singles[first.members[0]].score.value)
    assert second.averaged is not None
    assert second.averaged.value == networks.mean_score(paths, list(second.members))
    assert second.averaged.value != second.score.value
    assert "score_with_averaged_statistics" in soup.report["runs"][0]["trials"][1]
    assert "score_with_averaged_statistics" not in soup.report["singles"][0]


def test_scores_do_not_depend_on_what_was_scored_before(tmp_path: Path, paths: list[str]) -> None:
    """Random numbers, modes and settings that a task changes are the same for every candidate."""
    seen = []

    def task(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(float(torch.rand(())))
        model.train()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        os.chdir("/")
        np.seterr(all="raise" if np.geterr()["over"] != "raise" else "ignore")
        return 0.0

    model = networks.build().train()
    before, folder = torch.get_rng_state(), os.getcwd()
    errors = np.geterr()
    greedy(paths[:3], task, model=model, output=tmp_path / "out")
    assert len(set(seen)) == 1
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert os.getcwd() == folder
    assert np.geterr() == errors
    assert model.training
    assert torch.is_grad_enabled()


def test_a_diverged_ingredient_is_named(tmp_path: Path) -> None:
    """NaN weights stop the search by name, and not by a score."""
    ingredients = marks(tmp_path / "in", 2)
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([1.0, float("nan")])}, ingredients[1])
    with pytest.raises(NonFiniteError, match=r"1\.safetensors"):
        greedy(ingredients, table({}, 0.5), model=Marks(2), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"scores": [1.0]}, "1 score for 6 ingredients"),
        ({"scores": [float("nan")] * 6}, "every score given is NaN"),
        ({"n_orders": 2}, "order='random'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"min_gain": -1.0}, "0 or more"),
        ({"min_gain": float("inf")}, "finite"),
        ({"z": float("inf")}, "finite"),
        ({"z": 1.0, "scores": [0.5] * 6}, "leave out the scores"),
        ({"timeout": float("inf")}, "leave it out"),
        ({"scores": {"bound_to": {}}}, "not a whole report"),
        ({"scores": {"bound_to": {"ingredients": [3]}, "singles": [{}]}}, "not a whole report"),
        ({"timeout": 0.0}, "no time"),
        ({"timeout": 5.0}, "a given model is scored in this process"),
    ],
)
def test_refused_options(
    tmp_path: Path, paths: list[str], search: dict[str, Any], message: str
) -> None:
    """Options that make no sense are refused before anything is made."""
    with pytest.raises(RecipeError, match=message):
        greedy(
            paths,
            networks.score,
            model=networks.build(),
            output=tmp_path / "out",
            settings=GreedySettings(**search),
        )
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_an_ingredient_is_refused(tmp_path: Path) -> None:
    """Candidates would overwrite it; a copy of it is taken."""
    model, other = networks.teacher(), networks.teacher()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match="shares memory with the model"):
        greedy([other, model], networks.score, model=model, output=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    soup = greedy([other, before], networks.score, model=model, output=tmp_path / "out")
    assert soup.singles[1].score.value == 1.0


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


@pytest.mark.parametrize("there", ["a folder", "a file", "a link"])
def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, there: str) -> None:
    """A stranger's folder is left alone; a link to one of ours is followed to a cache alone."""
    folder = tmp_path / "cache"
    folder.mkdir()
    if there == "a folder":
        (folder / "lock").mkdir()
        with pytest.raises(OutputError, match="cannot be made: Is a directory"):
            lock_folder(str(folder))
        return
    if there == "a file":
        (folder / "journal").write_text("mine")
        with pytest.raises(OutputError, match="in the way and not ours"):
            lock_folder(str(folder))
        assert os.listdir(folder) == ["journal"]
        return
    (tmp_path / "link").symlink_to(folder)
    (folder / "lock").touch()
    (folder / "candidate-of-somebody").mkdir()
    with pytest.raises(OutputError, match="in the way and not ours"):
        lock_folder(str(tmp_path / "link"))  # a search's, in which candidates would be removed
    with Cache(str(tmp_path / "link")), pytest.raises(OutputBusyError, match="used by process"):
        Cache(str(folder))


def test_scores_may_be_infinite(tmp_path: Path) -> None:
    """Minus infinity is the worst of scores, and no error; the report is JSON all the same."""
    ingredients = marks(tmp_path / "in", 3)
    worst = float("-inf")
    search = GreedySettings(order="random", n_orders=2)
    scores = {(0,): worst, (1,): worst, (2,): worst, (1, 2): 0.5}
    soup = greedy(
        ingredients, table(scores, worst), model=Marks(3), output=tmp_path / "out", settings=search
    )
    assert soup.score in (0.5, worst)
    text = (tmp_path / "out" / "streamsoup.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads(text, parse_constant=refuse)["report"]
    assert report["runs"][0]["trials"][1]["to_beat"] == "-inf"
    assert "over_orders" not in report


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
