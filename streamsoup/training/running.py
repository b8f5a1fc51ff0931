"""The methods whose average is one running sum: Σᵢ wᵢ·θᵢ over a divisor.

* ``uniform``: w = 1, and the divisor counts.
* ``wsm`` of n updates: the factors and the divisor of `wsm_coefficients`, one after the other.
* ``ema``: m₁ = θ₁, mᵢ = d·mᵢ₋₁ + (1−d)·θᵢ. With D the divisor so far, the same average is
  (Dm + wθ) / (D + w) for w = D·(1−d)/d; so old sums are never multiplied, and an update costs one
  product and one sum. D grows by 1/d at each update: sums and D are divided by a power of two
  before it is large, which is exact.
"""

from __future__ import annotations

import math

import msgspec

from streamsoup.errors import RecipeError
from streamsoup.methods.averages import wsm_coefficients
from streamsoup.recipe import Coefficients

__all__ = ["Step", "Weights"]

LARGEST = 2.0**16
"""Divisor of an EMA from which sums are scaled down."""

NO_DECAY = 2.0**-100
"""A decay below which nothing is left of the average before."""


class Step(msgspec.Struct, frozen=True):
    """What an update does to the sums."""

    factor: float
    """Times the new values."""
    fresh: bool
    """The sums start anew."""
    shift: int
    """The sums are first multiplied by two to the power of minus this."""


class Weights:
    """The factors and the divisor of a running average."""

    def __init__(self, coefficients: Coefficients | None, decay: float | None) -> None:
        """Begin an average.

        Args:
            coefficients: Of all updates, if their number is known.
            decay: Of an EMA. With neither, all updates count alike.
        """
        self.coefficients, self.decay = coefficients, decay
        self.n, self.divisor = 0, 0.0

    @property
    def keeps_equal(self) -> bool:
        """True for a mean, in which float64 that are equal in all updates stay as they are."""
        if self.coefficients is None:
            return self.decay is None
        return self.coefficients == Coefficients.uniform(len(self.coefficients.values))

    def next(self) -> Step:
        """Count an update, and return what it does. Raises `RecipeError` past the last one."""
        first = self.n == 0
        shift = 0
        if self.coefficients is not None:
            n = len(self.coefficients.values)
            if self.n == n:
                raise RecipeError(
                    f"wsm was begun for {n} updates, and this is one more; begin a new Average, or "
                    "keep a window: place=folder without n"
                )
            factor, self.divisor = self.coefficients.values[self.n], self.coefficients.divisor
        elif self.decay is None:
            factor = 1.0
            self.divisor += 1.0
        elif first or self.decay < NO_DECAY:
            factor, self.divisor, first = 1.0, 1.0, True
        else:
            if self.divisor > LARGEST:
                shift = math.frexp(self.divisor)[1] - 1
                self.divisor = math.ldexp(self.divisor, -shift)
            factor = self.divisor * (1.0 - self.decay) / self.decay
            self.divisor += factor
        self.n += 1
        return Step(factor, first, shift)

    def check_complete(self) -> None:
        """Raise `RecipeError` while there is nothing to divide yet."""
        wanted = 1 if self.coefficients is None else len(self.coefficients.values)
        if self.n < wanted:
            raise RecipeError(
                f"the average has had {self.n} of {wanted} updates; update it before it is used"
            )


def wsm_weights(n: int, curve: str) -> Coefficients:
    """Return the coefficients of `n` updates. Raises `RecipeError`."""
    if n < 1:
        raise RecipeError(f"n must be at least 1, got {n}")
    return wsm_coefficients(n, curve)  # type: ignore[arg-type]
