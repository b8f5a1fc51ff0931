"""The header of one safetensors file, read strictly.

A file starts with the header's length (8 bytes, little-endian), then that many bytes of JSON,
then the tensors. Everything in it is checked before it is believed, since a checkpoint may come
from anywhere: lengths before they are allocated, numbers before they are used as offsets, and the
offsets against each other, so that every byte of the file belongs to exactly one tensor.

The rules are those of the format (https://github.com/huggingface/safetensors#format), read in
their strictest sense; where its own reader is more lenient (floats as offsets), we refuse.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, UnsupportedDtypeError, printable
from streamsoup.tensors import DTYPES, TensorSpec

__all__ = [
    "HEADER_LIMIT",
    "SURROGATE",
    "Header",
    "header_nbytes",
    "make_header",
    "parse_header",
    "recognise",
]

HEADER_LIMIT = 100_000_000
"""The largest header in bytes, as in the reference reader; ours and theirs refuse more."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""What no UTF-8 text holds: half of a pair, from an escape or from a path."""

_LARGEST = 2**63 - 1
"""The largest size or offset: file offsets are signed 64-bit numbers."""


class Header(msgspec.Struct, frozen=True):
    """What one file holds."""

    tensors: dict[str, TensorSpec]
    """By name, in the order in which they lie in the file."""


def header_nbytes(prefix: bytes, file_nbytes: int) -> int:
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


def parse_header(text: bytes, file_nbytes: int) -> Header:
    """Check the JSON of a header, and give the tensors it describes, in file order.

    Raises `CorruptFileError` and `UnsupportedDtypeError`, saying what is wrong but not in which
    file, which the caller knows. Costs time and memory in proportion to the header, at most.
    """
    if not text.startswith(b"{"):
        raise CorruptFileError("has a header that does not start with '{'")
    entries = _load_json(text)
    _check_metadata(entries.pop("__metadata__", {}))
    specs = [_check_tensor(name, entry) for name, entry in entries.items()]
    # Zero-size tensors share their offset with a neighbour: they sort before it.
    specs.sort(key=lambda spec: (spec.begin, spec.nbytes))
    end = 0
    for spec in specs:
        if spec.begin != end:
            what = "overlaps the one before it" if spec.begin < end else "leaves a hole before it"
            raise CorruptFileError(
                f"tensor {printable(spec.name)!r} {what}: it begins at byte {spec.begin} of the "
                f"data, expected {end}"
            )
        end += spec.nbytes
    end += 8 + len(text)
    if end != file_nbytes:
        what = "is truncated" if end > file_nbytes else "has bytes after its last tensor"
        raise CorruptFileError(f"{what}: its tensors end at byte {end}, the file at {file_nbytes}")
    return Header({spec.name: spec for spec in specs})


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


def recognise(prefix: bytes) -> str | None:
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


def _load_json(text: bytes) -> dict[str, Any]:
    """Decode JSON with no duplicate keys, no floats and nothing that Python alone accepts."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_no_float,
            parse_constant=_no_float,
            parse_int=_plain_integer,
        )
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"has a header that is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise CorruptFileError("has a header nested too deep") from None
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"has a header that is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError("has a header that is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CorruptFileError(f"has the key {printable(twice)!r} twice in its header")
    return result


def _no_float(text: str) -> Any:
    raise CorruptFileError(f"has {printable(text, 40)} in its header, where only integers may be")


def _plain_integer(text: str) -> int:
    """Read a JSON integer from 0 to 2⁶³-1; anything else can be no size and no offset."""
    if text.startswith("-") or len(text) > 19 or int(text) > _LARGEST:
        raise CorruptFileError(
            f"has {printable(text, 40)} in its header, which can be no size and no offset"
        )
    return int(text)


def _check_name(name: str) -> None:
    """Refuse lone surrogates: such a text can be written in no header."""
    if SURROGATE.search(name):
        raise CorruptFileError(f"has {printable(name)!r} in its header, which is not Unicode")


def _check_metadata(metadata: Any) -> None:
    """Check what nothing here uses: whoever writes it may do so by the megabyte."""
    if not isinstance(metadata, dict):
        raise CorruptFileError("has a __metadata__ that is not a JSON object")
    for key, value in metadata.items():
        _check_name(key)
        if not isinstance(value, str):
            raise CorruptFileError(
                f"has the __metadata__ {printable(key)!r}, which is not a string"
            )
        _check_name(value)


def _check_tensor(name: str, entry: Any) -> TensorSpec:
    _check_name(name)
    where = f"tensor {printable(name)!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{where} must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str):
        raise CorruptFileError(f"{where} has a dtype that is not a string")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedDtypeError(
            f"{where} has dtype {printable(entry['dtype'], 40)!r}, "
            f"which is none of {', '.join(DTYPES)}; save it in one of those, or leave it out"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise CorruptFileError(f"{where} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{where} has data_offsets that are not two offsets")
    nbits = dtype.nbits
    for size in shape:
        nbits *= size
        # Checked at each step, as a reader in 64-bit arithmetic would overflow there.
        if nbits > _LARGEST:
            raise CorruptFileError(f"{where} has a shape too large for any file")
    if nbits % 8:
        raise CorruptFileError(f"{where} does not fill whole bytes")
    begin, end = offsets
    if end - begin != nbits // 8:
        raise CorruptFileError(
            f"{where} has {end - begin} bytes of data, but its shape and dtype take {nbits // 8}"
        )
    return TensorSpec(name, dtype, tuple(shape), begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
