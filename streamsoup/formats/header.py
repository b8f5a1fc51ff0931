"""The header of one safetensors file, read strictly.

A file starts with the header's length (8 bytes, little-endian), then that many bytes of JSON,
then the tensors. Everything in it is checked before it is believed, since a checkpoint may come
from anywhere: lengths before they are allocated, numbers before they are used as offsets, and the
offsets against each other, so that every byte of the file belongs to exactly one tensor.

The rules are those of the format (https://github.com/huggingface/safetensors#format), read in
their strictest sense; where its own reader is more lenient (floats as offsets), we refuse.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import CorruptFileError, FormatError, UnsupportedDtypeError, printable
from streamsoup.tensors import DTYPES, TensorSpec

__all__ = [
    "HEADER_LIMIT",
    "LARGEST",
    "SURROGATE",
    "Header",
    "header_nbytes",
    "make_header",
    "opening_nbytes",
    "parse_header",
    "recognise",
]

HEADER_LIMIT = 100_000_000
"""The largest header in bytes, as in the reference reader; ours and theirs refuse more."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""What no UTF-8 text holds: half of a pair, from an escape or from a path."""

LARGEST = 2**63 - 1
"""The largest size or offset: file offsets are signed 64-bit numbers."""


_LONGEST = 1 << 16
"""Bytes of a key, or about one tensor, at most: ten times what any published model has."""

_MOST_METADATA = 100_000
"""Entries of ``__metadata__`` at most; trainers write some hundred."""

_SIXTY_BITS = (1 << 60) - 1
"""Of a digest; Python's integers take half as much again from there on."""

_PIECE = 1 << 20
"""Bytes that are decoded at a time."""


class Header(msgspec.Struct, frozen=True):
    """What one file holds."""

    tensors: dict[str, TensorSpec]
    """By name, in the order in which they lie in the file."""


def header_nbytes(prefix: bytes | bytearray, file_nbytes: int) -> int:
    """Read the length of the JSON from a file's first 8 bytes, and check it against its size."""
    if len(prefix) < 8:
        raise CorruptFileError(f"has {file_nbytes} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix[:8])
    kind = recognise(prefix)
    if kind and 8 + length > file_nbytes:
        raise FormatError(f"is {kind}, not safetensors")
    if length > HEADER_LIMIT:
        raise CorruptFileError(
            f"claims a header of {length} bytes, above the limit of {HEADER_LIMIT}, so it is "
            "damaged or not a safetensors file"
        )
    if 8 + length > file_nbytes:
        raise CorruptFileError(
            f"is truncated: its header ends at byte {8 + length}, the file at {file_nbytes}"
        )
    return int(length)


def parse_header(text: bytes | bytearray, file_nbytes: int) -> Header:
    """Check the JSON of a header, and return the tensors it describes, in file order.

    The text is gone through twice: all of it is checked first, holding 24 bytes for each tensor,
    so that a header that is refused takes little more memory than its text.

    Args:
        text: The JSON, as it is in the file.
        file_nbytes: The size of the file.

    Raises:
        CorruptFileError: Something is wrong with it; the caller knows in which file.
        UnsupportedDtypeError: A tensor has an unknown dtype.
    """
    if not text.startswith(b"{"):
        raise CorruptFileError("has a header that does not start with '{'")
    end, is_sorted = _check_all(text)
    end += 8 + len(text)
    if end != file_nbytes:
        what = "is truncated" if end > file_nbytes else "has bytes after its last tensor"
        raise CorruptFileError(f"{what}: its tensors end at byte {end}, the file at {file_nbytes}")
    specs = _specs(text)
    if not is_sorted:
        # Zero-size tensors share their offset with a neighbour: they sort before it.
        specs = iter(sorted(specs, key=lambda spec: (spec.begin, spec.nbytes)))
    return Header({spec.name: spec for spec in specs})


def opening_nbytes(length: int, header: Header) -> int:
    """Bound the bytes held while a header of `length` bytes is read, its tensors included.

    Measured: 330 to 420 bytes for each tensor, and its name, which may be wider than in the text.
    """
    return length + sum(500 + 4 * len(name) for name in header.tensors)


def make_header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Write a header, length and padding included, for tensors laid end to end.

    `tensors` holds name, dtype, shape and nbytes of each, in file order. The JSON is padded with
    spaces to a multiple of 8 bytes, as the reference writer does, so that data stay aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def recognise(prefix: bytes | bytearray) -> str | None:
    """Name the format that a file's first bytes betray, for a helpful refusal."""
    if prefix.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch .pt or .bin pickle, to be converted first)"
    if prefix.startswith(b"\x80") and prefix[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle, which could run code when opened (to be converted first)"
    if prefix.startswith(b"GGUF"):
        return "a GGUF file, whose weights are quantised (use the checkpoint it was made of)"
    if prefix.startswith(b"version "):
        return "a Git LFS pointer, whose content was never fetched (run `git lfs pull`)"
    if prefix.startswith(b"{") and b"\0" not in prefix:
        return "JSON text (give the folder it lies in)"
    if prefix.lower().startswith((b"<!doctyp", b"<html", b"<?xml")):
        return "a web page, perhaps an error that was saved in its place (download it again)"
    if prefix.startswith(b"\x89HDF"):
        return "an HDF5 file (to be converted first)"
    return None


def _check_all(text: bytes | bytearray) -> tuple[int, bool]:
    """Check each tensor and that they tile the data; return where they end, and if in order."""
    _check_utf8(text)
    hashes, begins, sizes = array("Q"), array("q"), array("q")
    end, is_sorted = 0, True
    for spec in _specs(text):
        hashes.append(xxhash.xxh3_64_intdigest(spec.name.encode()) & _SIXTY_BITS)
        begins.append(spec.begin)
        sizes.append(spec.nbytes)
        is_sorted = is_sorted and spec.begin == end
        end += spec.nbytes
    ordered = sorted(hashes)
    twice = {one for one, other in pairwise(ordered) if one == other}
    del ordered
    if twice:
        raise _is_twice(_name_of(text, max(n for n, key in enumerate(hashes) if key in twice)))
    if not is_sorted:
        _check_tiling(text, begins, sizes)
    return end, is_sorted


def _check_tiling(text: bytes | bytearray, begins: array[int], sizes: array[int]) -> None:
    """Raise `CorruptFileError` unless tensors in any order leave no hole and do not overlap."""
    import numpy as np

    first, nbytes = (np.frombuffer(column, np.int64) for column in (begins, sizes))
    order = np.lexsort((nbytes, first))
    expected = np.cumsum(nbytes[order]) - nbytes[order]
    wrong = np.flatnonzero(first[order] != expected)
    if len(wrong):
        at = wrong[0]
        found, wanted = int(first[order[at]]), int(expected[at])
        what = "overlaps the one before it" if found < wanted else "leaves a hole before it"
        raise CorruptFileError(
            f"tensor {printable(_name_of(text, int(order[at])))!r} {what}: it begins at byte "
            f"{found} of the data, expected {wanted}"
        )


def _name_of(text: bytes | bytearray, number: int) -> str:
    return next(itertools.islice(_specs(text), number, None)).name


def _is_twice(key: str) -> CorruptFileError:
    return CorruptFileError(f"has the key {printable(key)!r} twice in its header")


def _check_utf8(text: bytes | bytearray) -> None:
    if text.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(text), _PIECE):
        try:
            decoder.decode(text[at : at + _PIECE], final=at + _PIECE >= len(text))
        except UnicodeDecodeError as error:
            raise CorruptFileError(
                f"has a header that is not UTF-8 at byte {at + error.start}"
            ) from None


def _specs(text: bytes | bytearray) -> Iterator[TensorSpec]:
    """Yield the tensors of a header in the order of its text, each checked by itself.

    The text is read entry by entry, as most JSON readers would take many times its size.
    """
    has_metadata = False
    at = _OPENING.match(text).end()  # type: ignore[union-attr]
    more = text[at : at + 1] != b"}"
    at += not more
    while more:
        found = _PLAIN_ENTRY.match(text, at)
        if found is not None:
            name, dtype, shape, begin, end = found.groups()
            sizes = tuple(map(int, shape.split(b","))) if shape else ()
            yield _spec(name.decode(), dtype.decode(), sizes, int(begin), int(end))
            at = found.end()
        else:
            key, at = _key(text, at)
            _check_name(key)
            if key == "__metadata__":
                if has_metadata:
                    raise _is_twice(key)
                has_metadata = True
                at = _skip_metadata(text, at)
            else:
                entry, at = _value(text, at)
                yield _check_tensor(key, entry)
        found = _COMMA_OR_END.match(text, at)
        if found is None:
            raise _not_json(at, "',' or '}' expected")
        more, at = found[1] == b",", found.end()
    if text[at:].strip(_BLANK):
        raise _not_json(at, "the end expected")


def _key(text: bytes | bytearray, at: int) -> tuple[str, int]:
    """Return the key that begins at `at`, and where its value begins."""
    found = _KEY.match(text, at)
    if found is None:
        raise _not_json(at, "a key in double quotes expected")
    if found.end() - at > _LONGEST:
        raise CorruptFileError(f"has a key of {found.end() - at} bytes in its header")
    try:
        return str(_DECODER.decode(found[1].decode())), found.end()
    except json.JSONDecodeError:
        raise _not_json(at, "a key without unknown escapes expected") from None


def _value(text: bytes | bytearray, at: int) -> tuple[Any, int]:
    """Decode the value that begins at `at`, with nothing that Python alone accepts."""
    # Without an object in it, it ends at the first brace.
    end = text.find(b"}", at, at + _LONGEST) + 1
    with suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return _DECODER.decode(text[at:end].decode()), end
    part = text[at : at + _LONGEST].decode(errors="replace")
    try:
        value, end = _DECODER.raw_decode(part)
    except RecursionError:
        raise CorruptFileError("has a header nested too deep") from None
    except json.JSONDecodeError as error:
        if at + _LONGEST < len(text):
            raise CorruptFileError(
                f"has a header that is not JSON, or with more than {_LONGEST} bytes about one "
                f"tensor, at byte {at}"
            ) from None
        raise _not_json(at + error.pos, error.msg) from None
    return value, at + len(part[:end].encode())


def _skip_metadata(text: bytes | bytearray, at: int) -> int:
    """Check what nothing here uses, and return where it ends: it may take megabytes."""
    found = _OBJECT.match(text, at)
    if found is None:
        raise CorruptFileError("has a __metadata__ that is not a JSON object")
    at, more = found.end(), found[1] is None
    keys: set[str] = set()
    while more:
        key, at = _key(text, at)
        _check_name(key)
        if key in keys:
            raise _is_twice(key)
        keys.add(key)
        if len(keys) > _MOST_METADATA:
            raise CorruptFileError(f"has more than {_MOST_METADATA} entries in __metadata__")
        found = _UNICODE_STRING.match(text, at)
        if found is None:
            if _STRING.match(text, at):
                raise CorruptFileError(
                    f"has the __metadata__ {printable(key)!r} in its header, which is not Unicode"
                )
            if text[at : at + 1] == b'"':
                raise _not_json(at, "a string without unknown escapes expected")
            raise CorruptFileError(
                f"has the __metadata__ {printable(key)!r}, which is not a string"
            )
        found = _COMMA_OR_END.match(text, found.end())
        if found is None:
            raise _not_json(at, "',' or '}' expected")
        at, more = found.end(), found[1] == b","
    return at


def _not_json(at: int, what: str) -> CorruptFileError:
    return CorruptFileError(f"has a header that is not JSON: {what} at byte {at}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _is_twice(twice)
    return result


def _no_float(text: str) -> Any:
    raise CorruptFileError(f"has {printable(text, 40)} in its header, where only integers may be")


def _plain_integer(text: str) -> int:
    """Read a JSON integer from 0 to 2⁶³-1; anything else can be no size and no offset."""
    if text.startswith("-") or len(text) > 19 or int(text) > LARGEST:
        raise CorruptFileError(
            f"has {printable(text, 40)} in its header, which can be no size and no offset"
        )
    return int(text)


def _check_name(name: str) -> None:
    """Refuse lone surrogates: such a text can be written in no header."""
    if SURROGATE.search(name):
        raise CorruptFileError(f"has {printable(name)!r} in its header, which is not Unicode")


def _check_tensor(name: str, entry: Any) -> TensorSpec:
    _check_name(name)
    where = f"tensor {printable(name)!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{where} must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str):
        raise CorruptFileError(f"{where} has a dtype that is not a string")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise CorruptFileError(f"{where} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{where} has data_offsets that are not two offsets")
    return _spec(name, entry["dtype"], tuple(shape), *offsets)


def _spec(name: str, dtype_name: str, shape: tuple[int, ...], begin: int, end: int) -> TensorSpec:
    """Check what a header says of a tensor against itself."""
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise UnsupportedDtypeError(
            f"tensor {printable(name)!r} has dtype {printable(dtype_name, 40)!r}, "
            f"which is none of {', '.join(DTYPES)}; save it in one of those, or leave it out"
        )
    nbits = dtype.nbits
    for size in shape:
        nbits *= size
        # Checked at each step, as a reader in 64-bit arithmetic would overflow there.
        if nbits > LARGEST:
            raise CorruptFileError(f"tensor {printable(name)!r} has a shape too large for any file")
    if nbits % 8:
        raise CorruptFileError(f"tensor {printable(name)!r} does not fill whole bytes")
    if end - begin != nbits // 8:
        raise CorruptFileError(
            f"tensor {printable(name)!r} has {end - begin} bytes of data, but its shape and dtype "
            f"take {nbits // 8}"
        )
    return TensorSpec(name, dtype, shape, begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates,
    parse_float=_no_float,
    parse_constant=_no_float,
    parse_int=_plain_integer,
)
"""For what is written in another way than usual, and to say what is wrong."""

_BLANK = b" \t\n\r"
_S = rb"[ \t\n\r]*+"
_SIZE = rb"(?:0|[1-9][0-9]{0,17})"
_ESCAPES = rb'\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
_PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"

# Possessive, so that no step back is remembered: a string may have a hundred million characters.
_OPENING = re.compile(rb"\{" + _S)
_COMMA_OR_END = re.compile(_S + rb"([,}])" + _S)
_OBJECT = re.compile(rb"\{" + _S + rb"(\}" + rb")?+")
_KEY = re.compile(rb'("(?:[^"\\\x00-\x1f]++|\\.)*+")' + _S + rb":" + _S)
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|' + _ESCAPES + rb"|\\u[0-9a-fA-F]{4}" + rb')*+"')
_UNICODE_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|' + _ESCAPES + rb"|" + _PAIR + rb')*+"')
_PLAIN_ENTRY = re.compile(
    rb'"([^"\\\x00-\x1f]{0,60000}+)(?<!__metadata__)"'
    + _S
    + rb":"
    + _S
    + rb"\{"
    + _S
    + rb'"dtype"'
    + _S
    + rb":"
    + _S
    + rb'"([A-Z0-9_]{1,20})"'
    + _S
    + rb","
    + _S
    + rb'"shape"'
    + _S
    + rb":"
    + _S
    + rb"\["
    + _S
    + rb"((?:"
    + _SIZE
    + _S
    + rb"(?:,"
    + _S
    + _SIZE
    + _S
    + rb"){0,64})?)\]"
    + _S
    + rb","
    + _S
    + rb'"data_offsets"'
    + _S
    + rb":"
    + _S
    + rb"\["
    + _S
    + rb"("
    + _SIZE
    + rb")"
    + _S
    + rb","
    + _S
    + rb"("
    + _SIZE
    + rb")"
    + _S
    + rb"\]"
    + _S
    + rb"\}"
)
"""A tensor as all known writers write it: a plain name, then dtype, shape and offsets."""
