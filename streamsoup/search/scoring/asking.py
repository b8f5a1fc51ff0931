"""Asking for scores: from the journal, or else from a scorer, several at once where it can.

A search asks for one candidate at a time, and says which it may ask for next. A scorer that scores
several at once is given these ahead. What it answers goes to the journal as it comes, and to the
search when it asks, so the outcome is that of one at a time:

1. the search sees the score of the candidate that it asks for, and nothing else;
2. a score depends on its candidate alone, so it does not matter when it was measured;
3. an upper bound, from a task that stopped early, is used only while it is below the score to beat
   (`ScoreJournal.get`); else the candidate is scored again;
4. a candidate that fails ahead raises its error only when the search asks for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from msgspec.structs import replace

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import StreamsoupError, TaskError, printable, some
from streamsoup.live.candidates import Moved
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.search.scoring.journal import ScoreJournal
from streamsoup.search.scoring.scorer import Candidate, Members, Outcome, Scorer, which
from streamsoup.task import Score, read_score
from streamsoup.task.scores import doubt

__all__ = ["Asking"]

log = logging.getLogger("streamsoup")


class Asking:
    """The scores of one search."""

    def __init__(
        self,
        scorer: Scorer,
        journal: ScoreJournal,
        recipe: Recipe,
        points: Sequence[Candidate] = (),
    ) -> None:
        """Prepare nothing yet.

        Args:
            scorer: Scores.
            journal: Knows the scores of earlier runs, and keeps those of this one.
            recipe: The uniform soup of all ingredients.
            points: The candidates of a sweep, which are asked for as ``(number,)``; if there are
                none, means are asked for by the numbers of their ingredients.
        """
        self._scorer, self._journal, self._recipe = scorer, journal, recipe
        self._points = points
        self._is_prepared = False
        self._failed: dict[Members, StreamsoupError] = {}
        """The errors of candidates that were scored ahead."""
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[Future[Outcome], tuple[Members, Candidate]] = {}

    def ask(self, wanted: Sequence[Members], to_beat: float | None) -> Outcome:
        """Return the outcome of the first of `wanted`; the others may be asked for next."""
        first = wanted[0]
        while (outcome := self._journal.get(first, to_beat)) is None:
            if first in self._failed:
                raise self._failed[first]
            self._prepare()
            if self._scorer.n_at_once == 1:
                candidate = self._candidate(first, to_beat)
                self._record(first, candidate, self._score(candidate))
            else:
                self._score_ahead(wanted, to_beat)
                self._collect()
        return outcome

    def close(self) -> None:
        """Close the scorer, and wait until nothing is being scored any more."""
        self._scorer.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepare(self) -> None:
        if not self._is_prepared:
            self._scorer.prepare(self._recipe)
            self._is_prepared = True

    def _candidate(self, members: Members, to_beat: float | None) -> Candidate:
        if self._points:
            return self._points[members[0]]
        chosen = tuple(self._recipe.ingredients[i] for i in members)
        rule = Linear(Coefficients.uniform(len(chosen)))
        recipe = replace(self._recipe, ingredients=chosen, rule=rule)
        return Candidate(recipe, members, to_beat)

    def _score(self, candidate: Candidate) -> Outcome:
        started = time.monotonic()
        where = self._scorer.name
        try:
            answer = self._scorer.score(candidate)
            if isinstance(answer, Outcome):
                return answer
            if not isinstance(answer, Score):
                answer = read_score(answer, main=None, to_beat=candidate.to_beat, where=where)
        except StreamsoupError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {printable(error, 500)}"
            raise TaskError(f"{where}: scoring failed: {text}{which(candidate)}") from error
        return Outcome(answer, None, Moved(0, 0, 0.0), time.monotonic() - started)

    def _record(self, members: Members, candidate: Candidate, outcome: Outcome) -> None:
        """Put a score into the journal; warn of one that comes from a mistake, most likely."""
        self._journal.put(members, outcome, candidate.to_beat)
        names = candidate.recipe.ingredients
        what = printable(names[0]) if len(names) == 1 else f"the mean of {some(names, 4)}"
        what = candidate.text or what
        if doubts := doubt(outcome.score, what):
            log.warning("%s", doubts)

    def _score_ahead(self, wanted: Sequence[Members], to_beat: float | None) -> None:
        """Start scoring the first of `wanted`, and as many of the others as the scorer can."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._scorer.n_at_once, "streamsoup-score")
        busy = {members for members, _ in self._running.values()}
        for members in dict.fromkeys(wanted):
            if len(self._running) == self._scorer.n_at_once:
                return
            is_known = self._journal.get(members, to_beat) is not None
            if not (members in busy or members in self._failed or is_known):
                candidate = self._candidate(members, to_beat)
                self._running[self._pool.submit(self._score, candidate)] = members, candidate

    def _collect(self) -> None:
        """Wait until a candidate is scored, and record what there is by then."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in [future for future in self._running if future in done]:
            members, candidate = self._running.pop(future)
            try:
                outcome = future.result()
            except StreamsoupError as error:
                self._failed[members] = error
            else:
                self._record(members, candidate, outcome)
