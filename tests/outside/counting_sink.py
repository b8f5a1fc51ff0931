"""A sink as a package outside of streamsoup would add it: it counts what it is sent."""

from __future__ import annotations

import threading
from collections import Counter

from streamsoup import Leaf, MixPlan


class CountingSink:
    """Counts bytes and blocks by tensor; it is its own session, so it locks."""

    def __init__(self, plan: MixPlan) -> None:
        self.plan = plan
        self.nbytes: Counter[str] = Counter()
        self.n_blocks = 0
        self._lock = threading.Lock()

    def session(self) -> CountingSink:
        """Share one among all threads."""
        return self

    def room(self, leaf: Leaf, start: int, nbytes: int) -> memoryview | None:
        """Have blocks made elsewhere."""
        return None

    def write(self, leaf: Leaf, start: int, block: memoryview) -> None:
        """Count a block."""
        with self._lock:
            self.nbytes[self.plan.tensors[leaf.tensor].name] += len(block)
            self.n_blocks += 1

    def close(self) -> None:
        """Hold nothing."""


class FileOfLeaves:
    """A ledger that remembers finished leaves, as a run on another machine would tell of them."""

    def __init__(self, known: dict[int, bytes]) -> None:
        self.known = known
        self.finished: dict[int, bytes] = {}

    def noted(self, leaf: Leaf) -> bool:
        """Look a leaf up."""
        return leaf.number in self.known

    def restore(self, leaf: Leaf) -> bytes | None:
        """Believe what was noted."""
        return self.known.get(leaf.number)

    def finish_leaf(self, leaf: Leaf, digests: bytes) -> None:
        """Note a leaf."""
        self.finished[leaf.number] = digests

    def checkpoint(self) -> None:
        """Keep nothing beyond the run."""
