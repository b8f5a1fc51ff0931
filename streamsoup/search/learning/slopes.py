"""The loss of a mixture in a live model, and its slopes by every coefficient, streamed from disk.

With θ(c) = Σᵢ cᵢ·θᵢ and g = ∇L at θ(c), ∂L/∂cᵢ = ⟨g, θᵢ⟩, tensor by tensor. So one model and one
gradient are all that is held, whatever the number of ingredients: a pass over the files mixes,
a backward pass gives g, and another pass multiplies, tensor by tensor (`backward`).

What is the same in all ingredients is read from the first alone: with coefficients that sum to 1
its slopes cancel, and it is put into the model once. What is the same in some of them is multiplied
once for those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.budget import MemoryPlan, memory_budget
from streamsoup.engine.inner import (
    Dot,
    Sums,
    Vector,
    fastest_products,
    floats_of,
    plan_inner_memory,
)
from streamsoup.engine.plan import MixPlan
from streamsoup.engine.read import open_reader
from streamsoup.engine.reduce import Engine, Nothing
from streamsoup.engine.rules.linear import Linear
from streamsoup.engine.stream import DigestLedger, Nowhere, run
from streamsoup.errors import TaskError
from streamsoup.live.joined import Apart, pieces_of
from streamsoup.options import Options
from streamsoup.recipe import Coefficients
from streamsoup.search.learning.backward import Gradients
from streamsoup.search.learning.parametrisation import Parametrisation
from streamsoup.task import Task
from streamsoup.task.running import contained

if TYPE_CHECKING:
    from streamsoup.live.model import ModelSink

__all__ = ["Evaluation", "Slopes", "find_equal"]

Floats = NDArray[np.float64]

N_PASSES = 20
"""Passes of products that any search takes: what compiling for them is weighed against."""


PARTS = 64
"""Plans of products that are kept, one for each set of tensors that came with gradients."""


class Evaluation(msgspec.Struct, frozen=True):
    """The losses of one mixture, and their slopes."""

    loss: float
    """Mean over the examples that are learned from."""
    guard: float
    """Mean over the examples that are held out to validate; NaN if none are."""
    slopes: Floats
    """∂loss/∂c ``(group, ingredient)``; zero if only the losses were asked for, or not finite."""
    beta_slope: float
    n_batches: int
    """Batches seen, including those held out."""


def find_equal(
    plan: MixPlan, *, mapped: bool, options: Options
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Find the tensors of floats that have the same bits in several ingredients; one pass.

    Returns, for each by name, the first ingredient that every ingredient equals there:
    ``(0, 0, 2)`` where the second has what the first has. Tensors that differ in all are left out.
    Also returns the bytes read.
    """
    floats = floats_of(plan)
    memory = _inner_memory(floats, mapped=mapped, options=options)
    ledger = DigestLedger(floats)
    reader = open_reader(floats, memory, mapped=mapped)
    run(
        floats,
        memory,
        reader,
        Nothing(),
        Nowhere(),
        ledger=ledger,
        on_event=options.on_event,
    )
    equal = {}
    k = len(plan.ingredients)
    for t, tensor in enumerate(floats.tensors):
        contents = [
            (tensor.sources[plan.layout_of[i]].dtype, ledger.digests.of_tensor(t, i))
            for i in range(k)
        ]
        firsts = tuple(map(contents.index, contents))
        if len(set(firsts)) < k:
            equal[tensor.name] = firsts
    return equal, floats.nbytes_read


class _Share(msgspec.Struct, frozen=True):
    """Tensors that the same ingredients have in common, and one of each to multiply."""

    plan: MixPlan
    """Of the tensors, in the ingredients that differ."""
    of: tuple[int, ...]
    """For every ingredient, the number of the one in the plan that equals it."""


class Slopes:
    """A live model, the ingredients on disk, and a task's loss."""

    def __init__(
        self,
        task: Task,
        sink: ModelSink,
        parametrisation: Parametrisation,
        equal: Mapping[str, tuple[int, ...]],
        *,
        split: str,
        guard_split: str | None,
        guard_every: int,
        mapped: bool,
        options: Options,
    ) -> None:
        """Plan the passes; `equal` is what `find_equal` gave.

        Every `guard_every`-th batch of the split is held out to validate; 0 disables it.
        """
        from streamsoup.live.mix import LiveMix

        self.nbytes_read = 0
        """Bytes of ingredients read so far."""
        self.n_passes = 0
        """Passes over the ingredients so far: mixes, and products."""
        self.waited_s = 0.0
        """Time spent in them, of which some overlaps with nothing."""
        self._task, self._sink, self._parametrisation = task, sink, parametrisation
        self._split, self._guard_split, self._guard_every = split, guard_split, guard_every
        self._mapped, self._options = mapped, options
        plan = sink.plan
        everyone = tuple(range(len(plan.ingredients)))
        sharing: dict[tuple[int, ...], list[str]] = {}
        for tensor in floats_of(plan).tensors:
            sharing.setdefault(equal.get(tensor.name, everyone), []).append(tensor.name)
        self._free = parametrisation.constraint == "free"
        common = sharing.pop((0,) * len(everyone), [])
        self._own = plan.only({name for names in sharing.values() for name in names})
        self._fixed = plan.only({t.name for t in plan.copied})
        self._common = plan.only(common).among([0], Linear(Coefficients.uniform(1)))
        self._shares: list[_Share] = []
        for firsts, names in sharing.items():
            read = sorted(set(firsts))
            of = tuple(map(read.index, firsts))
            few = plan.only(names).among(read, Linear(Coefficients.uniform(len(read))))
            self._shares.append(_Share(few, of))
        if self._free and common:
            self._shares.append(_Share(self._common, (0,) * len(everyone)))
        self._mix = LiveMix(plan, sink, mapped=mapped, options=options, engine=Engine(plan))
        memory = _inner_memory(self._own, mapped=mapped, options=options)
        self._products = fastest_products(
            self._own, N_PASSES * len(everyone), compiles=memory.compiles
        )
        self._versions: list[int] | None = None
        """How often each tensor of the model had been changed when it was last mixed into."""
        self._parts: dict[frozenset[str], tuple[MixPlan, MemoryPlan, Any]] = {}
        self._n_batches: int | None = None
        learned = {tensor.name for tensor in self._own.tensors}
        if self._free:
            learned |= {tensor.name for tensor in self._common.tensors}
        self._learned = [name for name in sink.targets if name in learned]

    @property
    def nbytes_of_mix(self) -> int:
        """Bytes that one mix reads, but for what is read once."""
        return self._own.nbytes_read + (self._common.nbytes_read if self._free else 0)

    @property
    def nbytes_of_products(self) -> int:
        """Bytes that one pass of products reads at most."""
        return sum(share.plan.nbytes_read for share in self._shares)

    @property
    def nbytes_once(self) -> int:
        """Bytes that are read once: what all have in common, and what is copied."""
        common = 0 if self._free else self._common.nbytes_read
        return common + self._fixed.nbytes_read

    def count(self, n_batches: int) -> None:
        """Set the number of batches, as an earlier run counted them."""
        self._n_batches = n_batches

    @property
    def n_batches(self) -> int | None:
        """Batches of the split, once they have been counted."""
        return self._n_batches

    def evaluate(self, raw: Floats, *, backward: bool) -> Evaluation:
        """Return the mean loss over all batches of the split, with its slopes if `backward`."""
        self.mix(raw)
        with self._at_work(backward=backward, seed=0) as gradients:
            gradients.begin(raw)
            loss, guard, n = gradients.sweep(self._task.losses(self._sink.model, self._split))
            if self._n_batches not in (None, n):
                raise TaskError(
                    f"{self._task.name}: loss yielded {n} batches, and {self._n_batches} before; "
                    "a search needs the same ones each time"
                )
            self._n_batches = n
            slopes, beta_slope = (
                np.zeros((len(self._parametrisation.groups), self._parametrisation.n_ingredients)),
                0.0,
            )
            if backward and math.isfinite(loss):
                slopes, beta_slope = gradients.take()
                self.n_passes += 1
            if self._guard_split is not None:
                guard = gradients.watch(self._task.losses(self._sink.model, self._guard_split))
        return Evaluation(loss, guard, slopes, beta_slope, n)

    def epoch(
        self, raw: Floats, n: int, skip: int, advance: Callable[[Floats, Evaluation], Floats]
    ) -> Floats:
        """Go once through the batches that are learned from; epoch `n` skips `skip` of them.

        Each is evaluated with the raw numbers that `advance` returned for the one before. A
        generator computes a batch when it is asked for, so each step mixes first, and then asks.
        """
        assert self._n_batches is not None
        # A loss may shuffle: batches are held out by place, so all epochs have one order then.
        with self._at_work(backward=True, seed=0 if self._guard_every else n) as gradients:
            batches = iter(self._task.losses(self._sink.model, self._split))
            n_learned = 0
            for index in range(self._n_batches):
                learns = not self.watches(index)
                looks = learns and n_learned >= skip
                if looks:
                    self.mix(raw)
                    gradients.begin(raw)
                found = next(batches, None)
                if found is None:
                    break
                batch, n_examples = found
                if not (learns and n_examples):
                    continue  # the mean over none is a NaN
                n_learned += 1
                if looks:
                    loss = gradients.learn(batch)
                    slopes, beta_slope = gradients.take()
                    self.n_passes += 1
                    raw = advance(raw, Evaluation(loss, math.nan, slopes, beta_slope, 1))
        return raw

    def watches(self, index: int) -> bool:
        """Return True if a batch of the split is held out to validate."""
        return self._guard_every > 0 and index % self._guard_every == self._guard_every - 1

    @contextmanager
    def _at_work(self, *, backward: bool, seed: int) -> Iterator[Gradients]:
        """Prepare the model for the task's code, and restore it afterwards."""
        import torch

        with contained(self._task, "loss", seed=seed):
            gradients = Gradients(self, self._sink, self._parametrisation, self._learned, backward)
            try:
                with torch.set_grad_enabled(backward):
                    yield gradients
            finally:
                gradients.close()

    def mix(self, raw: Floats) -> None:
        """Put the mixture of these raw numbers into the model."""
        self._sink.check()
        versions = self._sink.versions()
        # A loss may change its model, in training mode say.
        untouched = versions is not None and versions == self._versions
        if not untouched:
            self._mix_part(self._fixed, Coefficients.uniform(len(self._fixed.ingredients)))
        self._mix_part(self._own, self._parametrisation.coefficients(raw))
        self.n_passes += 1
        if self._free and self._common.tensors:
            rows = self._parametrisation.rows(raw)
            totals: dict[str, tuple[float, ...]] = {
                tensor.name: (float(rows[self._parametrisation.group_of[tensor.name]].sum()),)
                for tensor in self._common.tensors
            }
            self._mix_part(self._common, Coefficients((1.0,), per_tensor=totals))
        elif not untouched:
            self._mix_part(self._common, Coefficients((1.0,)))
        self._versions = self._sink.versions()

    def _mix_part(self, plan: MixPlan, coefficients: Coefficients) -> None:
        if not plan.tensors:
            return
        part = plan.among(range(len(plan.ingredients)), Linear(coefficients))
        mix, memory = self._mix.reducer(part)
        reader = open_reader(part, memory, mapped=self._mapped, kept=self._mix.kept)
        started = time.monotonic()
        to_model = Apart(self._sink, pieces_of(self._sink.plan, part))
        try:
            run(part, memory, reader, mix, to_model)
        finally:
            self._sink.mark_changed()
        self._count(part.nbytes_read, started)

    def _count(self, nbytes: int, started: float) -> None:
        self.nbytes_read += nbytes
        self.waited_s += time.monotonic() - started

    def products(self, vectors: dict[str, Vector]) -> Iterator[tuple[str, Floats]]:
        """Multiply gradients with their tensors in all ingredients; yield ⟨g, θᵢ⟩ for each.

        With coefficients that sum to 1, what all ingredients have in common is left out.
        """
        for share in self._shares:
            names = frozenset(t.name for t in share.plan.tensors if t.name in vectors)
            if not names:
                continue
            if names not in self._parts:
                if len(self._parts) >= PARTS:  # what has gradients may be new at every step
                    self._parts.clear()
                plan = share.plan.only(names)
                memory = _inner_memory(plan, mapped=self._mapped, options=self._options)
                reader = open_reader(plan, memory, mapped=self._mapped, kept=self._mix.kept)
                self._parts[names] = plan, memory, reader
            plan, memory, reader = self._parts[names]
            started = time.monotonic()
            dot = Dot(plan, memory, vectors, self._products)
            sums = Sums(plan, dot.n_values)
            run(plan, memory, reader, dot, sums)
            self._count(plan.nbytes_read, started)
            for tensor, values in zip(plan.tensors, sums.of_tensors, strict=True):
                first = values[0]
                values[0] = 0.0
                slopes = values[list(share.of)]
                yield tensor.name, slopes + first if self._free else slopes


def _inner_memory(plan: MixPlan, *, mapped: bool, options: Options) -> MemoryPlan:
    return plan_inner_memory(
        plan,
        len(plan.ingredients),
        mapped=mapped,
        threads=options.n_threads,
        budget=memory_budget(plan, options.memory),
    )
