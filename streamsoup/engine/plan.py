"""The whole pass, decided before the first weight is read. Pure: data in, data out, no I/O.

`plan_mix` matches the tensors of all ingredients and cuts them into *leaves* (the unit of work,
of the journal and of the digests); `plan_files` gives every output byte its place; `budget` says
how large the blocks may be. All that can be refused from headers alone is refused here, at once, in
one message.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import MismatchError, printable
from streamsoup.formats.disagreements import disagreements, in_words
from streamsoup.formats.header import make_header
from streamsoup.formats.index import index_name, is_numbered, shard_names, stem
from streamsoup.formats.ingredients import ADAPTER_FILE, Ingredient
from streamsoup.formats.layout import Layout, name_in_file
from streamsoup.formats.parts import factors_in, parts_of
from streamsoup.recipe import Coefficients, Recipe
from streamsoup.rule import Rule
from streamsoup.tensors import DType, TensorSpec, float_dtype

__all__ = [
    "LEAF",
    "NOTES",
    "FilePlan",
    "Leaf",
    "MixPlan",
    "Place",
    "PlannedFile",
    "PlannedTensor",
    "plan_files",
    "plan_mix",
]

LEAF = 1 << 22
"""Elements in a leaf. Part of the digests (`recipe.DIGEST`), so never to be tuned."""

NOTES = 256
"""Leaves noted in one record of the journal, whose text is held several times over."""

Operation = Literal["mix", "same", "first", "code"]


class Place(msgspec.Struct, frozen=True):
    """Where one layout keeps one tensor, and in which dtype its bytes come."""

    shard: int
    offset: int
    """From the end of the shard's header."""
    dtype: DType
    significant: int = 53
    """Bits that a float64 needs at most."""


class PlannedTensor(msgspec.Struct, frozen=True):
    """One tensor of the soup."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    operation: Operation
    """``mix``: the weighted sum; ``same``: copied, refused unless equal; ``first``: copied, and
    rounded once if it is delivered in another dtype;
    ``code``: as ``same``, for a part of a quantised weight, whatever `Recipe.non_float` is."""
    n_units: int
    """Elements of a float, averaged or not; bytes of what is never averaged."""
    sources: tuple[Place, ...]
    """By layout number."""
    first_leaf: int

    @property
    def is_reduced(self) -> bool:
        """True if the recipe's rule makes it; False if it is copied."""
        return self.operation == "mix"

    @property
    def spec(self) -> TensorSpec:
        """The tensor as it will be in the soup, for rules."""
        return TensorSpec(self.name, self.dtype, self.shape, 0)

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit in the soup."""
        return self.dtype.itemsize if self.dtype.averaged else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the soup."""
        return self.n_units * self.unit_nbytes

    def nbytes_in(self, layout: int) -> int:
        """Bytes of the tensor in ingredients of a layout."""
        return self.n_units * self.unit_nbytes_in(layout)

    def unit_nbytes_in(self, layout: int) -> int:
        """Bytes of a unit in ingredients of a layout."""
        source = self.sources[layout].dtype
        return source.itemsize if source.averaged else 1

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
    measures: bool = False
    """True if the pass only measures: messages then give no advice on making a soup."""
    is_measured: bool = False
    """True if another pass has measured the ingredients, without digests: a change since then that
    has no innocent explanation ends the run, whatever the digests of this pass say."""

    def leaves(self) -> Iterator[Leaf]:
        """Yield the leaves in the order of work: copies first, as those can still be refused."""
        order = sorted(range(len(self.tensors)), key=lambda t: self.tensors[t].is_reduced)
        for t in order:
            tensor = self.tensors[t]
            for i in range(tensor.n_leaves):
                start = i * LEAF
                yield Leaf(tensor.first_leaf + i, t, start, min(LEAF, tensor.n_units - start))

    def only(self, names: Iterable[str]) -> MixPlan:
        """Return the part of the plan that makes the tensors `names`."""
        tensors: list[PlannedTensor] = []
        n_leaves = 0
        wanted = frozenset(names)
        for tensor in self.tensors:
            if tensor.name in wanted:
                tensors.append(replace(tensor, first_leaf=n_leaves))
                n_leaves += tensor.n_leaves
        return replace(self, tensors=tuple(tensors), n_leaves=n_leaves)

    def among(self, members: Sequence[int], rule: Rule) -> MixPlan:
        """Return the plan over some of the ingredients, with a rule of their own."""
        ingredients = tuple(self.ingredients[i] for i in members)
        recipe = replace(
            self.recipe,
            ingredients=tuple(ingredient.name for ingredient in ingredients),
            rule=rule,
        )
        layout_of = tuple(self.layout_of[i] for i in members)
        return replace(self, recipe=recipe, ingredients=ingredients, layout_of=layout_of)

    @property
    def reduced(self) -> tuple[PlannedTensor, ...]:
        """The tensors that the recipe's rule makes."""
        return tuple(tensor for tensor in self.tensors if tensor.is_reduced)

    @property
    def copied(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are copied."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_reduced)

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
        return 8 * sum(tensor.n_units for tensor in self.reduced)


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
    index_names: tuple[str, ...]
    """The index to write beside the shards, of each folder; none where it has a lone file."""


def plan_mix(ingredients: Sequence[Ingredient], recipe: Recipe) -> MixPlan:
    """Match the tensors of all ingredients, in the order of the first.

    Args:
        ingredients: Open ingredients, in the order of the recipe.
        recipe: What to make.

    Raises:
        MismatchError: Names, shapes or dtypes disagree (all disagreements are named), or tensors
            are only parts of weights (`formats.parts`).
        RecipeError: The rule does not fit the ingredients.

    Takes time in the tensors of each distinct layout; reads nothing.
    """
    names = ingredients[0].layout.places if ingredients else ()
    recipe.check(names)
    output = None if recipe.dtype == "same" else float_dtype(recipe.dtype)
    layouts = list(dict.fromkeys(ingredient.layout for ingredient in ingredients))
    layout_of = tuple(layouts.index(ingredient.layout) for ingredient in ingredients)
    owners = [ingredients[layout_of.index(n)] for n in range(len(layouts))]
    positions = [1 + layout_of.index(n) for n in range(len(layouts))]
    problems, advice = disagreements(owners, positions, convert=output is not None)
    is_copy = isinstance(recipe.rule, Linear) and recipe.rule.is_copy
    coefficients = recipe.rule.coefficients if isinstance(recipe.rule, Linear) else None
    coded, causes = parts_of(
        owners, coefficients, disagree=bool(problems), takes=recipe.reading.takes
    )
    # Ingredients of one layout may differ in the names of their files, which tell adapters.
    adapters = [each for each in ingredients if ADAPTER_FILE in each.file_names]
    keeps_factors = is_copy or (bool(adapters) and _concatenates(ingredients, coefficients))
    for owner in dict.fromkeys([*owners, *adapters[:1]]):
        # A lone adapter as it is stays one; a factor of its factors would count twice.
        factors = None if keeps_factors else factors_in(owner)
        causes += [] if factors is None else [factors]
    if causes or problems:
        raise MismatchError(in_words([*causes, *problems], [] if causes else advice))
    tensors: list[PlannedTensor] = []
    n_leaves = 0
    for name, (_, spec) in layouts[0].places.items():
        tensor = _plan_tensor(name, spec, layouts, recipe, output, n_leaves, name in coded)
        tensors.append(tensor)
        n_leaves += tensor.n_leaves
    return MixPlan(recipe, tuple(ingredients), tuple(layouts), layout_of, tuple(tensors), n_leaves)


def _concatenates(ingredients: Sequence[Ingredient], coefficients: Coefficients | None) -> bool:
    """Return True if the soup of adapters alone is the adapter that adds what all of them add."""
    from streamsoup.formats.adapters.joined import is_concatenation

    return is_concatenation([each.source for each in ingredients], coefficients)


def plan_files(plan: MixPlan) -> FilePlan:
    """Return the place of every byte of the soup, in shards as the recipe sets them.

    They mirror those of the first ingredient, or are filled up to `Recipe.shard_size`.
    """
    first = plan.ingredients[0]
    groups = _mirrored(plan.layouts[0])
    names, indexes = list(first.file_names), list(first.index_names)
    if plan.recipe.shard_size is not None:
        names, groups, indexes = _shards(plan, names, groups, indexes, plan.recipe.shard_size)
    elif first.folder is None and len(names) == 1:
        names = ["model.safetensors"]
    places: list[tuple[int, int]] = [(0, 0)] * len(plan.tensors)
    files: list[PlannedFile] = []
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        header = make_header(
            [
                (name_in_file(t.name, name), t.dtype.name, t.shape, t.nbytes)
                for t in (plan.tensors[i] for i in group)
            ]
        )
        offset = len(header)
        for i in group:
            places[i] = (number, offset)
            offset += plan.tensors[i].nbytes
        files.append(PlannedFile(name, header, tuple(group), offset))
    return FilePlan(tuple(files), tuple(places), tuple(indexes))


def _plan_tensor(
    name: str,
    spec: TensorSpec,
    layouts: Sequence[Layout],
    recipe: Recipe,
    output: DType | None,
    first_leaf: int,
    is_coded: bool,
) -> PlannedTensor:
    found = [layout.places[name] for layout in layouts]
    if not recipe.reading.takes(name):
        return _copied(name, spec, found, first_leaf)
    sources = tuple(
        Place(shard, each.begin, each.comes_as, each.significant) for shard, each in found
    )
    n_units = spec.n_elements if spec.dtype.averaged else spec.nbytes
    if is_coded:
        if any(each.delivered for _, each in found):
            raise MismatchError(
                f"{printable(name)}: is a part of a quantised weight, which is copied, but a "
                "source delivers it in another dtype; have it delivered as it is stored"
            )
        return PlannedTensor(name, spec.dtype, spec.shape, "code", n_units, sources, first_leaf)
    if spec.dtype.averaged:
        return PlannedTensor(
            name, output or spec.dtype, spec.shape, "mix", spec.n_elements, sources, first_leaf
        )
    # BatchNorm's counter of batches has no meaning for an average; nothing reads it by default.
    counter = name.rpartition(".")[2] == "num_batches_tracked"
    rule: Operation = "first" if recipe.non_float == "first" or counter else "same"
    return PlannedTensor(name, spec.dtype, spec.shape, rule, spec.nbytes, sources, first_leaf)


def _copied(
    name: str, spec: TensorSpec, found: Sequence[tuple[int, TensorSpec]], first_leaf: int
) -> PlannedTensor:
    """Plan a tensor that was chosen not to be averaged: that of the first ingredient."""
    sources = tuple(Place(shard, each.begin, each.comes_as) for shard, each in found)
    n_units = spec.n_elements if spec.dtype.averaged else spec.nbytes
    return PlannedTensor(name, spec.dtype, spec.shape, "first", n_units, sources, first_leaf)


def _shards(
    plan: MixPlan,
    files: Sequence[str],
    held: Sequence[Sequence[int]],
    indexes: Sequence[str],
    shard_size: int,
) -> tuple[list[str], list[list[int]], list[str]]:
    """Return names, tensors and indexes of new shards, for each folder of the first ingredient."""
    names: list[str] = []
    groups: list[list[int]] = []
    new_indexes: list[str] = []
    for folder in dict.fromkeys(map(posixpath.dirname, files)):
        inside = [n for n, file in enumerate(files) if posixpath.dirname(file) == folder]
        index = next((each for each in indexes if posixpath.dirname(each) == folder), None)
        shard = posixpath.basename(files[inside[0]])
        called = "model"
        if plan.ingredients[0].folder is not None:  # such as diffusion_pytorch_model
            numbered = index is None or is_numbered(shard)
            called = stem(shard if numbered else posixpath.basename(str(index)))
        cut = _cut(plan, sorted(i for n in inside for i in held[n]), shard_size)
        groups += cut
        names += [posixpath.join(folder, name) for name in shard_names(called, len(cut))]
        if len(cut) > 1:
            new_indexes.append(index or posixpath.join(folder, index_name(called)))
    return names, groups, new_indexes


def _mirrored(layout: Layout) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in layout.headers]
    for i, (number, _) in enumerate(layout.places.values()):
        groups[number].append(i)
    return groups


def _cut(plan: MixPlan, tensors: Sequence[int], shard_size: int) -> list[list[int]]:
    """Fill shards with tensors in order; one larger than the size has a shard of its own."""
    groups: list[list[int]] = [[]]
    filled = 0
    for i in tensors:
        tensor = plan.tensors[i]
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += tensor.nbytes
    return groups
