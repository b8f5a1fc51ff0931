"""The Rule joint: what becomes of a tensor, given the same tensor of every ingredient.

A rule is frozen data, a part of the recipe, and is written into the provenance with all its
parameters. It makes a `Reduction` for each group of tensors that share statistics; the engine
plans, reads, cuts into blocks, rounds, writes, resumes and verifies, and knows no rule by name.

A merge method from outside the package is one class and one reduction:

1. `Reduction.start` begins a leaf (some millions of elements of one tensor, on one thread).
2. `Reduction.measure` looks at its blocks, in order, as long as `measuring` is true.
3. `Reduction.merge` takes what a leaf showed, leaf after leaf in one fixed order.
4. `Reduction.end_pass` is called after the last leaf; it may turn `measuring` off, or leave it on
   for another pass.
5. `Reduction.reduce` makes the elements of the soup, block by block, in float64. The engine rounds
   them once.

Blocks may be of any size, and leaves run on any thread: the result must not depend on either.
Counts and maxima never do. Sums of floats do, unless they are taken in one fixed order: blocks
begin at multiples of `GRAIN` elements of their tensor and end at one or with the tensor, so sums
over grains, added up in order, are the same for every size of block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from streamsoup.tensors import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["GRAIN", "Block", "Reduction", "Rule", "RuleMemory"]

GRAIN = 4096
"""Elements between the places at which blocks may begin and end."""


class RuleMemory(msgspec.Struct, frozen=True):
    """What a reduction holds, in bytes, beside the blocks that it is given."""

    per_element: int = 0
    """For each element of a block: temporary arrays of `measure` and `reduce`."""
    per_leaf: int = 0
    """What `start` returns; each thread holds one or two."""
    per_group: int = 0
    """What a reduction keeps from one pass to the next."""
    fixed: int = 0
    """What the rule itself holds: its parameters."""
    reads_elsewhere: bool = False
    """Whether it calls `Block.values_at`, which takes a thread buffers of their own."""


class Block(Protocol):
    """The same range of elements of one tensor in every ingredient; valid during one call."""

    tensor: TensorSpec
    """The tensor as it will be in the soup."""
    start: int
    """Flat index (C order) of the first element: a multiple of `GRAIN`."""
    n: int
    """Number of elements."""
    dtypes: Sequence[DType]
    """``(ingredient,)``: the dtypes in which the ingredients store it."""
    raw: Sequence[memoryview]
    """``(ingredient,)``: its little-endian bytes in each."""

    def values(self, ingredient: int) -> Floats:
        """Return an ingredient's elements ``(element,) float64``, in memory of the caller's own.

        Costs 8 bytes for each element, which `Rule.memory` has to count. What is not finite is
        reported as by `spoil`.
        """

    def values_at(self, ingredient: int, start: int, n: int) -> Floats:
        """Return elements `start` to ``start + n`` of the same tensor ``(n,) float64``.

        For statistics of what reaches beyond a block, such as rows. Costs reading them once more,
        and 8 bytes for each, which `Rule.memory` has to count, with `reads_elsewhere`.
        """

    def spoil(self) -> None:
        """Report that an ingredient holds a NaN or an Inf here, which ends the run unless told.

        For reductions that look at `raw`: `values` reports it itself.
        """


class Reduction(Protocol):
    """A rule at work on one group of tensors. Several threads call it at once."""

    measuring: bool
    """Whether another measuring pass is needed before `reduce`."""

    def start(self, tensor: TensorSpec, start: int) -> Any:
        """Begin the leaf of `tensor` at flat index `start`; return the state of this pass."""

    def measure(self, state: Any, block: Block) -> None:
        """Look at the next block of a leaf. Changes `state` alone."""

    def merge(self, state: Any) -> None:
        """Take a leaf's measurements. Called in the order of leaves, never by two threads."""

    def end_pass(self) -> None:
        """Conclude a measuring pass: every leaf of the group was merged."""

    def reduce(self, state: Any, block: Block, out: Floats) -> None:
        """Fill `out` ``(element,) float64`` with the soup. Changes `state` and `out` alone."""


@runtime_checkable
class Rule(Protocol):
    """What becomes of the tensors of all ingredients: a frozen `msgspec.Struct` with a ``tag``."""

    @property
    def n_passes(self) -> int:
        """How many times the ingredients are read, at most: measuring passes, and the last one."""

    @property
    def spans_model(self) -> bool:
        """Whether all tensors share their statistics; else each tensor has its own."""

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` unless the rule fits ingredients with tensors of these names."""

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Return the most that a reduction of these tensors holds; the plan counts with it."""

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Reduction:
        """Return a reduction for a group of tensors, in the order in which leaves are merged."""
