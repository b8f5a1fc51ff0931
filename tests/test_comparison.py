"""The comparison against plain in-memory code; what is measured is measured once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import PARTS, SMALL, SPLITS, Counting, accuracy, by_name, plain_logits
from msgspec.structs import replace
from networks import ingredients, shuffled
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import streamsoup
from streamsoup.errors import (
    OutputBusyError,
    OutputError,
    RecipeError,
    TaskError,
)
from streamsoup.options import Options, Step
from streamsoup.output.journal import Journal
from streamsoup.search.trials import random_order
from streamsoup.study.comparison.curves import choose_counts
from streamsoup.study.comparison.pairs import choose_pairs
from streamsoup.study.comparison.table import CompareSettings, compare, splits_of
from streamsoup.study.landscape.paths import wise_ft as sweep
from streamsoup.study.measures.cache import Cache
from streamsoup.study.measures.rows import MEAN
from streamsoup.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")


def test_table_equals_plain_code(folders: list[str], tmp_path: Path) -> None:
    """Every row and column is what averaging state dicts and stacking logits in memory gives."""
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    found = compare(folders, Counting(), output=tmp_path / "out", settings=replace(SMALL, orders=2))
    rows = by_name(found)

    def greedy(order: Sequence[int], value: Any) -> list[int]:
        kept = [order[0]]
        for i in order[1:]:
            if value([*kept, i]) >= value(kept):
                kept.append(i)
        return kept

    def soup(members: Sequence[int], split: str = "val") -> float:
        return accuracy(plain_logits([states[i] for i in members], split), split)

    def ensemble(members: Sequence[int], split: str = "val") -> float:
        logits = [plain_logits([states[i]], split) for i in members]
        return accuracy(np.mean(logits, axis=0), split)

    singles = [soup([i]) for i in range(6)]
    order = sorted(range(6), key=lambda i: -singles[i])
    kept, grown = greedy(order, soup), greedy(order, ensemble)
    orders = []
    for seed in range(2):
        orders.append(greedy(shuffled(6, seed), soup))
    assert rows["greedy soup"].members == tuple(kept)
    assert rows["ensemble, greedily grown"].members == tuple(grown)
    assert found.metric == "accuracy"
    for split in SPLITS:
        for i in range(6):
            assert rows[f"run{i}"].cells[split].value == pytest.approx(soup([i], split))
        expected = {
            "best on val": soup(order[:1], split),
            "oracle best": max(soup([i], split) for i in range(6)),
            "uniform soup": soup(range(6), split),
            "greedy soup": soup(kept, split),
            "greedy soup, 2 random orders": np.mean([soup(o, split) for o in orders]),
            "ensemble of all": ensemble(range(6), split),
            "ensemble of the greedy soup's members": ensemble(kept, split),
            "ensemble, greedily grown": ensemble(grown, split),
        }
        for name, value in expected.items():
            assert rows[name].cells[split].value == pytest.approx(value), (name, split)
    far = [rows["uniform soup"].cells[split].value for split in ("far", "farther")]
    assert rows["uniform soup"].cells[MEAN].value == pytest.approx(np.mean(far))
    assert rows["ensemble of all"].cost == 6
    assert rows["uniform soup"].cost == 1
    low, high = rows["greedy soup"].cells["test"].low, rows["greedy soup"].cells["test"].high
    assert low <= rows["greedy soup"].cells["test"].value <= high
    assert rows["greedy soup"].cells[MEAN].high - rows["greedy soup"].cells[MEAN].low > 0


def test_another_average_would_be_seen(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: with one member left out of every soup, the table is another."""
    from streamsoup.study.measures import bench

    right = by_name(compare(folders, Counting(), output=tmp_path / "a", settings=SMALL))
    uniform = bench.Mixture.uniform
    monkeypatch.setattr(
        bench.Mixture,
        "uniform",
        lambda members: uniform(tuple(members)[: max(1, len(members) - 1)]),
    )
    wrong = by_name(compare(folders, Counting(), output=tmp_path / "b", settings=SMALL))
    nlls = [rows["uniform soup"].cells["test"].nll for rows in (right, wrong)]
    assert abs(nlls[0] - nlls[1]) > 1e-4


def test_greedy_soup_is_that_of_the_search(folders: list[str], tmp_path: Path) -> None:
    """The comparison and `greedy` choose the same members."""
    found = by_name(compare(folders, Counting(), output=tmp_path / "out", settings=SMALL))
    soup = streamsoup.greedy(folders, Counting(), output=tmp_path / "soup")
    assert found["greedy soup"].members == soup.members


def test_second_run_measures_nothing(folders: list[str], tmp_path: Path) -> None:
    """What is known is not asked again, the model is not even built, and the rows are the same."""
    settings = replace(SMALL, orders=2, curve=4, learned=("global",))
    first, again = Counting(), Counting()
    before = compare(folders, first, output=tmp_path / "out", settings=settings)
    after = compare(folders, again, output=tmp_path / "out", settings=settings)
    assert before.n_measured > 0
    assert (after.n_measured, again.asked, again._n_built) == (0, [], 0)
    assert list(before.to_lines()) == list(after.to_lines())
    assert first._n_built == 1


def test_one_more_ingredient_costs_what_is_new(folders: list[str], tmp_path: Path) -> None:
    """Ingredients that are known by content are not measured again, wherever they lie now."""
    compare(folders[:5], Counting(), output=tmp_path / "out", settings=SMALL)
    moved = [shutil.copytree(f, tmp_path / "elsewhere" / Path(f).name) for f in folders]
    task = Counting()
    compare(moved, task, output=tmp_path / "out", settings=SMALL)
    # The new ingredient, the uniform and the greedy soup on four splits, and trials on one.
    assert [what for what, _ in task.asked].count("score") == 1
    on_test = [what for what, split in task.asked if split == "test"]
    assert len(on_test) <= 3


def test_what_is_drawn_stays_drawn() -> None:
    """One ingredient more leaves random orders, drawn pairs and the points of curves in place."""
    assert {tuple(random_order(4, seed)) for seed in range(400)} == set(permutations(range(4)))
    for n in range(2, 80):
        fewer, more = random_order(n, 3), random_order(n + 1, 3)
        assert [i for i in more if i != n] == fewer
        fewer_pairs, more_pairs = choose_pairs(n, 20, 3), choose_pairs(n + 1, 20, 3)
        assert len(more_pairs) == min(20, n * (n + 1) // 2)
        assert all(n in pair for pair in set(more_pairs) - set(fewer_pairs))
        few, many = choose_counts(n, 8), choose_counts(n + 1, 8)
        assert set(many) - set(few) <= {n + 1}
        assert len(many) <= 8
        assert (many[0], many[-1]) == (1, n + 1)
    assert choose_counts(6, 8) == [1, 2, 3, 4, 5, 6]


def test_one_more_costs_little_whatever_is_drawn(tmp_path: Path) -> None:
    """Orders, curves and pairs ask for a part of what they would ask for from nothing."""
    paths = ingredients(tmp_path / "in", 12)
    settings = CompareSettings(learned=(), orders=2, curve=4, pairs=10)
    counts = []
    for n, out in ((11, "out"), (10, "new"), (11, "new")):
        task = Counting()
        where = tmp_path / out
        compare(paths[:n], task, output=where, base=paths[11], settings=settings)
        counts.append(len(task.asked))
    assert counts[2] < counts[0] / 2


def test_a_killed_run_goes_on(folders: list[str], tmp_path: Path) -> None:
    """Whenever it fails, the next run asks for the rest alone, and finds the same rows."""
    whole = Counting()
    expected = compare(folders, whole, output=tmp_path / "whole", settings=SMALL)
    for n in (0, 1, 7, 20, len(whole.asked) - 1):
        out = tmp_path / f"killed{n}"
        broken, rest = Counting(fails_after=n), Counting()
        with pytest.raises(TaskError, match="the power failed"):
            compare(folders, broken, output=out, settings=SMALL)
        found = compare(folders, rest, output=out, settings=SMALL)
        assert list(found.to_lines()) == list(expected.to_lines())
        assert len(broken.asked) + len(rest.asked) == len(whole.asked)


def test_changes_are_measured_anew(folders: list[str], tmp_path: Path) -> None:
    """Another content, another task or damaged logits are never served from the cache."""
    out = tmp_path / "out"
    compare(folders, Counting(), output=out, settings=SMALL)
    state = load_file(Path(folders[2]) / "model.safetensors")
    save_file(
        {n: t + 1 if t.ndim == 2 else t for n, t in state.items()},
        Path(folders[2]) / "model.safetensors",
    )
    changed = Counting()
    compare(folders, changed, output=out, settings=SMALL)
    assert ("predictions", "test") in changed.asked
    again = Counting()
    compare(folders, again, output=out, settings=SMALL)
    assert again.asked == []
    # The newest: older ones may belong to what the changed checkpoint held before.
    file = max((out / "cache").glob("[0-9a-f]*.npy"), key=lambda path: path.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes()[:-4])
    compare(folders, again, output=out, settings=SMALL)
    assert len(again.asked) == 1

    other = replace(load_task(Counting()), fingerprint="another")
    compare(folders, other, output=out, settings=SMALL)
    assert len(other.source.asked) > 20


def test_a_score_that_is_no_accuracy(folders: list[str], tmp_path: Path) -> None:
    """Where the score is another metric it rules, and ensembles have none."""

    def negative_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
        return -float(torch.nn.functional.cross_entropy(logits, labels))

    task = Counting(score=negative_loss)
    found = compare(folders, task, output=tmp_path / "out", settings=replace(SMALL, curve=3))
    rows = by_name(found)
    assert found.metric == "score"
    assert not found.is_share
    row = rows["uniform soup"]
    assert row.cells["test"].value == pytest.approx(-row.cells["test"].nll, rel=1e-5)
    assert math.isnan(rows["ensemble of all"].cells["test"].value)
    assert rows["ensemble of all"].cells["test"].nll > 0
    assert any("not the accuracy" in note for note in found.notes)


@pytest.mark.parametrize("percent", [False, True])
def test_a_score_keeps_its_name(folders: list[str], tmp_path: Path, percent: bool) -> None:
    """A metric between 0 and 1 is shown under its name, and in percent only if the task says so."""

    def f1(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        hit = ((logits.argmax(1) == 0) & (labels == 0)).sum()
        both = (logits.argmax(1) == 0).sum() + (labels == 0).sum()
        return {"f1": float(2 * hit / both), "other": 0.5}

    task = Counting(score=f1, predicts=False)
    task.main, task.percent = "f1", percent  # type: ignore[attr-defined]
    found = compare(folders[:2], task, output=tmp_path / "out", settings=SMALL)
    assert (found.metric, found.is_share) == ("f1", percent)
    swept = sweep(folders[0], folders[1], task, [0, 1], cache=tmp_path / "cache")
    assert (swept.metric, swept.is_share) == ("f1", percent)


def test_gains_equal_plain_code(folders: list[str], tmp_path: Path) -> None:
    """Differences, and their intervals, are those of resampling examples of both in pairs."""
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    found = compare(
        folders[1:], Counting(), output=tmp_path / "out", base=folders[0], settings=SMALL
    )
    rows = by_name(found)
    labels = PARTS["test"][1].numpy()

    def right(members: Sequence[int]) -> NDArray[np.float64]:
        logits = plain_logits([states[i] for i in members], "test")
        return (logits.argmax(1) == labels).astype(np.float64)

    best = 1 + rows["best on val"].members[0]
    uniform = right(range(1, 6))
    drawn = np.random.default_rng(0).integers(0, len(labels), (4000, len(labels)))
    for field, members in (("over_best", [best]), ("over_base", [0])):
        gain = getattr(rows["uniform soup"].cells["test"], field)
        difference = uniform - right(members)
        assert gain.value == pytest.approx(difference.mean())
        low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
        assert (gain.low, gain.high) == pytest.approx((low, high), abs=0.02)
    # Planted fault: resampled apart, the interval against the best would be wider.
    apart = uniform[drawn].mean(1) - right([best])[drawn[::-1]].mean(1)
    gain = rows["uniform soup"].cells["test"].over_best
    low, high = np.quantile(apart, [0.025, 0.975])
    assert high - low > 1.15 * (gain.high - gain.low)
    assert rows["base"].cells["test"].over_best is not None
    assert rows["base"].cells["test"].over_base is None
    assert rows["best on val"].cells["test"].over_best is None
    shifts = [rows["uniform soup"].cells[s].over_best for s in ("far", "farther")]
    mean = rows["uniform soup"].cells[MEAN].over_best
    assert mean.value == pytest.approx(np.mean([gain.value for gain in shifts]))
    assert mean.low < mean.value < mean.high


def test_every_measurement_is_foreseen(folders: list[str], tmp_path: Path) -> None:
    """The total that is told at first is never passed, and all is done at the end."""
    events: list[object] = []
    settings = CompareSettings(orders=2, curve=3, pairs=4, learned=("global",))
    options = Options(on_event=events.append)
    for _ in range(2):  # the second time all is known
        compare(
            folders[1:5], Counting(), output=tmp_path / "out", base=folders[0],
            settings=settings, options=options,
        )  # fmt: skip
        steps = [e for e in events if isinstance(e, Step) and e.what == "measurement"]
        events.clear()
        assert steps[0].n_done == 0
        assert steps[-1].n_done == steps[-1].n <= steps[0].n
        assert all(a.n_done <= b.n_done and a.n >= b.n for a, b in pairwise(steps))
    assert steps[-1].n_paid == 0


def test_pairs_and_angles(folders: list[str], tmp_path: Path) -> None:
    """Angles are those of plain task vectors, and the middle's gain is that of plain averages."""
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    settings = replace(SMALL, pairs=100)
    found = compare(
        folders[1:4], Counting(), output=tmp_path / "out", base=folders[0], settings=settings
    )

    def vector(i: int) -> NDArray[np.float64]:
        # Running statistics are no weights.
        floats = [n for n, t in states[0].items() if t.is_floating_point() and ".running_" not in n]
        return np.concatenate(
            [(states[i][n].double() - states[0][n].double()).flatten().numpy() for n in floats]
        )

    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in found.pairs:
        a, b = vector(1 + pair.first), vector(1 + pair.second)
        angle = np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        assert pair.angle == pytest.approx(angle)
        members = [states[1 + pair.first], states[1 + pair.second]]
        ends = [accuracy(plain_logits([s], "test"), "test") for s in members]
        middle = accuracy(plain_logits(members, "test"), "test")
        assert pair.advantage == pytest.approx(middle - np.mean(ends))
        assert math.isfinite(pair.approximation)
    assert by_name(found)["base"].kind == "base"


def test_what_splits_are_for() -> None:
    """The first is searched on, the second is the test, others are shifts; a task may say so."""
    task = load_task(Counting())
    assert splits_of(task).shifts == ("far", "farther")
    assert splits_of(replace(task, splits=("val",))).test is None
    for shifts in (["far"], ["far", "nowhere"]):
        said = Counting()
        said.shifts = shifts  # type: ignore[attr-defined]
        with pytest.raises(TaskError, match="does not fit"):
            splits_of(load_task(said))
    said.shifts = ["test", "far"]  # type: ignore[attr-defined]
    assert splits_of(load_task(said)).test == "farther"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy counts bytes where the disk took only some; we say what that means."""

    def save(file: Any, array: Any, **kwargs: Any) -> None:
        raise OSError("3000 requested and 2016 written")

    monkeypatch.setattr("streamsoup.study.measures.cache.np.save", save)
    with Cache(str(tmp_path / "cache")) as cache, pytest.raises(OutputError, match="is it full"):
        cache.put_logits("key", np.zeros((2, 3), np.float32), np.zeros(2, np.int64))


def test_folders_that_are_not_ours(folders: list[str], tmp_path: Path) -> None:
    """An ingredient, a folder with something else, and one in use are refused."""
    task = Counting()
    with pytest.raises(OutputError, match="not a report of streamsoup"):
        compare(folders, task, output=folders[0])
    with pytest.raises(OutputError, match="lies in the ingredient"):
        compare(folders, task, output=Path(folders[0]) / "report")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a report of streamsoup"):
        compare(folders, task, output=tmp_path / "full")
    with Cache(str(tmp_path / "out" / "cache")), pytest.raises(OutputBusyError):
        compare(folders, task, output=tmp_path / "out")
    assert task.asked == []


def test_granularities_are_checked_before_anything_is_measured() -> None:
    """A word in the place of a list would be taken letter by letter, at the very end."""
    for wrong in ("global", ("global", "block")):
        with pytest.raises(RecipeError, match="learned"):
            CompareSettings(learned=wrong)  # type: ignore[arg-type]


def test_a_disk_that_fills_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed first is told, and the folder is let go of."""

    def full(journal: Journal) -> None:
        raise OSError(28, "No space left on device")

    def measure(error: Exception | None) -> None:
        with Cache(str(tmp_path / "cache")):
            if error is not None:
                raise error

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "sync", full)
        with pytest.raises(KeyError):
            measure(KeyError())
        with pytest.raises(OutputError, match="No space left"):
            measure(None)
    Cache(str(tmp_path / "cache")).close()
