"""The search for a learned soup: what it looks at, what it remembers, and when it ends.

A look is a mixture in the live model, and its losses (`slopes`). Each is noted before the next, and
a search that goes on is answered from its notes until it comes to something new (`notebook`). The
notes say what all has taken so far, too, so that the report counts every run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import (
    RecipeError,
    ResumeError,
    TaskError,
    check_choice,
    count,
    option,
    printable,
)
from streamsoup.options import Note, Options, Step, settle
from streamsoup.search.learning.descent import AdamW, lbfgs
from streamsoup.search.learning.mixture import Constraint, Granularity, make_mixture
from streamsoup.search.learning.notebook import Notebook
from streamsoup.search.learning.slopes import Evaluation, Slopes, find_equal
from streamsoup.search.scoring.candidate import contained
from streamsoup.sizes import nbytes_text
from streamsoup.task import Task

if TYPE_CHECKING:
    from torch import nn

    from streamsoup.live.model import ModelSink
    from streamsoup.output.make import Order

__all__ = ["SETTINGS", "LearningOptions", "Look", "Search"]

log = logging.getLogger("streamsoup")

Floats = NDArray[np.float64]

REACH = 0.5
"""Largest first step of L-BFGS, as a share of a coefficient of the uniform soup; twice that later.
Small enough that the watched loss is seen to turn: larger ones jumped over the best soups."""

NOTE_S = 10.0
"""Time between notes of a minibatch search: what a kill can cost."""


class LearningOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is learned, and how."""

    granularity: Granularity = "global"
    """One coefficient for each ingredient, or one in each ``layer``, or in each ``tensor``."""
    constraint: Constraint = "softmax"
    """``softmax``: positive, sum 1; ``affine``: sum 1; ``free``: any."""
    temperature: bool = False
    """Learn a factor β of the logits too, as the paper does. The soup's files do not hold it."""
    optimizer: Literal["lbfgs", "adamw"] = "lbfgs"
    """All batches at each step and few steps, or the paper's minibatch way."""
    evaluations: int = 40
    """Most looks at all batches, for ``lbfgs``."""
    tolerance: float = 1e-5
    """Relative gain of two steps in a row below which ``lbfgs`` ends."""
    epochs: int = 5
    """Times through all batches, for ``adamw``."""
    lr: float = 0.05
    """Learning rate of ``adamw``."""
    patience: int = 6
    """Looks (epochs, for ``adamw``) without a lower watched loss after which the search ends."""
    split: str | None = None
    """The split to learn on; None for the first of the task."""
    guard: str | None = None
    """A split that watches; None for a part of the first one."""
    guard_every: int = 5
    """Without `guard`, every so manieth batch watches; 0 for none."""
    restart: bool = False
    """Forget an unfinished search of the same output."""

    def __post_init__(self) -> None:
        """Take numbers as other libraries have them. Raises `RecipeError`."""
        settle(self)

    def check(self) -> None:
        """Raise `RecipeError` for options that make no sense."""
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("constraint", self.constraint, get_args(Constraint))
        check_choice("optimizer", self.optimizer, ("lbfgs", "adamw"))
        for name in ("evaluations", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} {getattr(self, name)} is below 1")
        if self.guard_every < 0 or self.guard_every == 1:
            raise RecipeError("guard_every is 0 for none, or 2 and more: some batches must learn")
        if not (self.lr > 0 and math.isfinite(self.lr)) or not self.tolerance >= 0:
            raise RecipeError(f"lr {self.lr} must be above 0, tolerance {self.tolerance} 0 or more")


class Look(msgspec.Struct, frozen=True):
    """One mixture, and its mean losses."""

    loss: float
    """On what is learned from."""
    guard: float
    """On what only watches; NaN where nothing does."""

    def beats(self, other: Look) -> bool:
        """Whether the watched loss is lower, and the one that is learned from is no higher.

        Few batches watch, and their loss alone would now and then praise a step too far.
        """
        if math.isnan(self.guard) and math.isnan(other.guard):
            return self.loss < other.loss
        return self.guard < other.guard and self.loss <= other.loss


SETTINGS = (
    "granularity",
    "constraint",
    "temperature",
    "optimizer",
    "evaluations",
    "tolerance",
    "epochs",
    "lr",
    "patience",
    "guard",
    "guard_every",
)
"""The options that decide what is found."""


class Search:
    """One search: what it learns, in what, and what it has seen."""

    def __init__(
        self,
        ordered: Order,
        task: Task,
        model: nn.Module | None,
        split: str,
        learning: LearningOptions,
        options: Options,
        notebook: Notebook,
    ) -> None:
        from streamsoup.live.mix import device_text
        from streamsoup.live.model import ModelSink

        self._learning, self._notebook = learning, notebook
        self._on_event = options.on_event
        self._started = time.monotonic()
        self._earlier: Mapping[str, Any] = (notebook.find("took") or {"took": {}})["took"]
        if model is None:
            self._say("building the model")
            with contained(task, "build"):
                model = task.build()
        plan = ordered.plan
        sink: ModelSink = ModelSink(model, plan)
        sink.check_apart()
        found = notebook.find("equal")
        if found is None:
            equal, n = find_equal(plan, mapped=ordered.mapped, options=options)
            notebook.put({"equal": equal, "nbytes_compared": n})
        else:
            equal = {name: tuple(firsts) for name, firsts in found["equal"].items()}
            n = int(found["nbytes_compared"])
        self._nbytes_compared = n
        self.mixture = make_mixture(
            [tensor.name for tensor in plan.reduced],
            sink.tied,
            len(plan.ingredients),
            granularity=learning.granularity,
            constraint=learning.constraint,
            temperature=learning.temperature,
        )
        self.slopes = Slopes(
            task,
            sink,
            self.mixture,
            equal,
            split=split,
            guard_split=learning.guard,
            guard_every=0 if learning.guard else learning.guard_every,
            mapped=ordered.mapped,
            options=options,
        )
        self.mixed_on = device_text(sink, options)
        self._say(f"mixtures are made on {self.mixed_on}")
        self.n_common = sum(not any(firsts) for firsts in equal.values())
        self.n_shared = len(equal) - self.n_common
        self.looks: list[Look] = []
        self._n_paid = 0
        """Looks that this run took, rather than found in the notes of an earlier one."""
        self.raws: list[Floats] = []
        self.why = ""
        self.predicted: dict[str, Any] = {}
        self._first_s = 0.0
        notebook.put({"took": self._took()})

    @property
    def best(self) -> int:
        """The number of the best look; the earliest of equals."""
        best = 0
        for number, look in enumerate(self.looks):
            best = number if look.beats(self.looks[best]) else best
        return best

    @property
    def chosen(self) -> Floats:
        """The raw numbers of the best look."""
        return self.raws[self.best]

    def run(self) -> None:
        """Search until it ends by itself, or nothing is gained any more."""
        self._report_step()
        if self._learning.optimizer == "lbfgs":
            self._run_lbfgs()
        else:
            self._run_adamw()
        self._report_step(ended=True)
        self._say(f"ended: {self.why}")

    def _run_lbfgs(self) -> None:
        learning = self._learning
        self._predict(learning.evaluations)
        reach = REACH if learning.constraint == "softmax" else REACH / self.mixture.n_ingredients
        way = lbfgs(self.mixture.start(), reach, 2 * reach, learning.tolerance)
        point = next(way)
        try:
            while not self.why:
                seen = self._look(point, backward=True)
                gradient = self.mixture.gradient(point, seen.slopes, seen.beta_slope)
                self._check_end(learning.evaluations)
                point = way.send((seen.loss, gradient))
        except StopIteration as end:
            self.why = self.why or str(end.value)

    def _run_adamw(self) -> None:
        learning = self._learning
        raw = self.mixture.start()
        self._say("each look at all batches reads the ingredients once; each batch, twice")
        self._look(raw, backward=False)
        n_batches = self.slopes.n_batches or 0
        n_steps = sum(not self.slopes.watches(index) for index in range(n_batches))
        self._predict(learning.epochs, n_steps)
        state = AdamW(learning.lr)
        epoch, done, raw = self._resume_adamw(state, raw)
        while epoch < learning.epochs and not self.why:
            if done < n_steps:
                raw = self.slopes.epoch(raw, epoch, done, self._stepper(state, epoch, done))
                self._note_adamw(state, epoch, n_steps, raw)
            self._look(raw, backward=False)
            epoch, done = epoch + 1, 0
            self._check_end()
        self.why = self.why or f"{learning.epochs} epochs"

    def _stepper(
        self, state: AdamW, epoch: int, done: int
    ) -> Callable[[Floats, Evaluation], Floats]:
        """Give what steps from one batch to the next, and takes a note now and then."""
        noted_s = time.monotonic()

        def advance(raw: Floats, seen: Evaluation) -> Floats:
            nonlocal done, noted_s
            gradient = self.mixture.gradient(raw, seen.slopes, seen.beta_slope)
            raw = state.step(raw, gradient)
            done += 1
            if time.monotonic() - noted_s > NOTE_S:
                self._note_adamw(state, epoch, done, raw)
                noted_s = time.monotonic()
            return raw

        return advance

    def _resume_adamw(self, state: AdamW, raw: Floats) -> tuple[int, int, Floats]:
        """Go on from the last note, with the looks that were taken before it."""
        note = self._notebook.find("adamw")
        if note is None:
            return 0, 0, raw
        epoch, done = int(note["adamw"]), int(note["done"])
        state.n_steps = int(note["n_steps"])
        state.mean, state.square = np.array(note["mean"]), np.array(note["square"])
        for _ in range(epoch):
            look = self._notebook.look(len(self.looks))
            if look is None:
                break
            self._look(np.array(look["raw"]), backward=False)
        self._check_end()
        return epoch, done, np.array(note["raw"])

    def _note_adamw(self, state: AdamW, epoch: int, done: int, raw: Floats) -> None:
        note: dict[str, Any] = {"adamw": epoch, "done": done, "n_steps": state.n_steps}
        note |= {"raw": raw.tolist(), "mean": state.mean.tolist(), "square": state.square.tolist()}
        self._notebook.put(note | {"took": self._took()})

    def _took(self) -> dict[str, Any]:
        """Say what the search has taken: in this run, and in earlier ones up to their last note."""
        now = {
            "n_runs": 1,
            "n_passes": self.slopes.n_passes,
            "nbytes_read": self.slopes.nbytes_read,
            "reading_s": self.slopes.waited_s,
            "elapsed_s": time.monotonic() - self._started,
        }
        return {name: value + self._earlier.get(name, 0) for name, value in now.items()}

    def _look(self, raw: Floats, *, backward: bool) -> Evaluation:
        """Look at a mixture, or remember having done so."""
        number = len(self.looks)
        started = time.monotonic()
        known = self._notebook.look(number)
        if known is not None and known["raw"] != raw.tolist():
            raise ResumeError(
                f"{printable(self._notebook.root)}: look {number + 1} was at another mixture; "
                f"{option('restart', True)} forgets the search"
            )
        if known is None:
            seen = self.slopes.look(raw, backward=backward)
            self._notebook.put(_record(number, raw, seen) | {"took": self._took()})
        else:
            seen = _remember(known)
            self.slopes.count(seen.n_batches)
        if not number:
            self._check_first(seen)
        self.raws.append(raw.copy())
        self.looks.append(Look(seen.loss, seen.guard))
        self._n_paid += known is None
        again = " (known)" if known is not None else ""
        watched = "" if math.isnan(seen.guard) else f", watched {seen.guard:.6g}"
        mark = "  best so far" if self.best == number else ""
        self._say(f"look {number + 1}: loss {seen.loss:.6g}{watched}{again}{mark}")
        if number == 0:
            self._first_s = time.monotonic() - started
            if self.predicted and known is None:
                most = self.predicted["looks"] * self._first_s
                self._say(f"it took {self._first_s:.2g} s, so all take {most:.3g} s at most")
        self._report_step()
        return seen

    def _check_first(self, seen: Evaluation) -> None:
        """Refuse to start from nothing; warn where nothing watches."""
        learning = self._learning
        if not math.isfinite(seen.loss):
            raise TaskError(f"the loss of the uniform soup is {seen.loss}: nothing to start from")
        watched = any(map(self.slopes.watches, range(seen.n_batches)))
        if (watched or learning.guard is not None) and not math.isfinite(seen.guard):
            raise TaskError(
                f"the watched loss of the uniform soup is {seen.guard}: it cannot guard"
            )
        if not watched and learning.guard is None and learning.guard_every > 0:
            log.warning(
                "%d batches are too few for every %dth to watch: nothing guards against "
                "overfitting; smaller batches, or another guard, would",
                seen.n_batches,
                learning.guard_every,
            )

    def _check_end(self, most: float = math.inf) -> None:
        """End when the looks are used up, or the watched loss has stopped falling."""
        if len(self.looks) - 1 - self.best >= self._learning.patience:
            n = self._learning.patience
            what = "loss" if math.isnan(self.looks[0].guard) else "watched loss"
            self.why = f"the {what} has not fallen for {count(n, 'look')}"
        elif len(self.looks) >= most:
            self.why = count(int(most), "look")

    def _predict(self, n_looks: int, n_steps: int = 0) -> None:
        """Say what the search may take at most, before it is taken."""
        mix, products = self.slopes.nbytes_of_mix, self.slopes.nbytes_of_products
        n_mixes = n_products = n_looks
        if n_steps:
            n_products = n_looks * n_steps
            n_mixes = n_products + n_looks + 1
        n_passes = n_mixes + n_products
        nbytes = n_mixes * mix + n_products * products + self.slopes.nbytes_once
        self.predicted = {"looks": n_looks, "passes": n_passes, "nbytes_read": nbytes}
        shared = f"; {_are(self.n_common)} the same in all" if self.n_common else ""
        shared += f"; {_are(self.n_shared)} the same in some" if self.n_shared else ""
        self._say(
            f"learning {count(self.mixture.n_raw, 'number')}: at most "
            f"{count(n_passes, 'pass')} over {nbytes_text(mix)} that differ, "
            f"{nbytes_text(nbytes)} read{shared}"
        )
        if n_steps and self.slopes.n_passes:
            pass_s = self.slopes.waited_s / self.slopes.n_passes
            # A backward pass takes about as long as two forward ones.
            computing_s = max(self._first_s - pass_s, 0.0) * (1 + n_looks * 4)
            self._say(f"about {n_passes * pass_s + computing_s:.3g} s, by the first look")

    def _say(self, line: str) -> None:
        if self._on_event is not None:
            self._on_event(Note(line))

    def _report_step(self, *, ended: bool = False) -> None:
        """Report how many looks are taken: all epochs and one before them, or evaluations."""
        if self._on_event is not None:
            learning = self._learning
            by_epochs = learning.optimizer == "adamw"
            n = learning.epochs + 1 if by_epochs else learning.evaluations
            elapsed_s = time.monotonic() - self._started
            n_done = len(self.looks)
            n = n_done if ended else max(n, n_done)
            self._on_event(Step("look", n_done, n, self._n_paid, elapsed_s, True))

    def report(self, identity: str) -> dict[str, Any]:
        """Give all that was found out, as plain JSON for the provenance."""
        learning, best, mixture = self._learning, self.best, self.mixture
        settings = {name: getattr(learning, name) for name in SETTINGS}
        rows = mixture.rows(self.chosen)
        found = {
            "search": identity,
            "run": self._notebook.run,
            "groups": list(mixture.groups),
            "rows": rows.tolist(),
            "beta": mixture.beta(self.chosen),
            "looks": [[_or_none(look.loss), _or_none(look.guard)] for look in self.looks],
            "best": best,
            "ended": self.why,
            "l1_largest": float(np.abs(rows).sum(axis=1).max()),
            "n_common_tensors": self.n_common,
            "n_shared_tensors": self.n_shared,
            "predicted": self.predicted,
            "mixed_on": self.mixed_on,
            "nbytes_compared": self._nbytes_compared,
        }
        return settings | found | self._took()


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
