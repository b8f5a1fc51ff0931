"""The page of a path between two checkpoints, and of a plane through three as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from streamsoup.errors import printable
from streamsoup.study.landscape.landscape import Landscape
from streamsoup.study.landscape.paths import Sweep
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
)
from streamsoup.study.pages.page import Page
from streamsoup.study.report.figures import new_figure, place_names, plain, save

__all__ = ["draw_landscape", "sweep_page"]

_LINES = ("solid", "dashed", "dotted")
_SHAPES = ("circle", "square", "up", "diamond", "down", "plus", "cross")


def _curves(found: Sweep) -> list[Plot]:
    """Draw score and loss along a path, a line for each split; the chosen α is marked."""
    names = short_names(found.ends, 20)
    plots = []
    for number, (what, of_splits) in enumerate(
        [(found.metric, found.values), *([("loss (nats)", found.losses)] if found.losses else [])]
    ):
        percent = number == 0 and found.is_share
        scale = 100 if percent else 1
        series = [
            Series(
                split,
                [
                    Point(alpha, scale * value, f"{split} at α = {alpha:g}: {scale * value:.6g}")
                    for alpha, value in zip(found.alphas, values, strict=True)
                ],
                _SHAPES[n % len(_SHAPES)],
                n % 8,
                line=_LINES[n % len(_LINES)],
            )
            for n, (split, values) in enumerate(of_splits.items())
        ]
        plots.append(
            Plot(
                "score" if number == 0 else "loss",
                f"{'Loss' if number else found.metric.capitalize()} along the path; the dashed "
                f"line is the best α on {found.splits.val}.",
                f"α, from {names[0]} to {names[1]}",
                f"{what} (%)" if percent else what,
                series,
                verticals=[found.best],
            )
        )
    return plots


def sweep_page(found: Sweep, commands: Sequence[str]) -> Page:
    """Put a sweep into words: the points, the best α, and both barriers by name."""
    splits = found.splits.all
    points = [
        [f"{alpha:g}", *(_shown(found.values[split][n], found.is_share) for split in splits)]
        for n, alpha in enumerate(found.alphas)
    ]
    best = found.alphas.index(found.best)
    chosen = frozenset((best, column) for column in range(1 + len(splits)))
    blocks: list[Block] = [
        Text(f"(1 - α) · {printable(found.ends[0])} + α · {printable(found.ends[1])}"),
        Text(f"Best α on {found.splits.val}: {found.best:g}; the smallest of equals."),
        *_curves(found),
        Table(["α", *splits], points, chosen),
        *_barriers(found),
    ]
    if commands:
        blocks += [Heading("Made by"), Code(commands)]
    return Page("Between two checkpoints", blocks)


def _barriers(found: Sweep) -> list[Block]:
    lines = []
    for split in found.splits.all:
        error = found.barrier(split)
        if error is None:
            return []
        loss = found.barrier(split, of_loss=True) if split in found.losses else None
        gain = found.advantage(split)
        lines.append(
            [
                split,
                _shown(error.over_mean, found.is_share),
                _shown(error.over_chord, found.is_share),
                _shown(loss.over_mean, False) if loss else "–",
                _shown(loss.over_chord, False) if loss else "–",
                _shown(gain, found.is_share),
            ]
        )
    head = ["", "error, over mean", "error, over chord", "loss, over mean", "loss, over chord"]
    return [
        Heading("Barriers"),
        Table([*head, "advantage"], lines),
        Text(
            "Over the mean: the highest error of the path less the mean of both ends. Over the "
            "chord: the most by which the error rises above the straight line between both ends. "
            "Advantage: the score at α = ½ less the mean score of both ends."
            + (" Scores and errors in percent, losses in nats." if found.is_share else "")
        ),
    ]


def _shown(value: float, percent: bool) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.2f}" if percent else f"{value:.4g}"


def draw_landscape(found: Landscape, path: str) -> None:
    """Draw error and loss of each split as contours, with the checkpoints and soups marked."""
    panels: list[tuple[str, Any]] = []
    for split, values in found.values.items():
        panels.append(
            (f"error on {split} (%), 1 less {found.metric}", 100 * (1 - values))
            if found.is_share
            else (f"{found.metric} on {split}", values)
        )
        if split in found.losses:
            panels.append((f"loss on {split} (nats)", found.losses[split]))
    wide, tall = float(np.ptp(found.xs)), float(np.ptp(found.ys))
    rows = math.ceil(len(panels) / 2)
    columns = min(len(panels), 2)
    height = min(max(4.6 * tall / wide, 2.6), 7.0)
    figure = new_figure(5.6 * columns, (height + 0.7) * rows)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (label, values) in zip(grid, panels, strict=False):
        _contours(figure, axes, found, values, label)
    named = [(mark.name, mark.x, mark.y) for mark in found.marks]
    behind = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
    for axes in grid[: len(panels)]:
        place_names(figure, axes, named, always=True, fontsize=8.5, bbox=behind, zorder=6)
    save(figure, path)


def _contours(figure: Any, axes: Any, found: Landscape, values: Any, label: str) -> None:
    if np.isfinite(values).any():
        _fill(figure, axes, found, values)
    else:
        label += ": a number nowhere"
        axes.set_xlim(found.xs[0], found.xs[-1])
        axes.set_ylim(found.ys[0], found.ys[-1])
    for mark in found.marks:
        axes.scatter(
            [mark.x], [mark.y], s=90 if mark.is_soup else 55, marker="*" if mark.is_soup else "o",
            c="white", edgecolors="black", linewidths=1.1, zorder=5,
        )  # fmt: skip
    axes.set_aspect("equal")
    axes.set_title(plain(label), fontsize=10)
    axes.set_xlabel("distance in weights along the first axis", fontsize=9)
    axes.set_ylabel("along the second", fontsize=9)


def _fill(figure: Any, axes: Any, found: Landscape, values: Any) -> None:
    """Draw the contours and their scale; what is not finite stays white."""
    from matplotlib.colors import BoundaryNorm

    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    # Levels that lie close where the values do: what matters is at the bottom of the valley.
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 13)))
    if len(levels) < 3:
        levels = np.linspace(low, max(high, low + 1e-9), 3)
    norm = BoundaryNorm(levels, 256)
    filled = axes.contourf(found.xs, found.ys, values, levels=levels, cmap="cividis", norm=norm)
    axes.contour(found.xs, found.ys, values, levels=levels, colors="white", linewidths=0.5)
    bar = figure.colorbar(filled, ax=axes, shrink=0.9)
    bar.set_ticks(list(levels), labels=[f"{level:.3g}" for level in levels])
    bar.ax.tick_params(labelsize=8)
