"""A mean that takes its time, so that what makes it can be killed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from streamsoup import RuleMemory, TensorSpec


class SlowMean(msgspec.Struct, frozen=True, tag="slow_mean", forbid_unknown_fields=True):
    """The mean, with a pause for each block."""

    pause_s: float

    n_passes = 1
    spans_model = False

    def check(self, n_ingredients: int, names: Collection[str]) -> None: ...

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        return RuleMemory(per_element=16)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> SlowReduction:
        return SlowReduction(self.pause_s, n_ingredients)


class SlowReduction:
    """One tensor of it."""

    measuring = False

    def __init__(self, pause_s: float, n: int) -> None:
        self.pause_s, self.n = pause_s, n

    def start(self, tensor: TensorSpec, start: int) -> None: ...

    def measure(self, state: None, block: Any) -> None: ...

    def merge(self, state: None) -> None: ...

    def end_pass(self) -> None: ...

    def reduce(self, state: None, block: Any, out: Any) -> None:
        time.sleep(self.pause_s)
        out[:] = block.values(0)
        for i in range(1, self.n):
            out += block.values(i)
        out /= self.n
