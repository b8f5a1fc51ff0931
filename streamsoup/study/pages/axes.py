"""A scale from numbers to pixels, with round numbers along it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

__all__ = ["Axis", "axis"]

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""Distances of ticks, times a power of ten."""

MARGIN = 0.06
"""Beyond the outermost values, as a part of the span."""


class Axis(msgspec.Struct, frozen=True):
    """A linear scale."""

    low: float
    high: float
    begin: float
    """The pixel of `low`."""
    end: float
    """The pixel of `high`."""
    step: float
    """The distance of the ticks."""

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values of the ticks, with their numbers as text."""
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        values = [n * self.step for n in range(first, last + 1)]
        large = max(abs(self.low), abs(self.high))
        places = max(0, -math.floor(math.log10(self.step) + 1e-9))
        if round(self.step, places) != self.step:  # 2.5 needs a place more
            places += 1
        if large >= 1e6 or self.step < 1e-5:
            digits = max(1, math.ceil(math.log10(large / self.step)) + 1)
            return [(value, f"{value:.{min(digits, 16)}g}") for value in values]
        return [(value, f"{value:.{places}f}") for value in values]


def axis(
    values: Iterable[float], begin: float, end: float, *, n_ticks: int, whole: bool = False
) -> Axis | None:
    """Return a scale that has room for all finite values; None where there is no such scale.

    >>> axis([0.0, 1.0], 0, 100, n_ticks=5).ticks()[0]
    (0.0, '0.00')
    >>> axis([-1e308, 1e308], 0, 100, n_ticks=5) is None
    True
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    span, large = high - low, max(abs(low), abs(high))
    if span <= 1e-9 * large or span < 1e-290:
        span = max(abs(large) / 50, 1e-290) if large else 1.0
        low, high = low - span, high + span
    low, high = low - MARGIN * span, high + MARGIN * span
    rough = (high - low) / n_ticks
    if not math.isfinite(rough) or not math.isfinite(high / rough):
        return None
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in STEPS if each * power >= rough * (1 - 1e-9))
    return Axis(low, high, begin, end, max(step, 1.0) if whole else step)
