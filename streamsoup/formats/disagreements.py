"""Where the ingredients of a soup do not fit together, and what to do about it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

from streamsoup.errors import count, option, printable, some
from streamsoup.formats.configs import OF_WORDS
from streamsoup.formats.ingredients import Ingredient
from streamsoup.formats.quantised.causes import advice_for
from streamsoup.reading import Reading
from streamsoup.tensors import TensorSpec

__all__ = ["differing", "disagreements", "in_words"]

Places = Mapping[str, tuple[int, TensorSpec]]

_OTHER_NAMES = "leave out what is of another architecture, or save it with the same tensors"
_OTHER_SHAPES = "leave out what is of another architecture, or has resized embeddings"
_OTHER_ROWS = (
    "these have a row for each word of a vocabulary: average those that all have, if the words are "
    f"the same, with {option('embeddings', 'common')}"
)
_OTHER_FLOATS = f"convert all floats to one dtype with {option('dtype')}"
_OTHER_DTYPES = "save the tensors that are not floats in the same dtype"
_OTHER_PREFIX = "save each model itself, not its wrapper, so that all names are the same"
_TIED_COPY = "save all with the same tie_word_embeddings, or write the copy into those that lack it"
_OTHER_PARTS = (
    f"name those that all have with {option('components')}, and the others come from the first"
)
_ADVICE = (
    *(_OTHER_PREFIX, _TIED_COPY, _OTHER_PARTS, _OTHER_NAMES, _OTHER_ROWS, _OTHER_SHAPES),
    *(_OTHER_FLOATS, _OTHER_DTYPES),
)

_WRAPPERS = {
    "module.": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "model.": "a model with a head, or a LightningModule",
}
"""Prefixes that wrappers put before names or into them, and who does."""

_TIED = (
    *("lm_head.weight", "embed_out.weight", "output.weight", "proj_out.weight"),
    *("embed_tokens.weight", "word_embeddings.weight", "shared.weight", "wte.weight"),
    *("cls.predictions.decoder.weight", "lm_head.decoder.weight", "embed_in.weight"),
    *("cls.predictions.decoder.bias", "lm_head.decoder.bias", "tok_embeddings.weight"),
)
"""How the names of tensors end that transformers ties to another."""

_MASKS = frozenset({"BOOL", "I64"})
"""Dtypes of masks and indices in torch; narrower integers may be codes of quantised weights."""


def disagreements(
    owners: Sequence[Ingredient], positions: Sequence[int], *, convert: bool
) -> tuple[list[str], list[str]]:
    """List where ingredients differ from the first in names, shapes or dtypes, a line each.

    Args:
        owners: An ingredient of each layout, the first of all at first.
        positions: Their places among all ingredients, from 1.
        convert: Whether floats may have any dtype.

    Returns:
        The disagreements, and what to do about them, a line for each kind: for the likely cause
        alone, where one can be told. Costs a look at each tensor.
    """
    first = owners[0]
    places = first.layout.places
    problems: list[str] = []
    advice: set[str] = set()
    one = _place(first, positions[0])
    for other, position in zip(owners[1:], positions[1:], strict=True):
        two = _place(other, position)
        theirs = other.layout.places
        lacking = [name for name in places if name not in theirs]
        extra = [name for name in theirs if name not in places]
        if lacking or extra:
            named = {id(first): one, id(other): two}
            found = (
                _by_component(first, other, named, lacking + extra)
                or _by_prefix(first, other, named)
                or _by_tie(first, other, named, lacking, extra)
            )
            cause, todo = found or ("", _OTHER_NAMES)
            problems += [cause] if found else _by_name(one, two, lacking, extra)
            advice.add(todo)
        misshapen: list[str] = []
        shapes, dtypes = [], []
        rows = 0
        for name, (_, spec) in places.items():
            if name not in theirs:
                continue
            there = theirs[name][1]
            if there.shape != spec.shape:
                rows += name.endswith(OF_WORDS) and there.shape[1:] == spec.shape[1:]
                misshapen.append(name)
                shapes.append(f"{printable(name)} {list(there.shape)} and {list(spec.shape)}")
            averaged = there.dtype.averaged and spec.dtype.averaged
            if there.dtype != spec.dtype and not (convert and averaged):
                dtypes.append(f"{printable(name)} {there.dtype.name} and {spec.dtype.name}")
                advice.add(_OTHER_FLOATS if averaged else _OTHER_DTYPES)
        if shapes:
            advice.add(
                _OTHER_ROWS
                if rows == len(shapes)
                else _of_part(misshapen, len(places)) or _OTHER_SHAPES
            )
            problems.append(
                f"{two} and {one} differ in the shape of {_count(shapes)}: {some(shapes)}"
            )
        if dtypes:
            problems.append(
                f"{two} and {one} differ in the dtype of {_count(dtypes)}: {some(dtypes)}"
            )
    known = [each for each in _ADVICE if each in advice]
    return problems, [*sorted(advice - set(known)), *known]


def _place(ingredient: Ingredient, position: int) -> str:
    """Return the name of an ingredient and its position, from 1: names may be long digests."""
    return f"{printable(ingredient.name)} (ingredient {position})"


def _of_part(names: Sequence[str], n: int) -> str:
    """Return what to do where only one part of many has other shapes, such as a head; or nothing.

    `n` is the number of all tensors.
    """
    part = posixpath.commonprefix([f"{name.rpartition('.')[0]}." for name in names])
    part = part[: part.rfind(".") + 1]
    # A pattern that a shell and `fnmatch` take as it is, and more that fits than does not.
    if not re.fullmatch(r"[\w.-]+\.", part) or 2 * len(names) >= n:
        return ""
    return (
        f"average all but these, which come from the first, with {option('exclude', part + '*')}; "
        "or leave out what is of another architecture"
    )


def _by_name(one: str, two: str, lacking: list[str], extra: list[str]) -> Iterable[str]:
    """Yield which names one has and the other lacks."""
    if lacking:
        yield f"{two} lacks {_count(lacking)} of {one}: {some(lacking)}"
    if extra:
        yield f"{two} has {_count(extra)} that {one} lacks: {some(extra)}"


def _by_component(
    first: Ingredient, other: Ingredient, named: Mapping[int, str], names: Sequence[str]
) -> tuple[str, str] | None:
    """Return a line for whole components that one of two pipelines lacks, and what to do."""
    ours, theirs = (
        dict.fromkeys(map(posixpath.dirname, each.file_names)) for each in (first, other)
    )
    lone = [part for part in (*ours, *theirs) if (part in ours) != (part in theirs)]
    shared = [part for part in ours if part in theirs]
    within = tuple(f"{part}/" for part in lone if part)
    if not shared or not within or not all(name.startswith(within) for name in names):
        return None
    lines = [
        f"{named[id(lacks)]} has no component {some(parts)}, which {named[id(has)]} has"
        for has, lacks, parts in (
            (first, other, [part for part in lone if part in ours]),
            (other, first, [part for part in lone if part in theirs]),
        )
        if parts
    ]
    return "; ".join(lines), _OTHER_PARTS


def _by_prefix(
    first: Ingredient, other: Ingredient, named: Mapping[int, str]
) -> tuple[str, str] | None:
    """Return a line for names that are the same but for a wrapper's prefix, and what to do."""
    ours, theirs = first.layout.places, other.layout.places
    for prefix, wrapper in _WRAPPERS.items():
        for wrapped, plain, has in ((theirs, ours, other), (ours, theirs, first)):
            if not any(prefix in name for name in wrapped):
                continue
            pair = _renaming(wrapped, plain, prefix)
            if pair is not None or _bare(wrapped, prefix) == _bare(plain, prefix):
                lone = next(name for name in wrapped if name not in plain)
                return (
                    f"the names in {named[id(other)]} and {named[id(first)]} differ by "
                    f"{prefix!r} alone, which {wrapper} puts into {printable(has.name)}: "
                    f"{printable(lone)}"
                ), _OTHER_PREFIX if pair is None else f"rename it with {option('rename', pair)}"
    return None


def _renaming(wrapped: Iterable[str], plain: Iterable[str], prefix: str) -> str | None:
    """Return the prefix to replace, and by what, that makes the names the same; None for none."""
    heads = dict.fromkeys(name.partition(".")[0] + "." for name in plain)
    pairs = [f"{prefix}=>", *(f"{prefix}{head}=>{head}" for head in list(heads)[:4])]
    for pair in pairs:
        reading = Reading(rename=(pair,))
        names = [sorted(map(reading.renamed, each)) for each in (wrapped, plain)]
        if names[0] == names[1] and len(set(names[0])) == len(names[0]):
            return pair
    return None


def _bare(names: Iterable[str], prefix: str) -> list[str]:
    """Return the names without a prefix, in whichever part of them it stands."""
    inside = "." + prefix
    return sorted(name.removeprefix(prefix).replace(inside, ".") for name in names)


def _by_tie(
    first: Ingredient,
    other: Ingredient,
    named: Mapping[int, str],
    lacking: list[str],
    extra: list[str],
) -> tuple[str, str] | None:
    """Return a line for what is likely a tied copy that one of them does not store."""
    if lacking and extra:
        return None
    has, lacks, names = (first, other, lacking) if lacking else (other, first, extra)
    places = has.layout.places
    twins: list[str] = []
    for name in names:
        spec = places[name][1]
        twin = next(
            (
                each
                for each, (_, its) in lacks.layout.places.items()
                if name.endswith(_TIED)
                and each.endswith((*_TIED, "cls.predictions.bias", "lm_head.bias"))
                and (its.shape, its.dtype) == (spec.shape, spec.dtype)
            ),
            None,
        )
        if twin is None:
            return None
        twins.append(f"{name} beside {twin}")
    return (
        f"{named[id(has)]} stores what {named[id(lacks)]} has once only, likely a tied copy: "
        f"{some(twins)}"
    ), _TIED_COPY


def differing(
    ingredient: Ingredient, first: Ingredient, tensor: str, *, number: int, coded: bool
) -> str:
    """Return the message for a tensor that is not averaged, and differs from that of the first.

    `number` is the ingredient's, from 1. `coded` says that it is a part of a quantised weight. What
    may be one without a scale that is found beside it gets no advice to take the first
    ingredient's: that would be another model's code under our scales.
    """
    dtype = first.layout.places[tensor][1].dtype.name
    what = f"ingredient {number}: {ingredient.where(tensor)}: this {dtype} tensor differs "
    what += f"from that of ingredient 1 ({printable(first.name)})"
    if coded:
        return (
            f"{what}, and is a part of a quantised weight, of which codes and scales have no mean; "
            f"{advice_for(ingredient.source.tensors)}"
        )
    if dtype in _MASKS or first.layout.places[tensor][1].n_elements == 1:
        takes = f"{option('non_float', 'first')} takes it from the first ingredient"
        return f"{what}, and is not averaged; {takes}"
    return (
        f"{what}, and is not averaged; if it holds codes of quantised weights, use the checkpoints "
        "they were quantised from, else leave this ingredient out"
    )


def _count(items: Sequence[object]) -> str:
    return count(len(items), "tensor")


def in_words(problems: list[str], advice: list[str]) -> str:
    """Write problems and advice as one message of a page at most."""
    shown = problems[:12]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more disagreements")
    if len(shown) == 1:
        return "; ".join([f"these ingredients cannot be averaged: {shown[0]}", *advice])
    lines = [*(f"  {line}" for line in shown), *advice]
    return "\n".join(["these ingredients cannot be averaged:", *lines])
