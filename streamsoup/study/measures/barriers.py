"""What lies on the straight line between two checkpoints: barriers, and what the middle gains.

For an error (or loss) E along θ(α) = (1−α)·θ₀ + α·θ₁ two definitions are in use:

* *over the mean of the ends*: max_α E(α) − (E(0) + E(1)) / 2, the instability of Frankle et al.
  2020, https://arxiv.org/abs/1912.05671;
* *over the chord*: max_α [E(α) − ((1−α)·E(0) + α·E(1))], of Entezari et al. 2021,
  https://arxiv.org/abs/2110.06296. It is 0 where all is below the chord, the ends being on it.

They differ where the ends do. The interpolation advantage of a score s is s(½) − (s(0) + s(1)) / 2:
Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from streamsoup.errors import RecipeError, is_plain

__all__ = ["Barrier", "advantage", "barrier", "parse_alphas"]


class Barrier(msgspec.Struct, frozen=True):
    """The barrier of one path, in both definitions; in the unit of the errors."""

    over_mean: float
    """max E(α) − (E(0) + E(1)) / 2."""
    over_chord: float
    """max [E(α) − ((1−α)·E(0) + α·E(1))]; 0 or more."""
    alpha: float
    """Where the second one is reached."""


def barrier(alphas: Sequence[float], errors: Sequence[float]) -> Barrier:
    """Measure the barrier of errors at some points of a path; what is between them goes unseen.

    `alphas` hold 0 and 1; points beyond them are left out. Raises `RecipeError` without the ends.

    >>> barrier([0, 0.5, 1], [0.1, 0.4, 0.3])
    Barrier(over_mean=0.2, over_chord=0.2, alpha=0.5)
    """
    at = {float(a): float(e) for a, e in zip(alphas, errors, strict=True)}
    if 0.0 not in at or 1.0 not in at:
        raise RecipeError("a barrier needs the errors at both ends, α = 0 and α = 1")
    inside = sorted(a for a in at if 0 <= a <= 1)
    over = [at[a] - ((1 - a) * at[0.0] + a * at[1.0]) for a in inside]
    highest = int(np.argmax(over))  # a NaN, if there is one: its height is unknown there
    mean = (at[0.0] + at[1.0]) / 2
    over_mean = float(np.max([at[a] for a in inside])) - mean
    return Barrier(over_mean, float(np.maximum(over[highest], 0.0)), inside[highest])


def advantage(first: float, middle: float, second: float) -> float:
    """Return the interpolation advantage of a score, from those at α = 0, ½ and 1."""
    return middle - (first + second) / 2


def parse_alphas(text: str, of: str = "α") -> list[float]:
    """Read ``0:1:0.1`` (from, to, step; both ends included) or a list ``0,0.5,1``.

    `of` says what the numbers are of, for the message of the `RecipeError`.

    >>> parse_alphas("0:1:0.25")
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    try:
        if not is_plain(text):
            raise ValueError
        if ":" not in text:
            alphas = [float(part) for part in text.split(",")]
        else:
            low, high, step = (float(part) for part in text.split(":"))
            n = round((high - low) / step)
            if not 1 <= n <= 10_000 or abs(low + n * step - high) > 1e-9 * max(1.0, abs(high)):
                raise ValueError
            # By division, so that 0.1 · 3 is 0.3 and the last one is `high`.
            alphas = [float(round(low + (high - low) * i / n, 12)) for i in range(n + 1)]
    except (ValueError, ZeroDivisionError, OverflowError):
        alphas = [float("nan")]
    if not np.isfinite(alphas).all():
        raise RecipeError(
            f"{text!r} is not a list of {of} such as 0,0.5,1, nor a range such as 0:1:0.1, whose "
            "step divides it into 10000 parts at most"
        )
    return sorted(set(alphas))
