"""What the kernels of `merging` have to know of an ingredient: the words of its row."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "DIGITS",
    "DRAWN",
    "LANES",
    "MASKED",
    "N_WORDS",
    "RANKED",
    "ROW",
    "TILE",
    "WHOLE",
]

TILE = 512
"""Elements that are worked on at once: base, sum and products stay in a first cache."""

LANES = 64
"""Lanes in which a grain's magnitudes are summed: part of the law of `engine.rules.grains`."""

DIGITS = 1 << 16
"""Digits that a pass of a selection counts."""

WHOLE, RANKED, DRAWN, MASKED = range(4)
"""What is kept: everything, magnitudes between two thresholds, what is drawn at random, or what a
mask says."""


class _Row(NamedTuple):
    """Places of the words, as numba knows them: numbers of a tuple."""

    address: int
    """Of the block's first element."""
    kind: int
    """Its dtype: `constants.KINDS`."""
    counts: int
    """Address of ``(DIGITS,) int32`` to count in; 0 to skip the ingredient."""
    low: int
    high: int
    """The interval of keys that digits tell apart: `engine.rules.selection`."""
    shift: int
    """Bits of a key below its digit; if it is negative, keys that equal `low` are counted, in the
    first word of `counts`."""
    how: int
    """What is kept."""
    lowest: int
    left: int
    """Keys from `lowest` on are kept, and the first `left` of those just below it."""
    dropped: int
    dropped_left: int
    """The same, of keys that are dropped again."""
    key_low: int
    key_high: int
    """Key of the random words."""
    limit: int
    """Words below it are kept."""
    first: int
    """Flat index of the block's first element."""
    mask: int
    """Address of ``(element,) uint8``."""
    sums: int
    """Address of ``(2, grain) float64``, for sums of |d| and |S(d)|; 0 to skip the ingredient."""
    n_grains: int


ROW = _Row(*range(len(_Row._fields)))
N_WORDS = len(ROW)
