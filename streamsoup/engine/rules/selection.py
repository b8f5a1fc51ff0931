"""The k-th largest of more numbers than fit in memory, exactly, in a few passes.

Elements are ordered by magnitude, and equal magnitudes by index: the lower index counts as the
larger. So every element has a rank of its own, and "the k largest" is one set, whatever the threads
or blocks. The place of an element in that order is a *key* of 112 bits: the bits of the float64
magnitude (which order as the magnitudes do), then the bits of the index, inverted.

A radix select finds the key of rank k sixteen bits a pass:

1. Count, among the elements whose key begins with the prefix known so far, the next 16 bits.
2. The counts say which 16 bits the key of rank k has there, and how many of those that share them
   are still to be kept.
3. When all of them are, or they are few enough to be held in memory, this ends: the former needs no
   more passes; the latter are collected in one last pass, and sorted.

Fine-tunes stored in 16 bits take two measuring passes, three if a tensor is very large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLLECTED", "DIGITS", "N_PASSES", "Selection"]

Floats = NDArray[np.float64]

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
"""Counts of a pass: 4 bytes each of a leaf, 8 of all."""

N_MAGNITUDE = 4
N_INDEX = 3
N_PASSES = N_MAGNITUDE + N_INDEX + 1
"""Measuring passes at most: every digit of a key, and one to collect. Two or three are usual."""

COLLECTED = 1 << 19
"""Elements that are few enough to be sorted in memory: 16 bytes each."""


class Selection:
    """Finds which of `n` elements, given in any order of blocks, are the `k` largest."""

    def __init__(self, k: int, n: int, *, most: int = COLLECTED) -> None:
        """Select `k` of `n` elements, sorting `most` in memory; all, or none, are known at once."""
        self._n, self._most = n, most
        self.select(k)
        self._prefix: list[int] = []
        self._collects = False
        self._counts: NDArray[np.int64] | None = None
        """Of a pass under way alone: a model has a selection for every tensor and ingredient."""
        self._found: list[NDArray[np.uint64]] = []
        self._threshold, self._cut = np.uint64(0), np.uint64(0)
        """Kept is what lies above the threshold, or equals it at an index up to the cut."""

    def select(self, k: int) -> None:
        """Select `k` instead, which the first pass may tell; before it ends."""
        self.measuring = 0 < k < self._n
        self._everything = k >= self._n > 0
        self._left = k

    def start(self) -> Any:
        """Return the empty state of a leaf: counts, or collected keys."""
        return [] if self._collects else np.zeros(DIGITS, np.int32)

    def measure(self, state: Any, magnitudes: Floats, start: int) -> None:
        """Measure the elements from index `start` on ``(element,) float64``, none below zero."""
        keys = magnitudes.view(np.uint64)
        indices = None
        shift = 64
        for digit in self._prefix[:N_MAGNITUDE]:
            shift -= DIGIT_BITS
            matches = (keys >> np.uint64(shift)) & np.uint64(DIGITS - 1) == digit
            indices = np.flatnonzero(matches) if indices is None else indices[matches]
            keys = keys[matches]
        if len(self._prefix) < N_MAGNITUDE and not self._collects:
            digits = (keys >> np.uint64(shift - DIGIT_BITS)) & np.uint64(DIGITS - 1)
            _count(state, digits)
            return
        assert indices is not None
        inverted = ~(indices.astype(np.uint64) + np.uint64(start))
        shift = N_INDEX * DIGIT_BITS
        for digit in self._prefix[N_MAGNITUDE:]:
            shift -= DIGIT_BITS
            matches = (inverted >> np.uint64(shift)) & np.uint64(DIGITS - 1) == digit
            keys, inverted = keys[matches], inverted[matches]
        if self._collects:
            state.append(np.stack([keys, inverted]))
            return
        digits = (inverted >> np.uint64(shift - DIGIT_BITS)) & np.uint64(DIGITS - 1)
        _count(state, digits)

    @property
    def wanted(self) -> tuple[int, int, bool, int] | None:
        """What a compiled loop has to look for: prefix, bits below it, whether keys are collected.

        The last is how many at most. None where the digits of indices are counted.
        """
        if len(self._prefix) > N_MAGNITUDE or (
            len(self._prefix) == N_MAGNITUDE and not self._collects
        ):
            return None
        prefix = 0
        for digit in self._prefix:
            prefix = prefix << DIGIT_BITS | digit
        return prefix, 64 - DIGIT_BITS * len(self._prefix), self._collects, self._most

    def bounds(self, start: int, n: int) -> tuple[Any, int]:
        """Return a magnitude's bits above which elements are kept, and how many that equal them.

        Those are the first ones from index `start` on.
        """
        if self._everything:
            return np.uint64(0), n
        if self._left <= 0:
            return np.uint64(DIGITS**4 - 1), 0
        return self._threshold, min(max(int(self._cut) + 1 - start, 0), n)

    def merge(self, state: Any) -> None:
        """Add the state of a measured leaf."""
        if self._collects:
            self._found += state
        elif self._counts is None:
            self._counts = state.astype(np.int64)
        else:
            self._counts += state

    def end_pass(self) -> None:
        """Fix the next digit, or all of the key."""
        if self._collects:
            found = np.concatenate(self._found, axis=1)
            order = np.lexsort((found[1], found[0]))[::-1]
            self._threshold, inverted = found[:, order[self._left - 1]]
            self._cut = ~inverted
            self._found, self.measuring = [], False
            return
        assert self._counts is not None
        above = np.cumsum(self._counts[::-1])[::-1]
        digit = int(np.flatnonzero(above >= self._left)[-1])
        n_equal = int(self._counts[digit])
        self._left -= int(above[digit]) - n_equal
        self._prefix.append(digit)
        self._counts = None
        if n_equal == self._left:
            self._keep_all()
        elif n_equal <= self._most:
            self._collects = True

    def _keep_all(self) -> None:
        """Keep everything that begins with the prefix: the smallest key that does is the cut."""
        digits = [*self._prefix, *[0] * (N_MAGNITUDE + N_INDEX - len(self._prefix))]
        whole = 0
        for digit in digits:
            whole = whole << DIGIT_BITS | digit
        bits = N_INDEX * DIGIT_BITS
        self._threshold = np.uint64(whole >> bits)
        highest = (1 << bits) - 1
        self._cut = np.uint64(highest - (whole & highest))
        self.measuring = False

    def kept(self, magnitudes: Floats, start: int) -> NDArray[np.bool_]:
        """Return which of the elements from index `start` on are among the largest."""
        if self._everything:
            return np.ones(len(magnitudes), np.bool_)
        if self._left <= 0:
            return np.zeros(len(magnitudes), np.bool_)
        keys = magnitudes.view(np.uint64)
        kept: NDArray[np.bool_] = keys > self._threshold
        n_tied = min(max(int(self._cut) + 1 - start, 0), len(keys))
        kept[:n_tied] |= keys[:n_tied] == self._threshold
        return kept


def _count(counts: NDArray[np.int32], digits: NDArray[np.uint64]) -> None:
    """Add how often each digit occurs."""
    counts += np.bincount(digits.astype(np.int64), minlength=DIGITS).astype(np.int32)
