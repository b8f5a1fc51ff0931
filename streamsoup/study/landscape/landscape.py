"""Error and loss on the plane through three checkpoints, on a grid mixed in place.

Each grid point is a mixture of the three with coefficients from their Gram matrix (`plane`), put
into one live model and measured there; no axis, and no model beside it, is ever made. The paper's
figure: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.cluster.choice import refuse_spread
from streamsoup.errors import RecipeError
from streamsoup.formats.ingredients import AnyIngredient
from streamsoup.options import Options, check_options, settle
from streamsoup.study.landscape.plane import Plane
from streamsoup.study.measures.bench import Bench
from streamsoup.study.measures.cache import Cache
from streamsoup.study.measures.mixture import Mixture
from streamsoup.study.measures.rows import to_line
from streamsoup.study.names import short_names
from streamsoup.task import AnyTask, load_task

__all__ = ["Landscape", "LandscapeSettings", "Mark", "landscape"]

Floats = NDArray[np.float64]


class Mark(msgspec.Struct, frozen=True):
    """A named place on the plane."""

    name: str
    x: float
    y: float
    is_soup: bool


class Landscape(msgspec.Struct, frozen=True, eq=False):
    """What a plane looks like."""

    plane: Plane
    xs: Floats
    ys: Floats
    values: Mapping[str, Floats]
    """Score or accuracy ``(y, x)``, for each split; larger is better, NaN where there is none."""
    losses: Mapping[str, Floats]
    """Negative log-likelihood in nats ``(y, x)``, for each split, where the task predicts."""
    marks: tuple[Mark, ...]
    n_measured: int = 0
    metric: str = "score"
    is_share: bool = False
    """True if values lie between 0 and 1 and are shown in percent, as the task said."""

    def to_lines(self) -> Iterator[str]:
        """Return a JSON line for each mark and each grid point."""
        for mark in self.marks:
            yield to_line({"kind": "mark", "name": mark.name, "x": mark.x, "y": mark.y})
        for split, values in self.values.items():
            for row, y in enumerate(self.ys):
                for column, x in enumerate(self.xs):
                    line = {"kind": "point", "split": split, "x": float(x), "y": float(y)}
                    line["coefficients"] = self.plane.coefficients(float(x), float(y))
                    line["value"] = float(values[row, column])
                    if split in self.losses:
                        line["nll"] = float(self.losses[split][row, column])
                    yield to_line(line)


class LandscapeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a landscape shows."""

    resolution: int = 21
    """Points along the longer side, 2 at least; both sides have equal steps."""
    margin: float = 0.25
    """Part of the longer side that is added beyond the checkpoints, 0 to 10."""
    splits: tuple[str, ...] = ()
    """Splits to measure; empty for the first of the task."""
    recalibrate: bool = False
    """True to measure BatchNorm statistics anew at every point."""

    def __post_init__(self) -> None:
        """Convert numbers of other libraries, and check them. Raises `RecipeError`."""
        settle(self)
        if self.resolution < 2 or not 0 <= self.margin <= 10:
            raise RecipeError(
                "resolution must be at least 2 and margin between 0 and 10, got "
                f"{self.resolution} and {self.margin}"
            )
        if isinstance(self.splits, str):
            raise RecipeError(f"splits {self.splits!r} is one word; expected a list")


def landscape(
    base: AnyIngredient,
    first: AnyIngredient,
    second: AnyIngredient,
    task: AnyTask,
    *,
    cache: str | os.PathLike[str],
    model: object = None,
    settings: LandscapeSettings = LandscapeSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> Landscape:
    """Measure a grid on the plane through three checkpoints.

    Args:
        base: The checkpoint at the origin.
        first: The checkpoint on the x axis.
        second: The third one, which spans the plane.
        task: A task object, or the path or name of one.
        cache: Folder for the answers, so that a killed run resumes.
        model: The live model to measure in; None asks the task for one.
        settings: What the landscape shows.
        options: Memory, threads, device, and the way of reading.

    Returns:
        Values and losses ``(y, x) float64`` for each split, and the marks of checkpoints and soups.

    Raises:
        RecipeError: The checkpoints lie on one line.
        TaskError: The task fails, or lacks what is asked of it.
        MismatchError: The checkpoints, or the model, do not fit each other.

    Costs one Gram pass, and for each grid point a pass over the three checkpoints and one of the
    task over each split; holds one model.
    """
    check_options(settings, LandscapeSettings)
    refuse_spread(options, "landscape")
    loaded = load_task(task)
    wanted = [loaded.check_split(split) for split in (settings.splits or loaded.splits[:1])]
    with Cache(os.fspath(cache)) as answers:
        bench = Bench(
            [base, first, second],
            loaded,
            answers,
            recalibrate=settings.recalibrate,
            model=model,
            options=options,
        )
        try:
            plane = Plane.from_gram(_gram(bench))
            xs, ys = plane.grid(settings.resolution, settings.margin)
            bench.expect(len(xs) * len(ys) * len(wanted) + 3)
            bench.settle_metric([Mixture.uniform([i]) for i in range(3)], wanted[0])
            values = {split: np.empty((len(ys), len(xs))) for split in wanted}
            losses = {split: np.full((len(ys), len(xs)), np.nan) for split in wanted}
            for row, y in enumerate(ys):
                for column, x in enumerate(xs):
                    coefficients = plane.coefficients(float(x), float(y))
                    mixture = Mixture.of((0, 1, 2), coefficients)
                    for split in wanted:
                        value, loss = bench.point(mixture, split)
                        values[split][row, column], losses[split][row, column] = value, loss
            bench.expect(0)
        finally:
            bench.close()
        known = losses if bench.predicts else {}
        marks = _marks(plane, bench.plan.recipe.ingredients)
        within = all(bool(((v >= 0) & (v <= 1) | np.isnan(v)).all()) for v in values.values())
        return Landscape(
            plane, xs, ys, values, known, marks, bench.n_measured, bench.metric,
            bench.is_share and within,
        )  # fmt: skip


def _marks(plane: Plane, paths: Sequence[str]) -> tuple[Mark, ...]:
    """Name the three checkpoints, and the soups of the two and of all three."""
    names = short_names(paths, 20)
    corners = [Mark(name, x, y, False) for name, (x, y) in zip(names, plane.corners, strict=True)]
    soups = [("soup of two", (0.0, 0.5, 0.5)), ("soup of three", (1 / 3, 1 / 3, 1 / 3))]
    return (*corners, *(Mark(name, *plane.place(c), True) for name, c in soups))


def _gram(bench: Bench) -> Floats:
    """Return ⟨dᵢ, dⱼ⟩ ``(2, 2)`` of the differences to the first; one pass, which is kept."""
    from streamsoup.methods.angles import geometry

    key = "gram:" + ",".join(bench.digest(i) for i in range(3))
    known = bench.cache.value(key)
    if known is None:
        base, first, second = bench.plan.ingredients
        found = geometry([first, second], base=base, options=bench.options)
        known = found.total.gram.tolist()
        bench.cache.put_value(key, known)
    return np.array(known)
