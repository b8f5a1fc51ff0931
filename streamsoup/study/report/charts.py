"""The pictures of a comparison. See `figures` for how they are saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from streamsoup.errors import printable
from streamsoup.study.measures.rows import MEAN, Comparison, Row
from streamsoup.study.report.figures import GREY, new_figure, place_names, plain, save

__all__ = [
    "draw_coefficients",
    "draw_curves",
    "draw_intervals",
    "draw_pairs",
    "draw_scatter",
    "draw_theory",
]

NAMED = 14
"""Most ingredients whose points have their names beside them."""

MARKED = 12
"""About how many points of a curve have marks: more would hide how its line is dashed."""


GROUPS = 40
"""Most groups of tensors that have their names beside the picture of coefficients."""

NUMBERED = 240
"""Most coefficients of a soup for which there is room to write each down."""


class Look(msgspec.Struct, frozen=True):
    """How one kind of row is drawn: told apart by shape and lightness, colour comes on top."""

    marker: str
    colour: str
    size: float = 90
    filled: bool = True


_LOOKS: Mapping[str, Look] = {
    "ingredient": Look("o", "#b5b5b5", 28),
    "base": Look("X", "#777777", 70),
    "best": Look("o", "#000000", 110, filled=False),
    "uniform": Look("^", "#1f77b4"),
    "greedy": Look("*", "#b2182b", 190),
    "orders": Look("P", "#d6604d", 90, filled=False),
    "learned": Look("D", "#4d004b", 60),
    "by layer": Look("d", "#810f7c", 80, filled=False),
    "oracle": Look("X", "#777777", 70, filled=False),
    "ensemble": Look("s", "#1b7837", 60, filled=False),
    "members": Look("h", "#1b7837", 80, filled=False),
    "grown": Look("p", "#00441b", 90),
    "soup": Look("v", "#542788", 80),
}
_LINES: Mapping[str, tuple[str, str, str]] = {
    "best on validation": ("#000000", "--", "o"),
    "uniform soup": ("#1f77b4", "-", "^"),
    "greedy soup": ("#b2182b", "-", "*"),
    "ensemble of all": ("#1b7837", ":", "s"),
}


def look_of(row: Row) -> Look:
    """Return the style that a row is drawn with."""
    key: str
    if row.kind == "ensemble":
        key = "members" if "members" in row.name else "grown" if "grown" in row.name else row.kind
    elif row.kind == "soup":
        words = ("orders", "greedy", "uniform", "by layer", "learned")
        key = next((word for word in words if word in row.name), "soup")
    else:
        key = row.kind
    return _LOOKS.get(key, _LOOKS["soup"])


def draw_scatter(found: Comparison, path: str) -> None:
    """Draw what each ingredient, soup and ensemble scores in distribution and under shift."""
    across, up = found.splits.judged, found.splits.shifted
    assert up is not None
    figure = new_figure(8.6, 5.4)
    axes = figure.add_subplot()
    rows = [row for row in found.rows if row.kind != "oracle"]
    points = {id(row): _point(row, across, up, found.is_share) for row in rows}
    rows = [row for row in rows if all(map(math.isfinite, points[id(row)]))]
    singles = [row for row in rows if row.kind == "ingredient"]
    look = _LOOKS["ingredient"]
    if singles:
        xs, ys = zip(*(points[id(row)] for row in singles), strict=True)
        axes.scatter(
            xs, ys, s=look.size, c=look.colour, edgecolors=GREY, linewidths=0.7,
            label=f"ingredients ({len(singles)})",
        )  # fmt: skip
    for row in rows:
        if row.kind == "ingredient":
            continue
        look = look_of(row)
        colours: dict[str, Any] = {"c": look.colour, "edgecolors": "white", "linewidths": 0.8}
        if not look.filled:
            colours = {"facecolors": "none", "edgecolors": look.colour, "linewidths": 1.7}
        x, y = points[id(row)]
        axes.scatter(
            [x], [y], s=look.size, marker=look.marker, zorder=4, label=plain(row.name), **colours
        )
    axes.set_xlabel(_label(found, across))
    axes.set_ylabel(_label(found, up))
    axes.set_title("In distribution and under shift", fontsize=11)
    _legend_beside(figure, axes)
    if 0 < len(singles) <= NAMED:
        named = [(row.name, *points[id(row)]) for row in singles]
        others = [points[id(row)] for row in rows if row.kind not in ("ingredient", "best")]
        place_names(figure, axes, named, others, fontsize=7.5, color=GREY)
    save(figure, path)


def draw_curves(found: Comparison, path: str) -> None:
    """Draw what the first n ingredients give, in distribution and under shift."""
    columns = [c for c in (found.splits.judged, found.splits.shifted) if c is not None]
    figure = new_figure(1.2 + 4.2 * len(columns), 4.2)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for method, (colour, line, marker) in _LINES.items():
            points = [p for p in found.curves if p.method == method]
            if points:
                ys = [_scaled(p.values[column], found.is_share) for p in points]
                axes.plot(
                    [p.n for p in points], ys, line, color=colour, marker=marker, label=method,
                    markevery=max(1, len(points) // MARKED), markersize=8 if marker == "*" else 5.5,
                    linewidth=1.6, markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
        axes.set_xlabel("ingredients, in the order given")
        axes.set_ylabel(_label(found, column))
        axes.set_title("In distribution" if column is columns[0] else "Under shift", fontsize=11)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9,
        frameon=False,
    )  # fmt: skip
    save(figure, path)


def draw_intervals(found: Comparison, path: str) -> None:
    """Draw every way to choose with its confidence interval, a panel for each column."""
    rows = [row for row in found.rows if row.kind != "ingredient"]
    columns = [c for c in (found.splits.judged, found.splits.shifted) if c is not None]
    figure = new_figure(3.2 + 3.6 * len(columns), 1.3 + 0.33 * len(rows))
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, column in zip(panels, columns, strict=True):
        for place, row in enumerate(rows):
            cell, look = row.cells[column], look_of(row)
            value = _scaled(cell.value, found.is_share)
            if not math.isfinite(value):
                continue
            reach = None
            if math.isfinite(cell.low):
                low, high = (_scaled(x, found.is_share) for x in (cell.low, cell.high))
                reach = [[max(value - low, 0)], [max(high - value, 0)]]
            elif math.isfinite(cell.spread):
                spread = _scaled(cell.spread, found.is_share)
                reach = [[spread], [spread]]
            axes.errorbar(
                [value], [place], xerr=reach, fmt=look.marker, color=look.colour, capsize=3,
                markersize=9 if look.marker == "*" else 6.5, linewidth=1.4,
                markerfacecolor=look.colour if look.filled else "white",
            )  # fmt: skip
        best = next((row for row in rows if row.kind == "best"), None)
        if best is not None:
            at = _scaled(best.cells[column].value, found.is_share)
            axes.axvline(at, color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel(_label(found, column), fontsize=9)
    panels[0].set_yticks(range(len(rows)), [plain(row.name) for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    cells = [row.cells[column] for row in rows for column in columns]
    title = ["Every way to choose"]
    if any(math.isfinite(cell.low) for cell in cells):
        title.append("with 95 % intervals")
    if any(math.isfinite(cell.spread) for cell in cells):
        title.append("spread over random orders")
    figure.suptitle(", ".join(title), fontsize=11)
    save(figure, path)


def draw_pairs(found: Comparison, path: str) -> None:
    """Draw what the middle of each pair gains, against the angle between the two."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    gains = [_scaled(pair.advantage, found.is_share) for pair in found.pairs]
    axes.axhline(0, color=GREY, linewidth=1)
    _dots(axes, [pair.angle for pair in found.pairs], gains)
    axes.set_xlabel("angle between the task vectors (degrees)")
    unit = "percentage points" if found.is_share else found.metric
    axes.set_ylabel(f"interpolation advantage on {plain(found.splits.judged)}\n({unit})")
    axes.set_title(f"Half-way between {len(found.pairs)} pairs", fontsize=11)
    save(figure, path)


def draw_theory(found: Comparison, path: str) -> None:
    """Draw what theory says of soup and ensemble against what was measured."""
    pairs = [pair for pair in found.pairs if math.isfinite(pair.approximation)]
    figure = new_figure(9.4, 4.2)
    panels = figure.subplots(1, 2)
    xs = [pair.approximation for pair in pairs]
    for axes, ys, label in (
        (panels[0], [pair.measured for pair in pairs], "measured loss difference (nats)"),
        (
            panels[1],
            [100 * pair.error_difference for pair in pairs],
            "measured error difference (percentage points)",
        ),
    ):
        axes.axhline(0, color=GREY, linewidth=1)
        axes.axvline(0, color=GREY, linewidth=1)
        _dots(axes, xs, ys)
        axes.set_xlabel("approximated loss difference (nats)")
        axes.set_ylabel(label)
    # The scales stay those of the points: where theory is far off, the line leaves the picture.
    panels[0].axline((0, 0), slope=1, linestyle="--", color=GREY, linewidth=1, label="equal")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle("Soup minus ensemble of each pair; below 0 the soup is better", fontsize=11)
    save(figure, path)


def draw_coefficients(found: Comparison, path: str) -> None:
    """Draw the coefficients of each learned soup: groups from top to bottom, ingredients across."""
    import numpy as np

    rows = [row for row in found.rows if row.coefficients]
    n = len(found.names)
    heights = [0.9 + 0.24 * min(len(row.groups), GROUPS) for row in rows]
    figure = new_figure(
        min(3.6 + 0.55 * n, 16), 0.9 + sum(heights) + 0.05 * max(map(len, found.names))
    )
    panels = figure.subplots(
        len(rows), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        values = np.full((len(row.groups), n), np.nan)
        values[:, list(row.members)] = row.coefficients
        reach = max(float(np.nanmax(values)), 1e-12)
        low = min(float(np.nanmin(values)), 0.0)
        image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=reach)
        step = max(1, -(-len(row.groups) // GROUPS))
        shown = range(0, len(row.groups), step)
        axes.set_yticks(list(shown), [plain(_shortened(row.groups[i])) for i in shown])
        axes.set_title(plain(row.name), fontsize=10)
        figure.colorbar(image, ax=axes, label="coefficient")
        for (i, j), value in np.ndenumerate(values) if values.size <= NUMBERED else ():
            if np.isfinite(value):
                colour = "white" if (value - low) / (reach - low) < 0.55 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    panels[-1].set_xticks(range(n), [plain(name) for name in found.names], rotation=90)
    save(figure, path)


def _shortened(name: str, limit: int = 32) -> str:
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 :]}"


def _dots(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Draw a cloud of points, the smaller the more there are: 70 ingredients are 2,415 pairs."""
    size = 26 if len(xs) <= 200 else 9
    axes.scatter(xs, ys, s=size, c="#1f77b4", edgecolors="white", linewidths=size / 52)


def _legend_beside(figure: Any, axes: Any) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", fontsize=8.5, frameon=False,
        labelspacing=0.9,
    )  # fmt: skip


def _point(row: Row, across: str, up: str, is_share: bool) -> tuple[float, float]:
    return _scaled(row.cells[across].value, is_share), _scaled(row.cells[up].value, is_share)


def _scaled(value: float, is_share: bool) -> float:
    return 100 * value if is_share else value


def _label(found: Comparison, column: str) -> str:
    of = "," if column == MEAN else " on"
    return plain(f"{found.metric}{of} {column}") + (" (%)" if found.is_share else "")
