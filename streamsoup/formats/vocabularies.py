"""Which token each id stands for: the order of the rows of embeddings, and of a head.

Two tokenizers may hold the same tokens in another order; the mean of their embeddings is then that
of unrelated tokens. The files that say the order are read one after the other, and what is kept of
each is a number of 8 bytes for a token, so that large vocabularies take little memory:
``tokenizer.json`` (https://huggingface.co/docs/tokenizers), ``vocab.json``, ``vocab.txt`` (a token
a line), SentencePiece models (protobuf: https://github.com/google/sentencepiece, ModelProto) and
tiktoken's files (a token in base64, and its id, a line).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import printable
from streamsoup.system.regular import reading

__all__ = ["Conflict", "compare_vocabularies", "is_vocabulary"]

VOCABULARY_LIMIT = 64_000_000
"""Bytes of a vocabulary that are read: the largest published ones have 34 million."""

_NAMES = (
    *("tokenizer.json", "vocab.json", "added_tokens.json", "vocab.txt", "dict.txt"),
    *("tokenizer.model*", "*spiece.model", "sentencepiece*.model", "source.spm", "target.spm"),
    *("*.tiktoken", "tokenizer_config.json"),
)
"""Files that say which id a token has."""


_LARGEST_ID = 1 << 24
"""Ids from which a file is not a vocabulary: each takes 8 bytes, whether it has a token or not."""

_ENOUGH = 1000
"""Tokens in other places that are looked up: one will do."""


class Conflict(msgspec.Struct, frozen=True):
    """The first id that two vocabularies do not agree on."""

    moved: bool
    """True if a token has another id; False if a token replaces another."""
    what: str
    """The token or the id, and what each makes of it."""


class _Json(msgspec.Struct):
    """What of ``tokenizer.json`` and ``tokenizer_config.json`` says ids; all else is not kept."""

    model: _Model | None = None
    added_tokens: list[_Added] | None = None
    added_tokens_decoder: dict[str, _Added] | None = None


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] | None = None


class _Added(msgspec.Struct):
    content: str
    id: int | None = None


def is_vocabulary(name: str) -> bool:
    """Return True for a side file that says which id a token has, by its relative name."""
    return any(fnmatch(os.path.basename(name), pattern) for pattern in _NAMES)


def compare_vocabularies(first: str, other: str) -> Conflict | None:
    """Return where the vocabularies in two files of the same name do not agree, or None.

    One may have tokens that the other lacks, at ids that the other lacks. What cannot be read as a
    vocabulary agrees with anything. Holds one of them at a time, and 8 bytes for each token of the
    other.
    """
    ours = array("Q")
    for token, number in _tokens(first):
        if 0 <= number < _LARGEST_ID:
            ours.extend([0] * (number + 1 - len(ours)))
            ours[number] = _digest(token)
    strange: dict[int, tuple[str, int]] = {}
    for token, number in _tokens(other):
        digest = _digest(token)
        if (0 <= number < len(ours) and ours[number] == digest) or len(strange) >= _ENOUGH:
            continue
        strange.setdefault(digest, (printable(repr(token.decode(errors="replace")), 60), number))
    for at, digest in enumerate(ours):
        if digest in strange and strange[digest][1] != at:
            name, number = strange[digest]
            return Conflict(True, f"token {name} has id {number} and {at}")
    for name, number in strange.values():
        if 0 <= number < len(ours) and ours[number]:
            return Conflict(False, f"id {number} is {name} in one only")
    return None


def _digest(token: bytes) -> int:
    return xxhash.xxh3_64_intdigest(token) or 1


def _tokens(path: str) -> Iterator[tuple[bytes, int]]:
    """Yield the tokens of a file with their ids; nothing for a file that is not a vocabulary."""
    with suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError, IndexError):
        with reading(path) as (descriptor, status):
            if status.st_size > VOCABULARY_LIMIT:
                return
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(VOCABULARY_LIMIT)
        name = os.path.basename(path)
        if name in ("tokenizer.json", "tokenizer_config.json"):
            yield from _of_json(msgspec.json.decode(text, type=_Json))
        elif name.endswith(".json"):
            for word, number in msgspec.json.decode(text, type=dict[str, int]).items():
                yield word.encode(errors="replace"), number
        elif name.endswith(".txt"):
            for number, line in enumerate(text.splitlines()):
                yield line, number
        elif not text.startswith(b"\n"):  # tiktoken, as SentencePiece begins with a piece
            for line in text.splitlines():
                token, _, rank = line.partition(b" ")
                yield token, int(rank)
        else:
            yield from _of_pieces(text)


def _of_json(found: _Json) -> Iterator[tuple[bytes, int]]:
    vocab: Any = found.model.vocab if found.model is not None else None
    if isinstance(vocab, dict):
        yield from ((token.encode(errors="replace"), number) for token, number in vocab.items())
    elif vocab is not None:  # Unigram: in the order of the ids
        yield from ((pair[0].encode(errors="replace"), n) for n, pair in enumerate(vocab))
    for added in found.added_tokens or ():
        if added.id is not None:
            yield added.content.encode(errors="replace"), added.id
    for number, added in (found.added_tokens_decoder or {}).items():
        yield added.content.encode(errors="replace"), int(number)


def _of_pieces(text: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the pieces of a SentencePiece model: field 1, and of each piece field 1 again."""
    number = 0
    for field, piece in _fields(text):
        if field == 1:
            for inner, token in _fields(piece):
                if inner == 1:
                    yield bytes(token), number
            number += 1


def _fields(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of a protobuf message that have a length; raise `ValueError` for others."""
    at = 0
    while at < len(text):
        key, at = _varint(text, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(text, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            n, at = _varint(text, at)
            yield key >> 3, text[at : at + n]
            at += n
        else:
            raise ValueError("not a protobuf message")


def _varint(text: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = text[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not a protobuf message")
