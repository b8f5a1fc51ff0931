"""Soups whose coefficients are known beforehand.

* Uniform: the mean of all. Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2;
  and of checkpoints of one run, Izmailov et al. 2018 (SWA), https://arxiv.org/abs/1803.05407.
* Weighted: any given factors, or those that another soup was made with.
* Interpolation: (1-α)·θ₀ + α·θ₁. Wortsman et al. 2022 (WiSE-FT), https://arxiv.org/abs/2109.01903.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import msgspec

from streamsoup.errors import RecipeError, printable
from streamsoup.formats.shards import AnyIngredient, open_ingredients
from streamsoup.formats.side_files import pieces
from streamsoup.options import Options, take
from streamsoup.recipe import PROVENANCE_NAME, Coefficients
from streamsoup.soups.make import Soup, make, order

__all__ = ["AnyCoefficients", "find_coefficients", "interpolate", "mix", "uniform"]

AnyCoefficients = Sequence[float] | Coefficients | str | os.PathLike[str]
"""A factor for each ingredient, or a file or soup that holds them, for each tensor too."""


def uniform(
    ingredients: Iterable[AnyIngredient],
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Average `ingredients`, each with the same weight, into the folder `output`.

    An ingredient is a safetensors file, a folder that holds a checkpoint, or one already open.
    The result is the correctly rounded mean for float16, and for bfloat16 wherever float64 holds
    the sum. Reads each ingredient once, holds blocks of it only. Raises the errors of `order` and
    `make`.
    """
    opened = open_ingredients(ingredients)
    ordered = order(opened, Coefficients.uniform(len(opened)), method="uniform", options=options)
    return make(ordered, output=output, options=options)


def mix(
    ingredients: Iterable[AnyIngredient],
    coefficients: AnyCoefficients,
    *,
    output: str | os.PathLike[str],
    normalize: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write Σᵢ cᵢ·θᵢ into the folder `output`.

    `coefficients` holds one finite factor for each ingredient; they are used as they are, or
    divided by their sum with `normalize`. The path of a soup stands for those it was made with,
    such as learned ones, tensor by tensor. Costs and errors as for `uniform`.
    """
    found = find_coefficients(coefficients, normalize=take("bool", "normalize", normalize))
    ordered = order(ingredients, found, method="mix", options=options)
    return make(ordered, output=output, options=options)


def find_coefficients(given: AnyCoefficients, *, normalize: bool = False) -> Coefficients:
    """Take factors as they are, or read them.

    A path is that of a soup, of its ``streamsoup.json``, or of a JSON file with what stands there
    under ``recipe.coefficients``: ``values``, and maybe a ``divisor`` and ``per_tensor``. Raises
    `RecipeError` for a file without them, and if `normalize` is to divide anything but a list.
    """
    if not isinstance(given, (str, os.PathLike, Coefficients)):
        return Coefficients.given(given, normalize=normalize)
    if normalize:
        raise RecipeError("only a list of factors can be normalized, one for each ingredient")
    return given if isinstance(given, Coefficients) else _read_coefficients(os.fspath(given))


_ADVICE = f'give a soup, its {PROVENANCE_NAME}, or JSON such as {{"values": [0.5, 0.5]}}'


def _read_coefficients(path: str) -> Coefficients:
    where = os.path.join(path, PROVENANCE_NAME) if os.path.isdir(path) else path
    try:
        whole = msgspec.json.decode(b"".join(pieces(where)))
        inner = whole["recipe"]["coefficients"] if "recipe" in whole else whole
        return msgspec.convert(inner, Coefficients)
    except OSError as error:
        raise RecipeError(
            f"{printable(where)}: cannot be read: {error.strerror}; {_ADVICE}"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError, RecursionError) as error:
        raise RecipeError(
            f"{printable(where)}: holds no coefficients ({printable(error)}); {_ADVICE}"
        ) from None


def interpolate(
    base: AnyIngredient,
    fine_tuned: AnyIngredient,
    alpha: float = 0.5,
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write (1-α)·base + α·fine_tuned into the folder `output`.

    `alpha` is any finite number: 0 is the base, 1 the fine-tuned model, beyond is extrapolation.
    Costs and errors as for `uniform`.
    """
    alpha = take("float", "alpha", alpha)  # it may be narrow, and 1 - alpha with it
    if not math.isfinite(alpha):
        raise RecipeError(f"alpha {alpha} is not finite")
    coefficients = Coefficients.given((1.0 - alpha, alpha))
    ordered = order([base, fine_tuned], coefficients, method="interpolate", options=options)
    return make(ordered, output=output, options=options)
