"""Ingredients: opened sources with their layouts, and the ways to open them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from streamsoup.errors import RecipeError, count, option, printable
from streamsoup.formats.fitting.arranged import Fitted
from streamsoup.formats.layout import HeaderCache, Layout
from streamsoup.formats.memory import open_state
from streamsoup.formats.opening import open_path
from streamsoup.formats.source import REQUIRED, Source, is_source
from streamsoup.formats.stored import Stored
from streamsoup.reading import Reading
from streamsoup.sizes import nbytes_text

ADAPTER_FILE = "adapter_model.safetensors"
"""What PEFT calls the file of an adapter."""

__all__ = ["ADAPTER_FILE", "AnyIngredient", "Ingredient", "listed", "open_ingredients"]


class Ingredient(msgspec.Struct, frozen=True, eq=False):
    """A source that was opened: what it holds and where, but no weights."""

    source: Source
    layout: Layout
    """Its tensors; the same object for ingredients that agree on them."""

    def __repr__(self) -> str:
        """One-line summary."""
        size = nbytes_text(self.nbytes)
        return f"<Ingredient {self.name!r}: {count(len(self.layout.places), 'tensor')}, {size}>"

    @property
    def name(self) -> str:
        """The path as it was given, or what a source calls itself."""
        return self.source.name

    @property
    def path(self) -> str:
        """Its absolute path; the name of what has none."""
        return self.source.path or self.name

    @property
    def real_path(self) -> str:
        """Its path with links resolved; an address as it is, and the name of what has none."""
        return os.path.realpath(self.path) if os.path.isabs(self.path) else self.path

    @property
    def folder(self) -> str | None:
        """The folder whose side files belong to it."""
        return self.source.folder

    @property
    def file_names(self) -> Sequence[str]:
        """The names of its files, by number."""
        return self.source.file_names

    @property
    def index_name(self) -> str | None:
        """File name of its index, if it has one."""
        return self.source.index_name

    @property
    def index_names(self) -> Sequence[str]:
        """Names of the indexes of all its components."""
        return self.source.index_names

    @property
    def components(self) -> Sequence[str]:
        """Folders in its folder whose side files belong to its tensors; empty for itself."""
        return self.source.components

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors together, in the dtypes they stand for."""
        return self.layout.nbytes

    @property
    def fingerprint(self) -> Any:
        """Plain JSON that tells it from what it may become."""
        return self.source.fingerprint

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Raise `ChangedIngredientError` unless it is as it was when opened."""
        self.source.check_unchanged(tensor)

    def where(self, tensor: str) -> str:
        """Return where `tensor` is, for a message."""
        return self.source.where(tensor)


AnyIngredient = str | os.PathLike[str] | Ingredient | Source | Mapping[str, Any] | Any
"""A path, an open ingredient, a source, a state dict or a module."""


def listed(
    ingredients: Iterable[AnyIngredient] | str | os.PathLike[str],
) -> list[AnyIngredient]:
    """Return ingredients in the order given, of a generator, too.

    Raise `RecipeError` for one ingredient in the place of a list, for no list at all, and for a
    set, which has no order.
    """
    if isinstance(ingredients, (str, bytes, os.PathLike)):
        given = printable(os.fsdecode(ingredients))
        raise RecipeError(f"{given}: is one path; expected a list: [{given!r}, ...]")
    one = isinstance(ingredients, (Mapping, Ingredient)) or hasattr(ingredients, "state_dict")
    if one or is_source(ingredients):
        raise RecipeError("expected a list of ingredients, got one of them")
    try:
        if isinstance(ingredients, (set, frozenset)):
            raise TypeError
        going = iter(ingredients)
    except TypeError:
        given = printable(repr(ingredients))
        raise RecipeError(f"expected a list of ingredients, got {given}") from None
    return list(going)


def open_ingredients(
    paths: Iterable[AnyIngredient],
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> list[Ingredient]:
    """Open checkpoints by their headers, in the order given.

    Args:
        paths: Paths, sources, state dicts, modules, or ingredients that are open already, which
            are passed through after a check that they are unchanged.
        reading: How the files of paths become tensors.

    Returns:
        One ingredient for each. Those whose tensors agree share one layout.

    Raises:
        MissingFileError: There is no such file or folder.
        FormatError: A file is not a checkpoint; names the file, and the tensor if there is one.
        RecipeError: One checkpoint was given in the place of a list, or something else entirely.

    Reads headers and indexes only; of a state dict all of it, once, for its digest.
    """
    cache = HeaderCache()
    opened = [_open(given, reading, cache) for given in listed(paths)]
    return _fitted(opened, reading, cache)


def _fitted(opened: list[Ingredient], reading: Reading, cache: HeaderCache) -> list[Ingredient]:
    """Return ingredients made to fit each other, where they have to be."""
    asked = reading.changes_tensors
    if not asked and opened and all(tuple(each.file_names) == (ADAPTER_FILE,) for each in opened):
        from streamsoup.formats.adapters.joined import are_adapters
        from streamsoup.formats.adapters.joining import join

        adapters = [each.source for each in opened]
        if are_adapters(adapters):
            joined = join(adapters, cache, reading.rank, reading.rank_of)
            return _with_sources(opened, joined, cache)
    if reading.rank is not None:
        raise RecipeError(
            f"{option('rank')} is for LoRA adapters that make one adapter; give "
            "adapters alone, without a base, and no option that renames or chooses tensors"
        )
    names = opened[0].layout.places.keys() if opened else ()
    differ = any(each.layout.places.keys() != names for each in opened)
    was_fitted = any(isinstance(each.source, Fitted) for each in opened)
    if not (asked or differ or was_fitted):
        return opened
    from streamsoup.formats.fitting.fit import fit

    return _with_sources(opened, fit([each.source for each in opened], reading), cache)


def _with_sources(
    opened: list[Ingredient], sources: Sequence[Source], cache: HeaderCache
) -> list[Ingredient]:
    """Return ingredients with other sources, laid out anew where they differ."""
    return [
        each if source is each.source else Ingredient(source, _layout_of(source, cache))
        for each, source in zip(opened, sources, strict=True)
    ]


def _layout_of(source: Source, cache: HeaderCache) -> Layout:
    return source.layout if isinstance(source, Stored) else cache.layout_of(source)


def _open(given: AnyIngredient, reading: Reading, cache: HeaderCache) -> Ingredient:
    if isinstance(given, Ingredient):
        given.check_unchanged()
        return given
    if is_source(given):
        _check_members(given)
        given.check_unchanged()
        return Ingredient(given, cache.layout_of(given))
    if isinstance(given, Mapping) or callable(getattr(given, "state_dict", None)):
        state = open_state(given)
        return Ingredient(state, cache.layout_of(state))
    if isinstance(given, (str, bytes, os.PathLike)):
        source = open_path(os.fsdecode(given), reading, cache)
        return Ingredient(source, _layout_of(source, cache))
    raise RecipeError(
        f"{printable(repr(given))} is not an ingredient; give a path, a source, a state dict or a "
        "module"
    )


def _check_members(source: object) -> None:
    """Raise `RecipeError` for an object that lacks a member of `Source`."""
    members = sorted(name for name in vars(Source) if not name.startswith("_"))
    missing = [name for name in members if not hasattr(type(source), name)]
    missing = [name for name in missing if not hasattr(source, name)]
    if missing:
        raise RecipeError(
            f"{printable(repr(source))} is not a source: it lacks {', '.join(missing)}; subclass "
            f"streamsoup.Source, which leaves {', '.join(REQUIRED)} to be written"
        )
