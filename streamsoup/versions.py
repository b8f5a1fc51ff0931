"""Versions of what our numbers depend on: for provenance, and for the names of compiled kernels.

`importlib.metadata` would be asked for them, but importing it takes 12 ms, a twentieth of a small
soup, and importing numba half a second.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.util import find_spec

import numpy as np
import xxhash

from streamsoup import __version__

__all__ = ["numba_version", "versions"]


def versions() -> dict[str, str]:
    """Give the versions of Python, streamsoup and the libraries, by name."""
    return {
        "numpy": np.__version__,
        "numba": numba_version(),
        "xxhash": xxhash.VERSION,
        "streamsoup": __version__,
        "python": platform.python_version(),
    }


def numba_version() -> str:
    """Give numba's version, from the file that its builds write it to, or else the slow way."""
    spec = find_spec("numba")
    if spec is not None and spec.origin is not None:
        try:
            path = os.path.join(os.path.dirname(spec.origin), "_version.py")
            with open(path, encoding="utf-8") as file:
                found = re.search(r'"version": "([^"]+)"', file.read())
        except OSError:
            found = None
        if found is not None:
            return found[1]
    from importlib.metadata import version

    return version("numba")
