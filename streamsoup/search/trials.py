"""The greedy search itself: which candidates are tried, in which order, and which are kept.

It asks for scores, and knows nothing of models, files or processes. Each search is a fixed function
of the scores it asks for, so it resumes by running again with the scores that are known.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from streamsoup.errors import RecipeError, TaskError, check_choice, count, printable
from streamsoup.live.candidates import Moved
from streamsoup.live.running import SumsPlace
from streamsoup.options import Step, settle, take
from streamsoup.search.scoring.scorer import Members, Outcome
from streamsoup.search.scoring.settings import ScoringSettings
from streamsoup.task import Score

__all__ = [
    "Ask",
    "Found",
    "GreedySettings",
    "Run",
    "Trial",
    "backward",
    "best_first",
    "best_run",
    "forward",
    "random_order",
    "search",
]


class GreedySettings(ScoringSettings, frozen=True, kw_only=True):
    """How a greedy search tries ingredients, and how it scores them."""

    ties: Literal["accept", "reject"] = "accept"
    """Accept a candidate at equal score (the paper), or only at a better one (its code)."""
    min_gain: float = 0.0
    """How much the score has to improve."""
    z: float = 0.0
    """Keep only if the mean paired difference of the examples is this many standard errors above
    `min_gain`; needs a task that returns ``examples``. 0 turns this off."""
    order: Literal["scores", "given", "random"] = "scores"
    """Best first, as given, or at random."""
    n_orders: int = 1
    """Random orders to try; the soup with the best score is made."""
    seed: int = 0
    """Seed of the random orders."""
    direction: Literal["forward", "backward"] = "forward"
    """Start from nothing and add, or from all and drop."""
    passes: int = 1
    """Most passes over those left out (backward: those kept); none follows one without effect."""
    scores: Sequence[float] | Mapping[str, Any] | None = None
    """Scores of the single ingredients, where they are known; else they are measured. A number
    for each, believed as they are; or the report of an earlier search, believed only if its task
    and ingredients are still the same. Not with `z`, which needs the examples of each."""
    sums: SumsPlace | None = None
    """Where the running sum is kept; None for where the fewest bytes are moved. ``memory`` is the
    device's, if candidates are made on one."""

    def __post_init__(self) -> None:
        """Convert numbers of other libraries to Python's. Raises `RecipeError`."""
        ScoringSettings.__post_init__(self)
        settle(self, GreedySettings)
        if self.scores is not None and not isinstance(self.scores, Mapping):
            if isinstance(self.scores, (str, bytes)) or not isinstance(self.scores, Iterable):
                raise RecipeError(
                    f"scores: {printable(repr(self.scores))} are not a list of numbers"
                )
            scores = tuple(take("float", "scores", score) for score in self.scores)
            msgspec.structs.force_setattr(self, "scores", scores)

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` for settings that contradict each other or the ingredients."""
        given = self.scores if not isinstance(self.scores, Mapping) else None
        if given is not None and len(given) != n_ingredients:
            raise RecipeError(
                f"{count(len(given), 'score')} for {count(n_ingredients, 'ingredient')}; "
                "give one for each"
            )
        if given is not None and all(map(math.isnan, given)):
            raise RecipeError("every score given is NaN, so no ingredient can be the first")
        if not 0 <= self.min_gain < math.inf or not 0 <= self.z < math.inf:
            raise RecipeError(
                f"min_gain and z must be 0 or more, and finite, got {self.min_gain} and {self.z}"
            )
        if self.scores is not None and self.z > 0:
            raise RecipeError(
                "z compares the examples of each ingredient, and scores alone have none: leave out "
                "the scores, and all are measured; or z"
            )
        for name in ("passes", "n_orders"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.check_scoring()
        check_choice("ties", self.ties, ("accept", "reject"))
        check_choice("order", self.order, ("scores", "given", "random"))
        check_choice("direction", self.direction, ("forward", "backward"))
        if self.sums is not None:
            check_choice("sums", self.sums, get_args(SumsPlace))
        if self.n_orders > 1 and self.order != "random":
            raise RecipeError("several orders are random ones: order='random'")


class Trial(msgspec.Struct, frozen=True):
    """One candidate, its score, and the decision."""

    ingredient: str
    """The one that was added, or dropped; or the single one that was scored."""
    kind: Literal["single", "add", "drop", "all"]
    members: Members
    """The candidate: numbers of ingredients in the order given."""
    score: Score
    averaged: Score | None
    to_beat: float | None
    decision: str
    """``scored``, ``kept``, ``left out`` or ``dropped``."""
    known: bool
    """True if the score was known: given, or measured before, in this run or an earlier one."""
    moved: Moved
    scoring_s: float


class Run(msgspec.Struct, frozen=True):
    """The search in one order."""

    order: Members
    members: Members
    """What it kept, in the order of the sum."""
    score: Score
    trials: tuple[Trial, ...]


class Found(msgspec.Struct, frozen=True):
    """The result of a search."""

    singles: tuple[Trial, ...]
    runs: tuple[Run, ...]
    names: tuple[str, ...]
    elapsed_s: float


Ask = Callable[[Sequence[Members], float | None], tuple[Outcome, bool]]
"""Returns the outcome of the first candidate of a list, given the score to beat, and True if it was
known; the others may be asked for next."""

Noter = Callable[[int, Any, Members, Outcome, float | None, str, bool], Trial]
"""Makes a `Trial`, and calls `Options.on_event` with it."""


def search(
    names: Sequence[str],
    ask: Ask,
    settings: GreedySettings,
    on_event: Callable[[Any], None] | None = None,
) -> Found:
    """Score the single ingredients if their scores decide the order; then search in each order.

    `on_event` is called with a `Step` and with each `Trial` once it is decided.
    """
    started = time.monotonic()
    n = len(names)
    n_trials = _count_trials(n, settings)
    n_done = n_paid = 0

    def report(text: str) -> None:
        if on_event is not None:
            at_most = settings.passes > 1 or settings.direction == "backward"
            elapsed_s = time.monotonic() - started
            n_steps = max(n_trials, n_done)
            on_event(Step("trial", n_done, n_steps, n_paid, elapsed_s, at_most, text))

    def note(
        i: int,
        kind: Any,
        members: Members,
        outcome: Outcome,
        to_beat: float | None,
        decision: str,
        known: bool,
    ) -> Trial:
        trial = Trial(
            names[i],
            kind,
            members,
            outcome.score,
            outcome.averaged,
            to_beat,
            decision,
            known,
            outcome.moved,
            outcome.scoring_s,
        )
        nonlocal n_done, n_paid
        # The first ingredient of a run is a candidate that was scored alone already.
        n_done += not (kind == "add" and len(members) == 1 and settings.order == "scores")
        n_paid += not known
        if on_event is not None:
            on_event(trial)
        report(f"{decision} {printable(names[i], 60)}")
        return trial

    report("")
    singles: list[Trial] = []
    orders = [list(range(n))]
    if settings.order == "scores":
        for i in range(n):
            outcome, known = ask([(j,) for j in range(i, n)], None)
            singles.append(note(i, "single", (i,), outcome, None, "scored", known))
        orders = [best_first([single.score.value for single in singles])]
    elif settings.order == "random":
        orders = _random_orders(n, settings)
    go = forward if settings.direction == "forward" else backward
    runs = tuple(go(order, ask, note, settings) for order in orders)
    n_trials = n_done
    report("")
    return Found(tuple(singles), runs, tuple(names), time.monotonic() - started)


def _count_trials(n: int, settings: GreedySettings) -> int:
    """Return how many trials a search takes at most; exactly, with one pass forward."""
    alone = n if settings.order == "scores" else 0
    # Forward, the first was scored alone; backward, all together are scored first.
    first = n + 1 if settings.direction == "backward" else n - bool(alone)
    return alone + settings.n_orders * (first + n * (settings.passes - 1))


def forward(order: Sequence[int], ask: Ask, note: Noter, settings: GreedySettings) -> Run:
    """Search as Recipe 1 does, with further passes over those left out. Pure except for `ask`."""
    kept: Members = ()
    best: Score | None = None
    trials: list[Trial] = []
    left_out_at: dict[int, int] = {}
    for _ in range(settings.passes):
        before = len(kept)
        queue = [i for i in order if i not in kept]
        for place, i in enumerate(queue):
            if left_out_at.get(i) == len(kept):
                continue  # the same candidate as before
            to_beat = None if best is None else best.value + settings.min_gain
            outcome, known = ask([(*kept, j) for j in queue[place:]], to_beat)
            accepted = _accepts(outcome.score, best, settings)
            decision = "kept" if accepted else "left out"
            trials.append(note(i, "add", (*kept, i), outcome, to_beat, decision, known))
            if accepted:
                kept, best = (*kept, i), outcome.score
            else:
                left_out_at[i] = len(kept)
        if len(kept) == before:
            break
    if best is None:
        raise TaskError("every score is NaN, so there is nothing to keep; look at the task")
    return Run(tuple(order), kept, best, tuple(trials))


def backward(order: Sequence[int], ask: Ask, note: Noter, settings: GreedySettings) -> Run:
    """Start from all, and drop one after the other, the worst first. Pure except for `ask`."""
    kept: Members = tuple(order)
    outcome, known = ask([kept], None)
    best = outcome.score
    trials = [note(kept[-1], "all", kept, outcome, None, "kept", known)]
    kept_at: dict[int, int] = {}
    for _ in range(settings.passes):
        before = len(kept)
        queue = list(reversed(kept))
        for place, i in enumerate(queue):
            if len(kept) == 1 or kept_at.get(i) == len(kept):
                continue
            to_beat = None if math.isnan(best.value) else best.value + settings.min_gain
            wanted = [tuple(m for m in kept if m != j) for j in queue[place:]]
            outcome, known = ask(wanted, to_beat)
            reference = None if math.isnan(best.value) else best
            accepted = _accepts(outcome.score, reference, settings)
            decision = "dropped" if accepted else "kept"
            trials.append(note(i, "drop", wanted[0], outcome, to_beat, decision, known))
            if accepted:
                kept, best = wanted[0], outcome.score
            else:
                kept_at[i] = len(kept)
        if len(kept) == before:
            break
    if math.isnan(best.value):
        raise TaskError("every score is NaN, so there is nothing to keep; look at the task")
    return Run(tuple(order), kept, best, tuple(trials))


def best_run(runs: Sequence[Run]) -> Run:
    """Return the run with the best score; the first of equals."""
    return max(runs, key=lambda run: run.score.value)


def _accepts(score: Score, best: Score | None, settings: GreedySettings) -> bool:
    """Return True if a candidate is accepted. NaN never is."""
    if math.isnan(score.value) or score.stopped:
        return False
    if best is None:
        return True
    to_beat = best.value + settings.min_gain
    if not (score.value >= to_beat if settings.ties == "accept" else score.value > to_beat):
        return False
    return settings.z == 0 or _is_significant(score, best, settings)


def _is_significant(score: Score, best: Score, settings: GreedySettings) -> bool:
    """Compare example by example: d̄ - min_gain ≥ z · s/√n, with s² the variance of d."""
    ours, theirs = score.examples, best.examples
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        raise TaskError(
            "a paired comparison (z) needs a result for each held-out example, the same ones each "
            "time; return, for example:\n    {'accuracy': right.mean(), 'examples': right}"
        )
    difference = ours - theirs
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return bool(float(np.mean(difference)) - settings.min_gain >= settings.z * error)


def best_first(scores: Sequence[float]) -> list[int]:
    """Return the indices of `scores` from the largest down; equals in the order given, NaN last.

    >>> best_first([0.5, float("nan"), 0.7, 0.7])
    [2, 3, 0, 1]
    """
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i]))


def _random_orders(n: int, settings: GreedySettings) -> list[list[int]]:
    return [random_order(n, settings.seed + number) for number in range(settings.n_orders)]


def random_order(n: int, seed: int) -> list[int]:
    """Draw a uniformly random order of `n` numbers; one more number is only inserted into it.

    So with one more ingredient, the trials before its place are known from the earlier search.

    >>> random_order(5, seed=0), random_order(6, seed=0)
    ([2, 0, 3, 1, 4], [2, 0, 3, 5, 1, 4])
    """
    draw = random.Random(seed)
    order: list[int] = []
    for i in range(n):
        order.insert(draw.randint(0, i), i)
    return order
