"""The only loop: leaves of all ingredients through a reducer into a sink, by several threads.

Threads take leaves in the order of the plan. Each reads a block of every ingredient, reduces and
digests it, and hands the result to the sink; a ledger notes which leaves are finished. Nothing here
knows what a soup is.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import NamedTuple, NoReturn, Protocol, Self

import msgspec
import xxhash

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.digest import Digests
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.read import Reader, Session
from streamsoup.engine.reduce import MeasuringWorker, Reducer, Worker
from streamsoup.engine.schedule import Task
from streamsoup.engine.unchanged import check_read
from streamsoup.errors import BudgetError, Interrupted, NonFiniteError, option, printable
from streamsoup.kernels.environment import standard_floats
from streamsoup.kernels.leaf_digests import LeafDigests
from streamsoup.options import Progress
from streamsoup.rule import usual_passes
from streamsoup.system.buffers import Bytes, buffer

__all__ = ["DigestLedger", "Ledger", "Nowhere", "Progress", "Read", "Sink", "SinkSession", "run"]

CHECKPOINT_S = 0.5
"""Time between checkpoints: the most work that a kill can cost. From 0.1 to 1 s no difference was
measured; each note makes the disk empty its own cache, which slow ones take long for."""

ALONE_NBYTES = 1 << 24
"""Bytes to read up to which a lone thread is the caller's own: milliseconds of work."""

TICK_S = 0.05
"""Time between reports of progress."""


class Read(NamedTuple):
    """What a run has read of the ingredients."""

    nbytes: int
    """In all passes; what an earlier run had finished counts once."""
    n_passes: int
    """Passes over the tensor that took most."""


class SinkSession(Protocol):
    """Where one thread puts its results."""

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return the memory in which the result from unit `start` on is to end, or None.

        It may then be made there; `write` is called all the same.
        """

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Store the result from unit `start` of the leaf's tensor on; valid during the call."""

    def close(self) -> None:
        """Release what the session holds."""


class Sink(Protocol):
    """Where results go: the first half of an output. Several runs may share one."""

    def session(self) -> SinkSession:
        """Return a thread's own session."""


class Ledger(Protocol):
    """Notes of finished leaves: the second half of an output.

    Digests of a leaf are 16 bytes of the soup's, then of each ingredient's. Methods are called by
    several threads at once, `checkpoint` by one.
    """

    def noted(self, leaf: Leaf) -> bool:
        """Return True if an earlier run has noted a leaf. Costs nothing."""

    def restore(self, leaf: Leaf) -> bytes | None:
        """Return the digests of a noted leaf whose bytes are still good, or None."""

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Note that every block of a leaf was written."""

    def checkpoint(self) -> None:
        """Make durable what is noted. Called now and then; may wait for the disk."""


class Nowhere:
    """A sink, and its own session, that ignores results."""

    def session(self) -> Self:
        """Return itself."""
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return None: results are not kept."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Ignore the result."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


class DigestLedger:
    """A ledger that keeps the digests of a run, and nothing of earlier ones."""

    def __init__(self, plan: MixPlan) -> None:
        """Allocate the digests of every leaf."""
        self.digests = Digests(plan)

    def noted(self, leaf: Leaf) -> bool:
        """Return False: no earlier run noted anything."""
        return False

    def restore(self, leaf: Leaf) -> bytes | None:
        """Return None: nothing was finished earlier."""
        return None

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Keep the digests of a leaf."""
        self.digests.put(leaf.number, digests)

    def checkpoint(self) -> None:
        """Do nothing: digests are not kept beyond the run."""


def run(
    plan: MixPlan,
    memory: MemoryPlan,
    reader: Reader,
    reducer: Reducer,
    sink: Sink,
    *,
    ledger: Ledger | None = None,
    leaves: Iterable[Leaf] | None = None,
    on_event: Callable[[Progress], None] | None = None,
) -> Read:
    """Pass all leaves of `plan` through `reducer` into `sink`, each byte read once for each pass.

    Args:
        plan: What is read and made.
        memory: Threads and blocks.
        reader: Reads the ingredients.
        reducer: Makes the results.
        sink: Receives the results.
        ledger: Digests ingredients and results, and skips leaves that an earlier run finished.
        leaves: The leaves to make; None for all. If the rule takes statistics, all leaves of
            their tensors must be among them.
        on_event: Called in the calling thread with the progress.

    Returns:
        What was read.

    Raises:
        StreamsoupError: The first error of any thread, after all have stopped; the sink then holds
            part of the result.

    Another exception in the calling thread, such as KeyboardInterrupt, stops the threads within a
    block. Holds `memory.peak_nbytes` at most.
    """
    chosen = None if leaves is None else list(leaves)
    todo = plan.leaves() if chosen is None else chosen
    pass_ = _Pass(plan, memory, reader, reducer, sink, ledger, todo)
    started = time.monotonic()
    if memory.threads == 1 and plan.nbytes_read <= ALONE_NBYTES:
        pass_.work()
    else:
        _work_in_threads(pass_, started, on_event)
    if pass_.errors:
        # Frames of threads that are gone hold on to buffers, on the host and on devices.
        traceback.clear_frames(pass_.errors[0].__traceback__)
        raise pass_.errors[0]
    # Another ledger need not keep them, and what a rule has measured has none.
    known: Digests | None = getattr(ledger, "digests", None)
    digests = None if pass_.measured or plan.is_measured else known
    check_read(plan, memory, reader, chosen, digests)
    if on_event is not None:
        on_event(Progress(pass_.nbytes_done, pass_.nbytes_done, time.monotonic() - started))
    return Read(pass_.nbytes_done, pass_.n_passes)


def _work_in_threads(
    pass_: _Pass, started: float, on_event: Callable[[Progress], None] | None
) -> None:
    """Run the threads; meanwhile report progress, and checkpoint the ledger."""
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
                    f"only {n} of {len(threads)} threads can be started here; lower "
                    f"{option('threads')}, or "
                    "raise the limit of processes or of memory"
                ) from None
        while not pass_.ended.wait(TICK_S):
            now = time.monotonic()
            if on_event is not None:
                on_event(pass_.progress(now - started))
            due = now - noted >= CHECKPOINT_S and not pass_.stop.is_set()
            if due and pass_.ledger is not None:
                pass_.ledger.checkpoint()
                noted = time.monotonic()
    finally:
        pass_.halt()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _never(leaf: Leaf) -> bool:
    """Return False: without a ledger nothing was noted."""
    return False


def _place(number: int, shape: Sequence[int]) -> list[int]:
    """Return the indices of an element. `numpy.unravel_index` is limited to 64 dimensions."""
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
    """Digests of the leaf so far, if the worker makes them."""
    hashes: list[xxhash.xxh3_128]
    """Otherwise these, made here: of the soup, and of each ingredient."""
    last: bool
    """True if it is the last of its leaf."""


class _Pass:
    """What the threads of one run share."""

    def __init__(
        self,
        plan: MixPlan,
        memory: MemoryPlan,
        reader: Reader,
        reducer: Reducer,
        sink: Sink,
        ledger: Ledger | None,
        leaves: Iterable[Leaf],
    ) -> None:
        self.plan, self.memory, self.reader = plan, memory, reader
        self.reducer, self.sink, self.ledger = reducer, sink, ledger
        noted = ledger.noted if ledger is not None else _never
        self.schedule = reducer.schedule(leaves, noted)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.ended = threading.Event()
        self.errors: list[BaseException] = []
        self.nbytes_made = self.nbytes_measured = 0
        """Bytes of leaves that are made, and of those measured, in all passes."""
        self.nbytes_settled = self.nbytes_settling = 0
        """Bytes of leaves whose group needs no more measuring, and what measuring them took."""
        self.n_passes = 1
        """Passes over the tensor that took most, so far."""
        self.n_working = memory.threads
        self.kept: dict[int, bool] = {}
        """Tensors that are not finite, by number: whether they are kept, see `masks.is_kept`."""
        self.restored: set[int] = set()
        """Those of them whose results are changed here, so that no kernel may digest them."""

    def work(self) -> None:
        """Process leaves until none are left, or a thread has failed."""
        try:
            under_way: deque[_Block] = deque()
            with (
                standard_floats(),
                closing(self.reader.session()) as reading,
                closing(self.sink.session()) as writing,
                closing(self.reducer.worker()) as worker,
            ):
                if isinstance(worker, MeasuringWorker):
                    worker.read_with(self.reader)
                for task in self.schedule.tasks():
                    if task.place is not None:
                        self.measure_leaf(task, reading, worker)
                    else:
                        self.make_leaf(task, reading, writing, worker, under_way)
                    self.schedule.finish(task)
                self.deliver(0, reading, writing, worker, under_way)
        except BaseException as error:
            with self.lock:
                self.errors.append(error)
            self.halt()
        finally:
            with self.lock:
                self.n_working -= 1
                if self.n_working == 0:
                    self.ended.set()

    @property
    def measured(self) -> bool:
        """True if a rule measured leaves: what was read then has no digests."""
        return self.nbytes_measured > 0

    @property
    def nbytes_done(self) -> int:
        """Bytes read so far, in all passes."""
        return self.nbytes_made + self.nbytes_measured

    def progress(self, elapsed_s: float) -> Progress:
        """Return the progress: measuring will go on to take what it took where it has ended."""
        with self.lock:
            nbytes = self.plan.nbytes_read
            if self.nbytes_settled:
                measuring = nbytes * self.nbytes_settling // self.nbytes_settled
            else:  # as many passes as are usual, or one more than there were
                usual = usual_passes(self.plan.recipe.rule) - 1
                measuring = nbytes * max(usual, -(-self.nbytes_measured // max(1, nbytes)))
            nbytes += max(measuring, self.nbytes_measured)
            return Progress(min(self.nbytes_done, nbytes), nbytes, elapsed_s)

    def halt(self) -> None:
        """Make every thread stop within a block."""
        self.stop.set()
        self.schedule.stop()

    def check_unchanged(self, leaf: Leaf) -> None:
        """Raise `ChangedIngredientError` if a file that holds a part of the leaf has changed."""
        tensor = self.plan.tensors[leaf.tensor]
        for ingredient in self.plan.ingredients:
            ingredient.check_unchanged(tensor.name)

    def measure_leaf(self, task: Task, reading: Session, worker: Worker) -> None:
        """Let the rule measure one leaf."""
        assert isinstance(worker, MeasuringWorker)
        leaf, k = task.leaf, len(self.plan.ingredients)
        tensor = self.plan.tensors[leaf.tensor]
        self.check_unchanged(leaf)
        end = leaf.start + leaf.n_units
        as_zeros = self.kept.get(leaf.tensor, False)
        done = False
        while not done:
            worker.begin(leaf)
            for start in range(leaf.start, end, self.memory.block):
                if self.stop.is_set():
                    raise Interrupted("stopped")
                n_units = min(self.memory.block, end - start)
                blocks = reading.block(tensor, 0, k, start, n_units)
                if as_zeros:  # pages of zeros that are only read take no memory
                    blocks = [buffer(len(blocks[0]))] * k
                worker.measure(tensor, start, n_units, blocks)
                if worker.spoiled and self.plan.recipe.non_finite == "refuse":
                    if as_zeros or not self.keeps(leaf.tensor, reading):
                        self.explain(tensor, start, n_units, reading)
                    as_zeros = True
                    break  # a mask: the leaf is measured anew
            else:
                done = True
        with self.lock:
            self.nbytes_measured += self.nbytes_of(leaf)
        self.schedule.merge(task, worker.measured())

    def keeps(self, number: int, reading: Session) -> bool:
        """Return True if a tensor that is not finite is kept as it is; see `masks.is_kept`."""
        from streamsoup.engine.masks import is_kept

        if number not in self.kept:
            tensor = self.plan.tensors[number]
            self.kept[number] = is_kept(self.plan, tensor, self.memory.block, reading)
        return self.kept[number]

    def make_leaf(
        self,
        task: Task,
        reading: Session,
        writing: SinkSession,
        worker: Worker,
        under_way: deque[_Block],
    ) -> None:
        """Make one leaf of the soup; up to `n_ahead` blocks may stay under way in the worker."""
        leaf = task.leaf
        plan, memory = self.plan, self.memory
        tensor = plan.tensors[leaf.tensor]
        k = len(plan.ingredients)
        finished = None if self.ledger is None else self.ledger.restore(leaf)
        if finished is not None:
            self.finish(leaf, finished)
            return
        if task.restores:
            self.schedule.put_off(task)
            return
        self.check_unchanged(leaf)
        if task.group is not None:
            assert isinstance(worker, MeasuringWorker)
            worker.begin(leaf)
            with self.lock:
                self.n_passes = max(self.n_passes, 1 + task.group.n_measured)
                self.nbytes_settled += self.nbytes_of(leaf)
                self.nbytes_settling += self.nbytes_of(leaf) * task.group.n_measured
        digested = self.ledger is not None
        digests = worker.digests(tensor, leaf.n_units) if digested else None
        if leaf.tensor in self.restored:
            digests = None  # the worker's would be of the result before its mask is restored
        n_hashes = 1 + k if digested and digests is None else 0
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
                for number, digest in enumerate(hashes[1 + first : 1 + last]):
                    digest.update(inputs[number])
                worker.add(first, inputs)
                del inputs  # a window is unmapped with the last view of it, before the next is made
            ends = start + n_units == end
            under_way.append(_Block(leaf, start, n_units, digests, hashes, ends))
            if self.deliver(worker.n_ahead, reading, writing, worker, under_way):
                self.make_leaf(task, reading, writing, worker, under_way)
                return

    def deliver(
        self,
        n_ahead: int,
        reading: Session,
        writing: SinkSession,
        worker: Worker,
        under_way: deque[_Block],
    ) -> bool:
        """Hand results to the sink, the oldest first, until `n_ahead` are under way.

        Returns True if a kernel has digested a result that was then changed: its leaf has to be
        made once more, without digests of the kernel.
        """
        while len(under_way) > n_ahead:
            block = under_way.popleft()
            result = worker.result()
            spoiled = worker.spoiled and self.plan.recipe.non_finite == "refuse"
            if spoiled and self.restores(block, result, reading) and block.digests is not None:
                return True
            if block.hashes:
                block.hashes[0].update(result)
            writing.write(block.leaf, block.start, result)
            if block.last:
                made = [digest.digest() for digest in block.hashes]
                digests = block.digests.joined() if block.digests else b"".join(made)
                self.finish(block.leaf, digests)
        return False

    def finish(self, leaf: Leaf, digests: bytes) -> None:
        """Record a complete leaf in the ledger and in the progress."""
        if self.ledger is not None:
            self.ledger.finish_leaf(leaf, digests)
        with self.lock:
            self.nbytes_made += self.nbytes_of(leaf)

    def nbytes_of(self, leaf: Leaf) -> int:
        """Return the bytes of a leaf in all ingredients."""
        tensor = self.plan.tensors[leaf.tensor]
        return sum(leaf.n_units * tensor.unit_nbytes_in(layout) for layout in self.plan.layout_of)

    def restores(self, block: _Block, result: Bytes, reading: Session) -> bool:
        """Return True if a mask was put back into a result that is not finite; see `masks`.

        Raises `NonFiniteError` if the result is not a mask.
        """
        from streamsoup.engine.masks import restore

        number = block.leaf.tensor
        tensor = self.plan.tensors[number]
        if self.plan.measures:
            self.explain(tensor, block.start, block.n_units, reading)
        changed = None
        if self.keeps(number, reading):
            (given,) = reading.block(tensor, 0, 1, block.start, block.n_units)
            changed = restore(self.plan, tensor, given, result)
        if changed is None:
            self.explain(tensor, block.start, block.n_units, reading)
        if changed:
            self.restored.add(number)
        return changed

    def explain(
        self, tensor: PlannedTensor, start: int, n_units: int, reading: Session
    ) -> NoReturn:
        """Raise `NonFiniteError`, naming the ingredient and the element that brought it in."""
        from streamsoup.kernels.blocks import first_non_finite

        measures = self.plan.measures
        lets_pass = "" if measures else f", or {option('non_finite', 'propagate')} lets it pass"
        for i, ingredient in enumerate(self.plan.ingredients):
            (block,) = reading.block(tensor, i, i + 1, start, n_units)
            dtype = tensor.sources[self.plan.layout_of[i]].dtype
            bad = first_non_finite(block, dtype)
            if bad is not None:
                place = _place(start + bad[0], tensor.shape)
                which = f"{i + 1} of {len(self.plan.ingredients)}"
                raise NonFiniteError(
                    f"{ingredient.where(tensor.name)}: holds {bad[1]} at {place}, "
                    f"which would spoil {'what is measured' if measures else 'the soup'}; leave "
                    f"this ingredient ({which}) out{lets_pass}"
                )
        wider = "" if tensor.dtype.name == "F64" else f"a wider {option('dtype')} or "
        what, advice = "the sum is", f"choose {wider}smaller coefficients"
        if measures:
            what, advice = "products are", "nothing can be measured there"
        raise NonFiniteError(
            f"{printable(tensor.name)}: {what} too large for {tensor.dtype.name}, though every "
            f"ingredient is finite; {advice}{lets_pass}"
        )
