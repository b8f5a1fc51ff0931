"""Pickles for processes of our own: refused where they would be read as something else there."""

from __future__ import annotations

import pickle

__all__ = ["for_another_process"]

_MAIN = b"\x8c\x08__main__"
"""How a pickle names what is defined in a script or notebook itself."""


def for_another_process(value: object) -> bytes:
    """Pickle a value for another process.

    Raises `ValueError` for what a script or notebook defines, and whatever `pickle.dumps` raises.
    """
    pickled = pickle.dumps(value)
    if _MAIN in pickled:
        raise ValueError("what a script or notebook defines exists in its process alone")
    return pickled
