"""How sure a difference is: gains over the reference rows, and bootstrap intervals for each cell.

All rows of a split are resampled alike, so that the interval of a gain is that of a paired
difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.study.measures.bootstrap import interval, resampled_means
from streamsoup.study.measures.rows import MEAN, Gain, Row, Splits

__all__ = ["with_gains", "with_intervals"]

Floats = NDArray[np.float64]

_REFERENCES = {"over_best": "best", "over_base": "base"}
"""The field of a cell that holds a gain, and the kind of row that it is a gain over."""


def with_gains(rows: Sequence[Row]) -> list[Row]:
    """Add to each cell how much better it is than the best on validation, and than the base."""
    judged = list(rows)
    for field, reference in _references(rows).items():
        theirs = rows[reference].cells
        for number, row in enumerate(judged):
            gains = {
                column: cell.value - theirs[column].value for column, cell in row.cells.items()
            }
            cells = {
                column: replace(cell, **{field: Gain(gains[column])})
                if number != reference and math.isfinite(gains[column])
                else cell
                for column, cell in row.cells.items()
            }
            judged[number] = replace(row, cells=cells)
    return judged


def with_intervals(
    rows: Sequence[Row],
    results: Mapping[str, Sequence[tuple[int, Floats]]],
    splits: Splits,
    seed: int,
) -> list[Row]:
    """Add bootstrap intervals to the values and the gains of rows.

    Args:
        rows: Rows with gains.
        results: For each split, numbers of rows with their results by example, shape ``(n,)``.
        splits: Which splits are shifts: their mean has an interval, too.
        seed: Of the bootstrap; the split's number is added to it.
    """
    judged = list(rows)
    of_shifts: dict[int, list[Floats]] = {}
    for number, split in enumerate(splits.all):
        known = results.get(split, [])
        if not known or len({len(examples) for _, examples in known}) != 1:
            continue
        drawn = resampled_means(np.stack([examples for _, examples in known]), seed=seed + number)
        means = [(row, values) for (row, _), values in zip(known, drawn, strict=True)]
        if split in splits.shifts:
            for row, values in means:
                of_shifts.setdefault(row, []).append(values)
        _judge(judged, split, means)
    n_shifts = len(splits.shifts)
    whole = [
        (row, np.asarray(np.mean(each, axis=0)))
        for row, each in of_shifts.items()
        if len(each) == n_shifts > 1
    ]
    _judge(judged, MEAN, whole)
    return judged


def _references(rows: Sequence[Row]) -> dict[str, int]:
    """Return the numbers of the rows that others are compared with, by the field of a cell."""
    return {
        field: number
        for field, kind in _REFERENCES.items()
        for number, row in enumerate(rows)
        if row.kind == kind
    }


def _judge(rows: list[Row], column: str, means: Sequence[tuple[int, Floats]]) -> None:
    """Put the intervals of a column into `rows`: of the values, and of the gains."""
    resampled = dict(means)
    references = _references(rows)
    for number, values in means:
        found = interval(values)
        cell = replace(rows[number].cells[column], low=found.low, high=found.high)
        for field, reference in references.items():
            gain = getattr(cell, field)
            if gain is not None and reference in resampled:
                of_gain = interval(values - resampled[reference])
                gain = replace(gain, low=of_gain.low, high=of_gain.high)
                cell = replace(cell, **{field: gain})
        rows[number] = replace(rows[number], cells={**rows[number].cells, column: cell})
