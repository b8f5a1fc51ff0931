"""A source whose quantised weights are delivered as codes times scales, exact, in float64.

A range of elements is made of the range of its codes, which lie side by side, and of the rows of
scales that it reaches into; where a matrix is delivered transposed, of some columns of its codes.
So memory is bounded by the range, whatever the size of the tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streamsoup.errors import count, some
from streamsoup.formats.derived import Derived, in_files
from streamsoup.formats.files import Access
from streamsoup.formats.quantised.layouts import Weight, Weights
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.kernels.coding import DECODING_NBYTES, KERNELS_NBYTES
from streamsoup.system.buffers import Bytes, buffer
from streamsoup.tensors import DTYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamsoup.kernels.decoding import Decoder

__all__ = ["STANDS_FOR", "Dequantised"]

STANDS_FOR = "BF16"
"""The dtype of a soup of quantised weights, unless another one is asked for."""

SIGNIFICANT = 32
"""Bits that a product needs at most: 4 of a code, 4 of a scale and 24 of another."""

STRIPE_NBYTES = 1 << 20
"""Bytes of codes that are held of a matrix that is delivered transposed and cannot be mapped."""

_SCALE_NBYTES = 32
"""Bytes held for each scale: as it is stored, as an integer, and as float64, twice."""


class Dequantised(Derived):
    """A checkpoint without its codes: their values instead, in bfloat16 unless told otherwise."""

    def __init__(self, of: Source, weights: Weights) -> None:
        """Hold the source of codes and scales, and which of them belong together."""
        self.of, self.weights = of, weights.by_name
        self._found, self._left_out = weights, weights.left_out
        parts = {part for weight in self.weights.values() for part in weight.parts}
        dropped = {*parts, *self._left_out} - {weight.codes for weight in self.weights.values()}
        whole_of = {weight.codes: name for name, weight in self.weights.items()}
        kept = {name: each for name, each in of.tensors.items() if name not in dropped}
        found: dict[str, SourceTensor] = {}
        for name, each in kept.items():
            if name in whole_of:
                weight = self.weights[whole_of[name]]
                bits = 53 if weight.divides else SIGNIFICANT
                made = SourceTensor(STANDS_FOR, weight.shape, "F64", each.file, bits)
                found[whole_of[name]] = made
            else:
                found[name] = each
        self._tensors, self._file_names = in_files(found, of.file_names)
        self._lock = threading.Lock()
        self._decoder: Decoder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own, with a lock and a decoder of its own."""
        return Dequantised, (self.of, self._found)

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """The weights and all that is no part of one, in the order of the codes."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """That of the codes and scales."""
        return ["dequantised", self.of.fingerprint]

    @property
    def file_names(self) -> Sequence[str]:
        """The files that hold more than scales."""
        return self._file_names

    @property
    def notes(self) -> Sequence[str]:
        """Scales that are left out."""
        if not self._left_out:
            return self.of.notes
        what = count(len(self._left_out), "scale")
        return (
            *self.of.notes,
            f"{self.of.where(self._left_out[0])}: {what} of activations or of cached keys and "
            f"values left out, as no weight is multiplied by them: {some(self._left_out, 3)}",
        )

    def made_of(self, tensor: str) -> Collection[str]:
        """Return the names of codes and scales."""
        weight = self.weights.get(tensor)
        return (tensor,) if weight is None else weight.parts

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Codes, unless they are mapped, and a few scales; rows of scales, and stripes of codes."""
        below = self.of.cost(mapped=mapped)
        codings = [weight.coding for weight in self.weights.values()]
        per_code = [
            -(-_SCALE_NBYTES * coding.scale_columns // (coding.n_columns * coding.block[0]))
            for coding in codings
        ]
        rows = [
            2 * _SCALE_NBYTES * max(coding.scale_columns, weight.transposed * coding.n_rows)
            for weight, coding in zip(self.weights.values(), codings, strict=True)
        ]
        stripes = [
            weight.coding.n_rows * self.stripe_nbytes(weight)
            for weight in self.weights.values()
            if weight.transposed and not below.views
        ]
        return ReadingCost(
            unit_nbytes=below.unit_nbytes + (not below.views) + max(per_code, default=0),
            cursor_nbytes=2 * below.cursor_nbytes
            + max(rows, default=0)
            + max(stripes, default=0)
            + DECODING_NBYTES,
            opening_nbytes=below.opening_nbytes,
            held_nbytes=below.held_nbytes + 500 * len(self._tensors),  # measured: 480 each
            compiling_nbytes=KERNELS_NBYTES,
        )

    @staticmethod
    def stripe_nbytes(weight: Weight) -> int:
        """Return the bytes of each row that a stripe of codes has, in whole blocks of scales."""
        row = weight.coding.n_columns // 2
        return min(row, max(16, STRIPE_NBYTES // weight.coding.n_rows // 16 * 16))

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that multiplies; the first one finds, or compiles, what it does so with.

        Codes and scales have a cursor each below, as they lie apart.
        """
        with self._lock:
            if self._decoder is None:
                from streamsoup.kernels.decoding import decoder

                self._decoder = decoder(self._n_codes, compiles=access.compiles)
        return _Multiplying(self, self._decoder, self.of.cursor(access), self.of.cursor(access))

    @cached_property
    def _n_codes(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.weights.values())


class _Multiplying(Cursor):
    """One thread's way: codes and scales of a range, multiplied into the engine's block."""

    def __init__(self, of: Dequantised, decoder: Decoder, codes: Cursor, scales: Cursor) -> None:
        self._of, self._decoder, self._codes, self._scales = of, decoder, codes, scales
        self._second: tuple[str, float] = ("", 1.0)
        self._stripe: tuple[str, int, int, Bytes] | None = None
        """Of a transposed weight: its name, matrix and first byte of each row, and the codes."""

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        return None if tensor in self._of.weights else self._codes.view(tensor, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        weight = self._of.weights.get(tensor)
        if weight is None:
            self._codes.read(tensor, begin, block)
        elif not weight.transposed:
            self._read_rows(weight, begin // 8, block)
        else:
            size = 8 * weight.coding.n_rows * weight.coding.n_columns
            done = 0
            while done < len(block):  # one matrix after the other
                matrix, at = divmod(begin + done, size)
                n = min(len(block) - done, size - at)
                self._read_columns(weight, matrix, at // 8, block[done : done + n])
                done += n

    def close(self) -> None:
        self._codes.close()
        self._scales.close()

    def _read_rows(self, weight: Weight, first: int, block: Bytes) -> None:
        coding, end = weight.coding, first + len(block) // 8
        row, last = coding.scale_row(first), coding.scale_row(end - 1)
        width = coding.scale_columns
        scales = self._scale_values(weight, row * width, (last + 1) * width)
        per_code = 2 if coding.kind == "E2M1" else 1
        codes = _bytes(self._codes, weight.codes, first // per_code, -(-end // per_code))
        divisor = self._second_of(weight) if weight.divides else 1.0
        if weight.second is not None and not weight.divides:
            scales *= self._second_of(weight)
        self._decoder.decode(coding, codes, first, scales.reshape(-1, width), divisor, block)

    def _read_columns(self, weight: Weight, matrix: int, first: int, block: Bytes) -> None:
        """Read elements from `first` on of the transpose of a matrix."""
        coding = weight.coding
        last = (first + len(block) // 8 - 1) // coding.n_rows
        row_nbytes, width = coding.n_columns // 2, coding.scale_columns
        base = matrix * coding.n_rows
        scales = _bytes(self._scales, weight.scales, base * width, (base + coding.n_rows) * width)
        column = first // coding.n_rows
        blocks = slice(column // coding.block[1], last // coding.block[1] + 1)
        values = self._decoder.columns(scales, weight.scale_dtype, width, blocks)
        codes = self._codes.view(
            weight.codes, base * row_nbytes, (base + coding.n_rows) * row_nbytes
        )
        if codes is not None:
            self._decoder.decode_transposed(coding, codes, row_nbytes, 0, first, values, block)
            return
        done, stripe_nbytes = 0, self._of.stripe_nbytes(weight)
        while done < len(block) // 8:
            at = first + done
            byte = at // coding.n_rows // 2 // stripe_nbytes * stripe_nbytes
            width_here = min(stripe_nbytes, row_nbytes - byte)
            end = min(first + len(block) // 8, 2 * (byte + width_here) * coding.n_rows)
            part = values[:, at // coding.n_rows // coding.block[1] - blocks.start :].copy()
            self._decoder.decode_transposed(
                coding,
                self._stripe_of(weight, matrix, byte, width_here),
                width_here,
                2 * byte,
                at,
                part,
                block[8 * done : 8 * (end - first)],
            )
            done = end - first

    def _stripe_of(self, weight: Weight, matrix: int, byte: int, width: int) -> Bytes:
        """Read some bytes of each row of a matrix, unless they are held already."""
        key = (weight.codes, matrix, byte)
        if self._stripe is None or self._stripe[:3] != key:
            self._stripe = None
            rows, row_nbytes = weight.coding.n_rows, weight.coding.n_columns // 2
            stripe = buffer(rows * width)
            for row in range(rows):
                at = (matrix * rows + row) * row_nbytes + byte
                self._codes.read(weight.codes, at, stripe[row * width : (row + 1) * width])
            self._stripe = (*key, stripe)
        return self._stripe[3]

    def _scale_values(self, weight: Weight, begin: int, end: int) -> NDArray[np.float64]:
        """Return scales `begin` to `end` ``(scale,) float64``, in the caller's own memory."""
        size = DTYPES[weight.scale_dtype].nbits // 8
        raw = _bytes(self._scales, weight.scales, begin * size, end * size)
        return self._decoder.scales(raw, weight.scale_dtype)

    def _second_of(self, weight: Weight) -> float:
        assert weight.second is not None
        if self._second[0] != weight.second:
            raw = _bytes(self._scales, weight.second, 0, 4)
            self._second = (weight.second, float(self._decoder.scales(raw, "F32")[0]))
        return self._second[1]


def _bytes(cursor: Cursor, tensor: str, begin: int, end: int) -> Bytes:
    """Return bytes of a stored tensor, where they lie or read."""
    found = cursor.view(tensor, begin, end)
    if found is None:
        found = buffer(end - begin)
        cursor.read(tensor, begin, found)
    return found
