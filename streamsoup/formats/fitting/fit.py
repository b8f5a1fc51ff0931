"""What each ingredient has to be to fit the others: names, ties, choice and vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamsoup.errors import MismatchError, RecipeError, count, option, printable, some
from streamsoup.formats.configs import OF_WORDS
from streamsoup.formats.fitting.arranged import Arranged, Fitted
from streamsoup.formats.fitting.tied import tied_copies
from streamsoup.formats.fitting.vocabulary import check_common
from streamsoup.formats.source import Source
from streamsoup.reading import Reading

__all__ = ["check_independent", "fit"]


def fit(sources: Sequence[Source], reading: Reading) -> list[Source]:
    """Return the sources of one soup, made to fit each other.

    Args:
        sources: Those of the ingredients, in the order of the sum. What was made to fit others is
            made anew, of what it was made of.
        reading: Which names, which tensors and whose rows.

    Raises:
        RecipeError: A pattern or a prefix that fits no tensor, or leaves none to average.
        MismatchError: What they have in common is not the same.

    Costs a look at each tensor; reads nothing but what `tied_copies` compares, and vocabularies.
    """
    found = [_unfitted(source) for source in sources]
    if reading.rename:
        found = _renamed(found, reading)
    found = _without_copies(found)
    if reading.include or reading.exclude:
        found = _chosen(found, reading)
    if reading.embeddings == "common":
        found = _lengthened(found)
    return found


def check_independent(sources: Sequence[Source]) -> None:
    """Raise `RecipeError` for a source that would be another one among fewer sources."""
    for source in sources:
        if isinstance(source, Fitted) and source.others:
            raise RecipeError(
                f"{printable(source.name)}: has tensors or rows of other ingredients, by "
                f"{option('embeddings')} or {option('exclude')}, so a soup of some ingredients "
                f"cannot be judged beside all; give all the same tensors first, or "
                f"{option('drop', True)} those that differ"
            )


def _unfitted(source: Source) -> Source:
    while isinstance(source, Fitted):
        source = source.of
    return source


def _renamed(sources: Sequence[Source], reading: Reading) -> list[Source]:
    """Replace prefixes; each has to be found somewhere, and no two names may become one."""
    found: list[Source] = []
    for source in sources:
        names: dict[str, str] = {}
        for own in source.tensors:
            name = reading.renamed(own)
            if not name:
                raise RecipeError(
                    f"{source.where(own)}: {option('rename')} leaves nothing of its name; give a "
                    "prefix that ends before it"
                )
            if name in names:
                raise RecipeError(
                    f"{source.where(own)}: {option('rename')} gives it the name of "
                    f"{printable(names[name])}, {printable(name)}; give a longer prefix"
                )
            names[name] = own
        is_same = all(name == own for name, own in names.items())
        found.append(source if is_same else Arranged(source, names))
    if all(new is old for new, old in zip(found, sources, strict=True)):
        raise RecipeError(
            f"{option('rename')} {some(reading.rename)} fits no tensor of "
            f"{printable(sources[0].name)} or the others; give a prefix of their names, such as of "
            f"{some(sources[0].tensors, 2)}"
        )
    return found


def _without_copies(sources: Sequence[Source]) -> list[Source]:
    """Leave out copies of input embeddings that others do not store."""
    first = sources[0].tensors.keys() if sources else ()
    if all(source.tensors.keys() == first for source in sources):
        return list(sources)
    found: list[Source] = []
    for source, copies in zip(sources, tied_copies(sources), strict=True):
        if not copies:
            found.append(source)
            continue
        note = (
            f"{printable(source.name)}: left out {some(copies)}, the same as "
            f"{some(copies.values())} bit for bit, which others store once: they are tied"
        )
        names = {name: name for name in source.tensors if name not in copies}
        found.append(Arranged(source, names, notes=[note]))
    return found


def _chosen(sources: Sequence[Source], reading: Reading) -> list[Source]:
    """Leave out what is not averaged, or take it from the first."""
    first = sources[0]
    everywhere = {name for source in sources for name in source.tensors}
    for kind in ("include", "exclude"):
        for pattern in getattr(reading, kind):
            alone = Reading(include=(pattern,))
            if not any(map(alone.takes, everywhere)):
                raise RecipeError(
                    f"{option(kind)} {printable(repr(pattern))} fits no tensor of "
                    f"{printable(first.name)} or the others; give a pattern such as "
                    f"'*.layers.0.*', for names such as {some(first.tensors, 2)}"
                )
    taken = {name for name in everywhere if reading.takes(name)}
    if not taken:
        raise RecipeError(
            f"{option('include')} and {option('exclude')} leave no tensor to average; choose one "
            f"of {count(len(everywhere), 'tensor')}, such as {some(first.tensors, 2)}"
        )
    rest = [] if reading.drop else [name for name in first.tensors if name not in taken]
    found: list[Source] = []
    for source in sources:
        own = {name: name for name in source.tensors if name in taken or source is first}
        if reading.drop:
            own = {name: name for name in own if name in taken}
        mine = {name: name for name in rest if _is_alike(source, first, name)}
        lent = [name for name in rest if name not in mine and source is not first]
        names = own | mine
        if not lent and list(names) == list(source.tensors):
            found.append(source)
        else:
            found.append(Arranged(source, names, first, lent))
    return found


def _is_alike(source: Source, first: Source, name: str) -> bool:
    """Return True if a source has a tensor as the first has it, so that none has to be lent."""
    one, other = source.tensors.get(name), first.tensors[name]
    return one is not None and (one.dtype, tuple(one.shape), one.delivered) == (
        other.dtype,
        tuple(other.shape),
        other.delivered,
    )


def _lengthened(sources: Sequence[Source]) -> list[Source]:
    """Lengthen embeddings and heads that are shorter than others, by the rows that these have."""
    n_rows: dict[str, list[int | None]] = {}
    for name in sources[0].tensors if len(sources) > 1 else ():
        shapes = [tuple(source.tensors[name].shape) for source in sources if name in source.tensors]
        ends = {shape[1:] for shape in shapes}
        differ = len({shape[:1] for shape in shapes}) > 1 and len(ends) == 1
        if differ and name.endswith(OF_WORDS) and all(shapes) and len(shapes) == len(sources):
            n_rows[name] = [shape[0] for shape in shapes]
    if not n_rows:
        return list(sources)
    longest = _longest(sources, n_rows)
    unknown = check_common(sources, longest)
    note = (
        f"no tokenizer beside {some(unknown)} to compare: the rows of {some(n_rows)} are taken for "
        "those of the same tokens"
    )
    notes = [note] if unknown else []
    from streamsoup.formats.fitting.rows import Lengthened

    most = {name: max(n for n in rows if n is not None) for name, rows in n_rows.items()}
    found: list[Source] = []
    for number, source in enumerate(sources):
        short = {name: n for name, n in most.items() if source.tensors[name].shape[0] < n}
        if not short:
            found.append(source)
            continue
        others = [
            each for i, each in enumerate(sources) if i != number and _has_more(each, source, short)
        ]
        found.append(Lengthened(source, short, others, sources[longest], notes))
    return found


def _has_more(one: Source, other: Source, names: Mapping[str, int]) -> bool:
    """Return True if one source has rows that another lacks."""
    return any(one.tensors[name].shape[0] > other.tensors[name].shape[0] for name in names)


def _longest(sources: Sequence[Source], n_rows: Mapping[str, Sequence[int | None]]) -> int:
    """Return the number of the source whose vocabulary is the longest; the first of several."""
    scores = [
        tuple(rows[number] or 0 for rows in n_rows.values()) for number in range(len(sources))
    ]
    best = tuple(max(rows[i] for rows in scores) for i in range(len(n_rows)))
    for number, rows in enumerate(scores):
        if rows == best:
            return number
    names = list(n_rows)
    raise MismatchError(
        f"no ingredient has the most rows of all of {some(names)}, so that none has the longest "
        f"vocabulary; leave one out, or {option('exclude')} some of these"
    )
