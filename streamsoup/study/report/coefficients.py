"""The page of a learned soup: its coefficients, and how the loss fell on the way to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from streamsoup.errors import count
from streamsoup.search.learned import LearnedSoup
from streamsoup.sizes import nbytes_text
from streamsoup.study.names import short_names
from streamsoup.study.pages.blocks import (
    Block,
    Code,
    Heading,
    Plot,
    Point,
    Series,
    Table,
    Text,
    shades,
)
from streamsoup.study.pages.page import Page

__all__ = ["coefficient_map", "page", "rows"]

SETTINGS = (
    *("granularity", "constraint", "temperature", "optimizer", "evaluations", "tolerance"),
    *("epochs", "lr", "patience", "guard", "guard_every"),
)
"""The entries of the report that say how it was learned."""


def rows(found: LearnedSoup) -> Iterator[str]:
    """Return a JSON line for each group of tensors, and for each evaluation."""
    for group, row in zip(found.groups, found.rows, strict=True):
        yield json.dumps({"kind": "coefficients", "group": group, "coefficients": list(row)})
    for number, each in enumerate(found.evaluations):
        guard = each.guard if math.isfinite(each.guard) else None
        loss = each.loss if math.isfinite(each.loss) else None
        best = number == found.best
        yield json.dumps({"kind": "evaluation", "loss": loss, "guard": guard, "best": best})


def page(found: LearnedSoup, commands: Sequence[str]) -> Page:
    """Put a learned soup on a page."""
    report, names = found.report, short_names(found.recipe.ingredients, 40)
    first, best = found.evaluations[0], found.evaluations[found.best]
    guarded = f", validation {first.guard:.5g} to {best.guard:.5g}" if _has_guard(found) else ""
    blocks: list[Block] = [
        Text(
            f"Loss {first.loss:.5g} (uniform) to {best.loss:.5g}{guarded}, with {len(names)} "
            f"ingredients; {report['ended']}."
        )
    ]
    if report["temperature"]:
        blocks.append(Text(f"Factor of the logits {found.beta:.4f}, which is not in the files."))
    everyone = range(len(names))
    words = "Coefficients of each ingredient (across) for each group of tensors (down)."
    blocks += [
        _losses(found),
        Heading("Coefficients"),
        coefficient_map("coefficients", words, found.groups, everyone, found.rows, names),
        Heading("Evaluations"),
        _evaluations(found),
        Heading("Settings"),
        Table(["setting", "value"], [[_plain(name), str(report[name])] for name in SETTINGS]),
        Text(
            f"{count(len(found.evaluations), 'evaluation')}, {count(report['n_passes'], 'pass')} "
            f"(at most {report['predicted']['passes']} predicted), "
            f"{nbytes_text(report['nbytes_read'])} read in {report['elapsed_s']:.2f} s."
        ),
    ]
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page("A learned soup", blocks)


def coefficient_map(
    name: str,
    words: str,
    groups: Sequence[str],
    members: Sequence[int],
    values: Sequence[Sequence[float]],
    names: Sequence[str],
) -> Table:
    """Show coefficients ``(group, member)`` as a heat map; `names` are of all ingredients."""
    known = {
        (group, member + 1): value
        for group, line in enumerate(values)
        for member, value in zip(members, line, strict=True)
    }
    columns = range(1, 1 + len(names))
    body = [
        [group, *(f"{known[n, i]:.4f}" if (n, i) in known else "–" for i in columns)]
        for n, group in enumerate(groups)
    ]
    hints = {(n, i): f"{groups[n]} of {names[i - 1]}: {value!r}" for (n, i), value in known.items()}
    return Table(
        ["tensors", *names], body, hints=hints, shades=shades(known), name=name, words=words
    )


def _losses(found: LearnedSoup) -> Plot:
    def points(what: str, values: Sequence[float]) -> list[Point]:
        return [
            Point(n, value, f"{what} of evaluation {n}: {value:.6g}")
            for n, value in enumerate(values)
        ]

    loss = points("loss", [each.loss for each in found.evaluations])
    size = 3.5 if len(loss) <= 60 else 2.0
    series = [Series("loss", loss, colour=1, line="solid", size=size)]
    if _has_guard(found):
        guard = points("validation", [each.guard for each in found.evaluations])
        series.append(Series("validation", guard, "square", 4, line="dashed", size=size))
    series.append(Series("the soup", [loss[found.best]], "star", 2, size=7))
    words = "The loss of each mixture that was evaluated; the first is the uniform soup."
    return Plot("losses", words, "evaluation", "loss (nats)", series, whole=True)


def _evaluations(found: LearnedSoup) -> Table:
    body = [
        [str(n), f"{each.loss:.6g}", f"{each.guard:.6g}" if math.isfinite(each.guard) else "–"]
        for n, each in enumerate(found.evaluations)
    ]
    hints = {(n, 1): repr(each.loss) for n, each in enumerate(found.evaluations)}
    bold = frozenset((found.best, column) for column in range(3))
    return Table(["evaluation", "loss", "validation"], body, bold, hints)


def _has_guard(found: LearnedSoup) -> bool:
    return any(math.isfinite(each.guard) for each in found.evaluations)


def _plain(name: str) -> str:
    return name.replace("_", " ")
