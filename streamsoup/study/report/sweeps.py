"""The page of a sweep: a curve over one parameter, a heat map over two, and the table.

All of it comes from the report that the soup itself holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamsoup.errors import printable
from streamsoup.study.pages.blocks import (
    Block,
    Code,
    Heading,
    Plot,
    Point,
    Series,
    Table,
    Text,
    shades,
)
from streamsoup.study.pages.page import Page

__all__ = ["lines", "page", "rows"]

Report = Mapping[str, Any]


def rows(report: Report) -> Iterator[str]:
    """Return a JSON line for each point, after those that it is compared with."""
    swept = report["sweep"]
    for name, score in swept["compared"].items():
        yield json.dumps({"kind": "compared", "name": name, "score": score})
    for number, point in enumerate(swept["points"]):
        yield json.dumps({"kind": "point", **point, "best": number == swept["best"]})


def lines(report: Report) -> list[str]:
    """Return the table in columns, and in words what is best and whether it helps."""
    head, body = _table(report)
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *body)
    ]
    marked = [f"{line}  best" if n == report["sweep"]["best"] else line
              for n, line in enumerate(table[1:])]  # fmt: skip
    return [table[0], *marked, *_verdict(report)]


def page(report: Report, commands: Sequence[str]) -> Page:
    """Put a sweep on a page: a curve over one parameter, a heat map over two, and the table."""
    swept = report["sweep"]
    head, body = _table(report)
    bold = frozenset((swept["best"], column) for column in range(len(head)))
    blocks: list[Block] = [Text(f"{'; '.join(_verdict(report))}.")]
    names = swept["parameters"]
    if len(names) == 1:
        blocks.append(_curve(report, names[0]))
    elif len(names) == 2:
        blocks.append(_heat_map(report, *names))
    blocks += [Heading("Points"), Table(head, body, bold)]
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page(f"A sweep of {swept['method']}", blocks)


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    swept = report["sweep"]
    head = [*map(_named, swept["parameters"]), f"score on {printable(report['split'])}"]
    body = [
        [*map(_text, point["values"].values()), _shown(point["score"])] for point in swept["points"]
    ]
    return head, body


def _verdict(report: Report) -> list[str]:
    """Say what is best, and what it is worth beside the base and the mean."""
    swept = report["sweep"]
    best = swept["points"][swept["best"]]
    at = ", ".join(f"{_named(name)} {_text(value)}" for name, value in best["values"].items())
    said = [f"{swept['method']} is best at {at}: {_shown(best['score'])}"]
    for name, score in swept["compared"].items():
        gain = float(best["score"]) - float(score)
        if math.isfinite(gain):
            said.append(f"{name} scores {_shown(score)}, {abs(gain):.3g} "
                        f"{'less' if gain >= 0 else 'more'}")  # fmt: skip
    return said


def _curve(report: Report, name: str) -> Plot:
    swept = report["sweep"]
    points = [
        Point(
            point["values"][name],
            float(point["score"]),
            f"{_named(name)} {point['values'][name]:g}: {_shown(point['score'])}",
        )
        for point in swept["points"]
    ]
    best = points[swept["best"]]
    ends = [min(p.x for p in points), max(p.x for p in points)]
    compared = [
        Series(
            what,
            [Point(x, float(score), f"{what}: {_shown(score)}") for x in ends],
            "square",
            3 + n,
            line=line,
            size=2.5,
        )
        for n, ((what, score), line) in enumerate(
            zip(swept["compared"].items(), ("dotted", "dashed"), strict=False)
        )
    ]
    return Plot(
        "sweep",
        f"The score on {report['split']} at every point; the star is the best.",
        _named(name),
        f"score on {report['split']}",
        [
            Series(swept["method"], points, colour=1, line="solid"),
            Series("best", [best], "star", 2, size=7),
            *compared,
        ],
    )


def _heat_map(report: Report, down: str, across: str) -> Table:
    """Show the scores over two parameters, the first from top to bottom."""
    swept = report["sweep"]
    ys, xs = (sorted({point["values"][name] for point in swept["points"]}) for name in
              (down, across))  # fmt: skip
    cells = [["–"] * len(xs) for _ in ys]
    places = {}
    for number, point in enumerate(swept["points"]):
        row, column = ys.index(point["values"][down]), xs.index(point["values"][across])
        cells[row][column] = _shown(point["score"])
        places[number] = (row, column + 1)
    values = {places[n]: float(point["score"]) for n, point in enumerate(swept["points"])}
    down, across = _named(down), _named(across)
    return Table(
        [f"{down} \\ {across}", *map(_text, xs)],
        [[_text(y), *row] for y, row in zip(ys, cells, strict=True)],
        frozenset([places[swept["best"]]]),
        {
            place: f"{down} {_text(ys[place[0]])}, {across} {_text(xs[place[1] - 1])}: {value!r}"
            for place, value in values.items()
        },
        shades(values),
        "sweep",
        f"The score on {report['split']} for each {down} (down) and {across} (across); "
        "the best is framed.",
    )


def _named(parameter: str) -> str:
    """Return what the command line calls a parameter: ``lambda`` is no name in Python.

    >>> _named("lambda_"), _named("select_topk")
    ('lambda', 'select-topk')
    """
    return parameter.rstrip("_").replace("_", "-")


def _text(value: float | str) -> str:
    """Return a parameter in words."""
    return value if isinstance(value, str) else f"{value:g}"


def _shown(score: Any) -> str:
    value = float(score)
    return f"{value:.6g}" if math.isfinite(value) else "–"
