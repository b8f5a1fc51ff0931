"""An empty figure, and how it is saved. Matplotlib, loaded when asked for.

No window, no global state: figures are made by themselves, and the Agg canvas draws them.
What differs is told apart by shape and by lightness, so that a picture says the same in grey.
"""

from __future__ import annotations

import os
from typing import Any

from streamsoup.errors import OutputError, RecipeError, printable

__all__ = ["FORMATS", "check_picture", "have_matplotlib", "new_figure", "save"]

FORMATS = (".png", ".svg", ".pdf")

GREY = "#666666"


def have_matplotlib() -> bool:
    """Say whether pictures can be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """Give an empty figure of a size in inches. Raises `RecipeError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError(
            "pictures need matplotlib; install it with: pip install 'streamsoup[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path: str) -> None:
    """Raise `RecipeError` or `OutputError` if no picture could be drawn at `path`."""
    new_figure(1, 1)
    if not path.lower().endswith(FORMATS):
        raise RecipeError(f"{printable(path)}: give a picture a name with .png, .svg or .pdf")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OutputError(f"{printable(folder)}: no such folder")


def save(figure: Any, path: str) -> None:
    """Write the picture, whole or not at all. Raises `OutputError`."""
    for axes in figure.axes:
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, colors="#333333")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    temporary = f"{path}.partial"
    form = os.path.splitext(path)[1][1:].lower()
    # The same figure gives the same bytes: no date, no random ids.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        figure.savefig(temporary, dpi=130, format=form, metadata=metadata[form])
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {error.strerror}") from None
