"""What a learned search has seen, in a journal beside the output (`search_folder`).

A search is a fixed function of what it is answered, so it is resumed by answering from the notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamsoup.search.folder import SearchFolder
from streamsoup.system.closing import Closing

__all__ = ["Notebook"]


class Notebook(Closing):
    """The notes of one search, held by this run."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Take the search folder of the output at the real path `target`, and read its notes.

        Arguments and errors are those of `SearchFolder`.
        """
        self._folder = SearchFolder(target, bound_to, restart=restart)
        self.root, self.run = self._folder.root, self._folder.run
        self._looks: dict[int, dict[str, Any]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        for record in self._folder.records:  # of a long search there may be thousands: few stay
            if "look" in record:
                self._looks[record["look"]] = record
            self._last |= dict.fromkeys(record, record)

    def put(self, record: dict[str, Any]) -> None:
        """Take a note. It is on disk when this returns, and there alone: notes may be many."""
        self._folder.note(record)

    def find(self, key: str) -> dict[str, Any] | None:
        """Give the last note of an earlier run that has `key`."""
        return self._last.get(key)

    def look(self, number: int) -> dict[str, Any] | None:
        """Give what an earlier run noted of a look, by its number."""
        return self._looks.get(number)

    def is_of(self, run: object) -> bool:
        """Whether a soup's run is this search. See `SearchFolder.is_of`."""
        return self._folder.is_of(run)

    def finish(self) -> None:
        """Remove the folder: the output is in place."""
        self._folder.finish()

    def close(self) -> None:
        """Let go of the folder; a second time does nothing."""
        self._folder.close()
