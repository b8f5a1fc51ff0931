"""How codes of quantised weights belong to their scales: plain data, without numpy."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["DECODING_NBYTES", "FLOATS", "KERNELS_NBYTES", "Coding"]

FLOATS = {"F8_E4M3": (8, 3, 7), "F8_E5M2": (8, 2, 15), "E2M1": (4, 1, 1)}
"""Bits, fraction bits and exponent bias of each kind of code."""

DECODING_NBYTES = 320_000
"""Bytes that numpy holds of a tile: three numbers of 8 bytes for each code, and their parts."""

KERNELS_NBYTES = 9 * 2**20
"""Bytes that compiling both loops of `plain_codes` takes, beside other kernels."""


class Coding(msgspec.Struct, frozen=True):
    """How the codes of equally large matrices, one after the other, belong to their scales."""

    kind: Literal["F8_E4M3", "F8_E5M2", "E2M1"]
    n_rows: int
    """Rows of one matrix."""
    n_columns: int
    """Codes of one row."""
    block: tuple[int, int]
    """Rows and columns that have a scale in common; the last ones of a matrix may be fewer."""

    @property
    def scale_rows(self) -> int:
        """Rows of scales of one matrix."""
        return -(-self.n_rows // self.block[0])

    @property
    def scale_columns(self) -> int:
        """Scales of one of these rows."""
        return -(-self.n_columns // self.block[1])

    def scale_row(self, element: int) -> int:
        """Return the row of scales of an element, counted over all matrices."""
        matrix, row = divmod(element // self.n_columns, self.n_rows)
        return matrix * self.scale_rows + row // self.block[0]

    def nbytes(self, n_codes: int) -> int:
        """Return the bytes that codes take, which begin and end with a byte."""
        return n_codes * FLOATS[self.kind][0] // 8
