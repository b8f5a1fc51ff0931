"""Heat maps as SVG: tables with shades, a square for each cell."""

from __future__ import annotations

from streamsoup.study.pages.blocks import Table
from streamsoup.study.pages.escapes import in_html
from streamsoup.study.pages.svg import ROW, short, start, width_of, written

__all__ = ["heat_map"]

NUMBERED = 400
"""Most cells for which there is room for their numbers."""


def heat_map(table: Table) -> str:
    """Return a table with shades as an SVG element: a square for each of its cells."""
    rows = [short(row[0]) for row in table.rows]
    head = [short(each) for each in table.head[1:]]
    numbers = len(rows) * len(head) <= NUMBERED
    cell = (
        max([30.0, *(14 + width_of(text) for row in table.rows for text in row[1:])])
        if numbers
        else 16.0
    )
    left = 14 + max(map(width_of, rows), default=0)
    turned = any(width_of(name) > cell - 6 for name in head)
    top = 14 + (max(map(width_of, head), default=0) if turned else 14)
    words = table.words or table.name
    parts = [start(words, left + cell * len(head) + 14, top + ROW * len(rows) + 14)]
    for column, name in enumerate(head):
        x = left + cell * (column + 0.5)
        at = f"translate({x + 4:.1f} {top - 6:.1f}) rotate(-90)"
        parts.append(
            f'<text transform="{at}">{in_html(name)}</text>'
            if turned
            else written(x, top - 6, name, "middle")
        )
    for n, row in enumerate(table.rows):
        y = top + ROW * n
        parts.append(written(left - 6, y + 16, rows[n], "end"))
        for column, text in enumerate(row[1:]):
            x, shade = left + cell * column, table.shades.get((n, column + 1))
            if shade is not None:
                size = f'width="{cell - 1:.1f}" height="{ROW - 1}"'
                place = f'x="{x:.1f}" y="{y:.1f}"'
                parts.append(f'<rect class="heat" style="--s:{shade:.3f}" {place} {size}/>')
            if numbers:
                bold = "middle bold" if (n, column + 1) in table.bold else "middle"
                parts.append(written(x + cell / 2, y + 16, text, bold))
    return "".join([*parts, "</svg>"])
