"""Paths with plus signs: ``BASE+ADAPTER`` and ``BASE+ADAPTER+ADAPTER``."""

from __future__ import annotations

import os

__all__ = ["split"]

_MOST = 32
"""Plus signs in a path at most: more are no list of adapters."""


def split(path: str) -> list[str] | None:
    """Return the paths of a base and its adapters; None for a path that is not of that form.

    A path that exists is taken as it is. Where names hold plus signs themselves, the parts are
    those that exist, the base as long as it can be.

    Returns:
        Two paths or more. If they cannot all exist, the longest base that does, and the rest.
    """
    pieces = path.split("+")
    if not 1 < len(pieces) <= _MOST or not pieces[-1] or "\0" in path or os.path.lexists(path):
        return None
    found = _existing(pieces, {})
    for length in range(len(pieces) - 1, 0, -1) if found is None else ():
        base = "+".join(pieces[:length])
        if base and os.path.lexists(base):
            return [base, "+".join(pieces[length:])]
    return found


def _existing(pieces: list[str], tried: dict[int, list[str] | None]) -> list[str] | None:
    """Join neighbours so that each part exists, the first as long as it can be."""
    n = len(pieces)
    if n not in tried:
        tried[n] = None
        for length in range(n, 0, -1):
            part = "+".join(pieces[:length])
            if not part or not os.path.lexists(part):
                continue
            rest = _existing(pieces[length:], tried) if length < n else []
            if rest is not None:
                tried[n] = [part, *rest]
                break
    return tried[n]
