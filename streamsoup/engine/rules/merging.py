"""The sum of sparse task vectors at work: thresholds, then sums of magnitudes, then elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.rules.grains import GrainTotals, grain_sums
from streamsoup.engine.rules.selection import MOST_KEY, Cut, Selection
from streamsoup.engine.rules.sparsifiers import Largest, Middle, Random, Ranked
from streamsoup.engine.rules.terms import MOST_COLLECTED, Terms, row_length
from streamsoup.kernels.merge_rows import DRAWN, MASKED, RANKED, ROW
from streamsoup.kernels.merger import Merger, Rows
from streamsoup.kernels.philox import key_of, words
from streamsoup.rule import GRAIN, Block
from streamsoup.system.buffers import Bytes
from streamsoup.tensors import DType, TensorSpec

__all__ = ["Merging", "add_to_base", "task_vector"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

RANGE = 2.0**-32
"""What makes a random word a fraction of its range, exactly."""

NEARLY_ZERO = 1e-8
"""Sum of the coefficients in magnitude, below which it divides nothing."""


def task_vector(values: Floats, base: Floats) -> Floats:
    """Make dᵢ of `values`, in place: 0 where both are the same, infinite ones too."""
    same = None if np.isfinite(values).all() else values == base
    with np.errstate(all="ignore"):
        values -= base
    if same is not None:
        values[same] = 0.0
        values[np.isnan(values)] = np.nan  # one bit pattern, as magnitudes are ranked by theirs
    return values


def add_to_base(base: Floats, moved: Floats, out: Floats) -> None:
    """Fill `out` with the base where nothing has moved it, bit for bit; else with their sum."""
    np.add(base, moved, out=out)
    np.copyto(out, base, where=moved == 0)


class _Leaf:
    """What a leaf shows in one pass, or keeps between its blocks."""

    def __init__(self, tensor: TensorSpec, index: int, n_ingredients: int) -> None:
        self.name, self.index = tensor.name, index
        """The tensor, and the index of the leaf's first element among all of the group."""
        self.counts: dict[tuple[int, int], Any] = {}
        """Of selections that are not finished, by ingredient and number."""
        self.cuts: dict[tuple[int, int], Cut] = {}
        """Of selections that are finished."""
        self.whole: list[list[Floats]] = [[] for _ in range(n_ingredients)]
        """Sums of |d|, grain by grain, of each ingredient."""
        self.kept: list[list[Floats]] = [[] for _ in range(n_ingredients)]
        """Sums of |S(d)|."""
        self.rows: dict[int, tuple[int, int, Mask]] = {}
        """Of each ingredient, the last row that was longer than a block, and its mask."""


class Merging:
    """θ₀ + λ · Σᵢ wᵢ·S(dᵢ)·[agrees] / divisor over a group of tensors."""

    merger: Merger | None = None
    """Compiled kernels, set by the engine if they are to be used; numpy has the same bits."""

    def __init__(
        self, of: Callable[[str], Terms], seed: int, tensors: Sequence[TensorSpec], n: int
    ) -> None:
        """Begin with nothing measured; there are `n` ingredients besides the base."""
        self._seed, self._n = seed, n
        ends = accumulate((tensor.n_elements for tensor in tensors), initial=0)
        self._offsets = dict(zip((tensor.name for tensor in tensors), ends, strict=False))
        """Index of the first element of each tensor among all of the group."""
        self._terms = {tensor.name: of(tensor.name) for tensor in tensors}
        n_elements = sum(tensor.n_elements for tensor in tensors)
        self._selections = _selections(self._terms[tensors[0].name], n, n_elements)
        self._selecting = any(s.measuring for each in self._selections for s in each)
        self._summing = any(terms.measures_sums for terms in self._terms.values())
        self._sums = {
            name: (GrainTotals(n), GrainTotals(n))
            for name, terms in self._terms.items()
            if terms.measures_sums
        }
        """Of |d| and of |S(d)|, by tensor."""
        self.measuring = self._selecting or self._summing

    def start(self, tensor: TensorSpec, start: int) -> _Leaf:
        """Begin a leaf."""
        leaf = _Leaf(tensor, self._offsets[tensor.name] + start, self._n)
        for i, selections in enumerate(self._selections):
            for number, selection in enumerate(selections):
                if selection.measuring:
                    leaf.counts[i, number] = selection.start()
                elif not self._selecting:
                    leaf.cuts[i, number] = selection.cut(leaf.index)
        return leaf

    def measure(self, leaf: _Leaf, block: Block) -> None:
        """Count magnitudes, or add them up."""
        if self._selecting:
            self._select(leaf, block)
        elif self._terms[leaf.name].measures_sums:
            self._sum(leaf, block)

    def _select(self, leaf: _Leaf, block: Block) -> None:
        """Show a block to the selections that are not finished."""
        if self.merger is not None:
            self._select_compiled(self.merger, leaf, block)
            return
        index = self._offsets[leaf.name] + block.start
        base = block.values(0)
        for i, selections in enumerate(self._selections):
            if any((i, number) in leaf.counts for number in range(len(selections))):
                magnitudes = np.abs(task_vector(block.values(i + 1), base))
                for number, selection in enumerate(selections):
                    if (i, number) in leaf.counts:
                        selection.measure(leaf.counts[i, number], magnitudes, index)

    def _select_compiled(self, merger: Merger, leaf: _Leaf, block: Block) -> None:
        """Do the same in compiled loops: one call counts for all ingredients."""
        index = self._offsets[leaf.name] + block.start
        n_numbers = max(len(selections) for selections in self._selections)
        for number in range(n_numbers):
            rows, counts = Rows(block.raw, block.dtypes, block.n), False
            for i, selections in enumerate(self._selections):
                if (i, number) not in leaf.counts:
                    continue
                selection, state = selections[number], leaf.counts[i, number]
                row = rows.words[i + 1]
                if selection.mode == "keys":
                    row[[ROW.low, ROW.high]] = selection.interval
                    keys, places, bad = merger.collect(rows, i + 1, selection.most_found)
                    state.append(np.stack([keys, places + index]))
                    if bad:
                        block.spoil()
                elif number == 1 and (i, 0) in leaf.counts and selection.counts_like(selections[0]):
                    leaf.counts[i, 1] = leaf.counts[i, 0]  # counted already
                else:
                    row[[ROW.low, ROW.high, ROW.shift]] = selection.level
                    if selection.mode == "ties":
                        row[[ROW.low, ROW.shift]] = selection.interval[0], -1
                    row[ROW.counts] = state.ctypes.data
                    counts = True
            if counts and merger.count(rows):
                block.spoil()

    def _sum(self, leaf: _Leaf, block: Block) -> None:
        """Add up the magnitudes of a block, and those of what is kept."""
        if self.merger is not None:
            rows = self._rows(leaf, block)
            sums = np.zeros((self._n, 2, -(-block.n // GRAIN)))
            for row, own in zip(rows.words[1:], sums, strict=True):
                row[[ROW.sums, ROW.n_grains]] = own.ctypes.data, own.shape[1]
            if self.merger.total(rows):
                block.spoil()
            self._count_down(leaf, rows)
            for i, (whole, kept) in enumerate(sums):
                leaf.whole[i].append(whole)
                leaf.kept[i].append(kept)
            return
        base = block.values(0)
        for i in range(self._n):
            task = task_vector(block.values(i + 1), base)
            mask = self._kept(i, leaf, block, task)
            np.abs(task, out=task)
            leaf.whole[i].append(grain_sums(task))
            if mask is not None:
                task[~mask] = 0.0
            leaf.kept[i].append(grain_sums(task))

    def merge(self, leaf: _Leaf) -> None:
        """Add what a leaf showed."""
        for (i, number), counts in leaf.counts.items():
            self._selections[i][number].merge(counts, leaf.index)
        for i in range(self._n):
            for whole, kept in zip(leaf.whole[i], leaf.kept[i], strict=True):
                self._sums[leaf.name][0].add(i, whole)
                self._sums[leaf.name][1].add(i, kept)

    def end_pass(self) -> None:
        """Fix more of each threshold; or end with the sums."""
        if not self._selecting:
            self._summing = self.measuring = False
            return
        for selections in self._selections:
            for selection in selections:
                if selection.measuring:
                    selection.end_pass()
        self._selecting = any(s.measuring for each in self._selections for s in each)
        self.measuring = self._selecting or self._summing

    def reduce(self, leaf: _Leaf, block: Block, out: Floats) -> None:
        """Add to the base what is kept, and agrees."""
        terms = self._terms[leaf.name]
        base = block.values(0)
        with np.errstate(all="ignore"):
            products = [self._product(i, leaf, block, base) for i in range(self._n)]
            total = np.zeros(block.n)
            for product in products:
                total += product
            if terms.consensus == "sum":
                total = _agreed(products, total, terms)
            elif terms.normalize:
                total /= _whole(terms)
            if terms.scale != 1.0:
                total *= terms.scale
            add_to_base(base, total, out)

    def reduce_rounded(self, leaf: _Leaf, block: Block, dtype: DType, output: Bytes) -> bool:
        """Do the same in compiled loops, rounded; return True if a result is not finite."""
        assert self.merger is not None
        terms = self._terms[leaf.name]
        rows = self._rows(leaf, block)
        for i, coefficient in enumerate(terms.coefficients):
            keeps = rows.words[i + 1, ROW.how] != 0
            rows.numbers[i + 1] = self._factor(i, leaf.name) if keeps else 1.0, coefficient
        bad, spoiled = self.merger.merge(
            rows,
            dtype,
            output,
            consensus=terms.consensus == "sum",
            normalize=terms.normalize,
            whole=_whole(terms),
            scale=terms.scale,
        )
        self._count_down(leaf, rows)
        if bad:
            block.spoil()
        return spoiled

    def _rows(self, leaf: _Leaf, block: Block) -> Rows:
        """Return what the compiled loops have to know of a block, and of what is kept."""
        rows = Rows(block.raw, block.dtypes, block.n)
        sparsifier = self._terms[leaf.name].sparsifier
        base: Floats | None = None
        for i, row in enumerate(rows.words[1:]):
            if sparsifier is None or sparsifier.density[i] == 1:
                continue
            if isinstance(sparsifier, Largest | Middle):
                row[[ROW.how, ROW.dropped]] = RANKED, MOST_KEY
                *dropped, kept = (leaf.cuts[i, n] for n in range(len(self._selections[i])))
                row[[ROW.lowest, ROW.left]] = kept.lowest, kept.left
                for cut in dropped:
                    row[[ROW.dropped, ROW.dropped_left]] = cut.lowest, cut.left
            elif isinstance(sparsifier, Random) or row_length(block.tensor.shape) == 1:
                row[[ROW.how, ROW.first]] = DRAWN, block.start
                row[[ROW.key_low, ROW.key_high]] = key_of(self._seed, i, leaf.name)
                # A word below density·2³², which is exact, is one below the next whole number.
                row[ROW.limit] = math.ceil(sparsifier.density[i] / RANGE)
            else:
                base = block.values(0) if base is None else base
                mask = self._ranked(
                    i, leaf, block, task_vector(block.values(i + 1), base), sparsifier
                )
                row[[ROW.how, ROW.mask]] = MASKED, rows.keep(mask)
        return rows

    def _count_down(self, leaf: _Leaf, rows: Rows) -> None:
        """Note how many ties the next blocks of a leaf have left to keep."""
        for (i, number), cut in leaf.cuts.items():
            is_kept = number == len(self._selections[i]) - 1
            cut.left = int(rows.words[i + 1, ROW.left if is_kept else ROW.dropped_left])

    def _product(self, i: int, leaf: _Leaf, block: Block, base: Floats) -> Floats:
        """Make wᵢ·S(dᵢ)."""
        terms = self._terms[leaf.name]
        task = task_vector(block.values(i + 1), base)
        mask = self._kept(i, leaf, block, task)
        if mask is not None:
            task[~mask] = 0.0
            task *= self._factor(i, leaf.name)
        task *= terms.coefficients[i]
        return task

    def _factor(self, i: int, name: str) -> float:
        """Return what `rescale` multiplies by."""
        terms = self._terms[name]
        if terms.rescale == "l1":
            whole, kept = (sums.totals[i] for sums in self._sums[name])
            return whole / kept if kept > 0 else 1.0
        if terms.rescale == "density" and terms.sparsifier is not None:
            density = terms.sparsifier.density[i]
            return 1.0 / density if density > 0 else 1.0
        return 1.0

    def _kept(self, i: int, leaf: _Leaf, block: Block, task: Floats) -> Mask | None:
        """Return the mask of a block ``(element,)``; None if everything is kept."""
        sparsifier = self._terms[leaf.name].sparsifier
        if sparsifier is None or sparsifier.density[i] == 1:
            return None
        density = sparsifier.density[i]
        if isinstance(sparsifier, Largest):
            return leaf.cuts[i, 0].kept(np.abs(task))
        if isinstance(sparsifier, Middle):
            magnitudes = np.abs(task)
            dropped = leaf.cuts[i, 0].kept(magnitudes)
            return leaf.cuts[i, 1].kept(magnitudes) & ~dropped
        length = row_length(block.tensor.shape)
        if isinstance(sparsifier, Random) or length == 1:
            return self._random(i, leaf.name, block.start, block.n) < density
        return self._ranked(i, leaf, block, task, sparsifier)

    def _random(self, i: int, name: str, start: int, n: int) -> Floats:
        """Return the random fractions of elements ``(n,)``, 0 to 1, 1 excluded."""
        fractions: Floats = np.multiply(
            words(key_of(self._seed, i, name), start, n), RANGE, dtype=np.float64
        )
        return fractions

    def _ranked(self, i: int, leaf: _Leaf, block: Block, task: Floats, sparsifier: Ranked) -> Mask:
        """Rank the rows that a block lies in, all of each, and draw what is kept."""
        length = row_length(block.tensor.shape)
        end = block.start + block.n
        first = block.start // length * length
        last = -(-end // length) * length
        begin, stop, mask = leaf.rows.get(i, (0, 0, np.zeros(0, np.bool_)))
        if not begin <= block.start <= end <= stop:
            begin, stop = first, last
            parts = [
                self._elsewhere(i, block, first, block.start),
                task,
                self._elsewhere(i, block, end, last),
            ]
            tasks = np.concatenate(parts).reshape(-1, length)
            density, epsilon = sparsifier.density[i], sparsifier.epsilon[i]
            least, spread = density - epsilon, 2 * epsilon
            if self.merger is not None:
                key = key_of(self._seed, i, leaf.name)
                mask = self.merger.rank(tasks, key, first, least, spread).ravel()
            else:
                chances = least + spread * (_ranks(np.abs(tasks)) / (length - 1))
                mask = self._random(i, leaf.name, first, last - first) < chances.ravel()
            leaf.rows.pop(i, None)
            if last - first > block.n:
                leaf.rows[i] = first, last, mask
        return mask[block.start - begin : end - begin]

    def _elsewhere(self, i: int, block: Block, start: int, stop: int) -> Floats:
        """Return the task vector of elements outside of the block."""
        if start == stop:
            return np.zeros(0)
        values = block.values_at(i + 1, start, stop - start)
        return task_vector(values, block.values_at(0, start, stop - start))


def _selections(terms: Terms, n_ingredients: int, n_elements: int) -> list[list[Selection]]:
    """Return the selections of each ingredient."""
    most = MOST_COLLECTED // max(1, n_ingredients * terms.n_selections)
    found: list[list[Selection]] = []
    for i in range(n_ingredients):
        sizes: tuple[int, ...] = ()
        if isinstance(terms.sparsifier, Largest):
            sizes = (terms.sparsifier.n_largest(i, n_elements),)
        elif isinstance(terms.sparsifier, Middle):
            sizes = terms.sparsifier.bounds(i, n_elements)
        found.append([Selection(size, n_elements, most=most) for size in sizes])
    return found


def _whole(terms: Terms) -> float:
    """Return what divides a sum that is normalized without a consensus."""
    whole = 0.0
    for coefficient in terms.coefficients:
        whole += coefficient
    return whole if abs(whole) >= NEARLY_ZERO else 1.0


def _agreed(products: Sequence[Floats], total: Floats, terms: Terms) -> Floats:
    """Return the sum of what has the elected sign, by its coefficients if it is normalized."""
    plus = total >= 0
    agreed, divisor = np.zeros_like(total), np.zeros_like(total)
    for product, coefficient in zip(products, terms.coefficients, strict=True):
        agrees = np.where(plus, product > 0, product < 0)
        np.add(agreed, product, out=agreed, where=agrees)
        np.add(divisor, coefficient, out=divisor, where=agrees)
    agreed[np.isnan(total)] = np.nan
    if terms.normalize:
        divisor[divisor == 0] = 1.0
        agreed /= divisor
    return agreed


def _ranks(magnitudes: Floats) -> NDArray[np.int64]:
    """Return the rank of each in its row ``(row, element)``, 0 for the smallest.

    Of equal ones the first counts as the larger: in rows turned around, a stable sort says so.
    """
    order = np.argsort(magnitudes[:, ::-1], axis=1, kind="stable")
    ranks = np.empty_like(order)
    n = magnitudes.shape[1]
    np.put_along_axis(ranks, n - 1 - order, np.arange(n)[None, :], axis=1)
    return ranks
