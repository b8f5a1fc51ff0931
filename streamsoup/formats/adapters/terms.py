"""What an adapter adds to which tensor of its base, found by names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from streamsoup.errors import MismatchError, printable
from streamsoup.formats.adapters.adapter import Adapter, Pair
from streamsoup.formats.source import Source, SourceTensor
from streamsoup.tensors import DTYPES

__all__ = ["Side", "Term", "terms_of", "whole_of"]


class Side(msgspec.Struct, frozen=True):
    """A factor in its file: element (outer, k) is at ``outer · step + k · step_k``."""

    tensor: str
    step: int
    step_k: int


class Term(msgspec.Struct, frozen=True):
    """The product s·L·R that is added to a tensor, seen as a matrix of some columns."""

    adapter: int
    """The number of its adapter."""
    left: Side | None
    """L; None for a single row of ones, which stands before a bias."""
    right: Side
    columns: int
    rank: int
    scale: float


def terms_of(number: int, adapter: Adapter, base: Source) -> dict[str, Term]:
    """Return what an adapter adds to each tensor of a base that it changes.

    Raises `MismatchError` for a module that the base does not have, or whose shape does not fit.
    """
    tensors = base.tensors
    added, removed = _prefix(adapter, base)
    found: dict[str, Term] = {}
    for turned, (pair, name) in _turns(adapter, base, added, removed):
        tensor = tensors[name]
        rows, columns = _matrix(tensor.shape, turned)
        a, b = Side(pair.a, 1, columns), Side(pair.b, pair.rank, 1)
        if turned:  # W is the transpose of B·A: its rows are the columns of A
            a, b = Side(pair.b, pair.rank, 1), Side(pair.a, 1, rows)
        found[name] = Term(number, b, a, columns, pair.rank, pair.scale)
        if pair.bias is not None:
            bias = f"{name.removesuffix('weight')}bias"
            spec = adapter.spec(pair.bias)
            if bias not in tensors or tensors[bias].shape != spec.shape:
                raise MismatchError(
                    f"{adapter.stored.where(pair.bias)}: {base.where(name)} has no bias of the "
                    f"shape {list(spec.shape)} to add it to; this adapter belongs to another base"
                )
            _check_float(bias, tensors[bias], base)
            found[bias] = Term(
                number, None, Side(pair.bias, 1, 1), math.prod(spec.shape), 1, pair.scale
            )
    return found


def whole_of(adapter: Adapter, base: Source) -> dict[str, str]:
    """Return the tensors that an adapter replaces or adds: name in the base, name in the adapter.

    Raises `MismatchError` for one that is not of ``modules_to_save`` and that the base lacks, or
    has in another shape.
    """
    added, removed = _prefix(adapter, base)
    found: dict[str, str] = {}
    for name, own in adapter.whole.items():
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        target = added + plain.removeprefix(removed)
        spec = adapter.spec(own)
        there = base.tensors.get(target)
        module = f".{plain}".rpartition(".")[0]
        saved = any(f"{module}.".find(f".{each}.") >= 0 for each in adapter.config.modules_to_save)
        if there is None and not saved:
            raise MismatchError(
                f"{adapter.stored.where(own)}: the base {printable(base.name)} has no "
                f"{printable(target)}; this adapter belongs to another base"
            )
        if there is not None and there.shape != spec.shape:
            raise MismatchError(
                f"{adapter.stored.where(own)}: has the shape {list(spec.shape)}, and the base "
                f"{list(there.shape)} ({base.where(target)}); resize the base as it was when the "
                "adapter was trained"
            )
        found[plain if there is None else target] = own
    return found


def _turns(
    adapter: Adapter, base: Source, added: str, removed: str
) -> list[tuple[bool, tuple[Pair, str]]]:
    """Pair the factors with the weights of the base, and tell which lie transposed."""
    flag = adapter.config.fan_in_fan_out
    found: list[tuple[bool, tuple[Pair, str]]] = []
    contradicted, square = "", ""
    for pair in adapter.pairs.values():
        name = f"{added}{pair.module.removeprefix(removed)}.weight"
        if name not in base.tensors:
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: the base {printable(base.name)} has no "
                f"{printable(name)}; this adapter belongs to another base"
            )
        tensor = base.tensors[name]
        _check_float(name, tensor, base)
        wanted = True if pair.embedding else flag
        turned = next(
            (way for way in (wanted, not wanted) if _fits(pair, adapter, tensor, way)), None
        )
        if turned is None or (pair.embedding and not turned):
            shapes = [list(adapter.spec(each).shape) for each in (pair.a, pair.b)]
            raise MismatchError(
                f"{adapter.stored.where(pair.a)}: factors of the shapes {shapes[0]} and "
                f"{shapes[1]} do not fit {base.where(name)}, which has {list(tensor.shape)}; this "
                "adapter belongs to another base"
            )
        if not pair.embedding:
            both = _fits(pair, adapter, tensor, not turned)
            square = pair.a if both else square
            contradicted = pair.a if turned != flag else contradicted
        found.append((turned, (pair, name)))
    if contradicted and square:
        raise MismatchError(
            f"{adapter.stored.where(square)}: fan_in_fan_out cannot be told, as "
            f"{printable(contradicted)} contradicts {printable(adapter.config.path)}, and this "
            "module is square; set fan_in_fan_out there as it was when the adapter was trained"
        )
    return found


def _fits(pair: Pair, adapter: Adapter, tensor: SourceTensor, turned: bool) -> bool:
    """Return True if the product of two factors, or its transpose, has the shape of a tensor."""
    a, b = adapter.spec(pair.a).shape, adapter.spec(pair.b).shape
    if turned:
        return len(a) == len(b) == 2 and tensor.shape == (a[1], b[0])
    return tensor.shape == (b[0], *a[1:]) and math.prod(b[2:]) == 1


def _matrix(shape: Sequence[int], turned: bool) -> tuple[int, int]:
    """Return rows and columns of a tensor: all sizes but the first are columns."""
    return shape[0], math.prod(shape[1:])


def _check_float(name: str, tensor: SourceTensor, base: Source) -> None:
    if not DTYPES[tensor.delivered or tensor.dtype].averaged:
        raise MismatchError(
            f"{base.where(name)}: is {tensor.dtype}, and an adapter is added to floats only; "
            "dequantise the base first, or use the one it was quantised from"
        )


def _prefix(adapter: Adapter, base: Source) -> tuple[str, str]:
    """Return what has to be put before, and taken from, the names of modules to be the base's.

    A base may be stored with the prefix of its model (``model.``, ``transformer.``) where the
    adapter has none, or without: one prefix for all modules.
    """
    modules = [f"{module}.weight" for module in adapter.pairs] or [*adapter.whole]
    tensors: Mapping[str, SourceTensor] = base.tensors
    if all(name in tensors for name in modules):
        return "", ""
    first = modules[0]
    parts = first.split(".")
    for n in range(1, len(parts) - 1):
        prefix = ".".join(parts[:n]) + "."
        if all(name.startswith(prefix) and name[len(prefix) :] in tensors for name in modules):
            return "", prefix
    ends = [name[: -len(first)] for name in tensors if name.endswith(f".{first}")]
    for prefix in ends[:8]:
        if all(prefix + name in tensors for name in modules):
            return prefix, ""
    return "", ""
