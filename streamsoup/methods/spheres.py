"""Means on a sphere as recipes of mergekit name them: Karcher, multi-SLERP, NuSLERP.

All that they do happens in the span of the ingredients, so their steps are algebra on the Gram
matrix of each tensor (`geometry`): one pass for it, and one for the linear rule it ends in. With a
base the vectors are task vectors, and the base is added; without, whole weights. uᵢ are the vectors
of unit length, wᵢ the weights, divided by their sum.

* Karcher: the point of the sphere from which the weighted directions to all uᵢ cancel (that of
  `slerp` for more than two), times Σ wᵢ‖θᵢ‖. https://arxiv.org/abs/2603.04972.
* Multi-SLERP: one step towards that point from the mean m of the uᵢ, brought to unit length:
  t = Σ wᵢ(uᵢ − ⟨uᵢ, m⟩m) is the tangent. Where m is that very mean, t is zero, as Σ wᵢuᵢ is a
  multiple of m; so the point is m, times Σ wᵢ‖θᵢ‖.
* NuSLERP, of two: (sin((1−t)Ω)·θ₁ + sin(tΩ)·θ₂) / sin Ω with t = w₂, of vectors as they are.

Where a vector is zero, or they lie opposite, or there is no angle, the mean is a straight one; the
report counts those tensors, and a warning names them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.cluster.choice import executing
from streamsoup.engine.rules.row_slerp import RowSlerp
from streamsoup.errors import RecipeError, count, some
from streamsoup.formats.ingredients import AnyIngredient, listed
from streamsoup.methods.closed import (
    about_zero,
    has_opposites,
    make_linear,
    measure_all,
    open_both,
    shares_of,
    sphere_factors,
    with_pass,
)
from streamsoup.options import Options, take
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, order
from streamsoup.recipe import Coefficients

__all__ = [
    "karcher",
    "karcher_factors",
    "make_means",
    "multislerp",
    "multislerp_factors",
    "nuslerp",
    "nuslerp_factors",
]

Floats = NDArray[np.float64]
FactorsOf = Callable[[Floats, Floats], Floats | None]
"""From a Gram matrix ``(vector, vector)`` and shares to factors; None where there are none."""

SHORTEST = 1e-9
"""Length of the mean of unit vectors, below which they cancel out."""

NO_ANGLE = 1e-16
"""1 − cos²Ω up to which two vectors are taken to lie on one line."""


def karcher(
    ingredients: Iterable[AnyIngredient],
    weights: Sequence[float] | None = None,
    *,
    base: AnyIngredient | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the Karcher mean of `ingredients`, tensor by tensor, into `output`.

    `weights` has one for each, none below 0 and not all 0, divided by their sum; None counts all
    alike. Angles are those of whole weights, or with a `base` of task vectors. Costs and errors as
    for `slerp`.
    """
    return _make(ingredients, weights, karcher_factors, "karcher", base, output, options)


def multislerp(
    ingredients: Iterable[AnyIngredient],
    weights: Sequence[float] | None = None,
    *,
    base: AnyIngredient | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the multi-SLERP of `ingredients`, tensor by tensor, into `output`.

    It is the weighted mean of the unit vectors, as long as the vectors are on average. Arguments,
    costs and errors as for `karcher`.
    """
    return _make(ingredients, weights, multislerp_factors, "multislerp", base, output, options)


def nuslerp(
    ingredients: Iterable[AnyIngredient],
    weights: Sequence[float] | None = None,
    *,
    base: AnyIngredient | None = None,
    row_wise: bool = False,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the NuSLERP of two `ingredients`, tensor by tensor, into `output`.

    The second weight, divided by their sum, is how far to go from the first to the second. With
    `row_wise`, each row of a tensor, which is all that lies behind its first dimension, turns by an
    angle of its own, in one pass. Other arguments, costs and errors as for `karcher`.
    """
    ingredients = listed(ingredients)
    if len(ingredients) != 2:
        raise RecipeError(
            f"NuSLERP goes from one ingredient to another, got {len(ingredients)}; for more, take "
            "karcher or multislerp"
        )
    if take("bool", "row_wise", row_wise):
        shares = shares_of([1.0, 1.0] if weights is None else weights, 2)
        rule = RowSlerp(float(shares[1]), based=base is not None)
        everything = [*([] if base is None else [base]), *ingredients]
        ordered = order(everything, rule, method="nuslerp", options=options)
        if base is not None:
            ordered = replace(ordered, report={"base": ordered.plan.ingredients[0].name})
        return make(ordered, output=output, options=options)
    return _make(ingredients, weights, nuslerp_factors, "nuslerp", base, output, options)


def karcher_factors(gram: Floats, shares: Floats) -> Floats | None:
    """Return the factors ``(vector,)`` of the Karcher mean; None where there is none."""
    point = sphere_factors(gram, shares)
    return None if point is None else _as_long_as_all(point, gram, shares)


def multislerp_factors(gram: Floats, shares: Floats) -> Floats | None:
    """Return the factors ``(vector,)`` of multi-SLERP; None where unit vectors cancel out."""
    norms = np.sqrt(np.diag(gram))
    if not (norms > 0).all() or has_opposites(gram):
        return None
    units = gram / np.outer(norms, norms)
    products = (shares[:, None] * shares[None, :] * units).ravel()
    length = math.sqrt(max(math.fsum(products), 0.0))
    return _as_long_as_all(shares / length, gram, shares) if length >= SHORTEST else None


def nuslerp_factors(gram: Floats, shares: Floats) -> Floats | None:
    """Return the factors ``(2,)`` of NuSLERP; None where there is no angle."""
    lengths = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    if not lengths > 0 or has_opposites(gram):
        return None
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / lengths))
    if 1 - cosine * cosine <= NO_ANGLE:
        return None
    angle = math.acos(cosine)
    t = float(shares[1])
    return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def _as_long_as_all(point: Floats, gram: Floats, shares: Floats) -> Floats:
    """Turn factors of unit vectors into those of the vectors, times the mean of the lengths."""
    norms = np.sqrt(np.diag(gram))
    return np.asarray(point / norms * math.fsum(shares * norms))


def _make(
    ingredients: Iterable[AnyIngredient],
    weights: Sequence[float] | None,
    factors_of: FactorsOf,
    method: str,
    base: AnyIngredient | None,
    output: str | os.PathLike[str],
    options: Options,
) -> Soup:
    """Make the mean with the same weights in all tensors."""
    ingredients = listed(ingredients)
    n = len(ingredients)
    shares = shares_of([1.0] * n if weights is None else weights, n)
    return make_means(ingredients, shares, {}, factors_of, method, base, output, options)


def make_means(
    ingredients: Sequence[AnyIngredient],
    shares: Floats,
    per_tensor: Mapping[str, Floats],
    factors_of: FactorsOf,
    method: str,
    base: AnyIngredient | None,
    output: str | os.PathLike[str],
    options: Options,
    warnings: Sequence[str] = (),
) -> Soup:
    """Measure the Gram matrix of each tensor, and make the linear soup of its factors.

    `shares` ``(ingredient,)`` sum to 1, and so do those `per_tensor` that single tensors have.
    """
    ingredients, base = open_both(ingredients, base, options)
    with executing(options) as held:
        return _make_means(
            ingredients, shares, per_tensor, factors_of, method, base, output, held, warnings
        )


def _make_means(
    ingredients: Sequence[AnyIngredient],
    shares: Floats,
    per_tensor: Mapping[str, Floats],
    factors_of: FactorsOf,
    method: str,
    base: AnyIngredient | None,
    output: str | os.PathLike[str],
    options: Options,
    warnings: Sequence[str],
) -> Soup:
    n = len(ingredients)
    started = time.monotonic()
    places, nbytes = measure_all(ingredients, base, output, options)
    rows: dict[str, tuple[float, ...]] = {}
    straight: list[str] = []
    for place in places:
        gram = about_zero(place) if base is None else place.gram
        own = per_tensor.get(place.name, shares)
        factors = factors_of(gram, own)
        if factors is None:
            if place.gram.any():  # ingredients that all hold the same have any mean alike
                straight.append(place.name)
            factors = own
        if base is not None and not place.gram.any():
            rows[place.name] = (1.0, *[0.0] * n)  # nothing moves it: it stays bit for bit
            continue
        first = () if base is None else (1.0 - math.fsum(factors),)
        rows[place.name] = (*first, *map(float, factors))
    report = {
        "weights": [float(share) for share in shares],
        "n_straight": len(straight),
        "straight": some(straight, 20),
    }
    told = [*warnings]
    if straight:
        told.append(
            f"{count(len(straight), 'tensor')} without a mean on the sphere, being zero in an "
            f"ingredient, or opposite, or without an angle: the straight mean is taken: "
            f"{some(straight)}"
        )
    first = () if base is None else (0.0,)
    coefficients = Coefficients((*first, *map(float, shares)), per_tensor=rows)
    del places  # before the soup is made: a Gram matrix of each tensor
    soup = make_linear(
        ingredients,
        coefficients,
        method,
        report,
        output,
        options,
        base=base,
        warnings=told,
        measured=True,
    )
    return with_pass(soup, nbytes, time.monotonic() - started)
