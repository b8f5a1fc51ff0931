"""Sums of sparse task vectors: θ = θ₀ + λ · Σᵢ wᵢ·S(dᵢ)·[agrees] / divisor.

dᵢ = θᵢ − θ₀ is the task vector of ingredient i; the base θ₀ is the first of the recipe. S keeps a
part of it (`sparsifiers`), with `rescale` made as large as before. With the consensus `sum`, each
element elects the sign of Σᵢ wᵢ·S(dᵢ), plus where that is zero, and what has another sign, or is
zero, has no part in it. With `normalize`, the divisor is Σᵢ wᵢ, of those that agree where there is
a consensus. TIES, DARE, Breadcrumbs and DELLA are such sums; `kernels.merges_reference` specifies
them element by element.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from streamsoup.engine.rules.sparsifiers import Largest, Middle, Ranked
from streamsoup.engine.rules.terms import MOST_COLLECTED, Terms, row_length
from streamsoup.errors import RecipeError, check_choice, option, some
from streamsoup.rule import RuleMemory
from streamsoup.tensors import TensorSpec

if TYPE_CHECKING:
    from streamsoup.engine.rules.merging import Merging

__all__ = ["TaskVectors", "Trim"]

Trim = Literal["tensor", "model"]

N_SELECTING = 7
"""Passes of a selection at most (`selection.N_PASSES`); one or two are usual."""


BAND_NBYTES = 500
"""Bytes that a selection keeps of each leaf from one pass to the next: `selection.BAND` counts, and
Python's own of the array, its tuple and its list (measured: 482)."""

LEAF = 1 << 22
"""Elements of a leaf (`engine.plan.LEAF`), for an estimate of how many there are."""


class TaskVectors(msgspec.Struct, frozen=True, tag="task_vectors", forbid_unknown_fields=True):
    """The base, and a sum of sparse task vectors: see the module."""

    terms: Terms
    per_tensor: dict[str, Terms] = {}
    """Those of single tensors, by name."""
    trim: Trim = "tensor"
    """How magnitudes are ranked: within each tensor, or over all, in the order of names."""
    seed: int = 0
    """Of random masks; see `kernels.philox`."""

    @property
    def _every(self) -> tuple[Terms, ...]:
        return (self.terms, *self.per_tensor.values())

    @property
    def n_passes(self) -> int:
        """One, with those that select the largest, and one for sums of magnitudes."""
        selects = N_SELECTING * any(terms.n_selections for terms in self._every)
        return 1 + selects + any(terms.measures_sums for terms in self._every)

    @property
    def usual_passes(self) -> int:
        """One of those that select, for checkpoints of 16 bits; float32 takes one more."""
        selects = any(terms.n_selections for terms in self._every)
        return 1 + selects + any(terms.measures_sums for terms in self._every)

    @property
    def spans_model(self) -> bool:
        """True if magnitudes are ranked over all tensors."""
        return self.trim == "model"

    def of(self, tensor: str) -> Terms:
        """Return the terms of a tensor."""
        return self.per_tensor.get(tensor, self.terms)

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` unless every parameter fits the ingredients."""
        if n_ingredients < 2:
            raise RecipeError("task vectors need a base and at least one ingredient besides it")
        for terms in self._every:
            terms.check(n_ingredients - 1)
        check_choice("trim", self.trim, ("tensor", "model"))
        strangers = [name for name in self.per_tensor if name not in names]
        if strangers:
            raise RecipeError(f"parameters for tensors that no ingredient has: {some(strangers)}")
        if self.trim == "model":
            if not isinstance(self.terms.sparsifier, Largest | Middle):
                raise RecipeError(
                    "trim: only magnitudes are ranked over the whole model; leave out "
                    f"{option('trim', 'model')}"
                )
            if any(terms.sparsifier != self.terms.sparsifier for terms in self._every):
                raise RecipeError(
                    "trim: a model that is trimmed as a whole has one density for each ingredient"
                )

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count products, a task vector and its mask; histograms, sums of grains, and rows."""
        n = n_ingredients - 1
        n_selections = n * max(terms.n_selections for terms in self._every)
        sums = 16 * n * (2 if any(terms.measures_sums for terms in self._every) else 0)
        row = 0
        for tensor in tensors:
            if isinstance(self.of(tensor.name).sparsifier, Ranked):
                row = max(row, row_length(tensor.shape))
        # A row that no block holds whole is read, ranked, and kept as a mask of each ingredient.
        rows = row * (72 + n)
        counts = 4 * 65536 * n_selections
        collected = (16 * 3 + 8) * MOST_COLLECTED if n_selections else 0
        grains = sums // 8 * 1024
        leaves = [1 + tensor.n_elements // LEAF for tensor in tensors]
        n_leaves = sum(leaves) if self.spans_model else max(leaves, default=0)
        return RuleMemory(
            per_element=8 * n + 64 + (72 if row else 0),
            per_leaf=counts + grains + rows,
            per_group=2 * counts
            + collected
            + BAND_NBYTES * n_selections * n_leaves
            + sums * (len(tensors) if self.spans_model else 1),
            reads_elsewhere=row > 0,
            compiles=True,
            fixed=1000 * len(self.per_tensor) + 200 * n * len(self.per_tensor),
        )

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Merging:
        """Return the sum at work on a group of tensors."""
        from streamsoup.engine.rules.merging import Merging

        return Merging(self.of, self.seed, tensors, n_ingredients - 1)
