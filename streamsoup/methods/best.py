"""The best checkpoints of a run, by a metric that the run itself noted of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar, get_args

import msgspec

from streamsoup.errors import RecipeError, check_choice, count, option, printable, some
from streamsoup.methods.records import Direction, find_direction, read_records, unknown_metric
from streamsoup.options import take

__all__ = ["Best", "BestOf", "best_of", "choose_best"]


class Best(msgspec.Struct, frozen=True):
    """Which checkpoints are asked for."""

    n: int
    """How many of them."""
    metric: str
    """The name of the metric, as the run noted it."""
    direction: Direction | None
    """Which values are the best; None where the run says so."""


class Saved(Protocol):
    """A checkpoint, as far as it matters here."""

    @property
    def path(self) -> str | None:
        """Its path; None for what lies in memory."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def step(self) -> int | None:
        """The step at which it was saved."""


C = TypeVar("C", bound=Saved)


class BestOf(msgspec.Struct, Generic[C], frozen=True):
    """The best checkpoints, in the order in which they were given."""

    checkpoints: tuple[C, ...]
    scores: Mapping[int, float]
    """The metric of each, by its `id`."""
    direction: Direction


def best_of(n: int | None, metric: str | None, direction: Direction | None) -> Best | None:
    """Return what is asked for, or None for nothing.

    Raises `RecipeError` for a number below 1, or a number without a metric, or the reverse.
    """
    if n is None:
        if metric is not None or direction is not None:
            raise RecipeError(
                f"a metric chooses the best checkpoints, and how many of them is not said; give "
                f"{option('best')}"
            )
        return None
    n = take("int", "best", n)
    if n < 1:
        raise RecipeError(f"best must be at least 1, got {n}")
    if metric is None:
        raise RecipeError(
            f"the best {n} by which metric is not said; give {option('metric')}, such as eval_loss"
        )
    if direction is not None:
        check_choice("direction", direction, get_args(Direction))
    return Best(n, metric, direction)


def choose_best(ordered: Sequence[C], best: Best, warnings: list[str]) -> BestOf[C]:
    """Return the best of some checkpoints, given oldest first; of equal ones the newer.

    Those without a finite value of the metric are left out, and added to `warnings`. Raises
    `RecipeError` where too few have one, or where nothing says which values are the best. Reads
    the records of each.
    """
    records = [
        None if each.path is None else read_records(each.path, each.step) for each in ordered
    ]
    known = [noted for noted in records if noted is not None]
    scores = {
        id(each): noted.metrics[best.metric]
        for each, noted in zip(ordered, records, strict=True)
        if noted is not None and math.isfinite(noted.metrics.get(best.metric, math.nan))
    }
    if not scores:
        raise unknown_metric(best.metric, known)
    if best.n > len(scores):
        raise RecipeError(
            f"the best {best.n} are asked for, and {len(scores)} of "
            f"{count(len(ordered), 'checkpoint')} have a finite {printable(best.metric)}"
        )
    direction = find_direction(best.metric, best.direction, known[::-1])
    left_out = [each.name for each in ordered if id(each) not in scores]
    if left_out:
        warnings.append(
            f"{some(left_out)}: left out, as no finite {printable(best.metric)} is noted of them"
        )
    sign = 1 if direction == "lowest" else -1
    scored = [each for each in ordered if id(each) in scores]
    newest_first = scored[::-1]
    newest_first.sort(key=lambda each: sign * scores[id(each)])
    ranked = newest_first[: best.n]
    chosen = {id(each) for each in ranked}
    return BestOf(tuple(each for each in scored if id(each) in chosen), scores, direction)
