"""The Rule joint: how one tensor of the soup is made from that tensor of every ingredient.

A rule is frozen data, a part of the recipe, and is written into the provenance with all its
parameters. It makes a `Reduction` for each group of tensors that share statistics; the engine
plans, reads, cuts into blocks, rounds, writes, resumes and verifies, and knows no rule by name.

A merge method from outside the package is one class and one reduction:

1. `Reduction.start` begins a leaf (some millions of elements of one tensor, on one thread).
2. `Reduction.measure` is given its blocks, in order, as long as `measuring` is true.
3. `Reduction.merge` is given the state of each measured leaf, in one fixed order of leaves.
4. `Reduction.end_pass` is called after the last leaf; it may turn `measuring` off, or leave it on
   for another pass.
5. `Reduction.reduce` computes the elements of the soup, block by block, in float64. The engine
   rounds them once.

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

__all__ = ["GRAIN", "Block", "Reduction", "Rule", "RuleMemory", "usual_passes"]

GRAIN = 4096
"""Elements between the places at which blocks may begin and end."""


class RuleMemory(msgspec.Struct, frozen=True):
    """Bytes that a reduction holds, besides the blocks that it is given."""

    per_element: int = 0
    """Per element of a block: temporary arrays of `measure` and `reduce`."""
    per_leaf: int = 0
    """The state that `start` returns; each thread holds one or two."""
    per_group: int = 0
    """State that a reduction keeps from one pass to the next."""
    fixed: int = 0
    """The parameters of the rule itself."""
    reads_elsewhere: bool = False
    """True if it calls `Block.values_at`, which takes further buffers in each thread."""
    compiles: bool = False
    """True if it uses the compiled kernels of merges, which may have to be compiled first."""


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
        """Return an ingredient's elements in memory that the caller may change.

        Args:
            ingredient: Its number, from 0.

        Returns:
            ``(element,) float64``, exact. Costs 8 bytes per element, which `Rule.memory` must
            count. A NaN or an Inf is reported as by `spoil`.
        """

    def values_at(self, ingredient: int, start: int, n: int) -> Floats:
        """Return elements `start` to ``start + n`` of the same tensor ``(n,) float64``.

        For statistics of what reaches beyond a block, such as rows. Costs reading them once more,
        and 8 bytes for each, which `Rule.memory` has to count, with `reads_elsewhere`.
        """

    def spoil(self) -> None:
        """Report a NaN or an Inf in this block, which ends the run unless non-finite propagates.

        Only for reductions that read `raw`: `values` reports it itself.
        """


class Reduction(Protocol):
    """A rule applied to one group of tensors. Several threads call its methods at once."""

    measuring: bool
    """True while another measuring pass is needed before `reduce`."""

    def start(self, tensor: TensorSpec, start: int) -> Any:
        """Begin a leaf, in a measuring pass or in the last one.

        Args:
            tensor: The tensor as it will be in the soup.
            start: Flat index (C order) of the leaf's first element.

        Returns:
            The leaf's state for this pass; `RuleMemory.per_leaf` counts its bytes.
        """

    def measure(self, state: Any, block: Block) -> None:
        """Measure the next block of a leaf.

        Args:
            state: What `start` returned for the leaf; the only thing that may change.
            block: The block, valid during the call.
        """

    def merge(self, state: Any) -> None:
        """Merge a leaf's state into the group's. Called in order of leaves, by one at a time."""

    def end_pass(self) -> None:
        """End a measuring pass, after every leaf of the group was merged."""

    def reduce(self, state: Any, block: Block, out: Floats) -> None:
        """Compute a block of the soup.

        Args:
            state: What `start` returned for the leaf; may change.
            block: The block, valid during the call.
            out: ``(element,) float64``, to be filled.
        """


@runtime_checkable
class Rule(Protocol):
    """A merge method with all its parameters: a frozen `msgspec.Struct` with a ``tag``."""

    @property
    def n_passes(self) -> int:
        """Most passes over the ingredients: measuring passes, and the last one."""

    @property
    def spans_model(self) -> bool:
        """True if all tensors share their statistics; False if each tensor has its own."""

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Check the parameters against the ingredients, before a weight is read.

        Args:
            n_ingredients: Number of ingredients.
            names: Names of the tensors.

        Raises:
            RecipeError: The rule does not fit them.
        """

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Return the most that a reduction holds; the memory plan relies on it.

        Args:
            tensors: The tensors of all groups, as they will be in the soup.
            n_ingredients: Number of ingredients.
        """

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Reduction:
        """Return the reduction of one group.

        Args:
            tensors: The group's tensors, in the order in which their leaves are merged.
            n_ingredients: Number of ingredients.
        """


def usual_passes(rule: Rule) -> int:
    """Return how many passes a rule usually takes, for plans and progress.

    That is its ``usual_passes``, if it has such an attribute, else all of `Rule.n_passes`.
    """
    usual: int = getattr(rule, "usual_passes", rule.n_passes)
    return max(1, min(usual, rule.n_passes))
