"""How much more ingredients help: what the first n of them would have given.

In the order given, as if the runs had stopped after n: best on validation, uniform, greedy, and
the ensemble of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from streamsoup.search.trials import best_first
from streamsoup.study.comparison.selection import Ensemble, grow_soup
from streamsoup.study.measures.bench import Bench
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.rows import MEAN, CurvePoint, Row, Splits

__all__ = ["choose_counts", "draw_curves", "values_of"]


def values_of(bench: Bench, splits: Splits, mixture: Mixture) -> dict[str, float]:
    """Return the number that counts of a mixture, in every column."""
    return _with_mean(splits, {split: bench.value(mixture, split) for split in splits.all})


def draw_curves(
    bench: Bench, splits: Splits, singles: Sequence[Row], n_points: int
) -> list[CurvePoint]:
    """Measure what the first n ingredients would have given, for some `n_points` n up to all.

    Costs the trials of a greedy search for each point, those of the same ingredients once.
    """
    if not n_points or len(singles) < 2:
        return []
    points = []
    counts = choose_counts(len(singles), n_points)
    for n in counts:
        order = best_first([row.cells[splits.val].value for row in singles[:n]])
        best = {column: cell.value for column, cell in singles[order[0]].cells.items()}
        grown = Mixture.uniform(grow_soup(bench, order, splits.val))
        points += [
            CurvePoint("best on validation", n, best),
            CurvePoint("uniform soup", n, values_of(bench, splits, Mixture.uniform(range(n)))),
            CurvePoint("greedy soup", n, values_of(bench, splits, grown)),
        ]
    if bench.predicts and not bench.asks_score:
        points += _of_ensembles(bench, splits, counts)
    return points


def choose_counts(n: int, most: int) -> list[int]:
    """Return `most` counts from 1 to `n`, or a few less, evenly spaced on a logarithmic scale.

    With one ingredient more, all but `n` itself stay, or some are left out: nothing between is
    measured anew.

    >>> choose_counts(10, 8), choose_counts(11, 8), choose_counts(72, 8)
    ([1, 2, 3, 4, 6, 8, 10], [1, 2, 3, 4, 6, 8, 11], [1, 2, 4, 8, 16, 32, 64, 72])
    """
    step = 1 / 16  # of an octave; each twice as large step takes every second count
    while True:
        n_steps = int(math.log2(n) / step)
        counts = {n, *(round(2.0 ** (k * step)) for k in range(n_steps + 1))}
        if len(counts) <= max(most, 2):
            return sorted(counts)
        step *= 2


def _of_ensembles(bench: Bench, splits: Splits, counts: Sequence[int]) -> list[CurvePoint]:
    """Grow the ensemble of all once on each split, and look at it on the way."""
    values: dict[int, dict[str, float]] = {n: {} for n in counts}
    for split in splits.all:
        ensemble = Ensemble(bench, split)
        for i in range(max(counts)):
            if i + 1 in values:
                values[i + 1][split] = ensemble.accuracy_with(i)
            ensemble.add(i)
    return [
        CurvePoint("ensemble of all", n, _with_mean(splits, each)) for n, each in values.items()
    ]


def _with_mean(splits: Splits, values: dict[str, float]) -> dict[str, float]:
    if len(splits.shifts) > 1:
        values[MEAN] = float(np.mean([values[split] for split in splits.shifts]))
    return values
