"""Adapters without a base: one adapter that adds what all of them add, by concatenation.

Σᵢ cᵢ·sᵢ·Bᵢ·Aᵢ is the product of [c₁s₁B₁ c₂s₂B₂ …] and of A₁, A₂, … one below the other: factors of
rank Σrᵢ and scale 1. So each adapter is read with its factors at their place in the larger ones and
zeros elsewhere, and the linear soup of these is the adapter, if the coefficients of all A are 1:
the coefficients that are meant, and their signs, then stand on the side of B alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from streamsoup.errors import MismatchError, RecipeError, printable, some
from streamsoup.formats.adapters.adapter import PREFIX, WEIGHTS, Adapter, Pair, open_adapter
from streamsoup.formats.adapters.config import CONFIG
from streamsoup.formats.adapters.source import check_same_base
from streamsoup.formats.derived import Derived
from streamsoup.formats.files import Access
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.kernels.blocks import array_of, floats_of, widen
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import Bytes

__all__ = [
    "Joined",
    "are_adapters",
    "coefficients_of_all",
    "is_concatenation",
    "join",
    "open_alone",
]

_A = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")

_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that choose modules of the base together: kept where all adapters agree on them."""


class Place(msgspec.Struct, frozen=True):
    """Where the elements of a tensor of one adapter are among those of the joined tensor.

    Both are matrices of as many rows; the columns of the first begin at column `at` of the other.
    """

    own: str | None
    """Its name in the adapter; None for an adapter that does not have it."""
    columns: int
    at: int = 0
    width: int = 0
    """Columns of its own."""
    scale: float = 1.0


class Joined(Derived):
    """One of several adapters, with each tensor at its place in those of the adapter of all."""

    def __init__(
        self,
        of: Source,
        adapter: Adapter,
        tensors: Mapping[str, SourceTensor],
        places: Mapping[str, Place],
        config: bytes,
    ) -> None:
        """Keep what `join` found; `config` is that of the adapter of all."""
        self.of, self.adapter = of, adapter
        self._tensors, self.places, self._config = tensors, places, config

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Those of the adapter of all, in float32, and delivered in float64."""
        return self._tensors

    @property
    def folder(self) -> str:
        """The folder of the adapter, even if it was given by its file."""
        return self.adapter.folder

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The configuration of the adapter of all."""
        return {CONFIG: self._config}

    @property
    def files(self) -> Sequence[str]:
        """Factors and configuration."""
        return (*self.of.files, self.adapter.config.path)

    @property
    def fingerprint(self) -> Any:
        """That of the file, and all places and scales."""
        places = [[name, msgspec.to_builtins(place)] for name, place in self.places.items()]
        shapes = [list(tensor.shape) for tensor in self._tensors.values()]
        return ["joined", self.of.fingerprint, places, shapes]

    def made_of(self, tensor: str) -> Collection[str]:
        """Return its own tensor, if the adapter has one."""
        own = self.places[tensor].own
        return () if own is None else (own,)

    def where(self, tensor: str) -> str:
        """Name the file of its own tensor, or the adapter that has none."""
        own = self.places[tensor].own
        return f"{printable(self.name)}: {printable(tensor)}" if own is None else self.of.where(own)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that reads the adapter with `access`."""
        return _Cursor(self, access)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """What the adapter costs, and positions and values of the elements of a block."""
        below = self.of.cost(mapped=mapped)
        return ReadingCost(
            unit_nbytes=below.unit_nbytes + 64,
            cursor_nbytes=below.cursor_nbytes,
            opening_nbytes=below.opening_nbytes,
        )


class _Cursor(Cursor):
    """One thread's way through an adapter."""

    def __init__(self, source: Joined, access: Access) -> None:
        self._source = source
        self._below = source.of.cursor(access)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        """Fill a block with zeros, and the elements of the adapter that lie in it."""
        place = self._source.places[tensor]
        out = floats_of(block)
        out[:] = 0.0
        first, n = begin // 8, len(out)
        low, high = (_own_before(place, at) for at in (first, first + n))
        if place.own is None or low == high:
            return
        dtype = self._source.adapter.spec(place.own).dtype
        size = dtype.itemsize
        content = self._below.view(place.own, low * size, high * size)
        if content is None:
            content = memoryview(bytearray((high - low) * size))
            self._below.read(place.own, low * size, content)
        columns = np.arange(first, first + n) % place.columns - place.at
        values = widen(array_of(content), dtype).astype(np.float64)
        out[(columns >= 0) & (columns < place.width)] = values * place.scale

    def close(self) -> None:
        """Close the cursor below."""
        self._below.close()


def _own_before(place: Place, element: int) -> int:
    """Return how many elements of an adapter come before an element of the joined tensor."""
    row, column = divmod(element, place.columns)
    return row * place.width + min(max(column - place.at, 0), place.width)


def are_adapters(sources: Sequence[Source]) -> bool:
    """Return True if all are folders or files of PEFT's adapters, with a configuration."""
    return all(
        tuple(source.file_names) == (WEIGHTS,)
        and source.path is not None
        and os.path.exists(os.path.join(_folder(source), CONFIG))
        for source in sources
    )


def join(sources: Sequence[Source], cache: HeaderCache) -> list[Source]:
    """Return adapters as parts of one adapter. A single one stays as it is.

    Args:
        sources: Adapters, see `are_adapters`. Those that are joined are joined anew.
        cache: Headers parsed so far.

    Raises:
        FormatError: One is no plain LoRA: see `open_adapter`.
        MismatchError: They name different bases, a module has another shape in one, or only some
            have a tensor that is stored whole (``modules_to_save``).

    Reads headers and configurations.
    """
    found = [source.of if isinstance(source, Joined) else source for source in sources]
    if len(found) == 1:
        return found
    adapters = [open_alone(source, cache) for source in found]
    for adapter in adapters[1:]:
        check_same_base(adapters[0], adapter)
    tensors: dict[str, SourceTensor] = {}
    places: list[dict[str, Place]] = [{} for _ in adapters]
    ranks: dict[str, int] = {}
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.pairs)
    biased = any(pair.bias for adapter in adapters for pair in adapter.pairs.values())
    for module in modules:
        ranks[module] = _join_module(module, adapters, tensors, places, biased)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.whole):
        _join_whole(name, adapters, tensors, places)
    config = _config(adapters, ranks, biased)
    return [
        Joined(source, adapter, tensors, place, config)
        for source, adapter, place in zip(found, adapters, places, strict=True)
    ]


def open_alone(source: Source, cache: HeaderCache) -> Adapter:
    """Open the adapter that a source is, to know what it means. Raises as `open_adapter`."""
    return open_adapter(_folder(source), cache)


def _folder(source: Source) -> str:
    return source.folder or os.path.dirname(source.path or "")


def _join_module(
    module: str,
    adapters: Sequence[Adapter],
    tensors: dict[str, SourceTensor],
    places: Sequence[dict[str, Place]],
    biased: bool,
) -> int:
    """Find the places of the factors of one module; return its rank in the adapter of all."""
    pairs = [adapter.pairs.get(module) for adapter in adapters]
    number, first = next((n, pair) for n, pair in enumerate(pairs) if pair is not None)
    shapes = [
        None if pair is None else _outer_shapes(pair, adapter)
        for pair, adapter in zip(pairs, adapters, strict=True)
    ]
    for shape, pair, adapter in zip(shapes, pairs, adapters, strict=True):
        if pair is None:
            continue
        if pair.embedding != first.embedding:
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: an embedding has such factors, and its module is "
                f"none in {printable(adapters[number].name)}, or the other way round; these "
                "adapters belong to different bases"
            )
        if shape != shapes[number]:
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: its module has the shape {shape}, and "
                f"{shapes[number]} in {printable(adapters[number].name)}; these adapters belong to "
                "different bases"
            )
    a, b = (adapters[number].spec(name).shape for name in (first.a, first.b))
    rank = sum(pair.rank for pair in pairs if pair is not None)
    columns = max(math.prod(a[1:]), 1)  # of an empty tensor, nothing is ever read
    tensors[first.a] = SourceTensor("F32", (rank, *a[1:]), "F64")
    tensors[first.b] = SourceTensor("F32", (b[0], rank, *b[2:]), "F64")
    bias = f"{PREFIX}{module}.lora_B.bias" if biased and not first.embedding else None
    if bias is not None:
        tensors[bias] = SourceTensor("F32", (b[0],), "F64")
    at = 0
    for pair, own in zip(pairs, places, strict=True):
        if pair is None:
            own[first.a], own[first.b] = Place(None, rank * columns), Place(None, rank)
        else:
            own[first.a] = Place(pair.a, rank * columns, at * columns, pair.rank * columns)
            own[first.b] = Place(pair.b, rank, at, pair.rank, pair.scale)
            at += pair.rank
        if bias is not None:
            has = pair is not None and pair.bias is not None
            own[bias] = Place(pair.bias, b[0], 0, b[0], pair.scale) if has else Place(None, b[0])  # type: ignore[union-attr]
    return rank


def _outer_shapes(pair: Pair, adapter: Adapter) -> list[Any]:
    """Return the sizes of a pair of factors, but for the rank."""
    a, b = (adapter.spec(name).shape for name in (pair.a, pair.b))
    return [b[0], *b[2:], *a[1:]]


def _join_whole(
    name: str,
    adapters: Sequence[Adapter],
    tensors: dict[str, SourceTensor],
    places: Sequence[dict[str, Place]],
) -> None:
    """Find the place of a tensor that is stored whole: all adapters have to have it."""
    having = next(adapter for adapter in adapters if name in adapter.whole)
    target = having.whole[name]
    shape = having.spec(target).shape
    for adapter, own in zip(adapters, places, strict=True):
        if name not in adapter.whole:
            raise MismatchError(
                f"{having.stored.where(target)}: is stored whole, and {printable(adapter.name)} "
                "has none, so it is that of the base there; give the adapters over their base, "
                "as BASE+ADAPTER"
            )
        found = adapter.spec(adapter.whole[name]).shape
        if found != shape:
            raise MismatchError(
                f"{adapter.stored.where(adapter.whole[name])}: has the shape {list(found)}, and "
                f"{list(shape)} in {printable(having.name)}; only equal shapes can be averaged"
            )
        n = max(math.prod(shape), 1)
        own[target] = Place(adapter.whole[name], n, 0, n)
    tensors[target] = SourceTensor("F32", shape, "F64")


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], biased: bool) -> bytes:
    """Write the configuration of the adapter of all: that of the first, ranks, and a scale of 1."""
    made = dict(adapters[0].config.content)
    modules = ranks.keys()
    same = all(
        _choice(adapter.config.content) == _choice(made) and adapter.pairs.keys() == modules
        for adapter in adapters
    )
    if not same:
        made |= dict.fromkeys(_CHOICE) | {"target_modules": sorted(ranks)}
    common = Counter(ranks.values()).most_common(1)
    rank = common[0][0] if common else adapters[0].config.rank
    # Names in full, from their beginning: PEFT takes a pattern for the end of a name.
    others = {f"^{re.escape(name)}": n for name, n in ranks.items() if n != rank}
    made |= {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    made |= {"use_rslora": False, "lora_bias": biased, "init_lora_weights": True}
    return json.dumps(made, indent=2).encode() + b"\n"


def _choice(config: Mapping[str, Any]) -> list[Any]:
    """Return which modules a configuration chooses, lists in any order."""
    found = [config.get(key) or None for key in _CHOICE]
    return [sorted(map(str, each)) if isinstance(each, list) else each for each in found]


def coefficients_of_all(source: Source, coefficients: Coefficients) -> Coefficients:
    """Return coefficients with which the linear soup of joined adapters, or of one, is their sum.

    Those of every A are 1. Raises `RecipeError` where they do not sum to 1, and a tensor is stored
    whole: the base would be part of the sum, and is not given.
    """
    whole = [name for name in source.tensors if "lora_" not in name]
    off = [name for name in whole if not coefficients.is_affine(name)]
    if off:
        raise RecipeError(
            f"{printable(source.name)}: has {some(off, 3)} stored whole, so coefficients have to "
            "sum to 1; give others, or the adapters over their base, as BASE+ADAPTER"
        )
    ones = (1.0,) * len(coefficients.values)
    rows = {name: ones for name in source.tensors if _A.search(name)}
    return msgspec.structs.replace(coefficients, per_tensor=coefficients.per_tensor | rows)


def coefficients_meant(coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of the products: those of `coefficients_of_all`, without every A."""
    rows = {name: row for name, row in coefficients.per_tensor.items() if not _A.search(name)}
    return msgspec.structs.replace(coefficients, per_tensor=rows)


def is_concatenation(sources: Sequence[Source], coefficients: Coefficients | None) -> bool:
    """Return True if a linear soup of these sources is an adapter that adds what all of them add.

    They have to be joined, or be one adapter, and the coefficients of every A have to be 1.
    """
    joined = all(isinstance(source, Joined) for source in sources)
    if coefficients is None or not (joined or (len(sources) == 1 and are_adapters(sources))):
        return False
    firsts = [name for name in sources[0].tensors if _A.search(name)]
    return all(
        divisor == 1.0 and set(factors) == {1.0}
        for factors, divisor in map(coefficients.of, firsts)
    )
