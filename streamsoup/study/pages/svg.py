"""Plots as SVG: in an HTML page, where marks have hints, or as files by themselves.

Text has the size of the page's; how wide it is can only be estimated.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence

from streamsoup.study.pages.axes import Axis, axis
from streamsoup.study.pages.blocks import Plot, Point, Series
from streamsoup.study.pages.escapes import hint_in_html, in_html, shown

__all__ = [
    "ROW",
    "SHAPES",
    "beside",
    "draw",
    "short",
    "standing_alone",
    "start",
    "width_of",
    "written",
]

WIDTH, HEIGHT = 480, 340
"""Of a plot without its legend, in pixels: a phone shows three quarters of that."""
TOP, RIGHT, BOTTOM, LEFT = 14, 16, 50, 74
LETTER = 8.0
"""The mean width of a letter, of 14 pixels' height."""
ROW = 22
"""The height of a line of the legend, and of a place on the vertical axis."""
LONGEST = 30
"""Letters of a name in a legend or on an axis; more are left out from the middle."""

SHAPES = {
    "circle": "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
    "square": "M-.9-.9H.9V.9H-.9Z",
    "up": "M0-1.15 1.1.85H-1.1Z",
    "down": "M0 1.15 1.1-.85H-1.1Z",
    "diamond": "M0-1.25 1.1 0 0 1.25-1.1 0Z",
    "star": "M0-1.5.38-.5 1.43-.46.6.2.88 1.2 0 .63-.88 1.2-.6.2-1.43-.46-.38-.5Z",
    "plus": "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "cross": "M-1-.45-.45-1 0-.55.45-1 1-.45.55 0 1 .45.45 1 0 .55-.45 1-1 .45-.55 0Z",
}
"""Marks, about two units wide."""


def beside(name: str) -> str:
    """Return the content of a file that lies beside this one."""
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        return file.read()


def standing_alone(drawing: str) -> str:
    """Return a drawing as a file of its own, with its style and background."""
    style = f"{beside('colours.css')}{beside('plot.css')}"
    head, _, rest = drawing.partition(">")
    background = '<rect class="page" width="100%" height="100%"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{background}{rest}\n'


def draw(plot: Plot) -> str:
    """Return a plot as an SVG element."""
    series = [
        (each, [p for p in each.points if math.isfinite(p.x) and math.isfinite(p.y)])
        for each in plot.series
    ]
    names = [short(each.name) for each, points in series if each.name and points]
    legend, n_lines = _legend([each for each, points in series if each.name and points], names)
    height = TOP + BOTTOM + ROW * len(plot.places) if plot.places else HEIGHT
    left: float = LEFT
    if plot.places:
        left = min(24 + max(map(width_of, map(short, plot.places))), 0.56 * WIDTH)
    xs = [x for _, points in series for p in points for x in (p.x, p.low, p.high)]
    ys = [p.y for _, points in series for p in points]
    across = axis([*xs, *plot.verticals], left, WIDTH - RIGHT, n_ticks=6, whole=plot.whole)
    up = _up(plot, [*ys, *plot.horizontals], height)
    parts = [start(plot.words, WIDTH, height + ROW * n_lines)]
    if across is None or up is None or not ys:
        parts.append(
            f'<text x="{WIDTH / 2}" y="{height / 2}" class="middle">no finite value</text>'
        )
        return "".join([*parts, "</svg>"])
    parts += _frame(plot, across, up, height)
    for each, points in series:
        parts += _series(each, points, across, up)
    parts += _names([p for _, points in series for p in points], across, up)
    parts.append(f'<g transform="translate(0 {height})">{legend}</g></svg>')
    return "".join(parts)


def _up(plot: Plot, ys: Sequence[float], height: float) -> Axis | None:
    if plot.places:
        return Axis(-0.5, len(plot.places) - 0.5, TOP, height - BOTTOM, 1.0)
    return axis(ys, height - BOTTOM, TOP, n_ticks=5)


def start(words: str, width: float, height: float) -> str:
    """Return the start of an SVG element of a size in pixels."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="{in_html(words)}">'
    )


def _frame(plot: Plot, across: Axis, up: Axis, height: float) -> list[str]:
    """Draw the ticks, labels and guides."""
    bottom = height - BOTTOM
    parts = []
    for value, text in across.ticks():
        x = across.at(value)
        parts.append(f'<path class="tick" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(written(x, bottom + 18, text, "middle"))
    if plot.places:
        for n, name in enumerate(plot.places):
            y = up.at(n)
            parts.append(f'<path class="tick" d="M{across.begin:.1f} {y:.1f}H{across.end:.1f}"/>')
            parts.append(written(across.begin - 8, y + 5, short(name), "end"))
    else:
        for value, text in up.ticks():
            y = up.at(value)
            parts.append(f'<path class="tick" d="M{across.begin:.1f} {y:.1f}H{across.end:.1f}"/>')
            parts.append(written(across.begin - 6, y + 5, text, "end"))
    for value in filter(math.isfinite, plot.verticals):
        parts.append(f'<path class="guide" d="M{across.at(value):.1f} {TOP}V{bottom}"/>')
    for value in filter(math.isfinite, plot.horizontals):
        y = up.at(value)
        parts.append(f'<path class="guide" d="M{across.begin:.1f} {y:.1f}H{across.end:.1f}"/>')
    low, high = max(across.low, up.low), min(across.high, up.high)
    if plot.diagonal and low < high:
        ends = [f"{across.at(value):.1f} {up.at(value):.1f}" for value in (low, high)]
        parts.append(f'<path class="guide" d="M{ends[0]}L{ends[1]}"/>')
    middle = (across.begin + across.end) / 2
    parts.append(written(middle, bottom + 40, short(plot.across, 52), "middle label"))
    if plot.up:
        at = f"translate(15 {(TOP + bottom) / 2:.1f}) rotate(-90)"
        words = in_html(short(plot.up, 38))
        parts.append(f'<text class="middle label" transform="{at}">{words}</text>')
    return parts


def _series(series: Series, points: Sequence[Point], across: Axis, up: Axis) -> list[str]:
    at = [(across.at(p.x), up.at(p.y)) for p in points]
    parts = [f'<g class="c{series.colour}">']
    if series.line and len(at) > 1:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<path class="line {series.line}" d="M{way}"/>')
    for point, (x, y) in zip(points, at, strict=True):
        hint = f"<title>{hint_in_html(point.hint)}</title>" if point.hint else ""
        reach = ""
        if math.isfinite(point.low) and math.isfinite(point.high):
            low, high = across.at(point.low), across.at(point.high)
            reach = (
                f'<path class="reach" d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6'
                f'M{high:.1f} {y - 3:.1f}v6"/>'
            )
        parts.append(f'<g class="mark">{hint}{reach}{_mark(series, x, y)}</g>')
    return [*parts, "</g>"]


def _mark(series: Series, x: float, y: float) -> str:
    hollow = "" if series.filled else ' class="hollow"'
    # The stroke is scaled with the mark, so it is divided here.
    width = (0.9 if series.filled else 1.7) / series.size
    return (
        f'<path{hollow} stroke-width="{width:.3g}" '
        f'transform="translate({x:.1f} {y:.1f}) scale({series.size:g})" '
        f'd="{SHAPES[series.shape]}"/>'
    )


def _legend(series: Sequence[Series], names: Sequence[str]) -> tuple[str, int]:
    """Return the legend, as many in a line as have room, and the number of lines."""
    parts, x, line = [], 12.0, 0
    for each, name in zip(series, names, strict=True):
        room = 34 + width_of(name)
        if x > 12 and x + room > WIDTH:
            x, line = 12.0, line + 1
        y = 6 + ROW * line
        stroke = f'<path class="line {each.line}" d="M{x} {y}h22"/>' if each.line else ""
        mark = _mark(each, x + 11, y)
        parts.append(f'<g class="c{each.colour}">{stroke}{mark}</g>{written(x + 27, y + 5, name)}')
        x += room + 8
    return "".join(parts), line + 1 if parts else 0


def _names(points: Sequence[Point], across: Axis, up: Axis) -> list[str]:
    """Write names beside their points, where they cover no name and no point."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in
             ((across.at(p.x), up.at(p.y)) for p in points)]  # fmt: skip
    parts = []
    for point in points:
        if not point.name:
            continue
        x, y, name = across.at(point.x), up.at(point.y), short(point.name)
        width = width_of(name)
        for left, base in ((x + 7, y - 3), (x + 7, y + 12), (x - 7 - width, y - 3),
                           (x - 7 - width, y + 12)):  # fmt: skip
            box = (left, base - 11, left + width, base + 3)
            inside = across.begin < left and left + width < across.end
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(written(left, base, name, "name"))
                break
    return parts


Box = tuple[float, float, float, float]


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def written(x: float, y: float, text: str, kind: str = "") -> str:
    """Return a text at a place; `kind` is its class."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{in_html(text)}</text>'


def short(text: str, longest: int = LONGEST) -> str:
    """Return a text as it is shown, with the middle of a long one left out."""
    text = shown(text)
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def width_of(text: str) -> float:
    """Return about how wide a text is, in pixels."""
    return LETTER * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
