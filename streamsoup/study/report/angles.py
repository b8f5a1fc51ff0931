"""The page of a geometry: how far each ingredient is from the base, and from the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import count
from streamsoup.methods.angles import Geometry, Place
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

__all__ = ["page", "rows"]

LONGEST = 40


def rows(found: Geometry) -> Iterator[str]:
    """Return a JSON line for everything together, and one for each tensor."""
    yield json.dumps({"kind": "geometry", **found.summary()})
    for place in found.tensors:
        yield json.dumps({"kind": "tensor", **place.to_builtins()})


def page(found: Geometry, commands: Sequence[str]) -> Page:
    """Put a geometry on a page."""
    names = short_names(found.names, LONGEST)
    of = "mean" if found.base is None else "base"
    blocks: list[Block] = [
        Text(
            f"{count(len(names), 'ingredient')}, measured from the {of}"
            + ("." if found.base is None else f" {found.base}.")
        ),
        *(Text(f"Note: {note}.") for note in found.notes),
        Heading("Ingredients"),
        _ingredients(found, names, of),
        Text(_WORDS.format(of=of)),
    ]
    total = found.total
    if len(names) > 1:
        if found.base is not None:
            words = "Angles between task vectors, in degrees."
            blocks += [
                Heading("Angles"),
                _matrix(total.angles, names, "{:.1f}", "°", "angles", words),
                Text(_ANGLES),
            ]
        words = "Distances between ingredients, in the units of the weights."
        blocks += [
            Heading("Distances"),
            _matrix(total.distances, names, "{:.4g}", "", "distances", words),
        ]
    measures = [_measures(place) for place in found.tensors]
    blocks += [Heading("Tensors"), _changes(found, measures, of), _tensors(found, measures, of)]
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page("Geometry of checkpoints", blocks)


_WORDS = (
    "To {of}: the norm of the difference. Relative: in norms of the ingredient's own weights. "
    "Changed: the share of elements that differ."
)
_ANGLES = "Ingredients average well in one valley: near 90 degrees and far apart is too far."


def _ingredients(found: Geometry, names: Sequence[str], of: str) -> Table:
    total = found.total
    angles, distances = total.angles, total.distances
    n = len(names)
    head = ["ingredient", f"to {of}", "relative (%)", "changed (%)"]
    head += ["smallest angle", "largest angle"] if found.base is not None else []
    head += ["nearest", "distance to it"] if n > 1 else []
    body, hints = [], {}
    for i in range(n):
        norm, own = float(total.norms[i]), float(total.weight_norms[i])
        share = f"{100 * total.shares[i]:.2f}"
        line = [names[i], f"{norm:.4g}", f"{100 * norm / own:.3g}" if own > 0 else "–", share]
        hints[i, 1] = f"{found.names[i]}\n{norm!r} to the {of}\nown norm: {own!r}"
        others = [j for j in range(n) if j != i]
        if found.base is not None:
            seen = [float(angles[i, j]) for j in others if math.isfinite(angles[i, j])]
            line += [f"{min(seen):.1f}", f"{max(seen):.1f}"] if seen else ["–", "–"]
        if others:
            nearest = min(others, key=lambda j: float(distances[i, j]))
            line += [names[nearest], f"{distances[i, nearest]:.4g}"]
        body.append(line)
    return Table(head, body, hints=hints)


def _matrix(
    values: NDArray[np.float64], names: Sequence[str], text: str, unit: str, name: str, words: str
) -> Table:
    """Show a value of each pair as a heat map."""
    n = len(names)
    places = [(i, j) for i in range(n) for j in range(n) if i != j]
    known = {(i, j + 1): float(values[i, j]) for i, j in places if math.isfinite(values[i, j])}
    body = [
        [names[i], *(text.format(known[i, j + 1]) if (i, j + 1) in known else "–"
                     for j in range(n))]
        for i in range(n)
    ]  # fmt: skip
    hints = {
        (i, j): f"{names[i]} and {names[j - 1]}: {value:.6g}{unit}"
        for (i, j), value in known.items()
    }
    return Table(["", *names], body, hints=hints, shades=shades(known), name=name, words=words)


Measures = tuple[float, float, float, float]


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _measures(place: Place) -> Measures:
    """Return mean angle, distance, relative distance and share that changed, of one tensor."""
    upper = place.angles[np.triu_indices(len(place.norms), 1)]
    norm, own = float(place.norms.mean()), float(place.weight_norms.mean())
    relative = norm / own if own > 0 else math.nan
    return _mean(upper), norm, relative, float(place.shares.mean())


def _changes(found: Geometry, measures: Sequence[Measures], of: str) -> Plot:
    """Draw how far each tensor moved, in the order of the checkpoint."""
    points = []
    for n, (place, measured) in enumerate(zip(found.tensors, measures, strict=True), 1):
        angle, _, relative, _ = measured
        hint = f"{place.name}\n{100 * relative:.4g} % of its norm"
        hint += f"\nmean angle {angle:.1f}°" if math.isfinite(angle) else ""
        points.append(Point(n, 100 * relative, hint))
    words = f"How far each tensor is from the {of}, in percent of its norm, over all ingredients."
    size = 4.0 if len(points) <= 200 else 2.0
    up = f"distance to the {of} (%)"
    series = [Series("", points, colour=1, size=size)]
    return Plot("tensors", words, "tensor, in the order of the checkpoint", up, series, whole=True)


def _tensors(found: Geometry, measures: Sequence[Measures], of: str) -> Table:
    """Show each tensor, as a mean over the ingredients."""
    head = ["tensor", "elements", f"to {of}", "relative (%)", "changed (%)"]
    has_angles = found.base is not None and len(found.names) > 1
    head += ["mean angle"] if has_angles else []
    body = []
    for place, (angle, norm, relative, share) in zip(found.tensors, measures, strict=True):
        line = [place.name, str(place.n_elements), f"{norm:.4g}", _percent(relative)]
        line.append(f"{100 * share:.2f}")
        line += [f"{angle:.1f}" if math.isfinite(angle) else "–"] if has_angles else []
        body.append(line)
    return Table(head, body)


def _percent(value: Any) -> str:
    return f"{100 * value:.3g}" if math.isfinite(value) else "–"
