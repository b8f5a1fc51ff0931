"""A folder that holds one candidate at a time, for what scores from files: a command, a server.

It is rewritten in place, and renamed for each candidate, so that nothing that was remembered by the
path of one is taken for another. All is reached by descriptors: what runs in between may have put
anything in the place of a name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing

from msgspec.structs import replace

from streamsoup.errors import OutputError, StreamsoupError, printable
from streamsoup.live.candidates import Candidates, Moved
from streamsoup.live.rule_candidates import RuleCandidates
from streamsoup.output.make import Order, write_beside
from streamsoup.output.write import FileSink
from streamsoup.sizes import nbytes_text
from streamsoup.system.folders import Folder

__all__ = ["CandidateFolder"]


class CandidateFolder:
    """One candidate on disk, without digests, and not waited for."""

    def __init__(self, ordered: Order, above: str, prefix: str) -> None:
        """Plan folders named `prefix` and a number in the folder `above`; make none yet."""
        self._ordered, self._above_path, self._prefix = ordered, above, prefix
        self._above: Folder | None = None
        self._folder: Folder | None = None
        self._name = ""
        self._n_made = 0

    @property
    def path(self) -> str:
        """The path of the candidate that was written last."""
        return os.path.join(self._above_path, self._name)

    def write(
        self, candidates: Candidates | RuleCandidates, members: Sequence[int], *, keep: bool
    ) -> Moved:
        """Write a candidate in the place of the one before; see `Candidates.mix`.

        Raises:
            OutputError: It cannot be written.
        """
        ordered = self._ordered
        try:
            folder = self._renamed()
            with closing(FileSink(ordered.plan, ordered.files, folder, early=False)) as sink:
                sink.prepare(resumes=False)
                moved = candidates.mix(members, sink, keep=keep)
            write_beside(replace(ordered, card=False), folder)
        except OSError as error:
            if isinstance(error, StreamsoupError):
                raise
            raise OutputError(
                f"{printable(self.path)}: a candidate of "
                f"{nbytes_text(ordered.plan.nbytes_written)} cannot be written: "
                f"{error.strerror or error}; fix that, and the same command resumes"
            ) from error
        return moved

    def remove(self) -> None:
        """Remove the candidate; a second time does nothing."""
        if self._folder is not None:
            self._folder.close()
        if self._above is not None:
            if self._name:
                self._above.remove(self._name)
            self._above.close()
        self._above = self._folder = None

    def _renamed(self) -> Folder:
        """Return the folder under a new name; made anew if it is not where it was."""
        if self._above is None:
            self._above = Folder.open(self._above_path)
        self._n_made += 1
        before, self._name = self._name, f"{self._prefix}{self._n_made:04}"
        if self._folder is not None:
            there = self._above.status(before)
            if there is not None and os.path.samestat(there, os.fstat(self._folder.descriptor)):
                self._above.move(before, self._above, self._name)
                return self._folder
            # What was scored put something else in its place, or nothing.
            self._above.remove(before)
            self._folder.close()
        self._folder = self._above.make(self._name)
        return self._folder
