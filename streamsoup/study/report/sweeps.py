"""Pictures and words of a sweep: a curve over one parameter, a heat map over two, and the table.

All of it comes from the report that the soup itself holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from streamsoup.errors import printable
from streamsoup.study.report.figures import GREY, new_figure, plain, save
from streamsoup.study.report.page import Block, Code, Heading, Page, Picture, Table, Text

__all__ = ["draw", "lines", "page", "rows"]

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


def page(report: Report, picture: str | None, commands: Sequence[str]) -> Page:
    """Put a sweep on a page; `picture` is the name of one beside it."""
    swept = report["sweep"]
    head, body = _table(report)
    bold = frozenset((swept["best"], column) for column in range(len(head)))
    blocks: list[Block] = [Text(each) for each in _verdict(report)]
    if picture is not None:
        blocks.append(Picture(picture, f"The score on {report['split']} at every point."))
    blocks.append(Table(head, body, bold))
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page(f"A sweep of {swept['method']}", blocks)


def draw(report: Report, path: str) -> bool:
    """Draw a curve over one parameter, or a heat map over two; False, and nothing, for more."""
    names = report["sweep"]["parameters"]
    if len(names) == 1:
        _curve(report, names[0], path)
    elif len(names) == 2:
        _heat_map(report, names, path)
    return len(names) <= 2


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    swept = report["sweep"]
    head = [*swept["parameters"], f"score on {printable(report['split'])}"]
    body = [
        [*(f"{value:g}" for value in point["values"].values()), _shown(point["score"])]
        for point in swept["points"]
    ]
    return head, body


def _verdict(report: Report) -> list[str]:
    """Say what is best, and what it is worth beside the base and the mean."""
    swept = report["sweep"]
    best = swept["points"][swept["best"]]
    at = ", ".join(f"{name} {value:g}" for name, value in best["values"].items())
    said = [f"{swept['method']} is best at {at}: {_shown(best['score'])}"]
    for name, score in swept["compared"].items():
        gain = float(best["score"]) - float(score)
        if math.isfinite(gain):
            said.append(f"{name} scores {_shown(score)}, {abs(gain):.3g} "
                        f"{'less' if gain >= 0 else 'more'}")  # fmt: skip
    return said


def _curve(report: Report, name: str, path: str) -> None:
    swept = report["sweep"]
    xs = [point["values"][name] for point in swept["points"]]
    ys = [float(point["score"]) for point in swept["points"]]
    figure = new_figure(6.0, 4.2)
    axes = figure.subplots()
    axes.plot(xs, ys, "-", color="black", marker="o", markersize=4.5, label=plain(swept["method"]))
    for (what, score), line in zip(swept["compared"].items(), (":", "--"), strict=False):
        axes.axhline(float(score), color=GREY, linestyle=line, linewidth=1.2, label=plain(what))
    axes.scatter(
        [xs[swept["best"]]], [ys[swept["best"]]], s=140, marker="*", color="black", zorder=5
    )
    axes.set_xlabel(plain(name))
    axes.set_ylabel(f"score on {plain(report['split'])}")
    axes.legend(fontsize=9, frameon=False)
    save(figure, path)


def _heat_map(report: Report, names: Sequence[str], path: str) -> None:
    swept = report["sweep"]
    ys, xs = (sorted({point["values"][name] for point in swept["points"]}) for name in names)
    scores = np.full((len(ys), len(xs)), np.nan)
    for point in swept["points"]:
        down, across = (point["values"][name] for name in names)
        scores[ys.index(down), xs.index(across)] = float(point["score"])
    figure = new_figure(1.8 + 0.7 * len(xs), 1.6 + 0.55 * len(ys))
    axes = figure.subplots()
    image = axes.imshow(scores, origin="lower", cmap="cividis", aspect="auto")
    best = swept["points"][swept["best"]]["values"]
    axes.scatter(
        [xs.index(best[names[1]])], [ys.index(best[names[0]])],
        s=160, marker="*", c="white", edgecolors="black", zorder=5,
    )  # fmt: skip
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs], fontsize=8)
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys], fontsize=8)
    axes.set_xlabel(plain(names[1]))
    axes.set_ylabel(plain(names[0]))
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(f"score on {plain(report['split'])}")
    save(figure, path)


def _shown(score: Any) -> str:
    value = float(score)
    return f"{value:.6g}" if math.isfinite(value) else "–"
