"""What `Average.state_dict` returns, checked before an average continues from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from streamsoup.errors import RecipeError, some
from streamsoup.training.live import Layout
from streamsoup.training.settings import Settings

__all__ = ["VERSION", "layout_of"]

VERSION = 1

_NAMES = ("layout", "n_updates", "weights", "sums", "window", "newest", "masks")


def layout_of(state: Mapping[str, Any], settings: Settings) -> Layout | None:
    """Return the layout of the model in a saved state; None if there was no update.

    Raises:
        RecipeError: It is no such state, is of another version, or of an average with other
            settings.
    """
    try:
        version, given = state["version"], dict(state["settings"])
        if version != VERSION:
            raise RecipeError(
                f"the state is of version {version}, and {VERSION} was expected; load it with "
                "the streamsoup that saved it"
            )
        layout, *_ = [state[name] for name in _NAMES]
        found = None if layout is None else msgspec.convert(layout, Layout)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise RecipeError(
            f"not the state of an Average ({type(error).__name__}: {error}); give what "
            "state_dict() returned"
        ) from None
    other = [
        f"{name} {given.get(name)!r}, not {value!r}"
        for name, value in settings.values.items()
        if given.get(name) != value
    ]
    if other:
        raise RecipeError(
            f"the state is of an Average with {some(other)}; begin one with its settings"
        )
    return found
