"""The option that writes what a command found as a page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from streamsoup.errors import printable

if TYPE_CHECKING:
    from streamsoup.study.report.write import Found

__all__ = ["REPORT", "check", "this_command", "write"]

REPORT = click.option(
    "--report",
    metavar="PATH",
    help="Write a page: PATH.html, PATH.md, or else a folder for both, with rows.jsonl.",
)


def this_command() -> str:
    """Return the command that runs, as one line for a shell."""
    line = shlex.join(["streamsoup", *sys.argv[1:]])
    return line.encode("utf-8", "backslashreplace").decode()  # not every path is Unicode


def check(report: str | None, ingredients: Sequence[str], output: str | None = None) -> None:
    """Raise `OutputError` unless a report that is wanted may be written there."""
    if report is not None:
        from streamsoup.study.report.write import check_report

        check_report(report, ingredients, output)


def write(found: Found, report: str | None) -> list[str]:
    """Write the page if one is wanted, and return a line that says where it is."""
    if report is None:
        return []
    from streamsoup.study.report.write import write_report

    return [f"see {printable(write_report(found, report, commands=(this_command(),)))}"]
