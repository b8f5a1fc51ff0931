"""Averages of the checkpoints of a training run, whose coefficients follow from their order.

* EMA of saved checkpoints: m₁ = θ₁, mᵢ = d·mᵢ₋₁ + (1−d)·θᵢ, so θᵢ has (1−d)·dⁿ⁻ⁱ, θ₁ has dⁿ⁻¹.
* LAWA: the mean of the latest k checkpoints. Kaddour 2022, https://arxiv.org/abs/2209.14981.
* WSM: merging checkpoints of a constant learning rate stands in for its decay. A curve of
  gradient weights w₁ ≥ … ≥ wₖ gives c₀ = 1−w₁, cⱼ = wⱼ−wⱼ₊₁, cₖ = wₖ. Tian et al. 2025,
  https://arxiv.org/abs/2507.17634.

Their checkpoints are chosen by `checkpoints`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from msgspec.structs import replace

from streamsoup.errors import RecipeError, check_choice, count
from streamsoup.methods.best import best_of
from streamsoup.methods.checkpoints import By, Given, choose
from streamsoup.methods.closed import make_linear
from streamsoup.methods.records import Direction
from streamsoup.options import Options, take
from streamsoup.output.make import Soup
from streamsoup.recipe import Coefficients

__all__ = ["ema", "lawa", "wsm"]

Curve = Literal["linear", "cosine", "sqrt"]


def ema(
    checkpoints: Given,
    decay: float = 0.9,
    *,
    by: By | None = None,
    best: int | None = None,
    metric: str | None = None,
    direction: Direction | None = None,
    every: int = 1,
    last: int | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the exponential moving average of `checkpoints` into the folder `output`.

    Args:
        checkpoints: Oldest first; or the folder of a run, whose checkpoints are ordered by step.
        decay: What a step leaves of the average so far, ``0 ≤ d < 1``; the first checkpoint starts
            it.
        by: What the checkpoints are ordered by: ``step``, ``name``, ``time``, or ``given`` to take
            them as they are, whatever their steps.
        best: Take only this many, the best by `metric`; they stay in their order.
        metric: Its name in the records of the run, such as ``eval_loss``.
        direction: Which values are the best, ``lowest`` or ``highest``; None where the run says so,
            and for losses.
        every: Take the newest, and every `every`-th counted back from it.
        last: Then take this many of the newest.
        output: The folder to make.
        options: How it is made.

    Returns:
        The soup.

    Raises:
        RecipeError: For checkpoints whose steps do not rise, and as `uniform`.

    Costs as for `uniform`.
    """
    decay = take("float", "decay", decay)
    if not 0 <= decay < 1:
        raise RecipeError(f"decay {decay} is not between 0 and 1, 1 excluded")
    choice = choose(
        checkpoints, by=by, best=best_of(best, metric, direction), every=every, last=last
    )
    factors = ema_factors(len(choice.checkpoints), decay)
    report = {"decay": decay, **choice.report}
    return make_linear(
        choice.ingredients, factors, "ema", report, output, options, warnings=choice.warnings
    )


def ema_factors(n: int, decay: float) -> list[float]:
    """Return the coefficients of `n` checkpoints, oldest first, in an average that keeps `decay`.

    >>> ema_factors(3, 0.5)
    [0.25, 0.25, 0.5]
    """
    factors = [(1 - decay) * decay ** (n - 1 - i) for i in range(n)]
    factors[:1] = [decay ** (n - 1)] if n else []
    return factors


def lawa(
    checkpoints: Given,
    window: int | None = None,
    *,
    by: By | None = None,
    best: int | None = None,
    metric: str | None = None,
    direction: Direction | None = None,
    every: int = 1,
    last: int | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the mean of the latest `window` of `checkpoints` into the folder `output`.

    Args:
        checkpoints: Oldest first; or the folder of a run, whose checkpoints are ordered by step.
        window: How many of the latest; None where `last` says so.
        by: As for `ema`.
        best: As for `ema`.
        metric: As for `ema`.
        direction: As for `ema`.
        every: As for `ema`.
        last: As for `ema`.
        output: The folder to make.
        options: How it is made.

    Returns:
        The soup.

    Raises:
        RecipeError: For a window that does not fit, and as `ema`.

    Costs as for `uniform`, of the latest ones only.
    """
    choice = choose(
        checkpoints, by=by, best=best_of(best, metric, direction), every=every, last=last
    )
    n = len(choice.checkpoints)
    if window is None and last is None:
        raise RecipeError(
            f"how many of {count(n, 'checkpoint')} are averaged is not said; give a window"
        )
    window = n if window is None else take("int", "window", window)
    if not 1 <= window <= n:
        raise RecipeError(
            f"a window of {window} does not fit {count(n, 'checkpoint')}; give 1 to {n}"
        )
    latest = replace(choice, checkpoints=choice.checkpoints[n - window :])
    report = {"window": window, "n_given": n, **latest.report}
    coefficients = Coefficients.uniform(window)
    return make_linear(
        latest.ingredients, coefficients, "lawa", report, output, options, warnings=choice.warnings
    )


def wsm(
    checkpoints: Given,
    curve: Curve = "linear",
    *,
    by: By | None = None,
    best: int | None = None,
    metric: str | None = None,
    direction: Direction | None = None,
    every: int = 1,
    last: int | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the merge of `checkpoints` that stands in for a learning rate decay into `output`.

    The k+1 checkpoints were saved at even steps of a constant learning rate; the decay it stands
    in for begins at the first of them.

    Args:
        checkpoints: Oldest first; or the folder of a run, whose checkpoints are ordered by step.
        curve: With x = j/(k+1), ``linear`` (w = 1−x: the plain mean), ``cosine``
            (w = (1+cos πx)/2) or ``sqrt`` (w = 1−√x).
        by: As for `ema`.
        best: As for `ema`.
        metric: As for `ema`.
        direction: As for `ema`.
        every: As for `ema`.
        last: As for `ema`.
        output: The folder to make.
        options: How it is made.

    Returns:
        The soup.

    Raises:
        RecipeError: For a curve of another name, and as `ema`.

    Costs as for `uniform`.
    """
    choice = choose(
        checkpoints, by=by, best=best_of(best, metric, direction), every=every, last=last
    )
    coefficients = wsm_coefficients(len(choice.checkpoints), curve)
    report = {"curve": curve, **choice.report}
    return make_linear(
        choice.ingredients, coefficients, "wsm", report, output, options, warnings=choice.warnings
    )


def wsm_coefficients(n: int, curve: Curve) -> Coefficients:
    """Return the coefficients of `n` checkpoints for a decay curve.

    Factors that are fractions with a common divisor are whole numbers over it, so that the soup of
    a linear decay is the mean to the bit: 1/n is not a float for most n, and rounds ties elsewhere.

    >>> wsm_coefficients(4, "linear") == Coefficients.uniform(4)
    True
    >>> wsm_coefficients(3, "cosine") == Coefficients((1.0, 2.0, 1.0), 4.0)
    True
    """
    curves: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "sqrt": lambda x: 1 - math.sqrt(x),
    }
    check_choice("curve", curve, curves)
    weights = [curves[curve](j / n) for j in range(n)] + [0.0]
    factors = [weights[j] - weights[j + 1] for j in range(n)]
    return _over_common_divisor(factors) or Coefficients.given(factors)


def _over_common_divisor(factors: Sequence[float]) -> Coefficients | None:
    """Return factors as whole numbers over a small divisor, or None if they are not such fractions.

    They are differences of weights up to 1, which may be off by some units of 2^-53; fractions
    with divisors this small lie much further apart.
    """
    most = 4 * len(factors)
    exact = [Fraction(factor).limit_denominator(most) for factor in factors]
    near = all(abs(f - e) <= 2**-50 for f, e in zip(factors, exact, strict=True))
    divisor = math.lcm(*(each.denominator for each in exact))
    if not near or divisor > most or sum(exact) != 1:
        return None
    return Coefficients(tuple(float(each * divisor) for each in exact), float(divisor))
