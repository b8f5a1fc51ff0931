"""Adapters without a base: one adapter that adds what all of them add, by concatenation.

Σᵢ cᵢ·sᵢ·Bᵢ·Aᵢ is the product of [c₁s₁B₁ c₂s₂B₂ …] and of A₁, A₂, … one below the other: factors of
rank Σrᵢ and scale 1. So each adapter is read with its factors at their place in the larger ones and
zeros elsewhere, and the linear soup of these is the adapter, if the coefficients of all A are 1:
the coefficients that are meant, and their signs, then stand on the side of B alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from streamsoup.errors import RecipeError, printable, some
from streamsoup.formats.adapters.adapter import WEIGHTS, Adapter
from streamsoup.formats.adapters.config import CONFIG
from streamsoup.formats.derived import Derived
from streamsoup.formats.files import Access
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.kernels.blocks import array_of, floats_of, widen
from streamsoup.recipe import Coefficients
from streamsoup.system.buffers import Bytes

__all__ = [
    "Joined",
    "Place",
    "are_adapters",
    "coefficients_meant",
    "coefficients_of_all",
    "folder_of",
    "is_concatenation",
]

_A = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")


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
        """Keep what `joining.join` found; `config` is that of the adapter of all."""
        self.of, self.adapter = of, adapter
        self._tensors, self.places, self._config = tensors, places, config

    @property
    def factors(self) -> Sequence[float] | None:
        """The coefficients of the sum whose rank is reduced; None where none is."""
        return None

    @property
    def reduced(self) -> Mapping[str, bool]:
        """Factors of modules whose rank is reduced; True for those that are the same in all."""
        return {}

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
        with np.errstate(all="ignore"):  # what is not finite is refused where it is summed
            values *= place.scale
        out[(columns >= 0) & (columns < place.width)] = values

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
        and os.path.exists(os.path.join(folder_of(source), CONFIG))
        for source in sources
    )


def folder_of(source: Source) -> str:
    """Return the folder of an adapter, even if it was given by its file."""
    return source.folder or os.path.dirname(source.path or "")


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
    rows = coefficients.per_tensor | _other_sides(source, len(coefficients.values))
    return msgspec.structs.replace(coefficients, per_tensor=rows)


def coefficients_meant(source: Source, coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of the products: what `coefficients_of_all` was given."""
    sides = _other_sides(source, len(coefficients.values))
    rows = {name: row for name, row in coefficients.per_tensor.items() if name not in sides}
    return msgspec.structs.replace(coefficients, per_tensor=rows)


def _other_sides(source: Source, n: int) -> dict[str, tuple[float, ...]]:
    """Return the factors that have no coefficient, with what they are summed by instead.

    Every A is joined to those of the others. Where the rank is reduced, B is the same in all, and
    is that of the first.
    """
    reduced = source.reduced if isinstance(source, Joined) else {}
    first = (1.0, *[0.0] * (n - 1))
    joined = {
        name: (1.0,) * n for name in source.tensors if _A.search(name) and name not in reduced
    }
    return joined | {name: first for name, is_common in reduced.items() if is_common}


def is_concatenation(sources: Sequence[Source], coefficients: Coefficients | None) -> bool:
    """Return True if a linear soup of these sources is an adapter that adds what all of them add.

    They have to be joined, or be one adapter, and the coefficients have to be on one side alone.
    """
    joined = all(isinstance(source, Joined) for source in sources)
    if coefficients is None or not (joined or (len(sources) == 1 and are_adapters(sources))):
        return False
    first = sources[0]
    sides = _other_sides(first, len(sources))
    factors = first.factors if isinstance(first, Joined) else None
    if factors is not None:
        values = tuple(value / coefficients.divisor for value in coefficients.values)
        if values != tuple(factors) or coefficients.per_tensor.keys() != sides.keys():
            return False  # another sum has another best approximation
    return all(coefficients.of(name) == (row, 1.0) for name, row in sides.items())
