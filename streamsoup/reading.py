"""How ingredients are read, where there is more than one way: plain data, part of each recipe."""

from __future__ import annotations

import msgspec

__all__ = ["Reading"]


class Reading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the files of ingredients become tensors; the same for all ingredients of a soup.

    `streamsoup.Options` has the same fields, and a `Recipe` records them, so that `verify` reads
    the ingredients as they were read when the soup was made.
    """

    dequantize: bool = False
    """Read quantised weights as codes times scales, exact, and write them in bfloat16 unless
    `Options.dtype` says otherwise; else they are copied where they are equal, or refused."""
