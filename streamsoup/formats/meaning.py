"""Check that the same numbers mean the same in all ingredients, by their side files.

A mean of weights under two configurations, or of embeddings in two orders, is a model of neither,
and has the shapes of both. All that says so is refused by name, before a weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from streamsoup.errors import FormatError, MismatchError, count, option, printable, some
from streamsoup.formats.configs import (
    changes,
    config_folder,
    is_config,
    quantisation,
    read_config,
    without_quantisation,
)
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.parts import coded_in
from streamsoup.formats.quantised.causes import advice_for
from streamsoup.formats.remote.addresses import is_address
from streamsoup.formats.side_files import is_equal
from streamsoup.formats.vocabularies import compare_vocabularies, is_vocabulary
from streamsoup.reading import Reading

__all__ = ["check_meaning", "check_quantised", "folder_of"]


def folder_of(ingredient: Ingredient) -> str | None:
    """Return the folder in which an ingredient's configuration lies; None if it has none."""
    return config_folder(ingredient.source)


def check_quantised(
    ingredients: Sequence[Ingredient],
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> None:
    """Raise `MismatchError` for a model that is quantised in a way that its tensors do not show.

    Where codes stand beside their scales, `parts` tells them, and they are copied if equal. Paths
    whose weights are dequantised in `reading` were looked at then. Reads the configurations.
    """
    for ingredient, component in [(each, part) for each in ingredients for part in each.components]:
        if reading.dequantize and (ingredient.source.files or is_address(ingredient.path)):
            continue
        folder = folder_of(ingredient)
        told = quantisation(None if folder is None else os.path.join(folder, component))
        if told is None:
            continue
        files = ingredient.file_names
        places = {
            name: place
            for name, place in ingredient.layout.places.items()
            if os.path.dirname(files[place[0]]) == component
        }
        coded = coded_in(places)
        unknown = [
            name
            for name, (_, spec) in places.items()
            if name not in coded and not spec.dtype.averaged and spec.n_elements > 1
        ]
        if not coded or unknown:
            among = f" (such as {some(unknown, 1)})" if unknown else ""
            advice = advice_for(ingredient.source.tensors)
            raise MismatchError(
                f"{told.where}, so the model is quantised, and codes{among} cannot be averaged; "
                f"{advice}"
            )


def check_meaning(
    ingredients: Sequence[Ingredient],
    *,
    config: str,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> None:
    """Raise `MismatchError` where ingredients differ from the first in what weights mean.

    That is any key of a configuration but those of bookkeeping and of run time, unless `config` is
    ``first``; and the id of any token, whatever it is. What `reading` makes the same is passed
    over: quantisation, or the length of a vocabulary. Reads what differs of these files.
    """
    first = folder_of(ingredients[0])
    problems: list[str] = []
    moved = False
    seen: set[str] = set() if first is None else {os.path.realpath(first)}
    for other in ingredients[1:]:
        folder = folder_of(other)
        if first is None or folder is None or os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        for name in _names(first, ingredients[0].components):
            paths = os.path.join(first, name), os.path.join(folder, name)
            if is_equal(*paths):
                continue
            # Stacked layers have a configuration of their own, with another number of them.
            changed = [each.source.side_files.get(name) for each in (ingredients[0], other)]
            pair = f"{printable(paths[1])} and {printable(paths[0])}"
            if is_vocabulary(name):
                conflict = compare_vocabularies(*paths)
                if conflict is not None and (conflict.moved or config == "same"):
                    moved |= conflict.moved
                    problems.append(f"{pair} have other token ids: {conflict.what}")
            elif config == "same":
                configs = [
                    read_config(path) if content is None else json.loads(content)
                    for path, content in zip(paths, changed, strict=True)
                ]
                problems += _of_configs(pair, configs[0], configs[1], reading)
    if problems:
        raise MismatchError(_in_words(problems, moved=moved))


def _of_configs(
    pair: str, one: dict[str, Any] | None, two: dict[str, Any] | None, reading: Reading
) -> list[str]:
    if one is None or two is None:
        return []
    if reading.dequantize:
        one, two = without_quantisation(one), without_quantisation(two)
    found = [change for change in changes(one, two) if change.kind == "meaning"]
    if reading.embeddings == "common":
        found = [change for change in found if not change.is_of_vocabulary]
    if not found:
        return []
    keys = count(len(found), "key")
    return [f"{pair} differ in {keys} that may change what weights mean: {some(found)}"]


def _names(folder: str, components: Sequence[str]) -> list[str]:
    """List what says what weights mean, in a folder and in those within it, by relative name."""
    if tuple(components) == ("",):
        return _names_of(folder, inside=True)
    return [
        os.path.join(component, name)
        for component in components
        if os.path.isdir(os.path.join(folder, component))
        for name in _names_of(os.path.join(folder, component), inside=False)
    ]


def _names_of(folder: str, *, inside: bool) -> list[str]:
    """List what says what weights mean in one folder, and in those inside of it if so asked."""
    found: list[str] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise FormatError(
            f"{printable(folder)}: cannot be listed: {error.strerror}; fix that, and run again"
        ) from None
    for name in names:
        if is_config(name) or is_vocabulary(name):
            found.append(name)
            continue
        inner = os.path.join(name, "config.json")
        if (
            inside
            and not name.startswith((".", "checkpoint"))
            and os.path.isfile(os.path.join(folder, inner))
        ):
            found.append(inner)
    return found


def _in_words(problems: list[str], *, moved: bool) -> str:
    advice = (
        "leave out what has another vocabulary"
        if moved
        else "leave out what is another model, or take that of the first with "
        f"{option('config', 'first')}"
    )
    if len(problems) == 1:
        return f"{problems[0]}; {advice}"
    shown = problems[:12]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more")
    lines = [f"  {line}" for line in shown]
    return "\n".join(["weights do not mean the same in these ingredients:", *lines, advice])
