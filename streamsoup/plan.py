"""The whole pass, decided before the first weight is read. Pure: data in, data out, no I/O.

`plan_mix` matches the tensors of all ingredients and cuts them into *leaves* (the unit of work,
of the journal and of the digests); `plan_files` gives every output byte its place; `plan_memory`
says how large the blocks may be, and what the run will hold at its peak. All that can be refused
from headers alone is refused here, at once, in one message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from streamsoup.errors import BudgetError, MismatchError, RecipeError, some
from streamsoup.formats.disagreements import disagreements, in_words
from streamsoup.formats.header import make_header
from streamsoup.formats.index import index_name, is_numbered, shard_names, stem
from streamsoup.formats.parts import codes_in, factors_in
from streamsoup.formats.shards import Ingredient, Layout
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.sizes import nbytes_text, parse_nbytes
from streamsoup.tensors import DType, TensorSpec, float_dtype

__all__ = [
    "LEAF",
    "NOTES",
    "FilePlan",
    "Leaf",
    "MemoryPlan",
    "MixPlan",
    "PlannedFile",
    "PlannedTensor",
    "Source",
    "fixed_nbytes",
    "memory_budget",
    "plan_files",
    "plan_memory",
    "plan_mix",
]

LEAF = 1 << 22
"""Elements in a leaf. Part of the digests (`recipe.DIGEST`), so never to be tuned."""

NOTES = 256
"""Leaves noted in one record of the journal, whose text is held several times over."""

LARGEST_BLOCK = 1 << 19
"""Elements worked on at once. A block costs its thread 65 µs in Python, and two threads another 100
of waiting for each other's turn there: 2^18 takes a tenth longer, 2^20 no less time."""

SMALLEST_BLOCK = 1 << 12
"""Below this, more time goes into calls than into sums."""

DEFAULT_NBYTES = 150_000_000
"""Memory budget of the whole process where none is given, for up to some 5,000 tensors."""

WORKING_NBYTES = 30_000_000
"""What of a budget is left for blocks at least, where none is given."""

READ_GROUP = 4
"""Ingredients whose blocks are held at once when files are read rather than mapped."""

Operation = Literal["mix", "same", "first"]


class Source(msgspec.Struct, frozen=True):
    """Where one layout keeps one tensor."""

    shard: int
    offset: int
    """From the end of the shard's header."""
    dtype: DType


class PlannedTensor(msgspec.Struct, frozen=True):
    """One tensor of the soup."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    operation: Operation
    """``mix``: the weighted sum; ``same``: copied, refused unless equal; ``first``: copied."""
    n_units: int
    """Elements of a mixed tensor, bytes of a copied one."""
    sources: tuple[Source, ...]
    """By layout number."""
    first_leaf: int

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit in the soup."""
        return self.dtype.itemsize if self.operation == "mix" else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the soup."""
        return self.n_units * self.unit_nbytes

    def nbytes_in(self, layout: int) -> int:
        """Bytes of the tensor in ingredients of a layout."""
        size = self.sources[layout].dtype.itemsize if self.operation == "mix" else 1
        return self.n_units * size

    @property
    def n_leaves(self) -> int:
        """Leaves the tensor is cut into; none when it is empty."""
        return -(-self.n_units // LEAF)


class Leaf(msgspec.Struct, frozen=True):
    """A range of one tensor, the same in all ingredients: the unit of work."""

    number: int
    tensor: int
    start: int
    n_units: int


class MixPlan(msgspec.Struct, frozen=True):
    """Which tensors the soup has, and what is read and done for each."""

    recipe: Recipe
    ingredients: tuple[Ingredient, ...]
    layouts: tuple[Layout, ...]
    layout_of: tuple[int, ...]
    """Layout number of each ingredient."""
    tensors: tuple[PlannedTensor, ...]
    n_leaves: int

    def leaves(self) -> Iterator[Leaf]:
        """Give the leaves in the order of work: copies first, as those can still be refused."""
        order = sorted(range(len(self.tensors)), key=lambda t: self.tensors[t].operation == "mix")
        for t in order:
            tensor = self.tensors[t]
            for i in range(tensor.n_leaves):
                start = i * LEAF
                yield Leaf(tensor.first_leaf + i, t, start, min(LEAF, tensor.n_units - start))

    def only(self, names: Collection[str]) -> MixPlan:
        """Give the part of the plan that makes the tensors `names`."""
        tensors: list[PlannedTensor] = []
        n_leaves = 0
        for tensor in self.tensors:
            if tensor.name in names:
                tensors.append(replace(tensor, first_leaf=n_leaves))
                n_leaves += tensor.n_leaves
        return replace(self, tensors=tuple(tensors), n_leaves=n_leaves)

    def among(self, members: Sequence[int], coefficients: Coefficients) -> MixPlan:
        """Give the plan over some of the ingredients, with coefficients of their own."""
        ingredients = tuple(self.ingredients[i] for i in members)
        recipe = replace(
            self.recipe,
            ingredients=tuple(ingredient.name for ingredient in ingredients),
            coefficients=coefficients,
        )
        layout_of = tuple(self.layout_of[i] for i in members)
        return replace(self, recipe=recipe, ingredients=ingredients, layout_of=layout_of)

    def keeps_equal(self, tensor: PlannedTensor) -> bool:
        """Whether elements that are the same in all ingredients are kept, not summed and divided.

        For means of float64 alone: the sum of equal values may be inexact; `kernels.reference`.
        """
        factors, divisor = self.recipe.coefficients.of(tensor.name)
        mean = divisor == len(factors) > 1 and set(factors) == {1.0}
        return mean and all(source.dtype.name == "F64" for source in tensor.sources)

    @property
    def nbytes_read(self) -> int:
        """Bytes of weights the pass reads: each byte of each ingredient's tensors once."""
        each = [sum(t.nbytes_in(n) for t in self.tensors) for n in range(len(self.layouts))]
        return sum(each[n] for n in self.layout_of)

    @property
    def nbytes_written(self) -> int:
        """Bytes of weights the pass writes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes_summed(self) -> int:
        """Bytes of a running sum, which a search may keep: 8 for each averaged element."""
        return 8 * sum(tensor.n_units for tensor in self.tensors if tensor.operation == "mix")


class PlannedFile(msgspec.Struct, frozen=True):
    """One shard of the soup: its name, its header, and where its tensors go."""

    name: str
    header: bytes
    tensors: tuple[int, ...]
    nbytes: int


class FilePlan(msgspec.Struct, frozen=True):
    """Where each byte of the soup goes."""

    files: tuple[PlannedFile, ...]
    places: tuple[tuple[int, int], ...]
    """File number and offset of each tensor."""
    index_name: str | None
    """The index to write beside the shards; None for a lone file."""


class MemoryPlan(msgspec.Struct, frozen=True):
    """How large the working blocks are, and what that comes to."""

    threads: int
    block: int
    """Elements worked on at once by a thread."""
    group: int
    """Ingredients whose blocks a thread is given at once: all when mapped, few when read."""
    peak_nbytes: int
    """Upper bound of the anonymous memory of the whole process."""
    compiles: bool = True
    """Whether there is room to compile a kernel; where not, only those in the cache are used."""


def plan_mix(ingredients: Sequence[Ingredient], recipe: Recipe) -> MixPlan:
    """Match the tensors of all ingredients, in the order of the first.

    Raises `MismatchError` with every disagreement between names, shapes and dtypes, and where
    tensors are only parts of weights (`formats.parts`); `RecipeError` for coefficients that do not
    fit. Costs a look at each tensor of each distinct layout; reads nothing.
    """
    recipe.check()
    output = None if recipe.dtype == "same" else float_dtype(recipe.dtype)
    layouts = list(dict.fromkeys(ingredient.layout for ingredient in ingredients))
    layout_of = tuple(layouts.index(ingredient.layout) for ingredient in ingredients)
    owners = [ingredients[layout_of.index(n)] for n in range(len(layouts))]
    problems, advice = disagreements(owners, convert=output is not None)
    for owner in owners:
        # A lone adapter as it is stays one; a factor of its factors would count twice.
        parts = (codes_in(owner), None if recipe.coefficients.is_copy else factors_in(owner))
        problems += [part for part in parts if part is not None]
    if problems:
        raise MismatchError(in_words(problems, advice))
    strangers = [name for name in recipe.coefficients.per_tensor if name not in layouts[0].places]
    if strangers:
        raise RecipeError(
            f"coefficients for tensors that no ingredient has: {some(strangers)}; leave those out, "
            "or take them from a soup of the same architecture"
        )
    tensors: list[PlannedTensor] = []
    n_leaves = 0
    for name, (_, spec) in layouts[0].places.items():
        tensor = _plan_tensor(name, spec, layouts, recipe, output, n_leaves)
        tensors.append(tensor)
        n_leaves += tensor.n_leaves
    return MixPlan(recipe, tuple(ingredients), tuple(layouts), layout_of, tuple(tensors), n_leaves)


def plan_files(plan: MixPlan) -> FilePlan:
    """Give every byte of the soup a place: as in the first ingredient, or in shards of a size."""
    layout = plan.layouts[0]
    if plan.recipe.shard_size is None:
        groups = _mirrored(layout)
        names = list(layout.file_names)
        index = plan.ingredients[0].index_name
        if plan.ingredients[0].folder is None:
            names = ["model.safetensors"]
    else:
        groups = _cut(plan, plan.recipe.shard_size)
        called = _stem(plan.ingredients[0])
        names = shard_names(called, len(groups))
        index = plan.ingredients[0].index_name or index_name(called)
        if len(groups) == 1:
            index = None
    places: list[tuple[int, int]] = [(0, 0)] * len(plan.tensors)
    files: list[PlannedFile] = []
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        header = make_header(
            [(t.name, t.dtype.name, t.shape, t.nbytes) for t in (plan.tensors[i] for i in group)]
        )
        offset = len(header)
        for i in group:
            places[i] = (number, offset)
            offset += plan.tensors[i].nbytes
        files.append(PlannedFile(name, header, tuple(group), offset))
    return FilePlan(tuple(files), tuple(places), index)


def plan_memory(
    plan: MixPlan, *, mapped: bool, threads: int, budget: int, times: int = 1
) -> MemoryPlan:
    """Choose the largest blocks, up to `times` `LARGEST_BLOCK`, whose peak is within `budget`.

    There are `threads` threads, or fewer where leaves or bytes run out. Raises `BudgetError` when
    the smallest blocks do not fit; says how much would.
    """
    k = len(plan.ingredients)
    widest = max((t.dtype.itemsize for t in plan.tensors if t.operation == "mix"), default=1)
    widest_in = max((s.dtype.itemsize for t in plan.tensors for s in t.sources), default=1)
    group = k if mapped else min(k, READ_GROUP)
    # Each element of a block: its sum, its result, and what looking for the cause of a NaN makes of
    # it, or comparing float64 with the first; when files are read rather than mapped, the group's
    # inputs too. Numpy makes more, of a part of a block at a time.
    per_element = 8 + widest + (16 if widest_in == 8 else 8) + (0 if mapped else group * widest_in)
    pairs = {(s.dtype, t.dtype) for t in plan.tensors if t.operation == "mix" for s in t.sources}
    kernels = sorted(_kernel_nbytes(source, output) for source, output in pairs)
    compiler = COMPILER_NBYTES + sum(kernels[:-1])
    fixed = fixed_nbytes(plan) - COMPILER_NBYTES + compiler
    # So many tensors that little is left for the rest: better slower than not at all.
    compiles = fixed + NUMPY_NBYTES + SMALLEST_BLOCK * per_element <= budget
    fixed -= 0 if compiles else compiler
    block = times * LARGEST_BLOCK
    threads = min(threads, max(1, plan.n_leaves))
    while block > SMALLEST_BLOCK and fixed + threads * _held(block, per_element) > budget:
        block //= 2
    threads = max(1, min(threads, (budget - fixed) // _held(block, per_element)))
    peak = fixed + threads * _held(block, per_element)
    if peak > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: "
            f"this soup takes {nbytes_text(peak, up=True)} at least; raise --memory above that"
        )
    peak = max(peak, check_opening(plan, budget))
    return MemoryPlan(threads, block, group, peak, compiles)


def memory_budget(plan: MixPlan, told: int | str | None) -> int:
    """Give the budget of a run in bytes: as told, or `DEFAULT_NBYTES`, or what many tensors take.

    The plan of 50,000 tensors takes 100 MB itself: who set no limit wants no refusal.
    """
    if told is not None:
        return parse_nbytes(told)
    return max(DEFAULT_NBYTES, fixed_nbytes(plan) + WORKING_NBYTES, opening_nbytes(plan))


def _held(block: int, per_element: int) -> int:
    """Bytes that a thread holds."""
    return NUMPY_NBYTES + block * per_element


NUMPY_NBYTES = 2**20
"""What the numpy kernel makes of `kernels.blocks.BLOCK` elements: eight arrays of float64."""

PROCESS_NBYTES = 104 * 2**20
"""Upper bound of what Python and the libraries hold, the compiler and one kernel included.

Measured: 9 MB beside its blocks with kernels from the cache, 77 to 93 MB after compiling one.
"""

COMPILER_NBYTES = 60 * 2**20
"""What of it only compiling takes."""

KERNEL_NBYTES = 12 * 2**20
"""What compiling each further kernel takes (measured: 8 to 13 MB)."""

MEANS_NBYTES = 20 * 2**20
"""What compiling a further one takes that has means in float32 (measured: 14 to 23 MB)."""


OPENING_NBYTES = 24 * 2**20
"""What the process holds while it opens ingredients, beside their headers (measured: 19 MB)."""


def _kernel_nbytes(source: DType, output: DType) -> int:
    """Bytes that compiling a kernel takes after the first."""
    return MEANS_NBYTES if source == output and source.nbits <= 16 else KERNEL_NBYTES


def fixed_nbytes(plan: MixPlan) -> int:
    """Bound what the process holds beside its blocks: libraries, headers, plan, digests."""
    rows = 1 + len(plan.ingredients)
    n_shards = sum(len(ingredient.shards) for ingredient in plan.ingredients)
    # Measured with 50,000 and 100,000 tensors: 1160 to 1350 bytes each, and 6 for each character
    # of a name, which is held as a key, in headers, and in the texts of index and provenance.
    specs = sum(1400 + 7 * len(name) for layout in plan.layouts for name in layout.places)
    # A row of digests and a number for each leaf; the text of a record, four times over.
    leaves = (17 * rows + 64) * plan.n_leaves + 128 * rows * NOTES
    # Coefficients of each tensor: numbers, and the text of the provenance (measured: 60 each).
    own = 100 * sum(map(len, plan.recipe.coefficients.per_tensor.values()))
    return PROCESS_NBYTES + 1200 * n_shards + specs + leaves + own


def opening_nbytes(plan: MixPlan) -> int:
    """Bound what the process held while it opened the ingredients: metadata may take megabytes."""
    shards = (shard for ingredient in plan.ingredients for shard in ingredient.shards)
    return OPENING_NBYTES + max(shard.opening_nbytes for shard in shards)


def check_opening(plan: MixPlan, budget: int) -> int:
    """Give `opening_nbytes`. Raises `BudgetError` if that was more than `budget`."""
    took = opening_nbytes(plan)
    if took > budget:
        raise BudgetError(
            f"a memory budget of {nbytes_text(budget)} is too small: opening these ingredients "
            f"takes up to {nbytes_text(took, up=True)}, as one has a large header; raise --memory "
            "above that"
        )
    return took


def _plan_tensor(
    name: str,
    spec: TensorSpec,
    layouts: Sequence[Layout],
    recipe: Recipe,
    output: DType | None,
    first_leaf: int,
) -> PlannedTensor:
    found = [layout.places[name] for layout in layouts]
    sources = tuple(Source(shard, each.begin, each.dtype) for shard, each in found)
    if spec.dtype.averaged:
        return PlannedTensor(
            name, output or spec.dtype, spec.shape, "mix", spec.n_elements, sources, first_leaf
        )
    # BatchNorm's counter of batches means nothing for an average; nothing reads it by default.
    counter = name.rpartition(".")[2] == "num_batches_tracked"
    rule: Operation = "first" if recipe.non_float == "first" or counter else "same"
    return PlannedTensor(name, spec.dtype, spec.shape, rule, spec.nbytes, sources, first_leaf)


def _stem(ingredient: Ingredient) -> str:
    """Give what the names of its files begin with: ``model``, ``diffusion_pytorch_model``."""
    if ingredient.folder is None:
        return "model"
    shard = ingredient.layout.file_names[0]
    if ingredient.index_name is None or is_numbered(shard):
        return stem(shard)
    return stem(ingredient.index_name)


def _mirrored(layout: Layout) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in layout.file_names]
    for i, (number, _) in enumerate(layout.places.values()):
        groups[number].append(i)
    return groups


def _cut(plan: MixPlan, shard_size: int) -> list[list[int]]:
    """Fill shards in order; a tensor larger than the size has one of its own."""
    groups: list[list[int]] = [[]]
    filled = 0
    for i, tensor in enumerate(plan.tensors):
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += tensor.nbytes
    return groups
