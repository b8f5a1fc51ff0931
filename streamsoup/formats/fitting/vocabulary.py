"""Whether two vocabularies mean the same tokens by the same ids: only then rows are averaged."""

from __future__ import annotations

import os
from collections.abc import Sequence

from streamsoup.errors import FormatError, MismatchError, printable
from streamsoup.formats.configs import config_folder
from streamsoup.formats.source import Source
from streamsoup.formats.vocabularies import compare_vocabularies, is_vocabulary

__all__ = ["check_common", "is_of_tokenizer"]


def is_of_tokenizer(name: str) -> bool:
    """Return True for a side file that goes with a vocabulary, by its name."""
    return is_vocabulary(name) or name == "merges.txt" or "token" in name.lower()


def check_common(sources: Sequence[Source], longest: int) -> list[str]:
    """Return the names of sources that have no vocabulary beside them, in words.

    Raises:
        MismatchError: One does not agree with the longest on an id; names the first.

    Reads the vocabularies of all.
    """
    whole = sources[longest]
    names = _vocabularies(whole)
    unknown: list[str] = [] if names else [printable(whole.name)]
    for source in sources:
        theirs = _vocabularies(source)
        if source is whole:
            continue
        if not theirs.keys() & names.keys():
            unknown.append(printable(source.name))
        for name in sorted(theirs.keys() & names.keys()):
            conflict = compare_vocabularies(names[name], theirs[name])
            if conflict is not None:
                raise MismatchError(
                    f"{printable(theirs[name])} and {printable(names[name])} do not agree on the "
                    f"ids that both have: {conflict.what}; leave out one of these ingredients"
                )
    return unknown


def _vocabularies(source: Source) -> dict[str, str]:
    """Return the paths of the vocabularies beside a source, by name."""
    folder = config_folder(source)
    try:
        names = [] if folder is None else os.listdir(folder)
    except OSError as error:
        raise FormatError(
            f"{printable(folder or '')}: cannot be listed: {error.strerror}; fix that and run again"
        ) from None
    return {name: os.path.join(folder or "", name) for name in names if is_vocabulary(name)}
