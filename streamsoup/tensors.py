"""Tensors as headers describe them: name, dtype, shape and place in a file.

The one table of dtypes is here. Its names and widths are those of the safetensors format
(https://github.com/huggingface/safetensors, `Dtype` in `safetensors/src/tensor.rs`, 0.8).
"""

from __future__ import annotations

import math

import msgspec

from streamsoup.errors import RecipeError, option

__all__ = ["DTYPES", "TORCH_NAMES", "DType", "TensorSpec", "float_dtype"]


class DType(msgspec.Struct, frozen=True):
    """One row of the dtype table."""

    name: str
    """The safetensors name, such as ``BF16``."""
    nbits: int
    """Bits an element takes in a file; F4 and F6 are packed below a byte."""
    fraction: int | None = None
    """Stored fraction bits of a dtype that is averaged; None for one that is only copied."""
    bias: int = 0
    """Exponent bias of a dtype that is averaged."""
    largest: int = 0
    """The bit pattern of the largest finite value of a dtype that is averaged."""
    overflow: int = 0
    """The bit pattern to which larger values round: Inf, or NaN where there is no Inf (E4M3)."""
    nan: int = 0
    """The bit pattern that stands for every NaN in an output: quiet, positive, no payload."""

    @property
    def averaged(self) -> bool:
        """True if elements take part in arithmetic (others are copied when equal)."""
        return self.fraction is not None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a dtype that is averaged."""
        return self.nbits // 8


_FLOATS = (
    DType("F64", 64, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0x7FF8000000000000),
    DType("F32", 32, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000),
    DType("BF16", 16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
    DType("F16", 16, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
    DType("F8_E4M3", 8, 3, 7, 0x7E, 0x7F, 0x7F),
    DType("F8_E5M2", 8, 2, 15, 0x7B, 0x7C, 0x7E),
)
_COPIED = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _FLOATS} | {
    name: DType(name, nbits) for name, nbits in _COPIED.items()
}

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}
"""What torch calls the dtypes that it and safetensors share."""

_SPELLINGS = {spelling: name for name, spelling in TORCH_NAMES.items()} | {
    "double": "F64",
    "float": "F32",
    "half": "F16",
    "fp64": "F64",
    "fp32": "F32",
    "fp16": "F16",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}


def float_dtype(given: object) -> DType:
    """Return the dtype to average in, by its safetensors, torch or common name.

    Args:
        given: A name, or a dtype of torch.

    Raises:
        RecipeError: Not a dtype that streamsoup averages.

    >>> float_dtype("bfloat16").name
    'BF16'
    """
    name = str(given)  # a dtype of torch becomes 'torch.float32'
    key = _SPELLINGS.get(name.lower().removeprefix("torch."), name.upper())
    dtype = DTYPES.get(key)
    if dtype is None or not dtype.averaged:
        known = ", ".join(d.name.lower() for d in _FLOATS)
        raise RecipeError(f"{option('dtype')} {name!r} cannot be averaged in; use one of {known}")
    return dtype


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor as its header describes it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte, from the end of the header."""
    delivered: DType | None = None
    """Dtype in which its source delivers it, if that differs from `dtype` (`formats.source`)."""
    significant: int = 53
    """Bits that a delivered float64 needs at most."""

    @property
    def comes_as(self) -> DType:
        """Dtype of the bytes that are read: `delivered`, or else `dtype`."""
        return self.delivered or self.dtype

    @property
    def n_elements(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.n_elements * self.dtype.nbits // 8
