"""The paper's comparison, for anyone's models: every way to choose, on every split.

Everything is chosen on the validation split alone, the first one of the task; the oracle, which
looks at each column, is named so. Answers are cached (`cache`), so a killed run goes on where it
was, a second run measures nothing again, and one more ingredient costs only what is new.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.cluster.choice import refuse_spread
from streamsoup.errors import (
    OutputError,
    OutputExistsError,
    RecipeError,
    TaskError,
    check_choice,
    in_python,
    printable,
    some,
)
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, listed
from streamsoup.options import Options, check_options, settle
from streamsoup.output.destination import check_outside
from streamsoup.recipe import Coefficients
from streamsoup.search.learning.parametrisation import Granularity, layer_of
from streamsoup.search.trials import best_first, random_order
from streamsoup.study.comparison.curves import choose_counts, draw_curves, values_of
from streamsoup.study.comparison.judging import with_gains, with_intervals
from streamsoup.study.comparison.learning import learn, why_not
from streamsoup.study.comparison.pairs import choose_pairs, look_between
from streamsoup.study.comparison.selection import Ensemble, grow_ensemble, grow_soup
from streamsoup.study.measures.bench import AVERAGED, EQUAL, Bench
from streamsoup.study.measures.cache import Cache
from streamsoup.study.measures.calibration import (
    NONE,
    AnyFloats,
    Labels,
    answers_of,
    calibrate,
    fit_beta,
)
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.rows import MEAN, Cell, Comparison, Pair, Row, Splits
from streamsoup.study.names import short_names
from streamsoup.system.schemes import check_local
from streamsoup.task import AnyTask, Task, load_task

__all__ = ["CompareSettings", "check_folder", "compare", "splits_of"]

Floats = NDArray[np.float64]
Members = tuple[int, ...]


class CompareSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison holds, and how much it may cost."""

    orders: int = 3
    """Random orders of the greedy soup; the paper's table has three."""
    curve: int = 8
    """Points of the curves over the number of ingredients; 0 leaves them out."""
    pairs: int = 45
    """Most pairs to look between, if there is a base; 0 leaves them out."""
    theory: bool = True
    """True if pairs are set against the theory of soup and ensemble; three more points each."""
    recalibrate: bool = False
    """True if BatchNorm statistics are measured anew for every mixture."""
    seed: int = 0
    """Of the random orders, the choice of pairs, and the bootstrap."""
    learned: tuple[Granularity, ...] = ("global", "layer")
    """What learned soups have coefficients of their own for; empty leaves them out."""
    coefficients: Mapping[str, Coefficients] = {}
    """Further soups of all ingredients, by name."""

    def __post_init__(self) -> None:
        """Convert numbers of other libraries, and check them. Raises `RecipeError`."""
        settle(self)
        for name in ("orders", "curve", "pairs"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} {getattr(self, name)} is below 0")
        if isinstance(self.learned, str):
            raise RecipeError(f"learned {self.learned!r} is one word; expected a list")
        for each in self.learned:
            check_choice("learned", each, get_args(Granularity))


def compare(
    ingredients: Iterable[AnyIngredient],
    task: AnyTask,
    *,
    output: str | os.PathLike[str],
    base: AnyIngredient | None = None,
    model: object = None,
    settings: CompareSettings = CompareSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> Comparison:
    """Compare `ingredients`, their soups and their ensembles on every split of `task`.

    The first split is searched on, the second is the test split, and the others are shifts, unless
    the task lists its ``shifts``. `write_report` makes the pages.

    Args:
        ingredients: As for `uniform`, one at least.
        task: A task object, or the path or name of one.
        output: Folder of the report; only the answers are written, into ``output/cache``, so that
            a killed comparison resumes.
        base: The checkpoint that all were fine-tuned from, for a row and angles of its own.
        model: The live model to measure in; None asks the task for one.
        settings: What the comparison holds.
        options: Memory, threads, device, and the way of reading.

    Returns:
        Rows for ingredients, soups and ensembles on every split, curves, pairs, and notes.

    Raises:
        TaskError: The task fails, or lacks what is asked of it.
        MismatchError: The checkpoints, or the model, do not fit each other.
        OutputError: `output` holds something else, or cannot be written.

    Costs a pass of the task over every split for each ingredient and soup, over the validation
    split for each trial, and over the test split for each point between pairs. Ensembles need the
    task's predictions, and no pass. Holds one model, and the logits of one split twice over.
    """
    check_options(settings, CompareSettings)
    refuse_spread(options, "compare")
    loaded = load_task(task)
    ingredients = listed(ingredients)
    if not ingredients:
        raise RecipeError("a comparison needs at least one ingredient")
    every = [*ingredients, *([] if base is None else [base])]
    check_folder(output, every)
    with Cache(os.path.join(os.fsdecode(output), "cache")) as cache:
        bench = Bench(
            every,
            loaded,
            cache,
            recalibrate=settings.recalibrate,
            model=model,
            options=options,
        )
        try:
            made = _Table(bench, len(ingredients), base is not None, settings)
            return made.fill()
        finally:
            bench.close()


def check_folder(output: str | os.PathLike[str], ingredients: Sequence[AnyIngredient]) -> None:
    """Raise `OutputError` for a folder that holds something else, or lies in an ingredient."""
    check_local(output, OutputError)
    root = os.path.realpath(os.fsdecode(output))
    where = printable(os.fsdecode(output))
    if os.path.exists(root):
        strange = not os.path.isdir(root) or (
            os.listdir(root) and not os.path.exists(os.path.join(root, "cache", "lock"))
        )
        if strange:
            raise OutputExistsError(
                f"{where}: exists already and is not a report of streamsoup; choose another folder"
            )
    names = [each.name if isinstance(each, Ingredient) else each for each in ingredients]
    # Ingredients in memory have no path to protect.
    paths = [os.fspath(name) for name in names if isinstance(name, (str, os.PathLike))]
    check_outside(os.fsdecode(output), paths)


def splits_of(task: Task) -> Splits:
    """Return the purpose of each split. Raises `TaskError` for shifts that are not splits."""
    first, *others = task.splits
    given = getattr(task.source, "shifts", None)
    if given is None:
        return Splits(first, others[0] if others else None, tuple(others[1:]))
    shifts = tuple(map(str, given))
    strange = [split for split in shifts if split not in others]
    rest = [split for split in others if split not in shifts]
    if strange or len(rest) > 1:
        raise TaskError(
            f"{task.name}: shifts = {list(shifts)} does not fit splits = {list(task.splits)}: "
            f"{some(strange) or 'all but the first two are shifts'}"
        )
    return Splits(first, rest[0] if rest else None, shifts)


def _with_coefficients(row: Row, coefficients: Coefficients) -> Row:
    """Add the coefficients of a soup that is not a plain mean, tensors with equal ones together.

    Groups are named after layers where all tensors of a layer have the same, else after tensors.
    """
    values = tuple(value / coefficients.divisor for value in coefficients.values)
    if not coefficients.per_tensor:
        learned = len(set(values)) > 1
        return replace(row, groups=("all",), coefficients=(values,)) if learned else row
    layers: dict[str, set[tuple[float, ...]]] = {}
    for name, factors in coefficients.per_tensor.items():
        layers.setdefault(layer_of(name), set()).add(factors)
    groups = {
        (layer_of(name) if len(layers[layer_of(name)]) == 1 else name): factors
        for name, factors in coefficients.per_tensor.items()
    }
    return replace(row, groups=tuple(groups), coefficients=tuple(groups.values()))


class _Table:
    """A comparison in the making."""

    def __init__(self, bench: Bench, n: int, based: bool, settings: CompareSettings) -> None:
        self.bench, self.n, self.settings = bench, n, settings
        self.base = n if based else None
        self.splits = splits_of(bench.task)
        paths = bench.plan.recipe.ingredients
        self.paths = paths[:n]
        self.names = tuple(short_names(self.paths, 24))
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.right: dict[str, list[tuple[int, Floats]]] = {}
        """Results by example, of rows by number, for each split."""
        self.n_examples: dict[str, int] = {}

    def fill(self) -> Comparison:
        """Measure everything, in the order in which it is needed."""
        everyone = tuple(range(self.n))
        self._expect("models")
        self.bench.settle_metric([Mixture.uniform([i]) for i in everyone], self.splits.val)
        if self.bench.predicts and self.bench.asks_score:
            self.notes.append(
                "The task's score is not the accuracy of its predictions: ensembles are grown and "
                "judged by accuracy, and have no score."
            )
        if self.bench.averages_statistics:
            self.notes.append(f"{AVERAGED[0].upper()}{in_python(AVERAGED[1:])}.")
        if self.base is not None:
            self._add_model("base", "base", Mixture.uniform([self.base]))
        for i in everyone:
            self._add_model(self.names[i], "ingredient", Mixture.uniform([i]))
        singles = self.rows[-self.n :]
        val = self.splits.val
        order = best_first([row.cells[val].value for row in singles])
        self._add_choices(singles, order)
        self._expect("soups")
        self._add_model("uniform soup", "soup", Mixture.uniform(everyone))
        greedy = grow_soup(self.bench, order, self.splits.val)
        self._add_model("greedy soup", "soup", Mixture.uniform(greedy))
        self._expect("orders")
        self._add_random_orders()
        self._expect("learned")
        self._add_learned(everyone)
        for name, coefficients in self.settings.coefficients.items():
            self._add_model(name, "soup", Mixture(everyone, coefficients))
        if self.bench.predicts:
            self._add_ensembles(order, greedy)
        else:
            self.notes.append(
                "The task has no predictions: no ensembles, no calibration, and intervals only "
                "where its scores come with examples."
            )
        if self.splits.test is None:
            self.notes.append(
                f"The task has no test split: what was chosen on {val!r} is judged on it too, "
                "which flatters every choice."
            )
        judged = with_gains(self.rows)
        self.rows = with_intervals(judged, self.right, self.splits, self.settings.seed)
        self._expect("curves")
        curves = draw_curves(self.bench, self.splits, singles, self.settings.curve)
        self._expect("pairs")
        pairs = self._pairs(singles)
        self.bench.expect(0)
        return Comparison(
            splits=self.splits,
            names=self.names,
            paths=self.paths,
            metric=self.bench.metric,
            is_share=self.bench.is_share and self._within_one(),
            rows=tuple(self.rows),
            curves=tuple(curves),
            pairs=tuple(pairs),
            notes=tuple(self.notes),
            n_examples=self.n_examples,
            n_measured=self.bench.n_measured,
        )

    def _expect(self, stage: str) -> None:
        """Set the largest number of measurements left on the bench, as `stage` begins."""
        n, s, settings = self.n, len(self.splits.all), self.settings
        grown = n - 1 + s  # one greedy search: its trials, and what it found on the other splits
        learned = len(settings.learned) if n > 1 else 0
        counts = choose_counts(n, settings.curve) if settings.curve and n > 1 else []
        n_pairs = 0 if self.base is None else min(settings.pairs, n * (n - 1) // 2)
        each = 4 if settings.theory and self.bench.predicts else 1
        left = {
            "models": (n + (self.base is not None)) * s,
            "soups": s + grown,
            "orders": (settings.orders if n > 2 else 0) * grown,
            "learned": (learned + len(settings.coefficients)) * s,
            "curves": sum(count - 1 + 2 * s for count in counts),
            "pairs": n_pairs * each,
        }
        stages = list(left)
        self.bench.expect(sum(left[name] for name in stages[stages.index(stage) :]))

    def _within_one(self) -> bool:
        values = [cell.value for row in self.rows for cell in row.cells.values()]
        return all(0 <= value <= 1 for value in values if math.isfinite(value))

    def _add_model(self, name: str, kind: str, mixture: Mixture) -> None:
        """Measure a mixture on every split, and add its row."""
        bench, splits = self.bench, self.splits.all
        bench.measure(mixture, splits)
        if bench.predicts:
            cells, beta = self._calibrated(
                name, bench.key, mixture, lambda s: bench.logits(mixture, s)
            )
        else:
            cells, beta = {split: Cell(math.nan) for split in splits}, math.nan
        if bench.asks_score:
            for split in splits:
                score = bench.score(mixture, split)
                cells[split] = replace(cells[split], value=score.value)
                self.right.setdefault(split, [])
                examples = score.examples
                if examples is not None and abs(examples.mean() - score.value) <= EQUAL:
                    self.right[split].append((len(self.rows), examples))
                    self.n_examples[split] = len(examples)
        n = len(mixture.members)
        row = Row(name, kind, self._with_mean(cells), n, 1, mixture.members, beta)  # type: ignore[arg-type]
        self.rows.append(_with_coefficients(row, mixture.coefficients))

    def _calibrated(
        self,
        name: str,
        key_of: Callable[[Mixture, str], str],
        mixture: Mixture,
        logits_of: Callable[[str], tuple[AnyFloats, Labels]],
    ) -> tuple[dict[str, Cell], float]:
        """Measure logits on every split, with the temperature fitted on the validation split."""
        cells: dict[str, Cell] = {}
        cache = self.bench.cache
        beta = math.nan
        for split in self.splits.all:
            logits, labels = logits_of(split)
            key = f"{key_of(mixture, split)}:calibration"
            known = cache.value(key)
            if known is None or (split != self.splits.val and known[4] != beta):
                if split == self.splits.val:
                    beta = fit_beta(logits, labels)
                plain, scaled = calibrate(logits, labels), calibrate(logits, labels, beta)
                known = [plain.nll, plain.ece, scaled.nll, scaled.ece, beta]
                cache.put_value(key, known)
            beta = known[4]
            answers = answers_of(logits)
            if n := int((answers == NONE).sum()):
                self.notes.append(
                    f"{name}: {n} of {len(labels)} answers on {split!r} are NaN or infinite. They "
                    "count as wrong, and leave no likelihood and no calibration."
                )
            right = (answers == labels).astype(np.float64)
            self.n_examples[split] = len(labels)
            if not self.bench.asks_score:
                self.right.setdefault(split, []).append((len(self.rows), right))
            value = float(right.mean())
            cells[split] = Cell(
                value, nll=known[0], ece=known[1], nll_scaled=known[2], ece_scaled=known[3]
            )
        return cells, beta

    def _with_mean(self, cells: Mapping[str, Cell]) -> dict[str, Cell]:
        """Add the mean of the shifts."""
        if len(self.splits.shifts) < 2:
            return dict(cells)
        shifts = [cells[split] for split in self.splits.shifts]

        def mean(name: str) -> float:
            return float(np.mean([getattr(cell, name) for cell in shifts]))

        of_all = Cell(
            mean("value"),
            nll=mean("nll"),
            ece=mean("ece"),
            nll_scaled=mean("nll_scaled"),
            ece_scaled=mean("ece_scaled"),
        )
        return {**cells, MEAN: of_all}

    def _add_choices(self, singles: Sequence[Row], order: Sequence[int]) -> None:
        """Add what one would have kept without soups, and what one could have kept at best."""
        best = singles[order[0]]
        for split, known in self.right.items():
            known += [(len(self.rows), x) for r, x in known if self.rows[r] is best]
            self.right[split] = known
        self.rows.append(replace(best, name=f"best on {self.splits.val}: {best.name}", kind="best"))
        cells = {}
        for column in self.splits.columns:
            i = best_first([row.cells[column].value for row in singles])[0]
            cells[column] = replace(singles[i].cells[column], name=self.names[i])
        note = "the best ingredient of each column, chosen by that column itself"
        self.rows.append(Row("oracle best", "oracle", cells, 1, 1, note=note))

    def _add_random_orders(self) -> None:
        orders = self.settings.orders if self.n > 2 else 0
        if not orders:
            return
        found: list[dict[str, float]] = []
        counts: list[int] = []
        for number in range(orders):
            order = random_order(self.n, self.settings.seed + number)
            members = grow_soup(self.bench, order, self.splits.val)
            counts.append(len(members))
            found.append(values_of(self.bench, self.splits, Mixture.uniform(members)))
        cells = {}
        for column in self.splits.columns:
            values = [each[column] for each in found]
            spread = float(np.std(values, ddof=1)) if orders > 1 else math.nan
            cells[column] = Cell(float(np.mean(values)), spread=spread)
        name = f"greedy soup, {orders} random orders"
        self.rows.append(Row(name, "soup", cells, float(np.mean(counts)), 1, note="mean ± spread"))

    def _add_learned(self, everyone: Members) -> None:
        if self.n < 2 or not self.settings.learned:
            return
        if reason := why_not(self.bench):
            self.notes.append(reason)
            return
        for granularity in self.settings.learned:
            coefficients = learn(self.bench, self.n, granularity)
            name = "learned soup" if granularity == "global" else f"learned soup, by {granularity}"
            self._add_model(name, "soup", Mixture(everyone, coefficients))

    def _add_ensembles(self, order: Sequence[int], greedy: Members) -> None:
        grown = grow_ensemble(self.bench, order, self.splits.val)
        everyone = tuple(range(self.n))
        for name, members in (
            ("ensemble of all", everyone),
            ("ensemble of the greedy soup's members", greedy),
            ("ensemble, greedily grown", grown),
        ):
            mixture = Mixture.uniform(members)

            def logits_of(split: str, members: Members = members) -> tuple[AnyFloats, Labels]:
                ensemble = self._ensemble(members, split)
                return ensemble.mean(), ensemble.labels

            def key_of(mixture: Mixture, split: str) -> str:
                return f"{self.bench.key(mixture, split)}:ensemble"

            cells, beta = self._calibrated(name, key_of, mixture, logits_of)
            if self.bench.asks_score:
                cells = {split: replace(cell, value=math.nan) for split, cell in cells.items()}
            n = len(members)
            self.rows.append(
                Row(name, "ensemble", self._with_mean(cells), n, n, mixture.members, beta)
            )

    def _ensemble(self, members: Members, split: str) -> Ensemble:
        ensemble = Ensemble(self.bench, split)
        for i in members:
            ensemble.add(i)
        return ensemble

    def _pairs(self, singles: Sequence[Row]) -> list[Pair]:
        """Look half-way between pairs of ingredients, as many as were asked for."""
        if not self.settings.pairs or self.n < 2:
            return []
        if self.base is None:
            self.notes.append("No base was given: nothing is said of angles between fine-tunes.")
            return []
        pairs = choose_pairs(self.n, self.settings.pairs, self.settings.seed)
        if len(pairs) < self.n * (self.n - 1) // 2:
            self.notes.append(
                f"Of {self.n * (self.n - 1) // 2} pairs of ingredients, {len(pairs)} were drawn "
                "at random."
            )
        values = [row.cells[self.splits.judged].value for row in singles]
        theory = self.settings.theory
        return look_between(self.bench, self.splits, pairs, values, self.base, theory=theory)
