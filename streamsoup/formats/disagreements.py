"""Where the ingredients of a soup do not fit together, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from streamsoup.errors import printable, some
from streamsoup.formats.shards import Ingredient

__all__ = ["disagreements", "in_words"]

_OTHER_NAMES = "leave out what is of another architecture, or save it with the same tensors"
_OTHER_SHAPES = "leave out what is of another architecture, or has resized embeddings"
_OTHER_FLOATS = "choose one dtype for all floats with --dtype"
_OTHER_DTYPES = "save the tensors that are no floats in the same dtype"
_ADVICE = (_OTHER_NAMES, _OTHER_SHAPES, _OTHER_FLOATS, _OTHER_DTYPES)


def disagreements(owners: Sequence[Ingredient], *, convert: bool) -> tuple[list[str], list[str]]:
    """List where ingredients differ from the first in names, shapes or dtypes, a line each.

    With `convert`, floats may have any dtype. Gives what to do about it, too, a line for each kind
    of disagreement. Costs a look at each tensor.
    """
    first = owners[0]
    places = first.layout.places
    problems: list[str] = []
    advice: set[str] = set()
    for other in owners[1:]:
        pair = f"{printable(other.name)} and {printable(first.name)}"
        theirs = other.layout.places
        lacking = [name for name in places if name not in theirs]
        extra = [name for name in theirs if name not in places]
        if lacking:
            problems.append(
                f"{printable(other.name)} lacks {_count(lacking)} of {printable(first.name)}: "
                f"{some(lacking)}"
            )
        if extra:
            problems.append(
                f"{printable(other.name)} has {_count(extra)} that {printable(first.name)} lacks: "
                f"{some(extra)}"
            )
        if lacking or extra:
            advice.add(_OTHER_NAMES)
        shapes, dtypes = [], []
        for name, (_, spec) in places.items():
            if name not in theirs:
                continue
            found = theirs[name][1]
            if found.shape != spec.shape:
                shapes.append(f"{printable(name)} {list(found.shape)} and {list(spec.shape)}")
            averaged = found.dtype.averaged and spec.dtype.averaged
            if found.dtype != spec.dtype and not (convert and averaged):
                dtypes.append(f"{printable(name)} {found.dtype.name} and {spec.dtype.name}")
                advice.add(_OTHER_FLOATS if averaged else _OTHER_DTYPES)
        if shapes:
            advice.add(_OTHER_SHAPES)
            problems.append(f"{pair} differ in the shape of {_count(shapes)}: {some(shapes)}")
        if dtypes:
            problems.append(f"{pair} differ in the dtype of {_count(dtypes)}: {some(dtypes)}")
    return problems, [each for each in _ADVICE if each in advice]


def _count(items: Sequence[object]) -> str:
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''}"


def in_words(problems: list[str], advice: list[str]) -> str:
    """Write problems and advice as one message of a page at most."""
    shown = problems[:12]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more disagreements")
    if len(shown) == 1:
        return "; ".join([f"these ingredients cannot be averaged: {shown[0]}", *advice])
    lines = [*(f"  {line}" for line in shown), *advice]
    return "\n".join(["these ingredients cannot be averaged:", *lines])
