"""Warnings about soups that can be made, but are likely a mistake.

Some follow from headers before the pass; the others from digests after it, at no cost: ingredients
that are the same, weights that are all zero, tied tensors that differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence

import xxhash

from streamsoup.engine.digest import Digests
from streamsoup.engine.plan import LEAF, MixPlan, PlannedTensor
from streamsoup.errors import count, printable, some
from streamsoup.formats.configs import INPUTS, OUTPUTS, says_tied
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.meaning import folder_of
from streamsoup.recipe import Provenance

__all__ = ["after", "before"]

_PIECE = bytes(1 << 20)


def before(plan: MixPlan) -> list[str]:
    """Return warnings that follow from headers and paths. Takes time in the number of tensors."""
    notes = [note for each in plan.ingredients for note in each.source.notes]
    return [*_empty(plan), *_coded(plan), *_twice(plan.ingredients), *dict.fromkeys(notes)]


def after(plan: MixPlan, provenance: Provenance, digests: Digests | None) -> list[str]:
    """Return warnings that follow from the digests of a pass.

    `digests` are those of the pass; None if an earlier run made it, and then zeros are not looked
    for. Costs milliseconds.
    """
    zero = [] if digests is None else [*_zero(plan, digests)]
    return [*zero, *_same(plan, provenance), *_tied(plan, provenance.tensors)]


def _empty(plan: MixPlan) -> Iterator[str]:
    empty = [tensor.name for tensor in plan.tensors if not tensor.n_units]
    if empty:
        yield (
            f"{count(len(empty), 'tensor')} without elements in all ingredients: {some(empty)}; a "
            "model saved under DeepSpeed ZeRO-3 without gathering its weights looks so: save it "
            "again, or make it whole with the zero_to_fp32.py of its checkpoint"
        )


def _coded(plan: MixPlan) -> Iterator[str]:
    coded = [tensor.name for tensor in plan.tensors if tensor.operation == "code"]
    if coded:
        yield (
            f"{count(len(coded), 'tensor')} of quantised weights, codes and scales, not averaged "
            "but copied, and refused unless the same in all ingredients bit for bit: "
            f"{some(coded, 3)}"
        )


def _twice(ingredients: Sequence[Ingredient]) -> Iterator[str]:
    groups: dict[object, list[str]] = {}
    for ingredient in ingredients:
        groups.setdefault(_identity(ingredient), []).append(printable(ingredient.name))
    for first, *others in groups.values():
        if others:
            others = [name for name in dict.fromkeys(others) if name != first]
            also = f", also as {some(others)}" if others else ""
            yield f"{first} is given more than once{also}, and counts each time"


def _identity(ingredient: Ingredient) -> object:
    source = ingredient.source
    if not source.files:  # a state dict is named after its digest, or its origin
        return json.dumps([source.name, source.fingerprint])
    found = [os.stat(path) for path in source.files]
    return tuple((status.st_dev, status.st_ino) for status in found)


def _zero(plan: MixPlan, digests: Digests) -> Iterator[str]:
    """Yield the ingredients whose floats are all zero, by the digests of their leaves."""
    floats = [tensor for tensor in plan.tensors if tensor.operation == "mix" and tensor.n_units]
    known: dict[int, bytes] = {}
    for i, ingredient in enumerate(plan.ingredients):
        if floats and all(_is_zero(plan, tensor, i, digests, known) for tensor in floats):
            yield f"{printable(ingredient.name)}: all its weights are zero; leave it out"


def _is_zero(
    plan: MixPlan, tensor: PlannedTensor, i: int, digests: Digests, known: dict[int, bytes]
) -> bool:
    size = tensor.nbytes_in(plan.layout_of[i]) // tensor.n_units
    for number in range(tensor.n_leaves):
        nbytes = min(LEAF, tensor.n_units - number * LEAF) * size
        if nbytes not in known:
            whole = xxhash.xxh3_128()
            for at in range(0, nbytes, len(_PIECE)):
                whole.update(memoryview(_PIECE)[: nbytes - at])
            known[nbytes] = whole.digest()
        if digests.of_leaf(tensor.first_leaf + number, i) != known[nbytes]:
            return False
    return True


def _same(plan: MixPlan, provenance: Provenance) -> Iterator[str]:
    """Yield the ingredients that hold the same in all tensors, but for one given twice."""
    groups: dict[str, list[Ingredient]] = {}
    for ingredient, record in zip(plan.ingredients, provenance.ingredients, strict=True):
        groups.setdefault(record.digest, []).append(ingredient)
    for group in groups.values():
        if len({_identity(ingredient) for ingredient in group}) > 1:
            names = some(dict.fromkeys(ingredient.name for ingredient in group))
            yield f"the same in all tensors, bit for bit, so that each counts again: {names}"


def _tied(plan: MixPlan, tensors: Mapping[str, str]) -> Iterator[str]:
    """Yield the output embeddings that a configuration ties to input embeddings which differ."""
    folder = folder_of(plan.ingredients[0])
    for component in plan.ingredients[0].components if folder is not None else ():
        within = f"{component}/" if component else ""
        pairs = [
            (output, name)
            for end in OUTPUTS
            for output in tensors
            if output.endswith(end) and output.startswith(within)
            for name in tensors
            if name.endswith(INPUTS) and name.startswith(within)
        ]
        if not pairs or not says_tied(os.path.join(str(folder), component)):
            continue
        output, name = pairs[0]
        if tensors[output] != tensors[name]:
            yield (
                f"{printable(plan.ingredients[0].name)}: {within}config.json says that "
                f"{printable(output)} is tied to {printable(name)}, but they differ in the soup, "
                "so that loaders drop one of them; set tie_word_embeddings to false in the soup's "
                f"{within}config.json to keep both"
            )
