"""Opening of what lies elsewhere: in the Hub's cache, at an address, or on the Hub itself.

Of the Hub, one answer of its API gives the commit and the names of all files; everything is then
asked for by that commit. Of any other folder there is no listing: an index or ``model.safetensors``
is asked for by name, and side files by the names that libraries give them.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from urllib.parse import quote, urlsplit

from streamsoup.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    RecipeError,
    option,
    printable,
    some,
)
from streamsoup.formats.header import header_nbytes, opening_nbytes
from streamsoup.formats.index import check_index, is_index, read_index
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.remote.addresses import (
    check_address,
    check_object,
    endpoint,
    shown,
    store_of,
)
from streamsoup.formats.remote.hub_cache import HubModel, find_cached, hub_model, not_found
from streamsoup.formats.remote.ranges import RemoteFile, Requests
from streamsoup.formats.remote.snapshots import snapshot_of
from streamsoup.formats.remote.source import Remote
from streamsoup.formats.remote.stores import Store
from streamsoup.formats.source import Source
from streamsoup.formats.weights import SUFFIXES
from streamsoup.reading import Reading

__all__ = ["open_remote"]

_HEAD = 1 << 16
"""Bytes of a file that are asked for first: most headers are within."""

_LARGEST = 100_000_000
"""Bytes of a listing or an index at most."""

_LARGEST_BESIDE = 1_000_000_000
"""Bytes of a side file at most."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

_SIDE_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "params.json"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "README.md"),
)
"""Side files that are asked for where there is no listing."""


def open_remote(given: HubModel | str, reading: Reading, cache: HeaderCache) -> Source | str:
    """Open a model of the Hub or an address; or return the folder that the model has here.

    Args:
        given: A model, or an address: of a safetensors file, of a folder with an index or
            ``model.safetensors``, ``hf://org/name@revision``, or an object or folder at
            ``s3://bucket/key`` or ``gs://bucket/key``.
        reading: How it is read: `download` puts a model into the Hub's cache.
        cache: Headers parsed so far.

    Returns:
        A folder in the Hub's cache if the model is complete there, or downloaded; else a source
        that reads ranges.

    Raises:
        MissingFileError: There is no such model or file, or it may not be read.
        FormatError: It is damaged, is not in safetensors files, or cannot be read.

    Reads a listing or an index, and a header for each file; of a cached model its listing.
    """
    if isinstance(given, str) and given.lower().startswith("hf://"):
        model = hub_model(given[len("hf://") :], local=False)
        if model is None:
            raise MissingFileError(
                f"{printable(given)}: names no model; write hf://org/name or hf://org/name@revision"
            )
        given = model
    if isinstance(given, str) and (scheme := store_of(given)) is not None:
        check_object(given)
        _check_whole(given, reading)
        return _open_object(scheme, given, reading, cache)
    if isinstance(given, str):
        check_address(given)
        _check_whole(given, reading)
        return _open_address(given, reading, cache)
    cached = find_cached(given)
    if reading.download or (cached is not None and not cached.missing):
        return snapshot_of(given, download=reading.download)
    if _is_offline() or os.path.exists(given.id.partition("/")[0]):
        raise not_found(given, cached)
    _check_whole(str(given), reading)
    return _open_hub(given, reading, cache)


def _check_whole(name: str, reading: Reading) -> None:
    """Raise `RecipeError` for components of pipelines, whose folders are read from a disk."""
    if reading.components:
        raise RecipeError(
            f"{shown(name)}: {option('components')} are read from a folder on this machine; "
            f"download the pipeline, of the Hub with {option('download', True)}"
        )


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _open_hub(model: HubModel, reading: Reading, cache: HeaderCache) -> Remote:
    """Open a model of the Hub at the commit that its revision has now."""
    requests = Requests(reading.network_timeout)
    revision = quote(model.revision or "main", safe="")
    try:
        listing = f"{endpoint()}/api/models/{model.id}/revision/{revision}"
        check_address(listing)
        try:
            text = io.BytesIO()
            found = requests.fetch(listing, text, _LARGEST, patient=False)
        except MissingFileError as error:
            raise MissingFileError(f"{printable(model)}: {error.text}") from None
        except FormatError as error:
            raise not_found(model, find_cached(model), error.text) from None
        if not found:
            why = "the Hub has no such model, or revision"
            raise not_found(model, find_cached(model), why)
        commit, names = _listed(model, text.getvalue())
        root = f"{endpoint()}/{model.id}/resolve/{commit}/"

        def address(name: str) -> str:
            return root + quote(name)

        weights = _choose(str(model), names, f"{option('download', True)} keeps a copy")
        path, side_files = f"hf://{model.id}@{commit}", _side_files(names)
        place = _Place(str(model), path, address, side_files, pinned=True)
        return _open(requests, place, weights, reading, cache)
    finally:
        requests.close()


def _listed(model: HubModel, text: bytes) -> tuple[str, list[str]]:
    """Return the commit and the names of the files in a listing of the Hub."""
    try:
        found = json.loads(text)
        commit = found["sha"]
        names = [each["rfilename"] for each in found["siblings"]]
        if not (isinstance(commit, str) and commit.isalnum()):
            raise TypeError
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptFileError(
            f"{printable(model)}: the Hub's listing has no commit and files; check HF_ENDPOINT"
        ) from None
    return commit, sorted(names)


def _is_plain(name: str) -> bool:
    """Return True for the name of a file in a folder itself that is not hidden."""
    plain = name.isprintable() and "/" not in name and not name.startswith(".")
    return plain and 0 < len(name.encode()) < 256


def _side_files(names: Iterable[str]) -> list[str]:
    """Return the names in a listing that are side files of a checkpoint."""
    weights = (*SUFFIXES, ".index.json")
    return [name for name in names if _is_plain(name) and not name.endswith(weights)]


def _choose(name: str, names: Iterable[str], advice: str) -> str:
    """Return the name of the index, or of the only safetensors file, in a listing."""
    inside = [each for each in names if _is_plain(each)]
    for plain in (_INDEX, _SINGLE):
        if plain in inside:
            return plain
    indexes = [each for each in inside if is_index(each)]
    files = [each for each in inside if each.endswith(".safetensors")]
    if len(indexes) == 1:
        return indexes[0]
    if len(files) == 1 and not indexes:
        return files[0]
    has = some([each for each in names if each.endswith(SUFFIXES)]) or "no weights"
    raise FormatError(
        f"{printable(name)}: only one index or one safetensors file can be read without a copy, "
        f"and it has {has}; {advice}"
    )


def _open_object(scheme: str, given: str, reading: Reading, cache: HeaderCache) -> Remote:
    """Open an object of a store, or a folder there by its listing."""
    store = Store(scheme, reading.network_timeout)
    requests = Requests(reading.network_timeout, store)
    root = f"{scheme}://{given.partition('://')[2].rstrip('/')}"
    name = root.rpartition("/")[2]
    try:
        if name.endswith(".safetensors"):
            lone = root
            place = _Place(given, root, lambda _: lone, None, pinned=False, store=store)
            return _open(requests, place, name, reading, cache)
        path = root
        if is_index(name):
            root = root.rpartition("/")[0]
        names = store.names(root)
        if not names:
            raise MissingFileError(f"{shown(root)}: no such folder in the bucket; check the name")
        advice = "copy it to a local disk, and give that folder"
        weights = name if is_index(name) else _choose(given, names, advice)

        def address(name: str) -> str:
            return f"{root}/{name}"

        place = _Place(given, path, address, _side_files(names), pinned=False, store=store)
        return _open(requests, place, weights, reading, cache)
    finally:
        requests.close()


def _open_address(given: str, reading: Reading, cache: HeaderCache) -> Remote:
    """Open the file, or the folder with an index or one file, at an address."""
    requests = Requests(reading.network_timeout)
    parts = urlsplit(given)
    name = parts.path.rpartition("/")[2]
    try:
        if name.endswith(".safetensors"):
            plain = given.partition("#")[0]
            place = _Place(shown(given), shown(given), lambda _: plain, None, pinned=False)
            return _open(requests, place, name, reading, cache)
        if parts.query:
            raise MissingFileError(
                f"{shown(given)}: a folder has no query; give the address of a safetensors file"
            )
        root = given.partition("#")[0].rstrip("/")
        if is_index(name):
            root = root.rpartition("/")[0]

        def address(name: str) -> str:
            return f"{root}/{quote(name)}"

        place = _Place(shown(given), shown(given), address, list(_SIDE_FILES), pinned=False)
        if is_index(name):
            return _open(requests, place, name, reading, cache)
        if requests.open(address(_INDEX), 1) is not None:
            return _open(requests, place, _INDEX, reading, cache)
        return _open(requests, place, _SINGLE, reading, cache)
    finally:
        requests.close()


class _Place:
    """Where the files of a checkpoint are."""

    def __init__(
        self,
        name: str,
        path: str,
        address: Callable[[str], str],
        side_files: list[str] | None,
        *,
        pinned: bool,
        store: Store | None = None,
    ) -> None:
        self.name, self.path, self.address, self.store = name, path, address, store
        self.side_files, self.pinned = side_files, pinned


def _open(
    requests: Requests, place: _Place, weights: str, reading: Reading, cache: HeaderCache
) -> Remote:
    """Open a checkpoint by its index, or its only file, and all headers."""
    weight_map: dict[str, str] | None = None
    opening = 0
    names = [weights]
    if is_index(weights):
        weight_map, opening = _read_index(requests, place, weights)
        names = sorted({*weight_map.values()})
    files: list[tuple[str, RemoteFile, int]] = []
    headers = []
    for name in names:
        where = shown(place.address(name))
        found = requests.open(place.address(name), _HEAD)
        if found is None:
            raise MissingFileError(f"{where}: no such file; check the address")
        file, head = found
        try:
            length = header_nbytes(head[:8], file.size)
            text = bytearray(8 + length)
            text[: len(head)] = head[: 8 + length]
            if len(text) > len(head):
                requests.read(file, len(head), memoryview(text)[len(head) :], len(text))
            header = cache.header(text[8:], file.size)
        except FormatError as error:
            raise type(error)(f"{where}: {error.text.removeprefix(f'{where}: ')}") from None
        files.append((name, file, 8 + length))
        headers.append(header)
        opening = max(opening, 2 * opening_nbytes(length, header))
    layout = cache.layout(headers, names, place.name)
    if weight_map is not None:
        held = {tensor: names[number] for tensor, (number, _) in layout.places.items()}
        check_index(place.address(weights), weight_map, held)
    timeout_s, address, side_files = reading.network_timeout, place.address, place.side_files

    def connect() -> Requests:
        return Requests(timeout_s, place.store)

    return Remote(
        name=place.name,
        path=place.path,
        files=files,
        index_name=weights if weight_map is not None else None,
        layout=layout,
        fetch_side_files=None
        if side_files is None
        else lambda folder: _fetch(folder, side_files, address, connect),
        connect=connect,
        opening_nbytes=opening,
        pinned=place.pinned,
    )


def _read_index(requests: Requests, place: _Place, name: str) -> tuple[dict[str, str], int]:
    """Download an index and read it, with errors that name its address."""
    where = shown(place.address(name))
    with tempfile.TemporaryDirectory(prefix="streamsoup-") as folder:
        path = os.path.join(folder, "index.json")
        with open(path, "wb") as file:
            if not requests.fetch(place.address(name), file, _LARGEST):
                raise MissingFileError(f"{where}: no such file; check the address")
        try:
            return read_index(path)
        except FormatError as error:
            raise type(error)(error.text.replace(printable(path), where)) from None


def _fetch(
    folder: str,
    names: Iterable[str],
    address: Callable[[str], str],
    connect: Callable[[], Requests],
) -> None:
    """Download side files into a folder, as far as there are any."""
    requests = connect()
    try:
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                found = requests.fetch(address(name), file, _LARGEST_BESIDE)
            if not found:
                os.remove(path)
    finally:
        requests.close()
