"""The tables of the demo, and a verdict on each soup.

Every soup is compared with one model only: the ingredient that was best on validation, which is
what one would have kept without soups.  A soup wins or loses on a split only where the paired
bootstrap interval of the difference leaves 0 out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from streamsoup.demo.training import Training
from streamsoup.study.measures.rows import Gain


class Row(msgspec.Struct, frozen=True):
    """One model, or ensemble, and how often it is right."""

    name: str

    n_right: Mapping[str, int]
    """Right answers per split."""

    how: Training | None = None
    """The training that made it; none for a soup."""

    gains: Mapping[str, Gain] = {}
    """For a soup: its share of right answers minus that of the best ingredient, per split."""


class Results(msgspec.Struct, frozen=True):
    """All rows of the demo."""

    n_images: Mapping[str, int]
    """Images per split, in the order of the columns."""

    base: Row
    ingredients: Sequence[Row]
    soups: Sequence[Row]

    def best(self) -> Row:
        """Return the ingredient that is best on validation; the first one of equals."""
        return max(self.ingredients, key=lambda row: row.n_right["val"])


def scores(results: Results) -> Table:
    """Return the percentages of right answers as a table for `rich`, 79 columns wide."""
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
        table.add_row(*_cells(soup, results.n_images), style="bold")
    return table


def gains(results: Results) -> Table:
    """Return the soups' differences from the best ingredient as a table for `rich`."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(f"minus {results.best().name}", no_wrap=True)
    for split in results.soups[0].gains:
        table.add_column(split, justify="right", no_wrap=True)
    for soup in results.soups:
        table.add_row(soup.name, *map(_signed, soup.gains.values()))
    return table


def verdict(soup: Row) -> str:
    """Return in one sentence where `soup` wins and loses against the best ingredient."""
    splits: dict[str, list[str]] = {"wins": [], "loses": [], "no difference": []}
    for split, gain in soup.gains.items():
        splits[gain.outcome].append(split)
    parts = [f"{outcome} on {', '.join(names)}" for outcome, names in splits.items() if names]
    return f"{soup.name}: {'; '.join(parts)}."


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
    percent = [f"{100 * row.n_right[split] / n:.2f}" for split, n in n_images.items()]
    return [name or row.name, *settings, *percent]


def _signed(gain: Gain) -> str:
    low, value, high = (f"{100 * x:+.1f}" for x in (gain.low, gain.value, gain.high))
    text = escape(f"{value} [{low},{high}]")
    colour = {"wins": "green", "loses": "red"}.get(gain.outcome)
    return f"[{colour}]{text}[/]" if colour else text
