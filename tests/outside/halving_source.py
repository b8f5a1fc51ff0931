"""A source as a package outside of streamsoup would add it: half of what another one delivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup import Access, Cursor, ReadingCost, Source, SourceTensor, Suspects

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class Halved(Source):
    """Every float of another source, halved: in float64, or rounded to the dtype it has there."""

    def __init__(self, of: Source, *, exact: bool = True) -> None:
        self.of, self.exact = of, exact
        self._tensors = {name: self._halved(tensor) for name, tensor in of.tensors.items()}

    def _halved(self, tensor: SourceTensor) -> SourceTensor:
        delivered = "F64" if self.exact and tensor.dtype in ("F32", "F16", "BF16") else None
        return SourceTensor(tensor.dtype, tensor.shape, delivered, tensor.file)

    # What every source says.

    @property
    def name(self) -> str:
        """Name the source that is halved."""
        return f"half of {self.of.name}"

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Tell of the same tensors, some of them in float64."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """Depend on the source below and on the one parameter."""
        return ["halved", self.exact, self.of.fingerprint]

    def cursor(self, access: Access) -> Cursor:
        """Go through the source below, and halve what it delivers."""
        return HalvingCursor(self, self.of.cursor(access))

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Ask the source below."""
        self.of.check_unchanged(tensor)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Hold a block of the source below, and its values in float32 and float64."""
        below = self.of.cost(mapped=mapped)
        return ReadingCost(
            unit_nbytes=below.unit_nbytes + 8 + 4 + 8,
            cursor_nbytes=below.cursor_nbytes,
            opening_nbytes=below.opening_nbytes,
        )

    # What this one has from the source below.

    @property
    def folder(self) -> str | None:
        """Pass on the side files of the other source."""
        return self.of.folder

    @property
    def file_names(self) -> Sequence[str]:
        """Mirror its files."""
        return self.of.file_names

    @property
    def index_name(self) -> str | None:
        """Mirror its index."""
        return self.of.index_name

    @property
    def index_names(self) -> Sequence[str]:
        """Mirror its indexes, if it is a pipeline."""
        return self.of.index_names

    @property
    def components(self) -> Sequence[str]:
        """Mirror its components."""
        return self.of.components

    @property
    def copied(self) -> Sequence[str]:
        """Leave to the soup what it leaves."""
        return self.of.copied

    @property
    def files(self) -> Sequence[str]:
        """Read its files."""
        return self.of.files

    @property
    def memory(self) -> Mapping[str, Any]:
        """Read its live tensors."""
        return self.of.memory

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Suspect what it suspects."""
        return self.of.suspects(strict=strict)

    def settle(self, suspects: Suspects) -> None:
        """Let it remember."""
        self.of.settle(suspects)

    def where(self, tensor: str) -> str:
        """Name its file."""
        return self.of.where(tensor)


class HalvingCursor(Cursor):
    """One thread's way through the source below."""

    def __init__(self, source: Halved, below: Cursor) -> None:
        self._source, self._below = source, below

    def read(self, tensor: str, begin: int, block: memoryview) -> None:
        """Read a range of the source below, and put half of it into the block."""
        spec = self._source.tensors[tensor]
        below = self._source.of.tensors[tensor]
        if spec.dtype not in ("F64", "F32", "F16", "BF16"):
            self._below.read(tensor, begin, block)
            return
        size, own = itemsize(spec.delivered or spec.dtype), itemsize(below.delivered or below.dtype)
        raw = memoryview(bytearray(len(block) // size * own))
        self._below.read(tensor, begin // size * own, raw)
        half = values(raw, below.delivered or below.dtype) / 2
        if spec.delivered is None and spec.dtype == "BF16":
            raise NotImplementedError("this source halves bfloat16 exactly, or not at all")
        np.frombuffer(block, NUMPY[spec.delivered or spec.dtype])[:] = half

    def close(self) -> None:
        """Close the cursor below."""
        self._below.close()


def itemsize(dtype: str) -> int:
    """Return the bytes of an element."""
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def values(raw: memoryview, dtype: str) -> NDArray[np.float64]:
    """Return the values of raw elements."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(float)
    return np.frombuffer(raw, NUMPY[dtype]).astype(float)
