"""The plots of a comparison: by shift, with intervals, by number of ingredients, and of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from streamsoup.study.measures.rows import MEAN, Comparison, Row
from streamsoup.study.pages.blocks import Plot, Point, Series, Table
from streamsoup.study.report.coefficients import coefficient_map

__all__ = ["curves", "heat_maps", "intervals", "pairs", "scatter", "theory"]

NAMED = 14
"""Most ingredients whose points have their names beside them."""

MARKED = 24
"""Most points of a curve that have marks as large as their shapes need."""


class Look(msgspec.Struct, frozen=True):
    """How one kind of row is drawn."""

    shape: str
    colour: int
    size: float = 5.0
    filled: bool = True


_LOOKS: Mapping[str, Look] = {
    "ingredient": Look("circle", 7, 3.5),
    "base": Look("cross", 7),
    "best": Look("circle", 0, 6, filled=False),
    "uniform": Look("up", 1),
    "greedy": Look("star", 2, 6),
    "orders": Look("plus", 2, filled=False),
    "learned": Look("diamond", 5, 4.5),
    "by layer": Look("diamond", 5, filled=False),
    "oracle": Look("cross", 7, filled=False),
    "ensemble": Look("square", 3, 4.5),
    "members": Look("square", 3, 5.5, filled=False),
    "grown": Look("plus", 3),
    "soup": Look("down", 4),
}
_LINES: Mapping[str, tuple[int, str, str]] = {
    "best on validation": (0, "dashed", "circle"),
    "uniform soup": (1, "solid", "up"),
    "greedy soup": (2, "solid", "star"),
    "ensemble of all": (3, "dotted", "square"),
}


def _look(row: Row) -> Look:
    """Return how a row is drawn: soups and ensembles by what their names say."""
    key: str = row.kind
    if row.kind == "ensemble":
        key = next((word for word in ("members", "grown") if word in row.name), key)
    elif row.kind == "soup":
        words = ("orders", "greedy", "uniform", "by layer", "learned")
        key = next((word for word in words if word in row.name), key)
    return _LOOKS[key]


def scatter(found: Comparison) -> Iterator[Plot]:
    """Draw what each ingredient, soup and ensemble scores in distribution and under shift."""
    x, y = found.splits.judged, found.splits.shifted
    if y is None:
        return

    def point(row: Row, name: str = "") -> Point:
        at, over = (_scaled(row.cells[column].value, found) for column in (x, y))
        hint = f"{row.name}\n{_label(found, x)}: {at:.6g}\n{_label(found, y)}: {over:.6g}"
        return Point(at, over, hint, name=name)

    ingredients = found.of("ingredient")
    named = len(ingredients) <= NAMED
    series = [
        _series(
            _LOOKS["ingredient"],
            f"ingredients ({len(ingredients)})",
            [point(row, row.name if named else "") for row in ingredients],
        )
    ]
    series += [
        _series(_look(row), row.name, [point(row)])
        for row in found.rows
        if row.kind not in ("ingredient", "oracle")
    ]
    words = "One point for each ingredient, soup and ensemble: in distribution against shift."
    yield Plot("scatter", words, _label(found, x), _label(found, y), series)


def intervals(found: Comparison) -> Iterator[Plot]:
    """Draw every way to choose with its confidence interval, a plot for each column."""
    rows = [row for row in found.rows if row.kind != "ingredient"]
    best = next((row for row in rows if row.kind == "best"), None)
    for number, column in enumerate(_columns(found)):
        series = []
        for place, row in enumerate(rows):
            cell = row.cells[column]
            low, high = cell.low, cell.high
            if math.isfinite(cell.spread):
                low, high = cell.value - cell.spread, cell.value + cell.spread
            value, low, high = (_scaled(each, found) for each in (cell.value, low, high))
            hint = f"{row.name}\n{_label(found, column)}: {value:.6g}"
            if math.isfinite(low):
                what = "spread over orders" if math.isfinite(cell.spread) else "95 % interval"
                hint += f"\n{what}: {low:.6g} to {high:.6g}"
            series.append(_series(_look(row), "", [Point(value, place, hint, low, high)]))
        words = f"Every way to choose, on {column}; the dashed line is the best on validation."
        yield Plot(
            "intervals" if number == 0 else "intervals-shift",
            words,
            _label(found, column),
            "",
            series,
            places=[row.name for row in rows],
            verticals=[] if best is None else [_scaled(best.cells[column].value, found)],
        )


def curves(found: Comparison) -> Iterator[Plot]:
    """Draw what the first n ingredients give, a plot for each column."""
    for number, column in enumerate(_columns(found)):
        series = []
        for method, (colour, line, shape) in _LINES.items():
            points = [
                Point(
                    p.n,
                    _scaled(p.values[column], found),
                    f"{method} of the first {p.n}: {_scaled(p.values[column], found):.6g}",
                )
                for p in found.curves
                if p.method == method
            ]
            size = (6.0 if shape == "star" else 4.5) if len(points) <= MARKED else 2.5
            series.append(Series(method, points, shape, colour, line=line, size=size))
        if any(each.points for each in series):
            yield Plot(
                "curves" if number == 0 else "curves-shift",
                f"What the first n ingredients would have given on {column}.",
                "ingredients, in the order given",
                _label(found, column),
                series,
                whole=True,
            )


def pairs(found: Comparison) -> Iterator[Plot]:
    """Draw what the middle of each pair gains, against the angle between the two."""
    unit = "percentage points" if found.is_share else found.metric
    points = [
        Point(
            pair.angle,
            _scaled(pair.advantage, found),
            f"{_named(found, pair.first, pair.second)}\n{pair.angle:.1f}°: "
            f"{_scaled(pair.advantage, found):+.4g} {unit}",
        )
        for pair in found.pairs
    ]
    if any(math.isfinite(point.x) for point in points):
        yield Plot(
            "pairs",
            "What the middle between two ingredients gains over their mean, against their angle.",
            "angle between the task vectors (degrees)",
            f"advantage on {found.splits.judged} ({unit})",
            [_dots(points)],
            horizontals=[0.0],
        )


def theory(found: Comparison) -> Iterator[Plot]:
    """Draw what theory says of soup and ensemble against what was measured."""
    known = [pair for pair in found.pairs if math.isfinite(pair.approximation)]
    if not known:
        return
    for name, up, values, diagonal in (
        ("theory", "measured loss difference (nats)", [p.measured for p in known], True),
        (
            "theory-error",
            "measured error difference (points)",
            [100 * p.error_difference for p in known],
            False,
        ),
    ):
        points = [
            Point(
                pair.approximation,
                value,
                f"{_named(found, pair.first, pair.second)}\napproximated: "
                f"{pair.approximation:.4g}\nmeasured: {value:.4g}",
            )
            for pair, value in zip(known, values, strict=True)
        ]
        words = "Soup less ensemble of each pair, approximated and measured; below 0 the soup wins."
        if diagonal:
            words += " On the dashed diagonal they are equal."
        across = "approximated loss difference (nats)"
        lines = [0.0]
        yield Plot(name, words, across, up, [_dots(points)], (), lines, lines, diagonal)


def heat_maps(found: Comparison) -> Iterator[Table]:
    """Show the coefficients of each learned soup: groups from top to bottom, ingredients across."""
    for number, row in enumerate((row for row in found.rows if row.coefficients), 1):
        yield coefficient_map(
            f"coefficients-{number}",
            f"Coefficients of the {row.name}, for each group of tensors.",
            row.groups,
            row.members,
            row.coefficients,
            found.names,
        )


def _series(look: Look, name: str, points: Sequence[Point]) -> Series:
    return Series(name, points, look.shape, look.colour, look.filled, size=look.size)


def _dots(points: Sequence[Point]) -> Series:
    """Return a cloud of points, the smaller the more there are: 70 ingredients are 2,415 pairs."""
    return Series("", points, colour=1, size=4 if len(points) <= 200 else 2.5)


def _columns(found: Comparison) -> list[str]:
    return [c for c in (found.splits.judged, found.splits.shifted) if c is not None]


def _named(found: Comparison, *members: int) -> str:
    return " and ".join(found.names[i] for i in members)


def _scaled(value: float, found: Comparison) -> float:
    return 100 * value if found.is_share else value


def _label(found: Comparison, column: str) -> str:
    of = "," if column == MEAN else " on"
    return f"{found.metric}{of} {column}" + (" (%)" if found.is_share else "")
