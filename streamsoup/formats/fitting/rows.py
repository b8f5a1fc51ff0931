"""A source whose embeddings have further rows: the mean of those rows where there are any.

An ingredient that lacks a row of an embedding says nothing of that row. It is given the mean of the
row in the ingredients that have it, in float64 and in their order. So a row that one ingredient has
is that row in any soup with coefficients that sum to 1, and a uniform soup has the mean of those
that have it; a merge method sees no change of that row to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from streamsoup.formats.files import Access
from streamsoup.formats.fitting.arranged import Fitted, together
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor
from streamsoup.tensors import DTYPES, DType

__all__ = ["Lengthened"]


class Lengthened(Fitted):
    """A source with some tensors that have more rows than they are stored with."""

    def __init__(
        self,
        of: Source,
        n_rows: Mapping[str, int],
        others: Sequence[Source],
        longest: Source,
        notes: Sequence[str] = (),
    ) -> None:
        """Hold what it is made of.

        Args:
            of: The source that lacks rows.
            n_rows: How many rows each of these tensors is to have.
            others: The sources that may have them, in the order of the sum.
            longest: The one of them whose vocabulary the soup has.
            notes: What is worth a warning.
        """
        self.longest, self._own_notes = longest, tuple(notes)
        self.of, self.others = of, tuple(others)
        self.n_rows = dict(n_rows)
        self._tensors = {
            name: tensor
            if name not in n_rows
            else replace(
                tensor, shape=(n_rows[name], *tensor.shape[1:]), delivered="F64", significant=53
            )
            for name, tensor in of.tensors.items()
        }

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors, some of them with more rows, in float64."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """Of what it is made."""
        others = [other.fingerprint for other in self.others]
        return ["lengthened", self.of.fingerprint, sorted(self.n_rows.items()), others]

    @property
    def notes(self) -> Sequence[str]:
        """What is worth a warning."""
        return (*self.of.notes, *self._own_notes)

    def made_of(self, tensor: str) -> Collection[str]:
        """Return the name of its own rows."""
        return (tensor,)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Look at all that have rows of a tensor."""
        super().check_unchanged(tensor)
        if tensor is None or tensor in self.n_rows:
            for other in self.others:
                other.check_unchanged(tensor)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Return the costs of all; and what is read, and its values, for each element."""
        below = together([each.cost(mapped=mapped) for each in (self.of, *self.others)])
        held = below.held_nbytes + 250 * len(self._tensors)
        return replace(below, views=False, unit_nbytes=below.unit_nbytes + 32, held_nbytes=held)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that has one of each source."""
        from streamsoup.formats.fitting.lengthening import Lengthening

        sources = (self.of, *self.others)
        held = [{name: _held(source.tensors[name]) for name in self.n_rows} for source in sources]
        return Lengthening(held, [source.cursor(access) for source in sources])


def _held(tensor: SourceTensor) -> tuple[int, DType]:
    """Return how many elements a source has of a tensor, and in which dtype they come."""
    return math.prod(tensor.shape), DTYPES[tensor.delivered or tensor.dtype]
