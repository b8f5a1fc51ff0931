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

However it was found, the soup is the uniform one of what was kept, in the order in which it was
kept, and is written by the same pass. The search itself is in `soups.search`; here is what it
takes: somebody who scores, scores that are remembered, and the soup at the end.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.engine.budget import memory_budget
from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import OutputExistsError, RecipeError, printable, some
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.live.candidates import Moved
from streamsoup.live.mix import put_into
from streamsoup.options import Note, Options, check_options
from streamsoup.output.destination import check_output
from streamsoup.output.make import Order, Soup, digest_beside, make, order
from streamsoup.output.verification import read_provenance
from streamsoup.recipe import Coefficients
from streamsoup.search.folder import bound_ingredients
from streamsoup.search.report import RULES, report_of
from streamsoup.search.scoring.candidate import FolderScorer, LiveScorer, Outcome, contained
from streamsoup.search.scoring.scorebook import Members, Scorebook
from streamsoup.search.scoring.serving import Work, candidates_of
from streamsoup.search.scoring.workers import Alone, Crew, Scorers
from streamsoup.search.trials import Ask, Run, SearchOptions, Trial, backward, best_run, forward
from streamsoup.search.trials import search as go_through
from streamsoup.task import AnyTask, Score, Task, load_task
from streamsoup.task.code import digest_model
from streamsoup.task.command import CommandTask
from streamsoup.task.loading import place_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GreedySoup", "Run", "SearchOptions", "Trial", "backward", "forward", "greedy_soup"]


class GreedySoup(Soup, frozen=True):
    """A soup that was searched for."""

    members: Members = ()
    """The ingredients that were kept, as numbers in the order given."""
    score: float = math.nan
    """The soup's score on the split that was searched on."""
    singles: tuple[Trial, ...] = ()
    """The single ingredients that were scored, in the order given; not if `finished`: see
    `report`."""
    runs: tuple[Run, ...] = ()
    """Each search in one order; not if `finished`: see `report`."""
    report: Mapping[str, Any] = {}
    """All of it as plain JSON; also in the soup's ``streamsoup.json``."""


def greedy_soup(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask | CommandTask,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    search: SearchOptions = SearchOptions(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> GreedySoup:
    """Find out which ingredients belong in the soup, and write the soup into the folder `output`.

    `task` is a task file, ``module:object``, an object or function (see `streamsoup.task`), or a
    `CommandTask`. `model` is the live model to score in; else the task builds one. It is left with
    the soup in it. Every candidate has the bits of `uniform` over the same ingredients.

    Each score is on disk before the next is, in a folder ``OUT.search`` beside the output that is
    removed at the end: the same call, made again after a kill, goes on from there. Most trials read
    one ingredient and the running sum; where no sum is kept (`running`), and backward, all that is
    kept. Holds the model, blocks, and the running sum if it fits `options.memory`.

    Raises `TaskError` if the task fails, `MismatchError` if the model does not fit, and the errors
    of `make` and `Scorebook`.
    """
    started = time.monotonic()
    check_options(search, SearchOptions)
    opened = open_ingredients(ingredients)
    search.check(len(opened))
    ordered = order(
        opened, Linear(Coefficients.uniform(len(opened))), method="greedy", options=options
    )
    target = os.path.realpath(os.fsdecode(output))
    resumed = os.path.lexists(target + ".search") and not search.restart
    if not resumed:
        check_output(os.fsdecode(output), opened, overwrite=options.overwrite, resumes=False)
    kitchen = _Kitchen(ordered, task, model, search, options, target)
    try:
        bound_to = kitchen.bound_to()
        given = _given_scores(search, bound_to)
        rules = [getattr(search, name) for name in RULES if name != "jobs"]
        about = [bound_to, rules, repr(search.scores), ordered.plan.recipe.shard_size]
        identity = digest_bytes(json.dumps(about, sort_keys=True).encode())
        with Scorebook(target, bound_to, restart=search.restart) as book, closing(kitchen):
            finished = _finished(target, identity, book) if resumed else None
            if finished is not None:
                put_into(model, finished, options)
                book.finish()
                return finished
            check_output(os.fsdecode(output), opened, overwrite=options.overwrite, resumes=resumed)
            scorers = kitchen.open(book)
            ask = _asking(scorers, book, search, given)
            names = [ingredient.name for ingredient in opened]
            found = go_through(names, ask, search, options.on_event)
            best = best_run(found.runs)
            report: dict[str, Any] = {**kitchen.described, "split": kitchen.split}
            report |= report_of(found, search, paid=book.paid, n_resumed=len(book.resumed))
            report["seconds"]["before"] = time.monotonic() - started - found.elapsed_s
            report |= {"search": identity, "run": book.run, "bound_to": bound_to}
            kitchen.leave(best.members)
            kitchen.close()
            chosen = [opened[i] for i in best.members]
            coefficients = Coefficients.uniform(len(chosen))
            final = order(chosen, Linear(coefficients), method="greedy", options=options)
            try:
                soup = make(replace(final, report=report), output=output, options=options)
            except OutputExistsError:
                # Where a kill came as `make` tidied up, only the soup itself says whose it is.
                finished = _finished(target, identity, book) if resumed else None
                if finished is None:
                    raise
                book.finish()
                return finished
            book.finish()
    finally:
        kitchen.close()
    return GreedySoup(
        **msgspec.structs.asdict(soup),
        members=best.members,
        score=best.score.value,
        singles=found.singles,
        runs=found.runs,
        report=report,
    )


def _asking(
    scorers: Scorers, book: Scorebook, search: SearchOptions, given: Sequence[float] | None
) -> Ask:
    """Give what a search asks: given scores, those in the book, or else the scorers."""
    keep = search.direction == "forward"
    asked = set(book.resumed)

    def ask(wanted: Sequence[Members], to_beat: float | None) -> tuple[Outcome, bool]:
        members = wanted[0]
        if len(members) == 1 and given is not None:
            return Outcome(Score(float(given[members[0]])), None, Moved(0, 0, 0.0), 0.0), True
        # Not what jobs have scored ahead: that is paid for here, and used for the first time.
        known = members in asked and book.get(members, to_beat) is not None
        asked.add(members)
        return scorers.ask(wanted, to_beat, keep=keep), known

    return ask


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
    try:
        known = {
            json.dumps(identity): float(single["score"])
            for (_, identity), single in zip(about["ingredients"], report["singles"], strict=False)
        }
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            "the scores are no whole report of a greedy search: it lacks ingredients or their "
            "scores; give a number for each"
        ) from None
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
        if self._command is not None and self._command.timeout is None:
            self._command = replace(self._command, timeout=search.timeout)
        self._task: Task | None = None
        n_jobs = search.jobs
        isolated = n_jobs > 1 or search.timeout is not None or search.isolate
        if self._command is not None:
            if search.recalibrate:
                raise RecipeError("a command cannot recalibrate; give a task file")
            self.split = self._command.check_split(search.split)
            self.described = {"task": self._command.name, "code": self._command.fingerprint}
            if n_jobs > 1:
                self._crew = self._start(self._command, timeout=None)  # it has one of its own
        elif isolated:
            if model is not None:
                raise RecipeError(
                    "a given model is scored in this process: leave out jobs, timeout and isolate, "
                    "or let the task build it"
                )
            self._crew = self._start(task, timeout=search.timeout)
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
            "ingredients": bound_ingredients(self.ordered.plan.ingredients),
            **self.described,
            "task": place_of(self.described["task"]),
            "model": "" if self._model is None else digest_model(self._model),
            "side_files": digest_beside(self.ordered),
            "split": self.split,
            "metric": self._command.main if self._command is not None else None,
            # Not True: scores of earlier versions are those of single ingredients measured anew.
            "recalibrate": "several" if self.search.recalibrate else False,
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
        from streamsoup.live.model import ModelSink

        assert self._task is not None
        model = self._model
        if model is None:
            self._note_building()
            with contained(self._task, "build"):
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

    def _note_building(self) -> None:
        if self.options.on_event is not None:
            self.options.on_event(Note("building the model"))

    def _start(self, task: Any, *, timeout: float | None) -> Crew:
        if not isinstance(task, CommandTask):
            self._note_building()
        works = [self._work(task, number) for number in range(self.search.jobs)]
        names = [ingredient.name for ingredient in self.ordered.plan.ingredients]
        return Crew(works, timeout=timeout, names=names)

    def _work(self, task: Any, number: int) -> Work:
        nbytes = memory_budget(self.ordered.plan, self.options.memory)
        return Work(
            task,
            self.search.split,
            self.search.recalibrate,
            self.ordered,
            self.options,
            self.search.sums,
            nbytes,
            os.path.join(self._target + ".search", f"sum-{number}"),
            self.search.jobs,
        )


def _finished(target: str, identity: str, book: Scorebook) -> GreedySoup | None:
    """Give the soup of this very search, if an earlier run had put it in place before a kill."""
    if os.path.lexists(target + ".partial"):
        return None  # `make` knows more
    try:
        provenance = read_provenance(target)
    except RecipeError:
        return None
    report = provenance.report
    # One search of these very things may have been over long ago, and another be under way.
    if report.get("search") != identity or not book.is_of(report.get("run")):
        return None
    members, score = report.get("members"), report.get("score")
    return GreedySoup(
        target,
        provenance.recipe,
        provenance,
        nbytes_read=0,
        nbytes_written=0,
        elapsed_s=0.0,
        finished=True,
        members=tuple(members) if isinstance(members, (list, tuple)) else (),
        score=float(score) if isinstance(score, (int, float, str)) else math.nan,
        report=report,
    )
