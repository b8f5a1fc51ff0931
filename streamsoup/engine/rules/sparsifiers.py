"""What of a task vector is kept: its largest elements, all but the outliers, or random ones.

A sparsifier is data, with a density for each ingredient; METHODS of the same names:

* `Largest`: TIES. Yadav et al. 2023, https://arxiv.org/abs/2306.01708.
* `Middle`: Model Breadcrumbs. Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795.
* `Random`: DARE. Yu et al. 2023, https://arxiv.org/abs/2311.03099.
* `Ranked`: DELLA. Deep et al. 2024, https://arxiv.org/abs/2406.11617.

Magnitudes are those of the float64 differences; of equal ones, that with the lowest flat index
counts as the larger. A density of 1 keeps everything, whatever the sparsifier.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from streamsoup.errors import RecipeError, count

__all__ = ["Largest", "Middle", "Random", "Ranked", "Sparsifier"]


class _Kind(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    density: tuple[float, ...]
    """``(ingredient,)``: the share of the elements that is kept, 0 to 1."""

    n_selections: ClassVar[int] = 0
    """How many selections of the largest it takes for each ingredient."""

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` for a density that is none, or for too few or too many."""
        check_each("density", self.density, n_ingredients)
        for density in self.density:
            if not 0 <= density <= 1:
                raise RecipeError(f"density must be between 0 and 1, got {density}")


class Largest(_Kind, tag="largest", frozen=True):
    """Keep the ``max(1, int(density·n))`` largest magnitudes; none for a density of 0."""

    n_selections = 1

    def n_largest(self, ingredient: int, n: int) -> int:
        """Return how many of `n` elements are kept."""
        density = self.density[ingredient]
        return 0 if density <= 0 else min(n, max(1, int(density * n)))


class Middle(_Kind, tag="middle", frozen=True):
    """Drop the ``int(gamma·n)`` largest, and keep the ``int(density·n)`` that follow them.

    Where fewer than that are left, fewer outliers are dropped.
    """

    gamma: tuple[float, ...]
    """``(ingredient,)``: the share of outliers, 0 to 1."""

    n_selections = 2

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` for a share that is none."""
        super().check(n_ingredients)
        check_each("gamma", self.gamma, n_ingredients)
        for gamma in self.gamma:
            if not 0 <= gamma <= 1:
                raise RecipeError(f"gamma must be between 0 and 1, got {gamma}")

    def bounds(self, ingredient: int, n: int) -> tuple[int, int]:
        """Return how many of the largest of `n` are dropped, and how many of them end the rest."""
        kept = min(n, int(self.density[ingredient] * n))
        dropped = min(n - kept, int(self.gamma[ingredient] * n))
        return dropped, dropped + kept


class Random(_Kind, tag="random", frozen=True):
    """Keep each element with the probability `density`."""


class Ranked(_Kind, tag="ranked", frozen=True):
    """Keep each element with a probability that grows with its rank in its row.

    With r the rank of its magnitude, 0 for the smallest of the n of its row, that is
    ``(density − epsilon) + 2·epsilon·(r / (n − 1))``; of a row of one element, `density`. A row is
    all that lies behind the first dimension; a tensor of one dimension or none is one row.
    """

    epsilon: tuple[float, ...]
    """``(ingredient,)``: how far probabilities lie from the density, to both sides."""

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` unless all probabilities lie between 0 and 1, both excluded."""
        super().check(n_ingredients)
        check_each("epsilon", self.epsilon, n_ingredients)
        for density, epsilon in zip(self.density, self.epsilon, strict=True):
            fits = epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1
            if not fits and density != 1:
                raise RecipeError(
                    f"density {density} with epsilon {epsilon} makes probabilities of "
                    f"{density - epsilon:g} to {density + epsilon:g}, which must lie between 0 and "
                    "1, both excluded; choose a smaller epsilon, or a density of 1 to keep all"
                )


Sparsifier = Largest | Middle | Random | Ranked


def check_each(what: str, values: tuple[float, ...], n_ingredients: int) -> None:
    """Raise `RecipeError` unless there is one value for each ingredient."""
    if len(values) != n_ingredients:
        raise RecipeError(
            f"{what}: {count(len(values), 'value')} for {count(n_ingredients, 'ingredient')} "
            "besides the base; give one, or one for each"
        )
