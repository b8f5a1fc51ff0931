"""A base with adapters as a source: W + s·B·A in float64, made a block at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from streamsoup.errors import MismatchError, printable
from streamsoup.formats.adapters.adapter import Adapter, open_adapter
from streamsoup.formats.adapters.terms import Side, Term, terms_of, whole_of
from streamsoup.formats.derived import Derived
from streamsoup.formats.files import Access
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor, Suspects
from streamsoup.kernels.blocks import array_of, floats_of, widen
from streamsoup.kernels.low_rank import Compiled, Factor, add_product, compiled, scratch_nbytes
from streamsoup.system.buffers import Bytes
from streamsoup.tensors import DTYPES, DType

__all__ = ["Adapted", "check_same_base", "open_adapted"]

_COMPILED_FROM = 1 << 28
"""Products of an ingredient from which on compiling pays: numpy takes some seconds for them."""

_ONE = memoryview(bytearray(np.float32(1).tobytes()))


class Adapted(Derived):
    """A base and the adapters on it, as one checkpoint."""

    def __init__(self, base: Source, adapters: Sequence[Adapter]) -> None:
        """Find what is added where. Raises `MismatchError` where an adapter does not fit the base.

        Args:
            base: What they were trained on.
            adapters: One, or several, whose products are added in this order.
        """
        if tuple(base.components) != ("",):
            raise MismatchError(
                f"{printable(base.name)}: is a pipeline of components; give the folder of the "
                "component that the adapter belongs to as its base"
            )
        self.of, self.adapters = base, tuple(adapters)
        self.terms: dict[str, list[Term]] = {}
        self.whole: dict[str, tuple[int, str]] = {}
        for number, adapter in enumerate(adapters):
            for name, term in terms_of(number, adapter, base).items():
                self.terms.setdefault(name, []).append(term)
            for name, own in whole_of(adapter, base).items():
                if name in self.whole:
                    raise MismatchError(
                        f"{adapter.stored.where(own)}: another adapter replaces it, too; only one "
                        "of them can"
                    )
                self.whole[name] = (number, own)
        for name in self.whole.keys() & self.terms.keys():
            number, own = self.whole[name]
            raise MismatchError(
                f"{adapters[number].stored.where(own)}: is replaced by one adapter and changed by "
                "factors; merge these adapters with peft first"
            )
        self._tensors = self._described()
        self._lock = threading.Lock()
        self._kernel: Compiled | None = None
        self._looked = not self._pays()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own, with a lock and a kernel of its own."""
        return Adapted, (self.of, self.adapters)

    def _described(self) -> dict[str, SourceTensor]:
        """Describe all tensors: those of the base, changed ones in float64, and new ones last."""
        found: dict[str, SourceTensor] = {}
        for name, tensor in self.of.tensors.items():
            if name in self.terms:
                tensor = SourceTensor(tensor.dtype, tensor.shape, "F64", tensor.file)
            elif name in self.whole:
                comes = self._spec(*self.whole[name]).dtype.name
                tensor = SourceTensor(tensor.dtype, tensor.shape, comes, tensor.file)
            found[name] = tensor
        for name, (number, own) in self.whole.items():
            if name not in found:
                spec = self._spec(number, own)
                last = len(self.of.file_names) - 1
                found[name] = SourceTensor(spec.dtype.name, spec.shape, None, last)
        return found

    def _spec(self, number: int, own: str) -> Any:
        return self.adapters[number].spec(own)

    def _pays(self) -> bool:
        """Return True if there is enough to multiply for a compiled loop."""
        n = 0
        for name, terms in self.terms.items():
            elements = int(np.prod([float(size) for size in self._tensors[name].shape]))
            n += elements * sum(term.rank for term in terms)
        return n >= _COMPILED_FROM

    @property
    def kernel(self) -> Compiled | None:
        """The compiled loop, made when it is first asked for; None where numpy does."""
        with self._lock:
            if not self._looked:
                self._kernel, self._looked = compiled(), True
            return self._kernel

    def made_of(self, tensor: str) -> Collection[str]:
        """Return the tensor itself; nothing of the base for what an adapter replaces or adds."""
        return () if tensor in self.whole else (tensor,)

    @property
    def name(self) -> str:
        """The path as it was given."""
        return "+".join([self.of.name, *(each.name for each in self.adapters)])

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Those of the base, and modules that only an adapter has."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """That of the base, and files, factors and scales of the adapters."""
        terms = [
            [name, [msgspec.to_builtins(term) for term in terms]]
            for name, terms in self.terms.items()
        ]
        whole = [[name, number, own] for name, (number, own) in self.whole.items()]
        files = [adapter.stored.fingerprint for adapter in self.adapters]
        return ["adapted", self.of.fingerprint, files, terms, whole]

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that reads base and adapters with `access`."""
        return _Cursor(self, access)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Ask the base, and the adapters that a tensor is made with."""
        super().check_unchanged(tensor)
        numbers = {term.adapter for term in self.terms.get(tensor or "", ())}
        if tensor in self.whole:
            numbers.add(self.whole[tensor][0])
        for number in sorted(numbers) if tensor is not None else range(len(self.adapters)):
            self.adapters[number].stored.check_unchanged()

    def cost(self, *, mapped: bool) -> ReadingCost:
        """What the base costs, a block of it, scratch, and factors that are read, not mapped."""
        below = self.of.cost(mapped=mapped)
        ranks = [term.rank for terms in self.terms.values() for term in terms]
        held = max(map(scratch_nbytes, ranks), default=0)
        if not mapped:
            held += sum(self._factors_nbytes(number) for number in range(len(self.adapters)))
        widest = max((self._delivered(name).itemsize for name in self.terms), default=0)
        opening = [each.stored.cost(mapped=mapped).opening_nbytes for each in self.adapters]
        return ReadingCost(
            unit_nbytes=below.unit_nbytes + (0 if below.views else widest),
            cursor_nbytes=below.cursor_nbytes + held,
            opening_nbytes=max(below.opening_nbytes, *opening),
        )

    def _factors_nbytes(self, number: int) -> int:
        """Return the bytes of the largest L of an adapter, and of its largest R."""
        terms = [t for terms in self.terms.values() for t in terms if t.adapter == number]
        lefts = [self._spec(number, t.left.tensor).nbytes for t in terms if t.left is not None]
        rights = [self._spec(number, t.right.tensor).nbytes for t in terms]
        return max(lefts, default=0) + max(rights, default=0)

    def _delivered(self, name: str) -> DType:
        tensor = self.of.tensors[name]
        return DTYPES[tensor.delivered or tensor.dtype]

    @property
    def path(self) -> str | None:
        """The paths of base and adapters, joined by plus signs."""
        if self.of.path is None:
            return None
        return "+".join([self.of.path, *(os.path.abspath(each.folder) for each in self.adapters)])

    @property
    def files(self) -> Sequence[str]:
        """The files of base and adapters."""
        configs = [each.config.path for each in self.adapters]
        return (
            *self.of.files,
            *(file for each in self.adapters for file in each.stored.files),
            *configs,
        )

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return the tensors that base or adapters suspect."""
        below = self.of.suspects(strict=strict)
        tensors = set() if below is None else set(below.tensors)
        above = [each.stored.suspects(strict=strict) for each in self.adapters]
        for number, found in enumerate(above):
            if found is not None:
                used = [
                    n for n, terms in self.terms.items() if any(t.adapter == number for t in terms)
                ]
                tensors |= {*used, *(n for n, (of, _) in self.whole.items() if of == number)}
        if below is None and not any(above):
            return None
        return Suspects([name for name in self._tensors if name in tensors], (below, above))

    def settle(self, suspects: Suspects) -> None:
        """Let base and adapters remember."""
        below, above = suspects.state
        if below is not None:
            self.of.settle(below)
        for adapter, found in zip(self.adapters, above, strict=True):
            if found is not None:
                adapter.stored.settle(found)

    def where(self, tensor: str) -> str:
        """Name the file of the base; for what an adapter changes, that of the adapter, too."""
        if tensor in self.whole:
            number, own = self.whole[tensor]
            return self.adapters[number].stored.where(own)
        if tensor not in self.terms:
            return self.of.where(tensor)
        return f"{printable(self.name)}: {printable(tensor)}"


class _Cursor(Cursor):
    """One thread's way through a base and its adapters."""

    def __init__(self, source: Adapted, access: Access) -> None:
        self._source = source
        self._base = source.of.cursor(access)
        # Two ways through each adapter: a view of one factor is to outlive that of the other.
        self._ways = [[each.stored.cursor(access) for _ in "LR"] for each in source.adapters]
        self._read: dict[tuple[int, int], tuple[str, Bytes]] = {}

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        """Return what base or adapter have as it is."""
        source = self._source
        if tensor in source.terms:
            return None
        if tensor in source.whole:
            number, own = source.whole[tensor]
            return self._ways[number][0].view(own, begin, end)
        return self._base.view(tensor, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        """Fill a block with elements of W + s·B·A, or with what base or adapter have."""
        source = self._source
        if tensor in source.whole:
            number, own = source.whole[tensor]
            self._ways[number][0].read(own, begin, block)
            return
        if tensor not in source.terms:
            self._base.read(tensor, begin, block)
            return
        dtype = source._delivered(tensor)
        first, size = begin // 8, dtype.itemsize
        n = len(block) // 8
        base = self._base.view(tensor, first * size, (first + n) * size)
        if base is None:
            base = memoryview(bytearray(n * size))
            self._base.read(tensor, first * size, base)
        for term in source.terms[tensor]:
            left, right = self._factor(term, 0, term.left), self._factor(term, 1, term.right)
            kernel = source.kernel
            if kernel is not None and kernel.takes(dtype, left.dtype, right.dtype):
                rank, scale = term.rank, term.scale
                kernel(block, base, dtype, first, term.columns, left, right, rank, scale)
            else:
                values = floats_of(block)
                if base is not block:
                    _widen_into(values, base, dtype)
                add_product(values, first, term.columns, left, right, term.rank, term.scale)
            base, dtype = block, DTYPES["F64"]

    def _factor(self, term: Term, way: int, side: Side | None) -> Factor:
        """Return a factor, where it lies or as it was read last."""
        if side is None:
            return Factor(_ONE, DTYPES["F32"], 1, 1)
        spec = self._source._spec(term.adapter, side.tensor)
        cursor = self._ways[term.adapter][way]
        content = cursor.view(side.tensor, 0, spec.nbytes)
        if content is None:
            kept = self._read.get((term.adapter, way))
            if kept is None or kept[0] != side.tensor:
                content = memoryview(bytearray(spec.nbytes))
                cursor.read(side.tensor, 0, content)
                kept = self._read[term.adapter, way] = (side.tensor, content)
            content = kept[1]
        return Factor(content, spec.dtype, side.step, side.step_k)

    def close(self) -> None:
        """Close the cursors below."""
        for cursor in (self._base, *(each for ways in self._ways for each in ways)):
            cursor.close()


def _widen_into(values: Any, base: Bytes, dtype: DType, piece: int = 1 << 12) -> None:
    """Put the values of a block into float64, a piece at a time."""
    size = dtype.itemsize
    for at in range(0, len(values), piece):
        part = array_of(base[at * size : (at + piece) * size])
        values[at : at + piece] = widen(part, dtype)


def open_adapted(base: Source, paths: Sequence[str], cache: HeaderCache) -> Adapted:
    """Open adapters over an open base. Raises as `open_adapter` and `Adapted` do."""
    adapters = [open_adapter(path, cache) for path in paths]
    for adapter in adapters:
        first = cache.bases.setdefault(base.path or base.name, adapter)
        check_same_base(first, adapter)
    return Adapted(base, adapters)


def check_same_base(one: Adapter, other: Adapter) -> None:
    """Raise `MismatchError` if two adapters name different bases; a path may stand for a hub id."""
    names = [each.config.base for each in (one, other)]
    ends = {name.rstrip("/").rpartition("/")[2].lower() for name in names if name}
    if len(ends) > 1:
        raise MismatchError(
            f"{printable(other.config.path)}: names the base {printable(names[1])}, and "
            f"{printable(one.config.path)} names {printable(names[0])}; only adapters of one base "
            "can be combined"
        )
