"""Greedy soups: which ingredients belong in the soup, found by trying one after the other.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, Recipe 1::

    sort the ingredients by score, best first; ties in the order given
    kept = []
    for each ingredient:
        if score(mean(kept + [ingredient])) >= score(mean(kept)):
            kept += [ingredient]

The paper keeps an ingredient at equal score, its code asks for more; `GreedySettings.ties`.
Backward elimination (pruned soups, Bargiela et al. 2023, https://arxiv.org/abs/2301.10092) starts
from all, and drops one after the other, the worst first, where the score does not suffer.

However it was found, the soup is the uniform one of what was kept, in the order in which it was
kept, and the same pass writes it. The search itself is in `trials`, who scores in `scoring.choice`,
and what every search does around its question in `run`.
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

from streamsoup.cluster.choice import executing
from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, printable, some
from streamsoup.formats.fitting.fit import check_independent
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.live.candidates import Moved
from streamsoup.options import Options, check_options
from streamsoup.output.make import Order, Soup, check_spread, digest_beside, order
from streamsoup.recipe import Coefficients
from streamsoup.search.folder import bound_ingredients
from streamsoup.search.report import RULES, report_of
from streamsoup.search.run import SearchRun
from streamsoup.search.scoring.asking import Asking
from streamsoup.search.scoring.choice import choose_scorer
from streamsoup.search.scoring.journal import ScoreJournal
from streamsoup.search.scoring.scorer import Members, Outcome, Scorer
from streamsoup.search.scoring.servers import ServerScorer
from streamsoup.search.trials import Ask, GreedySettings, Run, Trial, best_run
from streamsoup.search.trials import search as go_through
from streamsoup.task import AnyTask, Score
from streamsoup.task.code import digest_model
from streamsoup.task.command import CommandTask
from streamsoup.task.loading import place_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GreedySettings", "GreedySoup", "Run", "Trial", "greedy", "scores_depend_on"]


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


def greedy(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask | CommandTask | Scorer,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    settings: GreedySettings = GreedySettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> GreedySoup:
    """Find out which ingredients belong in the soup, and write the soup into a folder.

    Each score is on disk before the next one is, in a folder ``OUT.search`` beside the output that
    is removed at the end: the same call, made again after a kill, resumes. Every candidate has the
    bits of `uniform` over the same ingredients.

    Args:
        ingredients: Checkpoints, in the order that decides between equal scores.
        task: A task file, ``module:object``, an object or a function (see `streamsoup.task`); a
            `CommandTask`; or a `Scorer`.
        output: The folder to make.
        model: The live model to score in; else the task builds one. It is left with the soup in it.
        settings: How to search, and where to score.
        options: How to make candidates and the soup.

    Returns:
        The soup, with every trial and its decision.

    Raises:
        TaskError: If the task fails, or lacks what is needed.
        MismatchError: If the ingredients do not fit together, or not with the model.
        ResumeError: If an unfinished search of the same output was about something else.
        OutputError: If the output cannot be written, or exists.

    Cost: most trials read one ingredient and the running sum; where no sum is kept
    (`GreedySettings.sums`), and backward, all that is kept. Holds the model, blocks, and the
    running sum if it fits `Options.memory`.
    """
    check_options(settings, GreedySettings)
    with executing(options) as held:
        return _greedy(ingredients, task, output, model, settings, held)


def _greedy(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask | CommandTask | Scorer,
    output: str | os.PathLike[str],
    model: nn.Module | None,
    settings: GreedySettings,
    options: Options,
) -> GreedySoup:
    started = time.monotonic()
    opened = open_ingredients(ingredients, options.reading.downloading)
    settings.check(len(opened))
    check_independent([each.source for each in opened])
    equal = Linear(Coefficients.uniform(len(opened)))
    everything = order(opened, equal, method="greedy", options=options)
    check_spread(everything, options)
    run = SearchRun(output, opened, restart=settings.restart, options=options)
    scorer = choose_scorer(
        task,
        everything,
        model,
        settings,
        options,
        folder=run.folder,
        sums=settings.sums,
        keeps=settings.direction == "forward",
    )
    with closing(scorer):
        bound_to = scores_depend_on(everything, scorer, task, model, settings.recalibrate)
        given = _given_scores(settings, bound_to)
        identity = _identity(bound_to, settings, everything)
        found: list[Any] = []

        def search(journal: ScoreJournal) -> Order:
            asking = Asking(scorer, journal, everything.plan.recipe)
            with closing(asking):
                ask = _asker(asking, journal, settings, given)
                names = [each.name for each in opened]
                result = go_through(names, ask, settings, options.on_event)
            best = best_run(result.runs)
            report: dict[str, Any] = {"task": scorer.name, "code": scorer.fingerprint}
            report["split"] = scorer.split
            if isinstance(scorer, ServerScorer):
                report["servers"] = scorer.report
            report |= report_of(result, settings, paid=journal.paid, n_resumed=len(journal.resumed))
            report["seconds"]["before"] = time.monotonic() - started - result.elapsed_s
            report |= {"search": identity, "run": journal.run, "bound_to": bound_to}
            found.extend([best, result])
            chosen = [opened[i] for i in best.members]
            mean = Linear(Coefficients.uniform(len(chosen)))
            final = order(chosen, mean, method="greedy", options=options)
            return replace(final, report=report)

        soup = run.soup(
            lambda: ScoreJournal(run.target, bound_to, restart=settings.restart),
            identity,
            search,
            model,
        )
    if soup.finished or not found:
        return _from_report(soup)
    best, result = found
    return GreedySoup(
        **msgspec.structs.asdict(soup),
        members=best.members,
        score=best.score.value,
        singles=result.singles,
        runs=result.runs,
        report=soup.provenance.report,
    )


def scores_depend_on(
    ordered: Order,
    scorer: Scorer,
    task: object,
    model: nn.Module | None,
    recalibrate: bool,
) -> dict[str, Any]:
    """Return what the scores depend on, as plain JSON."""
    recipe = ordered.plan.recipe
    return {
        "ingredients": bound_ingredients(ordered.plan.ingredients),
        "task": place_of(scorer.name),
        "code": scorer.fingerprint,
        "model": "" if model is None else digest_model(model),
        "side_files": digest_beside(ordered),
        "split": scorer.split,
        "metric": task.main if isinstance(task, CommandTask) else None,
        # Not True: scores of earlier versions are those of single ingredients measured anew.
        "recalibrate": "several" if recalibrate else False,
        "dtype": recipe.dtype,
        "non_float": recipe.non_float,
        "non_finite": recipe.non_finite,
        **({"reading": recipe.reading.told} if recipe.reading.told else {}),
    }


def _identity(bound_to: Mapping[str, Any], settings: GreedySettings, ordered: Order) -> str:
    """Return a digest that is equal for searches that find the same soup."""
    rules = [getattr(settings, name) for name in RULES if name != "jobs"]
    about = [bound_to, rules, repr(settings.scores), ordered.plan.recipe.shard_size]
    return digest_bytes(json.dumps(about, sort_keys=True).encode())


def _asker(
    asking: Asking,
    journal: ScoreJournal,
    settings: GreedySettings,
    given: Sequence[float] | None,
) -> Ask:
    """Return what a search asks: given scores, those of the journal, or else the scorer's."""
    asked = set(journal.resumed)

    def ask(wanted: Sequence[Members], to_beat: float | None) -> tuple[Outcome, bool]:
        members = wanted[0]
        if len(members) == 1 and given is not None:
            return Outcome(Score(float(given[members[0]])), None, Moved(0, 0, 0.0), 0.0), True
        # What was scored ahead is measured in this run, and used for the first time.
        known = members in asked and journal.get(members, to_beat) is not None
        asked.add(members)
        return asking.ask(wanted, to_beat), known

    return ask


def _given_scores(settings: GreedySettings, bound_to: Mapping[str, Any]) -> list[float] | None:
    """Return the given scores; those of a report only if they are about the same things."""
    report = settings.scores
    if report is None:
        return None
    if not isinstance(report, Mapping):
        return [float(score) for score in report]
    about = report.get("bound_to")
    if not isinstance(about, Mapping):
        raise RecipeError("the scores are not a report of a greedy search; give a number for each")
    keys = [key for key in dict.fromkeys([*bound_to, *about]) if key != "ingredients"]
    changed = [key for key in keys if about.get(key) != bound_to.get(key)]
    try:
        known = {
            json.dumps(identity): float(single["score"])
            for (_, identity), single in zip(about["ingredients"], report["singles"], strict=False)
        }
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            "the scores are not a whole report of a greedy search: it lacks ingredients or their "
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


def _from_report(soup: Soup) -> GreedySoup:
    """Add what a soup's report says, where an earlier run had put it in place."""
    report: Mapping[str, Any] = soup.provenance.report
    members, score = report.get("members"), report.get("score")
    return GreedySoup(
        **msgspec.structs.asdict(soup),
        members=tuple(members) if isinstance(members, (list, tuple)) else (),
        score=float(score) if isinstance(score, (int, float, str)) else math.nan,
        report=report,
    )
