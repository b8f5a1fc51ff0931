"""Several rules, each for tensors of its own: parameters that differ from layer to layer.

For rules that hold their parameters once; `Linear` and `TaskVectors` have them for each tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from streamsoup.engine.rules.elementwise import NearSwap, Ram
from streamsoup.engine.rules.sce import Sce
from streamsoup.errors import RecipeError, some
from streamsoup.rule import Reduction, RuleMemory
from streamsoup.tensors import TensorSpec

__all__ = ["ByTensor"]


class ByTensor(msgspec.Struct, frozen=True, tag="by_tensor", forbid_unknown_fields=True):
    """The rule of each tensor, applied to it alone."""

    rules: tuple[Sce | Ram | NearSwap, ...]
    """The first is that of all tensors which `of` does not name."""
    of: dict[str, int] = {}
    """By the name of a tensor, the number of its rule."""

    spans_model = False

    @property
    def n_passes(self) -> int:
        """Those of the rule that has the most."""
        return max((rule.n_passes for rule in self.rules), default=1)

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` unless every rule fits, and every tensor has one."""
        if not self.rules or not all(0 <= n < len(self.rules) for n in self.of.values()):
            raise RecipeError("by_tensor: each tensor needs one of the rules")
        for rule in self.rules:
            rule.check(n_ingredients, names)
        strangers = [name for name in self.of if name not in names]
        if strangers:
            raise RecipeError(f"parameters for tensors that no ingredient has: {some(strangers)}")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count what the dearest of the rules holds."""
        each = [rule.memory(tensors, n_ingredients) for rule in self.rules]
        return RuleMemory(
            per_element=max(memory.per_element for memory in each),
            per_leaf=max(memory.per_leaf for memory in each),
            per_group=max(memory.per_group for memory in each),
            fixed=sum(memory.fixed for memory in each) + 300 * len(self.of),
            reads_elsewhere=any(memory.reads_elsewhere for memory in each),
        )

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> Reduction:
        """Return the rule of the one tensor at work."""
        rule = self.rules[self.of.get(tensors[0].name, 0)]
        return rule.reduction(tensors, n_ingredients)
