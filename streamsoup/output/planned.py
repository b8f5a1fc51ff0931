"""Soups planned and no further: a verb is called, and stopped before it reads a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from streamsoup.options import Options, Planned

__all__ = ["planned"]


class _PlannedError(Exception):
    """Ends a call whose soup is planned."""

    def __init__(self, found: Planned) -> None:
        self.found = found


def planned(make: Callable[[Options], Any], options: Options) -> Planned:
    """Return the plan of the soup that a call would make.

    Args:
        make: Calls a verb with the options that it is given.
        options: What else the verb is told; its callback is not called.

    Raises:
        StreamsoupError: Whatever the soup is refused for before a weight is read.

    Reads headers only, and writes nothing.
    """

    def on_event(event: object) -> None:
        if isinstance(event, Planned):
            raise _PlannedError(event)

    try:
        make(replace(options, on_event=on_event))
    except _PlannedError as stop:
        return stop.found
    raise AssertionError("a verb that makes a soup plans it first")
