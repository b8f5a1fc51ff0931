"""Learned soups for the comparison: their coefficients, learned once and kept.

`soups.learned` does the work and writes a soup; here only its coefficients are wanted, so the soup
is made inside the cache, and removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from streamsoup.comparison.bench import Bench
from streamsoup.recipe import Coefficients
from streamsoup.soups.mixture import Granularity
from streamsoup.task import Task

__all__ = ["can_learn", "learn"]


def can_learn(task: Task) -> bool:
    """Whether there is a loss to learn on: the task's own, or that of its predictions."""
    return task.has("loss") or task.has("predictions")


def learn(bench: Bench, n: int, granularity: Granularity) -> Coefficients:
    """Learn the coefficients of the first `n` ingredients on the validation split.

    Softmax, with every fifth batch of the split watching, as `soups.learned` does by default.
    Costs some tens of passes over the split and twice as many over the weights, once; a killed
    search goes on.
    """
    digests = ",".join(bench.digest(i) for i in range(n))
    key = f"learned:{granularity}:{bench.task.fingerprint}:{bench.plan.recipe.dtype}:{digests}"
    known = bench.cache.value(key)
    if known is None:
        from streamsoup.soups.learned import learned_soup
        from streamsoup.soups.learning import LearningOptions

        output = os.path.join(bench.cache.folder, f"learned-{granularity}")
        soup = learned_soup(
            bench.plan.ingredients[:n],
            _with_loss(bench.task),
            output=output,
            model=bench.borrow(),
            learning=LearningOptions(granularity=granularity),
            options=replace(bench.options, overwrite=True),
        )
        known = msgspec.to_builtins(soup.recipe.coefficients)
        bench.cache.put_value(key, known)
        shutil.rmtree(output, ignore_errors=True)
    return msgspec.convert(known, Coefficients)


def _with_loss(task: Task) -> Task:
    """Give a task its predictions' cross-entropy where it has no loss of its own."""
    return task if task.has("loss") else replace(task, source=_PredictionLoss(task))


class _PredictionLoss:
    """The functions of a task, and a loss."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task.source, name)

    def loss(self, model: Any, split: str) -> Iterator[tuple[Any, float]]:
        from torch.nn.functional import cross_entropy

        for logits, labels in self._task.predictions(model, split):
            yield cross_entropy(logits, labels), float(len(labels))
