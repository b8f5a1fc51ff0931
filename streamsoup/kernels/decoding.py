"""Codes of quantised weights to float64, in compiled loops or in numpy: the same bits.

`codes` is the specification, and does small jobs; `plain_codes` is what is compiled.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsoup.kernels import codes, tiers
from streamsoup.kernels.coding import Coding
from streamsoup.kernels.fast import objects
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.system.buffers import Bytes, address_of
from streamsoup.system.cgroup import memory_limit

__all__ = ["COMPILE_CODES", "Decoder", "decoder"]

COMPILE_CODES = 1 << 26
"""Codes from which compiling pays: numpy takes about as long for them as compiling does."""

COMPILE_ROOM = 219_000_000
"""Bytes a memory cgroup must allow for compiling, as for all kernels (`engine.reduce`)."""

_KINDS = ("F8_E4M3", "F8_E5M2", "E2M1")
_DECODE = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 10, ctypes.c_double, ctypes.c_int64)
_TRANSPOSED = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 10)
_ROOMS = ("codes.py", "coding.py", "constants.py", "plain.py", "plain_codes.py")

Floats = NDArray[np.float64]


class Decoder:
    """Decodes ranges of tensors; several threads may call it at once."""

    def __init__(self, rows: Kernel | None = None, columns: Kernel | None = None) -> None:
        """Wrap compiled loops, which live as long as this does; None for numpy."""
        self._kernels = rows, columns
        self._rows = None if rows is None else _DECODE(rows.address)
        self._columns = None if columns is None else _TRANSPOSED(columns.address)

    def scales(self, raw: Bytes, dtype: str) -> Floats:
        """Return the values of scales ``(scale,) float64``, one after the other."""
        return codes.scale_values(np.frombuffer(raw, np.uint8), dtype)

    def columns(self, raw: Bytes, dtype: str, width: int, chosen: slice) -> Floats:
        """Return some columns of rows of scales of a byte each ``(row, column) float64``."""
        table = np.frombuffer(raw, np.uint8).reshape(-1, width)
        return codes.scale_values(np.ascontiguousarray(table[:, chosen]), dtype)

    def decode(
        self, coding: Coding, content: Bytes, first: int, scales: Floats, divisor: float, out: Bytes
    ) -> None:
        """Decode elements in C order: see `codes.decode`. `content` are codes, `out` float64."""
        n = len(out) // 8
        if self._rows is None:
            raw, result = np.frombuffer(content, np.uint8), np.frombuffer(out, np.float64)
            codes.decode(coding, raw, first, scales, divisor, result)
            return
        table = (ctypes.c_double * 16)()
        self._rows(
            address_of(content),
            _KINDS.index(coding.kind),
            first,
            n,
            coding.n_columns,
            coding.n_rows,
            *coding.block,
            scales.ctypes.data,
            ctypes.addressof(table),
            divisor,
            address_of(out),
        )

    def decode_transposed(
        self,
        coding: Coding,
        content: Bytes,
        stride: int,
        column: int,
        first: int,
        scales: Floats,
        out: Bytes,
    ) -> None:
        """Decode elements of the transpose of a matrix: see `codes.decode_transposed`.

        `stride` is the distance of rows in `content`, in bytes.
        """
        if self._columns is None:
            raw = np.frombuffer(content, np.uint8)[: coding.n_rows * stride].reshape(-1, stride)
            result = np.frombuffer(out, np.float64)
            codes.decode_transposed(coding, raw, column, first, scales, result)
            return
        self._columns(
            address_of(content),
            stride,
            column,
            first,
            len(out) // 8,
            coding.n_rows,
            coding.block[1],
            scales.ctypes.data,
            scales.shape[1],
            address_of(out),
        )


def decoder(n_codes: int, *, compiles: bool) -> Decoder:
    """Return what decodes `n_codes`: compiled before, compiled now if that pays, or numpy.

    Without `compiles`, or where nothing may be compiled, loops in the cache are used, or numpy.
    Compiling takes some seconds, once per machine.
    """
    if tiers.tier() == "numpy":
        return Decoder()
    found = [objects.find(label, _ROOMS) for label in ("decode", "transposed")]
    if found[0] is not None and found[1] is not None:
        return Decoder(*found)
    is_off = os.environ.get("NUMBA_DISABLE_JIT", "").strip() not in ("", "0")
    if not compiles or is_off or n_codes < COMPILE_CODES or memory_limit() < COMPILE_ROOM:
        return Decoder()
    makes: list[Callable[[], Decoder]] = [_plain]
    if tiers.tier() == "fast":
        makes.insert(0, _kept)
    return tiers.first_compiled(*makes) or Decoder()


def _kept() -> Decoder:
    """Compile the loops, and keep them as object files."""
    from streamsoup.kernels.plain_codes import compile_decode, compile_transposed

    return Decoder(
        objects.make("decode", _ROOMS, _whole(compile_decode)),
        objects.make("transposed", _ROOMS, _whole(compile_transposed)),
    )


def _whole(compile_loop: Callable[..., Any]) -> Callable[[], tuple[str, bytes]]:
    """Return what compiles a loop anew: numba's cache keeps no object file to be read."""
    return lambda: objects.object_file(lambda: compile_loop(cache=False))


def _plain() -> Decoder:
    """Compile the loops in numba's ordinary way."""
    from streamsoup.kernels.plain_codes import compile_decode, compile_transposed

    rows, columns = compile_decode(), compile_transposed()
    return Decoder(Kernel(rows.address, rows), Kernel(columns.address, columns))
