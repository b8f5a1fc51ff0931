"""The reducer for any rule: its measuring passes, and the last one, over blocks of all ingredients.

`Apply` serves rules that have no faster form. It widens ingredients to float64 when the rule asks
for them, rounds the rule's result once, and knows nothing else about the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.read import Reader, Session
from streamsoup.engine.reduce import copy
from streamsoup.engine.schedule import Group, Schedule
from streamsoup.kernels.blocks import array_of, finish, widen
from streamsoup.kernels.merger import Merger
from streamsoup.rule import Block, Reduction
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import DType, TensorSpec

__all__ = ["Apply", "ApplyWorker"]

Floats = NDArray[np.float64]


@runtime_checkable
class Compilable(Protocol):
    """A reduction that makes its elements in compiled loops where the engine has some."""

    merger: Merger | None
    """The loops; None to do without. Set before the first pass."""

    def reduce_rounded(self, state: Any, block: Block, dtype: DType, output: Bytes) -> bool:
        """Do what `reduce` does, rounded once; return True if a result is not finite."""


class Apply:
    """The recipe's rule, applied to every tensor that it makes; others are copied."""

    def __init__(
        self,
        plan: MixPlan,
        memory: MemoryPlan,
        merger: Callable[[], Merger | None] = lambda: None,
    ) -> None:
        """Make a reduction for each group of tensors; nothing is measured yet.

        `merger` is called if the rule has use for compiled loops.
        """
        self.plan, self.memory = plan, memory
        rule, k = plan.recipe.rule, len(plan.ingredients)
        together = [plan.reduced] if rule.spans_model else [(each,) for each in plan.reduced]
        self.reductions: dict[str, Reduction] = {}
        """By the name of a tensor: that of its group."""
        for tensors in together:
            ordered = sorted((each.spec for each in tensors), key=lambda spec: spec.name)
            if ordered:
                reduction = rule.reduction(ordered, k)
                self.reductions |= {spec.name: reduction for spec in ordered}
        compilable = [each for each in self.reductions.values() if isinstance(each, Compilable)]
        loops = merger() if compilable else None
        for each in compilable:
            each.merger = loops

    def schedule(self, leaves: Iterable[Leaf], noted: Callable[[Leaf], bool]) -> Schedule:
        """Return the copies first, then each group, its leaves in order of names and places."""
        every = list(leaves)
        copies = [leaf for leaf in every if not self.plan.tensors[leaf.tensor].is_reduced]
        made = [leaf for leaf in every if self.plan.tensors[leaf.tensor].is_reduced]
        return Schedule(copies, self._groups(made), noted)

    def _groups(self, leaves: Sequence[Leaf]) -> Iterator[Group]:
        """Yield the groups in the order of the plan."""
        n_measuring = self.plan.recipe.rule.n_passes - 1
        for _, found in groupby(leaves, key=lambda leaf: id(self.reductions[self._name(leaf)])):
            ordered = sorted(found, key=lambda leaf: (self._name(leaf), leaf.start))
            yield Group(self.reductions[self._name(ordered[0])], ordered, n_measuring)

    def _name(self, leaf: Leaf) -> str:
        return self.plan.tensors[leaf.tensor].name

    def worker(self) -> ApplyWorker:
        """Return a thread's own worker."""
        return ApplyWorker(self)


class ApplyWorker:
    """One thread's block, and the state of its leaf."""

    n_ahead = 0

    def __init__(self, apply: Apply) -> None:
        """Allocate results: ``(block,)`` in float64, and rounded."""
        self._apply = apply
        plan, block = apply.plan, apply.memory.block
        widest = max((tensor.dtype.itemsize for tensor in plan.reduced), default=1)
        self._result, self._sums = buffer(block * widest), np.empty(block)
        self._state: Any = None
        self._reader: Reader | None = None
        self._elsewhere: Session | None = None
        self.spoiled = False

    def read_with(self, reader: Reader) -> None:
        """Set the reader for rules that read beyond their block."""
        self._reader = reader

    def digests(self, tensor: PlannedTensor, n_units: int) -> None:
        """Return None: the stream makes the digests."""

    def begin(self, leaf: Leaf) -> None:
        """Begin a leaf, whose blocks follow in order."""
        tensor = self._apply.plan.tensors[leaf.tensor]
        if tensor.is_reduced:
            self._reduction = self._apply.reductions[tensor.name]
            self._state = self._reduction.start(tensor.spec, leaf.start)

    def measure(self, tensor: PlannedTensor, start: int, n: int, inputs: Sequence[Bytes]) -> None:
        """Let the rule measure a block of all ingredients."""
        block = self._block(tensor, start, n, inputs)
        self._reduction.measure(self._state, block)
        self.spoiled = block.spoiled

    def measured(self) -> Any:
        """Return the state of the measured leaf."""
        return self._state

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block, and make it in `room`, if there is one."""
        self._tensor, self._start, self._n = tensor, start, n_units
        self._output = self._result[: n_units * tensor.unit_nbytes] if room is None else room
        if not tensor.is_reduced and room is None:
            self._output = buffer(n_units * tensor.unit_nbytes)
        self.spoiled = False

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Make the block of all ingredients at once."""
        tensor, plan = self._tensor, self._apply.plan
        if not tensor.is_reduced:
            copy(plan, tensor, first, inputs, self._output)
            return
        assert (first, len(inputs)) == (0, len(plan.ingredients))
        block = self._block(tensor, self._start, self._n, inputs)
        reduction = self._reduction
        if isinstance(reduction, Compilable) and reduction.merger is not None:
            spoiled = reduction.reduce_rounded(self._state, block, tensor.dtype, self._output)
            self.spoiled = spoiled or block.spoiled
            return
        sums = self._sums[: self._n]
        reduction.reduce(self._state, block, sums)
        spoiled = finish(sums, 1.0, tensor.dtype, array_of(self._output))
        self.spoiled = spoiled or block.spoiled

    def result(self) -> Bytes:
        """Return the bytes of the finished block, valid until the next one is started."""
        return self._output

    def close(self) -> None:
        """Release the state of the last leaf, and the session for reads elsewhere."""
        self._state = None
        if self._elsewhere is not None:
            self._elsewhere.close()

    def _block(
        self, tensor: PlannedTensor, start: int, n: int, inputs: Sequence[Bytes]
    ) -> RawBlock:
        dtypes = [tensor.sources[layout].dtype for layout in self._apply.plan.layout_of]
        return RawBlock(tensor.spec, start, n, dtypes, inputs, partial(self._read, tensor))

    def _read(self, tensor: PlannedTensor, ingredient: int, start: int, n: int) -> Floats:
        """Return any range of a tensor, read with a session of its own."""
        assert self._reader is not None
        if self._elsewhere is None:
            self._elsewhere = self._reader.session()
        values, most = np.empty(n), self._apply.memory.block
        dtype = tensor.sources[self._apply.plan.layout_of[ingredient]].dtype
        for begin in range(0, n, most):
            n_units = min(most, n - begin)
            (raw,) = self._elsewhere.block(
                tensor, ingredient, ingredient + 1, start + begin, n_units
            )
            with np.errstate(invalid="ignore"):  # signalling NaNs
                values[begin : begin + n_units] = widen(array_of(raw), dtype)
        return values


class RawBlock:
    """The block that a rule is given: implements `streamsoup.rule.Block`."""

    def __init__(
        self,
        tensor: TensorSpec,
        start: int,
        n: int,
        dtypes: Sequence[DType],
        raw: Sequence[Bytes],
        read: Callable[[int, int, int], Floats],
    ) -> None:
        """Hold the blocks of all ingredients, and a function that reads any range of the tensor."""
        self._read = read
        self.tensor, self.start, self.n, self.dtypes, self.raw = tensor, start, n, dtypes, raw
        self.spoiled = False

    def values(self, ingredient: int) -> Floats:
        """Return an ingredient's elements as float64, in memory that the caller may change."""
        with np.errstate(invalid="ignore"):  # signalling NaNs
            stored = widen(array_of(self.raw[ingredient]), self.dtypes[ingredient])
            values = stored.astype(np.float64)
        if not np.isfinite(values).all():
            self.spoiled = True
        return values

    def values_at(self, ingredient: int, start: int, n: int) -> Floats:
        """Return any elements of the tensor as float64."""
        return self._read(ingredient, start, n)

    def spoil(self) -> None:
        """Report a NaN or an Inf among the elements."""
        self.spoiled = True
