"""Sizes in bytes, as people write them and like to read them."""

from __future__ import annotations

import operator
import re

from streamsoup.errors import RecipeError, is_plain, printable

__all__ = ["nbytes_text", "parse_nbytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_nbytes(given: int | str) -> int:
    """Return a size in bytes from any common spelling: ``150MB``, ``5GiB``, ``5G``, ``1.5e9``.

    Args:
        given: Text, with a decimal or binary unit or none; or a whole number of bytes.

    Returns:
        Bytes; a whole number is returned as it is.

    Raises:
        RecipeError: Not a size, or a text that comes to less than one byte.

    >>> parse_nbytes("5GB"), parse_nbytes("1.5 KiB")
    (5000000000, 1536)
    """
    if not isinstance(given, str):
        try:
            return operator.index(given)
        except TypeError:
            raise RecipeError(
                f"{printable(given)!r} is not a size; write a whole number of bytes, or 5GB"
            ) from None
    pattern = r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([kmgt]?i?)b?\s*"
    match = re.fullmatch(pattern, given.lower()) if is_plain(given) else None
    unit = _UNITS.get(match[2]) if match else None
    size = int(min(float(match[1]) * unit, 2.0**63)) if match and unit else 0
    if size < 1:
        raise RecipeError(f"{printable(given)!r} is not a size; write it as 150MB or 5GiB")
    return size


def nbytes_text(nbytes: float, *, up: bool = False) -> str:
    """Return a size in decimal units, three digits; with `up`, rounded up, as a sufficient size.

    >>> nbytes_text(1_234_567_890), nbytes_text(1_234_567_890, up=True)
    ('1.23 GB', '1.24 GB')
    """
    if up and nbytes >= 1000:
        last = 10 ** (len(str(int(nbytes))) - 3)
        nbytes = -(-int(nbytes) // last) * last
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
