"""Compiled kernels for the blocks of a soup, of either tier, wrapped so that Python can call them.

`mixer` makes those of the fast tier, one for each pair of dtypes; `plain_mixers` that of the plain
tier, which is for all. Numba is imported only to compile, or to load what is plain.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from streamsoup.kernels.constants import KINDS, SCRATCH
from streamsoup.kernels.fast import objects, processor
from streamsoup.kernels.fast.linking import Kernel
from streamsoup.kernels.leaf_digests import SECRET
from streamsoup.system.buffers import address_of, buffer
from streamsoup.tensors import DType

__all__ = ["Mixer", "PlainMixers", "find_mixer", "has_kernel", "mixer", "plain_mixers"]

_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int64, *[ctypes.c_int64] * 6, ctypes.c_double, *[ctypes.c_int64] * 4
)

_ROOMS = (
    *("constants.py", "plain.py", "fast/means.py", "fast/mix.py", "fast/prefetching.py"),
    *("fast/sums.py", "fast/vectors.py", "fast/xxh3.py"),
)
"""What the kernels of the fast tier are compiled from."""


class Mixer:
    """A compiled kernel, to be called by many threads at once. It runs without the GIL."""

    def __init__(
        self, kernel: Kernel, kinds: Sequence[int] = (), own: threading.local | None = None
    ) -> None:
        """Wrap a kernel, which lives as long as this does.

        Args:
            kernel: one of the fast tier, or the plain one.
            kinds: the dtypes of ingredients and result, for the plain kernel alone.
            own: scratch of each thread, if it is shared with other mixers.
        """
        self._call = _FUNCTION(kernel.address)
        self._kernel, self._kinds = kernel, kinds
        self._own = own or threading.local()

    @property
    def makes_digests(self) -> bool:
        """Return whether the kernel digests what it reads and writes: those of the fast tier do."""
        return not self._kinds

    def __call__(
        self,
        sums: int,
        addresses: Sequence[int],
        factors: Sequence[float],
        fresh: int,
        divisor: float,
        output: int,
        n: int,
        digests: int = 0,
        leaf: int = 0,
    ) -> bool:
        """Mix blocks of `n` elements, and return whether a result is not finite.

        Reads and writes raw memory: the caller keeps the blocks alive, and of the size it says.

        Args:
            sums: address of ``(n,) float64``, or 0 to keep sums within the call, which then has to
                be both fresh and finished.
            addresses: ``(ingredient,)``, those of the blocks.
            factors: ``(ingredient,)``, theirs.
            fresh: 1 if the sums start anew, and 0 if they go on; 2 if they start anew and float64
                that are the same in all ingredients need not be kept, as their sums are exact.
            divisor: what the sums are divided by, once they are finished.
            output: address of the result, or 0 to leave the sums unfinished for a later call.
            n: elements of each block. If there are digests and this block does not end the leaf, a
                multiple of `SCRAMBLE_NBYTES`.
            digests: address (`LeafDigests.address`) of the state of the first of these
                ingredients, or 0.
            leaf: elements of the leaf that this block ends, or 0. A leaf has `LEAST_NBYTES`, and
                its last block `STRIPE_NBYTES` or more, in the result as well.
        """
        if not hasattr(self._own, "scratch"):
            self._own.scratch = buffer(8 * SCRATCH + len(SECRET))
            self._own.scratch[8 * SCRATCH :] = SECRET
        k = len(addresses)
        table = (ctypes.c_int64 * (k + 1 + len(self._kinds)))(*addresses, output, *self._kinds)
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


class PlainMixers:
    """The plain kernel, which mixes blocks of any dtypes."""

    def __init__(self, kernel: Kernel) -> None:
        """Wrap the kernel, which lives as long as the mixers do."""
        self._kernel, self._own = kernel, threading.local()

    def of(self, sources: Sequence[DType], output: DType) -> Mixer:
        """Return what mixes ingredients of these dtypes into another. Takes microseconds."""
        kinds = [KINDS.index(dtype.name) for dtype in (*sources, output)]
        return Mixer(self._kernel, kinds, self._own)


def has_kernel(source: DType) -> bool:
    """Return whether the fast tier can be compiled for a dtype on this processor.

    Small floats are widened by an instruction of 2012, which others do not have; nor may it be
    used where numba was told to compile for any processor, old ones too.
    """
    small = source.name in ("F16", "F8_E4M3", "F8_E5M2")
    if not (small and processor.is_x86()):
        return True
    generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    without = "-f16c" in os.environ.get("NUMBA_CPU_FEATURES", "")
    return not generic and not without and processor.has_f16c()


def find_mixer(source: DType, output: DType) -> Mixer | None:
    """Return the fast kernel for these dtypes if it is in the cache. Takes a millisecond."""
    found = objects.find(_label(source, output), _ROOMS)
    return None if found is None else Mixer(found)


def mixer(source: DType, output: DType) -> Mixer:
    """Return the fast kernel for these dtypes, compiled if it must be: some seconds, once.

    Raises whatever numba does where it is broken, or other than the fast tier knows it.
    """
    found = find_mixer(source, output)
    if found is not None:
        return found
    from streamsoup.kernels.fast.mix import compile_mix

    return Mixer(objects.make(_label(source, output), _ROOMS, lambda: compile_mix(source, output)))


def plain_mixers() -> PlainMixers:
    """Return the plain kernel: half a second if numba has it in its cache, else some seconds.

    Raises whatever numba does where it is broken.
    """
    from streamsoup.kernels.plain import compile_mix

    kernel = compile_mix()
    return PlainMixers(Kernel(kernel.address, kernel))


def _label(source: DType, output: DType) -> str:
    return f"mix-{source.name}-{output.name}"
