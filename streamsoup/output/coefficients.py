"""Coefficients as users give them: a list of numbers, or those that another soup was made with.

They are used unchanged. If they do not sum to 1, every tensor of the soup is larger or smaller than
a mean by that factor, and a warning says so.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import Message, RecipeError, count, option, printable, some
from streamsoup.formats.ingredients import (
    ADAPTER_FILE,
    AnyIngredient,
    Ingredient,
    open_ingredients,
)
from streamsoup.formats.layout import HeaderCache
from streamsoup.options import Options, check_options
from streamsoup.recipe import PROVENANCE_LIMIT, PROVENANCE_NAME, Coefficients, Recipe
from streamsoup.rule import Rule
from streamsoup.system.regular import read_whole
from streamsoup.system.schemes import check_local

__all__ = [
    "AnyCoefficients",
    "AnyRule",
    "coefficients_of",
    "doubtful_sums",
    "find_coefficients",
    "find_rule",
    "for_adapters",
    "told",
]

log = logging.getLogger("streamsoup")

NEAR = 1e-6
"""Difference from 1 up to which a sum is 1: coefficients in float32 are as far off."""

AnyCoefficients = Sequence[float] | Coefficients | str | os.PathLike[str]
"""A factor for each ingredient, or a file or soup that holds them, for each tensor too."""

AnyRule = AnyCoefficients | Rule
"""Coefficients, or a rule that makes something else of the ingredients."""


def find_coefficients(given: AnyCoefficients, *, normalize: bool = False) -> Coefficients:
    """Return coefficients as given, or read from a file; see `doubtful_sums` for warnings.

    A path is that of a soup, of its ``streamsoup.json``, or of a JSON file with what stands there
    under ``recipe.rule.coefficients``: ``values``, and maybe a ``divisor`` and ``per_tensor``.
    Raises `RecipeError` for a file without them, and if `normalize` is to divide anything but a
    list.
    """
    if not isinstance(given, (str, os.PathLike, Coefficients)):
        return Coefficients.given(given, normalize=normalize)
    if normalize:
        raise RecipeError("only a list of factors can be normalized, one for each ingredient")
    return given if isinstance(given, Coefficients) else _read_coefficients(os.fspath(given))


def doubtful_sums(coefficients: Coefficients) -> list[str]:
    """Return warnings about coefficients that do not sum to 1, of all tensors or of single ones."""
    warnings = []
    total = _sum(coefficients.values) / coefficients.divisor
    if abs(total - 1) > NEAR:
        plain = coefficients.divisor == 1 and not coefficients.per_tensor
        divides = f"{option('normalize', True)} divides them by it"
        warnings.append(
            f"the coefficients sum to {total:g}, so the soup is {total:g} times a mean; if that is "
            f"not meant, {divides if plain else 'give others'}"
        )
    rows = coefficients.per_tensor
    off = [name for name, row in rows.items() if abs(_sum(row) - 1) > NEAR]
    if off:
        warnings.append(
            f"the coefficients of {len(off)} of {count(len(rows), 'tensor')} do not sum to 1: "
            f"{some(off, 3)}"
        )
    return warnings


def told(coefficients: Coefficients) -> str:
    """Return in words how coefficients are used.

    >>> told(Coefficients.given([1, 1]))
    'coefficients taken as they are, sum 2'
    >>> told(Coefficients.given([1, 3], normalize=True))
    'coefficients divided by their sum, 4'
    """
    total = _sum(coefficients.values)
    if coefficients.divisor != 1.0:
        by = "their sum, " if coefficients.divisor == total else ""
        return f"coefficients divided by {by}{coefficients.divisor:.6g}"
    if not coefficients.per_tensor:
        return f"coefficients taken as they are, sum {total:.6g}"
    sums = [_sum(row) for row in coefficients.per_tensor.values()]
    return f"coefficients of each tensor taken as they are, sums {min(sums):.6g} to {max(sums):.6g}"


def _sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def find_rule(given: AnyRule, *, normalize: bool = False) -> Rule:
    """Return a rule as it is, or the linear one with the coefficients of `find_coefficients`.

    Logs a warning where coefficients do not sum to 1.
    """
    if isinstance(given, Rule):
        if normalize:
            raise RecipeError("only a list of factors can be normalized, one for each ingredient")
        return given
    found = find_coefficients(given, normalize=normalize)
    for warning in doubtful_sums(found):
        log.warning("%s", Message(warning))
    return Linear(found)


def for_adapters(
    ingredients: Iterable[AnyIngredient], coefficients: Coefficients, options: Options
) -> tuple[list[Ingredient], Coefficients, Options]:
    """Open ingredients, and make of adapters alone a soup that is one adapter.

    Args:
        ingredients: As for `uniform`.
        coefficients: What each adapter, or any other ingredient, is multiplied by.
        options: The caller's options.

    Returns:
        The ingredients. For adapters, coefficients of 1 for each first factor, and the dtype
        float32 unless the options have one; else what was given.

    Raises:
        StreamsoupError: Those of `open_ingredients` and `coefficients_of_all`.
    """
    check_options(options, Options)
    opened = open_ingredients(ingredients, options.reading)
    alone = all(tuple(each.file_names) == (ADAPTER_FILE,) for each in opened)
    is_copy = coefficients.is_copy and options.rank is None
    if not opened or not alone or is_copy or options.reading.changes_tensors:
        return opened, coefficients, options
    from streamsoup.formats.adapters.joined import are_adapters, coefficients_of_all
    from streamsoup.formats.adapters.joining import open_alone

    sources = [each.source for each in opened]
    if not are_adapters(sources):
        return opened, coefficients, options
    if options.rank is not None:
        options = msgspec.structs.replace(options, rank_of=_of_each(coefficients))
        opened = open_ingredients(opened, options.reading)
        sources = [each.source for each in opened]
    if len(sources) == 1 and options.rank is None:  # several were opened so to be joined
        open_alone(sources[0], HeaderCache())
    coefficients.check(len(opened))
    dtype = "f32" if options.dtype == "same" else options.dtype
    found = coefficients_of_all(sources[0], coefficients)
    return opened, found, msgspec.structs.replace(options, dtype=dtype)


def _of_each(coefficients: Coefficients) -> tuple[float, ...]:
    """Return what each adapter is multiplied by, the same for all tensors."""
    if coefficients.per_tensor:
        raise RecipeError(
            f"{option('rank')} takes coefficients that are the same for all tensors; give one for "
            "each adapter, or leave the rank out"
        )
    return tuple(value / coefficients.divisor for value in coefficients.values)


_ADVICE = f'give a soup, its {PROVENANCE_NAME}, or JSON such as {{"values": [0.5, 0.5]}}'


def _read_coefficients(path: str) -> Coefficients:
    check_local(path, RecipeError)
    where = os.path.join(path, PROVENANCE_NAME) if os.path.isdir(path) else path
    try:
        whole = msgspec.json.decode(read_whole(where, PROVENANCE_LIMIT))
        return msgspec.convert(_inner(whole), Coefficients)
    except OSError as error:
        raise RecipeError(
            f"{printable(where)}: cannot be read: {error.strerror}; {_ADVICE}"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError, RecursionError) as error:
        raise RecipeError(
            f"{printable(where)}: holds no coefficients ({printable(error)}); {_ADVICE}"
        ) from None


def _inner(whole: Any) -> Any:
    """Return the part of some JSON that holds coefficients: of a provenance, or all of it."""
    if "recipe" not in whole:
        return whole
    recipe = whole["recipe"]
    return recipe["rule"]["coefficients"] if "rule" in recipe else recipe["coefficients"]


def coefficients_of(recipe: Recipe) -> Coefficients:
    """Return the coefficients of a recipe. Raises `RecipeError` where its rule is not linear."""
    if not isinstance(recipe.rule, Linear):
        raise RecipeError(f"{recipe.method}: this rule is not linear, and has no coefficients")
    return recipe.rule.coefficients
