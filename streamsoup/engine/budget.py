"""The memory of a planned pass: the size of its blocks, and an upper bound of its peak.

The budget is that of the whole process: libraries, headers and the plan itself are counted with
their measured sizes, and blocks share the rest.
"""

from __future__ import annotations

import msgspec

from streamsoup.engine.plan import NOTES, MixPlan
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import BudgetError, option
from streamsoup.rule import RuleMemory
from streamsoup.sizes import nbytes_text, parse_nbytes
from streamsoup.tensors import DType

__all__ = [
    "COMPILER_NBYTES",
    "LARGEST_BLOCK",
    "SMALLEST_BLOCK",
    "MemoryPlan",
    "check_opening",
    "fixed_nbytes",
    "memory_budget",
    "opening_nbytes",
    "plan_memory",
    "plan_reading",
]

LARGEST_BLOCK = 1 << 19
"""Elements worked on at once. A block costs its thread 65 µs in Python, and two threads another 100
of waiting for each other's turn there: 2^18 takes a tenth longer, 2^20 no less time."""

SMALLEST_BLOCK = 1 << 12
"""Below this, more time goes into calls than into sums."""

DEFAULT_NBYTES = 150_000_000
"""Memory budget of the whole process where none is given, for up to some 5,000 tensors."""

WORKING_NBYTES = 26_000_000
"""Least memory for blocks where no budget is given: two threads' largest ones take 21 MB."""

READ_GROUP = 4
"""Ingredients whose blocks are held at once when they are read rather than viewed."""

NUMPY_NBYTES = 2**20
"""Bytes that the numpy kernel holds of `constants.NUMPY_TILE` elements: eight arrays of float64."""

PROCESS_NBYTES = 108 * 2**20
"""Upper bound of what Python and the libraries hold, the compiler and one kernel included.

Measured: 9 MB beside its blocks with kernels from the cache; while compiling one, 94 to 112 MB with
numba 0.68, 79 to 87 with 0.61.
"""

COMPILER_NBYTES = 64 * 2**20
"""The part of `PROCESS_NBYTES` that only compiling takes."""

KERNEL_NBYTES = 9 * 2**20
"""Bytes that compiling each further kernel takes (measured: 4 to 9 MB)."""

MEANS_NBYTES = 18 * 2**20
"""Bytes that compiling a further kernel with means in float32 takes (measured: 13 to 20 MB, and 28
after three that have none, which took less than `PROCESS_NBYTES` has for the first)."""

MERGER_NBYTES = 48 * 2**20
"""Bytes that compiling the kernels of merges takes beyond `PROCESS_NBYTES` (measured: 39 MB)."""

OPENING_NBYTES = 24 * 2**20
"""Bytes held while ingredients are opened, without their headers (measured: 19 MB)."""


class MemoryPlan(msgspec.Struct, frozen=True):
    """The size of the working blocks, and the peak memory that follows."""

    threads: int
    block: int
    """Elements worked on at once by a thread."""
    group: int
    """Ingredients whose blocks a thread is given at once: all when mapped, few when read."""
    peak_nbytes: int
    """Upper bound of the anonymous memory of the whole process."""
    compiles: bool = True
    """True if memory suffices to compile a kernel; if not, only cached kernels are used."""


class ReadingPlan(msgspec.Struct, frozen=True):
    """The memory that a thread holds to read."""

    group: int
    """Ingredients whose blocks it is given at once: all where each is viewed, few otherwise."""
    unit_nbytes: int
    """Bytes for each element of a block: those of the group, and what a source holds meanwhile."""
    session_nbytes: int
    """Bytes that its cursors hold."""


def plan_reading(plan: MixPlan, *, mapped: bool, at_once: bool = False) -> ReadingPlan:
    """Return what a thread holds to read blocks of all sources; `at_once` if of all together."""
    k = len(plan.ingredients)
    widest = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
    costs = [ingredient.source.cost(mapped=mapped) for ingredient in plan.ingredients]
    n_read = sum(not cost.views for cost in costs)
    group = k if at_once or n_read == 0 else min(k, READ_GROUP)
    return ReadingPlan(
        group,
        min(n_read, group) * widest + max(cost.unit_nbytes for cost in costs),
        sum(cost.cursor_nbytes for cost in costs),
    )


def plan_memory(
    plan: MixPlan, *, mapped: bool, threads: int, budget: int, times: int = 1
) -> MemoryPlan:
    """Choose the largest blocks, up to `times` `LARGEST_BLOCK`, whose peak is within `budget`.

    Args:
        plan: What is read and made.
        mapped: True if files are mapped, False if they are read into buffers.
        threads: Most threads; fewer are planned where leaves or bytes do not suffice.
        budget: Bytes of anonymous memory for the whole process.
        times: Factor on `LARGEST_BLOCK`.

    Raises:
        BudgetError: The smallest blocks do not fit; names the budget that would do.
    """
    if not isinstance(plan.recipe.rule, Linear):
        return _plan_blocks(plan, mapped=mapped, threads=threads, budget=budget)
    widest = max((t.unit_nbytes for t in plan.tensors), default=1)
    widest_in = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
    reading = plan_reading(plan, mapped=mapped)
    # Each element of a block: its sum, its result, and what looking for the cause of a NaN makes of
    # it, or comparing float64 with the first; and what is read rather than viewed. Numpy makes
    # more, of a part of a block at a time.
    per_element = 8 + widest + (16 if widest_in == 8 else 8) + reading.unit_nbytes
    held = NUMPY_NBYTES + reading.session_nbytes
    pairs = {(s.dtype, t.dtype) for t in plan.reduced for s in t.sources}
    kernels = sorted(_kernel_nbytes(source, output) for source, output in pairs)
    compiler = COMPILER_NBYTES + sum(kernels[:-1])
    fixed = fixed_nbytes(plan) - COMPILER_NBYTES + compiler
    # With very many tensors there is no room for the compiler: numpy is slower, but fits.
    compiles = fixed + held + SMALLEST_BLOCK * per_element <= budget
    fixed -= 0 if compiles else compiler
    block = times * LARGEST_BLOCK
    threads = min(threads, max(1, plan.n_leaves))
    while block > SMALLEST_BLOCK and fixed + threads * (held + block * per_element) > budget:
        block //= 2
    threads = max(1, min(threads, (budget - fixed) // (held + block * per_element)))
    peak = fixed + threads * (held + block * per_element)
    if peak > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: "
            f"this soup takes {nbytes_text(peak, up=True)} at least; raise {option('memory')} "
            f"above that"
        )
    peak = max(peak, check_opening(plan, budget))
    return MemoryPlan(threads, block, reading.group, peak, compiles)


def _plan_blocks(plan: MixPlan, *, mapped: bool, threads: int, budget: int) -> MemoryPlan:
    """Choose blocks for a rule that is given blocks of all ingredients at once."""
    k, held = len(plan.ingredients), rule_memory(plan)
    reading = plan_reading(plan, mapped=mapped, at_once=True)
    widest = max((tensor.unit_nbytes for tensor in plan.tensors), default=1)
    # Each element of a block: its result in float64 and rounded, what looking for the cause of a
    # NaN makes of it, what the rule holds, and the inputs that are read rather than viewed.
    n_sessions = 2 if held.reads_elsewhere else 1
    per_element = 8 + widest + 16 + held.per_element + n_sessions * reading.unit_nbytes
    # Two states: a leaf that waits to be merged, and the one after it. Groups overlap.
    each = NUMPY_NBYTES + 2 * held.per_leaf + held.per_group
    each += n_sessions * reading.session_nbytes
    fixed = fixed_nbytes(plan) + held.per_group
    # Where there is no room to compile, kernels from the cache are used, or numpy.
    compiler = MERGER_NBYTES if held.compiles else 0
    compiles = fixed + compiler + each + SMALLEST_BLOCK * per_element <= budget
    fixed += compiler if compiles else 0

    def peak(block: int, threads: int) -> int:
        return fixed + threads * (each + block * per_element)

    block = LARGEST_BLOCK
    threads = min(threads, max(1, plan.n_leaves))
    while block > SMALLEST_BLOCK and peak(block, threads) > budget:
        block //= 2
    while threads > 1 and peak(block, threads) > budget:
        threads -= 1
    if peak(block, threads) > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: this soup takes "
            f"{nbytes_text(peak(block, threads), up=True)} at least; raise {option('memory')} "
            "above that"
        )
    most = max(peak(block, threads), check_opening(plan, budget))
    return MemoryPlan(threads, block, k, most, compiles)


def memory_budget(plan: MixPlan, asked: int | str | None) -> int:
    """Return the budget of a run in bytes: as asked, or else the default.

    The default is `DEFAULT_NBYTES`, or more if the plan itself needs it (50,000 tensors take
    100 MB): without a limit, nothing is refused.
    """
    if asked is not None:
        return parse_nbytes(asked)
    rule = rule_memory(plan)
    own = 2 * (rule.per_leaf + rule.per_group) + (MERGER_NBYTES if rule.compiles else 0)
    return max(DEFAULT_NBYTES, fixed_nbytes(plan) + own + WORKING_NBYTES, opening_nbytes(plan))


def _kernel_nbytes(source: DType, output: DType) -> int:
    """Bytes that compiling a kernel takes after the first."""
    return MEANS_NBYTES if source == output and source.nbits <= 16 else KERNEL_NBYTES


def fixed_nbytes(plan: MixPlan) -> int:
    """Bound what the process holds beside its blocks: libraries, headers, plan, digests."""
    rows = 1 + len(plan.ingredients)
    n_shards = sum(len(ingredient.file_names) for ingredient in plan.ingredients)
    # Measured with 50,000 and 100,000 tensors: 1160 to 1350 bytes each, and 6 for each character
    # of a name, which is held as a key, in headers, and in the texts of index and provenance.
    specs = sum(1400 + 7 * len(name) for layout in plan.layouts for name in layout.places)
    # A row of digests and a number for each leaf; the text of a record, four times over.
    leaves = (17 * rows + 64) * plan.n_leaves + 128 * rows * NOTES
    own = rule_memory(plan).fixed
    costs = [ingredient.source.cost(mapped=True) for ingredient in plan.ingredients]
    compiling = max(cost.compiling_nbytes for cost in costs)
    sources = sum(cost.held_nbytes for cost in costs)
    return PROCESS_NBYTES + compiling + sources + 1200 * n_shards + specs + leaves + own


def rule_memory(plan: MixPlan) -> RuleMemory:
    """Return the memory that the recipe's rule declares."""
    specs = [tensor.spec for tensor in plan.reduced]
    return plan.recipe.rule.memory(specs, len(plan.ingredients))


def opening_nbytes(plan: MixPlan) -> int:
    """Bound what the process held while it opened the ingredients: metadata may take megabytes."""
    costs = (ingredient.source.cost(mapped=True) for ingredient in plan.ingredients)
    return OPENING_NBYTES + max(cost.opening_nbytes for cost in costs)


def check_opening(plan: MixPlan, budget: int) -> int:
    """Return `opening_nbytes`. Raises `BudgetError` if that was more than `budget`."""
    took = opening_nbytes(plan)
    if took > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: opening these ingredients "
            f"takes up to {nbytes_text(took, up=True)}, as one has a large header or index; raise "
            f"{option('memory')} above that"
        )
    return took
