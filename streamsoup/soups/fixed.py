"""Soups whose coefficients are known beforehand.

* Uniform: the mean of all. Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2;
  and of checkpoints of one run, Izmailov et al. 2018 (SWA), https://arxiv.org/abs/1803.05407.
* Weighted: any given factors.
* Interpolation: (1-α)·θ₀ + α·θ₁. Wortsman et al. 2022 (WiSE-FT), https://arxiv.org/abs/2109.01903.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from streamsoup.errors import RecipeError
from streamsoup.options import Options
from streamsoup.recipe import Coefficients
from streamsoup.soups.make import AnyIngredient, Soup, make, order

__all__ = ["interpolate", "mix", "uniform"]


def uniform(
    ingredients: Sequence[AnyIngredient],
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Average `ingredients`, each with the same weight, into the folder `output`.

    An ingredient is a safetensors file, a folder that holds a checkpoint, or one already open.
    For bfloat16 and float16 the result is the correctly rounded mean. Reads each ingredient
    once, holds blocks of it only. Raises the errors of `order` and `make`.
    """
    coefficients = Coefficients.uniform(len(ingredients))
    ordered = order(ingredients, coefficients, method="uniform", options=options)
    return make(ordered, output=output, options=options)


def mix(
    ingredients: Sequence[AnyIngredient],
    coefficients: Sequence[float] | Coefficients,
    *,
    output: str | os.PathLike[str],
    normalize: bool = False,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write Σᵢ cᵢ·θᵢ into the folder `output`.

    `coefficients` holds one finite factor for each ingredient; they are used as they are, or
    divided by their sum with `normalize`. Costs and errors as for `uniform`.
    """
    if not isinstance(coefficients, Coefficients):
        coefficients = Coefficients.given(coefficients, normalize=normalize)
    ordered = order(ingredients, coefficients, method="mix", options=options)
    return make(ordered, output=output, options=options)


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
    if not math.isfinite(alpha):
        raise RecipeError(f"alpha {alpha} is not finite")
    coefficients = Coefficients.given((1.0 - alpha, alpha))
    ordered = order([base, fine_tuned], coefficients, method="interpolate", options=options)
    return make(ordered, output=output, options=options)
