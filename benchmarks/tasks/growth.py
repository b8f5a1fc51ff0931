"""How do time and memory grow with the number of ingredients, and with their size?

A line is fitted to the logarithms: the exponent in bytes of time beyond start-up, which a tiny soup
takes, should be 1, of memory 0. Beside it the exponent of the machine's own limit, as in `uniform`:
reading and writing cost differently, and a disk takes in little faster than much.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.limits import WAYS
from benchmarks.measure import (
    Measurement,
    drop_cache,
    limit,
    measure,
    remove,
    settle,
    warm_cache,
    weights_of,
)
from benchmarks.ours import uniform
from benchmarks.rows import Row, Session, median

__all__ = ["START", "Fit", "exponent", "fitted", "grown", "run"]

START = Case("0.5M", 2)
"""So small that all its time is start-up."""


def run(session: Session, cases: Sequence[Case], *, rounds: int = 7) -> None:
    """Measure cases, interleaved. They share ingredients where they differ in number alone.

    Three rounds are too few: single soups differ by a fifth, which is 0.06 of an exponent.
    """
    cases = [START, *cases]
    output = cache_folder() / "soups" / "growth"
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        drop_cache(make(case))  # to be read anew: see `warm_cache`
    for round_ in range(rounds):
        results: dict[Case, Measurement] = {}
        for case in cases:
            ingredients = make(case)
            settle()
            warm_cache(ingredients)
            # The second of two in a row: where a host takes back the memory that its machines do
            # not use, the first waits for gigabytes of it, and larger models for more.
            for _ in range(2):
                results[case] = measure(uniform(output, ingredients), output=output)
                assert results[case].status == 0, results[case].stderr
        # The limits after all soups: what a disk has just taken in slows down what comes next.
        for case, result in results.items():
            session.add(
                "growth",
                "streamsoup",
                case.label,
                round=round_,
                n=case.n,
                size=case.size,
                input_nbytes=case.n * case.nbytes_each,
                output_nbytes=case.nbytes_each,
                limit_s=_limit_s(case, output.with_name("limit")),
                **result.row(),
            )
    remove(output)


def _limit_s(case: Case, output: Path) -> float:
    """Measure what the machine takes at least, as in `uniform`."""
    ingredients = make(case)
    settle()
    warm_cache(ingredients)
    reading = limit("mapped", len(os.sched_getaffinity(0)), *weights_of(ingredients))
    return reading + min(limit("write", way, case.nbytes_each, output) for way in WAYS)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line through the logarithms of points ``(x, y)``, least squares.

    >>> round(exponent([(1, 3), (2, 6), (4, 12)]), 3)
    1.0
    """
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    square = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / square


def grown(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Return what grew, its column, and the rows of the last session in which nothing else did.

    Those of `START`, which is all start-up, come first.
    """
    mine = [row for row in rows if row["task"] == "growth"]
    ways = (("ingredients", "n", "size"), ("bytes of a model", "output_nbytes", "n"))
    for what, of, fixed in ways:
        series: dict[tuple[str, Any], list[Row]] = {}
        for row in mine:
            if row["case"] != START.label:
                series.setdefault((row["session"], row[fixed]), []).append(row)
        fitting = [key for key, each in series.items() if len({row[of] for row in each}) > 2]
        if fitting:
            last = max(fitting)
            start = [row for row in mine if (row["session"], row["case"]) == (last[0], START.label)]
            yield what, of, start + series[last]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a table of growth grows: exponents in bytes read and written, but for memory's."""

    wall: float
    cpu: float
    """Both of the time beyond start-up; NaN where some soup took no longer than a tiny one."""
    whole_wall: float
    whole_cpu: float
    limit: float
    """NaN in sessions that did not measure it."""
    memory: float
    """In what grew: ingredients, or bytes of a model."""
    memory_swing: float
    """How far the peak of memory goes from its median, as a share of it."""


def fitted(found: Sequence[Row], of: str) -> Fit:
    """Fit the rows of a table that `grown` gives."""
    cases = dict.fromkeys(row["case"] for row in found)
    start, *groups = ([row for row in found if row["case"] == case] for case in cases)
    moved = [group[0]["input_nbytes"] + group[0]["output_nbytes"] for group in groups]
    peaks = [median(group, "peak_anonymous_nbytes") for group in groups]
    middle = statistics.median(peaks)

    def of_bytes(key: str, less: float = 0.0) -> float:
        ys = [median(group, key) - less for group in groups]
        return exponent(list(zip(moved, ys, strict=True))) if min(ys) > 0 else math.nan

    return Fit(
        wall=of_bytes("wall_s", median(start, "wall_s")),
        cpu=of_bytes("cpu_s", median(start, "cpu_s")),
        whole_wall=of_bytes("wall_s"),
        whole_cpu=of_bytes("cpu_s"),
        limit=of_bytes("limit_s") if "limit_s" in found[0] else math.nan,
        memory=exponent([(group[0][of], peak) for group, peak in zip(groups, peaks, strict=True)]),
        memory_swing=max(max(peaks) / middle - 1, 1 - min(peaks) / middle),
    )
