"""Scoring candidates in a live model in this process: each is mixed in place, on no disk.

A score must depend on the candidate alone. So before each one the model is put into evaluation
mode, gradients are turned off, and every random generator starts from the same seed (`contained`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamsoup.errors import TaskError, option
from streamsoup.live.candidates import Candidates, Moved
from streamsoup.live.rule_candidates import RuleCandidates
from streamsoup.options import Note
from streamsoup.recipe import Recipe
from streamsoup.search.scoring.scorer import Candidate, Outcome, naming
from streamsoup.search.scoring.work import Work, candidates_of, for_candidate
from streamsoup.task import Score, Task
from streamsoup.task.running import contained
from streamsoup.task.scores import training_mode

if TYPE_CHECKING:
    from torch import nn

    from streamsoup.live.model import ModelSink

__all__ = ["LiveScorer"]

log = logging.getLogger("streamsoup")


class LiveScorer:
    """Scores candidates in one live model."""

    n_at_once = 1

    def __init__(
        self,
        task: Task,
        work: Work,
        model: nn.Module | None = None,
        *,
        on_code: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Check what the task has; build nothing yet.

        Args:
            task: The task of `work`, loaded.
            work: What to score.
            model: The model to score in; None if the task builds one.
            on_code: Called with the name of a function of the task before it runs, and with
                nothing once this package's own code runs again.

        Raises:
            TaskError: If the task lacks a function, or the split.
        """
        self.name, self.fingerprint = task.name, task.fingerprint
        self.split = task.check_split(work.split)
        task.need("score")
        if model is None:
            task.need("build")
        if work.recalibrate:
            task.need("recalibration")
        self._task, self._work, self._model, self._on_code = task, work, model, on_code
        self._sink: ModelSink | None = None
        self._candidates: Candidates | RuleCandidates | None = None
        self._training: list[tuple[nn.Module, bool]] = []
        self._has_warned = False
        """True once it was said that the task scores in training mode."""

    def prepare(self, recipe: Recipe) -> None:
        """Build the model, and match it with the ingredients."""
        from streamsoup.live.model import ModelSink

        if self._model is None:
            if self._work.options.on_event is not None:
                self._work.options.on_event(Note("building the model"))
            self._on_code("build")
            with contained(self._task, "build"):
                self._model = self._task.build()
            self._on_code("")
        if self._work.recalibrate:
            self._check_statistics(self._model)
        self._sink = ModelSink(self._model, self._work.ordered.plan)
        self._sink.check_apart()
        self._candidates = candidates_of(self._work, self._sink)
        self._training = [(module, module.training) for module in self._sink.model.modules()]

    def score(self, candidate: Candidate) -> Outcome:
        """Mix the candidate into the model, and score it there."""
        assert self._sink is not None
        moved = self._put(self._sink, candidate)
        self._on_code("score")
        started = time.monotonic()
        averaged = None
        with naming(candidate):
            # A single ingredient keeps its statistics, so it scores as its file does.
            if self._work.recalibrate and len(candidate.members) > 1:
                averaged = self._ask(self._sink, None)
                self._measure(self._sink)
            score = self._ask(self._sink, candidate.to_beat)
        return Outcome(score, averaged, moved, time.monotonic() - started)

    def close(self) -> None:
        """Restore the modes of the modules, and forget the running sum."""
        for module, training in self._training:
            module.training = training
        if self._candidates is not None:
            self._candidates.forget()

    def _put(self, sink: ModelSink, candidate: Candidate) -> Moved:
        """Mix into the model. Raises `TaskError` if the task changed it meanwhile."""
        assert self._candidates is not None
        sink.check()
        try:
            ready = for_candidate(self._candidates, candidate)
            return ready.mix(candidate.members, sink, keep=self._work.keeps)
        except BaseException as error:
            error.add_note("the live model holds parts of a candidate now")
            raise
        finally:
            sink.mark_changed()

    def _ask(self, sink: ModelSink, to_beat: float | None) -> Score:
        with contained(self._task, "score"):
            sink.model.eval()
            score = self._task.score(sink.model, self.split, to_beat)
        if not self._has_warned:
            warning = training_mode(sink.model, f"{self.name}: score on {self.split!r}")
            self._has_warned = warning != ""
            if warning:
                log.warning("%s", warning)
        return score

    def _measure(self, sink: ModelSink) -> None:
        from streamsoup.live.recalibration import recalibrate

        with contained(self._task, "recalibration"):
            recalibrate(sink.model, self._task.recalibration())

    def _check_statistics(self, model: nn.Module) -> None:
        """Raise `TaskError`, before the first score, for a model without BatchNorm."""
        from streamsoup.live.recalibration import statistics_of

        if not statistics_of(model):
            raise TaskError(
                f"{self._task.name}: the model has no BatchNorm statistics to measure; "
                f"leave out {option('recalibrate', True)}"
            )
