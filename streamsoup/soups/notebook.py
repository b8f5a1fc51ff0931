"""What a learned search has seen, in a journal beside the output: the same folder as `scorebook`.

A search is a fixed function of what it is answered, so it is resumed by answering from the notes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from streamsoup.journal import Journal
from streamsoup.soups.scorebook import _check_same, _sync, _take

__all__ = ["Notebook"]


class Notebook:
    """The notes of one search, held by this run."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Take the search folder of the output at the real path `target`, and read its notes.

        `bound_to` says what the search depends on. Raises `OutputBusyError` if another run
        searches here, `ResumeError` for a damaged journal or one of another search.
        """
        self.root = target + ".search"
        self._lock = _take(self.root)
        try:
            path = os.path.join(self.root, "journal")
            if restart and os.path.lexists(path):
                os.unlink(path)
            self._journal = Journal(path)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            records = list(self._journal)
            if records:
                _check_same(self.root, records[0].get("search"), dict(bound_to))
            else:
                self._journal.append({"search": dict(bound_to)})
                _sync(self.root)
                _sync(os.path.dirname(self.root))
        except BaseException:
            self.close()
            raise
        self._looks = {record["look"]: record for record in records if "look" in record}
        self._last = {key: record for record in records for key in record}

    def __enter__(self) -> Notebook:
        """Give the notebook itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the folder; the notes stay."""
        self.close()

    def put(self, record: dict[str, Any]) -> None:
        """Take a note. It is on disk when this returns, and there alone: notes may be many."""
        self._journal.append(record)

    def find(self, key: str) -> dict[str, Any] | None:
        """Give the last note of an earlier run that has `key`."""
        return self._last.get(key)

    def look(self, number: int) -> dict[str, Any] | None:
        """Give what an earlier run noted of a look, by its number."""
        return self._looks.get(number)

    def finish(self) -> None:
        """Remove the folder: the output is in place."""
        self._journal.close()
        for name in ("journal", "lock"):
            try:
                os.unlink(os.path.join(self.root, name))
            except FileNotFoundError:
                pass
        try:
            os.rmdir(self.root)
        except OSError:
            pass  # somebody put a file of their own there
        self.close()

    def close(self) -> None:
        """Let go of the folder; a second time does nothing."""
        self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
