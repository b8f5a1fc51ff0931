"""The compiled loops over all ingredients of a block: from the cache, or compiled once per machine.

`objects` keeps and loads them; `loops` is what is compiled, and numba is imported only then.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from streamsoup.kernels import objects, processor
from streamsoup.kernels.leaf_digests import SECRET
from streamsoup.kernels.linking import Kernel
from streamsoup.system.buffers import address_of, buffer
from streamsoup.tensors import DType

__all__ = ["AT_ONCE", "BLOCK", "SCRATCH", "Mixer", "find_mixer", "has_kernel", "mixer"]

BLOCK = 256
"""Elements at a time. Small: every ingredient's stream moves on often enough for the processor to
see it coming, and what many of them hold at the same place of a page still fits the first cache."""

AT_ONCE = 8
"""Ingredients at a time: more streams than this no processor foresees. Their sums wait in the first
cache for the next ones, and what those will read is asked for a block ahead."""

SCRATCH = 3 * BLOCK
"""Numbers of float64 that a kernel may use as it likes. After them is what xxh3 calls a secret."""

_ROOMS = (
    *("bits.py", "cpu.py", "flags.py", "leaf_digests.py", "loops.py", "means.py", "sums.py"),
    *("vectors.py", "xxh3.py"),
)
"""What the kernels are compiled from."""


class Mixer:
    """A compiled kernel, to be called by many threads at once. It runs without the GIL."""

    def __init__(self, kernel: Kernel) -> None:
        """Wrap a kernel, which lives as long as this does."""
        parameters = [ctypes.c_int64] * 6 + [ctypes.c_double] + [ctypes.c_int64] * 4
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, *parameters)(kernel.address)
        self._kernel = kernel
        self._own = threading.local()

    def __call__(
        self,
        sums: int,
        addresses: Sequence[int],
        factors: Sequence[float],
        fresh: bool,
        divisor: float,
        output: int,
        n: int,
        digests: int = 0,
        leaf: int = 0,
    ) -> bool:
        """Mix blocks of `n` elements, and say whether a result is not finite.

        `sums` is the address of ``(n,) float64``, or 0 to keep sums within the call, which then
        has to be both fresh and finished. `addresses` ``(ingredient,)`` are of the blocks,
        `factors` ``(ingredient,)`` theirs. With `fresh` the sums start anew. `output` is the
        address of the result, or 0 to leave the sums unfinished for a later call. `digests` is the
        address (`LeafDigests.address`) of the state of the first of these ingredients, or 0; `leaf`
        the elements of the leaf that this block ends, or 0: then `n` is a multiple of `STRIDE`. A
        leaf has `LEAST_NBYTES` and its last block `STRIPE` bytes or more, in the result as well.
        Reads and writes raw memory: the caller keeps the blocks alive, and of the size it says.
        """
        if not hasattr(self._own, "scratch"):
            self._own.scratch = buffer(8 * SCRATCH + len(SECRET))
            self._own.scratch[8 * SCRATCH :] = SECRET
        k = len(addresses)
        table = (ctypes.c_int64 * (k + 1))(*addresses, output)
        multipliers = (ctypes.c_double * k)(*factors)
        spoiled = self._call(
            sums,
            ctypes.addressof(table),
            ctypes.addressof(multipliers),
            address_of(self._own.scratch),
            k,
            fresh,
            divisor,
            output,
            n,
            digests,
            leaf,
        )
        return bool(spoiled)


def has_kernel(source: DType) -> bool:
    """Whether this processor can do it: small floats are widened by an instruction of 2012.

    Nor can it where numba was told to compile for any processor, old ones too.
    """
    small = source.name in ("F16", "F8_E4M3", "F8_E5M2")
    if not (small and processor.is_x86()):
        return True
    generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    without = "-f16c" in os.environ.get("NUMBA_CPU_FEATURES", "")
    return not generic and not without and processor.has_f16c()


def find_mixer(source: DType, output: DType) -> Mixer | None:
    """Give the kernel for these dtypes if it is in the cache, or None. Takes a millisecond."""
    found = objects.find(_label(source, output), _ROOMS)
    return None if found is None else Mixer(found)


def mixer(source: DType, output: DType) -> Mixer:
    """Give the kernel for these dtypes, compiled if it must be: some seconds, once."""
    found = find_mixer(source, output)
    if found is not None:
        return found
    from streamsoup.kernels.loops import compile_mix

    return Mixer(objects.make(_label(source, output), _ROOMS, lambda: compile_mix(source, output)))


def _label(source: DType, output: DType) -> str:
    return f"mix-{source.name}-{output.name}"
