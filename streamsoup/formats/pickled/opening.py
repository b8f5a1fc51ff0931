"""Which paths are pickled checkpoints, by their names and first bytes."""

from __future__ import annotations

import os
from contextlib import suppress

from streamsoup.formats.conversions import of_training_folder
from streamsoup.formats.index import is_index as is_safetensors_index
from streamsoup.formats.layout import HeaderCache
from streamsoup.formats.pickled.distributed import METADATA, open_distributed
from streamsoup.formats.pickled.saved import is_index, open_saved
from streamsoup.formats.pickled.source import Pickled
from streamsoup.formats.weights import PICKLES
from streamsoup.system.regular import reading

__all__ = ["is_pickled", "open_pickled"]


def is_pickled(path: str) -> bool:
    """Return True if a path leads to a pickled checkpoint, or to a file that is named as one.

    A folder with a safetensors file is not one, whatever lies beside it. Nor are paths that lead
    nowhere.
    """
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        return _is_pickled_file(path)
    except (OSError, ValueError):
        return False
    if any(name.endswith(".safetensors") or is_safetensors_index(name) for name in names):
        return False
    if METADATA in names and any(name.endswith(".distcp") for name in names):
        return True
    if of_training_folder(path, names) is not None:
        return False
    return any(is_index(name) or name.endswith(PICKLES) for name in names)


def _is_pickled_file(path: str) -> bool:
    if path.endswith((".safetensors", ".json")):
        return is_index(os.path.basename(path))
    with suppress(OSError), reading(path) as (descriptor, _):
        return path.endswith(PICKLES) or os.pread(descriptor, 4, 0) == b"PK\x03\x04"
    return path.endswith(PICKLES)  # to be refused for what it is


def open_pickled(path: str, key: str | None, cache: HeaderCache) -> Pickled:
    """Open a pickled checkpoint. See `saved.open_saved` and `distributed.open_distributed`."""
    if os.path.lexists(os.path.join(path, METADATA)):
        return open_distributed(path, key, cache)
    return open_saved(path, key, cache)
