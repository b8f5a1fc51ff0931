"""Greedy soups: which ingredients belong in the soup, found by trying one after the other.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, Recipe 1::

    sort the ingredients by score, best first; ties in the order given
    kept = []
    for each ingredient:
        if score(mean(kept + [ingredient])) >= score(mean(kept)):
            kept += [ingredient]

The paper keeps an ingredient at equal score, its code asks for more; `SearchOptions.ties`.
Backward elimination (pruned soups, Bargiela et al. 2023, https://arxiv.org/abs/2301.10092) starts
from all, and drops one after the other, the worst first, where the score does not suffer.

Each search is a fixed function of the scores it asks for, so it is resumed by running it again with
the scores that are known. However it was found, the soup is the uniform one of what it kept, in
the order in which it was kept, and is written by the same pass.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from streamsoup.destination import check_output
from streamsoup.digest import digest_bytes
from streamsoup.errors import RecipeError, TaskError, printable, some
from streamsoup.formats.shards import open_ingredients
from streamsoup.options import Options
from streamsoup.plan import parse_nbytes
from streamsoup.recipe import Coefficients
from streamsoup.soups.make import AnyIngredient, Order, Soup, make, order
from streamsoup.soups.running import Moved, SumsPlace
from streamsoup.soups.scorebook import Members, Scorebook, fingerprint_of
from streamsoup.soups.scoring import FolderScorer, LiveScorer, Outcome, contained
from streamsoup.soups.workers import Alone, Crew, Scorers, Work, candidates_of
from streamsoup.task import AnyTask, Score, Task, load_task
from streamsoup.task.command import CommandTask
from streamsoup.verification import read_provenance

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GreedySoup", "Run", "SearchOptions", "Trial", "backward", "forward", "greedy_soup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How a search goes about it."""

    ties: Literal["accept", "reject"] = "accept"
    """Keep an ingredient at equal score (the paper), or only for a better one (its code)."""
    min_gain: float = 0.0
    """How much better the score has to get."""
    z: float = 0.0
    """Keep only if the mean paired difference of the examples is this many standard errors above
    `min_gain`; needs a task that gives ``examples``. 0 asks for nothing."""
    order: Literal["scores", "given", "random"] = "scores"
    """Best first, as given, or at random."""
    n_orders: int = 1
    """Random orders to try; the soup with the best score is made."""
    seed: int = 0
    """Of the random orders."""
    direction: Literal["forward", "backward"] = "forward"
    """Add to nothing, or drop from all."""
    passes: int = 1
    """Times to go through those left out (or those kept, backward), as long as it helps."""
    scores: Sequence[float] | Mapping[str, Any] | None = None
    """Scores of the single ingredients, where they are known; else they are measured. A number
    for each, believed as they are; or the report of an earlier search, believed only if its task
    and ingredients are still the same."""
    split: str | None = None
    """The split to search on; None for the first of the task."""
    recalibrate: bool = False
    """Measure BatchNorm statistics of each candidate on the task's batches, and go by that."""
    jobs: int = 1
    """Candidates scored at the same time, each in a process with a model of its own, with
    `Options.memory` for the blocks and the running sum of each."""
    timeout: float | None = None
    """Seconds that building the model, or one score, may take; needs a process to kill."""
    isolate: bool = False
    """Score in another process even for one job: no task can harm this one."""
    sums: SumsPlace | None = None
    """Where the running sum is kept; None for where the fewest bytes are moved. ``memory`` is that
    of the device, where candidates are made on one."""
    restart: bool = False
    """Forget the scores of an unfinished search of the same output."""
    on_trial: Callable[[Trial], None] | None = None
    """Called with each `Trial` once it is decided."""

    def check(self, n_ingredients: int) -> None:
        """Raise `RecipeError` for options that make no sense."""
        given = self.scores if not isinstance(self.scores, Mapping) else None
        if given is not None and len(given) != n_ingredients:
            raise RecipeError(
                f"{len(given)} scores for {n_ingredients} ingredients; give one for each"
            )
        if given is not None and all(map(math.isnan, given)):
            raise RecipeError("every score given is NaN, so no ingredient can be the first")
        if not self.min_gain >= 0 or not self.z >= 0:
            raise RecipeError(f"min_gain {self.min_gain} and z {self.z} are to be 0 or more")
        for name in ("jobs", "passes", "n_orders"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} {getattr(self, name)} is below 1")
        if self.n_orders > 1 and self.order != "random":
            raise RecipeError("several orders are random ones: order='random'")
        if self.timeout is not None and not self.timeout > 0:
            raise RecipeError(f"a timeout of {self.timeout} s leaves no time to score")


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate, its score, and what became of it."""

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
    """Whether the score was known: given, or paid for before, in this run or an earlier one."""
    moved: Moved
    scoring_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One search in one order."""

    order: Members
    members: Members
    """What it kept, in the order of the sum."""
    score: Score
    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class GreedySoup(Soup):
    """A soup that was searched for."""

    members: Members = ()
    """The ingredients that were kept, as numbers in the order given."""
    score: float = math.nan
    """The soup's score on the split that was searched on."""
    singles: tuple[Trial, ...] = ()
    """The single ingredients that were scored, in the order given."""
    runs: tuple[Run, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    """All of it as plain JSON; also in the soup's ``streamsoup.json``."""


Ask = Callable[[Sequence[Members], float | None], tuple[Outcome, bool]]
"""Gives the outcome of the first candidate of a list, given the score to beat, and whether it was
known; the others may be wanted next."""


def greedy_soup(
    ingredients: Sequence[AnyIngredient],
    task: AnyTask | CommandTask,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    search: SearchOptions = SearchOptions(),
    options: Options = Options(),  # noqa: B008 - frozen
) -> GreedySoup:
    """Find out which ingredients belong in the soup, and write the soup into the folder `output`.

    `task` is a task file, ``module:object``, an object or function (see `streamsoup.task`), or a
    `CommandTask`. `model` is the live model to score in; else the task builds one. It is left with
    the soup in it. Every candidate has the bits of `uniform` over the same ingredients.

    Each score is on disk before it is used, in a folder ``OUT.search`` beside the output that is
    removed at the end: the same call, made again after a kill, goes on from there. Reads at most
    one ingredient and the running sum per trial (backward: all that is kept). Holds the model,
    blocks, and the running sum if it fits `options.memory`.

    Raises `TaskError` if the task fails, `MismatchError` if the model does not fit, and the errors
    of `make` and `Scorebook`.
    """
    started = time.monotonic()
    opened = open_ingredients(ingredients)
    search.check(len(opened))
    ordered = order(opened, Coefficients.uniform(len(opened)), method="greedy", options=options)
    target = os.path.realpath(os.fspath(output))
    resumed = os.path.lexists(target + ".search") and not search.restart
    if not (resumed and os.path.lexists(target)):
        check_output(os.fspath(output), opened, overwrite=options.overwrite)
    kitchen = _Kitchen(ordered, task, model, search, options, target)
    try:
        bound_to = kitchen.bound_to()
        identity = digest_bytes(json.dumps(bound_to, sort_keys=True).encode())
        with Scorebook(target, bound_to, restart=search.restart) as book:
            finished = _finished(target, identity) if resumed else None
            if finished is not None:
                book.finish()
                return finished
            check_output(os.fspath(output), opened, overwrite=options.overwrite)
            scorers = kitchen.open(book)
            given = _given_scores(search, bound_to)
            judged = _search(scorers, book, [i.name for i in opened], replace(search, scores=given))
            best = _best_run(judged.runs)
            report = _report(judged, kitchen, book, started)
            report |= {"search": identity, "bound_to": bound_to}
            kitchen.leave(best.members)
            kitchen.close()
            chosen = [opened[i] for i in best.members]
            coefficients = Coefficients.uniform(len(chosen))
            final = order(chosen, coefficients, method="greedy", options=options)
            soup = make(replace(final, report=report), output=output, options=options)
            book.finish()
    finally:
        kitchen.close()
    fields = {name: getattr(soup, name) for name in Soup.__slots__}
    return GreedySoup(
        **fields,
        members=best.members,
        score=best.score.value,
        singles=judged.singles,
        runs=judged.runs,
        report=report,
    )


def forward(order: Sequence[int], ask: Ask, note: Noter, search: SearchOptions) -> Run:
    """Search as Recipe 1 does, with further passes over those left out. Pure but for `ask`."""
    kept: Members = ()
    best: Score | None = None
    trials: list[Trial] = []
    left_out_at: dict[int, int] = {}
    for _ in range(search.passes):
        before = len(kept)
        queue = [i for i in order if i not in kept]
        for place, i in enumerate(queue):
            if left_out_at.get(i) == len(kept):
                continue  # the same candidate as before
            to_beat = None if best is None else best.value + search.min_gain
            outcome, known = ask([(*kept, j) for j in queue[place:]], to_beat)
            accepted = _accepts(outcome.score, best, search)
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


def backward(order: Sequence[int], ask: Ask, note: Noter, search: SearchOptions) -> Run:
    """Start from all, and drop one after the other, the worst first. Pure but for `ask`."""
    kept: Members = tuple(order)
    outcome, known = ask([kept], None)
    best = outcome.score
    trials = [note(kept[-1], "all", kept, outcome, None, "kept", known)]
    kept_at: dict[int, int] = {}
    for _ in range(search.passes):
        before = len(kept)
        queue = list(reversed(kept))
        for place, i in enumerate(queue):
            if len(kept) == 1 or kept_at.get(i) == len(kept):
                continue
            to_beat = None if math.isnan(best.value) else best.value + search.min_gain
            wanted = [tuple(m for m in kept if m != j) for j in queue[place:]]
            outcome, known = ask(wanted, to_beat)
            reference = None if math.isnan(best.value) else best
            accepted = _accepts(outcome.score, reference, search)
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


Noter = Callable[[int, Any, Members, Outcome, float | None, str, bool], Trial]
"""Makes a `Trial`, and tells whoever listens."""


def _accepts(score: Score, best: Score | None, search: SearchOptions) -> bool:
    """Decide about a candidate. NaN never wins."""
    if math.isnan(score.value) or score.stopped:
        return False
    if best is None:
        return True
    to_beat = best.value + search.min_gain
    if not (score.value >= to_beat if search.ties == "accept" else score.value > to_beat):
        return False
    return search.z == 0 or _is_significant(score, best, search)


def _is_significant(score: Score, best: Score, search: SearchOptions) -> bool:
    """Compare example by example: d̄ - min_gain ≥ z · s/√n, with s² the variance of d."""
    ours, theirs = score.examples, best.examples
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        raise TaskError(
            "a paired comparison (z) needs a result for each held-out example, the same ones each "
            "time; return, for example:\n    {'accuracy': right.mean(), 'examples': right}"
        )
    difference = ours - theirs
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return bool(float(np.mean(difference)) - search.min_gain >= search.z * error)


@dataclass(frozen=True, slots=True)
class _Judged:
    """All that a search found out."""

    singles: tuple[Trial, ...]
    runs: tuple[Run, ...]
    names: tuple[str, ...]
    elapsed_s: float


def _search(
    scorers: Scorers, book: Scorebook, names: Sequence[str], search: SearchOptions
) -> _Judged:
    """Score the single ingredients if their scores decide the order; then search."""
    started = time.monotonic()
    n = len(names)
    given = search.scores
    assert not isinstance(given, Mapping)
    keep = search.direction == "forward"

    def ask(wanted: Sequence[Members], to_beat: float | None) -> tuple[Outcome, bool]:
        members = wanted[0]
        if len(members) == 1 and given is not None and search.z == 0:
            return Outcome(Score(float(given[members[0]])), None, Moved(0, 0, 0.0), 0.0), True
        known = book.get(members, to_beat) is not None
        return scorers.ask(wanted, to_beat, keep=keep), known

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
        if search.on_trial is not None:
            search.on_trial(trial)
        return trial

    singles: list[Trial] = []
    orders = [list(range(n))]
    if search.order == "scores":
        for i in range(n):
            outcome, known = ask([(j,) for j in range(i, n)], None)
            singles.append(note(i, "single", (i,), outcome, None, "scored", known))
        orders = [_by_score([single.score.value for single in singles])]
    elif search.order == "random":
        orders = _random_orders(n, search)
    go = forward if search.direction == "forward" else backward
    runs = tuple(go(order, ask, note, search) for order in orders)
    return _Judged(tuple(singles), runs, tuple(names), time.monotonic() - started)


def _given_scores(search: SearchOptions, bound_to: Mapping[str, Any]) -> list[float] | None:
    """Take the given scores; those of a report only where they are about the same things."""
    report = search.scores
    if report is None:
        return None
    if not isinstance(report, Mapping):
        return [float(score) for score in report]
    about = report.get("bound_to")
    if not isinstance(about, Mapping):
        raise RecipeError("the scores are no report of a greedy search; give a number for each")
    changed = [k for k in bound_to if k != "ingredients" and about.get(k) != bound_to[k]]
    known = {
        json.dumps(identity): float(single["score"])
        for (_, identity), single in zip(about["ingredients"], report["singles"], strict=False)
    }
    scores: list[float] = []
    for name, identity in bound_to["ingredients"]:
        score = known.get(json.dumps(identity))
        if score is None:
            changed.append(printable(name))
        else:
            scores.append(score)
    if changed:
        raise RecipeError(
            f"the scores are of another search: {some(changed)} changed since, or was not scored; "
            "leave them out, and they are measured"
        )
    return scores


def _by_score(scores: Sequence[float]) -> list[int]:
    """Order best first, ties in the order given, NaN last."""
    ranks = [-math.inf if math.isnan(score) else score for score in scores]
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -ranks[i]))


def _random_orders(n: int, search: SearchOptions) -> list[list[int]]:
    orders = []
    for number in range(search.n_orders):
        numbers = list(range(n))
        random.Random(search.seed + number).shuffle(numbers)
        orders.append(numbers)
    return orders


def _best_run(runs: Sequence[Run]) -> Run:
    """Choose the run with the best score; the first of equals."""
    return max(runs, key=lambda run: run.score.value)


class _Kitchen:
    """The task, and who scores for it: this process or others."""

    def __init__(
        self,
        ordered: Order,
        task: AnyTask | CommandTask,
        model: nn.Module | None,
        search: SearchOptions,
        options: Options,
        target: str,
    ) -> None:
        self.ordered = ordered
        self.options = options
        self.search = search
        self._model = model
        self._target = target
        self._scorers: Scorers | None = None
        self._live: LiveScorer | None = None
        self._crew: Crew | None = None
        self._command = task if isinstance(task, CommandTask) else None
        self._task: Task | None = None
        n_jobs = search.jobs
        isolated = n_jobs > 1 or search.timeout is not None or search.isolate
        if self._command is not None:
            if search.recalibrate:
                raise RecipeError("a command cannot recalibrate; give a task file")
            self.split = self._command.check_split(search.split)
            self.described = {"task": self._command.name, "code": self._command.fingerprint}
        elif isolated:
            if model is not None:
                raise RecipeError(
                    "a given model is scored in this process: leave out jobs, timeout and isolate, "
                    "or let the task build it"
                )
            works = [self._work(task, number) for number in range(n_jobs)]
            names = [ingredient.name for ingredient in ordered.plan.ingredients]
            self._crew = Crew(works, timeout=search.timeout, names=names)
            self.split = self._crew.task["split"]
            self.described = {name: self._crew.task[name] for name in ("task", "code")}
        else:
            self._task = load_task(task)
            self.split = self._task.check_split(search.split)
            if model is None:
                self._task.need("build")
            if search.recalibrate:
                self._task.need("recalibration")
            self.described = {"task": self._task.name, "code": self._task.fingerprint}

    def bound_to(self) -> dict[str, Any]:
        """Say what the scores depend on."""
        recipe = self.ordered.plan.recipe
        return {
            "ingredients": [
                [ingredient.name, fingerprint_of(ingredient)]
                for ingredient in self.ordered.plan.ingredients
            ],
            **self.described,
            "split": self.split,
            "metric": self._command.main if self._command is not None else None,
            "recalibrate": self.search.recalibrate,
            "dtype": recipe.dtype,
            "non_float": recipe.non_float,
            "non_finite": recipe.non_finite,
        }

    def open(self, book: Scorebook) -> Scorers:
        """Build the model, or say to others that they may."""
        names = [ingredient.name for ingredient in self.ordered.plan.ingredients]
        if self._crew is not None:
            self._crew.use(book)
            self._scorers = self._crew
            return self._crew
        if self._command is not None:
            candidates = candidates_of(self._work(None, 0), None)
            folder = FolderScorer(
                self._command, self.ordered, candidates, split=self.split, folder=book.root
            )
            self._scorers = Alone(folder, book, names)
            return self._scorers
        from streamsoup.live import ModelSink

        assert self._task is not None
        model = self._model
        if model is None:
            with contained(self._task.name, "build"):
                model = self._task.build()
        sink = ModelSink(model, self.ordered.plan)
        self._live = LiveScorer(
            self._task,
            sink,
            candidates_of(self._work(None, 0), sink),
            split=self.split,
            recalibrate=self.search.recalibrate,
        )
        self._scorers = Alone(self._live, book, names)
        return self._scorers

    def leave(self, members: Members) -> None:
        """Put the soup into a model that was given."""
        if self._model is not None and self._live is not None:
            self._live.put(members)

    def close(self) -> None:
        """Stop all that is still running; a second time does nothing."""
        if self._scorers is not None:
            self._scorers.close()
        elif self._crew is not None:
            self._crew.close()
        self._scorers = self._crew = None

    def _work(self, task: Any, number: int) -> Work:
        budget = self.options.memory
        nbytes = parse_nbytes(budget) if isinstance(budget, str) else budget
        return Work(
            task,
            self.search.split,
            self.search.recalibrate,
            self.ordered,
            self.options,
            self.search.sums,
            nbytes,
            os.path.join(self._target + ".search", f"sum-{number}"),
        )


def _finished(target: str, identity: str) -> GreedySoup | None:
    """Give the soup of this very search, if an earlier run had put it in place before a kill."""
    if os.path.lexists(target + ".partial"):
        return None  # `make` knows more
    try:
        provenance = read_provenance(target)
    except RecipeError:
        return None
    report = provenance.report
    if report.get("search") != identity:
        return None
    members, score = report.get("members"), report.get("score")
    return GreedySoup(
        target,
        provenance.recipe,
        provenance,
        nbytes_read=0,
        nbytes_written=0,
        elapsed_s=0.0,
        members=tuple(members) if isinstance(members, (list, tuple)) else (),
        score=float(score) if isinstance(score, (int, float, str)) else math.nan,
        report=report,
    )


def _report(judged: _Judged, kitchen: _Kitchen, book: Scorebook, started: float) -> dict[str, Any]:
    """Put all that was found out into plain JSON."""
    best = _best_run(judged.runs)
    trials = [*judged.singles, *(trial for run in judged.runs for trial in run.trials)]
    scored = [trial for trial in trials if not trial.known]
    scoring_s = sum(trial.scoring_s for trial in scored)
    mixing_s = sum(trial.moved.elapsed_s for trial in scored)
    search = kitchen.search
    rules = {
        name: getattr(search, name)
        for name in (
            *("ties", "min_gain", "z", "order", "n_orders", "seed", "direction", "passes"),
            *("recalibrate", "jobs"),
        )
    }
    report: dict[str, Any] = {
        **kitchen.described,
        "split": kitchen.split,
        "rules": rules,
        "ingredients": list(judged.names),
        "members": list(best.members),
        "kept": [judged.names[i] for i in best.members],
        "score": best.score.to_record()["value"],
        "singles": [_trial_record(trial) for trial in judged.singles],
        "runs": [
            {
                "order": list(run.order),
                "members": list(run.members),
                "score": run.score.to_record()["value"],
                "trials": [_trial_record(trial) for trial in run.trials],
            }
            for run in judged.runs
        ],
        "n_scored": len(scored),
        "n_resumed": book.n_resumed,
        "mixed_on": next((trial.moved.where for trial in scored if trial.moved.where), ""),
        "nbytes_read": sum(trial.moved.nbytes_read for trial in scored),
        "nbytes_sums": sum(trial.moved.nbytes_sums for trial in scored),
        "seconds": {
            "search": judged.elapsed_s,
            "scoring": scoring_s,
            "mixing": mixing_s,
            "before": time.monotonic() - started - judged.elapsed_s,
        },
    }
    if len(judged.runs) > 1:
        scores = [run.score.value for run in judged.runs]
        report["over_orders"] = {"mean": statistics.fmean(scores), "sd": statistics.stdev(scores)}
    if len(best.members) == 1 and len(judged.names) > 1:
        report["advice"] = _why_one(judged, best)
    return report


def _trial_record(trial: Trial) -> dict[str, Any]:
    score = trial.score.to_record()
    score.pop("examples", None)
    record: dict[str, Any] = {
        "ingredient": trial.ingredient,
        "kind": trial.kind,
        "members": list(trial.members),
        "score": score.pop("value"),
        **score,
        "decision": trial.decision,
        "known": trial.known,
        "nbytes_read": trial.moved.nbytes_read,
        "nbytes_sums": trial.moved.nbytes_sums,
        "mixing_s": trial.moved.elapsed_s,
        "scoring_s": trial.scoring_s,
    }
    if trial.to_beat is not None:
        record["to_beat"] = trial.to_beat
    if trial.averaged is not None:
        record["score_with_averaged_statistics"] = trial.averaged.to_record()["value"]
    return record


def _why_one(judged: _Judged, best: Run) -> str:
    """Say why a soup of one happens, and what to look at."""
    tried = [trial for trial in best.trials if trial.decision == "left out"]
    finite = [trial for trial in tried if math.isfinite(trial.score.value)]
    text = (
        f"only {printable(judged.names[best.members[0]])} was kept: no mean with another "
        "ingredient scored as well. "
    )
    if finite:
        top = max(finite, key=lambda trial: trial.score.value)
        text += (
            f"The closest was with {printable(top.ingredient)}: {top.score.value:.6g} "
            f"against {best.score.value:.6g}. "
        )
    return text + (
        "Ingredients mix when they lie in one valley: look at the angles between them (streamsoup "
        "geometry with --base; near 90 degrees and far apart is too far), at learning rates (a "
        "high one leaves the valley), at whether all started from the same weights, and at "
        "another order (--order random) or --min-gain 0"
    )
