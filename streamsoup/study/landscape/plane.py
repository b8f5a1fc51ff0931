"""The plane through three checkpoints, as coefficients: its basis is never made.

With dᵢ = θᵢ − θ₀ and the Gram matrix gᵢⱼ = ⟨dᵢ, dⱼ⟩, Gram-Schmidt gives the axes u₁ = d₁/‖d₁‖ and
u₂ ∝ d₂ − ⟨d₂,u₁⟩·u₁, as in Garipov et al. 2018, https://arxiv.org/abs/1802.10026. A mixture with
coefficients (c₀, c₁, c₂) that sum to 1 lies at x = c₁·√g₁₁ + c₂·g₁₂/√g₁₁ and
y = c₂·√(g₂₂ − g₁₂²/g₁₁), and these two equations are solved for the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import RecipeError

__all__ = ["Plane"]

Floats = NDArray[np.float64]

FLAT = 1e-6
"""Sine of the angle below which three checkpoints lie on a line: rounding would rule the plane."""


class Plane(msgspec.Struct, frozen=True):
    """The plane through θ₀, θ₁ and θ₂; lengths are those of the space of weights."""

    length: float
    """‖d₁‖: θ₁ lies at (length, 0)."""
    along: float
    """⟨d₂, u₁⟩: θ₂ lies at (along, across)."""
    across: float
    """⟨d₂, u₂⟩."""

    @classmethod
    def from_gram(cls, gram: Floats) -> Plane:
        """Return the plane of ⟨dᵢ, dⱼ⟩ ``(2, 2)``, or ``(3, 3)`` with the zeros of θ₀ first.

        Raises `RecipeError` where the three are on one line, or two of them are equal.
        """
        g = gram[1:, 1:] if len(gram) == 3 else gram
        length = math.sqrt(max(float(g[0, 0]), 0.0))
        other = math.sqrt(max(float(g[1, 1]), 0.0))
        if length == 0 or other == 0:
            raise RecipeError(
                "no plane goes through three checkpoints of which two are equal; give others"
            )
        along = float(g[0, 1]) / length
        across = math.sqrt(max(other**2 - along**2, 0.0))
        if across <= FLAT * other:
            raise RecipeError("the three checkpoints lie on one line; interpolate shows that")
        return cls(length, along, across)

    @property
    def corners(self) -> tuple[tuple[float, float], ...]:
        """Where θ₀, θ₁ and θ₂ lie."""
        return (0.0, 0.0), (self.length, 0.0), (self.along, self.across)

    def place(self, coefficients: Sequence[float]) -> tuple[float, float]:
        """Return the place (x, y) of a mixture with coefficients (c₀, c₁, c₂), which sum to 1."""
        _, c1, c2 = coefficients
        return c1 * self.length + c2 * self.along, c2 * self.across

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """Return the coefficients (c₀, c₁, c₂) of the mixture at a place; they sum to 1."""
        c2 = y / self.across
        c1 = (x - c2 * self.along) / self.length
        return 1.0 - c1 - c2, c1, c2

    def grid(self, n: int, margin: float) -> tuple[Floats, Floats]:
        """Return `n` places along each axis, `margin` of the extent beyond the outermost corners.

        Steps are the same along both axes, so that nothing looks stretched; `n` is the count on
        the longer one.
        """
        xs, ys = zip(*self.corners, strict=True)
        wide, tall = max(xs) - min(xs), max(ys) - min(ys)
        edge = margin * max(wide, tall)
        step = (max(wide, tall) + 2 * edge) / (n - 1)

        def axis(low: float, high: float) -> Floats:
            count = math.ceil((high - low + 2 * edge) / step - 1e-9) + 1
            middle = (low + high) / 2
            places: Floats = middle + step * (np.arange(count) - (count - 1) / 2)
            return places

        return axis(min(xs), max(xs)), axis(min(ys), max(ys))
