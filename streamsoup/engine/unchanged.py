"""Is what was read what the ingredients hold? Digests decide where time stamps cannot.

A file written in place and then given its old time stamp (``rsync --inplace -t``) has its old size
and time; only its change time differs, as it does after a new hard link, a backup that restores
access times, or a change of owner. The source then names its *suspects*, tensors that may have
changed (`formats.source.Suspects`), at the end of a pass:

1. What the pass read of these tensors is known by the digests of their leaves.
2. These leaves are read once more. If each has its digest still, all of the pass read what is
   there now, and no older or newer bytes were mixed.
3. If the file changed while step 2 read it, the source names them again, by its change time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import xxhash

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.digest import SIZE, Digests
from streamsoup.engine.plan import Leaf, MixPlan
from streamsoup.engine.read import Reader, Session
from streamsoup.errors import ChangedIngredientError
from streamsoup.formats.source import Source, Suspects

__all__ = ["check_read"]


def check_read(
    plan: MixPlan,
    memory: MemoryPlan,
    reader: Reader,
    leaves: Sequence[Leaf] | None,
    digests: Digests | None,
    *,
    checksums: bool = True,
) -> None:
    """Raise `ChangedIngredientError` unless all ingredients hold what a pass has read of them.

    Args:
        plan: What was read.
        memory: The size of blocks; one thread's share is held.
        reader: What it was read with.
        leaves: The leaves that the pass has made; None for all of the plan.
        digests: Their digests; None where there are none. Then a change that has an innocent
            explanation is taken for that, and any other raises.
        checksums: Compare what sources have checksums of; not where that was done by the processes
            that have read it.

    Costs a `stat` for each file; suspected leaves are read once more, and what a source has a
    checksum of and was not read whole.
    """
    sources: dict[int, Source] = {}
    columns: dict[int, list[int]] = {}
    for i, ingredient in enumerate(plan.ingredients):
        sources[id(ingredient.source)] = ingredient.source
        columns.setdefault(id(ingredient.source), []).append(i)
    names = _names(plan, leaves)
    for key, source in sources.items():
        source.check_unchanged()
        if checksums:
            source.check_read(names)
        while (suspects := source.suspects(strict=digests is not None)) is not None:
            with closing(reader.session()) as reading:
                for i in columns[key]:
                    _read_again(plan, memory, reading, leaves, digests, i, suspects)
            source.settle(suspects)


def _names(plan: MixPlan, leaves: Sequence[Leaf] | None) -> list[str]:
    """Return the names of the tensors that a pass was over."""
    if leaves is None:
        return [tensor.name for tensor in plan.tensors]
    return [plan.tensors[i].name for i in sorted({leaf.tensor for leaf in leaves})]


def _read_again(
    plan: MixPlan,
    memory: MemoryPlan,
    reading: Session,
    leaves: Sequence[Leaf] | None,
    digests: Digests | None,
    i: int,
    suspects: Suspects,
) -> None:
    """Compare the suspected leaves of ingredient `i` with their digests."""
    names = frozenset(suspects.tensors)
    for leaf in plan.leaves() if leaves is None else leaves:
        tensor = plan.tensors[leaf.tensor]
        if tensor.name not in names:
            continue
        digest = xxhash.xxh3_128()
        end = leaf.start + leaf.n_units
        for start in range(leaf.start, end, memory.block) if digests is not None else ():
            n_units = min(memory.block, end - start)
            digest.update(reading.block(tensor, i, i + 1, start, n_units)[0])
        if digests is None or digest.digest() != digests.get(leaf.number)[SIZE * (1 + i) :][:SIZE]:
            why = "its content differs" if digests is not None else "its change time is newer"
            raise ChangedIngredientError(
                f"{plan.ingredients[i].where(tensor.name)}: was written in place while it was "
                f"being read: {why}, though size and time stamp are the same; run again once no "
                "other process writes to it"
            )
