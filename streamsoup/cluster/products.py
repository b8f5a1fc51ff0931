"""Inner products whose leaves are measured by an executor, and added up in the order of the plan.

A unit returns the sums of each of its leaves, and its digests; the process that asks adds them up
as those of its own threads (`engine.inner.Sums`), so the bits are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from streamsoup.cluster.choice import asked_for
from streamsoup.cluster.executor import Executor
from streamsoup.cluster.passes import Done, run_units, threads_of
from streamsoup.cluster.shared import open_shared, share_plan
from streamsoup.cluster.units import Unit, in_units
from streamsoup.engine.budget import MemoryPlan, memory_budget
from streamsoup.engine.inner import Gram, LeafSums, Sums, measured_part, plan_inner_memory
from streamsoup.engine.plan import Leaf, MixPlan
from streamsoup.engine.read import open_reader
from streamsoup.engine.stream import DigestLedger, run
from streamsoup.engine.unchanged import check_read
from streamsoup.options import Options

__all__ = ["gram_in_units", "gram_of_unit"]


class _Own(NamedTuple):
    """What a unit is given."""

    leaves: tuple[int, ...]
    base: bool
    """True if the first ingredient is the reference."""


class _Prepared(NamedTuple):
    """What a process keeps for the next unit."""

    plan: MixPlan
    memory: MemoryPlan
    gram: Gram
    mapped: bool
    leaves: dict[int, Leaf]


def gram_in_units(
    plan: MixPlan, sums: Sums, ledger: DigestLedger, *, base: bool, mapped: bool, options: Options
) -> None:
    """Measure all leaves of a plan, as a `Gram` does, into `sums`; digests go into `ledger`.

    Raises:
        RecipeError: An ingredient has no files.
        ClusterError: The cluster cannot be used.
        StreamsoupError: The first error of a unit, with the name of its node.
    """
    executor: Executor = options.executor
    executor.open()
    threads, budget = threads_of(executor, options), memory_budget(plan, options.memory)
    memory = _memory(plan, base=base, mapped=mapped, threads=threads, budget=budget)
    shared = share_plan(plan, options, asked=asked_for(options), threads=threads, memory=budget)
    leaves = {leaf.number: leaf for leaf in plan.leaves()}
    n_slots = max(1, executor.n_slots(threads, memory.peak_nbytes))
    units = [
        replace(unit, own=tuple(_Own(unit.leaves, base)))
        for unit in in_units(plan, list(leaves.values()), n_slots)
    ]

    def take(unit: Unit, result: tuple[bytes, bytes]) -> None:
        values = np.frombuffer(result[0]).reshape(len(unit.leaves), -1)
        row = len(result[1]) // len(unit.leaves)
        for at, number in enumerate(unit.leaves):
            ledger.finish_leaf(leaves[number], result[1][at * row : (at + 1) * row])
            sums.add(leaves[number], values[at])

    run_units(
        executor,
        gram_of_unit,
        shared,
        units,
        plan,
        threads=threads,
        memory=memory.peak_nbytes,
        take=take,
        on_event=options.on_event,
    )
    reader = open_reader(plan, memory, mapped=mapped)
    check_read(plan, memory, reader, None, ledger.digests, checksums=False)


def gram_of_unit(shared: bytes, own: Sequence[Any]) -> Done:
    """Measure the leaves of one unit; return their sums, and their digests, in their order."""
    numbers, base = _Own(*own)
    plan, memory, gram, mapped, leaves = _prepare(shared, base)
    sums, ledger = LeafSums(plan, gram.n_values), DigestLedger(plan)
    reader = open_reader(plan, memory, mapped=mapped)
    chosen = [leaves[number] for number in numbers]
    read = run(plan, memory, reader, gram, sums, ledger=ledger, leaves=chosen)
    values = b"".join(sums.of_leaves[number].tobytes() for number in numbers)
    digests = b"".join(ledger.digests.get(number) for number in numbers)
    return Done(read.nbytes, read.n_passes, (values, digests))


@lru_cache(maxsize=1)
def _prepare(shared: bytes, base: bool) -> _Prepared:
    """Plan once for all units of a pass that this process measures."""
    plan, mapped, threads, budget = open_shared(shared, measured_part)
    memory = _memory(plan, base=base, mapped=mapped, threads=threads, budget=budget)
    leaves = {leaf.number: leaf for leaf in plan.leaves()}
    return _Prepared(plan, memory, Gram(plan, memory, base=base), mapped, leaves)


def _memory(plan: MixPlan, *, base: bool, mapped: bool, threads: int, budget: int) -> MemoryPlan:
    return plan_inner_memory(
        plan, Gram.count_values(plan, base=base), mapped=mapped, threads=threads, budget=budget
    )
