"""Which folders of a pipeline are its components, as the file that lists them says.

Diffusers writes ``model_index.json``, name to library and class, and each component lies in a
folder of its name. Sentence-transformers writes ``modules.json``, a list of modules with their
``path``, which is empty for the folder itself; a ``Router`` among them lists further folders in its
``router_config.json``. Such a file may come from anywhere: a path that leads out of the folder is
refused, and no name of a class is ever looked up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, printable
from streamsoup.formats.links import check_inside
from streamsoup.system.regular import read_whole

__all__ = ["INDEX", "LISTINGS", "MODULES", "Listing", "check_component", "read_listing"]

INDEX, MODULES, ROUTER = "model_index.json", "modules.json", "router_config.json"

LISTINGS = (INDEX, MODULES)
"""Names of the files that make a folder a pipeline, in the order in which they are looked for."""

_LIMIT = 1_000_000
"""Bytes of a listing that are read: those of published pipelines have a thousand."""

_DEEPEST = 8
"""Parts of the path of a component: those of published pipelines have one or two."""

_MOST = 1000
"""Components of a pipeline: published ones have up to twelve."""


class Listing(msgspec.Struct, frozen=True):
    """The components of a pipeline, with weights or without."""

    file: str
    """Name of the file that lists them."""
    components: tuple[str, ...]
    """Paths relative to the folder, in the order of the file; empty for the folder itself."""


def read_listing(folder: str) -> Listing | None:
    """Return the components that a folder lists, or None if it is no pipeline.

    Args:
        folder: The path of any folder.

    Raises:
        CorruptFileError: A listing is not JSON, or names a folder outside of this one.
        FormatError: It cannot be read, or is a link out of the folder.

    Reads the listing, and the ``router_config.json`` of its components.
    """
    for name in LISTINGS:
        found = _read(folder, name)
        paths = None if found is None else _paths(name, found)
        if paths is None:
            continue
        where = os.path.join(folder, name)
        all_paths: list[str] = []
        pending = list(paths)
        for path in pending:
            if path in all_paths:
                continue
            try:
                check_component(path)
            except FormatError as error:
                raise CorruptFileError(
                    f"{printable(where)}: lists the component {error.text}; restore the file"
                ) from None
            if len(all_paths) >= _MOST:
                raise CorruptFileError(
                    f"{printable(where)}: lists more than {_MOST} components; restore the file"
                )
            all_paths.append(path)
            if name == MODULES:
                inner = _read(os.path.join(folder, path), ROUTER)
                routed = inner.get("types") if isinstance(inner, dict) else None
                for each in routed if isinstance(routed, dict) else ():
                    pending.append(f"{path}/{each}" if path else each)
        return Listing(name, tuple(all_paths))
    return None


def check_component(path: str) -> None:
    """Raise `FormatError` for a path that is not one of a folder within another.

    >>> check_component("unet")
    >>> check_component("../unet")
    Traceback (most recent call last):
    streamsoup.errors.FormatError: '../unet', which is not a plain path within the folder
    """
    parts = path.split("/") if path else []
    plain = len(parts) <= _DEEPEST and all(map(_is_plain, parts))
    try:
        path.encode()
    except UnicodeEncodeError:
        plain = False
    if not plain:
        raise FormatError(f"{printable(path)!r}, which is not a plain path within the folder")


def _is_plain(part: str) -> bool:
    """Return True for the name of a folder that no file of a soup can have."""
    odd = not part or part.startswith(".") or "\\" in part or "\0" in part or len(part) > 200
    taken = part.lower().endswith((".safetensors", ".json", ".md"))
    return not odd and not taken


def _paths(name: str, found: Any) -> list[str] | None:
    """Return the paths in a listing; None for JSON that means something else."""
    if name == INDEX:
        return list(_of_index(found)) if isinstance(found, dict) else None
    if not isinstance(found, list) or not found:
        return None
    modules = [each for each in found if isinstance(each, dict)]
    paths = [each["path"] for each in modules if isinstance(each.get("path"), str)]
    return paths if len(paths) == len(found) else None


def _of_index(found: dict[str, Any]) -> Iterator[str]:
    """Yield the components of a ``model_index.json``: pairs of a library and a class."""
    for name, value in found.items():
        pair = (
            isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
        )
        if pair and not name.startswith("_"):
            yield name


def _read(folder: str, name: str) -> Any:
    """Return the JSON in a file; None if there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        return None
    check_inside(path, folder)
    try:
        return json.loads(read_whole(path, _LIMIT))
    except OSError as error:
        raise FormatError(
            f"{printable(path)}: cannot be read: {error.strerror}; fix that and run again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{printable(path)}: is not JSON: {printable(error)}; restore the file"
        ) from None
