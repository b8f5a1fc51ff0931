"""What a comparison does with models and tasks that do not behave."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparing import PARTS, SMALL, SPLITS, Counting, by_name
from msgspec.structs import replace
from networks import build
from safetensors.torch import load_file

from streamsoup.errors import (
    TaskError,
)
from streamsoup.study.comparison import learning
from streamsoup.study.comparison.table import compare
from streamsoup.study.landscape.paths import wise_ft as sweep

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_of_nan_answers_nothing(folders: list[str], tmp_path: Path) -> None:
    """Its answers are no class 0, though that is what numpy and torch call the largest of NaN."""

    class Overflowing(Counting):
        def predictions(self, model: torch.nn.Module, split: str) -> Any:
            for logits, labels in super().predictions(model, split):
                spoiled = torch.equal(model[0].weight, first)  # type: ignore[index]
                yield logits * (math.nan if spoiled else 1), labels * 0

        def score(self, model: torch.nn.Module, split: str) -> Any:
            parts = list(self.predictions(model, split))
            right = sum(int((z.argmax(1) == y).sum()) for z, y in parts)
            return right / sum(len(y) for _, y in parts)

    first = load_file(Path(folders[0]) / "model.safetensors")["0.weight"]
    found = compare(folders[:3], Overflowing(), output=tmp_path / "out", settings=SMALL)
    assert found.metric == "score"  # which says so, and is not the accuracy of the answers
    assert len([note for note in found.notes if "answers on 'val' are NaN" in note]) >= 2
    cell = found.of("ingredient")[0].cells["val"]
    assert (cell.value, math.isnan(cell.nll)) == (1.0, True)


def test_a_split_without_examples_is_refused(folders: list[str], tmp_path: Path) -> None:
    """In words, and not as a division by zero."""
    task = Counting()
    task.predictions = lambda model, split: (torch.zeros(0, 2), torch.zeros(0).long())  # type: ignore[method-assign]
    with pytest.raises(TaskError, match="they have no examples; yield some"):
        compare(folders[:2], task, output=tmp_path / "out", settings=SMALL)


def test_a_task_without_predictions(folders: list[str], tmp_path: Path) -> None:
    """Scores alone make soups and no ensembles; examples beside the score make intervals."""

    def with_examples(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        right = (logits.argmax(1) == labels).double()
        return {"accuracy": float(right.mean()), "examples": right}

    task = Counting(score=with_examples, predicts=False)
    found = compare(folders, task, output=tmp_path / "out", settings=replace(SMALL, curve=3))
    assert not found.of("ensemble")
    assert not math.isnan(by_name(found)["greedy soup"].cells["test"].low)
    full = compare(folders, Counting(), output=tmp_path / "full", settings=SMALL)
    for split in SPLITS:
        ours = by_name(found)["greedy soup"].cells[split]
        theirs = by_name(full)["greedy soup"].cells[split]
        assert (ours.value, ours.low, ours.high) == pytest.approx(
            (theirs.value, theirs.low, theirs.high)
        )


def test_examples_in_another_order_are_refused(folders: list[str], tmp_path: Path) -> None:
    """Logits of different models are compared example by example, so their order must stay."""

    class Shuffling(Counting):
        def predictions(self, model: Any, split: str) -> Iterator[Any]:
            for logits, labels in super().predictions(model, split):
                order = torch.tensor(
                    np.random.default_rng(len(self.asked)).permutation(len(labels))
                )
                yield logits[order], labels[order]

    with pytest.raises(TaskError, match="same order"):
        compare(folders, Shuffling(), output=tmp_path / "out", settings=SMALL)


class Changing(Counting):
    """A task that changes the weights it measures, in place."""

    def __init__(self, how: str, splits: list[str], **more: Any) -> None:
        super().__init__(**more)
        self.splits = splits
        self._how = how

    def build(self) -> torch.nn.Module:
        with torch.inference_mode(self._how == "inference"):
            return super().build()

    def score(self, model: torch.nn.Module, split: str) -> Any:
        found = super().score(model, split)
        self._change(model)
        return found

    def predictions(self, model: torch.nn.Module, split: str) -> Iterator[Any]:
        yield from super().predictions(model, split)
        self._change(model)

    def _change(self, model: torch.nn.Module) -> None:
        if self._how == "statistics":
            model.train()
            model(4 * PARTS["far"][0] + 3)
        else:
            with torch.inference_mode():
                model[3].bias[0] += 5


@pytest.mark.parametrize("how", ["weights", "statistics", "inference"])
@pytest.mark.parametrize("predicts", [True, False])
def test_scoring_may_change_the_weights(
    folders: list[str], tmp_path: Path, how: str, predicts: bool
) -> None:
    """Whatever a task does to the weights on one split, the next sees the mixture itself."""
    found = [
        list(compare(folders[:3], task, output=tmp_path / name, settings=SMALL).to_lines())
        for name, task in (
            ("plain", Counting(predicts=predicts)),
            ("changing", Changing(how, list(SPLITS), predicts=predicts)),
        )
    ]
    assert found[0] == found[1]
    rows = [
        sweep(*folders[:2], task, [0, 0.5], cache=tmp_path / f"cache-{name}").values
        for name, task in (
            ("plain", Counting(predicts=predicts)),
            ("changing", Changing(how, SPLITS[::-1], predicts=predicts)),
        )
    ]
    assert rows[0] == rows[1]


def test_a_mixture_that_stays_is_put_once(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four splits of an ingredient cost one pass over its weights; four, if the task changes it."""
    from streamsoup.engine import stream

    runs: list[int] = []
    run = stream.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(kwargs.get("ledger") is not None)
        return run(*args, **kwargs)

    monkeypatch.setattr(stream, "run", counted)
    counts = []
    for name, task in (("a", Counting()), ("b", Changing("weights", list(SPLITS)))):
        runs.clear()
        compare(folders[:1], task, output=tmp_path / name, settings=SMALL)
        counts.append(runs.count(False))
    assert counts == [1, 5]  # predictions of four splits, and the score of one


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z, y: (z[0], y), "shapes"),
        (lambda z, y: (z[:, 0], y.double()), "a task without classes has a score"),
        (lambda z, y: (z[:, : len(y) // 15], y), r"\[20, 1\] and \[20\]; the first batch had 3"),
        (lambda z, y: (z, y.double()), "not numbers of classes"),
        (lambda z, y: (z, y + 4), "there are 4 classes"),
    ],
)
def test_predictions_that_are_none(
    folders: list[str], tmp_path: Path, spoil: Any, message: str
) -> None:
    """What is no logits and labels is refused by name."""

    class Wrong(Counting):
        def predictions(self, model: Any, split: str) -> Iterator[Any]:
            for logits, labels in super().predictions(model, split):
                yield spoil(logits, labels)

    with pytest.raises(TaskError, match=message):
        compare(folders, Wrong(), output=tmp_path / "out", settings=SMALL)


class Deaf(Counting):
    """A task whose predictions have no gradient: as most are written."""

    def __init__(self, how: str, **more: Any) -> None:
        super().__init__(**more)
        self._how = how

    def predictions(self, model: Any, split: str) -> Iterator[Any]:
        if self._how == "context":
            with torch.no_grad():
                yield from super().predictions(model, split)
            return
        for logits, labels in super().predictions(model, split):
            yield logits.detach().numpy(), labels.numpy()


@pytest.mark.parametrize("how", ["context", "numpy"])
def test_predictions_without_a_gradient(folders: list[str], tmp_path: Path, how: str) -> None:
    """Nothing can be learned from them: that is said, and the rest is compared; once."""
    settings = replace(SMALL, learned=("global",))
    found = compare(folders, Deaf(how), output=tmp_path / "out", settings=settings)
    assert any("carry no gradient" in note for note in found.notes)
    assert "learned soup" not in by_name(found)
    again = Deaf(how)
    compare(folders, again, output=tmp_path / "out", settings=settings)
    assert (again.asked, again._n_built) == ([], 0)


def test_a_frozen_model_can_still_be_learned_in(folders: list[str], tmp_path: Path) -> None:
    """A task may build its model without gradients; learned soups turn them on, and off again."""
    model = build().requires_grad_(False)
    settings = replace(SMALL, learned=("global",))
    out = tmp_path / "out"
    found = compare(folders, Counting(), output=out, model=model, settings=settings)
    assert "learned soup" in by_name(found)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_learning_that_was_killed(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learned search that was killed is no obstacle to one over other ingredients."""
    from streamsoup.search.learning.search import LearnedSearch

    def killed(search: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    settings = replace(SMALL, learned=("global",))
    with monkeypatch.context() as patch:
        patch.setattr(LearnedSearch, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(folders[:4], Counting(), output=tmp_path / "out", settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            compare(folders, Counting(), output=tmp_path / "out", settings=settings)
    found = compare(folders, Counting(), output=tmp_path / "out", settings=settings)
    assert by_name(found)["learned soup"].n_ingredients == 6
    cache = tmp_path / "out" / "cache"
    assert [path.suffix for path in cache.glob("learned-*")] == [".search"]  # of the four


def test_learning_goes_on_anew_where_paths_changed(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept goes by content; the notes of a learned search, by path and time, may go."""
    settings = replace(SMALL, learned=("global",))
    before, whole = Counting(), Counting()
    compare(folders[:3], before, output=tmp_path / "before", settings=SMALL)
    compare(folders[:3], whole, output=tmp_path / "whole", settings=settings)
    fails = Counting(fails_after=(len(before.asked) + len(whole.asked)) // 2)
    with pytest.raises(TaskError):
        compare(folders[:3], fails, output=tmp_path / "out", settings=settings)
    assert list((tmp_path / "out" / "cache").glob("learned-*.search"))
    os.utime(Path(folders[0]) / "model.safetensors", (1, 1))
    found = compare(folders[:3], Counting(), output=tmp_path / "out", settings=settings)
    assert "learned soup" in by_name(found)
