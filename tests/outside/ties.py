"""TIES merging as a package outside of streamsoup would add it.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708: of each task vector the k largest magnitudes
are kept, one sign is elected for each element, and what agrees with it is averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np

from streamsoup import Block, RecipeError, RuleMemory, TensorSpec


class OutsideTies(msgspec.Struct, frozen=True, tag="outside-ties", forbid_unknown_fields=True):
    """θ₀ + mean of what agrees; the base is the first ingredient."""

    density: float

    n_passes = 6
    spans_model = False

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Refuse a density that keeps nothing, and a base alone."""
        if not 0 < self.density <= 1:
            raise RecipeError(f"density must be above 0 and at most 1, got {self.density}")
        if n_ingredients < 2:
            raise RecipeError("TIES needs a base and at least one ingredient")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count the base, one task vector, its key, and sums; a histogram for each task vector."""
        histograms = 8 * 65536 * (n_ingredients - 1)
        return RuleMemory(per_element=64, per_leaf=histograms, per_group=histograms)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Trim:
        """Return the trimming of one tensor."""
        return Trim(self, tensors[0].n_elements, n_ingredients - 1)


class Trim:
    """Exact thresholds, 16 bits of the magnitude a pass; of equal ones the first are kept."""

    def __init__(self, rule: OutsideTies, n: int, n_tasks: int) -> None:
        self.shift = 48
        """Bits below those that a pass counts by; below 0 it counts what equals the threshold."""
        self.prefix = np.zeros(n_tasks, np.uint64)
        self.left = np.full(n_tasks, max(1, int(rule.density * n)))
        """How many are still to be kept among those that equal the prefix."""
        self.histograms = np.zeros((n_tasks, 65536), np.int64)
        self.measuring = n > 0
        self.ties: dict[int, Any] = {}
        """By a leaf's start: how many equal the threshold there."""

    def start(self, tensor: TensorSpec, start: int) -> Any:
        """Begin a leaf: counts to be made, or the rank of its first tie."""
        if self.measuring and self.shift >= 0:
            return start, np.zeros_like(self.histograms)
        if self.measuring:
            return start, np.zeros_like(self.left)
        before = [counts for at, counts in self.ties.items() if at < start]
        return np.sum(before, axis=0, dtype=np.int64) + np.zeros_like(self.left)

    def tasks(self, block: Block) -> Any:
        """Yield each task vector with its magnitude as a whole number that orders alike."""
        base = block.values(0)
        for i in range(len(self.left)):
            task = block.values(i + 1) - base
            yield i, task, np.abs(task).view(np.uint64)

    def measure(self, state: Any, block: Block) -> None:
        """Count the next 16 bits of those that equal the prefix so far, or those themselves."""
        for i, _, key in self.tasks(block):
            if self.shift < 0:
                state[1][i] += np.count_nonzero(key == self.prefix[i])
                continue
            if self.shift < 48:
                key = key[key >> np.uint64(self.shift + 16) == self.prefix[i]]
            part = (key >> np.uint64(self.shift)) & np.uint64(0xFFFF)
            state[1][i] += np.bincount(part.astype(np.int64), minlength=65536)

    def merge(self, state: Any) -> None:
        """Add the counts of a leaf."""
        start, counts = state
        if self.shift < 0:
            self.ties[start] = counts
        else:
            self.histograms += counts

    def end_pass(self) -> None:
        """Fix 16 more bits of each threshold."""
        if self.shift < 0:
            self.measuring = False
            return
        for i, histogram in enumerate(self.histograms):
            above = np.cumsum(histogram[::-1])[::-1]
            digit = int(np.flatnonzero(above >= self.left[i])[-1])
            self.left[i] -= above[digit] - histogram[digit]
            self.prefix[i] = self.prefix[i] << np.uint64(16) | np.uint64(digit)
        self.histograms[:] = 0
        self.shift -= 16

    def reduce(self, state: Any, block: Block, out: Any) -> None:
        """Elect a sign, and add the mean of what agrees with it to the base."""
        kept = []
        for i, task, key in self.tasks(block):
            tied = key == self.prefix[i]
            ranks = state[i] + np.cumsum(tied)
            state[i] += np.count_nonzero(tied)
            keep = (key > self.prefix[i]) | (tied & (ranks <= self.left[i]))
            kept.append(np.where(keep, task, 0.0))
        total = np.zeros(block.n)
        for task in kept:
            total += task
        sign = np.where(total >= 0, 1.0, -1.0)
        agreed, count = np.zeros(block.n), np.zeros(block.n)
        for task in kept:
            agrees = np.sign(task) == sign
            agreed += np.where(agrees, task, 0.0)
            count += agrees
        base = block.values(0)
        out[:] = np.where(count > 0, base + agreed / np.maximum(count, 1.0), base)
