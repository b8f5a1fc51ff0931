"""What a run noted of its checkpoints: the metrics that choose the best of them.

The Trainer of transformers notes metrics in ``trainer_state.json``, in each checkpoint. Lightning
puts them into the names of its files where it was told to (``epoch=3-val_loss=0.12.ckpt``), and its
CSV logger into ``metrics.csv`` beside their folder. Nothing is ever unpickled for them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from streamsoup.errors import RecipeError, option, printable, some
from streamsoup.formats.side_files import pieces

__all__ = [
    "LARGEST_STATE",
    "STATE",
    "Direction",
    "Records",
    "find_direction",
    "read_records",
    "unknown_metric",
]

Direction = Literal["lowest", "highest"]
"""Which values of a metric are the best."""

STATE = "trainer_state.json"
"""Where the Trainer of transformers notes the step of a checkpoint, and its metrics."""

LARGEST_STATE = 250_000_000
"""Bytes beyond which it is not read; a step that is logged takes some hundred."""

_IN_NAME = re.compile(r"(?:^|-)([^-=]+)=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?=-|$)", re.ASCII)
"""A metric in the name of a file, as Lightning writes it."""


class Records(msgspec.Struct):
    """The metrics of one checkpoint."""

    metrics: dict[str, float]
    """By name, of the step of the checkpoint."""
    history: Sequence[Mapping[str, Any]] = ()
    """All that was logged until then."""
    best: float | None = None
    """The best value so far of the metric by which the run itself chose."""


def read_records(path: str, step: int | None) -> Records:
    """Read the metrics of the checkpoint at a path, a folder or a file, that was saved at a step.

    Raises `RecipeError` for records that cannot be read. Reads texts alone, no weights.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    found = Records(_in_name(os.path.basename(path)))
    state = os.path.join(folder, STATE)
    if os.path.lexists(state):
        _add_state(found, state, step)
    table = os.path.join(os.path.dirname(os.path.abspath(folder)), "metrics.csv")
    if not os.path.isdir(path) and os.path.lexists(table):
        _add_table(found, table, step)
    return found


def find_direction(metric: str, asked: Direction | None, records: Iterable[Records]) -> Direction:
    """Return which values of a metric are the best.

    As asked; else as the run chose its own best checkpoint by this metric; else lowest for what
    ends in ``loss``, as the Trainer has it. Raises `RecipeError` where nothing says it.
    """
    if asked is not None:
        return asked
    for each in records:
        values = [
            float(entry[metric])
            for entry in each.history
            if isinstance(entry.get(metric), (int, float)) and math.isfinite(entry[metric])
        ]
        if each.best is not None and values and min(values) < max(values):
            if each.best == min(values):
                return "lowest"
            if each.best == max(values):
                return "highest"
    if metric.endswith("loss"):
        return "lowest"
    low, high = (option(f"direction {way!r}", cli=way) for way in get_args(Direction))
    raise RecipeError(
        f"low and high values of {printable(metric)} may both be the best, and nothing says which; "
        f"give {low} or {high}"
    )


def unknown_metric(metric: str, records: Iterable[Records]) -> RecipeError:
    """Return the error for a metric that no checkpoint has, with those that there are."""
    known = sorted({name for each in records for name in each.metrics})
    advice = (
        f"there are {some(known, 20)}"
        if known
        else f"no metrics are noted: not in {STATE}, nor in the names of files, nor in metrics.csv"
    )
    return RecipeError(f"no checkpoint has the metric {printable(metric)!r}; {advice}")


def _in_name(name: str) -> dict[str, float]:
    """Return the metrics in the name of a checkpoint.

    >>> _in_name("epoch=3-step=1200-val_loss=0.12.ckpt")
    {'epoch': 3.0, 'step': 1200.0, 'val_loss': 0.12}
    """
    stem = re.sub(r"\.[a-z]+$", "", name)
    return {key: float(value) for key, value in _IN_NAME.findall(stem)}


def _text(path: str) -> str:
    """Return the text of a file. Raises `RecipeError`."""
    try:
        if os.path.getsize(path) > LARGEST_STATE:
            raise OSError(f"has more than {LARGEST_STATE} bytes")
        return b"".join(pieces(path)).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"{printable(path)}: cannot be read: {printable(why)}") from None


def _add_state(found: Records, path: str, step: int | None) -> None:
    """Add the metrics that a state of the Trainer has for a step; the last ones count."""
    text = _text(path)
    try:
        state = json.loads(text)  # which knows NaN, as Python writes it
        history = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
        own = state.get("global_step", step)
        best = state.get("best_metric")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{printable(path)}: is not the state of a Trainer: {printable(error)}"
        ) from None
    found.history = history
    found.best = float(best) if isinstance(best, (int, float)) else None
    for entry in history:
        if entry.get("step") == own:
            found.metrics |= {
                name: float(value)
                for name, value in entry.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }


def _add_table(found: Records, path: str, step: int | None) -> None:
    """Add the metrics that Lightning's CSV logger has for a step, which it counts from 0."""
    if step is None:
        return
    for row in csv.DictReader(io.StringIO(_text(path))):
        if row.get("step") == str(step - 1):
            for name, value in row.items():
                try:
                    found.metrics.setdefault(name, float(value))
                except (TypeError, ValueError):
                    pass  # empty: not logged at this step
