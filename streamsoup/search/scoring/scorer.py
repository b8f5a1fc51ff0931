"""The joint between a search and what scores: candidates go in, scores come out.

A candidate is a recipe, so a scorer may be anywhere: a live model in this process, other processes,
a command that is given a folder, a server, another machine. Whatever scores, the search asks the
same questions and takes the answers in the same order (`asking`), so the outcome is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import msgspec

from streamsoup.errors import TaskError, printable, some
from streamsoup.live.candidates import Moved
from streamsoup.recipe import Recipe
from streamsoup.task import Score

__all__ = ["Candidate", "Members", "Outcome", "Scorer", "naming", "which"]

Members = tuple[int, ...]
"""Numbers of ingredients in the order given to the search, in the order of the sum."""


class Candidate(msgspec.Struct, frozen=True):
    """What is to be scored."""

    recipe: Recipe
    """What to make: the soup is scored as `streamsoup.make` would write it."""
    members: Members
    """Its ingredients, by their numbers in the recipe that `Scorer.prepare` was given."""
    to_beat: float | None = None
    """The score that it has to reach to be accepted, if there is one. A scorer may stop early once
    that is out of reach, and return ``{"at_most": bound}``."""
    text: str = ""
    """What it is, in words, for messages; empty for the mean of its ingredients."""


class Outcome(msgspec.Struct, frozen=True):
    """What scoring one candidate came to."""

    score: Score
    averaged: Score | None
    """The score with averaged BatchNorm statistics, where `score` is with measured ones."""
    moved: Moved
    scoring_s: float


@runtime_checkable
class Scorer(Protocol):
    """Scores candidates, by whatever means and wherever.

    A score must depend on the candidate alone: neither on what was scored before nor on what is
    scored at the same time. Otherwise a search that resumes would end elsewhere.
    """

    @property
    def name(self) -> str:
        """What it is called in messages and reports."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever scores may: remembered scores are used for an equal one only."""

    @property
    def split(self) -> str:
        """The data that it scores on, by name."""

    @property
    def n_at_once(self) -> int:
        """How many candidates it can score at the same time, 1 or more.

        With 1, `score` is called from the caller's thread alone. With more, it is called from as
        many threads.
        """

    def prepare(self, recipe: Recipe) -> None:
        """Get ready to score candidates; called once, before the first is scored.

        Args:
            recipe: The uniform soup of all ingredients of the search. Candidates are made of some
                of them, with the same dtype and rules.

        Raises:
            StreamsoupError: If candidates of these ingredients cannot be scored.
        """

    def score(self, candidate: Candidate) -> Any:
        """Score one candidate, and return when it is scored.

        Returns:
            A number, larger is better; or a dictionary, as a task returns (`streamsoup.task`); a
            `Score`, or an `Outcome`.

        Raises:
            TaskError: If it cannot be scored. Any other exception is turned into one.
        """

    def close(self) -> None:
        """Release everything. Calls of `score` that are under way then fail soon."""


@contextmanager
def naming(candidate: Candidate) -> Iterator[None]:
    """Add which candidate it was to the error of a task."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{error.text}{which(candidate)}") from error


def which(candidate: Candidate | None) -> str:
    """Return the end of an error message: the candidate it is about, if any."""
    if candidate is None:
        return ""
    if candidate.text:
        return f"; the candidate is {printable(candidate.text, 200)}"
    chosen = candidate.recipe.ingredients
    if len(chosen) == 1:
        return f"; the candidate is {printable(chosen[0])} alone"
    return f"; the candidate is the mean of {some(chosen, 8)}"
