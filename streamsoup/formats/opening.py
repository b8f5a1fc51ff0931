"""Which reader opens a path: by its name and what lies there, before anything is read."""

from __future__ import annotations

from streamsoup.formats.adapters.paths import split
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.pickled.opening import is_pickled, open_pickled
from streamsoup.formats.pipelines import open_pipeline
from streamsoup.formats.remote.addresses import is_address
from streamsoup.formats.remote.hub_cache import hub_model
from streamsoup.formats.remote.snapshots import with_snapshots
from streamsoup.formats.source import Source
from streamsoup.formats.stacked import open_stacked, pieces_of
from streamsoup.formats.stored import open_stored
from streamsoup.reading import Reading

__all__ = ["open_path"]


def open_path(path: str, reading: Reading, cache: HeaderCache) -> Source:
    """Open the checkpoint at a path by its headers, with the reader for its kind.

    Args:
        path: As the user gave it; `formats.stacked` says how layers of several are named, and
            `formats.remote.hub_cache` which paths are those of models of the Hub.
        reading: How files become tensors.
        cache: Headers parsed so far, to be shared by the ingredients of one soup.

    Raises:
        MissingFileError: There is no such file or folder.
        FormatError: The file is not a checkpoint; names the file and the fault.
    """
    path = with_snapshots(path, download=reading.download)
    if (parts := split(path)) is not None:
        from streamsoup.formats.adapters.source import open_adapted

        return open_adapted(open_path(parts[0], reading, cache), parts[1:], cache)
    if (pieces := pieces_of(path)) is not None:
        return open_stacked(pieces, lambda piece: open_path(piece, reading, cache))
    model = None if is_address(path) else hub_model(path)
    if model is not None or is_address(path):
        from streamsoup.formats.remote.opening import open_remote

        found = open_remote(model or path, reading, cache)
        if not isinstance(found, str):
            return _dequantised(found) if reading.dequantize else found
        path = found

    def open_folder(folder: str) -> Source:
        pickled = is_pickled(folder)
        source = open_pickled(folder, reading.key, cache) if pickled else open_stored(folder, cache)
        return _dequantised(source) if reading.dequantize else source

    return open_pipeline(path, reading.components, open_folder) or open_folder(path)


def _dequantised(source: Source) -> Source:
    """Return a source of the values of quantised weights."""
    from streamsoup.formats.quantised.opening import dequantised

    return dequantised(source)
