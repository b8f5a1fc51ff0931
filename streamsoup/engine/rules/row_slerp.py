"""NuSLERP row by row: each row of a tensor turns by an angle of its own.

A row is all that lies behind the first dimension; a tensor of one dimension or none is one row.
With a base, the first of the recipe, rows of task vectors are turned, and added to it.
`kernels.merges_reference.row_slerp` specifies the rule element by element.

Inner products of a row are summed in 64 lanes: element e of the row belongs to lane e mod 64; each
lane is added up in order, then the lanes in order. So they depend on neither blocks nor threads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from streamsoup.engine.rules.terms import row_length
from streamsoup.errors import RecipeError
from streamsoup.rule import Block, RuleMemory
from streamsoup.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["RowSlerp"]

LANES = 64

PART = LANES << 8
"""Elements of a row that are read at once where it is longer than a block."""

BATCH = 1 << 13
"""Elements of short rows that are turned at once: Python holds numbers for each row."""

BATCH_NBYTES = 500 * BATCH
"""Bytes of those numbers and lanes, where rows have one element each."""

NO_ANGLE = 1e-16
"""1 − cos²Ω up to which two rows are taken to lie on one line, and are averaged straight."""


class RowSlerp(msgspec.Struct, frozen=True, tag="row_slerp", forbid_unknown_fields=True):
    """(sin((1−t)Ω)·x + sin(tΩ)·y) / sin Ω for each row; Ω is the angle between both."""

    t: float
    """How far to go from the first to the second, 0 to 1."""
    based: bool = False
    """True if the recipe begins with a base, and x and y are task vectors."""

    n_passes = 1
    spans_model = False

    def check(self, n_ingredients: int, names: Collection[str]) -> None:
        """Raise `RecipeError` for a `t` out of range, or another number of ingredients than two."""
        if n_ingredients != 2 + self.based:
            n = n_ingredients - self.based
            raise RecipeError(f"NuSLERP goes from one ingredient to another, got {n}")
        if not 0 <= self.t <= 1:
            raise RecipeError(f"t must be between 0 and 1, got {self.t}")

    def memory(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> RuleMemory:
        """Count both vectors and their products; what of a long row is read; factors of rows."""
        return RuleMemory(per_element=96, per_leaf=64 * PART + BATCH_NBYTES, reads_elsewhere=True)

    def reduction(self, tensors: Sequence[TensorSpec], n_ingredients: int) -> _RowSlerp:
        """Return the rule at work."""
        return _RowSlerp(self.t, self.based)


class _RowSlerp:
    measuring = False

    def __init__(self, t: float, based: bool) -> None:
        self._t, self._based = t, based

    def start(self, tensor: TensorSpec, start: int) -> dict[int, tuple[float, float]]:
        """Begin a leaf: the factors of the last row that was longer than a block, by its number."""
        return {}

    def measure(self, state: object, block: Block) -> None:
        """Look at nothing beforehand."""

    def merge(self, state: object) -> None:
        """Keep nothing."""

    def end_pass(self) -> None:
        """Keep nothing."""

    def reduce(self, state: dict[int, tuple[float, float]], block: Block, out: Floats) -> None:
        """Turn the rows that lie in a block, and the parts of rows at its ends."""
        import numpy as np

        from streamsoup.engine.rules.merging import add_to_base, task_vector

        length = row_length(block.tensor.shape)
        base = block.values(0) if self._based else None
        x, y = block.values(self._based), block.values(self._based + 1)
        if base is not None:
            x, y = task_vector(x, base), task_vector(y, base)
        at = 0
        with np.errstate(all="ignore"):
            while at < block.n:
                row, inside = divmod(block.start + at, length)
                whole = (block.n - at) // length if inside == 0 else 0
                whole = min(whole, max(1, BATCH // length))
                if whole:  # rows that lie in the block as they are
                    stop = at + whole * length
                    rows = x[at:stop].reshape(whole, length), y[at:stop].reshape(whole, length)
                    sums = zip(*_products(*rows), strict=True)
                    factors = np.array([self._factors(*each) for each in sums])
                    first, second = factors[:, :1] * rows[0], factors[:, 1:] * rows[1]
                    out[at:stop] = (first + second).reshape(-1)
                else:
                    stop = min(block.n, at + length - inside)
                    if row not in state:
                        state.clear()
                        state[row] = self._factors(*self._products_of(block, row * length, length))
                    f, g = state[row]
                    out[at:stop] = f * x[at:stop] + g * y[at:stop]
                at = stop
            if base is not None:
                add_to_base(base, out.copy(), out)

    def _factors(self, xx: float, yy: float, xy: float) -> tuple[float, float]:
        """Return the factors of both rows; straight ones where there is no angle."""
        t = self._t
        lengths = math.sqrt(xx) * math.sqrt(yy)
        if not 0 < lengths < math.inf:
            return 1.0 - t, t
        cosine = min(1.0, max(-1.0, xy / lengths))
        if 1 - cosine * cosine <= NO_ANGLE:
            return 1.0 - t, t
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def _products_of(self, block: Block, start: int, length: int) -> list[float]:
        """Return the inner products of a row that reaches beyond the block, read part by part."""
        import numpy as np

        from streamsoup.engine.rules.merging import task_vector

        lanes = np.zeros((3, 1, LANES))
        for begin in range(0, length, PART):
            n = min(PART, length - begin)
            x, y = (block.values_at(self._based + i, start + begin, n) for i in range(2))
            if self._based:
                base = block.values_at(0, start + begin, n)
                x, y = task_vector(x, base), task_vector(y, base)
            _add_to_lanes(x[None], y[None], lanes)
        return [float(each[0]) for each in _fold(lanes)]


def _products(x: Floats, y: Floats) -> list[list[float]]:
    """Return Σx², Σy² and Σxy of each row ``(row, element)``: three lists, a number for each."""
    import numpy as np

    lanes = np.zeros((3, len(x), min(LANES, x.shape[1])))
    _add_to_lanes(x, y, lanes)
    return [each.tolist() for each in _fold(lanes)]


def _add_to_lanes(x: Floats, y: Floats, lanes: Floats) -> None:
    """Add products to ``lanes (3, row, lane)``; the rows begin with lane 0."""
    for begin in range(0, x.shape[1], LANES):
        a, b = x[:, begin : begin + LANES], y[:, begin : begin + LANES]
        n = a.shape[1]
        lanes[0, :, :n] += a * a
        lanes[1, :, :n] += b * b
        lanes[2, :, :n] += a * b


def _fold(lanes: Floats) -> Floats:
    """Add lanes up in order."""
    sums = lanes[..., 0].copy()
    for lane in range(1, lanes.shape[-1]):
        sums += lanes[..., lane]
    return sums
