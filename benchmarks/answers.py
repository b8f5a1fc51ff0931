"""Check that an answer is right, before its time counts.

The mean is taken in float64, independently of streamsoup, and rounded once to the dtype of the
answer. What counts is the distance to that in units in the last place (ulps): 0 everywhere for the
correctly rounded mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints import read_headers

__all__ = ["Answer", "check"]

_BLOCK = 1 << 18
_WORDS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


@dataclass(frozen=True, slots=True)
class Answer:
    """How far an answer is from the correctly rounded mean."""

    dtype: str
    share_wrong: float
    """Of all elements."""
    largest_ulps: int

    @property
    def right(self) -> bool:
        """Return True if it is right enough to compare: float32 sums pass, bfloat16 sums do not.

        A sum in float32 goes wrong in the last place of the result about once in ten thousand.
        """
        return self.share_wrong < 2e-3 and self.largest_ulps <= 1

    def row(self) -> dict[str, object]:
        """Return the numbers for a row."""
        return {**asdict(self), "right": self.right}


def check(output: Path, ingredients: Sequence[Path], known: Path | None = None) -> Answer:
    """Compare an output with the mean of the ingredients, element by element.

    `known` is an output that was found right everywhere: one of the same dtype is compared with
    it, which is faster, and the same.

    Raises `AssertionError` if it lacks a tensor, or has one of another shape.
    """
    found = read_headers(output)
    places = [read_headers(folder) for folder in ingredients]
    if known is not None:
        right = read_headers(known)
        if all(right[name][1] == dtype for name, (_, dtype, *_) in found.items()):
            places = [right]
    assert found.keys() == places[0].keys(), f"{output.name}: other tensors than the ingredients"
    work = []
    for name, (path, dtype, shape, begin, _) in found.items():
        assert shape == places[0][name][2], f"{output.name}: {name} has another shape"
        n = int(np.prod(shape))
        for start in range(0, n, _BLOCK):
            m = min(_BLOCK, n - start)
            sources = [(p[name][0], p[name][1], p[name][3]) for p in places]
            work.append((path, dtype, begin, sources, start, m))
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda block: _compare(*block), work))
    n_elements = sum(m for *_, m in work)
    dtypes = {dtype for _, dtype, *_ in found.values()}
    wrong = sum(wrong for wrong, _ in results)
    largest = max((largest for _, largest in results), default=0)
    return Answer("/".join(sorted(dtypes)), wrong / max(1, n_elements), largest)


def _compare(
    path: Path,
    dtype: str,
    begin: int,
    sources: Sequence[tuple[Path, str, int]],
    start: int,
    n: int,
) -> tuple[int, int]:
    total = np.zeros(n, np.float64)
    for source, kind, at in sources:
        total += _widen(_words(source, kind, at, start, n), kind)
    expected = _ordered(_narrow(total / len(sources), dtype), dtype)
    distance = np.abs(_ordered(_words(path, dtype, begin, start, n), dtype) - expected)
    return int(np.count_nonzero(distance)), int(distance.max(initial=0))


def _words(path: Path, dtype: str, begin: int, start: int, n: int) -> NDArray[np.unsignedinteger]:
    size = np.dtype(_WORDS[dtype]).itemsize
    return np.fromfile(path, _WORDS[dtype], n, offset=begin + start * size)


def _widen(words: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.floating]:
    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: NDArray[np.float64], dtype: str) -> NDArray[np.unsignedinteger]:
    """Round once. For bfloat16: to odd in float32 first, which leaves the second rounding right."""
    if dtype == "F32":
        return values.astype(np.float32).view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    # What was rounded away from zero goes back by one; what is inexact ends on an odd bit.
    bits -= (np.abs(wide) > np.abs(values)).astype(np.uint32)
    bits |= (wide != values).astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return rounded.astype(np.uint16)


def _ordered(words: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.int64]:
    """Number the values of a dtype in their order, so that neighbours differ by one."""
    top = 1 << (8 * np.dtype(_WORDS[dtype]).itemsize - 1)
    numbers = words.astype(np.int64)
    return np.where(numbers >= top, top - numbers, numbers)
