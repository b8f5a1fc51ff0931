"""What a page consists of: headings, paragraphs, commands, tables and plots, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["Block", "Code", "Heading", "Plot", "Point", "Series", "Table", "Text", "shades"]

Place = tuple[int, int]
"""A cell of a table, by row and column."""


class Heading(msgspec.Struct, frozen=True):
    """A heading within the page."""

    text: str


class Text(msgspec.Struct, frozen=True):
    """A paragraph, as plain text."""

    text: str


class Code(msgspec.Struct, frozen=True):
    """Commands, a line each."""

    lines: Sequence[str]


class Table(msgspec.Struct, frozen=True):
    """A table: the first column names the row, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[Place] = frozenset()
    """Cells that stand out."""
    hints: Mapping[Place, str] = {}
    """What is shown when the pointer rests on a cell."""
    shades: Mapping[Place, float] = {}
    """How dark a cell is, from 0 to 1: a table with shades is a heat map."""
    name: str = ""
    """The file name, without its ending, of the heat map as a picture; empty for none."""
    words: str = ""
    """What the heat map shows."""


class Point(msgspec.Struct, frozen=True):
    """One point of a series; those that are not finite are left out."""

    x: float
    y: float
    hint: str = ""
    """What is shown when the pointer rests on it."""
    low: float = math.nan
    """The ends of an interval of `x`; NaN without one."""
    high: float = math.nan
    name: str = ""
    """Written beside the point where there is room."""


class Series(msgspec.Struct, frozen=True):
    """Points of one kind, told apart by shape and lightness; colour comes on top."""

    name: str
    """In the legend; empty for none."""
    points: Sequence[Point]
    shape: str = "circle"
    """A key of `svg.SHAPES`."""
    colour: int = 0
    """A number from 0 to 7."""
    filled: bool = True
    line: str = ""
    """How the points are joined: ``solid``, ``dashed``, ``dotted``, or not at all."""
    size: float = 4.5
    """Half the width of a mark, in pixels."""


class Plot(msgspec.Struct, frozen=True):
    """Points in a plane, with axes."""

    name: str
    """The file name of the picture, without its ending."""
    words: str
    """What it shows."""
    across: str
    """The label of the horizontal axis."""
    up: str
    """The label of the vertical axis."""
    series: Sequence[Series]
    places: Sequence[str] = ()
    """Names along the vertical axis, from the top, where y counts them from 0."""
    verticals: Sequence[float] = ()
    """Where dashed lines stand."""
    horizontals: Sequence[float] = ()
    """Where dashed lines lie."""
    diagonal: bool = False
    """True for a dashed line where both axes have the same value."""
    whole: bool = False
    """True if the horizontal axis counts."""


Block = Heading | Text | Code | Table | Plot


def shades(values: Mapping[Place, float]) -> dict[Place, float]:
    """Return how dark the cells of these values are: the least 0, the largest 1.

    >>> shades({(0, 1): 2.0, (0, 2): 4.0, (0, 3): 3.0, (0, 4): math.nan})
    {(0, 1): 0.0, (0, 2): 1.0, (0, 3): 0.5}
    """
    finite = {place: value for place, value in values.items() if math.isfinite(value)}
    low, high = min(finite.values(), default=0.0), max(finite.values(), default=0.0)
    # Halves, as the distance of two numbers may be more than the largest number.
    span = (high / 2 - low / 2) or 1.0
    return {place: (value / 2 - low / 2) / span for place, value in finite.items()}
