"""What a learned search has evaluated, in a journal beside the output (`search.folder`).

A search is a fixed function of the losses and slopes it is given, so it resumes by being given
those of the journal again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamsoup.search.folder import SearchFolder
from streamsoup.system.closing import Closing

__all__ = ["LearningJournal"]


class LearningJournal(Closing):
    """The records of one search, held by this run."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Lock the search folder of the output at the real path `target`, and read its records.

        Arguments and errors are those of `SearchFolder`.
        """
        self._folder = SearchFolder(target, bound_to, restart=restart)
        self.root, self.run = self._folder.root, self._folder.run
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        for record in self._folder.records:  # of a long search there may be thousands: few stay
            if "look" in record:
                self._evaluations[record["look"]] = record
            self._last |= dict.fromkeys(record, record)

    def put(self, record: dict[str, Any]) -> None:
        """Add a record. It is on disk when this returns, and only there: there may be many."""
        self._folder.note(record)

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the last record of an earlier run that has `key`."""
        return self._last.get(key)

    def evaluation(self, number: int) -> dict[str, Any] | None:
        """Return what an earlier run recorded of an evaluation, by its number."""
        return self._evaluations.get(number)

    def is_of(self, run: object) -> bool:
        """Return True if a soup's run is this search. See `SearchFolder.is_of`."""
        return self._folder.is_of(run)

    def finish(self) -> None:
        """Remove the folder: the output is in place."""
        self._folder.finish()

    def close(self) -> None:
        """Release the folder; a second time does nothing."""
        self._folder.close()
