"""Soups whose coefficients follow from a formula: of scales, or of the angles between checkpoints.

* Task arithmetic: θ₀ + Σᵢ λᵢ·(θᵢ−θ₀). Ilharco et al. 2022, https://arxiv.org/abs/2212.04089.
* Model Stock, for each tensor: t·mean + (1−t)·θ₀ with t = N·cos φ / (1 + (N−1)·cos φ).
  Jang et al. 2024, https://arxiv.org/abs/2403.19522.
* SLERP, for each tensor: the way along the great circle, and for more than two the weighted
  barycentre on the sphere. Shoemake 1985, https://doi.org/10.1145/325334.325242; on task vectors,
  Ramé et al. 2024 (WARP), https://arxiv.org/abs/2406.16768.

The last two take a Gram pass first (`geometry`); all end in the same pass that writes any soup.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.cluster.choice import executing
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, count, option, printable, some
from streamsoup.formats.ingredients import AnyIngredient, listed, open_ingredients
from streamsoup.methods.angles import Place, measure, plan_geometry
from streamsoup.methods.by_name import ByName, each, each_by_tensor, most_common, varies
from streamsoup.options import Options, Planned, check_options, take
from streamsoup.output.coefficients import for_adapters
from streamsoup.output.destination import check_output
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, check_spread, order
from streamsoup.recipe import Coefficients

__all__ = ["arithmetic", "slerp", "stock"]

Floats = NDArray[np.float64]

NEARLY_OPPOSITE = -1 + 1e-9
"""Cosine, about 0.003 degrees from opposite, from which the way is undefined."""

LARGEST_FACTORS = 100.0
"""Sum of the absolute coefficients, beyond which they stand for what cancels out, and for nothing
where vectors differ in length. The SLERP of two has fewer unless they are 178.8 degrees apart."""


def arithmetic(
    ingredients: Iterable[AnyIngredient],
    scale: ByName,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write base + Σᵢ λᵢ·(θᵢ − base) into `output`: task arithmetic.

    Args:
        ingredients: Checkpoints fine-tuned from `base`, one at least.
        scale: λ, one for all or one for each ingredient; 1/n makes the mean, a negative one
            unlearns. Gradients over the layers and patterns of tensor names: `methods.by_name`.
        base: The checkpoint θ₀ that all were fine-tuned from.
        output: Folder to make.
        options: How it is made.

    Returns:
        The soup, with its recipe, bytes read and written, and warnings.

    Raises:
        RecipeError: There is no ingredient, or the scales do not fit or are not finite.
        StreamsoupError: As for `uniform`.

    Costs as for `uniform`, of the ingredients and the base.
    """
    ingredients = listed(ingredients)
    n = len(ingredients)
    if n < 1:
        raise RecipeError("task arithmetic needs at least one ingredient besides the base")
    if varies(scale):
        base, *ingredients = open_ingredients([base, *ingredients], options.reading)
        rows = each_by_tensor("scale", scale, n, base)
        common, rest = most_common({name: _from_base(row) for name, row in rows.items()})
        factors = Coefficients(common, per_tensor=rest)
        report: dict[str, object] = {}
    else:
        scales = each("scale", scale, n)  # type: ignore[arg-type]  # no mapping
        factors = Coefficients.given(_from_base(scales))
        report = {"scale": list(scales)}
    return make_linear(ingredients, factors, "arithmetic", report, output, options, base=base)


def _from_base(scales: tuple[float, ...]) -> tuple[float, ...]:
    """Return the factors of the base and of all others."""
    if not math.isfinite(sum(scales)):
        raise RecipeError(f"scales that sum to {sum(scales)} leave no factor for the base")
    return (1.0 - math.fsum(scales), *scales)


def stock(
    ingredients: Iterable[AnyIngredient],
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the Model Stock of `ingredients`, fine-tuned from `base`, into `output`.

    For each tensor, t = N·cos φ / (1 + (N−1)·cos φ) says how far to go from the base to the mean;
    cos φ is the mean cosine of all pairs of task vectors (the paper has one angle; mergekit takes
    the mean of pairs too). Where the task vectors point apart on average, t would be negative: it
    is 0 there, the base, and the report names those tensors.

    Args:
        ingredients: Checkpoints fine-tuned from `base`, two at least.
        base: The checkpoint θ₀ that all were fine-tuned from.
        output: Folder to make.
        options: How it is made.

    Returns:
        The soup; the report in its provenance has the least, mean and largest t.

    Raises:
        RecipeError: There are fewer than two ingredients, or NaN and Inf are to propagate.
        StreamsoupError: As for `geometry` and `uniform`.

    Reads each checkpoint twice: once for the angles, once for the soup. Holds blocks, and for each
    tensor about n²/2 float64 products.
    """
    ingredients = listed(ingredients)
    n = len(ingredients)
    if n < 2:
        raise RecipeError("Model Stock needs the angle between two ingredients at least")
    ingredients, opened = open_both(ingredients, base, options)
    assert opened is not None
    with executing(options) as held:
        return _stock(ingredients, opened, output, held)


def _stock(
    ingredients: Sequence[AnyIngredient],
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options,
) -> Soup:
    n = len(ingredients)
    started = time.monotonic()
    places, nbytes = measure_all(ingredients, base, output, options)
    rows: dict[str, tuple[float, ...]] = {}
    ratios: list[float] = []
    negative: list[str] = []
    for place in places:
        if not place.gram.any():
            rows[place.name] = (1.0, *[0.0] * n)  # equal in all: it stays bit for bit
            continue
        ratio = stock_ratio(place)
        if ratio < 0:
            negative.append(place.name)
            ratio = 0.0
        ratios.append(ratio)
        rows[place.name] = (1 - ratio, *[ratio / n] * n)
    report = {
        "ratio_min": min(ratios, default=0.0),
        "ratio_mean": math.fsum(ratios) / max(len(ratios), 1),
        "ratio_max": max(ratios, default=0.0),
        "n_negative": len(negative),
        "negative": some(negative, 20),
    }
    del places  # before the soup is made: a Gram matrix of each tensor
    coefficients = Coefficients((0.0, *[1 / n] * n), per_tensor=rows)
    soup = make_linear(
        ingredients, coefficients, "stock", report, output, options, base=base, measured=True
    )
    return with_pass(soup, nbytes, time.monotonic() - started)


def stock_ratio(place: Place) -> float:
    """Return the ratio t of one tensor, unclipped; pairs without an angle count as orthogonal."""
    n = len(place.gram)
    cosines = np.nan_to_num(place.cosines[np.triu_indices(n, 1)], nan=0.0)
    cosine = math.fsum(cosines) / len(cosines)
    # The mean cosine of n vectors is -1/(n-1) at least, and there t falls without bound.
    below = 1 + (n - 1) * cosine
    return n * cosine / below if below > 0 else -math.inf


def slerp(
    ingredients: Iterable[AnyIngredient],
    weights: Sequence[float],
    *,
    base: AnyIngredient | None = None,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the spherical mean of `ingredients`, tensor by tensor, into `output`.

    For two that is sin((1−t)Ω)/sin Ω·θ₁ + sin(tΩ)/sin Ω·θ₂ with t the second weight; for more, the
    point of the sphere from which the weighted directions to all cancel. Where a vector is zero, or
    they cancel out or lie all around the sphere, the mean is a straight one, and the report counts
    those tensors.

    Args:
        ingredients: As for `uniform`.
        weights: One for each ingredient, finite, none below 0 and not all 0; they are divided by
            their sum.
        base: The origin that angles are seen from: task vectors turn, and the base is added; None
            for zero.
        output: Folder to make.
        options: How it is made.

    Returns:
        The soup, with its recipe, bytes read and written, and warnings.

    Raises:
        RecipeError: The weights do not fit, or NaN and Inf are to propagate.
        StreamsoupError: As for `geometry` and `uniform`.

    Costs as for `stock`.
    """
    ingredients = listed(ingredients)
    shares = shares_of(weights, len(ingredients))
    ingredients, base = open_both(ingredients, base, options)
    with executing(options) as held:
        return _slerp(ingredients, shares, base, output, held)


def _slerp(
    ingredients: Sequence[AnyIngredient],
    shares: Floats,
    base: AnyIngredient | None,
    output: str | os.PathLike[str],
    options: Options,
) -> Soup:
    started = time.monotonic()
    places, nbytes = measure_all(ingredients, base, output, options)
    rows: dict[str, tuple[float, ...]] = {}
    straight: list[str] = []
    opposite: list[str] = []
    for place in places:
        gram = place.gram if base is not None else about_zero(place)
        factors = sphere_factors(gram, shares)
        if factors is None:
            straight.append(place.name)
            factors = shares
            if has_opposites(gram):
                opposite.append(place.name)
        first = () if base is None else (1.0 - math.fsum(factors),)
        rows[place.name] = (*first, *map(float, factors))
    report = {
        "weights": [float(share) for share in shares],
        "n_straight": len(straight),
        "straight": some(straight, 20),
    }
    del places
    first = () if base is None else (0.0,)
    coefficients = Coefficients((*first, *map(float, shares)), per_tensor=rows)
    warnings = []
    if opposite:
        left = "zero" if base is None else "the base"
        warnings.append(
            f"{count(len(opposite), 'tensor')} pointing exactly opposite ways in two ingredients, "
            "between which a sphere knows no way: the straight mean is taken, which is "
            f"{left} where both have the same weight and length: {some(opposite)}"
        )
    soup = make_linear(
        ingredients,
        coefficients,
        "slerp",
        report,
        output,
        options,
        base=base,
        warnings=warnings,
        measured=True,
    )
    return with_pass(soup, nbytes, time.monotonic() - started)


def has_opposites(gram: Floats) -> bool:
    """Return True if two vectors, of which `gram` holds the products, point opposite ways."""
    norms = np.sqrt(np.diag(gram))
    lengths = np.outer(norms, norms)
    return bool(((gram < NEARLY_OPPOSITE * lengths) & (lengths > 0)).any())


def sphere_factors(gram: Floats, shares: Floats) -> Floats | None:
    """Return the coefficients of the weighted barycentre on the sphere, from products of vectors.

    `gram` is ``(vector, vector)``, `shares` ``(vector,)`` sum to 1. None where a vector is zero,
    or where no such point is found: they cancel out, lie opposite to it, or too far
    around the sphere for one point to be the mean. Starts from the straight mean, and goes the way
    of the mean of the logarithms until that vanishes
    (Buss and Fillmore 2001, https://doi.org/10.1145/502122.502124).
    """
    norms = np.sqrt(np.diag(gram))
    if not (norms > 0).all():
        return None
    units = gram / np.outer(norms, norms)
    point = shares.copy()
    left = math.inf
    for _ in range(200):
        length = _length(units, point)
        # Coefficients that outgrow their vector say that it lies in what cancels out.
        if length < 1e-9 or not np.abs(point).sum() < LARGEST_FACTORS * length:
            return None
        point = point / length
        cosines = np.clip(_times(units, point), -1.0, 1.0)
        if (cosines < NEARLY_OPPOSITE).any():
            return None  # every way leads there
        # One by one: what numpy makes of many at once depends on the processor.
        angles = np.array([math.acos(cosine) for cosine in cosines])
        sines = np.array([math.sin(angle) for angle in angles])
        stretch = np.where(sines > 1e-9, angles / np.where(sines > 1e-9, sines, 1.0), 1.0)
        pull = shares * stretch
        way = pull - _dot(pull, cosines) * point
        left = _length(units, way)
        if left < 1e-15:
            break
        point = math.cos(left) * point + math.sin(left) / left * way
    return point if left < 1e-9 and abs(_length(units, point) - 1) < 1e-9 else None


def _length(units: Floats, factors: Floats) -> float:
    return math.sqrt(max(_dot(factors, _times(units, factors)), 0.0))


def _times(symmetric: Floats, vector: Floats) -> Floats:
    """Return their product, added up row by row: the order of BLAS depends on the processor."""
    return np.asarray((symmetric * vector[:, None]).sum(axis=0))


def _dot(left: Floats, right: Floats) -> float:
    return math.fsum(left * right)


def about_zero(place: Place) -> Floats:
    """Return ⟨θᵢ, θⱼ⟩ ``(ingredient, ingredient)``, from the reference and the differences."""
    rows = place.rows
    return np.asarray(rows[0, 0] + rows[0, 1:][:, None] + rows[0, 1:][None, :] + rows[1:, 1:])


def shares_of(weights: Sequence[float], n: int) -> Floats:
    """Return `weights`, one for each of `n`, divided by their sum ``(n,)``."""
    if isinstance(weights, (str, bytes)):
        raise RecipeError(f"{printable(repr(weights))}: expected a list of weights")
    given = np.array([take("float", "weights", weight) for weight in weights])
    if len(given) != n:
        raise RecipeError(
            f"{count(len(given), 'weight')} for {count(n, 'ingredient')}; give one for each"
        )
    with np.errstate(over="ignore"):
        total = float(given.sum())
    if not ((given >= 0).all() and 0 < total < math.inf):
        raise RecipeError("weights on a sphere are finite, none negative, and not all zero")
    return np.asarray(given / total)


def open_both(
    ingredients: Sequence[AnyIngredient], base: AnyIngredient | None, options: Options
) -> tuple[list[AnyIngredient], AnyIngredient | None]:
    """Open all, once for both passes: to open a state dict reads all of it."""
    if base is None:
        return [*open_ingredients(ingredients, options.reading)], None
    first, *others = open_ingredients([base, *ingredients], options.reading)
    return [*others], first


def measure_all(
    ingredients: Iterable[AnyIngredient],
    base: AnyIngredient | None,
    output: str | os.PathLike[str],
    options: Options,
) -> tuple[Sequence[Place], int]:
    """Run the Gram pass, after every check that could refuse the soup itself.

    Returns the products of each tensor, and the bytes that were read for them.
    """
    check_options(options, Options)
    if options.non_finite == "propagate":
        raise RecipeError(
            "NaN and Inf have no angles, so what is made of angles cannot let them pass: leave out "
            f"{option('non_finite', 'propagate')}"
        )
    everything = [*([] if base is None else [base]), *ingredients]
    equal = Coefficients.uniform(len(everything))
    ordered = order(everything, Linear(equal), method="mix", options=options)
    if options.on_event is not None:
        options.on_event(Planned(ordered, n_before=1))
    check_spread(ordered, options)
    check_output(
        os.fsdecode(output), ordered.plan.ingredients, overwrite=options.overwrite, resumes=True
    )
    plan, memory, mapped = plan_geometry(ingredients, base=base, options=options)
    found = measure(plan, memory, mapped=mapped, base=base is not None, options=options)
    return found.tensors, found.nbytes_read


def with_pass(soup: Soup, nbytes_read: int, elapsed_s: float) -> Soup:
    """Count the Gram pass too; `elapsed_s` is of both."""
    if soup.finished:  # an earlier run had made it: this one read for the angles alone
        return replace(soup, nbytes_read=nbytes_read, elapsed_s=elapsed_s)
    return replace(
        soup,
        nbytes_read=soup.nbytes_read + nbytes_read,
        elapsed_s=elapsed_s,
        n_passes=soup.n_passes + 1,
    )


def make_linear(
    ingredients: Iterable[AnyIngredient],
    coefficients: Coefficients | Sequence[float],
    method: str,
    report: Mapping[str, object],
    output: str | os.PathLike[str],
    options: Options,
    base: AnyIngredient | None = None,
    warnings: Sequence[str] = (),
    measured: bool = False,
) -> Soup:
    """Make the soup. A `base` comes before the ingredients, and the report names it.

    Coefficients that were `measured` are those of what the ingredients held then.
    """
    if not isinstance(coefficients, Coefficients):
        coefficients = Coefficients.given(coefficients)
    everything = [*([] if base is None else [base]), *ingredients]
    opened, used, options = for_adapters(everything, coefficients, options)
    ordered = order(opened, Linear(used), method=method, options=options)
    ordered = replace(ordered, plan=replace(ordered.plan, is_measured=measured))
    if base is not None:
        report = {"base": ordered.plan.ingredients[0].name} | dict(report)
    ordered = replace(ordered, report=report, warnings=[*ordered.warnings, *warnings])
    return make(ordered, output=output, options=options)
