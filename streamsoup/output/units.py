"""Soups whose leaves are made by an executor: each unit writes its own into the staged shards.

The process that asks plans, locks the output, makes the shards at their full size, and keeps the
journal; any process that sees the files makes a unit:

1. It opens the shards by the path of their folder, which is of this run alone: after another run
   has taken the work over, or it was put in place, nothing is there. It never makes a file.
2. It writes the bytes of its leaves where the plan puts them, syncs, and returns their digests. So
   it does no harm to do a unit twice, or late: the same bytes go to the same places.
3. Digests are noted after that, as those of a thread are; what is noted is believed if the bytes
   match, which the unit itself finds out when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any, NamedTuple

from streamsoup.cluster.choice import asked_for
from streamsoup.cluster.executor import Executor
from streamsoup.cluster.passes import Done, run_units, threads_of
from streamsoup.cluster.shared import open_shared, share_plan
from streamsoup.cluster.units import Unit, in_units
from streamsoup.engine.budget import MemoryPlan, memory_budget, plan_memory
from streamsoup.engine.digest import Digests
from streamsoup.engine.plan import FilePlan, Leaf, MixPlan, plan_files
from streamsoup.engine.read import open_reader
from streamsoup.engine.reduce import Engine
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.stream import Read, run
from streamsoup.engine.unchanged import check_read
from streamsoup.options import Options
from streamsoup.output.write import FileLedger, FileSink
from streamsoup.system.folders import Folder

__all__ = ["make_in_units", "make_unit"]


class _Own(NamedTuple):
    """What a unit of a soup is given."""

    folder: str
    """Path of the folder of the shards."""
    leaves: tuple[int, ...]
    noted: tuple[tuple[int, str], ...]
    """Leaves that an earlier run has noted, with their digests in hexadecimal."""


class _Prepared(NamedTuple):
    """What a process keeps for the next unit."""

    plan: MixPlan
    files: FilePlan
    memory: MemoryPlan
    engine: Engine
    mapped: bool
    leaves: dict[int, Leaf]


class _Notes(list[dict[str, Any]]):
    """A journal in memory: the caller of `make_unit` keeps what is noted in a real one."""

    def append(self, record: dict[str, Any], *, wait: bool = True) -> None:
        """Add a record."""
        super().append(record)


def make_in_units(
    plan: MixPlan,
    files: FilePlan,
    sink: FileSink,
    ledger: FileLedger,
    *,
    folder: str,
    mapped: bool,
    executor: Executor,
    options: Options,
) -> Read:
    """Make all leaves of a plan in the shards that `sink` has prepared in `folder`.

    Raises:
        RecipeError: The rule takes statistics of the whole model, or an ingredient has no files.
        ClusterError: The cluster cannot be used.
        StreamsoupError: The first error of a unit, with the name of its node.
    """
    threads = threads_of(executor, options)
    budget = memory_budget(plan, options.memory)
    memory = plan_memory(plan, mapped=mapped, threads=threads, budget=budget)
    shared = share_plan(plan, options, asked=asked_for(options), threads=threads, memory=budget)
    leaves = sorted(
        plan.leaves(),
        key=lambda leaf: (
            plan.tensors[leaf.tensor].is_reduced,  # copies can still be refused
            files.places[leaf.tensor],
            leaf.start,
        ),
    )
    by_number = {leaf.number: leaf for leaf in leaves}
    n_slots = max(1, executor.n_slots(threads, memory.peak_nbytes))
    units = [_with_own(unit, folder, by_number, ledger) for unit in in_units(plan, leaves, n_slots)]
    row = len(ledger.digests.get(0))

    def take(unit: Unit, digests: bytes) -> None:
        for at, number in enumerate(unit.leaves):
            ledger.finish_leaf(by_number[number], digests[at * row : (at + 1) * row])

    read = run_units(
        executor,
        make_unit,
        shared,
        units,
        plan,
        threads=threads,
        memory=memory.peak_nbytes,
        take=take,
        ledger=ledger,
        on_event=options.on_event,
    )
    reader = open_reader(plan, memory, mapped=mapped)
    digests = None if read.n_passes > 1 or plan.is_measured else ledger.digests
    check_read(plan, memory, reader, None, digests, checksums=False)
    return read


def _with_own(unit: Unit, folder: str, leaves: dict[int, Leaf], ledger: FileLedger) -> Unit:
    noted = [number for number in unit.leaves if ledger.noted(leaves[number])]
    digests = tuple((number, ledger.digests.get(number).hex()) for number in noted)
    return Unit(unit.leaves, unit.nbytes, unit.tensors, tuple(_Own(folder, unit.leaves, digests)))


def make_unit(shared: bytes, own: Sequence[Any]) -> Done:
    """Make the leaves of one unit, in a process that sees the files; return their digests."""
    folder, numbers, noted = _Own(*own)
    plan, files, memory, engine, mapped, by_number = _prepare(shared)
    leaves = sorted(
        (by_number[number] for number in numbers),
        key=lambda leaf: (plan.tensors[leaf.tensor].is_reduced, leaf.number),
    )
    notes = _Notes([{"leaves": [list(note) for note in noted]}])
    with (
        Folder.open(folder) as soup,
        closing(FileSink(plan, files, soup)) as sink,
    ):
        shards = sorted({sink.file_of(leaf) for leaf in leaves})
        sink.attach(shards, resumes=bool(noted))
        ledger = FileLedger(plan, sink, notes, Digests(plan))
        reader = open_reader(plan, memory, mapped=mapped)
        # Anew for each unit: it holds what a rule has measured, or half measured before it failed.
        reducer = reducer_of(plan, memory, engine)
        read = run(plan, memory, reader, reducer, sink, ledger=ledger, leaves=leaves)
        sink.sync(shards)
    result = b"".join(ledger.digests.get(number) for number in numbers)
    return Done(read.nbytes, read.n_passes, result)


@lru_cache(maxsize=1)
def _prepare(shared: bytes) -> _Prepared:
    """Plan once for all units of a soup that this process makes, and load what is compiled."""
    plan, mapped, threads, budget = open_shared(shared)
    memory = plan_memory(plan, mapped=mapped, threads=threads, budget=budget)
    leaves = {leaf.number: leaf for leaf in plan.leaves()}
    engine = Engine(plan, compiles=memory.compiles)
    return _Prepared(plan, plan_files(plan), memory, engine, mapped, leaves)
