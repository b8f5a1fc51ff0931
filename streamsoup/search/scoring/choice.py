"""Who scores: the one place where that is decided.

====================================  ==================================================
a `Scorer`                            itself
a command or task, and Ray            `RayScorer`, with a `WorkerScorer` in each actor
a command or task, and servers        `ServerScorer`, one candidate in each server
a command, one at a time              `FolderScorer`: it limits its own time
a command, several at once            `WorkerScorer`, with a `FolderScorer` in each
a task, a time limit or several jobs  `WorkerScorer`, with a `LiveScorer` in each
a task                                `LiveScorer`, in the model given or built here
====================================  ==================================================

Tasks of lm-evaluation-harness are tasks like any other (`task.harness`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from streamsoup.cluster.choice import is_spread
from streamsoup.engine.budget import memory_budget
from streamsoup.errors import RecipeError, option
from streamsoup.live.running import SumsPlace
from streamsoup.options import Note, Options
from streamsoup.output.make import Order
from streamsoup.search.scoring.folders import FolderScorer
from streamsoup.search.scoring.live import LiveScorer
from streamsoup.search.scoring.protocols import open_server
from streamsoup.search.scoring.scorer import Scorer
from streamsoup.search.scoring.servers import ServerScorer
from streamsoup.search.scoring.settings import ScoringSettings
from streamsoup.search.scoring.work import Work
from streamsoup.search.scoring.workers import WorkerScorer
from streamsoup.task import load_task
from streamsoup.task.command import CommandTask

if TYPE_CHECKING:
    from torch import nn

__all__ = ["choose_scorer"]


def choose_scorer(
    task: Any,
    ordered: Order,
    model: nn.Module | None,
    settings: ScoringSettings,
    options: Options,
    *,
    folder: str,
    sums: SumsPlace | None = None,
    keeps: bool = True,
    by_rule: bool = False,
) -> Scorer:
    """Return what scores candidates of `ordered`, in the search whose folder is `folder`.

    Candidates are means of some ingredients, whose running sum is kept in `sums`, and is worth
    keeping for the next one where `keeps`; or, `by_rule`, soups of all by a rule of their own.

    Raises:
        RecipeError: For settings that do not fit what scores.
        TaskError: If the task cannot be loaded, or lacks what is needed.
    """
    isolated = settings.jobs > 1 or settings.timeout is not None or settings.isolate

    def work(task: Any, number: int) -> Work:
        return Work(
            task,
            settings.split,
            settings.recalibrate,
            ordered,
            options,
            sums,
            memory_budget(ordered.plan, options.memory),
            os.path.join(folder, f"sum-{number}"),
            settings.jobs,
            keeps,
            by_rule,
        )

    if isinstance(task, Scorer):
        if model is not None or isolated or settings.recalibrate or settings.split is not None:
            raise RecipeError(
                "a scorer decides itself how it scores: leave out model, split, recalibrate, jobs, "
                "timeout and isolate"
            )
        if task.n_at_once < 1:
            raise RecipeError(f"{task.name}: n_at_once must be at least 1, got {task.n_at_once}")
        return task
    if is_spread(options):
        return _over_ray(work(task, 0), model, settings, options)
    if settings.servers:
        limited = settings.timeout is not None and not isinstance(task, CommandTask)
        others = settings.jobs > 1 or settings.isolate or settings.recalibrate
        if model is not None or others or limited:
            raise RecipeError(
                "the servers have the model, and score one candidate each: leave out model, "
                "recalibrate, jobs and isolate, and for a task file timeout, too"
            )
        return ServerScorer(
            task if isinstance(task, CommandTask) else load_task(task),
            [work(None, n) for n in range(len(settings.servers))],
            [open_server(url, str(settings.server_kind)) for url in settings.servers],
            scratch=settings.scratch,
            reload_timeout=settings.reload_timeout,
        )
    if isinstance(task, CommandTask):
        if settings.recalibrate:
            raise RecipeError("a command cannot recalibrate; give a task file")
        if task.timeout is None:
            task = replace(task, timeout=settings.timeout)
        if settings.jobs == 1:
            return FolderScorer(task, work(task, 0))
        return WorkerScorer([work(task, n) for n in range(settings.jobs)], timeout=None)
    if not isolated:
        return LiveScorer(load_task(task), work(None, 0), model)
    if model is not None:
        raise RecipeError(
            "a given model is scored in this process: leave out jobs, timeout and isolate, or let "
            "the task build it"
        )
    if options.on_event is not None:
        options.on_event(Note("building the model"))
    works = [work(task, n) for n in range(settings.jobs)]
    return WorkerScorer(works, timeout=settings.timeout)


def _over_ray(
    work: Work, model: nn.Module | None, settings: ScoringSettings, options: Options
) -> Scorer:
    """Return actors on the nodes of Ray, `ScoringSettings.jobs` of them on each without GPUs."""
    from streamsoup.cluster.over_ray import RayExecutor
    from streamsoup.search.scoring.actors import RayScorer

    if not isinstance(options.executor, RayExecutor):
        raise RecipeError(
            "candidates are scored over Ray, or by a scorer of your own; for that, see "
            "streamsoup.Scorer"
        )
    if model is not None or settings.servers:
        raise RecipeError(
            f"a given model, or servers, cannot be spread over a cluster: leave out model and "
            f"servers, or {option('ray')}"
        )
    task = work.task
    timeout = settings.timeout
    if isinstance(task, CommandTask):
        if settings.recalibrate:
            raise RecipeError("a command cannot recalibrate; give a task file")
        if task.timeout is None:
            work = replace(work, task=replace(task, timeout=timeout))
        timeout = None
    if options.on_event is not None:
        options.on_event(Note("starting actors"))
    return RayScorer(options.executor, work, jobs=settings.jobs, timeout=timeout)
