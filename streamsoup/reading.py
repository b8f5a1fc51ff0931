"""How ingredients are read, where there is more than one way: plain data, part of each recipe."""

from __future__ import annotations

import msgspec

__all__ = ["Reading"]


class Reading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the files of ingredients become tensors; the same for all ingredients of a soup.

    `streamsoup.Options` has the same fields, and a `Recipe` records them, so that `verify` reads
    the ingredients as they were read when the soup was made.
    """

    components: tuple[str, ...] = ()
    """Components of pipelines to make a soup of, by the paths of their folders, ``.`` for the
    pipeline's own; the others are taken from the first ingredient. All if empty."""
