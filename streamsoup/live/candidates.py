"""Candidates: the mean of some ingredients, made again and again while one of them changes.

A trial needs (Σ accepted + θᵢ) / (n+1). The sum over the accepted ingredients may be kept and
continued (see `running`), where that moves fewer bytes than reading them again.
Nothing is ever undone by subtraction: a sum that does not fit a candidate is left, or made anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from streamsoup.engine.budget import MemoryPlan, plan_memory
from streamsoup.engine.plan import MixPlan, PlannedTensor
from streamsoup.engine.read import Kept, open_reader
from streamsoup.engine.reduce import Engine, Mix, MixWorker, Reducer
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import Sink, run
from streamsoup.errors import NonFiniteError
from streamsoup.live.joined import Apart, Pieces, join, pieces_of
from streamsoup.live.running import FileSums, MemorySums, Sums, SumsPlan, open_sums
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import Bytes

__all__ = ["Candidates", "Moved"]

TIMES = 2
"""How much larger blocks may be than in other passes: no file is written, so they need not be in a
cache for a second look, and Python has less to do."""

THREAD_NBYTES = 8_000_000
"""Bytes to read for each further thread: below, starting it costs more than it brings."""


class Moved(msgspec.Struct, frozen=True):
    """What it took to make one candidate."""

    nbytes_read: int
    """Bytes of ingredients."""
    nbytes_sums: int
    """Bytes of the running sum read from and written to its scratch file."""
    elapsed_s: float
    where: str = ""
    """On which device, why there, and whether the running sum is there; empty if long ago."""


class _Part(msgspec.Struct, frozen=True):
    """Some tensors of a plan, joined where they may be, and what they are made of."""

    plan: MixPlan
    pieces: tuple[Pieces, ...]

    @classmethod
    def of(cls, whole: MixPlan, plan: MixPlan) -> _Part:
        return cls(plan, pieces_of(whole, plan))


class Candidates:
    """Makes candidates out of a fixed list of ingredients, into any sink."""

    joins = True
    """True if passes go over joined tensors (`live.joined`)."""

    def __init__(
        self,
        plan: MixPlan,
        sums: SumsPlan,
        *,
        mapped: bool,
        threads: int,
        scratch: str | None,
        where: str = "cpu",
    ) -> None:
        """Set up for a plan over all ingredients, with nothing kept yet; `where` is for `Moved`."""
        self.where = where
        self.plan = plan
        self.sums_plan = sums
        self.mapped = mapped
        self.threads = threads
        self._scratch = scratch
        self._engine = Engine(plan)
        self._kept = Kept()
        passes = join(plan) if self.joins else plan
        mixed = frozenset(t.name for t in passes.reduced)
        copied = frozenset(t.name for t in passes.copied)
        self._all = _Part.of(plan, passes)
        self._mixed = _Part.of(plan, passes.only(mixed))
        self._copied = _Part.of(plan, passes.only(copied))
        self._sums: Sums | None = None
        self._held: tuple[int, ...] = ()
        """The ingredients whose sum is kept, in order."""

    def mix(self, members: Sequence[int], sink: Sink, *, keep: bool) -> Moved:
        """Put the mean of the ingredients `members`, in that order, into `sink`.

        With `keep`, the sum of all but the last is kept for later candidates, where that is worth
        it. `sink` is one for the plan over all ingredients. Raises what `run` raises; the sink
        then holds parts of the candidate.
        """
        started = time.monotonic()
        head = tuple(members[:-1])
        worth = keep and self._is_worth(head)
        held = self._held if self._held == head[: len(self._held)] else ()
        if not worth and self._cost(head) <= self._cost(head[len(held) :]) + self._sums_cost(held):
            held = ()
        fresh = members[len(held) :]
        n_tail = len(fresh) - 1 if worth and held != head else 0
        if n_tail:
            self._held = ()  # until every block of it is added: a failure leaves it in between
            self._sums = self._sums or self.open_sums()
        divisor = float(len(members))
        try:
            if held or n_tail:
                self._run(self._mixed, fresh, divisor, sink, starts=bool(held), n_tail=n_tail)
                if n_tail:
                    self._held = head
                if self._copied.plan.tensors:
                    self._run(self._copied, [members[0], members[-1]], 2.0, sink)
            else:
                self._run(self._all, members, divisor, sink)
        except NonFiniteError:
            if self.joins:  # the same again, tensor by tensor, says in which it is
                self._run(_Part.of(self.plan, self.plan), members, divisor, sink)
            raise
        moved = self._sums_cost(held) + (self.sums_plan.nbytes if n_tail else 0)
        on_disk = self.sums_plan.place == "file"
        elapsed_s = time.monotonic() - started
        return Moved(self._cost(fresh), moved if on_disk else 0, elapsed_s, self.where)

    def forget(self) -> None:
        """Free the running sum, and close files."""
        if self._sums is not None:
            self._sums.close()
        self._sums, self._held = None, ()
        self._kept = Kept()

    def _is_worth(self, head: tuple[int, ...]) -> bool:
        """Return True if keeping the sum of `head` is cheaper than summing it again."""
        if self.sums_plan.place == "memory":
            return len(head) > 1
        return self.sums_plan.place == "file" and self._cost(head) > self.sums_plan.nbytes

    def _cost(self, members: Sequence[int]) -> int:
        """Bytes of the ingredients `members`."""
        return sum(self.plan.ingredients[i].nbytes for i in members)

    def _sums_cost(self, held: tuple[int, ...]) -> int:
        in_file = self.sums_plan.place == "file"
        return self.sums_plan.nbytes if held and in_file else 0

    def memory_of(self, part: MixPlan) -> MemoryPlan:
        """Choose the blocks of a pass over a part of the plan."""
        budget = self.sums_plan.memory
        threads = min(self.threads, 1 + part.nbytes_read // THREAD_NBYTES)
        return plan_memory(part, mapped=self.mapped, threads=threads, budget=budget, times=TIMES)

    def reducer(
        self, part: MixPlan, memory: MemoryPlan, *, starts: bool = False, n_tail: int = 0
    ) -> Reducer:
        """Return the mix of a part; it may start from the running sum and update it.

        The sum is set to that after `n_tail` of the part's ingredients, unless that is 0.
        """
        if not starts and not n_tail:
            return Mix(part, memory, self._engine)
        assert isinstance(self._sums, (MemorySums, FileSums))
        return _Trial(part, memory, self._engine, self._sums, starts, n_tail)

    def _run(
        self,
        part: _Part,
        members: Sequence[int],
        divisor: float,
        sink: Sink,
        *,
        starts: bool = False,
        n_tail: int = 0,
    ) -> None:
        """Pass some ingredients through a part of the plan."""
        rule = Linear(Coefficients((1.0,) * len(members), divisor))
        plan = part.plan.among(members, rule)
        memory = self.memory_of(plan)
        reducer = self.reducer(plan, memory, starts=starts, n_tail=n_tail)
        reader = open_reader(plan, memory, mapped=self.mapped, kept=self._kept)
        run(plan, memory, reader, reducer, Apart(sink, part.pieces))

    def open_sums(self) -> Sums:
        """Make room for the running sum."""
        return open_sums(self._mixed.plan, self.sums_plan.place, self._scratch)


class _Trial(Mix):
    """A mix that starts from the running sum, and may carry it on by all but the last."""

    def __init__(
        self,
        plan: MixPlan,
        memory: MemoryPlan,
        engine: Engine,
        sums: MemorySums | FileSums,
        starts: bool,
        n_tail: int,
    ) -> None:
        super().__init__(plan, memory, engine)
        self.sums, self.starts, self.n_tail = sums, starts, n_tail

    def worker(self) -> _TrialWorker:
        return _TrialWorker(self)


class _TrialWorker(MixWorker):
    def __init__(self, trial: _Trial) -> None:
        super().__init__(trial)
        self._trial = trial

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        super().start(tensor, start, n_units, room)
        self._start = start
        self._watch_sameness = False
        if self._trial.starts:
            self._trial.sums.read(tensor.name, start, self._in_numpy.of(self._n))

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        n_tail = self._trial.n_tail
        cut = min(max(n_tail - first, 0), len(inputs))
        fresh = first == 0 and not self._trial.starts
        if cut:
            self._accumulate(first, inputs[:cut], fresh=fresh, ends=False)
            if first + cut == n_tail:
                sums = self._in_numpy.of(self._n)
                self._trial.sums.write(self._tensor.name, self._start, sums)
        if inputs[cut:]:
            ends = first + len(inputs) == len(self._factors)
            self._accumulate(first + cut, inputs[cut:], fresh=fresh and not cut, ends=ends)
