"""Executors as somebody else would write them, with public names of streamsoup alone."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from streamsoup import Unit

_CODE = """
import pickle, sys
work, shared, owns = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([work(shared, own) for own in owns]))
"""


class Shuffled:
    """Does units here, in any order, and some of them twice; all answers travel as pickles."""

    def __init__(self, seed: int = 0, *, most: int | None = None) -> None:
        """Stop after `most` units, as if all was lost."""
        self.random = random.Random(seed)
        self.most = most
        self.done: list[tuple[int, ...]] = []
        """The leaves of all units that were done."""
        self.n_open = 0

    def open(self) -> None:
        self.n_open += 1

    def n_cpus(self) -> int:
        return 2

    def n_slots(self, n_cpus: int, nbytes: int) -> int:
        return 3

    def run(
        self,
        work: Callable[[bytes, Any], Any],
        shared: bytes,
        units: Sequence[Unit],
        *,
        n_cpus: int,
        nbytes: int,
        on_done: Callable[[Unit, Any, str], None],
        on_wait: Callable[[], None],
    ) -> None:
        todo = list(units)
        self.random.shuffle(todo)
        for unit in todo:
            if len(self.done) == self.most:
                raise KeyboardInterrupt
            sent: Any = pickle.loads(pickle.dumps((work, unit.own)))
            for _ in range(self.random.choice((1, 2))):
                answer = pickle.loads(pickle.dumps(sent[0](shared, sent[1])))
            self.done.append(unit.leaves)
            on_done(unit, answer, f"node-{len(self.done) % 2}")
            on_wait()

    def close(self) -> None:
        raise AssertionError("an executor that was given stays open")


class Elsewhere(Shuffled):
    """Does all units in one other process."""

    def run(
        self,
        work: Callable[[bytes, Any], Any],
        shared: bytes,
        units: Sequence[Unit],
        *,
        n_cpus: int,
        nbytes: int,
        on_done: Callable[[Unit, Any, str], None],
        on_wait: Callable[[], None],
    ) -> None:
        told = pickle.dumps((work, shared, [unit.own for unit in units]))
        process = subprocess.run(
            [sys.executable, "-c", _CODE], input=told, stdout=subprocess.PIPE, check=True
        )
        for unit, answer in zip(units, pickle.loads(process.stdout), strict=True):
            on_done(unit, answer, "elsewhere")
            on_wait()
