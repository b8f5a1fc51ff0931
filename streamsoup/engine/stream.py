"""The only loop: leaves of all ingredients through a reduction into a sink, by several threads.

Threads take leaves in the order of the plan. Each reads a block of every ingredient, reduces and
digests it, and hands the result to the sink. Nothing here knows what a soup is.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Protocol, Self

import msgspec
import xxhash

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.digest import Digests
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.read import Reader, Session
from streamsoup.engine.reduce import Reduction, Worker
from streamsoup.errors import BudgetError, Interrupted, NonFiniteError, printable
from streamsoup.kernels.environment import standard_floats
from streamsoup.kernels.leaf_digests import LeafDigests
from streamsoup.system.buffers import Bytes

__all__ = ["Nowhere", "OnlyDigests", "Progress", "Sink", "SinkSession", "run"]

CHECKPOINT_S = 0.5
"""Time between notes of what is finished: what a kill can cost. From 0.1 to 1 s no difference was
measured; each note makes the disk empty its own cache, which slow ones take long for."""

ALONE_NBYTES = 1 << 24
"""Bytes to read up to which one thread may as well be the caller's own: a blink."""

TICK_S = 0.05
"""Time between reports of progress."""


class Progress(msgspec.Struct, frozen=True):
    """How far a run has come."""

    nbytes_done: int
    """Bytes of the ingredients read, or found finished by an earlier run."""
    nbytes: int
    """Bytes of the ingredients in all."""
    elapsed_s: float


class SinkSession(Protocol):
    """What one thread hands its results to."""

    def restore(self, leaf: Leaf, nbytes: int) -> bytes | None:
        """Give the digests of a leaf that need not be made again, or None."""

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Give the memory in which the result from unit `start` on is to end, or None.

        It may then be made there; `write` is told of it all the same.
        """

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Take the result from unit `start` of the leaf's tensor on; valid during the call."""

    def close(self) -> None:
        """Give back what the session holds."""


class Sink(Protocol):
    """Where results go."""

    def session(self) -> SinkSession:
        """Give a thread its own session."""

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Take note that a leaf is complete, with its digests: the soup's, each ingredient's."""

    def checkpoint(self) -> None:
        """Make durable what is complete. Called by the main thread, now and then."""


class Nowhere:
    """A sink, and its own session, that keeps nothing of a run. Others keep some of it."""

    def session(self) -> Self:
        """Give itself."""
        return self

    def restore(self, leaf: Leaf, nbytes: int) -> bytes | None:
        """Know of nothing that was finished earlier."""
        return None

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Have no place of its own."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Let the result go."""

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Do nothing."""

    def checkpoint(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class OnlyDigests(Nowhere):
    """A sink that keeps the digests of a run, and no result."""

    def __init__(self, plan: MixPlan) -> None:
        """Make room for them."""
        self.digests = Digests(plan)

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Keep the digests of a leaf."""
        self.digests.put(leaf.number, digests)


def run(
    plan: MixPlan,
    memory: MemoryPlan,
    reader: Reader,
    reduction: Reduction,
    sink: Sink,
    *,
    digest: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Pass all leaves of `plan` through `reduction` into `sink`, each byte read once.

    Without `digest`, what is read and made is not digested, and the sink gets no digests.

    Raises the first error of any thread, after all have stopped; the sink then holds part of the
    result. An exception in the calling thread, such as KeyboardInterrupt, stops the threads within
    a block. Holds `memory.peak_nbytes` at most.
    """
    pass_ = _Pass(plan, memory, reader, reduction, sink, digest)
    started = time.monotonic()
    if memory.threads == 1 and plan.nbytes_read <= ALONE_NBYTES:
        pass_.work()
    else:
        _work_in_threads(pass_, started, on_progress)
    if pass_.errors:
        # Frames of threads that are gone hold on to buffers, on the host and on devices.
        traceback.clear_frames(pass_.errors[0].__traceback__)
        raise pass_.errors[0]
    for ingredient in plan.ingredients:
        ingredient.check_unchanged()
    if on_progress is not None:
        on_progress(Progress(plan.nbytes_read, plan.nbytes_read, time.monotonic() - started))


def _work_in_threads(
    pass_: _Pass, started: float, on_progress: Callable[[Progress], None] | None
) -> None:
    """Let the threads work; meanwhile say how far they are, and have it made durable."""
    threads = [
        threading.Thread(target=pass_.work, name=f"streamsoup-{n}", daemon=True)
        for n in range(pass_.memory.threads)
    ]
    noted = started
    try:
        for n, thread in enumerate(threads):
            try:
                thread.start()
            except RuntimeError:
                raise BudgetError(
                    f"only {n} of {len(threads)} threads can be started here; lower --threads, or "
                    "raise the limit of processes or of memory"
                ) from None
        while not pass_.ended.wait(TICK_S):
            now = time.monotonic()
            if on_progress is not None:
                progress = Progress(pass_.nbytes_done, pass_.plan.nbytes_read, now - started)
                on_progress(progress)
            if now - noted >= CHECKPOINT_S and not pass_.stop.is_set():
                pass_.sink.checkpoint()
                noted = time.monotonic()
    finally:
        pass_.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _place(number: int, shape: Sequence[int]) -> list[int]:
    """Say where in a tensor an element lies. Numpy can do so in 64 dimensions, and in no more."""
    place = []
    for length in reversed(shape):
        number, index = divmod(number, length)
        place.append(index)
    return place[::-1]


class _Block(msgspec.Struct, frozen=True):
    """A block whose result is awaited."""

    leaf: Leaf
    start: int
    n_units: int
    digests: LeafDigests | None
    """Of the leaf so far, made by the worker."""
    hashes: list[xxhash.xxh3_128]
    """Or by us: of the soup, and of each ingredient."""
    last: bool
    """Whether it is the last of its leaf."""


class _Pass:
    """What the threads of one run share."""

    def __init__(
        self,
        plan: MixPlan,
        memory: MemoryPlan,
        reader: Reader,
        reduction: Reduction,
        sink: Sink,
        digest: bool,
    ) -> None:
        self.plan, self.memory, self.reader = plan, memory, reader
        self.reduction, self.sink, self.digest = reduction, sink, digest
        self.leaves = plan.leaves()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.ended = threading.Event()
        self.errors: list[BaseException] = []
        self.nbytes_done = 0
        self.n_working = memory.threads

    def work(self) -> None:
        """Take leaves until there are none, or somebody failed."""
        try:
            under_way: deque[_Block] = deque()
            with (
                standard_floats(),
                closing(self.reader.session()) as reading,
                closing(self.sink.session()) as writing,
                closing(self.reduction.worker()) as worker,
            ):
                for leaf in self.take():
                    self.cook(leaf, reading, writing, worker, under_way)
                self.deliver(0, reading, writing, worker, under_way)
        except BaseException as error:
            with self.lock:
                self.errors.append(error)
            self.stop.set()
        finally:
            with self.lock:
                self.n_working -= 1
                if self.n_working == 0:
                    self.ended.set()

    def take(self) -> Iterator[Leaf]:
        """Give the next leaves to this thread."""
        while not self.stop.is_set():
            with self.lock:
                leaf = next(self.leaves, None)
            if leaf is None:
                return
            yield leaf

    def cook(
        self,
        leaf: Leaf,
        reading: Session,
        writing: SinkSession,
        worker: Worker,
        under_way: deque[_Block],
    ) -> None:
        """Make one leaf of the soup, but for the last blocks if the worker keeps some under way."""
        plan, memory = self.plan, self.memory
        tensor = plan.tensors[leaf.tensor]
        k = len(plan.ingredients)
        finished = writing.restore(leaf, leaf.n_units * tensor.unit_nbytes)
        if finished is not None:
            self.finish(leaf, finished)
            return
        for i, layout in enumerate(plan.layout_of):
            source = tensor.sources[layout]
            plan.ingredients[i].shards[source.shard].check_unchanged(source.offset)
        digests = worker.digests(tensor, leaf.n_units) if self.digest else None
        n_hashes = 1 + k if self.digest and digests is None else 0
        hashes = [xxhash.xxh3_128() for _ in range(n_hashes)]
        end = leaf.start + leaf.n_units
        for start in range(leaf.start, end, memory.block):
            if self.stop.is_set():
                raise Interrupted("stopped")
            n_units = min(memory.block, end - start)
            room = writing.room(leaf, start, n_units * tensor.unit_nbytes)
            worker.start(tensor, start, n_units, room)
            for first in range(0, k, memory.group):
                last = min(first + memory.group, k)
                inputs = reading.block(tensor, first, last, start, n_units)
                for digest, block in zip(hashes[1 + first :], inputs, strict=False):
                    digest.update(block)
                worker.add(first, inputs)
            ends = start + n_units == end
            under_way.append(_Block(leaf, start, n_units, digests, hashes, ends))
            self.deliver(worker.n_ahead, reading, writing, worker, under_way)

    def deliver(
        self,
        n_ahead: int,
        reading: Session,
        writing: SinkSession,
        worker: Worker,
        under_way: deque[_Block],
    ) -> None:
        """Hand results to the sink, the oldest first, until `n_ahead` are under way."""
        while len(under_way) > n_ahead:
            block = under_way.popleft()
            result = worker.result()
            if worker.spoiled and self.plan.recipe.non_finite == "refuse":
                tensor = self.plan.tensors[block.leaf.tensor]
                self.explain(tensor, block.start, block.n_units, reading)
            if block.hashes:
                block.hashes[0].update(result)
            writing.write(block.leaf, block.start, result)
            if block.last:
                made = [digest.digest() for digest in block.hashes]
                digests = block.digests.joined() if block.digests else b"".join(made)
                self.finish(block.leaf, digests)

    def finish(self, leaf: Leaf, digests: bytes) -> None:
        """Take note of a leaf that is complete."""
        self.sink.finish_leaf(leaf, digests)
        tensor = self.plan.tensors[leaf.tensor]
        with self.lock:
            self.nbytes_done += sum(
                leaf.n_units * (s.dtype.itemsize if tensor.operation == "mix" else 1)
                for s in (tensor.sources[layout] for layout in self.plan.layout_of)
            )

    def explain(self, tensor: PlannedTensor, start: int, n_units: int, reading: Session) -> None:
        """Raise `NonFiniteError`, naming the ingredient and the element that brought it in."""
        from streamsoup.kernels.blocks import first_non_finite

        measures = self.plan.recipe.only_measures
        lets_pass = "" if measures else ", or --non-finite propagate lets it pass"
        for i, ingredient in enumerate(self.plan.ingredients):
            (block,) = reading.block(tensor, i, i + 1, start, n_units)
            dtype = tensor.sources[self.plan.layout_of[i]].dtype
            bad = first_non_finite(block, dtype)
            if bad is not None:
                place = _place(start + bad[0], tensor.shape)
                raise NonFiniteError(
                    f"{ingredient.where(tensor.name)}: holds {bad[1]} at {place}, "
                    f"which would spoil {'what is measured' if measures else 'the soup'}; leave "
                    f"this ingredient out{lets_pass}"
                )
        wider = "" if tensor.dtype.name == "F64" else "a wider --dtype or "
        what, advice = "the sum is", f"choose {wider}smaller coefficients"
        if measures:
            what, advice = "products are", "nothing can be measured there"
        raise NonFiniteError(
            f"{printable(tensor.name)}: {what} too large for {tensor.dtype.name}, though every "
            f"ingredient is finite; {advice}{lets_pass}"
        )
