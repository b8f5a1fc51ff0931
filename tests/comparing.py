"""A task that counts what it is asked, and plain code to compare its results with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from networks import build, data
from numpy.typing import NDArray

from streamsoup.study.comparison.table import CompareSettings
from streamsoup.study.measures.rows import Comparison

SPLITS = ["val", "test", "far", "farther"]
PARTS = {
    "val": data(0, 120),
    "test": data(1, 150),
    "far": (data(2, 90)[0] * 1.5 + 0.2, data(2, 90)[1]),
    "farther": (data(3, 80)[0] - 0.7, data(3, 80)[1]),
}
SMALL = CompareSettings(learned=(), curve=0, pairs=0, orders=0)

Weights = dict[str, torch.Tensor]


class Counting:
    """A task that notes what it is asked, and may fail after a while."""

    def __init__(self, *, score: Any = None, predicts: bool = True, fails_after: int = -1) -> None:
        self.splits = list(SPLITS)
        self.asked: list[tuple[str, str]] = []
        self._n_built = 0
        self._fails_after = fails_after
        self._score = score
        if not predicts:
            self.predictions = None  # type: ignore[assignment,method-assign]

    def build(self) -> torch.nn.Module:
        self._n_built += 1
        return build()

    def note(self, what: str, split: str) -> None:
        if len(self.asked) == self._fails_after:
            raise RuntimeError("the power failed")
        self.asked.append((what, split))

    def score(self, model: torch.nn.Module, split: str) -> Any:
        self.note("score", split)
        inputs, labels = PARTS[split]
        logits = model(inputs)
        if self._score is not None:
            return self._score(logits, labels)
        return float((logits.argmax(1) == labels).float().mean())

    def predictions(
        self, model: torch.nn.Module, split: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.note("predictions", split)
        inputs, labels = PARTS[split]
        for start in range(0, len(labels), 50):
            yield model(inputs[start : start + 50]), labels[start : start + 50]


def plain_logits(states: Sequence[Weights], split: str) -> NDArray[np.float64]:
    """Average state dicts in float64, and ask torch: no code of ours."""
    model = build().eval()
    mean = {
        name: torch.stack([s[name].double() for s in states]).mean(0).float()
        if states[0][name].is_floating_point()
        else states[0][name]
        for name in states[0]
    }
    model.load_state_dict(mean)
    with torch.no_grad():
        return model(PARTS[split][0]).double().numpy()


def accuracy(logits: NDArray[np.float64], split: str) -> float:
    """Return the share of right answers."""
    return float((logits.argmax(1) == PARTS[split][1].numpy()).mean())


def by_name(found: Comparison) -> dict[str, Any]:
    """Return the rows by name, without what follows a colon."""
    return {row.name.partition(":")[0]: row for row in found.rows}
