"""Tensors that lie side by side in every ingredient, mixed as if they were one.

A pass costs a tenth of a millisecond for each tensor, however small it is. A search makes one pass
per trial: a dozen biases would take it as long as a small model takes to be scored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from streamsoup.engine.budget import LARGEST_BLOCK
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.stream import Nowhere, Sink, SinkSession
from streamsoup.system.buffers import Bytes

__all__ = ["Apart", "Pieces", "join", "pieces_of"]


def join(plan: MixPlan) -> MixPlan:
    """Join the averaged tensors of `plan` that follow one another in the files of all ingredients.

    Each has the name of the first that went into it, and is one-dimensional. Gives the plan as it
    is where an ingredient's source has gaps between tensors. Results have the same bits; `Apart`
    takes them apart. No tensor grows beyond a block, so that threads still have work to share.
    """
    if not all(ingredient.source.contiguous for ingredient in plan.ingredients):
        return plan
    joined: list[PlannedTensor] = []
    for tensor in plan.tensors:
        if joined and _follows(joined[-1], tensor):
            n_units = joined[-1].n_units + tensor.n_units
            joined[-1] = replace(joined[-1], n_units=n_units, shape=(n_units,))
        else:
            joined.append(tensor)
    n_leaves = 0
    for number, tensor in enumerate(joined):
        joined[number] = replace(tensor, first_leaf=n_leaves)
        n_leaves += tensor.n_leaves
    return replace(plan, tensors=tuple(joined), n_leaves=n_leaves)


def _follows(before: PlannedTensor, tensor: PlannedTensor) -> bool:
    """Return True if `tensor` begins where `before` ends in every layout, with the same dtypes."""
    return (
        before.is_reduced
        and tensor.is_reduced
        and before.dtype is tensor.dtype
        and before.n_units + tensor.n_units <= LARGEST_BLOCK
        and all(
            (one.shard, one.dtype) == (other.shard, other.dtype)
            and one.offset + before.nbytes_in(layout) == other.offset
            for layout, (one, other) in enumerate(zip(before.sources, tensor.sources, strict=True))
        )
    )


class Pieces(msgspec.Struct, frozen=True):
    """What one tensor of a part is made of: tensors of the whole plan, by number; no empty ones."""

    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    """The unit of the joined tensor at which each starts."""
    unit_nbytes: int


def pieces_of(plan: MixPlan, part: MixPlan) -> tuple[Pieces, ...]:
    """Find what each tensor of `part` is made of: it has the name of the first in `plan`."""
    numbers = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
    found: list[Pieces] = []
    for tensor in part.tensors:
        number, end = numbers[tensor.name], 0
        starts: dict[int, int] = {}
        while end < tensor.n_units:
            if plan.tensors[number].n_units:
                starts[number] = end
                end += plan.tensors[number].n_units
            number += 1
        found.append(Pieces(tuple(starts), tuple(starts.values()), tensor.unit_nbytes))
    return tuple(found)


class Apart:
    """A sink for a plan, given the blocks of a part of it, whose tensors may be joined."""

    def __init__(self, sink: Sink, pieces: Sequence[Pieces]) -> None:
        """Wrap the sink of the whole plan; `pieces` are the tensors in each joined one."""
        self._sink, self._pieces = sink, pieces

    def session(self) -> SinkSession:
        """Return a thread its own session."""
        return _ApartSession(self._sink.session(), self._pieces)


class _ApartSession(Nowhere):
    def __init__(self, session: SinkSession, pieces: Sequence[Pieces]) -> None:
        self._session, self._pieces = session, pieces

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        pieces = self._pieces[leaf.tensor]
        ends = (*pieces.starts[1:], leaf.start + leaf.n_units)
        i = bisect_right(pieces.starts, start) - 1
        if start + nbytes // pieces.unit_nbytes > ends[i]:
            return None  # it lies in several tensors
        piece = replace(leaf, tensor=pieces.numbers[i])
        return self._session.room(piece, start - pieces.starts[i], nbytes)

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        pieces = self._pieces[leaf.tensor]
        size, ends = pieces.unit_nbytes, (*pieces.starts[1:], leaf.start + leaf.n_units)
        i = bisect_right(pieces.starts, start) - 1
        begin, end = start, start + len(block) // size
        while begin < end:
            stop = min(end, ends[i])
            piece = replace(leaf, tensor=pieces.numbers[i])
            ours = block[(begin - start) * size : (stop - start) * size]
            self._session.write(piece, begin - pieces.starts[i], ours)
            begin, i = stop, i + 1

    def close(self) -> None:
        self._session.close()
