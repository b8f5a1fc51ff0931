"""The rows of the result, and an honest comparison.

Every soup is set against one thing only: the ingredient that was best on validation, which is what
one would have kept without soups.  The differences are printed with their sign, and the splits
where a soup loses are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from streamsoup.demo.training import Training


class Row(msgspec.Struct, frozen=True):
    """One set of weights and how often it is right."""

    name: str

    n_right: Mapping[str, int]
    """Right answers per split.  Counts, so that a tie is a tie."""

    how: Training | None = None
    """The training it comes from; none for a soup."""


class Results(msgspec.Struct, frozen=True):
    """All rows, and what they are compared by."""

    n_images: Mapping[str, int]
    """Images per split, in the order of the columns."""

    base: Row
    ingredients: Sequence[Row]
    soups: Sequence[Row]

    def best(self) -> Row:
        """Return the ingredient that is best on validation; the first one of equals."""
        return max(self.ingredients, key=lambda row: row.n_right["val"])

    def difference(self, soup: Row, split: str) -> float:
        """Return by how many percentage points `soup` is better than the best ingredient."""
        gain = soup.n_right[split] - self.best().n_right[split]
        return 100 * gain / self.n_images[split]


def render(results: Results) -> Table:
    """Draw the table; `rich` prints it, with or without colours."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", no_wrap=True)
    for heading in ("rate", "epochs", "augment", "smooth"):
        table.add_column(heading, justify="right", style="dim")
    for split in results.n_images:
        table.add_column(split, justify="right")

    table.add_row(*_cells(results.base, results.n_images), end_section=True)
    for row in results.ingredients:
        table.add_row(*_cells(row, results.n_images), end_section=row is results.ingredients[-1])
    best = results.best()
    table.add_row(*_cells(best, results.n_images, name=f"best on val ({best.name})"))
    for soup in results.soups:
        differences = [results.difference(soup, split) for split in results.n_images]
        table.add_row(*_cells(soup, results.n_images), style="bold")
        table.add_row("  minus the best", "", "", "", "", *map(_signed, differences))
    return table


def verdict(results: Results, soup: Row) -> str:
    """Say in one sentence where `soup` beats the best ingredient, equals it, and loses to it."""
    outcomes: dict[str, list[str]] = {"wins on": [], "equals it on": [], "loses on": []}
    for split in results.n_images:
        difference = results.difference(soup, split)
        outcome = "wins on" if difference > 0 else "loses on" if difference < 0 else "equals it on"
        outcomes[outcome].append(split)
    said = [f"{outcome} {', '.join(splits)}" for outcome, splits in outcomes.items() if splits]
    return f"Against the best single model, the {soup.name} {'; '.join(said)}."


def _cells(row: Row, n_images: Mapping[str, int], *, name: str | None = None) -> list[str]:
    how = row.how
    settings = (
        [
            f"{how.learning_rate:.1e}",
            f"{how.epochs}",
            f"{how.augmentation:.2f}",
            f"{how.label_smoothing:.2f}",
        ]
        if how
        else [""] * 4
    )
    scores = [f"{100 * row.n_right[split] / n:.2f}" for split, n in n_images.items()]
    return [name or row.name, *settings, *scores]


def _signed(difference: float) -> str:
    if difference == 0:
        return "0"
    colour = "green" if difference > 0 else "red"
    return f"[{colour}]{difference:+.2f}[/{colour}]"
