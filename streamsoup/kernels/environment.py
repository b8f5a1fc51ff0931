"""How the processor computes: as IEEE 754 says, whatever the caller of a library has set.

A thread may have been told to take subnormal numbers for zero (``torch.set_flush_denormal``,
libraries built with ``-ffast-math``) or to round otherwise, and hands that on to the threads it
starts. Our results must not depend on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["standard_floats"]

_DEFAULT = ctypes.c_void_p(-1)
"""``FE_DFL_ENV`` of the C libraries of Linux: half to even, subnormals kept, no traps."""

_NBYTES = 256
"""More than a ``fenv_t`` takes anywhere: 32 bytes on x86-64, 8 on ARM."""


@contextmanager
def standard_floats() -> Iterator[None]:
    """Compute by the standard in this thread; give it back as it was. Takes microseconds."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "fesetenv"):
        yield
        return
    before = ctypes.create_string_buffer(_NBYTES)
    library.fegetenv(before)
    library.fesetenv(_DEFAULT)
    try:
        yield
    finally:
        library.fesetenv(before)
