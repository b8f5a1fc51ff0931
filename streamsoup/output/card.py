"""The model card of a soup, ``README.md``: what it was made of, how, and how to check it.

Made of the recipe, the report of a search, and what the ingredients' own files say, so that the
same soup has the same card, byte for byte: it holds no date, version or time. Names come from
files and paths: in Markdown each sign of punctuation is escaped, and the front matter holds plain
words and strings in JSON's form, which YAML reads.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from streamsoup.engine.plan import MixPlan
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import count, printable
from streamsoup.formats.ingredients import ADAPTER_FILE, Ingredient
from streamsoup.formats.origins import Origin, find_origin
from streamsoup.recipe import PROVENANCE_NAME, Coefficients, rule_name

__all__ = ["CARD_NAME", "make_card"]

CARD_NAME = "README.md"
"""Name of the card, which the Hub shows as the page of a model."""

_MARKUP = re.compile(r"([!-,./:-@\[-`{-~])")
"""Punctuation that Markdown may read as markup, or make a link of; all but ``-`` may be escaped."""

_WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def make_card(plan: MixPlan, report: Mapping[str, object]) -> bytes:
    """Return the model card of a planned soup, as UTF-8.

    Args:
        plan: The whole plan.
        report: How a search found the coefficients; only its scores are used.

    Reads cards and configurations of the ingredients.
    """
    origins = [find_origin(each.source.path, each.folder) for each in plan.ingredients]
    lines = [
        *_front_matter(plan.recipe.method, origins),
        *_heading(plan),
        *_table(plan, origins, report.get("base")),
        *_parameters(plan),
        *_scores(report),
        *_checking(plan),
    ]
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _front_matter(method: str, origins: Sequence[Origin]) -> Iterator[str]:
    yield "---"
    models = [name for each in origins for name in ([each.hub_id] if each.hub_id else each.bases)]
    if models:
        yield "base_model:"
        yield from (f"- {json.dumps(name)}" for name in dict.fromkeys(models))
        yield "base_model_relation: merge"
    for key, words in (
        ("library_name", [origins[0].library]),
        ("license", [each.license for each in origins]),
        ("pipeline_tag", [each.task for each in origins]),
    ):
        if words[0] and len(set(words)) == 1:  # where all say the same
            yield f"{key}: {json.dumps(words[0])}"
    yield "tags:"
    tags = ["merge", "streamsoup", *([method] if _WORD.fullmatch(method) else [])]
    yield from (f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))
    yield "---"


def _heading(plan: MixPlan) -> Iterator[str]:
    recipe = plan.recipe
    n = count(len(plan.ingredients), "checkpoint")
    yield ""
    yield f"# {escaped(recipe.method.capitalize())} soup of {n}"
    yield ""
    dtypes = sorted({tensor.dtype.name for tensor in plan.reduced})
    rounded = f", and rounded once, to {' and '.join(dtypes)}" if dtypes else ""
    yield f"Merged with streamsoup: summed in float64{rounded}."
    if plan.copied:
        yield f"{count(len(plan.copied), 'tensor')} that hold no averaged numbers were copied."
    if recipe.reading.components:
        names = ", ".join(map(escaped, recipe.reading.components))
        yield f"The components {names} were merged, and the others are those of the first."


def _table(plan: MixPlan, origins: Sequence[Origin], base: object) -> Iterator[str]:
    """Yield the ingredients with their coefficients; `base` is given if the first is one.

    A base comes before the others in every recipe.
    """
    rule = plan.recipe.rule
    coefficients = rule.coefficients if isinstance(rule, Linear) else None
    adapters = all(tuple(each.file_names) == (ADAPTER_FILE,) for each in plan.ingredients)
    if adapters and coefficients is not None:
        from streamsoup.formats.adapters.joined import coefficients_meant

        coefficients = coefficients_meant(plan.ingredients[0].source, coefficients)
    yield ""
    yield "## Ingredients"
    yield ""
    yield "| | checkpoint |" + (" coefficient |" if coefficients else "")
    yield "|---:|---|" + ("---:|" if coefficients else "")
    for i, (ingredient, origin) in enumerate(zip(plan.ingredients, origins, strict=True)):
        name = escaped(origin.hub_id or _shown(ingredient))
        name += " (base)" if i == 0 and base is not None else ""
        factor = f" {_coefficient(coefficients, i)} |" if coefficients else ""
        yield f"| {i + 1} | {name} |{factor}"
    if adapters and len(plan.ingredients) > 1:
        yield ""
        yield (
            "The factors of these adapters are joined, so that their products are added: the "
            "coefficients are those of the products."
        )
    if plan.recipe.reading.rank is not None:
        yield ""
        yield (
            f"Modules of more ranks than {plan.recipe.reading.rank} are the best approximation of "
            f"that rank; streamsoup.json has the relative error of each."
        )
    if coefficients is not None and coefficients.per_tensor:
        yield ""
        yield (
            f"{count(len(coefficients.per_tensor), 'tensor')} with coefficients of their own, of "
            "which the table has the smallest and the largest."
        )


def _shown(ingredient: Ingredient) -> str:
    """Return the name of an ingredient without the folders above, which are of this machine."""
    if ingredient.source.path is None:
        return ingredient.name
    parts = ingredient.path.rstrip("/").split("/")
    step = len(parts) > 2 and re.fullmatch(r"(?i)(checkpoint|step|epoch)?[-_]?\d+.*", parts[-1])
    return "/".join(parts[-2:] if step else parts[-1:])


def _coefficient(coefficients: Coefficients, i: int) -> str:
    own = [row[i] for row in coefficients.per_tensor.values()]
    if own:
        return f"{min(own):.6g} to {max(own):.6g}"
    return f"{coefficients.values[i] / coefficients.divisor:.6g}"


def _parameters(plan: MixPlan) -> Iterator[str]:
    """Yield the parameters of a rule that is not a sum with coefficients."""
    rule = plan.recipe.rule
    if isinstance(rule, Linear):
        return
    yield ""
    yield "## Method"
    yield ""
    yield f"The rule {escaped(rule_name(rule))}, with these parameters:"
    yield ""
    plain: Any = msgspec.to_builtins(rule, enc_hook=repr)
    with suppress(msgspec.ValidationError):  # a whole number where a float belongs is one
        plain = msgspec.to_builtins(msgspec.convert(plain, type(rule)), enc_hook=repr)
    for name, value in plain.items() if isinstance(plain, dict) else ():
        yield f"* {escaped(name)}: {escaped(json.dumps(value, default=repr))}"


def _scores(report: Mapping[str, object]) -> Iterator[str]:
    """Yield the score of the soup, and of the ingredients that were scored on their own.

    Of a learned soup, the loss that was validated on, before and after.
    """
    yield from _losses(report)
    score = _number(report.get("score"))
    if score is None:
        return
    split = report.get("split")
    on = f" on {escaped(split)}" if isinstance(split, str) else ""
    yield ""
    yield "## Scores"
    yield ""
    yield f"Found by a search for the best score{on}, larger is better."
    yield ""
    yield "| | score |"
    yield "|---|---:|"
    yield f"| this soup | {score:.6g} |"
    singles = report.get("singles")
    for each in singles if isinstance(singles, (list, tuple)) else ():
        alone = _number(each.get("score")) if isinstance(each, Mapping) else None
        if alone is not None:
            name = os.path.basename(str(each.get("ingredient")).rstrip("/"))
            yield f"| {escaped(name)} alone | {alone:.6g} |"


def _losses(report: Mapping[str, object]) -> Iterator[str]:
    looks, best = report.get("looks"), report.get("best")
    if not isinstance(looks, (list, tuple)) or not isinstance(best, int) or best >= len(looks):
        return
    first, last = looks[0], looks[best]
    at = 1 if None not in (first[1], last[1]) else 0  # what was held out, where anything was
    losses = [_number(first[at]), _number(last[at])]
    if None in losses:
        return
    yield ""
    yield "## Losses"
    yield ""
    yield f"Mean losses {('in training', 'on what was held out')[at]}, smaller is better."
    yield ""
    yield "| | loss |"
    yield "|---|---:|"
    yield f"| equal coefficients | {losses[0]:.6g} |"
    yield f"| this soup | {losses[1]:.6g} |"


def _number(value: object) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _checking(plan: MixPlan) -> Iterator[str]:
    yield ""
    yield "## Verify"
    yield ""
    yield (
        f"`{PROVENANCE_NAME}` holds the recipe, and digests of the ingredients and of every tensor."
    )
    yield "With streamsoup, this compares them with the files here:"
    yield ""
    yield "```sh"
    yield "streamsoup verify --quick FOLDER"
    yield "```"
    yield ""
    times = " ".join("--ingredient CKPT" for _ in plan.ingredients[:3])
    more = " …" if len(plan.ingredients) > 3 else ""
    yield "This merges the ingredients again, in the order of the table, and compares the result:"
    yield ""
    yield "```sh"
    yield f"streamsoup verify FOLDER {times}{more}"
    yield "```"


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, in one line.

    >>> print(escaped("a|b <script> www.x"))
    a\|b \<script\> www\.x
    """
    return _MARKUP.sub(r"\\\1", printable(text))
