"""Short names for ingredients, for tables and pictures."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence

from streamsoup.errors import printable

__all__ = ["short_names"]


def short_names(paths: Sequence[str], limit: int) -> list[str]:
    """Leave out what all paths begin and end with, and the middle of what is still too long.

    Names that come out alike are told apart by their numbers, from 1.

    >>> short_names(("runs/a/model.safetensors", "runs/b/model.safetensors"), 20)
    ['a', 'b']
    >>> short_names(("runs/llama-sft-lr1e-5-seed1", "runs/llama-sft-lr3e-5-seed2"), 20)
    ['…lr1e-5-seed1', '…lr3e-5-seed2']
    >>> short_names(("runs/x1-aaaaaaaaaaaa-z", "runs/x1-aaaabbaaaaaa-z"), 11)
    ['…aa…a-z #1', '…aa…a-z #2']
    """
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    if len(set(paths)) > 1:
        while len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
            parts = [p[1:] for p in parts]
        while len({p[-1] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
            parts = [p[:-1] for p in parts]
    else:
        parts = [p[-1:] for p in parts]
    names = [printable("/".join(p).removesuffix(".safetensors")) for p in parts]
    if len(names) > 1 and max(map(len, names)) > limit:
        # What they have in common goes first: the middle may be where they differ.
        shared = os.path.commonprefix(names)  # noqa: RUF071 - of characters, not of folders
        alike = re.sub(r"[^\W_]+$", "", shared)
        names = [f"…{n[len(alike) :]}" for n in names] if len(alike) > 1 else names
    counts = Counter(_cut(name, limit) for name in names)
    return [
        _cut(name, limit)
        if counts[_cut(name, limit)] == 1
        else f"{_cut(name, limit - len(str(i)) - 2)} #{i}"
        for i, name in enumerate(names, start=1)
    ]


def _cut(name: str, limit: int) -> str:
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"
