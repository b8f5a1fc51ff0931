"""The report of the demo: the same ingredients in every soup and ensemble.

The coefficients of the learned soup are read from its own file.  Everything else is measured once:
predictions are cached, so that a second demo measures nothing again.
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
from streamsoup.study.report.write import write_report

__all__ = ["write"]


def write(folder: Path, results: Results, command: str) -> str:
    """Write the report of the demo to ``folder/report``; return the path of its page.

    Takes some ten seconds, the first time.
    """
    ingredients = [folder / "ingredients" / row.name for row in results.ingredients]
    coefficients = {}
    learned = folder / "learned" / "streamsoup.json"
    if learned.is_file():
        made = read_provenance(str(learned.parent))
        coefficients["learned soup, by layer"] = coefficients_of(made.recipe)
    with training.reproducible():
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
