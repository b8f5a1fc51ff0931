"""Make what a recipe of mergekit says: open its models, find its layers, apply its rule."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from msgspec.structs import replace

from streamsoup.errors import MismatchError, RecipeError, printable
from streamsoup.formats.documents import Table
from streamsoup.formats.ingredients import Ingredient, open_ingredients
from streamsoup.formats.layers import layer_in, renumbered, stacks_in, stands_before
from streamsoup.formats.side_files import is_equal
from streamsoup.formats.stacked import Piece, stack_text
from streamsoup.formats.vocabularies import is_vocabulary
from streamsoup.methods.closed import stock
from streamsoup.methods.mergekit.configuration import (
    Configuration,
    Input,
    read_configuration,
    refused,
)
from streamsoup.methods.mergekit.parameters import Place, warn_unused
from streamsoup.methods.mergekit.translation import (
    Inputs,
    Method,
    Sphere,
    Stock,
    Tensors,
    check_count,
    find_method,
)
from streamsoup.methods.spheres import make_means
from streamsoup.options import Options
from streamsoup.output.jobs import make
from streamsoup.output.make import Soup, order
from streamsoup.reading import Reading

__all__ = ["ingredients_of", "merge"]

log = logging.getLogger("streamsoup")

_TOKENIZER = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "merges.txt")
"""What belongs to a tokenizer besides its vocabulary and configuration."""


def merge(table: Table, *, output: str | os.PathLike[str], options: Options) -> Soup:
    """Make the soup that a recipe of mergekit describes.

    Args:
        table: The recipe: see `formats.documents`.
        output: Folder to make.
        options: As for every verb; a dtype here counts more than that of the recipe.

    Returns:
        The soup. What mergekit ignores in the recipe is among its warnings.

    Raises:
        RecipeError: Something in the recipe is wrong, missing or not supported, at its line.
        StreamsoupError: Whatever the verb of the method raises.

    Costs what the method costs.
    """
    configuration = read_configuration(table)
    method = find_method(configuration)
    inputs = _inputs(configuration, method)
    check_count(configuration, method, inputs)
    if options.dtype == "same" and configuration.dtype is not None:
        options = replace(options, dtype=configuration.dtype)
    opened = open_ingredients(_paths(configuration, inputs, options.reading), options.reading)
    _check_tokenizer(configuration, inputs, options.reading)
    tensors = _tensors(configuration, inputs, opened)
    warnings = [*configuration.warnings, *warn_unused(configuration, method.parameters)]
    made = method.translate(tensors)
    based = inputs.bases is not None and configuration.method != "slerp"
    base, others = (opened[0], opened[1:]) if based else (None, opened)
    label = configuration.method
    if isinstance(made, Sphere):
        return make_means(
            others,
            made.shares,
            made.per_tensor,
            made.factors_of,
            label,
            base,
            output,
            options,
            warnings,
        )
    if isinstance(made, Stock):
        assert base is not None
        for warning in warnings:
            log.warning("%s", warning)
        soup = stock(others, base=base, output=output, options=options)
        return replace(soup, warnings=(*soup.warnings, *warnings))
    ordered = order(opened, made, method=label, options=options)
    report = {} if base is None else {"base": base.name}
    ordered = replace(ordered, report=report, warnings=[*ordered.warnings, *warnings])
    return make(ordered, output=output, options=options)


def ingredients_of(table: Table) -> list[str]:
    """Return the paths of the models of a recipe. Raises `RecipeError` as `merge` does."""
    configuration = read_configuration(table)
    named = [input.model for slice in configuration.slices for input in slice.inputs]
    return list(dict.fromkeys([*named, *([configuration.base] if configuration.base else [])]))


def _inputs(configuration: Configuration, method: Method) -> Inputs:
    """Tell bases from the other inputs, slice by slice."""
    bases: list[Input] = []
    others: list[tuple[Input, ...]] = []
    for slice in configuration.slices:
        base = slice.base
        if method.base == "input":
            more = []
            if configuration.whole and base not in (None, *(each.model for each in slice.inputs)):
                more = [Input(str(base), configuration.base_where)]
            others.append((*slice.inputs, *more))
            continue
        found = [each for each in slice.inputs if each.model == base]
        if base is None and method.base == "needed":
            raise RecipeError(f"{slice.where}: {configuration.method} needs a base_model")
        if base is not None and not found and configuration.whole:
            found = [Input(base, configuration.base_where)]
        if base is not None and not found:
            raise RecipeError(
                f"{slice.where}: the base_model {printable(base)} is not among the sources; add it"
            )
        bases += found[:1]
        others.append(tuple(each for each in slice.inputs if each.model != base))
    if bases and len(bases) != len(configuration.slices):
        raise RecipeError(f"{configuration.where}: some slices have a base_model, and others none")
    return Inputs(tuple(bases) or None, tuple(others))


def _paths(configuration: Configuration, inputs: Inputs, reading: Reading) -> list[str]:
    """Return the path of each ingredient, the base first: a model, or layers of several."""
    columns = [] if inputs.bases is None else [inputs.bases]
    columns += list(zip(*inputs.others, strict=True))
    if configuration.whole:
        return [column[0].model for column in columns]
    n_layers = _count_layers([input for column in columns for input in column], reading)
    return [_stack(column, n_layers) for column in columns]


def _count_layers(inputs: Sequence[Input], reading: Reading) -> dict[str, int]:
    """Return the number of layers of each model that has one stack of them.

    Raises `RecipeError` at the line of layers that are not there.
    """
    models = list(dict.fromkeys(input.model for input in inputs))
    found = {}
    for model, opened in zip(models, open_ingredients(models, reading), strict=True):
        stacks = [*stacks_in(opened.layout.places).values()]
        if len(stacks) == 1:
            found[model] = stacks[0]
    for input in inputs:
        n = found.get(input.model)
        if n is not None and input.layers is not None and input.layers[1] > n:
            raise RecipeError(
                f"{input.where}: layer_range: {printable(input.model)} has {n} layers, 0 to {n - 1}"
            )
    return found


def _stack(column: Sequence[Input], n_layers: Mapping[str, int]) -> str:
    """Return layers of several models as one path; all layers of one are that model."""
    pieces: list[Piece] = []
    for input in column:
        assert input.layers is not None
        first, end = input.layers
        if pieces and (pieces[-1].path, pieces[-1].end) == (input.model, first):
            pieces[-1] = Piece(input.model, pieces[-1].first, end)
        else:
            pieces.append(Piece(input.model, first, end))
    if len(pieces) == 1 and (pieces[0].first, pieces[0].end) == (0, n_layers.get(pieces[0].path)):
        return pieces[0].path
    return stack_text(pieces)


def _check_tokenizer(configuration: Configuration, inputs: Inputs, reading: Reading) -> None:
    """Refuse a tokenizer that is not that of the first ingredient, whose side files are copied."""
    first = inputs.bases[0] if inputs.bases is not None else inputs.others[0][0]
    wanted = configuration.tokenizer
    if wanted == "base":
        wanted = configuration.base
        if wanted is None:
            raise RecipeError(f"{configuration.tokenizer_where}: there is no base_model")
    if wanted in (None, first.model):
        return
    folders = [each.folder for each in open_ingredients([first.model, str(wanted)], reading)]
    if None in folders or not _is_same_tokenizer(*map(str, folders)):
        raise refused(
            configuration.tokenizer_where,
            f"the tokenizer is that of {printable(first.model)}, the first, which differs; leave "
            f"this out, and put the tokenizer of {printable(wanted)} beside the soup",
        )


def _is_same_tokenizer(first: str, other: str) -> bool:
    """Return True if two folders have the same files of a tokenizer."""
    names = {
        name
        for name in (*os.listdir(first), *os.listdir(other))
        if is_vocabulary(name) or name in _TOKENIZER
    }
    return all(is_equal(os.path.join(first, name), os.path.join(other, name)) for name in names)


def _tensors(configuration: Configuration, inputs: Inputs, opened: Sequence[Ingredient]) -> Tensors:
    """Find the slice and the place of each averaged tensor."""
    layout = opened[0].layout.places
    stacks = stacks_in(layout)
    n_layers = [0 if configuration.whole else s.inputs[0].n_layers for s in configuration.slices]
    starts = [*accumulate(n_layers, initial=0)][:-1]
    places = {
        name: _place(configuration, name, stacks, starts)
        for name, (_, spec) in layout.items()
        if spec.dtype.averaged
    }
    if not places:
        raise MismatchError(f"{printable(opened[0].name)}: has no tensor that is averaged")

    def name_in(name: str, input: Input) -> str:
        layer = layer_in(name)
        number, _ = places[name]
        if input.layers is None or layer is None or layer.prefix not in stacks:
            return name
        return renumbered(name, layer.number - starts[number] + input.layers[0])

    return Tensors(configuration, inputs, places, name_in)


def _place(
    configuration: Configuration,
    name: str,
    stacks: Mapping[str, int],
    starts: Sequence[int],
) -> tuple[int, Place]:
    """Return the number of a tensor's slice, and where in it the tensor stands.

    What is in no layer has the settings of the first slice, or of the last, at t = 0.
    """
    layer = layer_in(name)
    slices = configuration.slices
    if layer is None or layer.prefix not in stacks:
        number = 0 if stands_before(name) else len(slices) - 1
        return number, Place(name, slices[number], 0.0)
    number, n = 0, stacks[layer.prefix]
    offset = layer.number
    if not configuration.whole:
        number = bisect_right(starts, layer.number) - 1
        offset, n = layer.number - starts[number], slices[number].inputs[0].n_layers
    return number, Place(name, slices[number], offset / (n - 1) if n > 1 else 1.0)
