"""Models of the Hugging Face Hub by their ids, found in the Hub's own cache.

The cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache) has a folder
``models--org--name`` for each model. ``refs/main`` holds the commit that ``main`` was at when it
was last downloaded, and ``snapshots/COMMIT`` the files of that commit, as links into ``blobs``.
A snapshot may lack files: tools download the configuration alone, and downloads are interrupted.
Nothing here needs huggingface_hub, or a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator

import msgspec

from streamsoup.errors import FormatError, MissingFileError, option, printable, some
from streamsoup.formats.conversions import of_hub_id
from streamsoup.formats.index import is_index, read_index
from streamsoup.formats.weights import PICKLES, SUFFIXES

__all__ = ["Cached", "HubModel", "cache_folder", "find_cached", "hub_model", "not_found"]

_CACHED = re.compile(r".*/models--(?P<id>[^/]+?--[^/]+)/snapshots/(?P<revision>[^/]+)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_PLAIN = tuple(f"{stem}.safetensors" for stem in ("model", "diffusion_pytorch_model"))
"""What loaders look for first: beside it, indexes of variants and of pickles do not count."""


class HubModel(msgspec.Struct, frozen=True):
    """A model of the Hub, as it was asked for."""

    id: str
    """``org/name``"""
    revision: str | None = None
    """A branch, tag or commit; None for ``main``."""

    def __str__(self) -> str:
        """Return the model as paths have it: ``org/name@revision``."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


class Cached(msgspec.Struct, frozen=True):
    """A snapshot in the cache."""

    folder: str
    """Its absolute path, which names the model and the commit."""
    missing: tuple[str, ...]
    """Weights that it lacks; empty for one that is complete."""


def hub_model(path: str, *, local: bool = True) -> HubModel | None:
    """Return the model of the Hub that a path names; None for any other path.

    ``org/name`` and ``org/name@revision`` name one, unless a file or folder of that name exists.
    So does a snapshot in a cache that is no longer there, such as a provenance records: it names
    the commit, which this machine's cache may have elsewhere. Without `local`, what exists here is
    not looked at.

    >>> hub_model("org/model@refs/pr/1")
    HubModel(id='org/model', revision='refs/pr/1')
    """
    if local and os.path.lexists(path):
        return None
    cached = _CACHED.fullmatch(path)
    if cached is not None:
        org, _, name = cached["id"].partition("--")
        path = f"{org}/{name}@{cached['revision']}"
    if of_hub_id(path) is None:
        return None
    name, _, revision = path.partition("@")
    if name.count("/") != 1 or ".." in path or "--" in name or "//" in revision:
        return None
    return HubModel(name, revision or None)


def cache_folder() -> str:
    """Return the folder of the Hub's cache, by the variables that huggingface_hub goes by."""
    for variable, inside in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if os.environ.get(variable):
            found = os.path.expandvars(os.path.expanduser(os.environ[variable]))
            return os.path.abspath(os.path.join(found, inside))
    return os.path.expanduser("~/.cache/huggingface/hub")


def find_cached(model: HubModel) -> Cached | None:
    """Return the snapshot of a model in the cache; None if there is none of its revision.

    Reads a reference and the indexes of the snapshot.
    """
    folder = os.path.join(cache_folder(), f"models--{model.id.replace('/', '--')}")
    revision = model.revision or "main"
    if not _COMMIT.fullmatch(revision):
        try:
            with open(os.path.join(folder, "refs", revision), encoding="ascii") as file:
                revision = file.read(100).strip()
        except (OSError, ValueError):
            return None
        if not _COMMIT.fullmatch(revision):
            return None
    snapshot = os.path.join(folder, "snapshots", revision)
    if not os.path.isdir(snapshot):
        return None
    return Cached(snapshot, tuple(_missing(snapshot)))


def not_found(model: HubModel, cached: Cached | None, why: str = "") -> MissingFileError:
    """Return the error for a model that is not, or not whole, in the cache: what to type."""
    what = f"no such folder, and no model in the Hub's cache ({printable(cache_folder())})"
    if cached is not None:
        what = (
            f"is not complete in the Hub's cache ({printable(cached.folder)}): it lacks "
            f"{some(cached.missing, 3)}"
        )
    line = printable(of_hub_id(str(model)) or "", 400)
    return MissingFileError(
        f"{printable(model)}: {what}; check the name, or download it: {option('download', True)}, "
        f"or type `{line}`{f' ({why})' if why else ''}"
    )


def _missing(snapshot: str) -> Iterator[str]:
    """Yield the weights that a snapshot lacks: by its indexes, or all."""
    whole = False
    for folder, _, names in os.walk(snapshot):
        inside = os.path.relpath(folder, snapshot)
        there = {name for name in names if os.path.exists(os.path.join(folder, name))}
        lacking = {*names} - there  # links into blobs that are gone
        for name in _indexes(there):
            try:
                weight_map, _ = read_index(os.path.join(folder, name), (".safetensors", *PICKLES))
            except FormatError:
                continue  # opening it tells what is wrong
            lacking |= {*weight_map.values()} - there
            whole = True
        for name in sorted(lacking):
            yield os.path.normpath(os.path.join(inside, name))
        whole = whole or any(name.endswith(SUFFIXES) for name in there)
    if not whole:
        yield "its weights"


def _indexes(names: Collection[str]) -> list[str]:
    """Return the indexes among the names in a folder that say which weights belong there."""
    plain = [name for name in _PLAIN if {name, f"{name}.index.json"} & {*names}]
    if plain:
        return [f"{name}.index.json" for name in plain if f"{name}.index.json" in names]
    found = [name for name in names if is_index(name)]
    if found or any(name.endswith(".safetensors") for name in names):
        return sorted(found)
    return sorted(name for name in names if name.endswith(".index.json"))
