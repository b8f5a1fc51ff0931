"""Which files of a folder belong to a checkpoint: others would be lost if it were replaced.

For a soup, those that its provenance names, with the sizes and digests recorded there. For other
checkpoints, those with the names that tools give them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch

import xxhash

from streamsoup.engine.digest import digest_bytes
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.errors import StreamsoupError
from streamsoup.formats.listings import LISTINGS, read_listing
from streamsoup.recipe import PROVENANCE_LIMIT, PROVENANCE_NAME, FileRecord, Provenance
from streamsoup.system.folders import Folder
from streamsoup.system.regular import read_file

__all__ = ["part_folders", "strange_files"]

_OF_A_CHECKPOINT = (
    *("*.safetensors", "*.index.json", "*.index.*.json", PROVENANCE_NAME, *LISTINGS),
    *("config.json", "*_config.json", "config_*.json", "params.json"),
    *("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.jinja", "chat_template*", "spiece.model", "*sentencepiece*", "*.spm", "*.tiktoken"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "*processing_*.py"),
    *("license*", "licence*", "notice*", "use_policy*", ".gitattributes", "training_args*"),
)
"""Names of files that tools write beside weights; all of them can be had again elsewhere."""

_HUB = ".cache"
"""Folder in which the Hub's client records downloads."""

_HEADER_LIMIT = 100_000_000
"""Bytes of a header, as safetensors limits them."""


def strange_files(folder: Folder) -> tuple[list[str], list[str]]:
    """List the files in a folder that belong to no checkpoint, and those of a soup since changed.

    Args:
        folder: What is to be replaced.

    Returns:
        Paths relative to the folder, sorted: of strange files and hidden folders; of files of a
        soup that have another size or digest than its provenance says. Side files are digested
        whole; of shards, the size and the header.
    """
    names = list(_walk(folder, ""))
    if PROVENANCE_NAME not in names:
        return [name for name in names if not _looks_ours(name)], []
    try:
        text = read_file(folder, PROVENANCE_NAME, PROVENANCE_LIMIT)
        provenance = Provenance.from_json(text, BUILT_IN)
    except (OSError, StreamsoupError):
        return [], [PROVENANCE_NAME]
    known = {record.name: record for record in (*provenance.shards, *provenance.side_files)}
    shards = {record.name for record in provenance.shards}
    strange = [name for name in names if name not in known and name != PROVENANCE_NAME]
    edited = [] if provenance.intact else [PROVENANCE_NAME]
    for name in names:
        if name in known and not _is_as_made(folder, known[name], shard=name in shards):
            edited.append(name)
    return strange, sorted(edited)


def part_folders(target: str) -> set[str]:
    """Return the paths of the folders in a checkpoint that its weights lie in, relative to it.

    For a soup, those that its provenance names; for other pipelines, those of the components that
    they list. A listing that cannot be read has none.
    """
    try:
        with Folder.open(target) as folder:
            text = read_file(folder, PROVENANCE_NAME, PROVENANCE_LIMIT)
        provenance = Provenance.from_json(text, BUILT_IN)
        return {os.path.dirname(r.name) for r in (*provenance.shards, *provenance.side_files)}
    except FileNotFoundError:
        pass
    except (OSError, StreamsoupError):
        return set()
    try:
        listing = read_listing(target)
    except StreamsoupError:
        return set()
    return set() if listing is None else set(listing.components)


def _walk(folder: Folder, above: str) -> Iterator[str]:
    """Yield the paths of everything but folders, and of hidden folders."""
    for name in folder.names():
        status = folder.status(name)
        if status is None or (name == _HUB and not above):
            continue
        if not stat.S_ISDIR(status.st_mode) or name.startswith("."):
            yield above + name
            continue
        with folder.folder(name) as inner:
            yield from _walk(inner, f"{above}{name}/")


def _looks_ours(path: str) -> bool:
    """Return True for a name that a file of a checkpoint has."""
    name = os.path.basename(path).lower()
    return any(fnmatch(name, pattern) for pattern in _OF_A_CHECKPOINT)


def _is_as_made(folder: Folder, record: FileRecord, *, shard: bool) -> bool:
    """Return True if a file has the size and the digest of its record."""
    *parts, last = record.name.split("/")
    try:
        with _open(folder, parts) as above:
            descriptor = above.file(last, os.O_RDONLY)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size != record.nbytes:
                    return False
                if shard:
                    start = file.read(8)
                    n = int.from_bytes(start, "little")
                    return (
                        n <= _HEADER_LIMIT and digest_bytes(start + file.read(n)) == record.digest
                    )
                whole = xxhash.xxh3_128()
                while piece := file.read(1 << 20):
                    whole.update(piece)
                return whole.hexdigest() == record.digest
    except OSError:
        return False


def _open(folder: Folder, parts: list[str]) -> Folder:
    """Open a folder below another by the parts of its path; the result is the caller's to close."""
    at = Folder(folder.path, os.dup(folder.descriptor))
    for part in parts:
        with at:
            at = at.folder(part)
    return at
