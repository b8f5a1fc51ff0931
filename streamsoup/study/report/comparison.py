"""The report of a comparison: tables, pictures, rows, and the commands that made them.

::

    DIR/report.md     the page, for a terminal or a repository
    DIR/report.html   the same in one file, pictures included
    DIR/rows.jsonl    every number: a row, a point of a curve or a pair a line
    DIR/plots/…       the pictures
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from streamsoup.errors import OutputError, printable
from streamsoup.study.measures.rows import Cell, Comparison, Row
from streamsoup.study.report import charts
from streamsoup.study.report.figures import have_matplotlib
from streamsoup.study.report.page import (
    Block,
    Code,
    Heading,
    Page,
    Picture,
    Table,
    Text,
    write_text,
)

__all__ = ["verdict", "write_report"]

Drawer = Callable[[Comparison, str], None]


def write_report(found: Comparison, folder: str | os.PathLike[str]) -> str:
    """Write the report into `folder`; give the path of its HTML page.

    What an earlier report left there is replaced, file by file. Without matplotlib there are no
    pictures, and the page says so. Raises `OutputError`.
    """
    root = os.fspath(folder)
    plots = os.path.join(root, "plots")
    if os.path.islink(plots):
        raise OutputError(f"{printable(plots)}: is a link, which is not written through; remove it")
    try:
        os.makedirs(plots, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{printable(root)}: cannot be made: {error.strerror}") from None
    write_text(os.path.join(root, "rows.jsonl"), "".join(f"{line}\n" for line in found.to_lines()))
    pictures = _draw(found, root) if have_matplotlib() else {}
    page = Page("Ingredients, soups and ensembles", _blocks(found, pictures))
    write_text(os.path.join(root, "report.md"), page.to_markdown())
    path = os.path.join(root, "report.html")
    write_text(path, page.to_html(root))
    return path


def verdict(found: Comparison, row: Row) -> str:
    """Say where a row beats the ingredient that is best on validation, equals it, and loses."""
    (best,) = found.of("best")
    outcomes: dict[str, list[str]] = {"wins on": [], "equals it on": [], "loses on": []}
    for split in found.splits.all:
        gain = row.cells[split].value - best.cells[split].value
        if math.isfinite(gain):
            # Counts of examples that are equal may differ in the last bit as shares.
            won = "equals it on" if abs(gain) < 1e-9 else "wins on" if gain > 0 else "loses on"
            outcomes[won].append(split)
    said = "; ".join(f"{what} {', '.join(splits)}" for what, splits in outcomes.items() if splits)
    return f"{row.name}, against the best on {found.splits.val}: {said or 'has no score'}."


def _draw(found: Comparison, root: str) -> dict[str, Picture]:
    """Draw what there is to draw."""
    shifted = found.splits.shifted is not None
    theory = any(math.isfinite(pair.approximation) for pair in found.pairs)
    wanted: list[tuple[str, bool, Drawer, str]] = [
        (
            "scatter",
            shifted,
            charts.draw_scatter,
            "One point for each ingredient, soup and ensemble: in distribution against shift.",
        ),
        (
            "intervals",
            True,
            charts.draw_intervals,
            "Every way to choose; the dashed line is the best on validation.",
        ),
        (
            "curves",
            bool(found.curves),
            charts.draw_curves,
            "What the first n ingredients would have given.",
        ),
        (
            "pairs",
            bool(found.pairs),
            charts.draw_pairs,
            "What the middle between two ingredients gains over their mean, against their angle.",
        ),
        (
            "theory",
            theory,
            charts.draw_theory,
            "Loss of the soup less loss of the ensemble, for pairs: approximated and measured.",
        ),
    ]
    pictures = {}
    for name, there, draw, words in wanted:
        if there:
            file = os.path.join("plots", f"{name}.png")
            draw(found, os.path.join(root, file))
            pictures[name] = Picture(file, words)
    return pictures


def _blocks(found: Comparison, pictures: dict[str, Picture]) -> list[Block]:
    splits = found.splits
    counts = ", ".join(f"{split} {n:,}" for split, n in found.n_examples.items())
    chosen = f"{len(found.names)} ingredients, all choices made on the split {splits.val!r}"
    blocks: list[Block] = [
        Text(f"{chosen}, but for the oracle, which is told apart below."),
        *[Text(verdict(found, row)) for row in found.of("soup") if "soup" in row.name],
        Heading("Table"),
        _main_table(found),
        Text(
            f"{'Percent' if found.is_share else 'The'} {found.metric}, larger is better, with "
            "95 % bootstrap intervals over examples"
            + (f"; ± is the spread over random orders. Examples: {counts}." if counts else ".")
            + " Cost is that of an inference, in models. The oracle is the best ingredient of each "
            "column, chosen by that column: nobody can choose so."
        ),
        *[Text(note) for note in found.notes],
    ]
    for name in ("intervals", "scatter"):
        blocks += [pictures[name]] if name in pictures else []
    if any(math.isfinite(row.beta) for row in found.rows):
        blocks += [Heading("Calibration"), Text(_CALIBRATION)]
        blocks += [_calibration_table(found, "NLL"), _calibration_table(found, "ECE")]
    if "curves" in pictures:
        blocks += [Heading("Number of ingredients"), pictures["curves"], Text(_CURVES)]
    if found.pairs:
        blocks += [Heading("Pairs"), Text(_PAIRS)]
        blocks += [pictures[name] for name in ("pairs", "theory") if name in pictures]
    blocks += [Heading("Ingredients"), _ingredient_table(found)]
    if not pictures:
        blocks.append(Text("No pictures: pip install 'streamsoup[plot]', and run again."))
    if found.commands:
        blocks += [Heading("Made by"), Code(found.commands)]
    return blocks


_CALIBRATION = (
    "NLL: negative log-likelihood in nats. ECE: calibration error in percent, in bins of equal "
    "mass. Smaller is better. Each as the model is → after temperature scaling with β (which "
    "multiplies the logits) fitted on validation."
)
_CURVES = "Ingredients in the order given, as if the runs had stopped there; choices on validation."
_PAIRS = (
    "The interpolation advantage is the score of the average of two ingredients less the mean of "
    "their scores. The approximation of the loss of a soup less that of the ensemble is equation 1 "
    "of Wortsman et al. 2022, with the second derivative by central differences in steps of 0.1, "
    "at the temperature that calibrates the soup."
)


def _main_table(found: Comparison) -> Table:
    rows = [row for row in found.rows if row.kind != "ingredient"]
    head = ["", *found.splits.columns, "ingredients", "cost"]
    lines = [
        [row.name, *(_value(found, row.cells[c]) for c in found.splits.columns), *_counts(row)]
        for row in rows
    ]
    bold = frozenset(n for n, row in enumerate(rows) if row.kind == "soup")
    return Table(head, lines, bold)


def _ingredient_table(found: Comparison) -> Table:
    columns = found.splits.columns
    rows = found.of("ingredient")
    lines = [
        [row.name, *(_value(found, row.cells[c]) for c in columns), printable(path, 1000)]
        for row, path in zip(rows, found.paths, strict=True)
    ]
    return Table(["", *columns, "path"], lines)


def _calibration_table(found: Comparison, measure: str) -> Table:
    """Show NLL or ECE before and after temperature scaling, in all columns."""
    columns = found.splits.columns

    def shown(cell: Cell) -> str:
        pair = (cell.nll, cell.nll_scaled) if measure == "NLL" else (cell.ece, cell.ece_scaled)
        if not all(map(math.isfinite, pair)):
            return "–"
        return " → ".join(f"{x:.3f}" if measure == "NLL" else f"{100 * x:.1f}" for x in pair)

    lines = [
        [row.name, f"{row.beta:.2f}", *(shown(row.cells[c]) for c in columns)]
        for row in found.rows
        if row.kind != "ingredient" and math.isfinite(row.beta)
    ]
    return Table([measure, "β", *columns], lines)


def _counts(row: Row) -> list[str]:
    return [f"{row.n_ingredients:.3g}", f"{row.cost:.3g}"]


def _value(found: Comparison, cell: Cell) -> str:
    """Write a value with its interval or spread, and its name where it has one."""
    if not math.isfinite(cell.value):
        return "–"
    show = (lambda x: f"{100 * x:.2f}") if found.is_share else _number
    text = show(cell.value)
    if math.isfinite(cell.spread):
        text += f" ± {show(cell.spread)}"
    elif math.isfinite(cell.low):
        text += f" [{show(cell.low)}, {show(cell.high)}]"
    return f"{text} ({cell.name})" if cell.name else text


def _number(value: float) -> str:
    return f"{value:.4g}"
