"""Soups whose coefficients are known beforehand.

* Uniform: the mean of all. Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2;
  and of checkpoints of one run, Izmailov et al. 2018 (SWA), https://arxiv.org/abs/1803.05407.
* Weighted: any given factors, or those that another soup was made with.
* Interpolation: (1-α)·θ₀ + α·θ₁. Wortsman et al. 2022 (WiSE-FT), https://arxiv.org/abs/2109.01903.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, printable
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, listed, open_ingredients
from streamsoup.methods.best import best_of
from streamsoup.methods.by_name import ByName, each_by_tensor, most_common, varies
from streamsoup.methods.checkpoints import By, Given, choose_any
from streamsoup.methods.records import Direction
from streamsoup.options import Options, take
from streamsoup.output.coefficients import (
    AnyCoefficients,
    doubtful_sums,
    find_coefficients,
    for_adapters,
)
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, order
from streamsoup.recipe import Coefficients, rule_name
from streamsoup.rule import Rule

__all__ = ["apply", "interpolate", "mix", "uniform"]


def uniform(
    ingredients: Given,
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
    """Average `ingredients`, each with the same weight, into the folder `output`.

    The result is the correctly rounded mean for float16, and for bfloat16 wherever float64 holds
    the sum.

    Args:
        ingredients: Safetensors files, folders that hold a checkpoint, state dicts, modules,
            a `streamsoup.Source`, or ones already open; or the folder of a run, which stands for
            its checkpoints. LoRA adapters of PEFT, without a base, make one adapter.
        by: For checkpoints of a run, what they are ordered by before `every` and `last` choose:
            ``step``, ``name``, ``time`` or ``given``.
        best: Take only this many, the best by `metric`.
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
        StreamsoupError: Those of `order` and `make`.

    Reads each ingredient once, and holds blocks of it only.
    """
    choice = choose_any(
        ingredients, by=by, best=best_of(best, metric, direction), every=every, last=last
    )
    given = listed(ingredients) if choice is None else choice.ingredients
    opened, equal, options = for_adapters(given, Coefficients.uniform(len(given)), options)
    ordered = order(opened, Linear(equal), method="uniform", options=options)
    if choice is not None:
        warnings = [*ordered.warnings, *choice.warnings]
        ordered = replace(ordered, report=choice.report, warnings=warnings)
    return make(ordered, output=output, options=options)


def mix(
    ingredients: Iterable[AnyIngredient],
    coefficients: AnyCoefficients | ByName,
    *,
    output: str | os.PathLike[str],
    normalize: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write Σᵢ cᵢ·θᵢ into the folder `output`.

    Args:
        ingredients: As for `uniform`, in the order of the coefficients.
        coefficients: One finite factor for each ingredient; gradients over the layers, or a
            mapping from patterns of tensor names (`methods.by_name`); or the path of a soup, for
            those it was made with, such as learned ones, tensor by tensor.
        output: Folder to make.
        normalize: Divide the coefficients by their sum; otherwise they are used as they are.
        options: How it is made.

    Returns:
        The soup, with its recipe, bytes read and written, and warnings.

    Raises:
        RecipeError: A coefficient is not finite, their number is wrong, or their sum, if it
            divides, is zero.
        StreamsoupError: As for `uniform`.

    Costs as for `uniform`.
    """
    normalize = take("bool", "normalize", normalize)
    given = None if isinstance(coefficients, str) else coefficients
    if isinstance(given, Mapping | Sequence) and varies(given):
        ingredients = open_ingredients(ingredients, options.reading)
        found = _by_name(ingredients, given, normalize=normalize)
    else:
        found = find_coefficients(coefficients, normalize=normalize)  # type: ignore[arg-type]
    opened, used, options = for_adapters(ingredients, found, options)
    ordered = order(opened, Linear(used), method="mix", options=options)
    doubts = doubtful_sums(found) if used is found else []  # adapters may have any sum
    ordered = replace(ordered, warnings=[*ordered.warnings, *doubts])
    return make(ordered, output=output, options=options)


def _by_name(ingredients: Sequence[Ingredient], given: ByName, *, normalize: bool) -> Coefficients:
    """Return coefficients of each tensor, divided by their sum if that is wanted."""
    if not ingredients:
        raise RecipeError("a soup needs at least one ingredient; give some")
    rows = each_by_tensor("coefficients", given, len(ingredients), ingredients[0])
    if normalize:
        for name, row in rows.items():
            total = math.fsum(row)
            if total == 0:
                raise RecipeError(
                    f"{printable(name)}: coefficients that sum to 0 cannot be normalized; give "
                    "others, or leave out normalize"
                )
            rows[name] = tuple(factor / total for factor in row)
    common, rest = most_common(rows)
    return Coefficients(common, per_tensor=rest)


def interpolate(
    base: AnyIngredient,
    fine_tuned: AnyIngredient,
    alpha: float = 0.5,
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write (1-α)·base + α·fine_tuned into the folder `output`.

    Args:
        base: The checkpoint at α = 0.
        fine_tuned: The checkpoint at α = 1.
        alpha: Any finite number; below 0 and above 1 it extrapolates.
        output: Folder to make.
        options: How it is made.

    Returns:
        The soup, with its recipe, bytes read and written, and warnings.

    Raises:
        RecipeError: `alpha` is not finite.
        StreamsoupError: As for `uniform`.

    Costs as for `uniform`, of two checkpoints.
    """
    alpha = take("float", "alpha", alpha)  # it may be narrow, and 1 - alpha with it
    if not math.isfinite(alpha):
        raise RecipeError(f"alpha {alpha} is not finite")
    coefficients = Coefficients.given((1.0 - alpha, alpha))
    opened, used, options = for_adapters([base, fine_tuned], coefficients, options)
    ordered = order(opened, Linear(used), method="interpolate", options=options)
    return make(ordered, output=output, options=options)


def apply(
    ingredients: Iterable[AnyIngredient],
    rule: Rule,
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Make a soup by any rule, those from outside the package included.

    Args:
        ingredients: Checkpoints in the order that the rule expects; a base, if it has one, is
            usually the first.
        rule: What becomes of each tensor: see `streamsoup.Rule`.
        output: Folder to write.
        options: As for every verb.

    Returns:
        The soup. Its provenance holds the rule with its parameters; `verify` needs the type of a
        rule from outside (``rules=[...]``).

    Raises:
        RecipeError: The rule refuses these ingredients.
        StreamsoupError: Whatever `uniform` raises.

    Reads the ingredients as often as the rule has passes; holds what the rule says beside blocks.
    """
    ordered = order(ingredients, rule, method=rule_name(rule), options=options)
    return make(ordered, output=output, options=options)
