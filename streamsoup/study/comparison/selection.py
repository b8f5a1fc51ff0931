"""Which ingredients: the best one, a greedy soup, a greedily grown ensemble.

The greedy rule (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, recipe 1)::

    members = [the best]
    for each other ingredient, best first:
        if value(members + it) >= value(members): members += it

`value` is a score on the validation split: of the mean of the weights for a soup, of the mean of
the logits for an ensemble. Equal scores stay in the order given; NaN never wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from streamsoup.study.measures.bench import Bench
from streamsoup.study.measures.calibration import AnyFloats, Labels, answers_of
from streamsoup.study.measures.mixture import Mixture

__all__ = ["Ensemble", "grow", "grow_ensemble", "grow_soup"]

Members = tuple[int, ...]


def grow(order: Sequence[int], value: Callable[[Members], float]) -> Members:
    """Grow a set of members greedily, in this order. Costs a value for each member tried."""
    chosen: Members = (order[0],)
    best = _rank(value(chosen))
    for i in order[1:]:
        found = _rank(value((*chosen, i)))
        if found > best or found == best > -math.inf:
            chosen, best = (*chosen, i), found
    return chosen


class Ensemble:
    """The mean of the logits of some ingredients on one split, grown one by one."""

    def __init__(self, bench: Bench, split: str) -> None:
        """Begin without members."""
        self._bench = bench
        self._split = split
        self.members: Members = ()
        self.labels: Labels = np.empty(0, np.int64)
        self._sum: NDArray[np.float64] | float = 0.0

    def add(self, i: int) -> None:
        """Add ingredient `i`."""
        self._sum = self._with(i)
        self.members = (*self.members, i)

    def mean(self) -> AnyFloats:
        """Return the mean logits ``(example, class) float64``."""
        return np.asarray(self._sum / len(self.members))

    def accuracy_with(self, i: int) -> float:
        """Return the accuracy that the ensemble would have with ingredient `i`."""
        answers = answers_of(self._with(i))
        return float((answers == self.labels).mean())

    def _with(self, i: int) -> NDArray[np.float64]:
        logits, self.labels = self._bench.logits(Mixture.uniform([i]), self._split)
        total: NDArray[np.float64] = self._sum + logits.astype(np.float64)
        return total


def grow_soup(bench: Bench, order: Sequence[int], split: str) -> Members:
    """Grow a soup by the greedy rule, on the number that counts on `split`."""
    return grow(order, lambda members: bench.value(Mixture.uniform(members), split))


def grow_ensemble(bench: Bench, order: Sequence[int], split: str) -> Members:
    """Grow an ensemble by the greedy rule, on the accuracy of its mean logits on `split`."""
    ensemble = Ensemble(bench, split)

    def value(members: Members) -> float:
        # `grow` asks for the chosen members and one more: the sum of the chosen is kept.
        if members[:-1] != ensemble.members:
            ensemble.add(members[-2])
        return ensemble.accuracy_with(members[-1])

    return grow(order, value)


def _rank(score: float) -> float:
    return -math.inf if math.isnan(score) else score
