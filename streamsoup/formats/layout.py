"""Which tensors an ingredient has, and in which of its files: its layout.

Fine-tunes of one model have the same headers, byte for byte. A `HeaderCache` keeps one parsed copy
of each, so that 64 ingredients of 200 shards take the memory of one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from streamsoup.errors import CorruptFileError, FormatError, UnsupportedDtypeError, printable
from streamsoup.formats.header import LARGEST, SURROGATE, Header, parse_header
from streamsoup.formats.listings import check_component
from streamsoup.formats.source import Source, SourceTensor
from streamsoup.tensors import DTYPES, DType, TensorSpec

__all__ = ["HeaderCache", "Layout", "name_in_file"]


class Layout(msgspec.Struct, frozen=True, eq=False):
    """Where each tensor of an ingredient lies; shared by the ingredients that agree on it."""

    headers: tuple[Header, ...]
    places: Mapping[str, tuple[int, TensorSpec]]
    """Name to file number and spec, in the order of the soup."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, in the dtypes they stand for."""
        return sum(spec.nbytes for _, spec in self.places.values())

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors together."""
        return sum(spec.n_elements for _, spec in self.places.values())


class HeaderCache(msgspec.Struct):
    """Parsed headers and layouts, kept once each while ingredients are opened."""

    parsed: dict[tuple[bytes, int], Header] = {}
    """By the digest of a header's text, which may be megabytes of metadata, and its file's size."""
    headers: dict[tuple[TensorSpec, ...], Header] = {}
    layouts: dict[tuple[int, ...], Layout] = {}
    """By the ids of its headers."""
    pickled: dict[Any, Any] = {}
    """What was read of pickles, by their digest: see `formats.pickled.saved`."""
    bases: dict[str, Any] = {}
    """The first adapter over each base: all others have to name the same base."""

    def header(self, text: bytes | bytearray, file_nbytes: int) -> Header:
        """Parse a header, unless the same bytes were parsed before.

        Those that differ in metadata or padding alone give the same header.
        """
        key = xxhash.xxh3_128_digest(text), file_nbytes
        if key not in self.parsed:
            self.parsed[key] = self._shared(parse_header(text, file_nbytes))
        return self.parsed[key]

    def layout(self, headers: Sequence[Header], names: Sequence[str], root: str) -> Layout:
        """Merge the headers of files called `names`, unless the same were merged before."""
        key = tuple(id(header) for header in headers)
        if key not in self.layouts:
            places: dict[str, tuple[int, TensorSpec]] = {}
            for number, header in enumerate(headers):
                for name, spec in header.tensors.items():
                    if name in places:
                        one, other = (printable(names[n]) for n in (places[name][0], number))
                        raise CorruptFileError(
                            f"{printable(root)}: tensor {printable(name)!r} is in two shards, "
                            f"{one} and {other}"
                        )
                    places[name] = (number, spec)
            self.layouts[key] = Layout(tuple(headers), places)
        return self.layouts[key]

    def layout_of(self, source: Source) -> Layout:
        """Lay out the tensors of any source. Raise `FormatError` for what no soup could hold."""
        file_names = source.file_names
        n_files = len(file_names)
        _check_files(source)
        files: list[dict[str, TensorSpec]] = [{} for _ in range(n_files)]
        order: dict[str, int] = {}
        ends = [0] * n_files
        for name, tensor in source.tensors.items():
            try:
                spec = _spec(name, tensor, ends, file_names)
            except FormatError as error:
                where = f"{printable(source.name)}: tensor {printable(repr(name))}"
                raise type(error)(f"{where} {error.text}") from None
            files[tensor.file][name] = spec
            order[name] = tensor.file
            ends[tensor.file] += spec.nbytes
        headers = tuple(self._shared(Header(tensors)) for tensors in files)
        if list(order.values()) == sorted(order.values()):
            return self.layout(headers, file_names, source.name)
        return Layout(headers, {name: (n, headers[n].tensors[name]) for name, n in order.items()})

    def _shared(self, header: Header) -> Header:
        return self.headers.setdefault(tuple(header.tensors.values()), header)


def name_in_file(tensor: str, file: str) -> str:
    """Return the name of a tensor in a file: in a folder's files, without that of the folder.

    >>> name_in_file("unet/conv_in.weight", "unet/model.safetensors"), name_in_file("w", "a")
    ('conv_in.weight', 'w')
    """
    folder = posixpath.dirname(file)
    return tensor.removeprefix(f"{folder}/") if folder else tensor


def _check_files(source: Source) -> None:
    """Raise `FormatError` for names that files of a soup cannot have, and for a missing index."""
    folders = [posixpath.dirname(name) for name in source.file_names]
    indexed = {posixpath.dirname(name) for name in source.index_names}
    for folder in dict.fromkeys(folders):
        n_files = folders.count(folder)
        if n_files > 1 and folder not in indexed:
            raise FormatError(
                f"{printable(source.name)}: has {n_files} file_names and no index_name"
            )
        try:
            check_component(folder)
        except FormatError as error:
            raise FormatError(f"{printable(source.name)}: has files in {error.text}") from None


def _spec(
    name: object, tensor: SourceTensor, ends: Sequence[int], file_names: Sequence[str]
) -> TensorSpec:
    """Check one tensor of a source. Raise `FormatError` saying what is wrong with it."""
    if not isinstance(name, str) or name == "__metadata__" or SURROGATE.search(name):
        raise FormatError("has a name that no file can hold")
    dtype, delivered = (_dtype(each) for each in (tensor.dtype, tensor.delivered or tensor.dtype))
    if delivered != dtype and not (dtype.averaged and delivered.averaged):
        raise FormatError(
            f"stands for {dtype.name} and is delivered as {delivered.name}; only floats may differ"
        )
    shape = tuple(tensor.shape)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"has the shape {printable(repr(shape), 60)}, not a list of sizes")
    if not 0 <= tensor.file < len(file_names):
        raise FormatError(f"is in file {tensor.file} of {len(file_names)}")
    folder = posixpath.dirname(file_names[tensor.file])
    if folder and not name.startswith(f"{folder}/"):
        raise FormatError(
            f"is in {printable(file_names[tensor.file])}, but not named after {folder!r}"
        )
    own = None if delivered == dtype else delivered
    spec = TensorSpec(name, dtype, shape, ends[tensor.file], own, tensor.significant)
    if spec.n_elements * dtype.nbits % 8 or spec.n_elements * dtype.nbits > LARGEST:
        raise FormatError(f"has the shape {list(shape)}, which does not fill whole bytes of a file")
    return spec


def _dtype(name: str) -> DType:
    if name not in DTYPES:
        raise UnsupportedDtypeError(
            f"has dtype {printable(repr(name), 40)}, which is none of {', '.join(DTYPES)}"
        )
    return DTYPES[name]
