"""Any mixture of the ingredients, measured on any split, in one live model: each at most once.

A mixture goes straight into the model's parameters (`live.ModelSink`); nothing is written to disk
but the answers (`cache`). Where the task gives predictions, one pass over a split gives everything:
right answers, likelihood, calibration, and logits to make ensembles of. Where it does not, its
`score` is asked.

Scoring may change weights, by adapting to a split or in training mode: the mixture is put anew
before whatever is measured next. What torch does not count goes unseen, and spoils that: changes
through `.data` or a view of numpy's, and running statistics without a count of batches beside them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import xxhash

from streamsoup.engine.budget import memory_budget, plan_memory
from streamsoup.engine.plan import MixPlan, plan_mix
from streamsoup.engine.read import open_reader
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.statistics import averaged_variances, may_be_negative
from streamsoup.errors import Message, TaskError, count, option, printable, some
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, open_ingredients
from streamsoup.options import Note, Options, Step
from streamsoup.output.make import order
from streamsoup.recipe import ARITHMETIC, Coefficients, Recipe
from streamsoup.study.measures.cache import Cache
from streamsoup.study.measures.calibration import AnyFloats, Labels, answers_of, calibrate
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.predictions import as_arrays, joined
from streamsoup.task import Score, Task
from streamsoup.task.code import digest_model
from streamsoup.task.scores import MAIN_NAMES, doubt, training_mode

if TYPE_CHECKING:
    from streamsoup.live.mix import LiveMix
    from streamsoup.live.model import ModelSink

__all__ = ["AVERAGED", "EQUAL", "Bench"]

log = logging.getLogger("streamsoup")

AVERAGED = (
    "mixtures are scored with averaged running statistics of BatchNorm, which belong to none of "
    f"their weights; {option('recalibrate', True)} measures them anew for each mixture"
)
"""What is said of models with BatchNorm, unless it is done."""

EQUAL = 1e-6
"""Difference up to which the task's score and the accuracy of its predictions are one thing."""


class Bench:
    """Measures mixtures of a fixed list of ingredients, and remembers what it measured."""

    def __init__(
        self,
        ingredients: Iterable[AnyIngredient],
        task: Task,
        cache: Cache,
        *,
        recalibrate: bool = False,
        model: Any = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> None:
        """Open the ingredients by their headers; build no model, and score nothing yet.

        `recalibrate` measures BatchNorm statistics anew for every mixture of several. Each
        measurement is reported as a `Step`. Raises what `output.make.order` raises, and
        `TaskError` for a task without what `recalibrate` needs.
        """
        opened = open_ingredients(ingredients, options.reading.downloading)
        equal = Coefficients.uniform(len(opened))
        ordered = order(opened, Linear(equal), method="compare", options=options)
        self.plan = ordered.plan
        self.task = task
        self.cache = cache
        self.predicts = task.has("predictions")
        """True if the task gives predictions."""
        self.asks_score = not self.predicts
        """True if `measure` asks the task's `score` besides predictions."""
        self.n_measured = 0
        """Splits that a mixture was measured on by this run, rather than found in the cache."""
        self._mapped = ordered.mapped
        self.options = options
        self._recalibrate = recalibrate
        if recalibrate:
            task.need("recalibration")
        if not self.predicts:
            task.need("score")
        self._started = time.monotonic()
        self._asked: set[str] = set()
        """Keys of all that was asked for so far, known or not."""
        self._n_expected = 0
        self._metric = ""
        self._model = model
        self.given = "" if model is None else digest_model(model)
        """What tells the model that was given from every other; nothing if the task builds one."""
        self._sink: ModelSink | None = None
        self._mix: LiveMix | None = None
        self._training: list[tuple[Any, bool]] = []
        self._current: Mixture | None = None
        self._negative: list[str] = []
        """The BatchNorm variances of the current mixture that are below zero."""
        self._unscored: dict[str, list[str]] = {}
        """The variances below zero of mixtures that were not scored, by the mixtures' keys."""
        self._versions: list[int] | None = None
        """How often each tensor had been changed when the current mixture was put there."""
        self._has_warned = False
        """True once the note that the task measures in training mode was shown."""
        self._labels: dict[str, Labels] = {}
        self._digests: list[str | None] = [None] * len(opened)
        self.averages_statistics = not recalibrate and bool(averaged_variances(self.plan))
        """True if mixtures are scored with averaged running statistics of BatchNorm."""
        if self.averages_statistics:
            log.warning("%s", Message(AVERAGED))

    def expect(self, n: int) -> None:
        """Set the number of mixtures and splits still to measure, at most, for progress."""
        self._n_expected = len(self._asked) + n
        self._report("")

    def settle_metric(self, mixtures: Sequence[Mixture], split: str) -> None:
        """Find out whether the task's score is the accuracy of its predictions.

        If it is so for all `mixtures` on `split`, predictions are enough from here on; else both
        are asked, and the score is the number that counts. Costs both for those mixtures.
        """
        if not self.predicts or not self.task.has("score"):
            return
        self.asks_score = False
        for mixture in mixtures:
            logits, labels = self.logits(mixture, split)
            accuracy = float((answers_of(logits) == labels).mean())
            value = self.score(mixture, split).value
            if not min(abs(value - accuracy), abs(value / 100 - accuracy)) <= EQUAL:
                self.asks_score = True
                return

    @property
    def counted(self) -> str:
        """Which entry of a `summary` counts: ``score`` or ``accuracy``."""
        return "score" if self.asks_score else "accuracy"

    @property
    def metric(self) -> str:
        """The name of the number that counts: the task's own, if its scores have one."""
        return self._metric or self.counted

    @property
    def is_share(self) -> bool:
        """Return True if the number that counts is a share, to be shown in percent.

        An accuracy of predictions is one; a score is one only where the task says
        ``percent = True``: many a number between 0 and 1 is not a share.
        """
        return not self.asks_score or getattr(self.task.source, "percent", False) is True

    def measure(self, mixture: Mixture, splits: Iterable[str]) -> None:
        """Measure a mixture on those of `splits` whose answers are not known yet.

        Costs a pass over the weights of the members, if anything is missing, and a pass of the
        task over each missing split; a pass over the weights for each, if the task changes them.
        """
        splits = tuple(splits)
        missing: dict[str, tuple[bool, bool]] = {}
        for split in splits:
            key = self.key(mixture, split)
            score = self.asks_score and self.cache.score(key) is None
            logits = self.predicts and not self.cache.has_logits(key)
            if score or logits:
                missing[split] = (score, logits)
        for split, (score, logits) in missing.items():
            key = self.key(mixture, split)
            if logits:
                self._keep(key, split, *self._predict(mixture, split))
            if score:
                self.cache.put_score(key, self._score(mixture, split))
            self.n_measured += 1
            self._answered(mixture, split)
        for split in splits:
            self._answered(mixture, split)

    def score(self, mixture: Mixture, split: str) -> Score:
        """Return the task's own score of a mixture, which is asked if it is not known."""
        self._score_only(mixture, split)
        found = self.cache.score(self.key(mixture, split))
        assert found is not None
        self._metric = _name_of(found, self.task.main)
        return found

    def summary(self, mixture: Mixture, split: str) -> Mapping[str, float]:
        """Return ``accuracy``, ``nll`` and, if it is asked, ``score``; keeps no logits.

        For mixtures of which only a number is wanted: trials, points of a path or of a plane.
        Without predictions there is a ``score`` alone. All are NaN, and nothing is asked, for a
        mixture with a BatchNorm variance below zero.
        """
        found: dict[str, float] = {}
        if self._is_broken(mixture):
            names = [*(["score"] if self.asks_score else []), "accuracy", "nll"]
            self._answered(mixture, split)
            return dict.fromkeys(names if self.predicts else names[:1], math.nan)
        if self.asks_score:
            found["score"] = self.score(mixture, split).value
        if self.predicts:
            key = f"{self.key(mixture, split)}:summary"
            known = self.cache.value(key)
            if known is None:
                known = self._summarise(key, *self.answers(mixture, split))
            found |= known
        self._answered(mixture, split)
        return found

    def value(self, mixture: Mixture, split: str) -> float:
        """Return the number that counts: the task's score, or the accuracy that it is equal to."""
        return self.summary(mixture, split)[self.counted]

    def point(self, mixture: Mixture, split: str) -> tuple[float, float]:
        """Return the number that counts and the loss in nats, of a point of a path or a plane.

        The loss is NaN without predictions. Where it is NaN though there are predictions, the model
        answered with NaN, which is not a score either, and both are.
        """
        found = self.summary(mixture, split)
        loss = found.get("nll", math.nan)
        is_broken = self.predicts and math.isnan(loss)
        return (math.nan if is_broken else found[self.counted]), loss

    def answers(self, mixture: Mixture, split: str) -> tuple[AnyFloats, Labels]:
        """Return logits and labels without keeping them, or those that are kept."""
        if self.cache.has_logits(self.key(mixture, split)):
            return self.logits(mixture, split)
        logits, labels = self._predict(mixture, split)
        self._check_labels(split, labels)
        self._summarise(f"{self.key(mixture, split)}:summary", logits, labels)
        self.n_measured += 1
        self._answered(mixture, split)
        return logits, labels

    def logits(self, mixture: Mixture, split: str) -> tuple[AnyFloats, Labels]:
        """Return logits ``(example, class)``, mapped, and labels of a mixture on a split."""
        self.measure(mixture, [split])
        logits, labels = self.cache.logits(self.key(mixture, split))
        self._check_labels(split, labels)
        return logits, labels

    def key(self, mixture: Mixture, split: str) -> str:
        """Return a key of all that the answers for a mixture depend on: 32 hexadecimal digits."""
        parts = [
            ARITHMETIC,
            self.task.fingerprint,
            split,
            self._recalibrate and len(mixture.members) > 1,
            self.plan.recipe.dtype,
            [self.digest(i) for i in mixture.members],
            msgspec.json.encode(mixture.coefficients).decode(),
            *([self.given] if self.given else []),
            *([self.plan.recipe.reading.told] if self.plan.recipe.reading.told else []),
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def digest(self, i: int) -> str:
        """Return the digest of ingredient `i`: the one in the provenance of soups made of it.

        Costs a pass over the ingredient, unless it was digested before and is unchanged since.
        """
        known = self._digests[i]
        if known is None:
            ingredient = self.plan.ingredients[i]
            known = self.cache.digest_of(ingredient)
            if known is None:
                known = _digest(ingredient, self.options, mapped=self._mapped)
                self.cache.put_digest(ingredient, known)
            self._digests[i] = known
        return known

    def borrow(self) -> Any:
        """Return the live model to a caller that will change its weights."""
        self._current = None
        return self._live().model

    def close(self) -> None:
        """Put modules back into the modes they were in. The weights stay those of a mixture."""
        for module, training in self._training:
            module.training = training
        if self._unscored:
            names = next(iter(self._unscored.values()))
            log.warning(
                "%s",
                Message(
                    "not scored, for a negative coefficient: "
                    f"{count(len(self._unscored), 'mixture')}; BatchNorm variances are below "
                    f"zero ({some(names, 3)}), and every output would be a NaN; "
                    f"{option('recalibrate', True)} measures them anew for each"
                ),
            )
            self._unscored = {}

    def _is_broken(self, mixture: Mixture) -> bool:
        """Return True if a BatchNorm variance is below zero in the mixture as it is scored."""
        part = self._part(mixture)
        if not may_be_negative(part):
            return False
        key = f"{self.key(mixture, '')}:variances"
        names = self.cache.value(key)
        if names is None:
            self._put(mixture)
            names = self._negative
            self.cache.put_value(key, names)
        if names:
            self._unscored[key] = names
        return bool(names)

    def _score_only(self, mixture: Mixture, split: str) -> None:
        key = self.key(mixture, split)
        known = self.cache.score(key)
        if known is None:
            known = self._score(mixture, split)
            self.cache.put_score(key, known)
            self.n_measured += 1
        self._answered(mixture, split)

    def _summarise(self, key: str, logits: AnyFloats, labels: Labels) -> dict[str, float]:
        at = calibrate(logits, labels)
        known = {"accuracy": at.accuracy, "nll": at.nll}
        if self.cache.value(key) != known:
            self.cache.put_value(key, known)
        return known

    def _answered(self, mixture: Mixture, split: str) -> None:
        """Report what is known now, once."""
        key = self.key(mixture, split)
        if key not in self._asked:
            self._asked.add(key)
            n = len(mixture.members)
            what = "one ingredient" if n == 1 else f"a mixture of {n}"
            self._report(f"measured {what} on {split}")

    def _report(self, text: str) -> None:
        if self.options.on_event is not None:
            n_done, elapsed_s = len(self._asked), time.monotonic() - self._started
            n = max(self._n_expected, n_done)
            self.options.on_event(
                Step("measurement", n_done, n, self.n_measured, elapsed_s, True, text)
            )

    def _put(self, mixture: Mixture) -> None:
        """Put a mixture into the model, unless it is the one that is there, unchanged."""
        sink = self._live()
        sink.check()
        versions = sink.versions()
        if mixture == self._current and versions is not None and versions == self._versions:
            return
        self._current = None
        from streamsoup.engine.stream import run
        from streamsoup.live.mix import LiveMix
        from streamsoup.live.recalibration import negative_variances, recalibrate
        from streamsoup.task.running import contained

        part = self._part(mixture)
        if self._mix is None:
            self._mix = LiveMix(self.plan, sink, mapped=self._mapped, options=self.options)
        mix, memory = self._mix.reducer(part)
        reader = open_reader(part, memory, mapped=self._mapped, kept=self._mix.kept)
        try:
            run(part, memory, reader, mix, sink, on_event=self.options.on_event)
        finally:
            sink.mark_changed()
        if self._recalibrate and len(mixture.members) > 1:
            with contained(self.task, "recalibration"):
                recalibrate(sink.model, self.task.recalibration())
        self._negative = negative_variances(sink.model) if may_be_negative(part) else []
        self._current, self._versions = mixture, sink.versions()

    def _part(self, mixture: Mixture) -> MixPlan:
        """Cut the plan for the members out of the plan over all ingredients."""
        plan = self.plan.among(mixture.members, Linear(mixture.coefficients))
        plan.recipe.check(plan.layouts[0].places)
        return plan

    def _live(self) -> ModelSink:
        if self._sink is None:
            from streamsoup.live.model import ModelSink
            from streamsoup.task.running import contained

            if self._model is None:
                self.task.need("build")
                if self.options.on_event is not None:
                    self.options.on_event(Note(f"building the model of {self.task.name}"))
                with contained(self.task, "build"):
                    self._model = self.task.build()
            sink = ModelSink(self._model, self.plan)
            sink.check_apart()
            self._sink = sink
            self._training = [(module, module.training) for module in self._model.modules()]
        return self._sink

    def _score(self, mixture: Mixture, split: str) -> Score:
        """Ask the task for its score of a mixture."""
        from streamsoup.task.running import contained

        self._put(mixture)
        model = self._live().model
        with contained(self.task, "score"):
            model.eval()
            score = self.task.score(model, split)
        self._watch_mode(f"score on {split!r}")
        if doubts := doubt(score, f"{self._named(mixture)} on {split!r}"):
            log.warning("%s", doubts)
        return score

    def _named(self, mixture: Mixture) -> str:
        """Return what a mixture is called in a warning."""
        if len(mixture.members) == 1:
            return printable(self.plan.ingredients[mixture.members[0]].name)
        return f"a mixture of {len(mixture.members)}"

    def _predict(self, mixture: Mixture, split: str) -> tuple[AnyFloats, Labels]:
        """Ask the task for a mixture's logits, and labels, of a whole split."""
        from streamsoup.task.running import contained

        self._put(mixture)
        model = self._live().model
        with contained(self.task, "predictions"):
            model.eval()
            given = list(map(as_arrays, self.task.predictions(model, split)))
        where = f"{self.task.name}: predictions on {split!r}"
        self._watch_mode(f"predictions on {split!r}")
        return joined(given, where)

    def _watch_mode(self, what: str) -> None:
        """Warn, the first time, if the task measured a model in training mode."""
        if self._has_warned:
            return
        warning = training_mode(self._live().model, f"{self.task.name}: {what}")
        self._has_warned = warning != ""
        if warning:
            log.warning("%s", warning)

    def _keep(self, key: str, split: str, logits: AnyFloats, labels: Labels) -> None:
        self._check_labels(split, labels)
        self.cache.put_logits(key, logits, labels)

    def _check_labels(self, split: str, labels: Labels) -> None:
        """Ensembles and intervals compare example by example: their order must not change."""
        known = self._labels.setdefault(split, labels)
        if not np.array_equal(known, labels):
            raise TaskError(
                f"{self.task.name}: predictions on {split!r} came with other labels than before; "
                "examples must come in the same order every time"
            )


def _name_of(score: Score, main: str | None) -> str:
    """Return the name of the metric that a score is; empty where the task gave a number alone."""
    if main in score.metrics:
        return str(main)
    if len(score.metrics) == 1:
        return next(iter(score.metrics))
    return next((name for name in MAIN_NAMES if name in score.metrics), "")


def _digest(ingredient: Ingredient, options: Options, *, mapped: bool) -> str:
    """Read an ingredient once, and digest it as the pass that makes a soup does."""
    from streamsoup.engine.reduce import Nothing
    from streamsoup.engine.stream import DigestLedger, Nowhere, run

    recipe = Recipe(
        ingredients=(ingredient.name,),
        rule=Linear(Coefficients.uniform(1)),
        non_float="first",
        non_finite="propagate",
        reading=options.reading.recorded,
    )
    plan = plan_mix([ingredient], recipe)
    memory = plan_memory(
        plan,
        mapped=mapped,
        threads=options.n_threads,
        budget=memory_budget(plan, options.memory),
    )
    ledger = DigestLedger(plan)
    reader = open_reader(plan, memory, mapped=mapped)
    run(plan, memory, reader, Nothing(), Nowhere(), ledger=ledger, on_event=options.on_event)
    return ledger.digests.of_ingredient(0)
