"""Units: groups of leaves that one process makes together, large enough to be worth sending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from streamsoup.engine.plan import Leaf, MixPlan
from streamsoup.errors import RecipeError, option

__all__ = ["LARGEST_NBYTES", "SMALLEST_NBYTES", "Unit", "cut", "in_units", "refuse_whole_model"]

SMALLEST_NBYTES = 1 << 30
"""Bytes to read of a unit, at least, while there is work for all: about a second. Its last sync,
for which its threads wait, and the way to it and back take some hundredths."""

LARGEST_NBYTES = 1 << 33
"""Bytes to read of a unit, at most, but for one tensor: seconds, which is what a loss costs."""

ROUNDS = 8
"""Units for each slot: where nodes are not equally fast, an eighth of the work evens that out."""


class Unit(msgspec.Struct, frozen=True):
    """Some leaves of a plan."""

    leaves: tuple[int, ...]
    """Their numbers."""
    nbytes: int
    """Bytes of them in all ingredients."""
    tensors: tuple[str, ...]
    """Names of their tensors: who has read these before, reads them from memory."""
    own: Any = None
    """What the process that does the unit is given; plain data."""


def refuse_whole_model(plan: MixPlan, asked: str) -> None:
    """Raise `RecipeError` for a rule that takes statistics of the whole model."""
    rule = plan.recipe.rule
    if rule.n_passes > 1 and rule.spans_model:
        raise RecipeError(
            f"{plan.recipe.method}: takes statistics of the whole model, which cannot be shared "
            f"out; leave out {option(asked)}, or take those of each tensor"
        )


def in_units(plan: MixPlan, leaves: Sequence[Leaf], n_slots: int) -> list[Unit]:
    """Cut leaves, in their order, into units for so many slots.

    Where the rule of a plan takes statistics of a tensor, its leaves stay together.
    """
    sizes = [
        sum(leaf.n_units * plan.tensors[leaf.tensor].unit_nbytes_in(n) for n in plan.layout_of)
        for leaf in leaves
    ]
    target = min(max(sum(sizes) // (ROUNDS * n_slots), SMALLEST_NBYTES), LARGEST_NBYTES)
    # A small soup is worth sharing out to all slots, too.
    target = min(target, max(1, sum(sizes) // n_slots))
    whole = plan.recipe.rule.n_passes > 1
    keys = [leaf.tensor if whole else leaf.number for leaf in leaves]
    units = []
    for chosen in cut(keys, sizes, target):
        names = dict.fromkeys(plan.tensors[leaves[at].tensor].name for at in chosen)
        numbers = tuple(leaves[at].number for at in chosen)
        units.append(Unit(numbers, sum(sizes[at] for at in chosen), tuple(names)))
    return units


def cut(keys: Sequence[int], sizes: Sequence[int], target: int) -> list[list[int]]:
    """Cut a list into runs of about `target` bytes; neighbours with the same key stay together.

    Returns the places ``0 … n-1`` of each run.

    >>> cut([0, 1, 2, 2, 3], [4, 4, 9, 9, 1], 8)
    [[0, 1], [2, 3], [4]]
    """
    runs: list[list[int]] = []
    held = 0
    for at, (key, nbytes) in enumerate(zip(keys, sizes, strict=True)):
        begins = at == 0 or key != keys[at - 1]
        if not runs or (begins and held + nbytes // 2 >= target):
            runs.append([])
            held = 0
        runs[-1].append(at)
        held += nbytes
    return runs
