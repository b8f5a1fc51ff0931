"""A pass whose leaves are made by an executor, as the process that asks for it sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from streamsoup.cluster.executor import Answer, Executor, Work, attempt, result_of
from streamsoup.cluster.units import Unit
from streamsoup.engine.plan import MixPlan
from streamsoup.engine.stream import CHECKPOINT_S, TICK_S, Ledger, Read
from streamsoup.errors import ClusterError
from streamsoup.options import Options, Progress
from streamsoup.rule import usual_passes

__all__ = ["Done", "run_units", "threads_of"]


class Done(NamedTuple):
    """What a process returns of a unit."""

    nbytes: int
    """Bytes that it read of the ingredients, in all passes."""
    n_passes: int
    result: Any


def threads_of(executor: Executor, options: Options) -> int:
    """Return the threads of a unit: as many as were asked for, or as the smallest node has CPUs.

    At most 8 by default, as for one process. Raises `RecipeError` for a number below 1.
    """
    return min(8, executor.n_cpus()) if options.threads is None else options.n_threads


def run_units(
    executor: Executor,
    work: Work,
    shared: bytes,
    units: Sequence[Unit],
    plan: MixPlan,
    *,
    threads: int,
    memory: int,
    take: Callable[[Unit, Any], None],
    ledger: Ledger | None = None,
    on_event: Callable[[Any], None] | None = None,
) -> Read:
    """Have all units done, and report the progress of the whole and of each node.

    Args:
        executor: Does them.
        work: What to do with a unit; returns `Done`.
        shared: What all units share.
        units: What is to be done.
        plan: The pass.
        threads: Of a unit.
        memory: Bytes that the process of a unit takes.
        take: Called with each unit and its result.
        ledger: Is told to make durable what is noted, now and then.
        on_event: Called with the progress.

    Returns:
        What was read, in all processes.

    Raises:
        ChangedIngredientError: An ingredient has changed, which killed whatever process read it.
        StreamsoupError: As `Executor.run`.
    """
    pass_ = _Pass(plan, ledger, on_event)

    def on_done(unit: Unit, answer: Answer, node: str) -> None:
        done: Done = result_of(answer, node)
        take(unit, done.result)
        pass_.count(unit, done, node)

    try:
        executor.run(
            partial(attempt, work),
            shared,
            units,
            n_cpus=threads,
            nbytes=memory,
            on_done=on_done,
            on_wait=pass_.on_wait,
        )
    except ClusterError:
        for ingredient in plan.ingredients:
            ingredient.check_unchanged()
        raise
    except BaseException:
        pass_.checkpoint()  # what was finished elsewhere is kept
        raise
    pass_.report(last=True)
    return Read(pass_.nbytes_read, pass_.n_passes)


class _Pass:
    """How far the units are."""

    def __init__(
        self, plan: MixPlan, ledger: Ledger | None, on_event: Callable[[Any], None] | None
    ) -> None:
        self.plan, self.ledger, self.on_event = plan, ledger, on_event
        self.started = self.noted = self.told = time.monotonic()
        self.nbytes_read = self.nbytes_done = 0
        """Bytes that were read in all passes, and those of the units that are done."""
        self.n_passes = 1
        self.nodes: dict[str, int] = {}

    def count(self, unit: Unit, done: Done, node: str) -> None:
        """Count a unit that is done."""
        self.nbytes_read += done.nbytes
        self.nbytes_done += unit.nbytes
        self.n_passes = max(self.n_passes, done.n_passes)
        self.nodes[node] = self.nodes.get(node, 0) + done.nbytes

    def on_wait(self) -> None:
        """Note what is finished, and report, if it is time to."""
        now = time.monotonic()
        if now - self.noted >= CHECKPOINT_S:
            self.checkpoint()
            self.noted = time.monotonic()
        if now - self.told >= TICK_S:
            self.report()
            self.told = now

    def checkpoint(self) -> None:
        """Make durable what is finished."""
        if self.ledger is not None:
            self.ledger.checkpoint()

    def report(self, *, last: bool = False) -> None:
        """Report the progress: what is left takes as many passes as what is done."""
        if self.on_event is None:
            return
        nbytes = self.plan.nbytes_read
        whole = nbytes * usual_passes(self.plan.recipe.rule)
        if self.nbytes_done:
            whole = self.nbytes_read * nbytes // self.nbytes_done
        whole = self.nbytes_read if last else max(whole, self.nbytes_read)
        elapsed_s = time.monotonic() - self.started
        self.on_event(Progress(self.nbytes_read, whole, elapsed_s, dict(self.nodes)))
