"""Where a report goes: one HTML or Markdown file, or a folder with both, pictures and rows.

::

    PATH.html          one page, plots included
    PATH.md            the same for a terminal or a repository; pictures in PATH-plots/

    DIR/report.html    both, …
    DIR/report.md
    DIR/plots/…        … the pictures of the Markdown, …
    DIR/rows.jsonl     … and every number: a trial, a point, a tensor or a row a line
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from streamsoup.errors import OutputError, OutputExistsError, RecipeError, printable
from streamsoup.methods.angles import Geometry
from streamsoup.output.destination import check_outside
from streamsoup.search.greedy import GreedySoup
from streamsoup.search.learned import LearnedSoup
from streamsoup.search.sweep import SweepSoup
from streamsoup.study.landscape.paths import Sweep
from streamsoup.study.measures.rows import Comparison
from streamsoup.study.pages.markdown import END
from streamsoup.study.pages.page import GENERATOR, Page, write_text
from streamsoup.study.report import angles, coefficients, comparison, paths, searches, sweeps
from streamsoup.system.regular import read_whole
from streamsoup.system.schemes import check_local

__all__ = ["check_report", "write_report"]

Found = Comparison | GreedySoup | LearnedSoup | SweepSoup | Sweep | Geometry

LARGEST = 500_000_000
"""Bytes of a file that is looked at before it is replaced."""


def write_report(
    found: Found, path: str | os.PathLike[str], *, commands: Sequence[str] = ()
) -> str:
    """Write what was found as a page that one can hand on.

    Args:
        found: The result of `compare`, `greedy`, `learned`, `sweep`, `wise_ft` or `geometry`.
        path: A name that ends in ``.html`` or ``.md`` for one page, the second with its pictures
            in a folder beside it; any other for a folder with both pages, pictures and
            ``rows.jsonl``. Made if need be; an earlier report is replaced, and nothing else.
        commands: The commands that led there, for the end of the page.

    Returns:
        The path of the page; in a folder, that of the HTML.

    Raises:
        OutputExistsError: Something else is there.
        OutputError: A file or the folder cannot be written, or is a link.
        RecipeError: `found` is a soup without a report, or nothing that has one.

    Cost: reads no checkpoint and runs no task; the page is in memory as a whole.
    """
    where = os.fspath(path)
    check_report(where)
    page, rows = _page(found, commands)
    stem, end = os.path.splitext(where)
    if end.lower() in (".html", ".htm"):
        write_text(where, page.to_html())
        return where
    if end.lower() == ".md":
        _write_markdown(page, where, f"{stem}-plots")
        return where
    _make_folder(where)
    write_text(os.path.join(where, "rows.jsonl"), "".join(f"{row}\n" for row in rows))
    _write_markdown(page, os.path.join(where, "report.md"), os.path.join(where, "plots"))
    html = os.path.join(where, "report.html")
    write_text(html, page.to_html())
    return html


def check_report(path: str, ingredients: Iterable[str] = (), output: str | None = None) -> None:
    """Raise `OutputError` unless a report may be written to `path`.

    Args:
        path: As of `write_report`.
        ingredients: Paths of checkpoints, which no report is put into.
        output: The folder of a soup, which holds nothing but the soup.
    """
    check_local(path, OutputError)
    where = printable(path)
    if output is not None:
        soup, page = (Path(os.path.realpath(each)) for each in (output, path))
        if soup == page or soup in page.parents or page in soup.parents:
            raise OutputError(
                f"{where}: is not apart from the soup in {printable(output)}; choose another path "
                "for the report"
            )
    check_outside(path, list(ingredients))
    end = os.path.splitext(path)[1].lower()
    if end not in (".html", ".htm", ".md"):
        _check_folder(path, where)
        return
    above = os.path.dirname(path) or "."
    if not os.path.isdir(above):
        raise OutputError(f"{printable(above)}: no such folder for the report {where}")
    mark = END if end == ".md" else GENERATOR
    if os.path.lexists(path) and not _holds(path, mark):
        raise OutputExistsError(
            f"{where}: exists already and is not a report of streamsoup; choose another name"
        )


def _check_folder(path: str, where: str) -> None:
    if not os.path.lexists(path):
        return
    known = os.path.exists(os.path.join(path, "cache", "lock")) or _holds(
        os.path.join(path, "report.html"), GENERATOR
    )
    if not os.path.isdir(path) or (os.listdir(path) and not known):
        raise OutputExistsError(
            f"{where}: exists already and is not a report of streamsoup; choose another folder, "
            "or a name that ends in .html or .md"
        )


def _holds(path: str, mark: str) -> bool:
    """Return True if a regular file has a line that only our reports have."""
    try:
        return mark.encode() in read_whole(path, LARGEST)
    except (OSError, OutputError):
        return False


def _page(found: Found, commands: Sequence[str]) -> tuple[Page, Iterable[str]]:
    """Return the page, and the rows beside it."""
    if isinstance(found, Comparison):
        return comparison.page(found), found.to_lines()
    if isinstance(found, Sweep):
        return paths.sweep_page(found, commands), found.to_lines()
    if isinstance(found, Geometry):
        return angles.page(found, commands), angles.rows(found)
    if isinstance(found, LearnedSoup) and found.evaluations:
        return coefficients.page(found, commands), coefficients.rows(found)
    kind, key = (searches, "runs") if isinstance(found, GreedySoup) else (sweeps, "sweep")
    report = getattr(found, "report", {})
    if key not in report:
        raise RecipeError(
            f"{type(found).__name__} has no report; give the result of compare, greedy, "
            "learned, sweep, wise_ft or geometry"
        )
    return kind.page(report, commands), kind.rows(report)


def _write_markdown(page: Page, path: str, pictures: str) -> None:
    drawn = page.to_pictures()
    if drawn:
        _make_folder(pictures)
    for name, drawing in drawn.items():
        write_text(os.path.join(pictures, name), drawing)
    write_text(path, page.to_markdown(os.path.basename(pictures)))


def _make_folder(path: str) -> None:
    if os.path.islink(path):
        raise OutputError(f"{printable(path)}: is a link, which is not written through; remove it")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{printable(path)}: cannot be made: {error.strerror}") from None
