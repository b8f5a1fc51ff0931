"""Pipelines: folders whose components, each a folder with weights of its own, are one ingredient.

A pipeline of diffusers or sentence-transformers is read through the sources of its components,
whatever kind each of them is. The names of their tensors begin with the path of the component,
``unet/conv_in.weight``, and so do those of their files. The component that is the folder itself
has no such prefix, so that a model with a pooling layer beside it has the names of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from streamsoup.errors import FormatError, MissingFileError, option, printable, some
from streamsoup.formats.files import Access
from streamsoup.formats.index import is_index, read_index
from streamsoup.formats.listings import INDEX, Listing, check_component, read_listing
from streamsoup.formats.source import Cursor, ReadingCost, Source, SourceTensor, Suspects
from streamsoup.formats.weights import SUFFIXES, find_weights, names_in
from streamsoup.system.buffers import Bytes

__all__ = ["Pipeline", "open_pipeline"]

OpenFolder = Callable[[str], Source]


class Pipeline(Source):
    """Several components of a folder, each read through a source of its own."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Source],
        along: Sequence[str],
        rest: Sequence[str],
    ) -> None:
        """Hold what was opened.

        Args:
            name: The path of the folder as it was given.
            parts: The sources of its components, by path.
            along: Paths of components without weights that belong to these.
            rest: Paths of components with weights that are no part of this source.

        Raises:
            FormatError: The name of a tensor belongs to two components.
        """
        self._name, self._parts, self._rest = name, dict(parts), tuple(rest)
        self._components = (*parts, *along)
        self._prefixes = [
            (f"{path}/" if path else "", path) for path in sorted(parts, key=len, reverse=True)
        ]
        for path, part in parts.items():
            for inner in part.tensors:
                if self._owner(_join(path, inner)) != (path, inner):
                    raise FormatError(
                        f"{part.where(inner)}: has the name of a tensor in the component "
                        f"{printable(self._owner(_join(path, inner))[0])!r}; rename one of them"
                    )

    @property
    def name(self) -> str:
        """The path as it was given."""
        return self._name

    @property
    def path(self) -> str:
        """Its absolute path."""
        return os.path.abspath(self._name)

    @property
    def folder(self) -> str:
        """The path as it was given: all its side files belong to it."""
        return self._name

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """The tensors of its components, one component after the other."""
        found: dict[str, SourceTensor] = {}
        n_files = 0
        for path, part in self._parts.items():
            for name, tensor in part.tensors.items():
                found[_join(path, name)] = SourceTensor(
                    tensor.dtype, tensor.shape, tensor.delivered, n_files + tensor.file
                )
            n_files += len(part.file_names)
        return found

    @property
    def file_names(self) -> Sequence[str]:
        """The names of its files, relative to the folder."""
        return [_join(path, name) for path, part in self._parts.items() for name in part.file_names]

    @property
    def index_names(self) -> Sequence[str]:
        """The indexes of its components, relative to the folder."""
        return [
            _join(path, name) for path, part in self._parts.items() for name in part.index_names
        ]

    @property
    def components(self) -> Sequence[str]:
        """Its components, then those without weights that belong to them."""
        return self._components

    @property
    def copied(self) -> Sequence[str]:
        """The files of weights of the components that are no part of it."""
        return [
            _join(path, file)
            for path in self._rest
            for file in _weights_in(os.path.join(self._name, path))
        ]

    @property
    def files(self) -> Sequence[str]:
        """The paths of the files of all its components."""
        return [file for part in self._parts.values() for file in part.files]

    @property
    def contiguous(self) -> bool:
        """Return True if it is so in all its components."""
        return all(part.contiguous for part in self._parts.values())

    @property
    def fingerprint(self) -> Any:
        """The components with their fingerprints."""
        return ["pipeline", [[path, part.fingerprint] for path, part in self._parts.items()]]

    @property
    def notes(self) -> Sequence[str]:
        """What is worth a warning about any of its components."""
        return tuple(note for part in self._parts.values() for note in part.notes)

    def cursor(self, access: Access) -> Cursor:
        """Return a cursor that holds one of a single component at a time."""
        return _PipelineCursor(self._parts, self._owner, access)

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Check the component of a tensor, or all."""
        if tensor is not None:
            path, inner = self._owner(tensor)
            self._parts[path].check_unchanged(inner)
            return
        for part in self._parts.values():
            part.check_unchanged()

    def check_read(self, tensors: Collection[str]) -> None:
        """Check the checksums of each component that these tensors are of."""
        inner: dict[str, list[str]] = {}
        for tensor in tensors:
            path, name = self._owner(tensor)
            inner.setdefault(path, []).append(name)
        for path, names in inner.items():
            self._parts[path].check_read(names)

    def cost(self, *, mapped: bool) -> ReadingCost:
        """Return the most that any component costs: they are read one at a time."""
        costs = [part.cost(mapped=mapped) for part in self._parts.values()]
        return ReadingCost(
            views=all(cost.views for cost in costs),
            unit_nbytes=max(cost.unit_nbytes for cost in costs),
            cursor_nbytes=max(cost.cursor_nbytes for cost in costs),
            opening_nbytes=max(cost.opening_nbytes for cost in costs),
            held_nbytes=sum(cost.held_nbytes for cost in costs),
            compiling_nbytes=max(cost.compiling_nbytes for cost in costs),
        )

    def suspects(self, *, strict: bool) -> Suspects | None:
        """Return what may have changed in any component."""
        found = {path: part.suspects(strict=strict) for path, part in self._parts.items()}
        state = {path: each for path, each in found.items() if each is not None}
        names = [_join(path, name) for path, each in state.items() for name in each.tensors]
        return Suspects(names, state) if state else None

    def settle(self, suspects: Suspects) -> None:
        """Settle the suspects of each component."""
        for path, each in suspects.state.items():
            self._parts[path].settle(each)

    def where(self, tensor: str) -> str:
        """Return where its component has a tensor."""
        path, inner = self._owner(tensor)
        return self._parts[path].where(inner)

    def _owner(self, tensor: str) -> tuple[str, str]:
        """Return the path of the component that has a tensor, and its name there.

        Nothing is kept for each tensor: 64 pipelines of 2,000 would take 60 MB.
        """
        for prefix, path in self._prefixes:
            if tensor.startswith(prefix):
                return path, tensor[len(prefix) :]
        raise KeyError(tensor)


class _PipelineCursor(Cursor):
    """A cursor of one component at a time, so that windows of the others are let go."""

    def __init__(
        self, parts: Mapping[str, Source], owner: Callable[[str], tuple[str, str]], access: Access
    ) -> None:
        self._parts, self._owner, self._access = parts, owner, access
        self._path: str | None = None
        self._cursor: Cursor | None = None

    def view(self, tensor: str, begin: int, end: int) -> Bytes | None:
        cursor, inner = self._at(tensor)
        return cursor.view(inner, begin, end)

    def read(self, tensor: str, begin: int, block: Bytes) -> None:
        cursor, inner = self._at(tensor)
        cursor.read(inner, begin, block)

    def close(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._path = self._cursor = None

    def _at(self, tensor: str) -> tuple[Cursor, str]:
        path, inner = self._owner(tensor)
        if self._cursor is None or path != self._path:
            self.close()
            self._path, self._cursor = path, self._parts[path].cursor(self._access)
        return self._cursor, inner


def open_pipeline(given: str, wanted: Sequence[str], open_folder: OpenFolder) -> Source | None:
    """Open a folder with components; return None for any other path.

    Args:
        given: As the user gave it.
        wanted: Paths of the components to read, ``.`` for the folder itself; all if empty. A folder
            that has these is taken even without a listing, as training leaves such folders.
        open_folder: Opens the folder of a component by its headers.

    Returns:
        The pipeline, or the source of the folder itself if it is the only component with weights.

    Raises:
        MissingFileError: A component has no folder.
        FormatError: A component cannot be opened, or a listing is damaged.
    """
    if not os.path.isdir(given):
        if wanted and os.path.isfile(given):
            raise FormatError(
                f"{printable(given)}: is one file, with no components; leave "
                f"{option('components')} out, or give the folders of pipelines"
            )
        return None
    listing = read_listing(given)
    chosen = ["" if path == "." else path for path in wanted]
    if listing is None and not chosen:
        return None
    listed = _listed(given, listing, chosen)
    needed = chosen or listed if listing is not None and listing.file == INDEX else ()
    weighty = [path for path in listed if _has_weights(given, path, needed=path in needed)]
    if not weighty and not chosen:
        return None
    for path in chosen:
        if path not in weighty:
            raise FormatError(
                f"{printable(os.path.join(given, path))}: has no weights; choose other "
                f"{option('components')}: {some(weighty) or 'none has any'}"
            )
    parts = {
        path: _open_part(given, path, weighty, open_folder, advise=not chosen)
        for path in weighty
        if not chosen or path in chosen
    }
    rest = [path for path in weighty if path not in parts]
    if [*parts] == [""] and not rest:
        return parts[""]
    along = [path for path in listed if path not in weighty and _goes_along(path, listing, chosen)]
    return Pipeline(given, parts, along, rest)


def _listed(given: str, listing: Listing | None, chosen: Sequence[str]) -> Sequence[str]:
    """Return the components of a folder, once it is clear that it has those that were chosen."""
    for path in chosen:
        try:
            check_component(path)
        except FormatError as error:
            raise FormatError(
                f"{option('components')}: {error.text}; give names of its folders"
            ) from None
    if listing is not None:
        unknown = [path or "." for path in chosen if path not in listing.components]
        if unknown:
            raise FormatError(
                f"{printable(os.path.join(given, listing.file))}: lists no component "
                f"{some(unknown)}; choose {option('components')} from "
                f"{some([path or '.' for path in listing.components], 20)}"
            )
        return listing.components
    for path in chosen:
        if not os.path.isdir(os.path.join(given, path)):
            raise FormatError(
                f"{printable(given)}: is no pipeline, as it has neither {INDEX} nor modules.json, "
                f"and has no folder {printable(path)}; leave {option('components')} out, or give "
                "pipelines"
            )
    return chosen


def _has_weights(given: str, path: str, *, needed: bool) -> bool:
    """Return True if a component's folder holds files of weights.

    Raise `FormatError` for a link, and `MissingFileError` for a folder that is `needed`: modules
    of sentence-transformers without files, such as a normalisation, often have none.
    """
    folder = given
    for part in path.split("/") if path else ():
        folder = os.path.join(folder, part)
        if os.path.islink(folder):
            raise FormatError(
                f"{printable(folder)}: is a link, and the files of a component have to lie in its "
                "pipeline; put the folder itself there"
            )
    if not os.path.isdir(folder):
        if needed:
            raise MissingFileError(
                f"{printable(os.path.join(given, INDEX))}: lists the component "
                f"{printable(path)}, which has no folder; download the pipeline again"
            )
        return False
    return any(name.lower().endswith(SUFFIXES) for name in names_in(folder) if name[0] != ".")


def _open_part(
    given: str, path: str, weighty: Sequence[str], open_folder: OpenFolder, *, advise: bool
) -> Source:
    """Open one component; where it cannot be read, advise to soup the others."""
    folder = os.path.join(given, path) if path else given
    try:
        return open_folder(folder)
    except FormatError as error:
        others = [each or "." for each in weighty if each != path]
        if not advise or not others:
            raise
        raise type(error)(
            f"{error.text}; or take {printable(path or 'it')} from the first pipeline, with "
            f"{option('components', ','.join(map(printable, others)))}"
        ) from None


def _goes_along(path: str, listing: Listing | None, chosen: Sequence[str]) -> bool:
    """Return True if a component without weights says what the weights of the others mean.

    Pooling layers do. A tokenizer of diffusers belongs to the text encoder of the same number.
    """
    if not chosen or listing is None or listing.file != INDEX:
        return True
    return f"text_encoder{path.removeprefix('tokenizer')}" in chosen


def _weights_in(folder: str) -> list[str]:
    """Return the files of a component's weights: those that are loaded, or all that may be."""
    try:
        name = find_weights(folder)
        if not is_index(name):
            return [name]
        return [name, *sorted(set(read_index(os.path.join(folder, name))[0].values()))]
    except FormatError:
        names = [name for name in names_in(folder) if name[0] != "."]
        return [name for name in names if name.lower().endswith((*SUFFIXES, ".index.json"))]


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
