"""A greedy search finds what a plain one in memory finds, and forgets nothing it paid for."""

from __future__ import annotations

import json
import operator
import os
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from searching import (
    Marks,
    by_score,
    marks,
    table,
    weights,
)
from torch import nn

import streamsoup
from streamsoup import GreedySettings, Options, greedy
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import (
    MismatchError,
    NonFiniteError,
    OutputBusyError,
    OutputError,
    RecipeError,
    TaskError,
)
from streamsoup.live.candidates import Candidates, Moved
from streamsoup.live.running import plan_sums
from streamsoup.search.folder import lock_folder
from streamsoup.search.scoring.scorer import Outcome
from streamsoup.search.trials import search
from streamsoup.study.measures.cache import Cache
from streamsoup.task import Score


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of the ingredients."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"))


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


def test_nan_never_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A NaN score is tried last, never kept, and warned about; where all are NaN, that is said."""
    nan = float("nan")
    ingredients = marks(tmp_path / "in", 3)
    scores = {(0,): nan, (1,): 0.5, (2,): 0.4, (1, 2): nan, (0, 1): 0.6}
    soup = greedy(ingredients, table(scores), model=Marks(3), output=tmp_path / "out")
    assert soup.members == (1, 0)
    assert [line.message.split(", and")[0] for line in caplog.records] == [
        f"the score of {ingredients[0]} is NaN",
        f"the score of the mean of {ingredients[1]}, {ingredients[2]} is NaN",
    ]
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


def test_a_model_without_statistics_is_refused_before_the_first_score(
    tmp_path: Path, paths: list[str]
) -> None:
    """Nothing to measure anew is found when the model is built, not after hours of scores."""
    asked = []

    class Plain:
        def build(self) -> nn.Module:
            return nn.Linear(1, 1)

        def score(self, model: nn.Module) -> float:
            asked.append(model)
            return 0.0

        def recalibration(self) -> list[torch.Tensor]:
            return []

    with pytest.raises(TaskError, match="has no BatchNorm statistics"):
        greedy(paths, Plain(), output=tmp_path / "o", settings=GreedySettings(recalibrate=True))
    assert not asked


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
