"""The page of a comparison: who wins, every number, plots, and the commands that made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from streamsoup.errors import printable
from streamsoup.study.measures.rows import Cell, Comparison, Gain, Row
from streamsoup.study.pages.blocks import Block, Code, Heading, Table, Text
from streamsoup.study.pages.page import Page
from streamsoup.study.report import comparison_plots as plots

__all__ = ["page", "verdict"]

BEST, BASE = "over_best", "over_base"
"""The fields of a cell that hold how much better it is than these."""


def page(found: Comparison) -> Page:
    """Put a comparison on a page."""
    return Page("Ingredients, soups and ensembles", _blocks(found))


def verdict(found: Comparison, row: Row) -> str:
    """Return in a sentence where a row wins and loses against the best on validation, and the base.

    It wins or loses on a split only where the paired interval of the difference leaves 0 out.
    """
    said = f"{row.name}, against the best on {found.splits.val}: {_outcomes(found, row, BEST)}."
    if found.of("base") and row.kind != "base":
        said += f" Against the base: {_outcomes(found, row, BASE)}."
    return said


def _outcomes(found: Comparison, row: Row, field: str) -> str:
    """Return the splits by outcome."""
    outcomes: dict[str, list[str]] = {}
    for split in found.splits.all:
        gain: Gain | None = getattr(row.cells[split], field)
        if gain is not None:
            outcomes.setdefault(gain.outcome, []).append(split)
    words = {
        "wins": "wins on {}",
        "loses": "loses on {}",
        "no difference": "no difference on {}",
        "untested": "no difference can be shown on {} without results by example",
    }
    known = [
        text.format(", ".join(outcomes[name])) for name, text in words.items() if name in outcomes
    ]
    return "; ".join(known) or "has no score"


def _difference_table(found: Comparison, field: str) -> Table:
    """Show how much better each row is, with paired intervals; wins and losses stand out."""
    columns = found.splits.columns
    of = f"best on {found.splits.val}" if field == BEST else "base"

    def shown(cell: Cell) -> str:
        gain: Gain | None = getattr(cell, field)
        if gain is None:
            return "–"
        numbers = [gain.value, *([gain.low, gain.high] if gain.outcome != "untested" else [])]
        value, *ends = [f"{100 * x:+.2f}" if found.is_share else f"{x:+.4g}" for x in numbers]
        return f"{value} [{', '.join(ends)}]" if ends else value

    rows = [row for row in _judged(found) if field == BEST or row.kind != "base"]
    bold = frozenset(
        (n, 1 + m)
        for n, row in enumerate(rows)
        for m, column in enumerate(columns)
        if (gain := getattr(row.cells[column], field)) and gain.outcome in ("wins", "loses")
    )
    lines = [[row.name, *(shown(row.cells[column]) for column in columns)] for row in rows]
    return Table([f"minus the {of}", *columns], lines, bold)


def _judged(found: Comparison) -> list[Row]:
    """Return the rows that are set against the best on validation: base, soups, ensembles."""
    rows = found.of("base", "soup", "ensemble")
    return [row for row in rows if any(math.isfinite(c.value) for c in row.cells.values())]


def _members(found: Comparison) -> list[Block]:
    """Name who is in each soup and ensemble."""
    n = len(found.names)
    lines = []
    for row in found.of("soup", "ensemble"):
        if row.members:
            named = ", ".join(found.names[i] for i in row.members)
            everyone = len(row.members) == n
            who = f"all {n}" if everyone else f"{len(row.members)} of {n}: {named}"
            lines.append(Text(f"{row.name}: {who}."))
    return [Heading("Members"), *lines] if lines else []


def _coefficients(found: Comparison) -> list[Block]:
    """Show the coefficients of learned soups: their means, and each as a heat map."""
    rows = [row for row in found.of("soup") if row.coefficients]
    if not rows:
        return []
    lines = []
    for row in rows:
        columns = list(zip(*row.coefficients, strict=True))
        means = dict(zip(row.members, (sum(c) / len(c) for c in columns), strict=True))
        cells = [f"{means[i]:.3f}" if i in means else "–" for i in range(len(found.names))]
        lines.append([row.name, str(len(row.groups)), *cells])
    blocks: list[Block] = [Heading("Coefficients")]
    blocks.append(Table(["", "groups", *found.names], lines))
    blocks.append(Text("Factors of the ingredients; where groups of tensors differ, their mean."))
    return [*blocks, *plots.heat_maps(found)]


def _blocks(found: Comparison) -> list[Block]:
    splits = found.splits
    counts = ", ".join(f"{split} {n:,}" for split, n in found.n_examples.items())
    chosen = f"{len(found.names)} ingredients, all choices made on the split {splits.val!r}"
    blocks: list[Block] = [
        Text(f"{chosen}, but for the oracle, which is told apart below."),
        *[Text(verdict(found, row)) for row in _judged(found)],
        Text(_VERDICTS.format(printable(splits.val))),
        Heading("Table"),
        _main_table(found),
        Text(
            f"{'Percent' if found.is_share else 'The'} {found.metric}, larger is better, with "
            "95 % bootstrap intervals over examples"
            + (f"; ± is the spread over random orders. Examples: {counts}." if counts else ".")
            + " Cost is that of an inference, in models. The oracle is the best ingredient of each "
            "column, chosen by that column, which no practice allows. Bold is the best of a "
            "column, the oracle apart."
        ),
        *[Text(note) for note in found.notes],
    ]
    unit = "percentage points" if found.is_share else found.metric
    blocks += [Heading("Differences"), _difference_table(found, BEST)]
    blocks += [_difference_table(found, BASE)] if found.of("base") else []
    blocks.append(Text(_DIFFERENCES.format(unit)))
    blocks += [*plots.intervals(found), *plots.scatter(found)]
    if any(math.isfinite(row.beta) for row in found.rows):
        blocks += [Heading("Calibration"), Text(_CALIBRATION)]
        blocks += [_calibration_table(found, "NLL"), _calibration_table(found, "ECE")]
    if found.curves:
        blocks += [Heading("Number of ingredients"), *plots.curves(found), Text(_CURVES)]
    if found.pairs:
        blocks += [Heading("Pairs"), Text(_PAIRS), *plots.pairs(found), *plots.theory(found)]
    blocks += _members(found) + _coefficients(found)
    blocks += [Heading("Ingredients"), _ingredient_table(found)]
    if found.commands:
        blocks += [Heading("Made by"), Code(found.commands)]
    return blocks


_CALIBRATION = (
    "NLL: negative log-likelihood in nats. ECE: calibration error in percent, in bins of equal "
    "mass. Smaller is better. Each as the model is → after temperature scaling with β (which "
    "multiplies the logits) fitted on validation. Bold is the best of a column after scaling."
)
_VERDICTS = (
    "Wins and loses: the 95 % interval of the difference, by paired bootstrap over the examples of "
    "the split, leaves 0 out. On {}, which all choices were made on, every choice looks better "
    "than it is."
)
_DIFFERENCES = (
    "In {}, with 95 % intervals of paired bootstrap over examples; bold where they leave 0 out."
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
    judged = [row for row in rows if row.kind != "oracle"]
    columns = found.splits.columns
    best = {c: _largest(row.cells[c].value for row in judged) for c in columns}
    bold = _bold(rows, columns, best, lambda row, c: row.cells[c].value)
    return Table(head, lines, bold, _hints(found, rows))


def _hints(found: Comparison, rows: Sequence[Row]) -> dict[tuple[int, int], str]:
    """Return what cells of values say in full: every digit, examples, and the gains."""
    hints: dict[tuple[int, int], str] = {}
    for n, row in enumerate(rows):
        for m, column in enumerate(found.splits.columns, 1):
            cell = row.cells[column]
            if not math.isfinite(cell.value):
                continue
            lines = [f"{row.name} on {column}: {cell.value!r}"]
            if column in found.n_examples:
                lines.append(f"{found.n_examples[column]:,} examples")
            for field, what in ((BEST, f"the best on {found.splits.val}"), (BASE, "the base")):
                gain: Gain | None = getattr(cell, field)
                if gain is not None:
                    lines.append(f"{gain.value:+.4g} over {what}: {gain.outcome}")
            hints[n, m] = "; ".join(lines)
    return hints


def _bold(
    rows: Sequence[Row],
    columns: Sequence[str],
    best: Mapping[str, float],
    value_of: Callable[[Row, str], float],
    first: int = 1,
) -> frozenset[tuple[int, int]]:
    """Return the cells that hold the best of their column; columns begin at the table's `first`.

    Means of the same examples may differ in the last bit.
    """
    return frozenset(
        (n, first + m)
        for n, row in enumerate(rows)
        for m, column in enumerate(columns)
        if row.kind != "oracle" and abs(value_of(row, column) - best[column]) < 1e-9
    )


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _ingredient_table(found: Comparison) -> Table:
    columns = found.splits.columns
    rows = found.of("ingredient")
    lines = [
        [row.name, *(_value(found, row.cells[c]) for c in columns), printable(path, 1000)]
        for row, path in zip(rows, found.paths, strict=True)
    ]
    best = {c: _largest(row.cells[c].value for row in rows) for c in columns}
    bold = _bold(rows, columns, best, lambda row, c: row.cells[c].value)
    return Table(["", *columns, "path"], lines, bold, _hints(found, rows))


def _calibration_table(found: Comparison, measure: str) -> Table:
    """Show NLL or ECE before and after temperature scaling, in all columns."""
    columns = found.splits.columns

    def shown(cell: Cell) -> str:
        pair = (cell.nll, cell.nll_scaled) if measure == "NLL" else (cell.ece, cell.ece_scaled)
        if not all(map(math.isfinite, pair)):
            return "–"
        return " → ".join(f"{x:.3f}" if measure == "NLL" else f"{100 * x:.1f}" for x in pair)

    def scaled(row: Row, column: str) -> float:
        cell = row.cells[column]
        return cell.nll_scaled if measure == "NLL" else cell.ece_scaled

    rows = [r for r in found.rows if r.kind != "ingredient" and math.isfinite(r.beta)]
    lines = [[row.name, f"{row.beta:.2f}", *(shown(row.cells[c]) for c in columns)] for row in rows]
    best = {c: -_largest(-scaled(row, c) for row in rows) for c in columns}
    bold = _bold(rows, columns, best, scaled, first=2)
    return Table([measure, "β", *columns], lines, bold)


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
