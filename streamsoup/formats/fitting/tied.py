"""Copies of input embeddings that one ingredient stores as its head, and others do not.

transformers stores tied weights once, and other tools twice. Where the configurations say that they
are tied, or nothing, which transformers takes for the same, and the two are the same bit for bit,
the copy is left out: loaders tie again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from typing import Literal

from streamsoup.errors import MismatchError, printable
from streamsoup.formats.configs import INPUTS, OUTPUTS, config_folder, read_config, tied_in
from streamsoup.formats.files import Access
from streamsoup.formats.source import Source
from streamsoup.system.buffers import buffer, is_same
from streamsoup.tensors import DTYPES

__all__ = ["tied_copies"]

_PIECE = 1 << 19
"""Bytes of two tensors that are compared at once."""


def tied_copies(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Return, for each source, the heads that are left out, and the embeddings they are copies of.

    Reads the two tensors of a source that stores both, where another one does not.

    Raises:
        MismatchError: They differ, though the configuration says that they are tied.
    """
    found: list[dict[str, str]] = [{} for _ in sources]
    for number, source in enumerate(sources):
        for head in [name for name in source.tensors if name.endswith(OUTPUTS)]:
            lacking = [each for each in sources if head not in each.tensors]
            twin = _twin(source, head)
            if not lacking or twin is None or any(twin not in each.tensors for each in lacking):
                continue
            told = [_told(each) for each in (source, *lacking)]
            if "apart" in told or "unknown" in told:
                continue
            if _is_equal(source, head, twin):
                found[number][head] = twin
            elif "tied" in told:
                raise MismatchError(
                    f"{source.where(head)}: differs from {printable(twin)}, though config.json "
                    f"says that they are tied, and {printable(lacking[0].name)} stores one alone; "
                    "leave out one of these ingredients, or save both with the same tie"
                )
    return found


def _twin(source: Source, head: str) -> str | None:
    """Return the input embeddings of the shape and dtype of a head."""
    tensors = source.tensors
    alike = (name for name in tensors if name.endswith(INPUTS))
    return next((name for name in alike if _kind(source, name) == _kind(source, head)), None)


def _kind(source: Source, name: str) -> tuple[object, ...]:
    tensor = source.tensors[name]
    return tensor.dtype, tuple(tensor.shape), tensor.delivered


def _told(source: Source) -> Literal["tied", "apart", "unsaid", "unknown"]:
    """Return what a source's configuration says of embeddings; unsaid, transformers ties them."""
    folder = config_folder(source)
    config = None if folder is None else read_config(os.path.join(folder, "config.json"))
    if config is None:
        return "unknown"
    tied = tied_in(config)
    return "unsaid" if tied is None else "tied" if tied else "apart"


def _is_equal(source: Source, one: str, other: str) -> bool:
    tensor = source.tensors[one]
    n_bits = DTYPES[tensor.delivered or tensor.dtype].nbits
    for length in tensor.shape:
        n_bits *= length
    nbytes = n_bits // 8
    access = Access(mapped=False, n_descriptors=2)
    with closing(access), closing(source.cursor(access)) as cursor:
        blocks = buffer(_PIECE), buffer(_PIECE)
        for begin in range(0, nbytes, _PIECE):
            size = min(_PIECE, nbytes - begin)
            cursor.read(one, begin, blocks[0][:size])
            cursor.read(other, begin, blocks[1][:size])
            if not is_same(blocks[0][:size], blocks[1][:size]):
                return False
    return True
