"""Inner products in one pass: the Gram matrix of all ingredients, and their dots with a vector.

Differences come first: θᵢ−θ₀ is taken element by element in float64, and then multiplied, as the
Gram matrix of the weights themselves would cancel (‖θ‖² is some 10⁴ times ‖θᵢ−θ₀‖²).
Sums follow one order, whatever the threads, blocks, budget or way of reading: grains of 4096
elements (`kernels.inner`), added up in order within a leaf; leaves in order within a tensor.

`Gram` and `Dot` are reducers for `stream.run`, and `Sums` is the sink they share: a block's
result is a row of numbers for each of its grains. `fastest_products` chooses the kernel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamsoup.engine.budget import (
    COMPILER_NBYTES,
    LARGEST_BLOCK,
    SMALLEST_BLOCK,
    MemoryPlan,
    check_opening,
    fixed_nbytes,
    plan_reading,
)
from streamsoup.engine.plan import Leaf, MixPlan, PlannedTensor
from streamsoup.engine.reduce import OnePass, compiled
from streamsoup.errors import BudgetError, option
from streamsoup.kernels import blocks
from streamsoup.kernels.constants import GRAIN
from streamsoup.kernels.inner import (
    find_products,
    has_products,
    in_numpy,
    make_plain_products,
    make_products,
    spend_in_numpy,
)
from streamsoup.kernels.tiers import tier
from streamsoup.sizes import nbytes_text
from streamsoup.system.buffers import Bytes
from streamsoup.tensors import DType

__all__ = [
    "Dot",
    "Gram",
    "LeafSums",
    "Products",
    "Sums",
    "Vector",
    "fastest_products",
    "floats_of",
    "measured_part",
    "plan_inner_memory",
    "symmetric",
]

Floats = NDArray[np.float64]
Array = NDArray[np.uint8]

COMPILE_S = 5.0
"""Time in numpy, of all runs so far, from which compiling it pays (measured: 3 to 7 s, once)."""

SPARED_NBYTES = 8 * 2**20
"""What compiling the one kernel of products takes less than `budget.PROCESS_NBYTES` counts.

Measured, its blocks included: 96 MiB after compiling it with numba 0.68, 103 with 0.61; 28 with the
kernel from the cache."""


def floats_of(plan: MixPlan) -> MixPlan:
    """Return the part of a plan with averaged tensors: others have no inner products."""
    return plan.only({tensor.name for tensor in plan.reduced})


def measured_part(plan: MixPlan) -> MixPlan:
    """Return the part of a plan of which inner products are taken, as a pass that only measures."""
    return replace(floats_of(plan), measures=True)


def plan_inner_memory(
    plan: MixPlan, n_values: int, *, mapped: bool, threads: int, budget: int
) -> MemoryPlan:
    """Choose blocks for a pass that gives `n_values` numbers per grain, within `budget` bytes.

    Blocks shrink with the number of ingredients, as all of them are needed at once. Nothing is
    compiled where that leaves no room for them. Raises `BudgetError`, with the least budget that
    would do, when even the smallest do not fit.
    """
    k = len(plan.ingredients)
    # A thread's rows of one grain, and as many numbers while numpy multiplies them (compiled, it is
    # less: `kernels.inner.Products.held_nbytes`); its leaf's sums. Beside them the sums of every
    # tensor, and those of leaves that wait for an earlier one.
    held = fixed_nbytes(plan) + 8 * n_values * (len(plan.tensors) + 1)
    reading = plan_reading(plan, mapped=mapped, at_once=True)
    each = 8 * GRAIN * (2 * k + 8) + 24 * n_values + reading.session_nbytes
    per_element = 8 * n_values / GRAIN + reading.unit_nbytes
    smallest = each + int(SMALLEST_BLOCK * per_element)
    compiles = held - SPARED_NBYTES + smallest <= budget
    fixed = held - (SPARED_NBYTES if compiles else COMPILER_NBYTES)

    def peak(block: int, workers: int) -> int:
        return fixed + workers * (each + int(block * per_element))

    block = LARGEST_BLOCK
    threads = min(threads, max(1, plan.n_leaves))
    while block > SMALLEST_BLOCK and peak(block, threads) > budget:
        block //= 2
    threads = max(1, min(threads, (budget - fixed) // (peak(block, 1) - fixed)))
    if peak(block, threads) > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: inner products of {k} "
            f"ingredients take {nbytes_text(peak(block, threads), up=True)} at least; raise "
            f"{option('memory')}"
        )
    most = max(peak(block, threads), check_opening(plan, budget))
    return MemoryPlan(threads, block, k, most, compiles)


class Products(Protocol):
    """A kernel that multiplies rows; see `kernels.inner.Products`."""

    def __call__(
        self,
        inputs: Sequence[Array],
        dtypes: Sequence[DType],
        n: int,
        out: Floats,
        *,
        reference: int,
        to_mean: bool,
    ) -> None:
        """Fill ``out (grain, value)`` with the products of the grains of `n` elements."""


def fastest_products(plan: MixPlan, n_products: int, *, compiles: bool) -> Products:
    """Return the compiled kernel if it is in the cache or worth compiling; else numpy.

    It is worth it once this job (`n_products` of each element of the plan) and those that earlier
    runs did in numpy together take longer than compiling. Without `compiles`, or where numba
    cannot, nothing is compiled. The bits are the same. Takes milliseconds; seconds for the run that
    compiles, once on a machine. Raises `RecipeError` for an unknown tier (`kernels.tiers.tier`).
    """
    fastest = tier()
    found = find_products() if fastest == "fast" else None
    if found is None and compiles and fastest != "numpy":
        n_elements = sum(tensor.n_units for tensor in plan.tensors)
        # Measured, with 2 to 64 rows: Python's part of a grain, and each product's.
        in_numpy_s = n_elements * (0.25e-3 / GRAIN + 2e-9 * n_products)
        if spend_in_numpy(in_numpy_s) >= COMPILE_S:
            fast = [make_products] if fastest == "fast" and has_products() else []
            found = compiled(*fast, make_plain_products)
    return found or in_numpy


class Gram(OnePass):
    """⟨rᵢ, rⱼ⟩ of the rows r₀ = the reference and rᵢ = θᵢ − the reference, for every tensor.

    The reference is the first ingredient of the plan if it is the `base`, else the mean of all.
    A grain gives the products of all rows with ``j >= i``, row by row; then, for each ingredient
    but the base, how many elements differ from those of the first ingredient.
    """

    def __init__(self, plan: MixPlan, memory: MemoryPlan, *, base: bool) -> None:
        """Hold what the workers share, all of it read-only."""
        self.plan, self.memory, self.base = plan, memory, base
        self.n_rows = len(plan.ingredients) + (0 if base else 1)
        self.n_values = self.count_values(plan, base=base)
        n_products = self.n_products(self.n_rows)
        self.products = fastest_products(plan, n_products, compiles=memory.compiles)

    @classmethod
    def count_values(cls, plan: MixPlan, *, base: bool) -> int:
        """Count the numbers that a grain gives."""
        n_rows = len(plan.ingredients) + (0 if base else 1)
        return cls.n_products(n_rows) + n_rows - 1

    @staticmethod
    def n_products(n_rows: int) -> int:
        """Count the products of rows with ``j >= i``."""
        return n_rows * (n_rows + 1) // 2

    def worker(self) -> _Worker:
        """Return a thread's own worker."""
        return _Worker(self)

    def multiply(
        self,
        tensor: PlannedTensor,
        start: int,
        n: int,
        inputs: Sequence[Array],
        dtypes: Sequence[DType],
        out: Floats,
    ) -> None:
        """Fill ``out (grain, value)`` for `n` elements of a tensor."""
        if not self.base:  # the first row is the reference, which is not an ingredient then
            inputs, dtypes = [inputs[0], *inputs], [dtypes[0], *dtypes]
        self.products(inputs, dtypes, n, out, reference=0, to_mean=not self.base)


class Vector(msgspec.Struct, frozen=True):
    """A tensor in memory to multiply ingredients with: raw little-endian elements."""

    data: Array
    dtype: DType


class Dot(OnePass):
    """⟨u, θ₀⟩ and ⟨u, θᵢ−θ₀⟩ for every further ingredient, for every tensor of which u is given."""

    def __init__(
        self,
        plan: MixPlan,
        memory: MemoryPlan,
        vectors: Mapping[str, Vector],
        products: Products,
    ) -> None:
        """Hold what the workers share; `vectors` has one for each tensor of the plan."""
        self.plan, self.memory, self.vectors, self.products = plan, memory, vectors, products
        self.n_values = len(plan.ingredients)

    def worker(self) -> _Worker:
        """Return a thread's own worker."""
        return _Worker(self)

    def multiply(
        self,
        tensor: PlannedTensor,
        start: int,
        n: int,
        inputs: Sequence[Array],
        dtypes: Sequence[DType],
        out: Floats,
    ) -> None:
        """Fill ``out (grain, value)`` for `n` elements of a tensor, from `start` on."""
        vector = self.vectors[tensor.name]
        size = vector.dtype.itemsize
        u = vector.data[start * size : (start + n) * size]
        inputs, dtypes = [u, *inputs], [vector.dtype, *dtypes]
        self.products(inputs, dtypes, n, out, reference=1, to_mean=False)


class _Worker:
    """One thread's part of a pass: its results, a row of numbers for each grain of a block."""

    n_ahead = 0

    def __init__(self, reduction: Gram | Dot) -> None:
        self._reduction, self._plan = reduction, reduction.plan
        self._room = np.empty((-(-reduction.memory.block // GRAIN), reduction.n_values))
        self.spoiled = False

    def digests(self, tensor: PlannedTensor, n_units: int) -> None:
        """Return None: the stream makes the digests."""

    def start(
        self, tensor: PlannedTensor, start: int, n_units: int, room: Bytes | None = None
    ) -> None:
        """Begin a block."""
        self._tensor, self._start, self._n = tensor, start, n_units
        self._results = self._room[: -(-n_units // GRAIN)]

    def add(self, first: int, inputs: Sequence[Bytes]) -> None:
        """Multiply the blocks of all ingredients, which come at once."""
        assert (first, len(inputs)) == (0, len(self._plan.ingredients))
        sources = self._tensor.sources
        dtypes = [sources[layout].dtype for layout in self._plan.layout_of]
        arrays = [blocks.array_of(block) for block in inputs]
        self._reduction.multiply(self._tensor, self._start, self._n, arrays, dtypes, self._results)
        self.spoiled = not bool(np.isfinite(self._results).all())
        if self.spoiled and len(arrays) > 1:
            self._pass_over_masks(arrays, dtypes)

    def _pass_over_masks(self, arrays: Sequence[Array], dtypes: Sequence[DType]) -> None:
        """Count grains that are not finite as zero where all ingredients hold the same bytes."""
        for row in np.flatnonzero(~np.isfinite(self._results).all(axis=1)):
            grains = [
                array[row * GRAIN * dtype.itemsize : (row + 1) * GRAIN * dtype.itemsize]
                for array, dtype in zip(arrays, dtypes, strict=True)
            ]
            if len(set(dtypes)) == 1 and all(np.array_equal(grains[0], g) for g in grains[1:]):
                self._results[row] = 0.0
        self.spoiled = not bool(np.isfinite(self._results).all())

    def result(self) -> Bytes:
        """Return the numbers of each grain of the block, as bytes."""
        return self._results.reshape(-1).view(np.uint8).data

    def close(self) -> None:
        """Release the numbers."""
        del self._room


def symmetric(products: Floats) -> Floats:
    """Return the matrix ``(row, row)`` of the products of a Gram pass: those of ``j >= i``.

    >>> symmetric(np.array([1.0, 2.0, 3.0])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    n_rows = (math.isqrt(8 * len(products) + 1) - 1) // 2
    upper = np.triu_indices(n_rows)
    matrix = np.zeros((n_rows, n_rows))
    matrix[upper] = products
    matrix.T[upper] = products
    return matrix


class Sums:
    """The sink of numbers: adds up those of grains, in order, for each tensor."""

    def __init__(self, plan: MixPlan, n_values: int) -> None:
        """Begin every tensor at zero."""
        self._plan = plan
        self.of_tensors = np.zeros((len(plan.tensors), n_values))
        """``(tensor, value) float64``: in the order of the plan."""
        self._next = [tensor.first_leaf for tensor in plan.tensors]
        self._waiting: dict[int, Floats] = {}
        self._lock = threading.Lock()

    def session(self) -> _SumsSession:
        """Return a thread's own session."""
        return _SumsSession(self, np.zeros(self.of_tensors.shape[1]))

    def add(self, leaf: Leaf, values: Floats) -> None:
        """Add the sums of a leaf, once those of all leaves of its tensor before it are added."""
        with self._lock:
            self._waiting[leaf.number] = values
            while (ready := self._waiting.pop(self._next[leaf.tensor], None)) is not None:
                self.of_tensors[leaf.tensor] += ready
                self._next[leaf.tensor] += 1
                if self._next[leaf.tensor] == self._end(leaf.tensor):
                    break

    def _end(self, tensor: int) -> int:
        planned = self._plan.tensors[tensor]
        return planned.first_leaf + planned.n_leaves


class LeafSums(Sums):
    """A sink like `Sums`, which keeps the sums of each leaf: another process adds them up."""

    def __init__(self, plan: MixPlan, n_values: int) -> None:
        """Begin with no leaf."""
        super().__init__(plan, n_values)
        self.of_leaves: dict[int, Floats] = {}
        """By the number of a leaf, its sums ``(value,) float64``."""

    def add(self, leaf: Leaf, values: Floats) -> None:
        """Keep the sums of a leaf."""
        self.of_leaves[leaf.number] = values


class _SumsSession(msgspec.Struct):
    """One thread's leaf in the making."""

    sums: Sums
    values: Floats

    def room(self, leaf: Leaf, start: int, nbytes: int) -> Bytes | None:
        """Return None: blocks are added up, not stored."""
        return None

    def write(self, leaf: Leaf, start: int, block: Bytes) -> None:
        """Add a row of numbers for each grain of the leaf, in order."""
        if start == leaf.start:
            self.values = np.zeros_like(self.values)
        rows = blocks.floats_of(block).reshape(-1, len(self.values))
        for row in rows:
            self.values += row
        if start + len(rows) * GRAIN >= leaf.start + leaf.n_units:
            self.sums.add(leaf, self.values)

    def close(self) -> None:
        """Do nothing: nothing is held."""
