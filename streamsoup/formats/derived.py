"""A source that delivers what another one has, in another form: what both have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from streamsoup.formats.source import Source, SourceTensor, Suspects

__all__ = ["Derived", "in_files"]


def in_files(
    tensors: Mapping[str, SourceTensor], names: Sequence[str]
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Return tensors, and the names of those files that hold any of them: no other is made."""
    numbers = sorted({tensor.file for tensor in tensors.values()})
    place = {number: new for new, number in enumerate(numbers)}
    found = {
        name: msgspec.structs.replace(tensor, file=place[tensor.file])
        for name, tensor in tensors.items()
    }
    return found, tuple(names[number] for number in numbers) or tuple(names[:1])


class Derived(Source):
    """A source made of another, `of`: the same files, side files and identity.

    A subclass says how its tensors come about: `tensors`, `fingerprint`, `cursor`, `cost`, and
    `made_of` where they have other names.
    """

    of: Source

    def made_of(self, tensor: str) -> Collection[str]:
        """Return the names of the tensors of `of` that a tensor is made of; the first is its own.

        Called for each leaf: a look-up.
        """
        return (tensor,)

    @property
    def name(self) -> str:
        """The name of what it is made of."""
        return self.of.name

    @property
    def path(self) -> str | None:
        """The path of what it is made of."""
        return self.of.path

    @property
    def folder(self) -> str | None:
        """The folder of what it is made of."""
        return self.of.folder

    @property
    def file_names(self) -> Sequence[str]:
        """The files of what it is made of."""
        return self.of.file_names

    @property
    def index_name(self) -> str | None:
        """The index of what it is made of."""
        return self.of.index_name

    @property
    def index_names(self) -> Sequence[str]:
        """The indexes of what it is made of."""
        return self.of.index_names

    @property
    def components(self) -> Sequence[str]:
        """The components of what it is made of."""
        return self.of.components

    @property
    def copied(self) -> Sequence[str]:
        """The weights that are copied beside what it is made of."""
        return self.of.copied

    @property
    def files(self) -> Sequence[str]:
        """The files that are read."""
        return self.of.files

    @property
    def memory(self) -> Mapping[str, Any]:
        """The live tensors that are read."""
        return self.of.memory

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The side files of what it is made of."""
        return self.of.side_files

    @property
    def notes(self) -> Sequence[str]:
        """What is worth knowing about what it is made of."""
        return self.of.notes

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Look at what a tensor is made of, or at all."""
        if tensor is None:
            self.of.check_unchanged()
            return
        for name in self.made_of(tensor):
            self.of.check_unchanged(name)

    def check_read(self, tensors: Collection[str]) -> None:
        """Check the checksums of what these tensors are made of."""
        self.of.check_read([name for tensor in tensors for name in self.made_of(tensor)])

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return the tensors that are made of suspected ones."""
        below = self.of.suspects(strict=strict)
        if below is None:
            return None
        names = frozenset(below.tensors)
        found = [name for name in self.tensors if not names.isdisjoint(self.made_of(name))]
        return Suspects(found, below)

    def settle(self, suspects: Suspects) -> None:
        """Settle what it is made of."""
        self.of.settle(suspects.state)

    def where(self, tensor: str) -> str:
        """Return where the first part of a tensor is."""
        return self.of.where(next(iter(self.made_of(tensor))))
