"""Which of the last checkpoints of a run are averaged best: how many, how far apart, and how.

A point of the sweep is a window: its `last` newest checkpoints, counting every `every`-th, and the
curve of their coefficients: ``uniform`` (LAWA), ``ema``, or what stands in for a decay of the
learning rate, ``sqrt`` and ``cosine`` (WSM). Each is made of the checkpoints of its window alone,
as `lawa`, `ema` and `wsm` make it, to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from msgspec.structs import replace

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import RecipeError, check_choice, count
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.methods.averages import ema_factors, wsm_coefficients
from streamsoup.methods.checkpoints import By, Given, choose
from streamsoup.options import Options, check_options, take
from streamsoup.output.make import Order, order
from streamsoup.recipe import Coefficients
from streamsoup.search.sweep import Point, SweepSettings, SweepSoup, sweep_points

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CURVES", "WindowCurve", "plan_windows", "sweep_windows", "windows"]

WindowCurve = Literal["uniform", "ema", "sqrt", "cosine"]

CURVES: tuple[WindowCurve, ...] = get_args(WindowCurve)


def sweep_windows(
    checkpoints: Given,
    task: Any,
    *,
    last: Sequence[int] = range(1, 7),
    every: Sequence[int] = (1,),
    curves: Sequence[WindowCurve] = CURVES,
    decay: float = 0.9,
    by: By | None = None,
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    settings: SweepSettings = SweepSettings(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
) -> SweepSoup:
    """Score windows of the newest checkpoints of a run, and write the best average.

    Args:
        checkpoints: Oldest first; or the folder of a run, whose checkpoints are ordered by step.
        task: As for `sweep`.
        last: How many of the newest, each number a point. Windows that reach beyond the oldest
            checkpoint are left out.
        every: How far apart: the newest, and every so many counted back from it.
        curves: How they are averaged.
        decay: What a step of ``ema`` leaves of the average so far.
        by: What the checkpoints are ordered by, as for `ema`.
        output: The folder to make.
        model: As for `sweep`.
        settings: Where and how to score.
        options: How to make candidates and the soup.

    Returns:
        The soup, with every point and its score.

    Raises:
        RecipeError: No window fits the checkpoints, or a number or a curve is none.
        StreamsoupError: Whatever `sweep` raises.

    Costs one pass over the checkpoints of its window, and one score, for each point.
    """
    check_options(settings, SweepSettings)
    points, ordered = plan_windows(
        checkpoints, last=last, every=every, curves=curves, decay=decay, by=by, options=options
    )
    return sweep_points(
        points, ordered, task, output=output, model=model, settings=settings, options=options
    )


def plan_windows(
    checkpoints: Given,
    *,
    last: Sequence[int],
    every: Sequence[int],
    curves: Sequence[WindowCurve],
    decay: float,
    by: By | None,
    options: Options,
) -> tuple[list[Point], Order]:
    """Return the points of `sweep_windows`, and a plan of all checkpoints that any takes."""
    check_options(options, Options)
    choice = choose(checkpoints, by=by)
    points = windows(len(choice.checkpoints), last, every, curves, decay)
    taken = sorted({i for point in points for i in point.members or ()})
    place = {i: new for new, i in enumerate(taken)}
    points = [
        replace(point, members=tuple(place[i] for i in point.members or ())) for point in points
    ]
    chosen = replace(choice, checkpoints=tuple(choice.checkpoints[i] for i in taken))
    opened = open_ingredients(chosen.ingredients, options.reading.downloading)
    equal = Linear(Coefficients.uniform(len(opened)))
    ordered = order(opened, equal, method="windows", options=options)
    warnings = [*ordered.warnings, *choice.warnings]
    return points, replace(ordered, report=chosen.report, warnings=warnings)


def windows(
    n: int,
    last: Sequence[int],
    every: Sequence[int] = (1,),
    curves: Sequence[WindowCurve] = CURVES,
    decay: float = 0.9,
) -> list[Point]:
    """Return the points of a sweep over windows of `n` checkpoints; arguments as above.

    A window of one checkpoint is the same for every curve and distance, and is one point.

    >>> [point.members for point in windows(5, [1, 2, 3], [1, 2], ["uniform"])]
    [(4,), (3, 4), (2, 3, 4), (2, 4), (0, 2, 4)]
    """
    decay = take("float", "decay", decay)
    if not 0 <= decay < 1:
        raise RecipeError(f"decay {decay} is not between 0 and 1, 1 excluded")
    sizes, steps = ([take("int", name, each) for each in given] for name, given in
                    (("last", last), ("every", every)))  # fmt: skip
    if min([*sizes, *steps], default=0) < 1 or not (sizes and steps and curves):
        raise RecipeError("last, every and curves need values, and numbers are at least 1")
    for curve in curves:
        check_choice("curve", curve, CURVES)
    found: dict[tuple[object, ...], Point] = {}
    for curve in curves:
        for step in steps:
            for size in sizes:
                members = tuple(range(n - 1 - step * (size - 1), n, step))
                if members[0] < 0:
                    continue
                values: dict[str, float | str] = {"curve": curve, "every": step, "last": size}
                if len(steps) == 1:
                    del values["every"]
                point = Point(values, Linear(_coefficients(size, curve, decay)), members)
                found.setdefault((members, repr(point.rule)), point)
    if not found:
        raise RecipeError(f"no window fits {count(n, 'checkpoint')}; give smaller numbers")
    return list(found.values())


def _coefficients(n: int, curve: WindowCurve, decay: float) -> Coefficients:
    if curve == "ema":
        return Coefficients.given(ema_factors(n, decay))
    return Coefficients.uniform(n) if curve == "uniform" else wsm_coefficients(n, curve)
