"""Versions of the libraries that results depend on, for provenance and names of compiled kernels.

They are read from the packages' files: importing `importlib.metadata` takes 12 ms, an eighth of a
small soup; importing numpy 40 ms, and numba half a second.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.util import find_spec

import xxhash

from streamsoup.version import __version__

__all__ = ["llvmlite_version", "numba_version", "versions"]

_ASSIGNED = re.compile(
    r"""^(?: "version":|version =|version_version =) ['"]([^'"]+)['"]""", re.MULTILINE
)
"""Matches the version as numba, numpy and llvmlite write it."""


def versions() -> dict[str, str]:
    """Return the versions of Python, streamsoup and the libraries, by name."""
    return {
        "numpy": _version("numpy", "version.py"),
        "numba": numba_version(),
        "xxhash": xxhash.VERSION,
        "streamsoup": __version__,
        "python": platform.python_version(),
    }


def numba_version() -> str:
    """Return numba's version."""
    return _version("numba", "_version.py")


def llvmlite_version() -> str:
    """Return the version of llvmlite, which compiles for numba."""
    return _version("llvmlite", "_version.py")


def _version(package: str, file_name: str) -> str:
    """Return a package's version from the file its build wrote, or else from its metadata."""
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        try:
            path = os.path.join(os.path.dirname(spec.origin), file_name)
            with open(path, encoding="utf-8") as file:
                found = _ASSIGNED.search(file.read())
        except OSError:
            found = None
        if found is not None:
            return found[1]
    from importlib.metadata import version

    return version(package)
