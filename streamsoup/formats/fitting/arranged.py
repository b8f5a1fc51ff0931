"""A source with some tensors of another one, under other names, and some of a third."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from streamsoup.formats.derived import Derived, in_files
from streamsoup.formats.files import Access
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor, Suspects
from streamsoup.system.buffers import Bytes

__all__ = ["Arranged", "Fitted"]


class Fitted(Derived):
    """A source made to fit the others of one soup."""

    others: Sequence[Source] = ()
    """Sources whose tensors it delivers, beside its own: it is another without them."""


class Arranged(Fitted):
    """Tensors of one source under given names, and tensors of another one."""

    def __init__(
        self,
        of: Source,
        names: Mapping[str, str],
        lender: Source | None = None,
        borrowed: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Hold what it is made of.

        Args:
            of: The source whose files and side files it has.
            names: What it delivers of `of`: the name here, and the name there.
            lender: The source that the `borrowed` tensors are of.
            borrowed: Names of tensors of `lender` that it delivers, too.
            notes: What is worth a warning.
        """
        self.of, self._names, self._own_notes = of, dict(names), tuple(notes)
        self._lender, self._borrowed = lender, frozenset(borrowed)
        self.others = (lender,) if lender is not None and borrowed else ()
        found = {name: of.tensors[own] for name, own in self._names.items()}
        if lender is not None:
            found |= {
                name: msgspec.structs.replace(lender.tensors[name], file=0) for name in borrowed
            }
        self._tensors, self._file_names = in_files(found, of.file_names)

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its own tensors, and then the borrowed ones."""
        return self._tensors

    @property
    def fingerprint(self) -> Any:
        """Of what it is made, and a digest of the names."""
        text = "\0".join(f"{name}\0{own}" for name, own in self._names.items())
        lent = [] if not self.others else [self.others[0].fingerprint, sorted(self._borrowed)]
        return ["arranged", self.of.fingerprint, xxhash.xxh3_128_hexdigest(text.encode()), lent]

    @property
    def file_names(self) -> Sequence[str]:
        """The files that still hold a tensor."""
        return self._file_names

    @property
    def notes(self) -> Sequence[str]:
        """What is worth a warning."""
        return (*self.of.notes, *self._own_notes)

    def made_of(self, tensor: str) -> Collection[str]:
        """Return the name of one of its own in `of`; nothing for a borrowed one."""
        return () if tensor in self._borrowed else (self._names[tensor],)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Look at the file of a tensor, wherever it is, or at all of them."""
        if tensor in self._borrowed and self._lender is not None:
            self._lender.check_unchanged(tensor)
        else:
            super().check_unchanged(tensor)
        if tensor is None:
            for other in self.others:
                other.check_unchanged()

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return those of its own; the lender, which is an ingredient too, is asked for its own."""
        return super().suspects(strict=strict)

    def where(self, tensor: str) -> str:
        """Return where a tensor is, in its own source or in the lender."""
        if tensor in self._borrowed and self._lender is not None:
            return self._lender.where(tensor)
        return super().where(tensor)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Return the costs of both sources together."""
        cost = together([each.cost(mapped=mapped) for each in (self.of, *self.others)])
        return msgspec.structs.replace(
            cost, held_nbytes=cost.held_nbytes + 400 * len(self._tensors)
        )

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that asks one source or the other."""
        other = self._lender.cursor(access) if self._lender is not None and self.others else None
        return _Choosing(self._names, self.of.cursor(access), other)


class _Choosing(Cursor):
    def __init__(self, names: Mapping[str, str], own: Cursor, other: Cursor | None) -> None:
        self._names, self._own, self._other = names, own, other

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        cursor, name = self._of(tensor)
        return cursor.view(name, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        cursor, name = self._of(tensor)
        cursor.read(name, begin, block)

    def _of(self, tensor: str) -> tuple[Cursor, str]:
        own = self._names.get(tensor)
        if own is not None:
            return self._own, own
        assert self._other is not None
        return self._other, tensor

    def close(self) -> None:
        self._own.close()
        if self._other is not None:
            self._other.close()


def together(costs: Sequence[ReadingCost]) -> ReadingCost:
    """Return what reading several sources costs, one at a time, with all their cursors open."""
    return ReadingCost(
        views=all(cost.views for cost in costs),
        unit_nbytes=max(cost.unit_nbytes for cost in costs),
        cursor_nbytes=sum(cost.cursor_nbytes for cost in costs),
        opening_nbytes=max(cost.opening_nbytes for cost in costs),
        held_nbytes=costs[0].held_nbytes,  # the others' are their own
        compiling_nbytes=max(cost.compiling_nbytes for cost in costs),
    )
