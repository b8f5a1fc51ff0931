"""Which kernels are used: fast ones, plain ones, or numpy; all give the same bits.

fast
    Compiled with what numba keeps to itself (`fast`): vectors, float32 where it is exact, digests.
plain
    Loops compiled in numba's ordinary way (`plain`). They stand in wherever `fast` cannot.
numpy
    Where nothing is compiled (`blocks`): jobs too small for it, and where numba may or can not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from streamsoup.errors import check_choice, printable

__all__ = ["TIERS", "VARIABLE", "first_compiled", "tier"]

TIERS = ("fast", "plain", "numpy")

VARIABLE = "STREAMSOUP_KERNELS"
"""The environment variable that names the fastest tier to use."""

log = logging.getLogger("streamsoup")

K = TypeVar("K")


def tier() -> str:
    """Return the fastest tier that may be used: `VARIABLE` if it is set, else ``fast``.

    Raises `RecipeError` for an unknown one.
    """
    asked = os.environ.get(VARIABLE) or "fast"
    check_choice(VARIABLE, asked, TIERS)
    return asked


def first_compiled(*makes: Callable[[], K]) -> K | None:
    """Return what the first of some functions that can makes: the plain one comes last.

    Logs one warning if it was not the first of them; or if none could, which gives None.
    """
    failed: Exception | None = None
    for make in makes:
        try:
            made = make()
        # Any: a numba other than the fast tier knows fails in ways that cannot be listed.
        except Exception as error:
            failed = failed or error
            continue
        if failed is not None:
            log.warning(
                "fast kernels cannot be compiled: %s; plain ones make the same sums, a little more "
                "slowly. Install another version of numba",
                printable(_reason(failed)),
            )
        return made
    log.warning(
        "kernels cannot be compiled: %s; numpy makes the same sums, more slowly. "
        "Install numba anew, or grant more memory",
        printable(_reason(failed)),
    )
    return None


def _reason(error: Exception | None) -> str:
    """Return the first line of an error's message, or its name."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
