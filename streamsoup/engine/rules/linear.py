"""The linear rule: Σᵢ cᵢ·θᵢ divided once, with coefficients for all tensors or for each.

Uniform, weighted, greedy and learned soups, moving averages, task arithmetic, SLERP and Model Stock
all end here. The engine has a form of its own for it (`engine.reduce.Mix`) that adds one ingredient
after the other; `_Sum` is the same arithmetic as any other rule would state it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from streamsoup.errors import RecipeError, some
from streamsoup.recipe import Coefficients
from streamsoup.rule import Block, RuleMemory
from streamsoup.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Linear"]

NUMBER_NBYTES = 160
"""Bytes that one coefficient of one tensor takes: as a number, and in the texts read and written.
 Measured: 123 and 143 bytes each, of 320,000 and of 1,280,000."""


class Linear(msgspec.Struct, frozen=True, tag="linear", forbid_unknown_fields=True):
    """θ = (Σᵢ cᵢ·θᵢ) / divisor, tensor by tensor."""

    coefficients: Coefficients

    n_passes = 1
    spans_model = False

    @property
    def is_copy(self) -> bool:
        """True if the soup is a copy of a single ingredient."""
        return self.coefficients.is_copy

    def keeps_equal(self, tensor: str, dtypes: Collection[str]) -> bool:
        """Return True if elements that are the same in all ingredients are kept, not summed.

        For means of float64 alone: the sum of equal values may be inexact; `kernels.reference`.
        """
        factors, divisor = self.coefficients.of(tensor)
        mean = divisor == len(factors) > 1 and set(factors) == {1.0}
        return mean and set(dtypes) == {"F64"}

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` unless there is one finite factor for each ingredient."""
        self.coefficients.check(n_ingredients)
        unknown = [name for name in self.coefficients.per_tensor if name not in names]
        if unknown:
            raise RecipeError(
                f"coefficients for tensors that no ingredient has: {some(unknown)}; leave those "
                "out, or take them from a soup of the same architecture"
            )

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Return the memory of one product per element, and of coefficients of single tensors."""
        own = NUMBER_NBYTES * sum(map(len, self.coefficients.per_tensor.values()))
        return RuleMemory(per_element=24, fixed=own)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> _Sum:
        """Return the plain form of the sum."""
        return _Sum(self)


class _Sum:
    """The specification in numpy: in recipe order, each product rounded and then added."""

    measuring = False

    def __init__(self, rule: Linear) -> None:
        self._rule = rule

    def start(self, tensor: TensorSpec, start: int) -> None:
        """Return None: no state is kept between blocks."""

    def measure(self, state: None, block: Block) -> None:
        """Do nothing: there are no measuring passes."""

    def merge(self, state: None) -> None:
        """Do nothing: there are no measuring passes."""

    def end_pass(self) -> None:
        """Do nothing: there are no measuring passes."""

    def reduce(self, state: None, block: Block, out: NDArray[np.float64]) -> None:
        """Sum, divide once, and keep what is the same in all ingredients of float64."""
        factors, divisor = self._rule.coefficients.of(block.tensor.name)
        first = block.values(0)
        equal = first == first  # False for NaN
        out[:] = factors[0] * first
        for i in range(1, len(factors)):
            values = block.values(i)
            equal &= values.view("u8") == first.view("u8")
            out += factors[i] * values
        if divisor != 1.0:
            out /= divisor
        if self._rule.keeps_equal(block.tensor.name, {dtype.name for dtype in block.dtypes}):
            out[equal] = first[equal]
