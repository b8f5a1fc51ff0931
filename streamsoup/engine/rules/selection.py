"""The k-th largest of more numbers than fit in memory, exactly, in a few passes.

Elements are ordered by magnitude, and equal magnitudes by index: the lower index counts as the
larger. So every element has a rank of its own, and "the k largest" is one set, whatever the threads
or blocks. Magnitudes are compared by their *keys*: the bits of the float64, as integers, which
order as the magnitudes do.

A radix select finds the key of rank k. A pass counts the *digits* of all keys. With a level of
three numbers, `low`, `high` and `shift`, the digit of a key is

* 0 for the key 0, 1 for other keys below `low`, and the largest for keys from `high` on;
* between those, with c = (key − low) >> shift, 2·c + 2 if the bits below `shift` are all zero, so
  that there is one such key, and 2·c + 3 for the other keys of the same c.

So an even digit is one magnitude, and an odd one an open interval. The counts say which digit the
key of rank k has. One magnitude ends the search; of an interval, few keys are collected in one more
pass, and sorted, and many are counted again, at a finer level.

Differences of fine-tunes stored in 16 bits have few bits: their digits are mostly even, and the
first pass ends the search. Those of float32 take a second one, which collects.

Where only some of the elements that equal the threshold are kept, they are the first ones. A leaf
counts them as it goes, so it is enough to know in which leaf the last of them lies, and how many
are kept there. Each leaf keeps the counts of some digits about the one where its own rank k lies;
if the threshold is among them for every leaf, that is known at once, else another pass counts.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels.merge_rows import DIGITS

__all__ = ["COLLECTED", "MOST_KEY", "N_PASSES", "Cut", "Level", "Selection"]

Floats = NDArray[np.float64]
Keys = NDArray[np.int64]

COLLECTED = 1 << 19
"""Elements that are few enough to be sorted in memory: 16 bytes each."""

MOST_KEY = (1 << 63) - 1
"""A key larger than any."""

BAND = 64
"""Digits whose counts each leaf keeps: of magnitudes up to 1.5 to 3 percent around its own."""

N_PASSES = 7
"""Measuring passes at most: six levels (shifts of 42, 48, 35, 22, 9 and 0 bits) and one that counts
ties. One or two are usual."""


class Level(NamedTuple):
    """The keys that the digits of a pass tell apart."""

    low: int
    high: int
    """Keys from `low` on and below `high`; both are multiples of ``1 << shift``."""
    shift: int


FIRST = Level((1023 - 30) << 52, (1023 + 1) << 52, 42)
"""Magnitudes from 2⁻³⁰ on and below 2, by 10 bits of their fraction."""


class Cut:
    """What a leaf keeps: keys from `lowest` on, and the first `left` of those just below it."""

    def __init__(self, lowest: int, left: int) -> None:
        """Begin a leaf; `left` is counted down."""
        self.lowest, self.left = lowest, left

    def kept(self, magnitudes: Floats) -> NDArray[np.bool_]:
        """Return which of the next elements are kept ``(element,)``."""
        keys = magnitudes.view(np.int64)
        kept: NDArray[np.bool_] = keys >= self.lowest
        if self.left > 0:
            tied = np.flatnonzero(keys == self.lowest - 1)[: self.left]
            kept[tied] = True
            self.left -= len(tied)
        return kept


class Selection:
    """Finds which of `n` elements, given in any order of blocks, are the `k` largest."""

    def __init__(self, k: int, n: int, *, most: int = COLLECTED) -> None:
        """Select `k` of `n` elements, sorting `most` in memory; all, or none, are known at once."""
        self._n, self._most = n, most
        self.mode: Literal["digits", "keys", "ties"] = "keys" if n <= most else "digits"
        """What a pass counts or collects: digits, keys of an interval, or one key."""
        self.level = FIRST
        self.interval = (-1, MOST_KEY)
        """Keys between these two, both excluded, are collected; ties are of the first."""
        self._above = 0
        """Elements that are larger than all of the interval, or than the ties."""
        self._starts: list[int] = []
        """Of each leaf of a pass, the index of its first element."""
        self._counts: NDArray[np.int64] | None = None
        """Of a pass under way alone: a model has a selection for every tensor and ingredient."""
        self._bands: list[tuple[int, NDArray[np.int32]]] = []
        """Of each leaf, the first of some digits, and their counts; or the count of ties."""
        self._found: list[NDArray[np.int64]] = []
        self._lowest = MOST_KEY
        self._cut = (0, 0)
        """The leaf, by its first element, in which only some ties are kept, and how many."""
        self.select(k)

    def select(self, k: int) -> None:
        """Select `k` instead, which the first pass may tell; before it ends."""
        self._k = k
        self.measuring = 0 < k < self._n
        self._lowest = 0 if k >= self._n > 0 else MOST_KEY

    @property
    def most_found(self) -> int:
        """Most keys that a leaf collects."""
        return self._most

    def counts_like(self, other: Selection) -> bool:
        """Return True if both count the same in the present pass, which may be done once."""
        same = self.mode == other.mode != "keys"
        return same and (self.level, self.interval) == (other.level, other.interval)

    def start(self) -> Any:
        """Return the empty state of a leaf: counts, or collected keys."""
        if self.mode == "keys":
            return []
        return np.zeros(DIGITS if self.mode == "digits" else 1, np.int32)

    def measure(self, state: Any, magnitudes: Floats, start: int) -> None:
        """Measure the elements from index `start` on ``(element,) float64``, none below zero."""
        keys = magnitudes.view(np.int64)
        if self.mode == "digits":
            state += np.bincount(_digits(keys, self.level), minlength=DIGITS).astype(np.int32)
        elif self.mode == "ties":
            state += np.int32(np.count_nonzero(keys == self.interval[0]))
        else:
            low, high = self.interval
            places = np.flatnonzero((keys > low) & (keys < high))
            state.append(np.stack([keys[places], places + start]))

    def merge(self, state: Any, start: int) -> None:
        """Add the state of a measured leaf, whose first element has index `start`."""
        self._starts.append(start)
        if self.mode == "keys":
            self._found += state
        elif self.mode == "ties":
            self._bands.append((0, state))
        else:
            if self._counts is None:
                self._counts = np.zeros(DIGITS, np.int64)
            self._counts += state
            n_elements = int(state.sum())
            rank = max(1, min(n_elements, self._k * n_elements // max(1, self._n)))
            first = max(0, _of_rank(state, rank)[0] - BAND // 2) if n_elements else 0
            self._bands.append((first, state[first : first + BAND].copy()))

    def end_pass(self) -> None:
        """Fix the threshold, or where to look for it."""
        if self.mode == "digits":
            self._end_digits()
        elif self.mode == "keys":
            self._end_keys()
        else:
            self._end_ties([int(counts[0]) for _, counts in self._bands])
        self._counts, self._found, self._starts, self._bands = None, [], [], []

    def _end_digits(self) -> None:
        """Fix the digit of the key of rank k, and if it is one magnitude, the threshold."""
        assert self._counts is not None
        digit, self._above = _of_rank(self._counts, self._k)
        n_equal, wanted = int(self._counts[digit]), self._k - self._above
        low, high = _keys_of(digit, self.level)
        if n_equal == wanted:
            self._keep_from(low if high == low else low + 1)
        elif high == low:
            self.interval = (low, low)
            tied = [
                int(c[digit - first]) for first, c in self._bands if first <= digit < first + len(c)
            ]
            if len(self._starts) == 1 or len(tied) == len(self._starts):
                self._end_ties(tied or [n_equal])
            else:
                self.mode = "ties"
        elif n_equal <= self._most:
            self.mode, self.interval = "keys", (low, high)
        else:
            self.level = _within(low, high)

    def _end_keys(self) -> None:
        """Sort what was collected: the threshold is the last that is kept."""
        keys, places = np.concatenate(self._found, axis=1)
        order = np.lexsort((-places, keys))[::-1][: self._k - self._above]
        key = int(keys[order[-1]])
        tied = places[order[keys[order] == key]]
        if len(tied) == np.count_nonzero(keys == key):
            self._keep_from(key)
            return
        starts = sorted(self._starts)
        begin = starts[bisect_right(starts, int(tied[-1])) - 1]
        self._keep_from(key + 1, (begin, int(np.count_nonzero(tied >= begin))))

    def _end_ties(self, tied: list[int]) -> None:
        """Find the leaf in which the last of the ties that are kept lies."""
        left = self._k - self._above
        for start, n_tied in sorted(zip(self._starts, tied, strict=True)):
            if left <= n_tied:
                self._keep_from(self.interval[0] + 1, (start, left))
                return
            left -= n_tied
        raise AssertionError("there are fewer ties than were counted before")

    def _keep_from(self, lowest: int, cut: tuple[int, int] = (0, 0)) -> None:
        """Keep keys from `lowest` on, and ties up to the `cut`."""
        self._lowest, self._cut, self.measuring = lowest, cut, False

    def cut(self, start: int) -> Cut:
        """Return what the leaf keeps that begins at index `start`."""
        begin, left = self._cut
        if start < begin:
            return Cut(self._lowest - 1, 0)
        return Cut(self._lowest, left if start == begin else 0)


def _digits(keys: Keys, level: Level) -> Keys:
    """Return the digits of keys ``(element,)``."""
    low, high, shift = level
    digits = ((keys - low) >> shift) * 2 + 2 + ((keys & ((1 << shift) - 1)) != 0)
    digits = np.where(keys < low, keys != 0, digits)
    return np.where(keys < high, digits, DIGITS - 1)


def _keys_of(digit: int, level: Level) -> tuple[int, int]:
    """Return the one key of a digit, twice; or between which keys, both excluded, those of it lie.

    >>> _keys_of(7, Level(1024, 8192, 4))
    (1056, 1072)
    """
    low, high, shift = level
    if digit == 0:
        return 0, 0
    if digit == 1:
        return 0, low
    if digit == DIGITS - 1:
        return high - 1, MOST_KEY
    key = low + ((digit - 2) // 2 << shift)
    return (key, key) if digit % 2 == 0 else (key, key + (1 << shift))


def _within(low: int, high: int) -> Level:
    """Return the level that tells the keys between two others apart: by 14 bits more, or all."""
    low += low & 1  # above the largest of a level, they begin with an even key
    high = min(high, 0x7FF8 << 48 | 1 << 47)  # that of NaN is the largest
    shift = max(0, (high - low).bit_length() - 14)
    return Level(low, -(-high // (1 << shift)) << shift, shift)


def _of_rank(counts: NDArray[Any], k: int) -> tuple[int, int]:
    """Return the digit of the `k`-th largest, and how many elements have larger digits."""
    rows = counts.reshape(256, 256)
    sums = rows.sum(axis=1, dtype=np.int64)
    above = np.cumsum(sums[::-1])[::-1]
    row = int(np.flatnonzero(above >= k)[-1])
    rest = int(above[row] - sums[row])
    inner = np.cumsum(rows[row][::-1], dtype=np.int64)[::-1] + rest
    place = int(np.flatnonzero(inner >= k)[-1])
    return 256 * row + place, int(inner[place]) - int(rows[row, place])
