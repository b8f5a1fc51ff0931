"""Candidates of a sweep: soups of the same ingredients, each by a rule of its own.

Each is made from the ingredients anew, in as many passes as its rule takes, straight into where it
is scored. What stays from one to the next is the mapped files and the compiled kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamsoup.engine.budget import memory_budget, plan_memory
from streamsoup.engine.plan import MixPlan
from streamsoup.engine.read import Kept, open_reader
from streamsoup.engine.reduce import Engine
from streamsoup.engine.reducers import reducer_of
from streamsoup.engine.stream import Sink, run
from streamsoup.live.candidates import Moved
from streamsoup.options import Options

if TYPE_CHECKING:
    from streamsoup.live.mix import LiveMix
    from streamsoup.live.model import ModelSink

__all__ = ["RuleCandidates"]


class RuleCandidates:
    """Makes soups of a fixed list of ingredients by any rule, into any sink.

    Stands in for `Candidates` where a search differs in rules, not in ingredients.
    """

    def __init__(
        self, plan: MixPlan, sink: ModelSink | None, *, mapped: bool, options: Options
    ) -> None:
        """Make nothing yet.

        Args:
            plan: A plan over the ingredients, of any rule.
            sink: The live model that candidates go to; None if they are written to files.
            mapped: True if files are mapped, False if they are read.
            options: Memory, threads and device.
        """
        self.rule = plan.recipe.rule
        """The rule of the next candidate."""
        self._plan, self._mapped, self._options = plan, mapped, options
        self._engine = Engine(plan)
        self._kept = Kept()
        self._live: LiveMix | None = None
        self._where = "cpu, on the way to disk"
        if sink is not None:
            from streamsoup.live.mix import LiveMix, device_text

            self._where = device_text(sink, options)
            self._live = LiveMix(plan, sink, mapped=mapped, options=options, engine=self._engine)

    def mix(self, members: Sequence[int], sink: Sink, *, keep: bool) -> Moved:
        """Put the soup of the ingredients `members` by `rule` into `sink`; no sum is kept.

        Raises what `run` raises; the sink then holds parts of the candidate.
        """
        started = time.monotonic()
        plan = self._plan.among(members, self.rule)
        if self._live is not None:
            reducer, memory = self._live.reducer(plan)
        else:
            memory = plan_memory(
                plan,
                mapped=self._mapped,
                threads=self._options.n_threads,
                budget=memory_budget(plan, self._options.memory),
            )
            reducer = reducer_of(plan, memory, self._engine)
        reader = open_reader(plan, memory, mapped=self._mapped, kept=self._kept)
        read = run(plan, memory, reader, reducer, sink)
        return Moved(read.nbytes, 0, time.monotonic() - started, self._where)

    def forget(self) -> None:
        """Let go of the mapped files."""
        self._kept = Kept()
