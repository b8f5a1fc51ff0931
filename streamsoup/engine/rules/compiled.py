"""The compiled loops of merges, on blocks: where they can be had, and what of a block they take."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.engine.rules.selection import Selection
from streamsoup.kernels.philox import Key
from streamsoup.rule import Block
from streamsoup.system.cgroup import memory_limit

__all__ = ["Compiled", "find_compiled"]

Floats = NDArray[np.float64]

WORTH = 1 << 22
"""Elements of all ingredients of a group from which importing numba pays, 0.3 s."""

ROOM = 219_000_000
"""Bytes a memory cgroup must allow for compiling: as `engine.reduce.COMPILE_ROOM`."""

KINDS: dict[str, Any] = {
    "BF16": np.uint16,
    "F16": np.int16,
    "F32": np.float32,
    "F64": np.float64,
}
"""As what numba sees the elements of a dtype."""


def find_compiled(n_elements: int) -> Compiled | None:
    """Return the compiled loops if so many elements are worth them, and numba may be used."""
    is_off = os.environ.get("NUMBA_DISABLE_JIT", "").strip() not in ("", "0")
    if n_elements < WORTH or is_off or memory_limit() < ROOM:
        return None
    try:
        return Compiled()
    except (ImportError, OSError):
        return None  # numpy makes the same bits


class Compiled:
    """The loops of `kernels.merging`, on the raw elements of blocks."""

    def __init__(self) -> None:
        """Import numba; loops are compiled on first use, or come from its cache."""
        from streamsoup.kernels import merging

        self._loops: Any = merging

    def fits(self, block: Block) -> bool:
        """Return True if all ingredients have dtypes that are compiled for."""
        return all(dtype.name in KINDS for dtype in block.dtypes)

    def measures(self, selection: Selection) -> bool:
        """Return True if the next pass of a selection has a compiled loop."""
        return selection.wanted is not None

    def measure(
        self, selection: Selection, state: Any, block: Block, ingredient: int, index: int
    ) -> bool:
        """Do what `Selection.measure` does; return True if an element is not finite."""
        wanted = selection.wanted
        assert wanted is not None
        prefix, below, collects, most = wanted
        base, other = _elements(block, 0), _elements(block, ingredient)
        if not collects:
            return bool(self._loops.count(base, other, np.uint64(prefix), below - 16, state))
        room = min(most, block.n)
        keys, places = np.empty(room, np.uint64), np.empty(room, np.uint64)
        n, spoiled = self._loops.collect(
            base, other, np.uint64(prefix), min(below, 63), keys, places
        )
        state.append(np.stack([keys[:n], ~(places[:n] + np.uint64(index))]))
        return bool(spoiled)

    def whole(self, block: Block, ingredient: int, coefficient: float, out: Floats) -> bool:
        """Make products of everything."""
        spoiled = self._loops.task(_elements(block, 0), _elements(block, ingredient), out)
        with np.errstate(all="ignore"):
            out *= coefficient
        return bool(spoiled)

    def largest(
        self,
        block: Block,
        ingredient: int,
        selection: Selection,
        index: int,
        factor: float,
        coefficient: float,
        out: Floats,
    ) -> bool:
        """Make products of what is selected."""
        threshold, n_tied = selection.bounds(index, block.n)
        base, other = _elements(block, 0), _elements(block, ingredient)
        return bool(self._loops.largest(base, other, threshold, n_tied, factor, coefficient, out))

    def words(self, key: Key, start: int, n: int) -> NDArray[np.uint32]:
        """Return what `philox.words` does."""
        first = start // 4
        drawn = np.empty((-(-(start + n) // 4) - first, 4), np.uint32)
        self._loops.random_words(key.low, key.high, first, drawn)
        return drawn.reshape(-1)[start - 4 * first :][:n]

    def within(
        self,
        block: Block,
        ingredient: int,
        drawn: NDArray[np.uint32],
        density: float,
        factor: float,
        coefficient: float,
        out: Floats,
    ) -> bool:
        """Make products of what is drawn."""
        # A word below density·2³², which is exact, is one below the next whole number.
        limit = np.uint64(int(np.ceil(density * 2.0**32)))
        base, other = _elements(block, 0), _elements(block, ingredient)
        return bool(self._loops.within(base, other, drawn, limit, factor, coefficient, out))

    def elect(self, block: Block, *arguments: Any) -> None:
        """Add to the base what agrees."""
        self._loops.elect(_elements(block, 0), *arguments)


def _elements(block: Block, ingredient: int) -> NDArray[Any]:
    return np.frombuffer(block.raw[ingredient], KINDS[block.dtypes[ingredient].name])
