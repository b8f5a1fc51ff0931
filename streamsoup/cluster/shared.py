"""What the processes that share a pass have to agree on, and planning it anew from that."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import xxhash

from streamsoup.engine.plan import MixPlan, plan_mix
from streamsoup.engine.read import will_map
from streamsoup.errors import ChangedIngredientError, ClusterError, RecipeError, option, printable
from streamsoup.formats.identity import IngredientIdentity, how_files_differ, identity_of
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.options import Options
from streamsoup.reading import Reading
from streamsoup.recipe import ARITHMETIC, DIGEST, Recipe
from streamsoup.system.pickles import for_another_process
from streamsoup.version import __version__

__all__ = ["Opened", "Shared", "open_shared", "share_plan"]


class Shared(msgspec.Struct, frozen=True):
    """What to plan, and within which bounds."""

    recipe: Recipe
    reading: Reading
    """How ingredients reach the process."""
    ingredients: tuple[IngredientIdentity, ...]
    tensors: str
    """Digest of what the plan says of its tensors."""
    threads: int
    memory: int
    """Bytes, of a whole process."""
    io: str
    is_measured: bool
    """As in `MixPlan`."""
    code: tuple[str, str, str] = (__version__, ARITHMETIC, DIGEST)


class Opened(NamedTuple):
    """What another process has planned."""

    plan: MixPlan
    mapped: bool
    threads: int
    memory: int


def share_plan(plan: MixPlan, options: Options, *, asked: str, threads: int, memory: int) -> bytes:
    """Return what other processes plan the same from.

    Raises `RecipeError` for an ingredient without files, or a rule that cannot be sent; the message
    names the option that was `asked` for.
    """
    shared = Shared(
        recipe=plan.recipe,
        reading=plan.recipe.reading.reaching_as(options),
        ingredients=tuple(identity_of(each, asked) for each in plan.ingredients),
        tensors=_digest_of(plan),
        threads=threads,
        memory=memory,
        io=options.io,
        is_measured=plan.is_measured,
    )
    try:
        return for_another_process(shared)
    except Exception as error:
        raise RecipeError(
            f"the rule cannot be sent to another process ({error}); put it into a module, or leave "
            f"out {option(asked)}"
        ) from None


def open_shared(text: bytes, part_of: Callable[[MixPlan], MixPlan] = lambda plan: plan) -> Opened:
    """Open the ingredients anew, and plan the pass; `part_of` chooses what of it is done.

    Raises:
        ClusterError: This process has another streamsoup.
        ChangedIngredientError: An ingredient differs from what was shared.
        StreamsoupError: An ingredient cannot be opened.

    Reads headers.
    """
    try:
        shared = pickle.loads(text)
        here = Shared.__struct_defaults__[-1]
        if shared.code != here:
            raise AttributeError
    except (AttributeError, ImportError, TypeError):
        raise ClusterError(
            f"streamsoup {__version__} is not the one that asks; install the same on every node"
        ) from None
    opened = open_ingredients([each.path for each in shared.ingredients], shared.reading)
    found = [identity_of(each, "ray") for each in opened]
    check_identities(shared.ingredients, found)
    plan = part_of(plan_mix(opened, shared.recipe))
    plan = msgspec.structs.replace(plan, is_measured=shared.is_measured)
    if _digest_of(plan) != shared.tensors:
        raise ClusterError("the tensors of the ingredients are planned otherwise than by the asker")
    return Opened(plan, will_map(opened, shared.io), shared.threads, shared.memory)


def check_identities(
    expected: Sequence[IngredientIdentity], found: Sequence[IngredientIdentity]
) -> None:
    """Raise `ChangedIngredientError` unless all ingredients are the same."""
    for one, two in zip(expected, found, strict=True):
        if one != two:
            raise ChangedIngredientError(
                f"{printable(one.path)} {how_files_differ(one, two)}; all nodes have to see the "
                "same files, which do not change meanwhile"
            )


def _digest_of(plan: MixPlan) -> str:
    """Digest the tensors of a plan: names, shapes, dtypes, what is done, and their leaves."""
    told = [
        [
            tensor.name,
            tensor.shape,
            tensor.dtype.name,
            tensor.operation,
            tensor.first_leaf,
            [source.dtype.name for source in tensor.sources],
        ]
        for tensor in plan.tensors
    ]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(told))
