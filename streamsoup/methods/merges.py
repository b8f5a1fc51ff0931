"""Merges of task vectors that are no fixed linear combination.

* TIES. Yadav et al. 2023, https://arxiv.org/abs/2306.01708.
* DARE. Yu et al. 2023, https://arxiv.org/abs/2311.03099.
* Model Breadcrumbs. Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795.
* DELLA. Deep et al. 2024, https://arxiv.org/abs/2406.11617.
* SCE. Wan et al. 2024, https://arxiv.org/abs/2408.07990.
* RAM, https://arxiv.org/abs/2601.13572; NearSwap, of mergekit.

The first four are one rule with other parameters: `engine.rules.task_vectors` says what it is.
Every verb ends in a recipe whose rule holds all parameters, defaults and seed included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from streamsoup.engine.rules.elementwise import NearSwap, Ram
from streamsoup.engine.rules.sce import Sce
from streamsoup.engine.rules.sparsifiers import Largest, Middle, Random, Ranked, Sparsifier
from streamsoup.engine.rules.task_vectors import TaskVectors, Trim
from streamsoup.engine.rules.terms import Consensus, Rescale, Terms
from streamsoup.formats.ingredients import AnyIngredient, listed, open_ingredients
from streamsoup.methods.by_name import ByName, each, each_by_tensor, most_common, varies
from streamsoup.options import Options, take
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, order
from streamsoup.rule import Rule

__all__ = ["breadcrumbs", "dare", "della", "nearswap", "ram", "sce", "ties"]


def ties(
    ingredients: Iterable[AnyIngredient],
    density: ByName,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    coefficients: ByName = 1.0,
    lambda_: float = 1.0,
    consensus: Consensus = "sum",
    normalize: bool = True,
    rescale: Rescale = "none",
    trim: Trim = "tensor",
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the TIES merge of `ingredients`, fine-tuned from `base`, into `output`.

    Args:
        ingredients: Checkpoints, in the order of the sum.
        density: The share of each task vector that is kept, 0 to 1: its largest magnitudes,
            ``max(1, int(density·n))`` of n, of equal ones those of the lowest index. One number,
            one for each ingredient, gradients over the layers, or a mapping from patterns of
            tensor names: see `methods.by_name`.
        base: What they were fine-tuned from.
        output: Folder to write.
        coefficients: wᵢ, in the same forms.
        lambda_: λ, by which the merged task vector is multiplied.
        consensus: ``sum``: what has not the sign of the sum of its element is left out; ``none``:
            nothing is.
        normalize: Divide by the sum of the coefficients, of those that agree.
        rescale: ``l1``: make up for what was dropped, so that Σ|d| of each tensor stays;
            ``density``: divide what is kept by the density.
        trim: Rank magnitudes within each ``tensor``, or over the whole ``model``.
        options: As for every verb.

    Returns:
        The soup; its recipe holds every parameter.

    Raises:
        RecipeError: A parameter is out of range, or fits no ingredient.
        StreamsoupError: Whatever `uniform` raises.

    Reads base and ingredients twice as a rule, three times in float32, tensor by tensor, so that
    all but the first pass come from the page cache. Holds blocks, and 1 MB for each ingredient and
    thread.
    """
    return _merge(
        ingredients,
        "ties",
        base,
        output,
        options,
        {"coefficients": coefficients, "density": density},
        lambda at: _terms(
            at["coefficients"],
            Largest(at["density"]),
            lambda_,
            consensus,
            normalize,
            rescale,
        ),
        trim=trim,
    )


def breadcrumbs(
    ingredients: Iterable[AnyIngredient],
    density: ByName,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    gamma: ByName = 0.01,
    coefficients: ByName = 1.0,
    lambda_: float = 1.0,
    consensus: Consensus = "none",
    normalize: bool = False,
    rescale: Rescale = "none",
    trim: Trim = "tensor",
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the Model Breadcrumbs of `ingredients` into `output`.

    Of the n magnitudes of a task vector, the ``int(gamma·n)`` largest are dropped, and of the rest
    the ``int(density·n)`` largest are kept. With the consensus ``sum`` it is what mergekit calls
    breadcrumbs_ties. All else as for `ties`.
    """
    return _merge(
        ingredients,
        "breadcrumbs",
        base,
        output,
        options,
        {"coefficients": coefficients, "density": density, "gamma": gamma},
        lambda at: _terms(
            at["coefficients"],
            Middle(at["density"], at["gamma"]),
            lambda_,
            consensus,
            normalize,
            rescale,
        ),
        trim=trim,
    )


def dare(
    ingredients: Iterable[AnyIngredient],
    density: ByName,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    coefficients: ByName = 1.0,
    lambda_: float = 1.0,
    consensus: Consensus = "none",
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: int = 0,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the DARE merge of `ingredients` into `output`.

    Each element of a task vector is kept with the probability `density`. Masks depend on `seed`,
    on the names of tensors and the positions of ingredients, and on nothing else: the same command
    makes the same bytes. The authors rescale by ``density``; ``l1``, the default, is mergekit's.
    With the consensus ``sum`` it is what mergekit calls dare_ties. Reads everything once with
    ``density`` or ``none``, twice with ``l1``. All else as for `ties`.
    """
    return _merge(
        ingredients,
        "dare",
        base,
        output,
        options,
        {"coefficients": coefficients, "density": density},
        lambda at: _terms(
            at["coefficients"],
            Random(at["density"]),
            lambda_,
            consensus,
            normalize,
            rescale,
        ),
        seed=seed,
    )


def della(
    ingredients: Iterable[AnyIngredient],
    density: ByName,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    epsilon: ByName = 0.15,
    coefficients: ByName = 1.0,
    lambda_: float = 1.0,
    consensus: Consensus = "sum",
    normalize: bool | None = None,
    rescale: Rescale = "l1",
    seed: int = 0,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the DELLA merge of `ingredients` into `output`.

    Each element of a task vector is kept with a probability that grows with the rank of its
    magnitude in its row, from density − epsilon to density + epsilon; both must lie between 0 and
    1. A row is all that lies behind the first dimension, and is held in memory. `normalize` follows
    the consensus unless told. With the consensus ``none`` it is what mergekit calls della_linear.
    Reads everything twice, once without `rescale`. All else as for `dare`.
    """
    return _merge(
        ingredients,
        "della",
        base,
        output,
        options,
        {"coefficients": coefficients, "density": density, "epsilon": epsilon},
        lambda at: _terms(
            at["coefficients"],
            Ranked(at["density"], at["epsilon"]),
            lambda_,
            consensus,
            consensus == "sum" if normalize is None else normalize,
            rescale,
        ),
        seed=seed,
    )


def sce(
    ingredients: Iterable[AnyIngredient],
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    select_topk: float = 1.0,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the SCE merge of `ingredients` into `output`.

    Of the elements that differ between task vectors, the share `select_topk` that varies most is
    taken; each ingredient counts by the mean square of what was taken of it (alike where these sum
    to less than 1e-6); and what has not the sign of the sum of its element is left out. Reads
    everything twice, four times as a rule with a `select_topk` below 1. Costs and errors as for
    `ties`.
    """
    rule = Sce(take("float", "select_topk", select_topk))
    return _make(listed(ingredients), rule, "sce", base, output, options)


def ram(
    ingredients: Iterable[AnyIngredient],
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    epsilon: float = 1e-5,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the RAM merge of `ingredients` into `output`.

    An element that one ingredient changes by more than `epsilon` takes its whole change; one that
    several do, the mean of theirs. Reads everything once. Errors as for `ties`.
    """
    rule = Ram(take("float", "epsilon", epsilon))
    return _make(listed(ingredients), rule, "ram", base, output, options)


def nearswap(
    ingredients: Iterable[AnyIngredient],
    t: float,
    *,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Write the NearSwap of one ingredient and `base` into `output`.

    An element is that of the ingredient where both lie within `t`, and nearer to the base's the
    further they lie apart: w·b + (1 − w)·a with w = min(1, t / max(|a − b|, 1e-6)). Reads
    everything once. Errors as for `ties`.
    """
    rule = NearSwap(take("float", "t", t))
    return _make(listed(ingredients), rule, "nearswap", base, output, options)


def _merge(
    ingredients: Iterable[AnyIngredient],
    method: str,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options,
    given: Mapping[str, ByName],
    terms_of: Callable[[Mapping[str, tuple[float, ...]]], Terms],
    *,
    trim: Trim = "tensor",
    seed: int = 0,
) -> Soup:
    """Make a sum of task vectors; `terms_of` turns what was `given` for a tensor into its terms."""
    ingredients = listed(ingredients)
    n = len(ingredients)
    rest: dict[str, Terms] = {}
    if any(varies(value) for value in given.values()):
        base, *ingredients = open_ingredients([base, *ingredients], options.reading)
        tables = {what: each_by_tensor(what, value, n, base) for what, value in given.items()}
        names = next(iter(tables.values()))
        terms, rest = most_common(
            {
                name: terms_of({what: table[name] for what, table in tables.items()})
                for name in names
            }
        )
    else:
        terms = terms_of({what: each(what, value, n) for what, value in given.items()})  # type: ignore[arg-type]  # no mapping
    rule = TaskVectors(terms, rest, trim=trim, seed=take("int", "seed", seed))
    return _make(ingredients, rule, method, base, output, options)


def _terms(
    coefficients: tuple[float, ...],
    sparsifier: Sparsifier,
    lambda_: float,
    consensus: Consensus,
    normalize: bool,
    rescale: Rescale,
) -> Terms:
    return Terms(
        coefficients=coefficients,
        sparsifier=sparsifier,
        scale=take("float", "lambda", lambda_),
        consensus=consensus,
        normalize=take("bool", "normalize", normalize),
        rescale=rescale,
    )


def _make(
    ingredients: Sequence[AnyIngredient],
    rule: Rule,
    method: str,
    base: AnyIngredient,
    output: str | os.PathLike[str],
    options: Options,
) -> Soup:
    """Make the soup; the base comes first in the recipe, and the report names it."""
    ordered = order([base, *ingredients], rule, method=method, options=options)
    report = {"base": ordered.plan.ingredients[0].name}
    return make(replace(ordered, report=report), output=output, options=options)
