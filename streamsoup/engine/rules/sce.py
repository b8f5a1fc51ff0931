"""SCE: select by variance, calculate coefficients by energy, erase minority signs.

Wan et al. 2024, https://arxiv.org/abs/2408.07990. The base is the first ingredient of the recipe;
`kernels.merges_reference.sce` specifies the rule element by element.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from streamsoup.errors import RecipeError
from streamsoup.rule import Block, RuleMemory
from streamsoup.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamsoup.engine.rules.selection import Cut, Selection

    Floats = NDArray[np.float64]

__all__ = ["Sce"]

N_SELECTING = 7
"""Passes of a selection at most (`selection.N_PASSES`); two or three are usual."""

MOST_COLLECTED = 1 << 17
"""Keys that a selection sorts in memory."""

SMALLEST_ENERGY = 1e-6
"""Sum of all energies, below which ingredients count alike."""

SMALLEST_DIVISOR = 1e-6


class Sce(msgspec.Struct, frozen=True, tag="sce", forbid_unknown_fields=True):
    """Of the elements that vary most, what agrees in sign, weighted by the energy of each."""

    select_topk: float = 1.0
    """The share of the elements that vary which is taken, 0 to 1; 1 takes all."""

    spans_model = False

    @property
    def n_passes(self) -> int:
        """Those that select, one for energies, and the last."""
        return 2 + (N_SELECTING if self.select_topk < 1 else 0)

    @property
    def usual_passes(self) -> int:
        """Two that select, one for energies, and the last."""
        return 4 if self.select_topk < 1 else 2

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` for a share that is none, and for a base alone."""
        if n_ingredients < 2:
            raise RecipeError("SCE needs a base and at least one ingredient besides it")
        if not 0 <= self.select_topk <= 1:
            raise RecipeError(f"select_topk must be between 0 and 1, got {self.select_topk}")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count task vectors and their variance; one histogram, and keys to be sorted."""
        n = n_ingredients - 1
        selects = self.select_topk < 1
        return RuleMemory(
            per_element=8 * n + 80,
            per_leaf=(4 * 65536 if selects else 0) + 8 * 1024 * n,
            per_group=(8 * 65536 + 56 * MOST_COLLECTED if selects else 0) + 64 * n,
        )

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> _Sce:
        """Return the rule at work on one tensor."""
        return _Sce(self, tensors[0].n_elements, n_ingredients - 1)


class _Leaf:
    """What a leaf shows in one pass."""

    def __init__(self, start: int, n_ingredients: int) -> None:
        self.start = start
        self.counts: object = None
        self.cut: Cut | None = None
        self.n_varying = 0
        self.squares: list[list[Floats]] = [[] for _ in range(n_ingredients)]
        """Sums of dᵢ² of grains, by ingredient."""


class _Sce:
    """Variances first, then energies, then elements."""

    def __init__(self, rule: Sce, n_elements: int, n: int) -> None:
        from streamsoup.engine.rules.grains import GrainTotals
        from streamsoup.engine.rules.selection import Selection

        self._rule, self._n_elements, self._n = rule, n_elements, n
        self._selection: Selection | None = None
        if rule.select_topk < 1:
            # The first pass counts what varies, and how many that is to be.
            self._selection = Selection(n_elements, n_elements + 1, most=MOST_COLLECTED)
        self._selecting = self._selection is not None
        self._n_varying = 0
        self._counted = False
        """True once the first pass, which counts what varies, has ended."""
        self._energies = GrainTotals(n)
        self._weights: list[float] = []
        self.measuring = True

    def start(self, tensor: TensorSpec, start: int) -> _Leaf:
        """Begin a leaf."""
        leaf = _Leaf(start, self._n)
        if self._selection is not None and self._selecting:
            leaf.counts = self._selection.start()
        elif self._selection is not None:
            leaf.cut = self._selection.cut(start)
        return leaf

    def measure(self, leaf: _Leaf, block: Block) -> None:
        """Count variances, or add up energies."""
        from streamsoup.engine.rules.grains import grain_sums

        tasks = self._tasks(block)
        if self._selection is not None and self._selecting:
            variances = self._variances(tasks)
            leaf.n_varying += int((variances != 0).sum())
            self._selection.measure(leaf.counts, variances, block.start)
            return
        for task, squares in zip(self._masked(tasks, leaf), leaf.squares, strict=True):
            task *= task
            squares.append(grain_sums(task))

    def merge(self, leaf: _Leaf) -> None:
        """Add what a leaf showed."""
        if self._selection is not None and self._selecting:
            self._selection.merge(leaf.counts, leaf.start)
            self._n_varying += 0 if self._counted else leaf.n_varying
            return
        for i, squares in enumerate(leaf.squares):
            for sums in squares:
                self._energies.add(i, sums)

    def end_pass(self) -> None:
        """Fix more of the threshold; or end with the weights."""
        if self._selection is not None and self._selecting:
            if not self._counted:
                self._counted = True
                self._selection.select(int(self._n_varying * self._rule.select_topk))
            if self._selection.measuring:
                self._selection.end_pass()
            self._selecting = self._selection.measuring
            return
        energies = [total / max(1, self._n_elements) for total in self._energies.totals]
        whole = 0.0
        for energy in energies:
            whole += energy
        alike = not whole >= SMALLEST_ENERGY
        self._weights = [1 / self._n if alike else energy / whole for energy in energies]
        self.measuring = False

    def reduce(self, leaf: _Leaf, block: Block, out: Floats) -> None:
        """Add to the base the weighted mean of what agrees."""
        import numpy as np

        from streamsoup.engine.rules.merging import add_to_base

        with np.errstate(all="ignore"):
            tasks = self._masked(self._tasks(block), leaf)
            elected = np.zeros(block.n)
            for task in tasks:
                elected += task
            plus = elected >= 0
            moved, divisor = np.zeros(block.n), np.zeros(block.n)
            for task, weight in zip(tasks, self._weights, strict=True):
                agrees = np.where(plus, task > 0, task < 0)
                task *= weight
                np.add(moved, task, out=moved, where=agrees)
                np.add(divisor, weight, out=divisor, where=agrees)
            moved[np.isnan(elected)] = np.nan
            moved /= np.maximum(divisor, SMALLEST_DIVISOR)
            add_to_base(block.values(0), moved, out)

    def _tasks(self, block: Block) -> list[Floats]:
        from streamsoup.engine.rules.merging import task_vector

        base = block.values(0)
        return [task_vector(block.values(i + 1), base) for i in range(self._n)]

    def _variances(self, tasks: Sequence[Floats]) -> Floats:
        """Return the mean of (dᵢ − mean)² of each element."""
        import numpy as np

        with np.errstate(all="ignore"):
            mean = np.zeros_like(tasks[0])
            for task in tasks:
                mean += task
            mean /= self._n
            variances = np.zeros_like(mean)
            for task in tasks:
                away = task - mean
                away *= away
                variances += away
            variances /= self._n
        variances[np.isnan(variances)] = np.nan
        return np.abs(variances)

    def _masked(self, tasks: list[Floats], leaf: _Leaf) -> list[Floats]:
        """Make zero what was not selected, in place."""
        if leaf.cut is not None:
            kept = leaf.cut.kept(self._variances(tasks))
            for task in tasks:
                task[~kept] = 0.0
        return tasks
