"""How do time and memory grow with the number of ingredients, and with their size?

A line is fitted to the logarithms: the exponent in bytes of time beyond start-up, which a tiny soup
takes, should be 1, of memory 0. Beside it the exponent of the machine's own limit, as in `uniform`:
reading and writing cost differently, and a disk takes in little faster than much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from benchmarks.checkpoints import Case, cache_folder, make
from benchmarks.measure import (
    drop_cache,
    limit,
    measure,
    remove,
    settle,
    warm_cache,
    weights_of,
)
from benchmarks.ours import uniform
from benchmarks.rows import Session

__all__ = ["START", "exponent", "run"]

START = Case("0.5M", 2)
"""So small that all its time is start-up."""


def run(session: Session, cases: Sequence[Case], *, rounds: int = 3) -> None:
    """Measure cases, interleaved. They share ingredients where they differ in number alone."""
    cases = [START, *cases]
    output = cache_folder() / "soups" / "growth"
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        drop_cache(make(case))  # to be read anew: see `warm_cache`
    n_cpus = len(os.sched_getaffinity(0))
    for round_ in range(rounds):
        for case in cases:
            ingredients = make(case)
            warm_cache(ingredients)
            settle()
            limit_s = limit("mapped", n_cpus, *weights_of(ingredients)) + min(
                limit(way, case.nbytes_each, output.with_name("limit"))
                for way in ("write", "reserved")
            )
            warm_cache(ingredients)
            settle()
            result = measure(uniform(output, ingredients), output=output)
            assert result.status == 0, result.stderr
            session.add(
                "growth",
                "streamsoup",
                case.label,
                round=round_,
                n=case.n,
                size=case.size,
                input_nbytes=case.n * case.nbytes_each,
                output_nbytes=case.nbytes_each,
                limit_s=limit_s,
                **result.row(),
            )
    remove(output)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Give the slope of the line through the logarithms of points ``(x, y)``, least squares.

    >>> round(exponent([(1, 3), (2, 6), (4, 12)]), 3)
    1.0
    """
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    square = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / square
