"""The search for a learned soup: what it evaluates, what it records, and when it ends.

An evaluation is a mixture in the live model, and its losses (`slopes`). Each is recorded before the
next. A search that resumes is answered from its records until it asks for something new
(`journal`). They also hold what the search has cost so far, so that the report counts every run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import ResumeError, TaskError, count, option, printable
from streamsoup.options import Note, Options, Step
from streamsoup.search.learning.descent import AdamW, lbfgs
from streamsoup.search.learning.journal import LearningJournal
from streamsoup.search.learning.parametrisation import parametrise
from streamsoup.search.learning.settings import DECIDING, LearnedSettings
from streamsoup.search.learning.slopes import Evaluation, Slopes, find_equal
from streamsoup.sizes import nbytes_text
from streamsoup.task import Task
from streamsoup.task.running import contained

if TYPE_CHECKING:
    from torch import nn

    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import Order

__all__ = ["LearnedSearch", "Losses"]

log = logging.getLogger("streamsoup")

Floats = NDArray[np.float64]

REACH = 0.5
"""Largest first step of L-BFGS, as a share of a coefficient of the uniform soup; twice that later.
Small enough that the validation loss is seen to turn: larger ones jumped over the best soups."""

NOTE_S = 10.0
"""Time between records of a minibatch search: what a kill can cost."""


class Losses(msgspec.Struct, frozen=True):
    """The mean losses of one mixture."""

    loss: float
    """On what is learned from."""
    guard: float
    """On what is held out to validate; NaN if nothing is."""

    def beats(self, other: Losses) -> bool:
        """Return True if the validation loss is lower, and the one learned from is no higher.

        Few batches validate, and their loss alone would now and then accept a step too far.
        """
        if math.isnan(self.guard) and math.isnan(other.guard):
            return self.loss < other.loss
        return self.guard < other.guard and self.loss <= other.loss


class LearnedSearch:
    """One search: what it learns, in which model, and what it has evaluated."""

    def __init__(
        self,
        ordered: Order,
        task: Task,
        model: nn.Module | None,
        split: str,
        settings: LearnedSettings,
        options: Options,
        journal: LearningJournal,
    ) -> None:
        from streamsoup.live.mix import device_text
        from streamsoup.live.model import ModelSink

        self._settings, self._journal = settings, journal
        self._on_event = options.on_event
        self._started = time.monotonic()
        self._earlier: Mapping[str, Any] = (journal.find("took") or {"took": {}})["took"]
        if model is None:
            self._say("building the model")
            with contained(task, "build"):
                model = task.build()
        plan = ordered.plan
        sink: ModelSink = ModelSink(model, plan)
        sink.check_apart()
        found = journal.find("equal")
        if found is None:
            equal, n = find_equal(plan, mapped=ordered.mapped, options=options)
            journal.put({"equal": equal, "nbytes_compared": n})
        else:
            equal = {name: tuple(firsts) for name, firsts in found["equal"].items()}
            n = int(found["nbytes_compared"])
        self._nbytes_compared = n
        self.parametrisation = parametrise(
            [tensor.name for tensor in plan.reduced],
            sink.tied,
            len(plan.ingredients),
            granularity=settings.granularity,
            constraint=settings.constraint,
            temperature=settings.temperature,
        )
        self.slopes = Slopes(
            task,
            sink,
            self.parametrisation,
            equal,
            split=split,
            guard_split=settings.guard,
            guard_every=0 if settings.guard else settings.guard_every,
            mapped=ordered.mapped,
            options=options,
        )
        self.mixed_on = device_text(sink, options)
        self._say(f"mixtures are made on {self.mixed_on}")
        self.n_common = sum(not any(firsts) for firsts in equal.values())
        self.n_shared = len(equal) - self.n_common
        self.evaluations: list[Losses] = []
        self._n_paid = 0
        """Evaluations of this run, rather than records of an earlier one."""
        self.raws: list[Floats] = []
        self.why = ""
        self.predicted: dict[str, Any] = {}
        self._first_s = 0.0
        journal.put({"took": self._took()})

    @property
    def best(self) -> int:
        """The number of the best evaluation; the earliest of equals."""
        best = 0
        for number, losses in enumerate(self.evaluations):
            best = number if losses.beats(self.evaluations[best]) else best
        return best

    @property
    def chosen(self) -> Floats:
        """The raw numbers of the best evaluation."""
        return self.raws[self.best]

    def run(self) -> None:
        """Search until the optimizer ends, or nothing is gained any more."""
        self._report_step()
        if self._settings.optimizer == "lbfgs":
            self._run_lbfgs()
        else:
            self._run_adamw()
        self._report_step(ended=True)
        self._say(f"ended: {self.why}")

    def _run_lbfgs(self) -> None:
        settings = self._settings
        self._predict(settings.evaluations)
        reach = (
            REACH
            if settings.constraint == "softmax"
            else REACH / self.parametrisation.n_ingredients
        )
        way = lbfgs(self.parametrisation.start(), reach, 2 * reach, settings.tolerance)
        point = next(way)
        try:
            while not self.why:
                seen = self._evaluate(point, backward=True)
                gradient = self.parametrisation.gradient(point, seen.slopes, seen.beta_slope)
                self._check_end(settings.evaluations)
                point = way.send((seen.loss, gradient))
        except StopIteration as end:
            self.why = self.why or str(end.value)

    def _run_adamw(self) -> None:
        settings = self._settings
        raw = self.parametrisation.start()
        self._say("each evaluation of all batches reads the ingredients once; each batch, twice")
        self._evaluate(raw, backward=False)
        n_batches = self.slopes.n_batches or 0
        n_steps = sum(not self.slopes.watches(index) for index in range(n_batches))
        self._predict(settings.epochs, n_steps)
        state = AdamW(settings.lr)
        epoch, done, raw = self._resume_adamw(state, raw)
        while epoch < settings.epochs and not self.why:
            if done < n_steps:
                raw = self.slopes.epoch(raw, epoch, done, self._stepper(state, epoch, done))
                self._note_adamw(state, epoch, n_steps, raw)
            self._evaluate(raw, backward=False)
            epoch, done = epoch + 1, 0
            self._check_end()
        self.why = self.why or f"{settings.epochs} epochs"

    def _stepper(
        self, state: AdamW, epoch: int, done: int
    ) -> Callable[[Floats, Evaluation], Floats]:
        """Return what steps from one batch to the next, and records its state now and then."""
        noted_s = time.monotonic()

        def advance(raw: Floats, seen: Evaluation) -> Floats:
            nonlocal done, noted_s
            gradient = self.parametrisation.gradient(raw, seen.slopes, seen.beta_slope)
            raw = state.step(raw, gradient)
            done += 1
            if time.monotonic() - noted_s > NOTE_S:
                self._note_adamw(state, epoch, done, raw)
                noted_s = time.monotonic()
            return raw

        return advance

    def _resume_adamw(self, state: AdamW, raw: Floats) -> tuple[int, int, Floats]:
        """Resume from the last record, with the evaluations before it."""
        note = self._journal.find("adamw")
        if note is None:
            return 0, 0, raw
        epoch, done = int(note["adamw"]), int(note["done"])
        state.n_steps = int(note["n_steps"])
        state.mean, state.square = np.array(note["mean"]), np.array(note["square"])
        for _ in range(epoch):
            known = self._journal.evaluation(len(self.evaluations))
            if known is None:
                break
            self._evaluate(np.array(known["raw"]), backward=False)
        self._check_end()
        return epoch, done, np.array(note["raw"])

    def _note_adamw(self, state: AdamW, epoch: int, done: int, raw: Floats) -> None:
        note: dict[str, Any] = {"adamw": epoch, "done": done, "n_steps": state.n_steps}
        note |= {"raw": raw.tolist(), "mean": state.mean.tolist(), "square": state.square.tolist()}
        self._journal.put(note | {"took": self._took()})

    def _took(self) -> dict[str, Any]:
        """Return the cost of this run, and of earlier ones up to their last record."""
        now = {
            "n_runs": 1,
            "n_passes": self.slopes.n_passes,
            "nbytes_read": self.slopes.nbytes_read,
            "reading_s": self.slopes.waited_s,
            "elapsed_s": time.monotonic() - self._started,
        }
        return {name: value + self._earlier.get(name, 0) for name, value in now.items()}

    def _evaluate(self, raw: Floats, *, backward: bool) -> Evaluation:
        """Evaluate a mixture, or return its evaluation by an earlier run."""
        number = len(self.evaluations)
        started = time.monotonic()
        known = self._journal.evaluation(number)
        if known is not None and known["raw"] != raw.tolist():
            raise ResumeError(
                f"{printable(self._journal.root)}: evaluation {number + 1} was of another mixture; "
                f"{option('restart', True)} forgets the search"
            )
        if known is None:
            seen = self.slopes.evaluate(raw, backward=backward)
            self._journal.put(_record(number, raw, seen) | {"took": self._took()})
        else:
            seen = _remember(known)
            self.slopes.count(seen.n_batches)
        if not number:
            self._check_first(seen)
        self.raws.append(raw.copy())
        self.evaluations.append(Losses(seen.loss, seen.guard))
        self._n_paid += known is None
        again = " (known)" if known is not None else ""
        watched = "" if math.isnan(seen.guard) else f", validation {seen.guard:.6g}"
        mark = "  best so far" if self.best == number else ""
        self._say(f"evaluation {number + 1}: loss {seen.loss:.6g}{watched}{again}{mark}")
        if number == 0:
            self._first_s = time.monotonic() - started
            if self.predicted and known is None:
                most = self.predicted["looks"] * self._first_s
                self._say(f"it took {self._first_s:.2g} s, so all take {most:.3g} s at most")
        self._report_step()
        return seen

    def _check_first(self, seen: Evaluation) -> None:
        """Refuse a start without a finite loss; warn where nothing validates."""
        settings = self._settings
        if not math.isfinite(seen.loss):
            raise TaskError(f"the loss of the uniform soup is {seen.loss}: nothing to start from")
        watched = any(map(self.slopes.watches, range(seen.n_batches)))
        if (watched or settings.guard is not None) and not math.isfinite(seen.guard):
            raise TaskError(
                f"the validation loss of the uniform soup is {seen.guard}: it cannot guard"
            )
        if not watched and settings.guard is None and settings.guard_every > 0:
            log.warning(
                "%d batches are too few to hold out every %dth: nothing guards against "
                "overfitting; smaller batches, or another guard, would",
                seen.n_batches,
                settings.guard_every,
            )

    def _check_end(self, most: float = math.inf) -> None:
        """End when the evaluations are used up, or the validation loss has stopped falling."""
        if len(self.evaluations) - 1 - self.best >= self._settings.patience:
            n = self._settings.patience
            what = "loss" if math.isnan(self.evaluations[0].guard) else "validation loss"
            self.why = f"the {what} has not fallen for {count(n, 'evaluation')}"
        elif len(self.evaluations) >= most:
            self.why = count(int(most), "evaluation")

    def _predict(self, n_evaluations: int, n_steps: int = 0) -> None:
        """Report what the search may cost at most, before it does."""
        mix, products = self.slopes.nbytes_of_mix, self.slopes.nbytes_of_products
        n_mixes = n_products = n_evaluations
        if n_steps:
            n_products = n_evaluations * n_steps
            n_mixes = n_products + n_evaluations + 1
        n_passes = n_mixes + n_products
        nbytes = n_mixes * mix + n_products * products + self.slopes.nbytes_once
        self.predicted = {"looks": n_evaluations, "passes": n_passes, "nbytes_read": nbytes}
        shared = f"; {_are(self.n_common)} the same in all" if self.n_common else ""
        shared += f"; {_are(self.n_shared)} the same in some" if self.n_shared else ""
        self._say(
            f"learning {count(self.parametrisation.n_raw, 'number')}: at most "
            f"{count(n_passes, 'pass')} over {nbytes_text(mix)} that differ, "
            f"{nbytes_text(nbytes)} read{shared}"
        )
        if n_steps and self.slopes.n_passes:
            pass_s = self.slopes.waited_s / self.slopes.n_passes
            # A backward pass takes about as long as two forward ones.
            computing_s = max(self._first_s - pass_s, 0.0) * (1 + n_evaluations * 4)
            self._say(f"about {n_passes * pass_s + computing_s:.3g} s, by the first evaluation")

    def _say(self, line: str) -> None:
        if self._on_event is not None:
            self._on_event(Note(line))

    def _report_step(self, *, ended: bool = False) -> None:
        """Report how many evaluations are done, of how many at most."""
        if self._on_event is not None:
            by_epochs = self._settings.optimizer == "adamw"
            # One before the first epoch, and one after each.
            n = self._settings.epochs + 1 if by_epochs else self._settings.evaluations
            elapsed_s = time.monotonic() - self._started
            n_done = len(self.evaluations)
            n = n_done if ended else max(n, n_done)
            self._on_event(Step("evaluation", n_done, n, self._n_paid, elapsed_s, True))

    def report(self, identity: str) -> dict[str, Any]:
        """Return the result as plain JSON, for the provenance."""
        best, parametrisation = self.best, self.parametrisation
        deciding = {name: getattr(self._settings, name) for name in DECIDING}
        rows = parametrisation.rows(self.chosen)
        found = {
            "search": identity,
            "run": self._journal.run,
            "groups": list(parametrisation.groups),
            "rows": rows.tolist(),
            "beta": parametrisation.beta(self.chosen),
            "looks": [[_or_none(each.loss), _or_none(each.guard)] for each in self.evaluations],
            "best": best,
            "ended": self.why,
            "l1_largest": float(np.abs(rows).sum(axis=1).max()),
            "n_common_tensors": self.n_common,
            "n_shared_tensors": self.n_shared,
            "predicted": self.predicted,
            "mixed_on": self.mixed_on,
            "nbytes_compared": self._nbytes_compared,
        }
        return deciding | found | self._took()


def _are(n: int) -> str:
    return f"{count(n, 'tensor')} {'is' if n == 1 else 'are'}"


def _record(number: int, raw: Floats, seen: Evaluation) -> dict[str, Any]:
    return {
        "look": number,
        "raw": raw.tolist(),
        "loss": seen.loss,
        "guard": seen.guard,
        "slopes": seen.slopes.tolist(),
        "beta_slope": seen.beta_slope,
        "n_batches": seen.n_batches,
    }


def _remember(record: Mapping[str, Any]) -> Evaluation:
    loss, guard, slopes = record["loss"], record["guard"], np.array(record["slopes"], np.float64)
    return Evaluation(loss, guard, slopes, record["beta_slope"], record["n_batches"])


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
