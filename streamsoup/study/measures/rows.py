"""What a comparison found: plain rows, which a report draws and JSON lines keep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

__all__ = ["MEAN", "Cell", "Comparison", "CurvePoint", "Gain", "Pair", "Row", "Splits", "to_line"]

MEAN = "mean of shifts"
"""The column that is not a split."""

Kind = Literal["ingredient", "base", "best", "oracle", "soup", "ensemble"]


class Splits(msgspec.Struct, frozen=True):
    """What each split of the task is for."""

    val: str
    """Searched on, and calibrated on."""
    test: str | None
    """Of the same distribution, and never searched on."""
    shifts: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All splits, in the order of the columns."""
        return (self.val, *([] if self.test is None else [self.test]), *self.shifts)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns: the splits, and the mean of several shifts."""
        return (*self.all, *([MEAN] if len(self.shifts) > 1 else []))

    @property
    def shifted(self) -> str | None:
        """The column that stands for all shifts."""
        if not self.shifts:
            return None
        return MEAN if len(self.shifts) > 1 else self.shifts[0]

    @property
    def judged(self) -> str:
        """The column of the same distribution to judge by: test, if there is one."""
        return self.test or self.val


class Gain(msgspec.Struct, frozen=True):
    """How much more a row has than another one on the same examples."""

    value: float
    low: float = math.nan
    """The confidence interval of `value`, by paired bootstrap over examples; NaN without them."""
    high: float = math.nan

    @property
    def outcome(self) -> str:
        """``wins`` or ``loses`` where the interval leaves 0 out, else ``no difference``.

        ``untested`` without an interval.
        """
        if math.isnan(self.low):
            return "untested"
        return "wins" if self.low > 0 else "loses" if self.high < 0 else "no difference"


class Cell(msgspec.Struct, frozen=True):
    """One row on one split."""

    value: float
    """The number that counts, larger is better; NaN where there is none."""
    low: float = math.nan
    """The confidence interval of `value`, by bootstrap over examples."""
    high: float = math.nan
    spread: float = math.nan
    """Standard deviation over orders, where `value` is a mean over several."""
    nll: float = math.nan
    """Negative log-likelihood in nats, as the model is."""
    ece: float = math.nan
    """Equal-mass calibration error, as the model is."""
    nll_scaled: float = math.nan
    """The same two after temperature scaling on the validation split."""
    ece_scaled: float = math.nan
    over_best: Gain | None = None
    """Against the ingredient that is best on validation."""
    over_base: Gain | None = None
    """Against the base, if there is one."""
    name: str = ""
    """Which ingredient, where that differs from column to column."""


class Row(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    kind: Kind
    cells: Mapping[str, Cell]
    """By column."""
    n_ingredients: float
    """How many went in; a mean where there are several orders."""
    cost: float
    """Inference cost, in models."""
    members: tuple[int, ...] = ()
    """Which ones, as numbers in the order given; empty where they differ by column or order."""
    beta: float = math.nan
    """The inverse temperature that was fitted on the validation split."""
    note: str = ""
    groups: tuple[str, ...] = ()
    """Groups of tensors with coefficients of their own; none for plain means and ensembles."""
    coefficients: tuple[tuple[float, ...], ...] = ()
    """``(group, member)``: the factor of each member in the soup."""


class CurvePoint(msgspec.Struct, frozen=True):
    """One method with the first `n` ingredients, in the order given."""

    method: str
    n: int
    values: Mapping[str, float]
    """By column."""


class Pair(msgspec.Struct, frozen=True):
    """Two ingredients, and what lies between them."""

    first: int
    second: int
    angle: float
    """Between their task vectors, in degrees; NaN without a base."""
    advantage: float
    """Value in the middle less the mean value of both."""
    approximation: float = math.nan
    """L_soup − L_ens in theory, in nats."""
    measured: float = math.nan
    """L_soup − L_ens as it is, in nats."""
    error_difference: float = math.nan


class Comparison(msgspec.Struct, frozen=True):
    """Everything that was compared."""

    splits: Splits
    names: tuple[str, ...]
    """Short names of the ingredients, in the order given."""
    paths: tuple[str, ...]
    metric: str
    """What `Cell.value` is."""
    is_share: bool
    """True if it lies between 0 and 1, and is shown in percent, as the task said."""
    rows: tuple[Row, ...]
    curves: tuple[CurvePoint, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()
    n_examples: Mapping[str, int] = {}
    """Examples of each split, where they are known."""
    n_measured: int = 0
    """Splits that a mixture was measured on by this run; 0 if all was known."""
    commands: tuple[str, ...] = ()
    """The commands that made it."""

    def of(self, *kinds: Kind) -> list[Row]:
        """Return the rows of some kinds."""
        return [row for row in self.rows if row.kind in kinds]

    def to_lines(self) -> Iterator[str]:
        """Return everything as JSON lines; what is undefined is null."""
        head: dict[str, Any] = {
            "kind": "comparison",
            "splits": msgspec.to_builtins(self.splits),
            "names": self.names,
            "paths": self.paths,
            "metric": self.metric,
            "is_share": self.is_share,
            "n_examples": self.n_examples,
            "notes": self.notes,
            "commands": self.commands,
        }
        yield to_line(head)
        rows: Sequence[Row | CurvePoint | Pair] = (*self.rows, *self.curves, *self.pairs)
        for each in rows:
            record = msgspec.to_builtins(each, enc_hook=np.generic.item)
            kind = {"CurvePoint": "curve", "Pair": "pair"}.get(type(each).__name__)
            yield to_line({"kind": kind, **record} if kind else record)


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON; numbers that JSON has not are null.

    >>> to_line({"x": [1.5, math.nan]})
    '{"x": [1.5, null]}'
    """
    return json.dumps(_plain(record))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
