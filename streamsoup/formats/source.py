"""The Source joint: the named tensors of one ingredient, wherever their bytes come from.

A source says which tensors it has, gives any range of one of them as bytes, tells whether it is
still what it was when it was opened, and says what reading it costs. Files (`formats.stored`) and
state dicts (`formats.memory`) are sources; so is anything that satisfies the protocol: a remote
file, another archive, or a *derived* source, which computes its tensors from those of others.

A derived source delivers the exact value in float64 where the dtype that its tensor stands for
would round it: the soup is rounded once, at the end. `SourceTensor.delivered` says so.

Subclass `Source` to inherit the members that most sources have no need of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import msgspec

from streamsoup.errors import printable
from streamsoup.formats.files import Access
from streamsoup.system.buffers import Bytes

__all__ = ["REQUIRED", "Cursor", "ReadingCost", "Source", "SourceTensor", "Suspects", "is_source"]


class SourceTensor(msgspec.Struct, frozen=True):
    """A tensor as its source describes it."""

    dtype: str
    """The safetensors name of the dtype it stands for, such as ``BF16``: that of the soup."""
    shape: tuple[int, ...]
    delivered: str | None = None
    """The dtype its bytes come in, such as ``F64``; None for `dtype`. Floats only."""
    file: int = 0
    """Which of `Source.file_names` it belongs to, in a soup that mirrors them."""
    significant: int = 53
    """Bits that a delivered float64 needs at most: where they are few, sums of equal values are
    exact, so that the mean of equal tensors needs no comparison."""


class ReadingCost(msgspec.Struct, frozen=True):
    """What reading a source holds in memory, beside the blocks it fills."""

    views: bool = False
    """True if every `Cursor.view` returns a view that takes no memory of the process."""
    unit_nbytes: int = 0
    """Bytes held during a call of `Cursor.view` or `Cursor.read`, for each element asked for (for
    each byte of a tensor that is not averaged)."""
    cursor_nbytes: int = 0
    """Bytes a cursor holds from one call to the next."""
    opening_nbytes: int = 0
    """Bytes held at most while the source was opened."""
    held_nbytes: int = 0
    """Bytes held as long as the source is open, such as what it knows of each tensor."""
    compiling_nbytes: int = 0
    """Bytes that compiling what it computes with takes, once for all sources of its kind."""


class Suspects(msgspec.Struct, frozen=True):
    """Tensors that may have changed, though their identity has not; only a digest can tell."""

    tensors: Collection[str]
    state: Any
    """What the source remembers if the bytes turn out to be the same: see `Source.settle`."""


class Cursor(Protocol):
    """One thread's way through a source. Ranges are bytes of a tensor as it is delivered.

    Averaged tensors are asked for by whole elements, and no range is longer than a block.
    """

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        """Return bytes `begin` to `end` of a tensor where they lie, or None to have them read.

        A view is valid until the next call. Its bytes are one-dimensional and not marked read-only.
        """
        return None

    @abstractmethod
    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        """Fill `block` with the bytes of a tensor from `begin` on.

        Raises:
            ChangedIngredientError: The source is not what it was when it was opened.
            FormatError: It cannot be read.
        """

    def close(self) -> None:
        """Release what the cursor holds."""
        return


class Source(Protocol):
    """The named tensors of an ingredient. The first six members are required; see the module."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages, the recipe and the provenance call it; printable as it is."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Its tensors by name, in the order of the soup."""

    @property
    @abstractmethod
    def fingerprint(self) -> Any:
        """Plain JSON that differs for sources that may deliver different bytes.

        It holds what a derived source was derived from and every parameter: unfinished work is
        resumed, and scores are believed, only where it is equal.
        """

    @abstractmethod
    def cursor(self, access: Access) -> Cursor:
        """Return a cursor for one thread. It opens files with `access`, if it has any."""

    @abstractmethod
    def check_unchanged(self, tensor: str | None = None) -> None:
        """Raise `ChangedIngredientError` unless it delivers what it did when it was opened.

        Called for each leaf, with the name of its tensor, so it should cost microseconds; and at
        the end of a pass without.
        """

    @abstractmethod
    def cost(self, *, mapped: bool) -> ReadingCost:
        """Return what reading it costs where files are mapped, or read."""

    @property
    def path(self) -> str | None:
        """The absolute path it can be opened from again; None for what only an object has."""
        return None

    @property
    def folder(self) -> str | None:
        """The folder whose side files (configuration, tokenizer) belong to it."""
        return None

    @property
    def file_names(self) -> Sequence[str]:
        """What the files of a soup that mirrors it are called, with ``/`` after a folder."""
        return ("model.safetensors",)

    @property
    def index_name(self) -> str | None:
        """What the index of a soup that mirrors it is called, if it has several files."""
        return None

    @property
    def index_names(self) -> Sequence[str]:
        """What the indexes are called, where files lie in several folders; one for each folder."""
        return () if self.index_name is None else (self.index_name,)

    @property
    def components(self) -> Sequence[str]:
        """Folders in `folder` whose side files belong to its tensors; empty for itself.

        Tensors of a file in a component are named after it, those in ``unet/a.safetensors``
        ``unet/…``.
        """
        return ("",)

    @property
    def copied(self) -> Sequence[str]:
        """Files of weights in `folder` that a soup needs and that are copied as they are."""
        return ()

    @property
    def files(self) -> Sequence[str]:
        """The files it reads: an output never replaces them, and they decide how to read."""
        return ()

    @property
    def memory(self) -> Mapping[str, Any]:
        """The live torch tensors it reads, by name: a model that is written may share them."""
        return {}

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """Contents of files to write beside the soup, by name; in place of those of `folder`."""
        return {}

    @property
    def notes(self) -> Sequence[str]:
        """What is worth a warning about how it is read, such as tensors that are left out."""
        return ()

    @property
    def contiguous(self) -> bool:
        """Return True if the tensors of a file lie side by side, so that ranges may span them.

        The order is that of `tensors`, and each is delivered in the dtype it stands for.
        """
        return False

    def check_read(self, tensors: Collection[str]) -> None:
        """Raise `CorruptFileError` if some of these tensors are known to be damaged in their files.

        Called at the end of a pass over them, by one thread: for checksums that files hold. A pass
        that went on from a killed one may not have read all of them.
        """
        return

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return what may have changed since it was opened or last settled, or None.

        Without `strict`, for a pass that has no digests to decide with, a change that has an
        innocent explanation is left out.
        """
        return None

    def settle(self, suspects: Suspects) -> None:
        """Remember that the tensors of `suspects` were found to have the same bytes."""
        return

    def where(self, tensor: str) -> str:
        """Return where a tensor is, for a message: its file or source, and its name."""
        return f"{printable(self.name)}: {printable(tensor)}"


REQUIRED = ("name", "tensors", "fingerprint", "cursor", "check_unchanged", "cost")
"""The members that a subclass of `Source` has to add."""


def is_source(given: object) -> TypeGuard[Source]:
    """Return True if an object is meant as a source: its type has a method ``cursor``."""
    return callable(getattr(type(given), "cursor", None)) and not isinstance(given, type)
