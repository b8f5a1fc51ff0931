"""Merges that look at one element at a time: RAM, and NearSwap. One pass, nothing kept.

* RAM: https://arxiv.org/abs/2601.13572. What one ingredient changes is its change, what several
  change is the mean of theirs.
* NearSwap, of mergekit: the other where it lies near the base, less of it the further it lies.

The base is the first ingredient of the recipe; `kernels.merges_reference` specifies both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from streamsoup.errors import RecipeError
from streamsoup.rule import Block, RuleMemory
from streamsoup.system.buffers import Bytes
from streamsoup.tensors import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamsoup.kernels.merger import Merger

    Floats = NDArray[np.float64]

__all__ = ["NearSwap", "Ram"]

NEAREST = 1e-6
"""Distance by which t is divided at least."""


class Ram(msgspec.Struct, frozen=True, tag="ram", forbid_unknown_fields=True):
    """θ₀ + the mean of all dᵢ with |dᵢ| > epsilon, element by element."""

    epsilon: float = 1e-5
    """What an ingredient must change an element by to have a part in it."""

    n_passes = 1
    spans_model = False

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` for an epsilon below 0, and for a base alone."""
        if n_ingredients < 2:
            raise RecipeError("RAM needs a base and at least one ingredient besides it")
        if not 0 <= self.epsilon < math.inf:
            raise RecipeError(f"epsilon must be 0 or more, got {self.epsilon}")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count the base, one task vector, the sum and its divisor."""
        return RuleMemory(per_element=64, compiles=True)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> _Ram:
        """Return the rule at work."""
        return _Ram(self.epsilon, n_ingredients - 1)


class NearSwap(msgspec.Struct, frozen=True, tag="near_swap", forbid_unknown_fields=True):
    """w·b + (1 − w)·a with w = min(1, t / max(|a − b|, 1e-6)); a is the base."""

    t: float
    """Distance up to which the other is taken whole."""

    n_passes = 1
    spans_model = False

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` for a distance below 0, and for any number of others than one."""
        if n_ingredients != 2:
            raise RecipeError(
                f"NearSwap takes one ingredient besides the base, got {n_ingredients - 1}"
            )
        if not 0 <= self.t < math.inf:
            raise RecipeError(f"t must be 0 or more, got {self.t}")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count both, and the weight."""
        return RuleMemory(per_element=48)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> _NearSwap:
        """Return the rule at work."""
        return _NearSwap(self.t)


class _AtOnce:
    """A reduction that measures nothing."""

    measuring = False

    def start(self, tensor: TensorSpec, start: int) -> None:
        """Keep nothing between blocks."""

    def measure(self, state: None, block: Block) -> None:
        """Look at nothing beforehand."""

    def merge(self, state: None) -> None:
        """Keep nothing."""

    def end_pass(self) -> None:
        """Keep nothing."""


class _Ram(_AtOnce):
    merger: Merger | None = None
    """Compiled kernels, set by the engine if they are to be used; numpy has the same bits."""

    def __init__(self, epsilon: float, n: int) -> None:
        self._epsilon, self._n = epsilon, n

    def reduce(self, state: None, block: Block, out: Floats) -> None:
        """Add to the base the mean of what is changed."""
        import numpy as np

        from streamsoup.engine.rules.merging import add_to_base, task_vector

        base = block.values(0)
        moved, count = np.zeros(block.n), np.zeros(block.n)
        with np.errstate(all="ignore"):
            for i in range(self._n):
                task = task_vector(block.values(i + 1), base)
                # What is not finite is no change to be left out unseen.
                changed = ~(np.abs(task) <= self._epsilon)
                np.add(moved, task, out=moved, where=changed)
                count += changed
            moved /= np.maximum(count, 1.0)
            add_to_base(base, moved, out)

    def reduce_rounded(self, state: None, block: Block, dtype: DType, output: Bytes) -> bool:
        """Do the same in compiled loops, rounded; return True if a result is not finite."""
        import numpy as np

        from streamsoup.kernels.merge_rows import RANKED, ROW
        from streamsoup.kernels.merger import Rows

        assert self.merger is not None
        rows = Rows(block.raw, block.dtypes, block.n)
        rows.words[1:, ROW.how] = RANKED
        rows.words[1:, ROW.dropped] = np.iinfo(np.int64).max
        rows.words[1:, ROW.lowest] = np.float64(self._epsilon).view(np.int64) + 1
        bad, spoiled = self.merger.merge(
            rows,
            dtype,
            output,
            consensus=False,
            normalize=False,
            whole=1.0,
            scale=1.0,
            counts=True,
        )
        if bad:
            block.spoil()
        return spoiled


class _NearSwap(_AtOnce):
    def __init__(self, t: float) -> None:
        self._t = t

    def reduce(self, state: None, block: Block, out: Floats) -> None:
        """Mix both, by how near they lie."""
        import numpy as np

        a, b = block.values(0), block.values(1)
        same = a == b
        with np.errstate(all="ignore"):
            w = np.minimum(1.0, self._t / np.maximum(np.abs(a - b), NEAREST))
            np.multiply(b, w, out=out)
            w = 1.0 - w
            w *= a
            out += w
        np.copyto(out, a, where=same)
