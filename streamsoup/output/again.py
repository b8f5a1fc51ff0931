"""Make a soup once more from its provenance: however it was found, one pass writes it again."""

from __future__ import annotations

import os

from msgspec.structs import replace

from streamsoup.formats.ingredients import open_ingredients
from streamsoup.options import Options
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, plan_order
from streamsoup.output.verification import read_provenance, where_they_were

__all__ = ["make_again"]


def make_again(
    soup: str,
    *,
    output: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008 - frozen
) -> Soup:
    """Make the soup in the folder `soup` again, in the folder `output`.

    Args:
        soup: A folder with a provenance.
        output: Folder to make.
        options: How the work is done. What decides bytes is in the provenance, but for `config`.

    Returns:
        The soup; its report is that of the first one.

    Raises:
        RecipeError: There is no provenance, or its rule is unknown, or an ingredient was in memory.
        StreamsoupError: As for `uniform`.

    Reads the ingredients where the provenance says they were. They may have changed since: then the
    soup is another, and `verify` of the first one says so.
    """
    provenance = read_provenance(soup)
    recipe, report = provenance.recipe, dict(provenance.report)
    # As they were named, if that is still the same path from here.
    paths = [
        name if os.path.abspath(name) == path else path
        for name, path in zip(recipe.ingredients, where_they_were(soup, provenance), strict=True)
    ]
    opened = open_ingredients(paths, recipe.reading.reaching_as(options))
    names = tuple(ingredient.name for ingredient in opened)
    if report.get("base") == recipe.ingredients[0]:
        report["base"] = names[0]
    ordered = plan_order(opened, replace(recipe, ingredients=names), options)
    return make(replace(ordered, report=report), output=output, options=options)
