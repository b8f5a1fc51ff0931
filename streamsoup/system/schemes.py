"""Refusal of addresses given as paths: ``s3://bucket/x`` is not on this machine.

Python takes such an address for the path of a folder ``s3:``, and would make one. Every function
that takes a path from a user calls `check_local` first.
"""

from __future__ import annotations

import os
import re

from streamsoup.errors import StreamsoupError, printable

__all__ = ["check_local"]

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)", re.ASCII)
"""Two letters at least: ``C:/`` is a drive."""

_ADVICE = {"file": "give the plain path"}
_READ = ("https", "http", "hf", "s3", "gs")
"""Schemes that `formats.remote` reads, for ingredients alone."""


def check_local(path: str | bytes | os.PathLike[str], error: type[StreamsoupError]) -> None:
    """Raise `error` for the address of something elsewhere, by its scheme, such as ``s3://``.

    `pathlib` turns it into ``s3:/``, which is refused unless a folder ``s3:`` exists.

    >>> check_local("C:/models/run", StreamsoupError)
    >>> check_local("s3://bucket/run", StreamsoupError)
    Traceback (most recent call last):
        ...
    streamsoup.errors.StreamsoupError: s3://bucket/run: s3:// is not supported yet but for ...
    """
    given = os.fsdecode(path)
    found = _SCHEME.match(given)
    if found is None:
        return
    scheme = found["scheme"]
    if found["slashes"] == "/" and os.path.lexists(f"{scheme}:"):
        return
    advice = _ADVICE.get(scheme.lower(), "use a path on a local disk, and copy from or to it")
    but = " but for ingredients" if scheme.lower() in _READ else ""
    raise error(
        f"{printable(given)}: {scheme}:// is not supported yet{but}; {advice} "
        f"(./{scheme}:/ is a folder of that name)"
    )
