"""Which tensors have memory in common, to the byte: strides may lay them out in any way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["is_apart", "overlaps"]


def is_apart(tensor: Any) -> bool:
    """Return True if all elements of a tensor lie at places of their own."""
    reach = 0
    steps = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    for stride, n in steps if tensor.numel() else ():
        if stride <= reach:  # rows that begin within others may still miss their elements
            begin, end = _span(tensor)
            taken = np.zeros(end - begin, np.bool_)
            _places(taken, begin, tensor)[...] = True
            return bool(taken.sum() == tensor.numel() * tensor.element_size())
        reach += stride * (n - 1)
    return True


def overlaps(tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pair the names of tensors that have memory in common. Columns of one matrix have none.

    None may be empty. Holds a byte for each that tensors span which lie between one another.
    """
    spans = sorted((str(tensor.device), *_span(tensor), name) for name, tensor in tensors.items())
    found: list[tuple[str, str]] = []
    for run in _runs(spans):
        begin = run[0][1]
        taken = np.zeros(max(end for _, _, end, _ in run) - begin, np.bool_)
        for number, (*_, name) in enumerate(run):
            mine = _places(taken, begin, tensors[name])
            if mine.any():
                found.append((name, _met(tensors, [other for *_, other in run[:number]], name)))
            mine[...] = True
    return found


_Span = tuple[str, int, int, str]
"""Device, first byte, end and name."""


def _runs(spans: list[_Span]) -> list[list[_Span]]:
    """Group spans, in their order, that reach into one another; leave out those that are alone."""
    runs: list[list[_Span]] = []
    reach = ("", 0)
    for device, begin, end, name in spans:
        if (device, begin) >= reach:
            runs.append([])
        runs[-1].append((device, begin, end, name))
        reach = max(reach, (device, end))
    return [run for run in runs if len(run) > 1]


def _met(tensors: Mapping[str, Any], names: list[str], name: str) -> str:
    """Name the first of some tensors that another has memory in common with."""
    for other in names:
        spans = _span(tensors[other]), _span(tensors[name])
        begin = min(first for first, _ in spans)
        taken = np.zeros(max(end for _, end in spans) - begin, np.bool_)
        _places(taken, begin, tensors[other])[...] = True
        if _places(taken, begin, tensors[name]).any():
            return other
    raise AssertionError(name)


def _span(tensor: Any) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte, and of that after its last one."""
    last = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _places(memory: NDArray[np.bool_], begin: int, tensor: Any) -> NDArray[np.bool_]:
    """View those of the bytes from address `begin` on that a tensor's elements take."""
    size = tensor.element_size()
    return np.lib.stride_tricks.as_strided(
        memory[tensor.data_ptr() - begin :],
        (*tensor.shape, size),
        (*(stride * size for stride in tensor.stride()), 1),
    )
