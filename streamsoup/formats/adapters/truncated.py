"""Adapters without a base, read so that their soup is one adapter of a lower rank.

The best approximation of Σᵢ cᵢ·sᵢ·Bᵢ·Aᵢ of rank R is U·Σᵢ cᵢ·(sᵢ·Uᵀ·Bᵢ·Aᵢ), where U are the first R
left singular vectors of the sum (`kernels.truncation`). So each adapter is read with U in the place
of B, which is the same in all, and with sᵢ·Uᵀ·Bᵢ·Aᵢ in the place of A: the linear soup of these,
with the coefficients on the side of A alone, is the adapter. A module whose ranks sum to R or less
is joined as it is, exactly.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamsoup.errors import NonFiniteError, printable
from streamsoup.formats.adapters.adapter import Adapter, Pair
from streamsoup.formats.adapters.joined import Joined, Place
from streamsoup.formats.files import Access
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.kernels.blocks import array_of, floats_of, widen
from streamsoup.kernels.truncation import dots, left_singular_vectors, product_nbytes
from streamsoup.system.buffers import Bytes

__all__ = ["Module", "Modules", "Truncated", "errors_of"]

Floats = NDArray[np.float64]

_KEPT = 4
"""Modules whose factors are kept: threads are at the A of one and the B of the one before."""


class Module(msgspec.Struct, frozen=True):
    """A module whose product is approximated."""

    pairs: tuple[Pair | None, ...]
    """Its factors in each adapter."""
    a: str
    b: str
    """The names of both factors in the soup."""
    n_rows: int
    n_columns: int
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes that its factors take while they are made."""
        own = sum(pair.rank for pair in self.pairs if pair is not None)
        made = self.rank * (self.n_rows + len(self.pairs) * self.n_columns)
        return product_nbytes(self.n_rows, self.n_columns, own) + 8 * made


class _Factors(msgspec.Struct, frozen=True):
    """The factors of a module: of B, which is the same for all, and of A in each adapter."""

    b: Floats
    """``(n_rows, rank)``"""
    a: tuple[Floats | None, ...]
    """``(rank, n_columns)``; None for an adapter that does not change the module."""
    error: float
    """The norm of what is left out, by that of the sum."""


class Modules:
    """The modules that are approximated, and the factors of the last few that were asked for."""

    def __init__(
        self, adapters: Sequence[Adapter], modules: Mapping[str, Module], factors: Sequence[float]
    ) -> None:
        """Keep what the sum of products is of: `factors` are the coefficients of the adapters."""
        self.adapters, self.modules, self.factors = tuple(adapters), modules, tuple(factors)
        self.of_tensor = {name: key for key, m in modules.items() for name in (m.a, m.b)}
        self._lock = threading.Lock()
        self._made: OrderedDict[str, _Factors] = OrderedDict()
        self._errors: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own, with a lock of its own."""
        return Modules, (self.adapters, self.modules, self.factors)

    @property
    def nbytes(self) -> int:
        """Most bytes that are held."""
        return _KEPT * max((module.nbytes for module in self.modules.values()), default=0)

    def of(self, name: str, access: Access) -> _Factors:
        """Return the factors of a module, made if they are not among the last few."""
        with self._lock:
            made = self._made.pop(name, None)
            if made is None:
                while len(self._made) >= _KEPT:
                    self._made.popitem(last=False)
                made = self._make(self.modules[name], access)
                self._errors[name] = made.error
            self._made[name] = made
            return made

    def errors(self, access: Access) -> dict[str, float]:
        """Return the relative error of each module, in the Frobenius norm."""
        return {
            name: self._errors[name] if name in self._errors else self.of(name, access).error
            for name in self.modules
        }

    def _make(self, module: Module, access: Access) -> _Factors:
        """Read the factors of all adapters, and make those of the soup."""
        own: list[tuple[Floats, Floats, float] | None] = []
        scaled: list[Floats] = []
        for adapter, pair, factor in zip(self.adapters, module.pairs, self.factors, strict=True):
            if pair is None:
                own.append(None)
                continue
            a = _read(adapter, pair.a, access).reshape(pair.rank, module.n_columns)
            b = _read(adapter, pair.b, access).reshape(module.n_rows, pair.rank).T.copy()
            own.append((b, a, pair.scale))
            with np.errstate(over="ignore"):
                scaled.append(b * (factor * pair.scale))
        rows = [each[1] for each in own if each is not None]
        vectors, values = left_singular_vectors(
            np.concatenate(scaled), np.concatenate(rows), module.rank
        )
        if not (np.isfinite(vectors).all() and np.isfinite(values).all()):
            raise NonFiniteError(
                f"{printable(module.b)}: the sum of these products is beyond the range of float64, "
                "so it has no best approximation; give smaller coefficients"
            )
        projected = tuple(None if each is None else _projected(vectors, *each) for each in own)
        return _Factors(vectors.T.copy(), projected, _left_out(values, module.rank))


def errors_of(source: Source) -> dict[str, float]:
    """Return the relative error of each module that a joined adapter approximates, by its name."""
    if not isinstance(source, Truncated):
        return {}
    with closing(Access(mapped=False)) as access:
        return source.modules.errors(access)


class Truncated(Joined):
    """One of several adapters, read so that the soup of all has a lower rank."""

    def __init__(
        self,
        of: Source,
        adapter: Adapter,
        tensors: Mapping[str, SourceTensor],
        places: Mapping[str, Place],
        config: bytes,
        number: int,
        modules: Modules,
    ) -> None:
        """Keep what `joining.join` found; `number` is that of this adapter among all."""
        super().__init__(of, adapter, tensors, places, config)
        self.number, self.modules = number, modules

    @property
    def fingerprint(self) -> Any:
        """That of the joined adapter, of those it is joined with, and their coefficients."""
        others = [adapter.stored.fingerprint for adapter in self.modules.adapters]
        return ["truncated", super().fingerprint, others, list(self.modules.factors)]

    @property
    def factors(self) -> Sequence[float]:
        """The coefficients of the sum that is approximated."""
        return self.modules.factors

    @property
    def reduced(self) -> Mapping[str, bool]:
        """The factors of the modules that are approximated; True for B."""
        return {
            name: name == self.modules.modules[m].b for name, m in self.modules.of_tensor.items()
        }

    def made_of(self, tensor: str) -> Collection[str]:
        """Return both factors of its own module, if the adapter has it."""
        name = self.modules.of_tensor.get(tensor)
        if name is None:
            return super().made_of(tensor)
        pair = self.modules.modules[name].pairs[self.number]
        return () if pair is None else (pair.a, pair.b)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that reads the adapters with `access`."""
        return _Cursor(self, access)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """What a joined adapter costs; the first one counts the factors that are held for all."""
        held = self.modules.nbytes if self.number == 0 else 0
        return msgspec.structs.replace(super().cost(mapped=mapped), held_nbytes=held)


class _Cursor(Cursor):
    """One thread's way through an adapter."""

    def __init__(self, source: Truncated, access: Access) -> None:
        self._source, self._access = source, access
        self._joined = Joined.cursor(source, access)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        """Fill a block with elements of the factors of the soup."""
        modules = self._source.modules
        name = modules.of_tensor.get(tensor)
        if name is None:
            self._joined.read(tensor, begin, block)
            return
        found = modules.of(name, self._access)
        own = found.b if tensor == modules.modules[name].b else found.a[self._source.number]
        out = floats_of(block)
        out[:] = 0.0 if own is None else own.reshape(-1)[begin // 8 : begin // 8 + len(out)]

    def close(self) -> None:
        """Close the cursor of the joined adapter."""
        self._joined.close()


def _left_out(values: Floats, rank: int) -> float:
    """Return the norm of the singular values from `rank` on, by that of all."""
    lengths = values / values[0] if values.size and 0 < values[0] < math.inf else values
    whole = math.fsum(lengths * lengths)
    return math.sqrt(math.fsum(lengths[rank:] * lengths[rank:]) / whole) if whole > 0 else 0.0


def _read(adapter: Adapter, tensor: str, access: Access) -> Floats:
    """Return a tensor of an adapter in float64. Raises `NonFiniteError` for NaN and Inf."""
    spec = adapter.spec(tensor)
    content = memoryview(bytearray(spec.nbytes))
    cursor = adapter.stored.cursor(access)
    try:
        cursor.read(tensor, 0, content)
    finally:
        cursor.close()
    values = widen(array_of(content), spec.dtype).astype(np.float64)
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"{adapter.stored.where(tensor)}: holds NaN or Inf, so the sum has no best "
            "approximation of a lower rank; leave this adapter out"
        )
    return values


def _projected(vectors: Floats, b: Floats, a: Floats, scale: float) -> Floats:
    """Return s·Uᵀ·B·A ``(rank, n_columns)``, the products of a rank added one after the other.

    U is `vectors` ``(rank, n_rows)``, and B is given by its columns ``(own rank, n_rows)``.
    """
    result = np.zeros((len(vectors), a.shape[1]))
    for column, row in zip(b, a, strict=True):
        result += dots(vectors, column)[:, None] * row[None, :]
    result *= scale
    return result
