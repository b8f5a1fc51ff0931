"""Reducers: how a block of the soup is made from that block of all ingredients, thread by thread.

A reducer makes a *worker* for each thread. The stream starts a block, adds ingredients in order, a
group at a time, and takes the result. `Mix` is the fast form of the linear rule, with one sum for
any number of ingredients; `engine.apply.Apply` serves any other rule.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from streamsoup.engine.budget import MemoryPlan
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.schedule import Schedule
from streamsoup.errors import MismatchError
from streamsoup.formats.disagreements import differing
from streamsoup.kernels import tiers
from streamsoup.kernels.constants import LEAST_NBYTES, SCRAMBLE_NBYTES, STRIPE_NBYTES
from streamsoup.kernels.cpu import (
    Mixer,
    PlainMixers,
    find_mixer,
    has_kernel,
    mixer,
    plain_mixers,
)
from streamsoup.kernels.leaf_digests import LeafDigests
from streamsoup.system.buffers import Bytes, address_of, buffer, is_same
from streamsoup.system.cgroup import memory_limit
from streamsoup.tensors import DType

if TYPE_CHECKING:
    from streamsoup.engine.read import Reader
    from streamsoup.kernels.blocks import BlockSums
    from streamsoup.kernels.merger import Merger

__all__ = [
    "Engine",
    "MeasuringWorker",
    "Mix",
    "MixWorker",
    "Nothing",
    "OnePass",
    "Reducer",
    "Worker",
    "compiled",
    "copy",
]

COMPILE_NBYTES = 1_000_000_000
"""Bytes to read from which compiling a kernel pays, before the work: some seconds, once.

Not beside the work: compiling is all Python, and waits for its turn behind the numpy threads."""

MERGER_NBYTES = 100_000_000
"""Bytes to read from which compiling the kernels of merges pays: numpy takes ten seconds for as
many, which it reads several times."""

COMPILE_ROOM = 219_000_000
"""Bytes a memory cgroup must allow for compiling: LLVM's library takes 170 MB of them as it is
mapped. Measured, with cold libraries: 22 s for a soup of 2 GB in 220 MB; in 150 MB over 400 s, in
which 127 GB were read again and again, and 31 s with numpy instead."""


K = TypeVar("K")

Noted = Callable[[Leaf], bool]
"""Returns True for a leaf that an earlier run has noted as finished."""


def compiled(*makes: Callable[[], K]) -> K | None:
    """Return what the first of some functions that can compiles: the plain one comes last.

    None where numba is switched off, in a memory group too small for it, or where it is broken: a
    warning says so (`tiers.first_compiled`).
    """
    is_off = os.environ.get("NUMBA_DISABLE_JIT", "").strip() not in ("", "0")
    if is_off or memory_limit() < COMPILE_ROOM:
        return None
    return tiers.first_compiled(*makes)


class Engine:
    """The fastest kernels that are ready: compiled if they were before, or if the job is worth it.

    Which tier may be used is asked of `tiers.tier` once. Numpy does the rest, with the same bits,
    so a run may change to a kernel at any block.
    """

    def __init__(self, plan: MixPlan, *, compiles: bool = True) -> None:
        """Load compiled kernels; for a large job, compile missing ones.

        Without `compiles`, in a memory group too small for it, or where numba is switched off
        (``NUMBA_DISABLE_JIT``), numpy does what is not in the cache. Raises `RecipeError` for a
        tier that is unknown.
        """
        self._tier = tiers.tier()
        self._mixers: dict[tuple[str, str], Mixer] = {}
        self._plain: PlainMixers | None = None
        self._merger: Merger | None = None
        self._plan, self._compiles = plan, compiles
        self._pairs: list[tuple[DType, DType]] = []
        if not isinstance(plan.recipe.rule, Linear):
            return
        pairs = {
            (tensor.sources[0].dtype, tensor.dtype)
            for tensor in plan.tensors
            if tensor.is_reduced and len({s.dtype for s in tensor.sources}) == 1
        }
        self._pairs = [pair for pair in pairs if self._tier == "fast" and has_kernel(pair[0])]
        for source, output in self._pairs:
            if (found := find_mixer(source, output)) is not None:
                self._mixers[source.name, output.name] = found
        if compiles and plan.nbytes_read >= COMPILE_NBYTES and self._nbytes_left():
            self.load()

    def _nbytes_left(self) -> int:
        """Count the bytes of weights, of one ingredient, that no compiled kernel mixes."""
        return sum(
            tensor.n_units * tensor.unit_nbytes
            for tensor in self._plan.reduced
            if self._ready([source.dtype for source in tensor.sources], tensor.dtype) is None
        )

    def load(self) -> None:
        """Compile what is missing now, where it can be: seconds, the first time on a machine."""
        if self._tier == "numpy":
            return
        for source, output in self._pairs:
            if (source.name, output.name) not in self._mixers and self._plain is None:
                fast: Callable[[], Mixer | PlainMixers] = partial(mixer, source, output)
                made = compiled(fast, plain_mixers)
                if made is None:
                    return
                if isinstance(made, PlainMixers):
                    self._plain = made
                else:
                    self._mixers[source.name, output.name] = made
        left = self._nbytes_left()
        if left and left * len(self._plan.ingredients) >= COMPILE_NBYTES:
            self._plain = compiled(plain_mixers)

    def merger(self) -> Merger | None:
        """Return the compiled kernels of merges, if they are in the cache or the job is worth them.

        Other rules than the linear one may use them; compiling takes ten seconds, once.
        """
        if self._merger is None and self._tier != "numpy":
            from streamsoup.kernels.merger import find_merger, make_merger, make_plain_merger

            self._merger = find_merger()
            is_worth = self._plan.nbytes_read >= MERGER_NBYTES
            if self._merger is None and self._compiles and is_worth:
                self._merger = compiled(make_merger, make_plain_merger)
        return self._merger

    def mixer(self, sources: Sequence[DType], output: DType) -> Mixer | None:
        """Return the compiled kernel for these dtypes, or None while numpy has to do."""
        return self._ready(sources, output)

    def _ready(self, sources: Sequence[DType], output: DType) -> Mixer | None:
        if all(source is sources[0] for source in sources):
            fast = self._mixers.get((sources[0].name, output.name))
            if fast is not None:
                return fast
        return None if self._plain is None else self._plain.of(sources, output)


class Worker(Protocol):
    """The state and buffers with which one thread reduces."""

    spoiled: bool
    """True if the last result holds a NaN or an Inf."""

    @property
    def n_ahead(self) -> int:
        """Blocks to start before the first result is asked for: accelerators work on several."""

    def digests(self, tensor: PlannedTensor, n_units: int) -> LeafDigests | None:
        """Return the digests of a leaf of `n_units` of `tensor`, filled as its blocks are made.

        Called before the first block; all blocks then come to this worker, in order. None if the
        stream has to make the digests.
        """

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block: `n_units` of `tensor` from unit `start` on.

        The result may be made in `room`, which does not overlap any ingredient.
        """

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Add the blocks of ingredients `first` and following, in order."""

    def result(self) -> Bytes:
        """Return the result of the oldest block, valid until the next one is started."""

    def close(self) -> None:
        """Release what the worker holds."""


@runtime_checkable
class MeasuringWorker(Worker, Protocol):
    """A worker that can measure leaves before it makes any."""

    def read_with(self, reader: Reader) -> None:
        """Set the reader for rules that read beyond their block; called once, at first."""

    def begin(self, leaf: Leaf) -> None:
        """Begin a leaf, to be measured or to be made."""

    def measure(self, tensor: PlannedTensor, start: int, n: int, inputs: Sequence[Bytes]) -> None:
        """Measure a block of all ingredients."""

    def measured(self) -> Any:
        """Return the state of the measured leaf, for `Schedule.merge`."""


class Reducer(Protocol):
    """Makes blocks; results do not depend on threads, nor on order and size of blocks."""

    def worker(self) -> Worker:
        """Return a thread's own worker."""

    def schedule(self, leaves: Iterable[Leaf], noted: Noted) -> Schedule:
        """Return the tasks for these leaves, in an order that threads share.

        `noted` returns True for leaves that an earlier run has made.
        """


class OnePass:
    """Mixin of reducers that make every leaf in one pass."""

    def schedule(self, leaves: Iterable[Leaf], noted: Noted) -> Schedule:
        """Return the leaves as they are."""
        return Schedule(leaves)


class Nothing(OnePass):
    """No result: reducer and worker of a pass that only digests."""

    spoiled = False
    n_ahead = 0

    def worker(self) -> Nothing:
        """Return the object itself: it holds nothing."""
        return self

    def digests(self, tensor: PlannedTensor, n_units: int) -> None:
        """Return None: the stream makes the digests."""

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block."""

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Ignore the blocks."""

    def result(self) -> Bytes:
        """Return an empty block."""
        return buffer(0)

    def close(self) -> None:
        """Do nothing: nothing is held."""


class Mix(OnePass):
    """Σᵢ cᵢ·θᵢ, and copies of what is not averaged."""

    def __init__(self, plan: MixPlan, memory: MemoryPlan, engine: Engine) -> None:
        """Hold what the workers share, all of it read-only."""
        assert isinstance(plan.recipe.rule, Linear)
        self.plan, self.rule = plan, plan.recipe.rule
        self.memory = memory
        self.engine = engine
        if self._takes_numpy():
            # Not by the threads at work: where memory is short, that may end the process.
            importlib.import_module("streamsoup.kernels.blocks")

    def _takes_numpy(self) -> bool:
        """Return True if some tensors have no compiled kernel."""
        return not all(self.is_compiled(tensor) for tensor in self.plan.reduced)

    def is_compiled(self, tensor: PlannedTensor) -> bool:
        """Return True if compiled kernels make all of a tensor, without numpy."""
        return self._whole_mixer(tensor) is not None

    def is_digested(self, tensor: PlannedTensor) -> bool:
        """Return True if compiled kernels also make the digests of a tensor."""
        mixer = self._whole_mixer(tensor)
        return mixer is not None and mixer.makes_digests

    def _whole_mixer(self, tensor: PlannedTensor) -> Mixer | None:
        """Return the kernel that makes all of a tensor, if there is one."""
        cut = self.memory.group < len(self.plan.ingredients)
        if not tensor.is_reduced or (cut and self.keeps_equal(tensor)):
            return None
        return self.engine.mixer([source.dtype for source in tensor.sources], tensor.dtype)

    def worker(self) -> MixWorker:
        """Return a thread's own worker."""
        return MixWorker(self)

    def keeps_equal(self, tensor: PlannedTensor) -> bool:
        """Return True if elements of `tensor` that are the same in all ingredients are kept.

        Not where sums of equal elements are exact: k times n bits have n + ⌈log₂ k⌉ of them.
        """
        n_bits = max(source.significant for source in tensor.sources)
        if n_bits + (len(self.plan.ingredients) - 1).bit_length() <= 53:
            return False
        return self.rule.keeps_equal(tensor.name, {source.dtype.name for source in tensor.sources})


class MixWorker:
    """One thread's sums, and the room for its results."""

    n_ahead = 0

    def __init__(self, mix: Mix) -> None:
        """Allocate sums ``(block,) float64`` and a result of the same length."""
        self._mix = mix
        plan, block = mix.plan, mix.memory.block
        widest = max((t.unit_nbytes for t in plan.tensors), default=1)
        self._result = buffer(block * widest)
        self._sums = buffer(8 * block)
        self._digests: LeafDigests | None = None
        self._leaf = self._left = 0
        """Elements of the leaf that is digested, and those of them in no block yet."""
        self.spoiled = False
        """True if the last result holds a NaN or an Inf."""

    def digests(self, tensor: PlannedTensor, n_units: int) -> LeafDigests | None:
        """Return the digests of a leaf of which compiled kernels make all blocks.

        None if the leaf or its last block is too small: see `LEAST_NBYTES` and `STRIPE_NBYTES`.
        """
        mix, self._digests = self._mix, None
        self._leaf = self._left = n_units
        least = min(tensor.sources[0].dtype.itemsize, tensor.unit_nbytes)
        block = mix.memory.block
        last = (n_units - 1) % block + 1
        is_whole = block % SCRAMBLE_NBYTES == 0 and last * least >= STRIPE_NBYTES
        if is_whole and n_units * least >= LEAST_NBYTES and mix.is_digested(tensor):
            self._digests = LeafDigests(len(mix.plan.ingredients))
        return self._digests

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block of `n_units` of `tensor`, and make it in `room`, if there is one."""
        self._tensor = tensor
        self._n = n_units
        self._left -= n_units
        self._output = self._result[: n_units * tensor.unit_nbytes] if room is None else room
        self._factors, self._divisor = self._mix.rule.coefficients.of(tensor.name)
        self._watch_sameness = self._mix.keeps_equal(tensor)
        self._done = False
        self.spoiled = False

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Add the blocks of ingredients `first` and following, in order."""
        if not self._tensor.is_reduced:
            copy(self._mix.plan, self._tensor, first, inputs, self._output)
            return
        ends = first + len(inputs) == len(self._factors)
        self._accumulate(first, inputs, fresh=first == 0, ends=ends)

    def result(self) -> Bytes:
        """Return the raw bytes of the finished block, valid until the next one is started."""
        tensor = self._tensor
        if tensor.is_reduced and not self._done:
            self.spoiled = self._in_numpy.finish(
                self._n, self._divisor, tensor.dtype, self._output, watched=self._watch_sameness
            )
        return self._output

    @cached_property
    def _in_numpy(self) -> BlockSums:
        """The sums of blocks that no compiled kernel makes in one call."""
        from streamsoup.kernels.blocks import BlockSums

        return BlockSums(self._sums)

    def _accumulate(self, first: int, inputs: Sequence[Bytes], *, fresh: bool, ends: bool) -> None:
        """Add to the sums, or with `fresh` begin them; finish what `ends`, if a kernel can."""
        tensor, plan = self._tensor, self._mix.plan
        last = first + len(inputs)
        sources = [tensor.sources[plan.layout_of[i]].dtype for i in range(first, last)]
        factors = self._factors[first:last]
        mixer = self._mix.engine.mixer(sources, tensor.dtype)
        if mixer is None:
            assert self._digests is None, "an engine never drops a kernel"
            self._in_numpy.add(self._n, inputs, sources, factors, fresh=fresh)
        else:
            # Kept within the call, if this is all; a kernel knows what is the same in all then.
            sums = 0 if fresh and ends else address_of(self._sums)
            self._done = ends and (fresh or not self._watch_sameness)
            divisor, output = (self._divisor, self._output) if self._done else (1.0, buffer(0))
            addresses = [address_of(block) for block in inputs]
            digests = 0 if self._digests is None else self._digests.address(first)
            leaf = self._leaf if self._left == 0 else 0
            result = address_of(output)
            begins = 0 if not fresh else 1 if self._watch_sameness else 2
            spoiled = mixer(
                sums, addresses, factors, begins, divisor, result, self._n, digests, leaf
            )
            if self._done:
                self.spoiled = spoiled
                return
        if self._watch_sameness:
            self._in_numpy.watch(inputs, fresh=fresh)

    def close(self) -> None:
        """Do nothing: buffers go with the worker."""


def copy(
    plan: MixPlan, tensor: PlannedTensor, first: int, inputs: Sequence[Bytes], output: Bytes
) -> None:
    """Copy a block of a tensor that no rule makes from the first ingredient into `output`.

    `inputs` are the blocks of ingredients `first` and following. Raises `MismatchError` where one
    of them differs from the first ingredient's, unless the operation is ``first``.
    """
    if first == 0:
        source = tensor.sources[plan.layout_of[0]].dtype
        if source == tensor.dtype:
            output[:] = inputs[0]
        else:  # what is delivered exactly is rounded once
            from streamsoup.kernels.blocks import rounded

            rounded(inputs[0], source, tensor.dtype, output)
    if tensor.operation == "first":
        return
    for i, block in enumerate(inputs, first):
        if not is_same(block, output):
            coded = tensor.operation == "code"
            one, other = plan.ingredients[0], plan.ingredients[i]
            raise MismatchError(differing(other, one, tensor.name, number=i + 1, coded=coded))
