"""Pictures: angles as a heat map, coefficients per layer. Matplotlib, loaded when asked for.

Colours run from dark to light alone, so that a picture says the same in grey.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import OutputError, RecipeError, printable
from streamsoup.study.names import short_names
from streamsoup.system.folders import replacing
from streamsoup.system.schemes import check_local

if TYPE_CHECKING:
    from streamsoup.methods.angles import Geometry

__all__ = ["check_plot", "plot_coefficients", "plot_geometry"]

NUMBERED = 16
"""Most ingredients for which every cell of a heat map has room for its number."""


def check_plot(path: str) -> None:
    """Raise `RecipeError` or `OutputError` if no picture could be drawn at `path`."""
    check_local(path, OutputError)
    _figure_class()
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise RecipeError(f"{printable(path)}: give a picture a name with .png, .svg or .pdf")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OutputError(f"{printable(folder)}: no such folder")


def plot_geometry(found: Geometry, path: str) -> None:
    """Draw the angles of all pairs, or without a base their distances, as a heat map."""
    total = found.total
    names = [f"{n} ({i + 1})" for i, n in enumerate(short_names(found.names, 36))]
    if found.base is not None:
        values, unit, title = total.angles, "degrees", "Angles between task vectors"
        text = "{:.0f}"
    else:
        values, unit, title = total.distances, "distance", "Distances between ingredients"
        text = "{:.3g}"
    _heat_map(values, names, unit, title, text, path)


def plot_coefficients(
    rows: NDArray[np.float64], layers: Sequence[str], names: Sequence[str], path: str
) -> None:
    """Draw coefficients ``(layer, ingredient)`` as a heat map, layers from top to bottom.

    They come by name, but with numbers counted: a checkpoint has layer 10 before layer 2.
    """
    order = sorted(range(len(layers)), key=lambda i: _counted(layers[i]))
    rows, layers = rows[order], [layers[i] for i in order]
    figure = _figure_class()(figsize=(_span(len(names), 0.35, 4.5), _span(len(layers), 0.17, 2.5)))
    axes = figure.add_subplot()
    low, high = min(0.0, float(rows.min())), float(rows.max())
    image = axes.imshow(rows, cmap="viridis", aspect="auto", vmin=low, vmax=high or 1.0)
    axes.set_title("Learned coefficients", fontsize=11)
    size = _text_size(max(len(names), len(layers)))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    step = max(1, len(layers) // 80)
    shown = range(0, len(layers), step)
    labels = [_shorten(layers[i]) for i in shown]
    axes.set_yticks(list(shown), labels, fontsize=size, parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="coefficient")
    if rows.size <= 200:
        _write_numbers(axes, rows, low, high, "{:.2f}", size)
    _save(figure, path)


def _counted(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts by name, and numbers in a name as numbers."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _heat_map(
    values: NDArray[np.float64],
    names: Sequence[str],
    unit: str,
    title: str,
    text: str,
    path: str,
) -> None:
    n = len(names)
    side = _span(n, 0.24 if n > NUMBERED else 0.45, 4.0)
    figure = _figure_class()(figsize=(side + 1.2, side))
    axes = figure.add_subplot()
    shown = values.copy()
    np.fill_diagonal(shown, np.nan)
    seen = shown[np.isfinite(shown)]
    low, high = _round_range(seen) if len(seen) else (0.0, 1.0)
    image = axes.imshow(shown, cmap="viridis", vmin=low, vmax=high)
    axes.set_facecolor("white")
    size = _text_size(n)
    axes.set_xticks(range(n), [str(i + 1) for i in range(n)], fontsize=size, rotation=90 * (n > 20))
    axes.set_yticks(range(n), names, fontsize=size, parse_math=False)
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.8, label=unit)
    if n <= NUMBERED:
        _write_numbers(axes, shown, low, high, text, 9)
    _save(figure, path)


def _write_numbers(
    axes: Any, values: NDArray[np.float64], low: float, high: float, text: str, size: float
) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if np.isfinite(value):
                dark = (value - low) / ((high - low) or 1.0) < 0.6
                colour = "white" if dark else "black"
                axes.text(
                    j, i, text.format(value), ha="center", va="center", fontsize=size, color=colour
                )


def _round_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of a scale that shows what differs, without blowing up what hardly does."""
    low, high = float(values.min()), float(values.max())
    step = 10.0 ** np.floor(np.log10(max(high - low, abs(high) / 9, 1e-300)))
    return float(np.floor(low / step) * step), float(np.ceil(high / step + 1e-9) * step)


def _span(n: int, each: float, least: float) -> float:
    """Return a side in inches that leaves room for labels."""
    return min(max(least, 2.2 + each * n), 40.0)


def _text_size(n: int) -> float:
    return 9.0 if n <= 20 else 7.5


def _shorten(name: str, limit: int = 48) -> str:
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 :]}"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError(
            "pictures need matplotlib; install it with: pip install 'streamsoup[plot]'"
        ) from None
    return Figure


def _save(figure: Any, path: str) -> None:
    """Write the picture, whole or not at all."""
    form = os.path.splitext(path)[1][1:].lower()
    try:
        with replacing(path) as file, warnings.catch_warnings():
            # Letters that the font has not are drawn as boxes; the names are told in text, too.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(file, dpi=110, bbox_inches="tight", format=form)
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None
