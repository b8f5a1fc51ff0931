"""Which tensors are codes, and which scales are theirs: told by dtype, name, shape and config.

==================  =========================================  ================================
layout              codes                                      scales
==================  =========================================  ================================
blocks of fp8       ``X`` F8_E4M3                              ``X_scale_inv`` by 128 × 128
fp8                 ``X`` F8_E4M3 or F8_E5M2                   ``X_scale`` of all, of each row,
                                                               of groups, or of blocks; beside
                                                               ``M.weight`` also ``M.scale``
                                                               and ``M.qscale_weight``
mxfp8               ``X`` F8_E4M3 or F8_E5M2                   ``X_scale`` E8M0 by 32
mxfp4 (gpt-oss)     ``X_blocks`` U8                            ``X_scales`` E8M0 by 32
mxfp4               ``X_packed`` or ``X`` U8                   ``X_scale`` E8M0 by 32
nvfp4 (ModelOpt)    ``X`` U8                                   ``X_scale`` F8_E4M3 by 16, times
                                                               ``X_scale_2`` F32
nvfp4 (compressed)  ``X_packed`` U8                            ``X_scale`` F8_E4M3 by 16, over
                                                               ``X_global_scale`` F32
==================  =========================================  ================================

E8M0 is stored as F8_E8M0, or as U8. Scales of activations and of the cache of keys and values act
at run time alone, and are left out. Whatever else belongs to a code (zero points, permutations,
scales of its inputs that were folded in) would be lost, and is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from streamsoup.errors import FormatError, printable, some
from streamsoup.formats.source import SourceTensor
from streamsoup.kernels.coding import Coding

__all__ = ["Weight", "Weights", "find_weights"]

_FP8 = ("F8_E4M3", "F8_E5M2")
_POWERS = ("U8", "F8_E8M0")
_FLOATS = ("F32", "BF16", "F16")

_AT_RUN_TIME = re.compile(
    r"(^|\.)((in|out)put|act|activation|[kvq]|kv|kv_cache|softmax|prob)_(global_)?scale(_inv|_2)?$"
    r"|\.qscale_act$"
)
"""Scales of activations and of cached keys and values, which no weight is multiplied by."""

_OF_CODES = re.compile(
    r"(_scale_inv|_scale_2|_global_scale|_zero_point|weight_scale|weight_scale_2|weight_g_idx"
    r"|pre_quant_scale|weight_shape|\.absmax|\.quant_state\..*|\.SCB|\.qweight|\.qzeros)$"
)
"""Names of what belongs to codes and to nothing else, so that none may be left over."""

Where = Callable[[str], str]


class Weight(msgspec.Struct, frozen=True):
    """A tensor that is stored as codes with scales."""

    shape: tuple[int, ...]
    """As it is delivered."""
    codes: str
    """The name of the tensor that holds its codes."""
    scales: str
    """The name of that which holds its scales, row by row."""
    scale_dtype: str
    coding: Coding
    second: str | None = None
    """The name of a scale of all; None without one."""
    divides: bool = False
    """True if the second scale divides rather than multiplies."""
    transposed: bool = False
    """True if each matrix is delivered transposed."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the stored tensors that it is made of."""
        return (self.codes, self.scales, *(() if self.second is None else (self.second,)))


class Weights(msgspec.Struct, frozen=True):
    """What was found in a checkpoint."""

    by_name: dict[str, Weight]
    """The weights by the names that they are delivered under."""
    left_out: tuple[str, ...]
    """Scales that act at run time alone."""


def find_weights(
    tensors: Mapping[str, SourceTensor], told: Mapping[str, Any], where: Where
) -> Weights:
    """Find the quantised weights among tensors, and check that all that belongs to them fits.

    Args:
        tensors: All tensors of a checkpoint.
        told: What its configuration says of quantisation; empty if it says nothing.
        where: Returns where a tensor is, for messages.

    Raises:
        FormatError: Names the first tensor that contradicts its siblings or the configuration, or
            that belongs to codes in an unknown way.

    Looks at each tensor some times; reads nothing.
    """
    found: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        layout = _layout(name, tensor, tensors)
        if layout is None:
            continue
        whole, kind, scales, second = layout
        if whole in found or (whole != name and whole in tensors):
            raise FormatError(
                f"{where(name)}: stands for {printable(whole)}, which is stored as well; remove one"
            )
        fault, made = _weight(name, kind, scales, second, tensors, _block_told(told))
        if made is None:
            raise FormatError(f"{where(name)}: {fault}; download or quantise it again")
        found[whole] = made
    used = {part for weight in found.values() for part in weight.parts}
    left_out = () if not found else tuple(filter(_AT_RUN_TIME.search, tensors.keys() - used))
    rest = [name for name in tensors if name not in used and name not in left_out]
    for fault in _left_over(found, rest, tensors, where) if found else ():
        raise FormatError(fault)
    return Weights(found, tuple(sorted(left_out)))


def _layout(
    name: str, tensor: SourceTensor, tensors: Mapping[str, SourceTensor]
) -> tuple[str, Literal["F8_E4M3", "F8_E5M2", "E2M1", "blocks"], str, str | None] | None:
    """Return the whole name of a code, its kind, and the names of its scales; None for no code."""
    if tensor.dtype == "F8_E4M3" or tensor.dtype == "F8_E5M2":
        module = name.removesuffix("weight") if name.endswith(".weight") else name
        own = (f"{name}_scale_inv", f"{name}_scale")
        for scales in (*own, f"{module}scale", f"{module}qscale_weight"):
            if scales in tensors:
                kind: Literal["F8_E4M3", "F8_E5M2"]
                kind = "F8_E4M3" if tensor.dtype == "F8_E4M3" else "F8_E5M2"
                return name, kind, scales, None
        return None
    if tensor.dtype != "U8":
        return None
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        whole = name.removesuffix("_blocks")
        return whole, "blocks", f"{whole}_scales", None
    whole = name.removesuffix("_packed")
    scales = f"{whole}_scale"
    if scales not in tensors or tensors[scales].dtype not in ("F8_E4M3", *_POWERS):
        return None
    if tensors[scales].dtype != "F8_E4M3":
        return whole, "E2M1", scales, None
    return whole, "E2M1", scales, f"{whole}_global_scale" if whole != name else f"{whole}_scale_2"


def _weight(
    codes: str,
    kind: str,
    scales: str,
    second: str | None,
    tensors: Mapping[str, SourceTensor],
    block_told: tuple[int, int] | None,
) -> tuple[str, Weight | None]:
    """Return a weight; or what is wrong with it, and None."""
    shape, scale = tensors[codes].shape, tensors[scales]
    if second is not None and second not in tensors:
        return f"lacks its second scale, {printable(second)}", None
    if second is not None:
        last = tensors[second]
        if last.dtype != "F32" or math.prod(last.shape) != 1:
            return (
                f"has the second scale {printable(second)} of {last.dtype} {list(last.shape)}, "
                "expected one F32"
            ), None
    if not math.prod(shape):
        return "has no elements", None
    if any(tensors[name].delivered for name in (codes, scales)):
        return "is delivered in another dtype than it is stored in", None
    if kind == "blocks":
        return _mxfp4_blocks(codes, shape, scales, scale)
    if kind == "E2M1":
        by = 32 if second is None else 16
        shape = (*shape[:-1], 2 * shape[-1]) if shape else ()
        expected = (*shape[:-1], shape[-1] // by) if shape else ()
        if not shape or shape[-1] % by or scale.shape != expected:
            return _misfit(scales, scale, [list(expected)] if shape else []), None
        coding = Coding("E2M1", math.prod(shape[:-1]), shape[-1], (1, by))
        divides = second is not None and second.endswith("_global_scale")
        return "", Weight(shape, codes, scales, scale.dtype, coding, second, divides)
    if scale.dtype not in (*_POWERS, *_FLOATS):
        return f"has scales {printable(scales)} of {scale.dtype}, which are not known", None
    fitting = dict(_fitting(shape, scale.dtype, scales, block_told))
    n_rows, n_columns = fitting.get(scale.shape, ((0, 0), 0, 0))[1:]
    if not n_rows:
        return _misfit(scales, scale, [list(each) for each in fitting]), None
    block = fitting[scale.shape][0]
    exact: Literal["F8_E4M3", "F8_E5M2"] = "F8_E4M3" if kind == "F8_E4M3" else "F8_E5M2"
    return "", Weight(shape, codes, scales, scale.dtype, Coding(exact, n_rows, n_columns, block))


def _fitting(
    shape: tuple[int, ...], scale_dtype: str, scales: str, told: tuple[int, int] | None
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, int], int, int]]]:
    """Yield the shapes that scales may have: block, rows and columns of a matrix, for each.

    Of two that are the same, the later counts, which gives each element the same scale.
    """
    lead, (rows, columns) = shape[:-2], ((1, 1, *shape)[-2:])
    n_rows = math.prod(shape[:-1]) or 1
    by_32 = ((*shape[:-1], columns // 32), ((1, 32), n_rows, columns))
    if scale_dtype in _POWERS:
        if shape and columns % 32 == 0 and not scales.endswith("_scale_inv"):
            yield by_32
        for block in {(128, 128), told or (128, 128)} if len(shape) > 1 else ():
            yield _grid(lead, rows, columns, block)
        return
    is_told = told is not None and len(shape) > 1 and scales.endswith("_scale_inv")
    if is_told and told is not None:
        yield _grid(lead, rows, columns, told)
        return
    if len(shape) > 1:
        groups = [n for n in (16, 32, 64, 128, 256, 512) if columns % n == 0 and n < columns]
        yield from (
            ((*shape[:-1], columns // n), ((1, n), n_rows, columns)) for n in reversed(groups)
        )
        for block in ((128, 128), *([told] if told is not None else [])):
            yield _grid(lead, rows, columns, block)
        yield (*lead, rows), ((1, columns), n_rows, columns)
        yield (*lead, rows, 1), ((1, columns), n_rows, columns)
    if lead:
        for tail in ((), (1,), (1, 1)):
            yield (*lead, *tail), ((rows, columns), rows, columns)
    for one in ((), (1,), (1, 1)):
        yield one, ((n_rows, columns), n_rows, columns)


def _grid(
    lead: tuple[int, ...], rows: int, columns: int, block: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], int, int]]:
    """Return the shape of the scales of blocks, and what they say."""
    shape = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    return shape, (block, rows, columns)


def _mxfp4_blocks(
    codes: str, shape: tuple[int, ...], scales: str, scale: SourceTensor
) -> tuple[str, Weight | None]:
    """Return a weight as gpt-oss stores it, 16 bytes for each of its blocks of a row."""
    if len(shape) < 3 or shape[-1] != 16 or scale.dtype not in _POWERS or scale.shape != shape[:-1]:
        return _misfit(scales, scale, [list(shape[:-1])]), None
    *lead, rows, n_blocks, _ = shape
    coding = Coding("E2M1", rows, 32 * n_blocks, (1, 32))
    delivered = (*lead, 32 * n_blocks, rows)
    return "", Weight(delivered, codes, scales, scale.dtype, coding, transposed=True)


def _misfit(scales: str, scale: SourceTensor, expected: list[list[int]]) -> str:
    wanted = f", expected {' or '.join(dict.fromkeys(map(str, expected)))}" if expected else ""
    return f"has scales {printable(scales)} of {scale.dtype} {list(scale.shape)}{wanted}"


def _block_told(told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block that a configuration names for its weights, if it is one."""
    size = told.get("weight_block_size")
    groups = told.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if size is None and isinstance(weights, Mapping):
            size = weights.get("block_structure")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    rows, columns = size
    if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
        return rows, columns
    return None


def _left_over(
    found: Mapping[str, Weight], rest: list[str], tensors: Mapping[str, SourceTensor], where: Where
) -> Iterator[str]:
    """Yield what is wrong with tensors that are part of no weight found."""
    lone = [name for name in rest if tensors[name].dtype in _FP8]
    if lone:
        yield (
            f"{where(lone[0])}: is {tensors[lone[0]].dtype} and has no scale beside it, unlike "
            f"other tensors here{_more(lone)}; download or quantise it again"
        )
    strange = [name for name in rest if _OF_CODES.search(name) or _is_beside(name, found)]
    if strange:
        yield (
            f"{where(strange[0])}: belongs to quantised weights in a way that is not known"
            f"{_more(strange)}; use the checkpoint that it was quantised from"
        )


def _is_beside(name: str, found: Mapping[str, Weight]) -> bool:
    """Return True if a name is that of a weight with more words of its own, but a bias."""
    stem, _, words = name.rpartition(".")
    at = len(stem) + 1
    ends = [at + i for i, letter in enumerate(words) if letter == "_"]
    return "bias" not in words and any(name[:end] in found for end in ends)


def _more(names: list[str]) -> str:
    return f", and so are {some(names[1:], 2)}" if len(names) > 1 else ""
