"""Where the tensors of a pickle lie in its file, after every number was checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from streamsoup.errors import CorruptFileError, FormatError, UnsupportedDtypeError
from streamsoup.formats.pickled.checksums import Checked
from streamsoup.formats.pickled.descriptions import Tensor
from streamsoup.formats.pickled.strided import Chunk, is_in_order
from streamsoup.formats.source import SourceTensor
from streamsoup.tensors import DTYPES

__all__ = ["Place", "element_nbytes", "place", "whole"]


class Place(msgspec.Struct, frozen=True):
    """A tensor, and the chunks of files that it is made of."""

    tensor: SourceTensor
    unit: int
    """Bytes that are read as one: an element, or a byte of what is not averaged."""
    shape: tuple[int, ...]
    """In units."""
    chunks: tuple[Chunk, ...]
    is_plain: bool
    """True if it is a range of one file, its elements in order and aligned."""

    @property
    def lies_at(self) -> tuple[int, int]:
        """Number of its first file, and the offset of its first element there: to sort by."""
        return (self.chunks[0].file, self.chunks[0].begin) if self.chunks else (0, 0)


def element_nbytes(dtype: str) -> int:
    """Return the bytes of an element of torch's; two of F4 are one. Raise for unknown dtypes."""
    if dtype not in DTYPES:
        raise UnsupportedDtypeError(f"has dtype {dtype}, which safetensors does not have")
    return max(1, DTYPES[dtype].nbits // 8)


def place(tensor: Tensor, member_of: Callable[[str, int], tuple[int, Checked]]) -> Place:
    """Return where a tensor of one file lies.

    Args:
        tensor: As the pickle describes it.
        member_of: Finds the member of a storage by its key and its bytes: number and member.

    Raises:
        CorruptFileError: It lies beyond its storage.
        FormatError: It is not a plain dense tensor of a dtype that safetensors has.
    """
    if tensor.storage is None or tensor.strange:
        raise FormatError(f"{tensor.strange}; only plain dense tensors are read")
    size = element_nbytes(tensor.dtype)
    storage = tensor.storage
    nbytes = storage.n_elements * element_nbytes(storage.dtype)
    n_elements = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if n_elements and (last + 1) * size > nbytes:
        raise CorruptFileError(
            f"reaches to byte {(last + 1) * size} of its storage, which has {nbytes}"
        )
    number, member = member_of(storage.key, nbytes)
    begin = member.begin + tensor.offset * size if n_elements else member.begin
    strides = tuple(stride * size for stride in tensor.strides)
    whole_begin = (0,) * len(tensor.shape)
    chunk = Chunk(whole_begin, tensor.shape, member.file, begin, strides, number, member.begin)
    return whole(tensor.dtype, tensor.shape, (chunk,), member.file)


def whole(dtype: str, shape: tuple[int, ...], chunks: tuple[Chunk, ...], file: int) -> Place:
    """Return the place of a tensor made of chunks, whose strides are in bytes of whole elements.

    Args:
        dtype: The safetensors name of its dtype.
        shape: In elements of torch's.
        chunks: What it is made of.
        file: Which of the files of a soup it belongs to.
    """
    size = element_nbytes(dtype)
    told = shape
    if dtype == "F4":
        if not shape:
            raise FormatError("has dtype F4 and no dimensions, so it cannot be two elements a byte")
        told = (*shape[:-1], 2 * shape[-1])
    unit = size if DTYPES[dtype].averaged else 1
    if size > unit:
        shape = (*shape, size)
        chunks = tuple(
            msgspec.structs.replace(
                chunk,
                starts=(*chunk.starts, 0),
                sizes=(*chunk.sizes, size),
                strides=(*chunk.strides, 1),
            )
            for chunk in chunks
        )
    is_plain = len(chunks) == 1 and chunks[0].sizes == shape and chunks[0].begin % unit == 0
    is_plain = is_plain and is_in_order(shape, chunks[0].strides, unit)
    tensor = SourceTensor(dtype, told, None, file)
    return Place(tensor, unit, shape, chunks, is_plain or not math.prod(shape))
