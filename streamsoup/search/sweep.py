"""Sweeps: the same soup with one parameter, or several, at every point of a grid; the best is kept.

Any verb that makes a soup of fixed ingredients by a rule can be swept, over any number that it
takes: ``density`` and ``lambda_`` of `ties`, ``scale`` of `arithmetic`, ``t`` of `nearswap`.
Every point is a recipe, so it is scored as the candidates of any other search are: in a live model,
in place; in several; by a command; or by a `Scorer` from outside.

Where there is a base, it and the mean of the others are scored too, so that the table tells whether
the rule helps at all. They are never what is written.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from streamsoup.cluster.choice import executing
from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, TaskError, check_choice, option
from streamsoup.formats.ingredients import AnyIngredient, open_ingredients
from streamsoup.options import Options, Step, check_options, take
from streamsoup.output.make import Order, Soup, check_spread, order
from streamsoup.output.planned import planned
from streamsoup.recipe import Coefficients
from streamsoup.rule import Rule
from streamsoup.search.greedy import scores_depend_on
from streamsoup.search.run import SearchRun
from streamsoup.search.scoring.asking import Asking
from streamsoup.search.scoring.choice import choose_scorer
from streamsoup.search.scoring.journal import ScoreJournal
from streamsoup.search.scoring.scorer import Candidate, Scorer
from streamsoup.search.scoring.settings import ScoringSettings
from streamsoup.search.trials import best_first
from streamsoup.task import AnyTask, Score
from streamsoup.task.command import CommandTask

if TYPE_CHECKING:
    from torch import nn

__all__ = ["METHODS", "Point", "SweepSettings", "SweepSoup", "sweep", "sweep_points"]

METHODS: Mapping[str, str] = {
    "arithmetic": "closed",
    **dict.fromkeys(
        ("ties", "dare", "breadcrumbs", "della", "sce", "ram", "nearswap"),
        "merges",
    ),
}
"""The verbs that `sweep` takes, and the files of `methods` that they are in."""

MOST_POINTS = 10_000


class Point(msgspec.Struct, frozen=True):
    """A place of the grid."""

    values: Mapping[str, float | str]
    """The parameters that are swept, by name; a text for a choice such as a curve."""
    rule: Rule
    members: tuple[int, ...] | None = None
    """The ingredients that the rule is of, by number; None for all."""

    @property
    def text(self) -> str:
        """The place in words.

        >>> Point({"density": 0.5, "lambda": 1.0}, Linear(Coefficients.uniform(1))).text
        'density 0.5, lambda 1'
        """
        return ", ".join(
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
            for name, value in self.values.items()
        )


class SweepSettings(ScoringSettings, frozen=True, kw_only=True):
    """How the points of a sweep are scored."""


class SweepSoup(Soup, frozen=True):
    """The best soup of a sweep."""

    best: Mapping[str, float | str] = {}
    """Its parameters, of those that were swept."""
    score: float = math.nan
    """Its score on the split that was scored on."""
    report: Mapping[str, Any] = {}
    """Every point and its score, as plain JSON; also in the soup's ``streamsoup.json``."""


def sweep(
    ingredients: Iterable[AnyIngredient],
    method: str,
    task: AnyTask | CommandTask | Scorer,
    grid: Mapping[str, Sequence[float]],
    *,
    output: str | os.PathLike[str],
    base: AnyIngredient,
    model: nn.Module | None = None,
    settings: SweepSettings = SweepSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
    **parameters: Any,
) -> SweepSoup:
    """Score a merge at every point of a grid of its parameters, and write the best one.

    Each score is on disk before the next one is, in a folder ``OUT.search`` beside the output that
    is removed at the end: the same call, made again after a kill, resumes.

    Args:
        ingredients: Checkpoints, as for the verb.
        method: The verb, such as ``"ties"``: one of `METHODS`.
        task: A task file, ``module:object``, an object or a function (see `streamsoup.task`); a
            `CommandTask`; or a `Scorer`.
        grid: The values of each parameter that is swept; all combinations are scored, the last
            parameter changing first. Of equal scores the first one wins.
        output: The folder to make.
        base: What the ingredients were fine-tuned from.
        model: The live model to score in; else the task builds one. It is left with the soup in it.
        settings: Where and how to score.
        options: How to make candidates and the soup.
        parameters: What else the verb takes.

    Returns:
        The soup, with every point and its score.

    Raises:
        RecipeError: A parameter is unknown or out of range; at any point of the grid.
        TaskError: The task fails, or lacks what is needed, or every score is NaN.
        StreamsoupError: Whatever the verb raises, and `greedy` about outputs and resuming.

    Costs as many passes as the rule takes and one score for each point, and one for the base and
    the mean each. Holds the model, and what the verb itself holds.
    """
    check_options(settings, SweepSettings)
    check_choice("method", method, tuple(METHODS))
    verb: Callable[..., Soup] = getattr(
        importlib.import_module(f"streamsoup.methods.{METHODS[method]}"), method
    )
    first, *opened = open_ingredients([base, *ingredients], options.reading.downloading)
    ordered: Order | None = None
    points = []
    for values in places(grid):
        told = parameters | values

        def make(quietly: Options, told: Mapping[str, Any] = told) -> Soup:
            try:
                return verb(opened, base=first, output=output, options=quietly, **told)
            except TypeError as error:
                raise RecipeError(f"{method}: {error}") from None

        ordered = planned(make, options).order
        points.append(Point(values, ordered.plan.recipe.rule))
    assert ordered is not None
    return sweep_points(
        points, ordered, task, output=output, model=model, settings=settings, options=options
    )


def places(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Return the places of a grid, the last parameter changing first.

    Raises `RecipeError` for an empty grid, or one of more than `MOST_POINTS`.

    >>> places({"a": [1, 2], "b": [0.5]})
    [{'a': 1, 'b': 0.5}, {'a': 2, 'b': 0.5}]
    """
    axes = {name: [_number(name, value) for value in grid[name]] for name in grid}
    n = math.prod(map(len, axes.values()))
    if not axes or n == 0:
        raise RecipeError("a sweep needs a parameter with some values, such as density")
    if n > MOST_POINTS:
        raise RecipeError(f"a grid of {n} points is too fine; {MOST_POINTS} is the most")
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    # 0.0 and -0.0 are one place, and so is a value that is given twice.
    return list({tuple(place.values()): place for place in reversed(found)}.values())[::-1]


def _number(name: str, value: Any) -> float:
    """Return a number of Python: whole ones stay whole, such as seeds. Raises `RecipeError`."""
    number = take("float", name, value)
    return int(value) if hasattr(value, "__index__") else number


def sweep_points(
    points: Sequence[Point],
    ordered: Order,
    task: AnyTask | CommandTask | Scorer,
    *,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    settings: SweepSettings = SweepSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> SweepSoup:
    """Score planned soups that differ in their rule alone, and write the best one.

    Args:
        points: What is scored; at least one.
        ordered: The plan of any of them.
        task: As for `sweep`.
        output: As for `sweep`.
        model: As for `sweep`.
        settings: As for `sweep`.
        options: As for `sweep`.

    Returns:
        The soup, with every point and its score.

    Raises:
        StreamsoupError: Whatever `sweep` raises.
    """
    if options.part is not None:
        raise RecipeError(f"{option('part')}: only soups made by a formula are made in parts")
    if options.rank is not None:
        raise RecipeError(
            f"{option('rank')}: each point is another sum, with another best approximation; leave "
            "it out, and reduce the rank of the best"
        )
    settings.check_scoring()
    with executing(options) as held:
        return _sweep(points, ordered, task, output, model, settings, held)


def _sweep(
    points: Sequence[Point],
    ordered: Order,
    task: AnyTask | CommandTask | Scorer,
    output: str | os.PathLike[str],
    model: nn.Module | None,
    settings: SweepSettings,
    options: Options,
) -> SweepSoup:
    opened, method = ordered.plan.ingredients, ordered.plan.recipe.method
    k = len(opened)
    equal = ordered.plan.among(range(k), Linear(Coefficients.uniform(k)))
    everything = replace(ordered, plan=equal)
    everyone = tuple(range(k))
    members = [everyone if point.members is None else point.members for point in points]
    for point, own in zip(points, members, strict=True):  # each may be what is made in the end
        check_spread(replace(ordered, plan=ordered.plan.among(own, point.rule)), options)
    compared = _compared(k) if "base" in ordered.report else {}
    rules = [*compared.values(), *(point.rule for point in points)]
    members = [*[everyone] * len(compared), *members]
    run = SearchRun(output, opened, restart=settings.restart, options=options)
    scorer = choose_scorer(
        task, everything, model, settings, options, folder=run.folder, by_rule=True
    )
    with closing(scorer):
        bound_to = scores_depend_on(everything, scorer, task, model, settings.recalibrate) | {
            # As it comes back from the journal.
            "points": json.loads(msgspec.json.encode([*zip(rules, members, strict=True)]))
        }
        shard_size = ordered.plan.recipe.shard_size
        identity = digest_bytes(json.dumps([bound_to, shard_size], sort_keys=True).encode())
        texts = [*compared, *(point.text for point in points)]
        candidates = [
            Candidate(replace(ordered.plan.among(own, rule).recipe, method=method), own, text=text)
            for rule, own, text in zip(rules, members, texts, strict=True)
        ]

        def search(journal: ScoreJournal) -> Order:
            started = time.monotonic()
            with closing(Asking(scorer, journal, equal.recipe, candidates)) as asking:
                scores = _scores(asking, journal, texts, options.on_event)
            values = [score.value for score in scores[len(compared) :]]
            best = best_first(values)[0]
            if math.isnan(values[best]):
                raise TaskError("every score is NaN, so no point is the best; look at the task")
            own = [opened[i] for i in members[len(compared) + best]]
            final = order(own, points[best].rule, method=method, options=options)
            records = [score.to_record()["value"] for score in scores]
            report = dict(ordered.report) | {
                "task": scorer.name,
                "code": scorer.fingerprint,
                "split": scorer.split,
                "sweep": {
                    "method": method,
                    "parameters": list(points[0].values),
                    "compared": dict(zip(compared, records, strict=False)),
                    "points": [
                        {"values": dict(point.values), "score": record}
                        for point, record in zip(points, records[len(compared) :], strict=True)
                    ],
                    "best": best,
                },
                "n_scored": len(journal.paid),
                "n_resumed": len(journal.resumed),
                "nbytes_read": sum(outcome.moved.nbytes_read for outcome in journal.paid),
                "seconds": {
                    "search": time.monotonic() - started,
                    "scoring": sum(outcome.scoring_s for outcome in journal.paid),
                    "mixing": sum(outcome.moved.elapsed_s for outcome in journal.paid),
                },
                "search": identity,
                "run": journal.run,
            }
            return replace(final, report=report)

        soup = run.soup(
            lambda: ScoreJournal(run.target, bound_to, restart=settings.restart),
            identity,
            search,
            model,
        )
    report: Mapping[str, Any] = soup.provenance.report
    swept = report["sweep"]
    best = swept["points"][swept["best"]]
    return SweepSoup(
        **msgspec.structs.asdict(soup),
        best=best["values"],
        score=float(best["score"]),
        report=report,
    )


def _compared(k: int) -> dict[str, Rule]:
    """Return what a merge is compared with: the base alone, and the mean of the others."""
    others = (0.0,) + (1.0,) * (k - 1)
    return {
        "the base": Linear(Coefficients((1.0,) + (0.0,) * (k - 1), 1.0)),
        "the mean": Linear(Coefficients(others, float(k - 1))),
    }


def _scores(
    asking: Asking,
    journal: ScoreJournal,
    texts: Sequence[str],
    on_event: Callable[[Any], None] | None,
) -> list[Score]:
    """Return the score of each candidate, in order; those of an earlier run are known."""
    started = time.monotonic()
    n, n_paid = len(texts), 0
    scores: list[Score] = []

    def report(text: str) -> None:
        if on_event is not None:
            elapsed_s = time.monotonic() - started
            on_event(Step("point", len(scores), n, n_paid, elapsed_s, text=text))

    report("")
    for i, text in enumerate(texts):
        outcome = asking.ask([(j,) for j in range(i, n)], None)
        n_paid += (i,) not in journal.resumed
        scores.append(outcome.score)
        report(f"{text}: {outcome.score.value:.6g}")
    return scores
