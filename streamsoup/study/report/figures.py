"""An empty figure, and how it is saved. Matplotlib, loaded when asked for.

No window, no global state: figures are made by themselves, and the Agg canvas draws them.
What differs is told apart by shape and by lightness, so that a picture says the same in grey.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from streamsoup.errors import OutputError, RecipeError, printable
from streamsoup.system.folders import replacing
from streamsoup.system.schemes import check_local

__all__ = [
    "FORMATS",
    "check_picture",
    "have_matplotlib",
    "new_figure",
    "place_names",
    "plain",
    "save",
]

FORMATS = (".png", ".svg", ".pdf")

GREY = "#666666"

DPI = 130


def have_matplotlib() -> bool:
    """Return True if matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches. Raises `RecipeError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError(
            "pictures need matplotlib; install it with: pip install 'streamsoup[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def plain(text: str) -> str:
    r"""Return a text that matplotlib shows verbatim: no formulas, and no hidden labels.

    >>> plain("a$b$"), plain("_val")
    ('a\\$b\\$', ' _val')
    """
    # A label that begins with an underscore is left out of legends.
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def place_names(
    figure: Any,
    axes: Any,
    named: Sequence[tuple[str, float, float]],
    others: Sequence[tuple[float, float]] = (),
    *,
    always: bool = False,
    **style: Any,
) -> None:
    """Write names beside their points (name, x, y), where they cover no name and no point.

    A name without room is left out, or with `always` put to the right of its point; `others` are
    points without names. Fixes the layout of the figure, so everything else is drawn before.
    """
    _style(figure)
    with _boxes_for_glyphs():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        inside = axes.get_window_extent()
        spots = axes.transData.transform([*((x, y) for _, x, y in named), *others])
        taken = [_box(*spot) for spot in spots]
        for name, x, y in named:
            for last, right, up in ((0, 1, 1), (0, 1, -1), (0, -1, 1), (0, -1, -1), (1, 1, 1)):
                written = axes.annotate(
                    plain(name), (x, y), xytext=(6 * right, 4 * up), textcoords="offset points",
                    ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top", **style,
                )  # fmt: skip
                box = written.get_window_extent()
                free = box.x0 > inside.x0 and box.x1 < inside.x1 and not box.count_overlaps(taken)
                if free or (last and always):
                    taken.append(box)
                    break
                written.remove()


def _box(x: float, y: float) -> Any:
    """Return the place that a point takes, in pixels."""
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


@contextmanager
def _boxes_for_glyphs() -> Iterator[None]:
    """Silence warnings of letters missing in the font: they show as boxes, and tables have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def check_picture(path: str) -> None:
    """Raise `RecipeError` or `OutputError` if no picture could be drawn at `path`."""
    check_local(path, OutputError)
    new_figure(1, 1)
    if not path.lower().endswith(FORMATS):
        raise RecipeError(f"{printable(path)}: give a picture a name with .png, .svg or .pdf")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OutputError(f"{printable(folder)}: no such folder")


def save(figure: Any, path: str) -> None:
    """Write the picture, whole or not at all. Raises `OutputError`."""
    from matplotlib import rc_context

    _style(figure)
    form = os.path.splitext(path)[1][1:].lower()
    # The same figure gives the same bytes: no date, no random ids.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        ids = rc_context({"svg.hashsalt": "streamsoup"})
        with replacing(path) as file, _boxes_for_glyphs(), ids:
            figure.savefig(file, dpi=DPI, format=form, metadata=metadata[form])
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None


def _style(figure: Any) -> None:
    for axes in figure.axes:
        if not axes.images:  # lines would cross out the numbers of a heat map
            axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, colors="#333333")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
