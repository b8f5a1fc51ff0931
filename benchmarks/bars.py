"""The bars that are set here, and what the last session on each kind of processor says of them."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row, latest, median, of_tool, share
from benchmarks.tasks.growth import fitted, grown

__all__ = ["bars"]

N, SIZE = "ingredients", "bytes of a model"
"""What grows, as `grown` says it."""

SMALL, LARGE = "8 × 125M bf16", "4 × 1.1B bf16, 2 shards"
MERGED = "4 × 125M bf16"


@dataclass(frozen=True, slots=True)
class Bar:
    """A number that is wanted, and how it is read off the rows of one kind of processor."""

    what: str
    of: Callable[[Sequence[Row]], float]
    """Raises `LookupError` or `ValueError` where there are no rows of it."""
    wanted: str = ""
    """Such as ``≥ 0.85`` or ``1.00 ± 0.05``; nothing for numbers that explain the one above."""

    def cell(self, rows: Sequence[Row]) -> str:
        """Return the number, in bold where it is missed."""
        try:
            number = self.of(rows)
        except (LookupError, ValueError):
            number = math.nan
        if math.isnan(number):
            return "–"
        text = f"{number:#.3g}"
        return text if self.is_met(number) else f"**{text}**"

    def is_met(self, number: float) -> bool:
        """Return True if a number is as wanted."""
        if not self.wanted:
            return True
        middle, _, swing = self.wanted.partition(" ± ")
        if swing:
            return abs(number - float(middle)) <= float(swing)
        sign, _, bound = self.wanted.partition(" ")
        return {"≥": operator.ge, "≤": operator.le}[sign](number, float(bound))


def _of_peers(case: str, begins: str) -> Callable[[Sequence[Row]], float]:
    """Return how many times as long the fastest of some peers takes, of those that are right."""

    def times(rows: Sequence[Row]) -> float:
        return _fastest(rows, case, begins) / median(of_tool(rows, case, "streamsoup"), "wall_s")

    return times


def _fastest(rows: Sequence[Row], case: str, begins: str) -> float:
    tools = {row["tool"] for row in rows if row["task"] == "uniform"} - {"streamsoup"}
    found = [of_tool(rows, case, tool) for tool in tools if tool.startswith(begins)]
    right = [each for each in found if each and each[0]["answer"]["share_wrong"] < RIGHT]
    return min(median(each, "wall_s") for each in right)


RIGHT = 1e-6
"""Share of wrong elements below which a peer counts as right: ties that it rounds twice."""


def _mergekit_of(limit: str) -> Callable[[Sequence[Row]], float]:
    """Return how many times as long as a limit mergekit takes for the large case."""

    def times(rows: Sequence[Row]) -> float:
        ours = of_tool(rows, LARGE, "streamsoup")
        return _fastest(rows, LARGE, "mergekit") / median(ours, limit)

    return times


def _kernel(case: str) -> Callable[[Sequence[Row]], float]:
    def part(rows: Sequence[Row]) -> float:
        found = latest(rows, "kernels", case)
        return statistics.median(row["gb_per_s"] / row["limit_gb_per_s"] for row in found)

    return part


def _first_run(rows: Sequence[Row]) -> float:
    first = median(latest(rows, "startup", "first run ever, " + SMALL), "wall_s")
    return first - median(latest(rows, "startup", "second run, " + SMALL), "wall_s")


def _growth(what: str, field: str) -> Callable[[Sequence[Row]], float]:
    """Return a number of a `Fit`."""

    def fit(rows: Sequence[Row]) -> float:
        for grew, of, found in grown(rows):
            if grew == what:
                return float(getattr(fitted(found, of), field))
        raise LookupError(what)

    return fit


def _share_of(case: str, cache: str = "warm", limit: str = "limit_s") -> Callable[..., float]:
    """Return a share of a limit, in the last session, with peers or without."""
    return lambda rows: share(latest(rows, "uniform", case, cache=cache, tool="streamsoup"), limit)


def _startup(rows: Sequence[Row]) -> float:
    return median(latest(rows, "startup", "two of 1 MB"), "wall_s")


def _greedy(rows: Sequence[Row]) -> float:
    case = SMALL + ", 2 s a score"
    return median(latest(rows, "greedy", case, tool="streamsoup"), "share_of_scoring")


def _merge(name: str) -> Callable[[Sequence[Row]], float]:
    """Return how many times as long as the uniform soup of the same files a merge takes."""
    return lambda rows: median(_merges(rows, name, "streamsoup"), "times_uniform")


def _merge_of_mergekit(name: str) -> Callable[[Sequence[Row]], float]:
    """Return how many times as long as streamsoup mergekit takes for the same merge."""
    times, peer = _merge(name), "mergekit, best flags"
    return lambda rows: median(_merges(rows, name, peer), "times_uniform") / times(rows)


def _merges(rows: Sequence[Row], name: str, tool: str) -> Sequence[Row]:
    return latest(rows, "merges", f"{name}, {MERGED}", tool=tool)


BARS = (
    Bar(f"{SMALL}, warm: limit / wall", _share_of(SMALL), "≥ 0.65"),
    Bar(f"{LARGE}, warm: limit / wall", _share_of(LARGE), "≥ 0.85"),
    Bar(f"{SMALL}: fastest right peer / wall", _of_peers(SMALL, ""), "≥ 4"),
    Bar(f"{LARGE}: fastest right peer / wall", _of_peers(LARGE, ""), "≥ 4"),
    Bar(f"{SMALL}: mergekit's best / wall", _of_peers(SMALL, "mergekit"), "≥ 15"),
    Bar(f"{LARGE}: mergekit's best / wall", _of_peers(LARGE, "mergekit"), "≥ 15"),
    Bar("— the same, / limit", _mergekit_of("limit_s")),
    Bar("— the same, / writing as much and nothing else", _mergekit_of("writing_s")),
    Bar(f"{LARGE}, cold: reading alone / wall", _share_of(LARGE, "cold"), "≥ 0.9"),
    Bar("— the same, writing as much meanwhile", _share_of(LARGE, "cold", "at_once_s")),
    *(
        Bar(f"kernel of {name}: share of memory bandwidth", _kernel(name), f"≥ {least}")
        for name, least in (
            *(("bf16", 0.9), ("f16", 0.9), ("f32", 0.9)),
            *(("f8_e4m3", 0.6), ("f8_e5m2", 0.6)),
        )
    ),
    Bar("start-up, two of 1 MB, s", _startup, "≤ 0.4"),
    Bar("first run ever, beyond the second, s", _first_run, "≤ 10"),
    Bar("greedy search / scoring alone", _greedy, "≤ 1.05"),
    Bar(f"{MERGED}: ties / uniform", _merge("ties"), "≤ 3"),
    Bar("dare by density / uniform", _merge("dare, rescaled by density"), "≤ 1.5"),
    Bar("mergekit's ties / ties", _merge_of_mergekit("ties"), "≥ 10"),
    Bar("memory over 2 to 64 ingredients, swing", _growth(N, "memory_swing"), "≤ 0.05"),
    Bar("memory over 0.25 to 4.4 GB, swing", _growth(SIZE, "memory_swing"), "≤ 0.05"),
    Bar("exponent of time, 2 to 64 ingredients", _growth(N, "wall"), "1.00 ± 0.05"),
    Bar("— the same, processor time", _growth(N, "cpu")),
    Bar("— the same, the limit", _growth(N, "limit")),
    Bar("exponent of time, 0.25 to 4.4 GB", _growth(SIZE, "wall"), "1.00 ± 0.05"),
    Bar("— the same, processor time", _growth(SIZE, "cpu")),
    Bar("— the same, the limit", _growth(SIZE, "limit")),
)


def bars(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Return the lines of a table, its head first: a column for each kind of processor."""
    cpus = list(dict.fromkeys(row["cpu"] for row in sorted(rows, key=lambda row: row["session"])))
    yield ["bar", "wanted", *cpus]
    for bar in BARS:
        cells = [bar.cell([row for row in rows if row["cpu"] == cpu]) for cpu in cpus]
        yield [bar.what, bar.wanted, *cells]
