"""Blocks of a running average: added to sums in float64, divided and rounded, as any soup is.

The compiled kernels of soups do it where they are ready or worth compiling, numpy does elsewhere,
and the bits are the same (`kernels.reference`). Blocks are shared out over threads, which run
without the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from streamsoup.engine.reduce import compiled
from streamsoup.kernels import tiers
from streamsoup.kernels.blocks import accumulate, array_of, floats_of
from streamsoup.kernels.blocks import finish as finish_in_numpy
from streamsoup.kernels.cpu import Mixer, PlainMixers, find_mixer, has_kernel, mixer, plain_mixers
from streamsoup.system.buffers import Bytes, address_of, buffer
from streamsoup.tensors import DType

__all__ = ["BLOCK", "Arithmetic", "blocks"]

BLOCK = 1 << 18
"""Elements that a thread works on at once."""

COMPILE_NBYTES = 50_000_000
"""Bytes of a model from which a kernel is compiled for it: some seconds, once on a machine, and
then a tenth of numpy's time at each update."""

T = TypeVar("T")


class Arithmetic:
    """Adds, divides and rounds blocks of elements; one object serves all threads."""

    def __init__(self, nbytes: Mapping[DType, int], threads: int) -> None:
        """Load kernels for dtypes of which there are so many bytes; compile those worth it."""
        self._threads = threads
        # −0, to which nothing is added: x + (−0) is x, −0 and +0 included.
        self._nothing = {dtype: _negative_zeros(dtype) for dtype in nbytes}
        self._kernels: dict[DType, Mixer] = {}
        tier = tiers.tier()
        for dtype, size in nbytes.items():
            makes: list[Callable[[], Mixer | PlainMixers]] = []
            if tier == "fast" and has_kernel(dtype):
                found = find_mixer(dtype, dtype)
                if found is not None:
                    self._kernels[dtype] = found
                    continue
                makes.append(partial(mixer, dtype, dtype))
            if tier != "numpy" and size >= COMPILE_NBYTES:
                made = compiled(*makes, plain_mixers)
                if isinstance(made, PlainMixers):
                    made = made.of([dtype], dtype)
                if made is not None:
                    self._kernels[dtype] = made

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> list[object]:
        """Call `work` with each item, in threads; return the results in order."""
        listed = list(items)
        if self._threads == 1 or len(listed) < 2:
            return [work(item) for item in listed]
        with ThreadPoolExecutor(min(self._threads, len(listed))) as pool:
            return list(pool.map(work, listed))

    def add(self, sums: Bytes, block: Bytes, dtype: DType, factor: float, *, fresh: bool) -> None:
        """Add a factor times a block of `dtype` to float64 sums; with `fresh`, begin them."""
        kernel = self._kernels.get(dtype)
        if kernel is None:
            accumulate(floats_of(sums), [array_of(block)], [dtype], [factor], fresh)
            return
        n = len(sums) // 8
        kernel(address_of(sums), [address_of(block)], [factor], fresh, 1.0, 0, n)

    def finish(self, sums: Bytes, divisor: float, dtype: DType, output: Bytes) -> bool:
        """Divide sums and round them into `output`; return True if a result is not finite.

        The sums are left as they are.
        """
        kernel, n = self._kernels.get(dtype), len(sums) // 8
        scratch = floats_of(sums).copy()
        if kernel is None:
            return finish_in_numpy(scratch, divisor, dtype, array_of(output))
        addresses, to = [address_of(self._nothing[dtype])], address_of(output)
        return kernel(scratch.ctypes.data, addresses, [1.0], False, divisor, to, n)

    def mix(
        self,
        inputs: Sequence[Bytes],
        factors: Sequence[float],
        divisor: float,
        dtype: DType,
        output: Bytes,
    ) -> bool:
        """Mix blocks of one dtype into `output`; return True if a result is not finite."""
        n = len(output) // dtype.itemsize
        sums = buffer(8 * n)
        # Each by itself: the plain kernel is made for one ingredient.
        for i, (block, factor) in enumerate(zip(inputs, factors, strict=True)):
            self.add(sums, block, dtype, factor, fresh=i == 0)
        return self.finish(sums, divisor, dtype, output)


def blocks(n: int) -> list[tuple[int, int]]:
    """Return the first element and the end of each block of `n` elements.

    >>> blocks(BLOCK + 1)
    [(0, 262144), (262144, 262145)]
    """
    return [(begin, min(begin + BLOCK, n)) for begin in range(0, n, BLOCK)]


def _negative_zeros(dtype: DType) -> Bytes:
    """Return a block of −0: the sign bit, little-endian, and nothing else."""
    return memoryview(bytearray((b"\0" * (dtype.itemsize - 1) + b"\x80") * BLOCK))
