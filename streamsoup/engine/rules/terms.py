"""What a sum of sparse task vectors is made of: the parameters that `task_vectors` explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from streamsoup.engine.rules.sparsifiers import Ranked, Sparsifier, check_each
from streamsoup.errors import RecipeError, check_choice

__all__ = ["MOST_COLLECTED", "Consensus", "Rescale", "Terms", "row_length"]

Consensus = Literal["sum", "none"]
Rescale = Literal["none", "l1", "density"]

MOST_COLLECTED = 1 << 17
"""Keys that all selections of a group together sort in memory, 16 bytes each."""


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the sum is made of."""

    coefficients: tuple[float, ...]
    """``(ingredient,)``: wᵢ; the base has none."""
    sparsifier: Sparsifier | None = None
    """What is kept of each task vector; None for everything."""
    scale: float = 1.0
    """λ, by which the sum is multiplied, unless it is 1."""
    consensus: Consensus = "none"
    normalize: bool = False
    rescale: Rescale = "none"
    """``l1``: what is kept is multiplied by Σ|d| / Σ|S(d)| of its tensor; ``density``: divided by
    its probability of being kept."""

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` for parameters that fit no `n_ingredients` besides the base."""
        check_each("coefficients", self.coefficients, n_ingredients)
        for value in (*self.coefficients, self.scale):
            if not math.isfinite(value):
                raise RecipeError(f"coefficients and lambda must be finite, got {value}")
        check_choice("consensus", self.consensus, ("sum", "none"))
        check_choice("rescale", self.rescale, ("none", "l1", "density"))
        if self.sparsifier is not None:
            self.sparsifier.check(n_ingredients)
        if self.rescale == "density" and isinstance(self.sparsifier, Ranked):
            raise RecipeError(
                "rescale: probabilities that grow with the rank are no one density; use l1 or none"
            )

    @property
    def measures_sums(self) -> bool:
        """True if sums of magnitudes are needed before an element can be made."""
        return self.rescale == "l1" and self.sparsifier is not None

    @property
    def n_selections(self) -> int:
        """How many selections of the largest an ingredient needs, at most."""
        return 0 if self.sparsifier is None else self.sparsifier.n_selections


def row_length(shape: Sequence[int]) -> int:
    """Return the length of the rows of a tensor: all that lies behind the first dimension."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
