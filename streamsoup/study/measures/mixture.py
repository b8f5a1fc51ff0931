"""A mixture of some of a study's ingredients, by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from streamsoup.recipe import Coefficients

__all__ = ["Mixture"]


class Mixture(msgspec.Struct, frozen=True):
    """Some of the ingredients, and their coefficients."""

    members: tuple[int, ...]
    """Numbers of ingredients, in the order of the sum."""
    coefficients: Coefficients
    """One factor for each member."""

    @classmethod
    def uniform(cls, members: Sequence[int]) -> Mixture:
        """Return the mean of the members; one member is the ingredient itself."""
        return cls(tuple(members), Coefficients.uniform(len(members)))

    @classmethod
    def of(cls, members: Sequence[int], values: Sequence[float]) -> Mixture:
        """Return the mixture with these factors; members whose factor is zero are left out."""
        used = [(i, c) for i, c in zip(members, values, strict=True) if c != 0]
        if [c for _, c in used] == [1.0]:
            return cls.uniform([used[0][0]])
        return cls(tuple(i for i, _ in used), Coefficients.given([c for _, c in used]))
