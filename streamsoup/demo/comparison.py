"""The last page of the demo: the same ten ingredients, compared in every way.

What `kitchen` has learned is taken from the soup's own file; everything else is measured, once:
answers are kept, so that a second demo measures nothing again.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from msgspec.structs import replace

from streamsoup.demo import training
from streamsoup.demo.table import Results
from streamsoup.output.coefficients import coefficients_of
from streamsoup.output.verification import read_provenance
from streamsoup.study.comparison.table import CompareSettings, compare
from streamsoup.study.report.comparison import write_report

__all__ = ["write"]


def write(folder: Path, results: Results, command: str) -> str:
    """Write the report of the demo in `folder` into ``folder/report``; give its page's path.

    Takes some ten seconds, once.
    """
    ingredients = [folder / "ingredients" / row.name for row in results.ingredients]
    coefficients = {}
    learned = folder / "learned" / "streamsoup.json"
    if learned.is_file():
        made = read_provenance(str(learned.parent))
        coefficients["learned soup, by layer"] = coefficients_of(made.recipe)
    with training.reproducible(n_threads=1):
        found = compare(
            ingredients,
            "streamsoup.demo.task",
            output=folder / "report",
            base=folder / "base",
            settings=CompareSettings(learned=(), coefficients=coefficients),
        )
    inside = {name: quote(str(folder / name)) for name in ("", "ingredients", "base", "report")}
    again = (
        f"{command} compare {inside['ingredients']}{os.sep}* --base {inside['base']} "
        f"--task streamsoup.demo.task -o {inside['report']}"
    )
    commands = (f"{command} demo -o {inside['']}", again)
    return write_report(replace(found, commands=commands), folder / "report")
