"""The scores of a search, in a journal beside the output.

A search is a fixed function of its scores, so it resumes by running again: what the journal holds
is not scored a second time. The journal belongs to fixed ingredients, task and options; where one
of them changed it is refused, and the message names it (`search.folder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from streamsoup.errors import ResumeError, option, printable
from streamsoup.live.candidates import Moved
from streamsoup.search.folder import SearchFolder
from streamsoup.search.scoring.scorer import Members, Outcome
from streamsoup.system.closing import Closing
from streamsoup.task import Score

__all__ = ["ScoreJournal"]


class ScoreJournal(Closing):
    """The scores of one search, held by this run."""

    def __init__(self, target: str, bound_to: Mapping[str, Any], *, restart: bool) -> None:
        """Lock the search folder of the output at the real path `target`, and read its scores.

        Arguments and errors are those of `SearchFolder`.
        """
        self._folder = SearchFolder(target, bound_to, restart=restart)
        self.root, self.run = self._folder.root, self._folder.run
        self.scores: dict[Members, Outcome] = {}
        """What is known so far."""
        self.paid: list[Outcome] = []
        """What this run scored, whether it was used or not."""
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="streamsoup-sync")
        self._syncing: Future[None] | None = None
        try:
            self._read(len(bound_to.get("points", bound_to["ingredients"])))
        except BaseException:
            self.close()
            raise
        self.resumed = frozenset(self.scores)
        """Those that an earlier run had scored."""

    def put(self, members: Members, outcome: Outcome, to_beat: float | None) -> None:
        """Add a score. It is on disk before the next one is added.

        The disk works while the next candidate is scored: a kill loses no score, and a power
        failure the last one at most.
        """
        record: dict[str, Any] = {
            "members": list(members),
            "score": outcome.score.to_record(),
            "nbytes": [outcome.moved.nbytes_read, outcome.moved.nbytes_sums],
            "seconds": [outcome.moved.elapsed_s, outcome.scoring_s],
        }
        if outcome.averaged is not None:
            record["averaged"] = outcome.averaged.to_record()
        if to_beat is not None:
            record["to_beat"] = to_beat
        self._wait()
        self._folder.note(record, wait=False)
        self._syncing = self._syncer.submit(self._folder.sync)
        self.scores[members] = outcome
        self.paid.append(outcome)

    def get(self, members: Members, to_beat: float | None) -> Outcome | None:
        """Return a known score, or None. An upper bound is of use only while below `to_beat`."""
        outcome = self.scores.get(members)
        if outcome is None or not outcome.score.stopped:
            return outcome
        return outcome if to_beat is not None and outcome.score.value < to_beat else None

    def is_of(self, run: object) -> bool:
        """Return True if a soup's run is this search. See `SearchFolder.is_of`."""
        return self._folder.is_of(run)

    def finish(self) -> None:
        """Remove the folder: the output is in place."""
        self._wait()
        self._folder.finish()
        self.close()

    def close(self) -> None:
        """Release the folder; a second time does nothing."""
        self._syncer.shutdown()
        self._folder.close()

    def _wait(self) -> None:
        """Wait until all scores are on disk. Raises `OutputError` if they cannot be."""
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _read(self, n_ingredients: int) -> None:
        """Read the scores of earlier runs."""
        for number, record in enumerate(self._folder.records, 2):
            try:
                members, outcome = _read(record)
            except (KeyError, TypeError, ValueError):
                members, outcome = (-1,), None
            if outcome is None or not all(0 <= i < n_ingredients for i in members):
                raise ResumeError(
                    f"{printable(self._folder.journal.path)}: record {number} is not a score; "
                    f"{option('restart', True)} forgets all scores of this search"
                )
            self.scores[members] = outcome


def _read(record: Mapping[str, Any]) -> tuple[Members, Outcome]:
    members = tuple(int(i) for i in record["members"])
    nbytes, seconds = record["nbytes"], record["seconds"]
    moved = Moved(int(nbytes[0]), int(nbytes[1]), float(seconds[0]))
    averaged = Score.from_record(record["averaged"]) if "averaged" in record else None
    score = Score.from_record(record["score"])
    if not members:
        raise ValueError
    return members, Outcome(score, averaged, moved, float(seconds[1]))
