"""The choice between this process and an executor: the one place that reads those options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from streamsoup.errors import RecipeError, option
from streamsoup.options import Options

__all__ = ["asked_for", "executing", "is_spread", "refuse_spread"]


def is_spread(options: Options) -> bool:
    """Return True if the work is to be done by an executor."""
    return options.executor is not None or options.ray is not None


def asked_for(options: Options) -> str:
    """Return the name of the option that asks for it."""
    return "executor" if options.ray is None else "ray"


def refuse_spread(options: Options, what: str) -> None:
    """Raise `RecipeError` if the work is to be done by an executor, which `what` does not take."""
    if is_spread(options):
        raise RecipeError(
            f"{what} works in this process alone: leave out {option(asked_for(options))}"
        )


@contextmanager
def executing(options: Options) -> Iterator[Options]:
    """Hold one executor for all passes within: options that name Ray get one.

    It connects when its first pass begins. What the caller gave stays open.
    """
    if options.ray is None or options.executor is not None:
        yield options
        return
    from streamsoup.cluster.over_ray import RayExecutor

    with RayExecutor(options.ray) as executor:
        yield replace(options, executor=executor)
