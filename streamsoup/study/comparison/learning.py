"""Learned soups for the comparison: their coefficients, learned once and kept.

`soups.learned` does the work and writes a soup; here only its coefficients are wanted, so the soup
is made inside the cache, and removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash
from msgspec.structs import replace

from streamsoup.errors import ResumeError
from streamsoup.output.coefficients import coefficients_of
from streamsoup.recipe import Coefficients
from streamsoup.search.learning.parametrisation import Granularity
from streamsoup.study.measures.bench import Bench
from streamsoup.task import Task

if TYPE_CHECKING:
    from streamsoup.search.learned import LearnedSoup

__all__ = ["learn", "why_not"]


def why_not(bench: Bench) -> str:
    """Return why nothing can be learned on the task, or an empty string if it can.

    What is learned on is the task's loss, or the cross-entropy of its predictions, if they have a
    gradient: many a task takes them under `torch.no_grad`, or gives arrays of numpy. Costs one
    batch of predictions, once.
    """
    import torch

    task = bench.task
    if torch.is_inference_mode_enabled():
        return "Nothing has a gradient in torch.inference_mode(): no learned soups."
    if task.has("loss"):
        return ""
    if not bench.predicts:
        return "The task has neither a loss nor predictions: no learned soups."
    key = f"gradient:{task.fingerprint}"
    known = bench.cache.value(key)
    if known is None:
        known = _have_gradient(task, bench.borrow())
        bench.cache.put_value(key, known)
    if known:
        return ""
    return (
        "The task has no loss, and its predictions carry no gradient (are they made under "
        "torch.no_grad, or turned into numpy?): no learned soups."
    )


def _have_gradient(task: Task, model: Any) -> bool:
    """Return True if a gradient would come back from the predictions of a model."""
    import torch

    from streamsoup.task.running import contained

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with contained(task, "predictions"), torch.enable_grad():
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            answers = task.predictions(model, task.splits[0])
            logits = next(iter(answers), (None, None))[0]
            return bool(getattr(logits, "requires_grad", False))
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def learn(bench: Bench, n: int, granularity: Granularity) -> Coefficients:
    """Learn the coefficients of the first `n` ingredients on the validation split.

    Softmax, with every fifth batch of the split watching, as `soups.learned` does by default.
    Costs some tens of passes over the split and twice as many over the weights, once; a killed
    search goes on.
    """
    digests = ",".join(bench.digest(i) for i in range(n))
    told = f"{bench.task.fingerprint}:{bench.given}:{bench.plan.recipe.dtype}"
    key = f"learned:{granularity}:{told}:{digests}"
    known = bench.cache.value(key)
    # By its key, so that a search that was killed is gone on with by the same one alone.
    name = f"learned-{xxhash.xxh3_64_hexdigest(key.encode())}"
    output = os.path.join(bench.cache.folder, name)
    if known is None:
        from streamsoup.search.learned import learned
        from streamsoup.search.learning.settings import LearnedSettings

        def search(*, restart: bool) -> LearnedSoup:
            return learned(
                bench.plan.ingredients[:n],
                _with_loss(bench.task),
                output=output,
                model=bench.borrow(),
                settings=LearnedSettings(granularity=granularity, restart=restart),
                options=replace(bench.options, overwrite=True),
            )

        try:
            soup = search(restart=False)
        except ResumeError:  # its notes go by paths and times, and the folder by contents
            soup = search(restart=True)
        known = msgspec.to_builtins(coefficients_of(soup.recipe))
        bench.cache.put_value(key, known)
    shutil.rmtree(output, ignore_errors=True)  # also where a kill came just before
    return msgspec.convert(known, Coefficients)


def _with_loss(task: Task) -> Task:
    """Return a task its predictions' cross-entropy where it has no loss of its own."""
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
